"""The kernels of csrc for `bench --static`: the machine code in gemma4_kernels._C, and what it does not show of each.

A function's name says which kernel it is, and KNOWN what to say of it: a name to read, warps and dynamic shared memory of a
block, bytes and multiply-accumulates of a pass of its main loop. A kernel that KNOWN does not have is there all the same, with
what its machine code shows.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from gemma4_kernels.bench import sass
from gemma4_kernels.bench.static import CompiledKernel, UnavailableError
from gemma4_kernels.linear import cuda_table
from gemma4_kernels.linear.cuda import SERVED
from gemma4_kernels.linear.schemes import SCHEMES


class Facts(NamedTuple):
    """The fields of a CompiledKernel that machine code does not show."""

    name: str
    warps: int | None = None
    shared_bytes: int | None = None
    loop_bytes: int | None = None
    loop_macs: int | None = None
    main_loop: str = "loads"


# Products with quantised weights -------------------------------------------------------------------------------------

WARPS = 4
TILE_ROWS = 8
_CODE_BYTES = 128  # of a row of the weight in a stage
_MOST_BLOCK_BYTES = 49 * 1024  # of two blocks of a consumer card


class Stage(NamedTuple):
    """csrc/linear/stage.cuh, whose names these are."""

    values: str
    bits: int
    tiles: int
    """Of 8 rows of x."""

    @property
    def rows(self) -> int:
        return TILE_ROWS * self.tiles

    @property
    def columns(self) -> int:
        return cuda_table.stage_columns(self.bits)

    @property
    def slots(self) -> int:
        """Runs of columns that share a scale at least."""
        return self.columns // (16 if self.bits == 6 else 32)

    @property
    def code_bytes(self) -> int:
        """With the bits above the fourth, a word of a slot."""
        high = 4 * self.slots if self.bits in (5, 6) else 0
        return cuda_table.OUTPUTS * (_CODE_BYTES + high)

    @property
    def shared_bytes(self) -> int:
        """Of a block: the ring, and behind it sums of x for offsets."""
        return self.ring_stages * self._bytes + self._sum_bytes

    @property
    def ring_stages(self) -> int:
        return (_MOST_BLOCK_BYTES - self._sum_bytes) // self._bytes

    @property
    def _bytes(self) -> int:
        numbers = cuda_table.OUTPUTS * self.slots * 4  # of one kind, in fp32: scales, and zero points or offsets
        kinds = 2 if self.values in ("zeros", "offsets") else 1
        return self.code_bytes + self.rows * self.columns * 2 + kinds * numbers

    @property
    def _sum_bytes(self) -> int:
        return self.slots * self.rows * 4 if self.values == "offsets" else 0


VALUES = ("centred", "zeros", "offsets", "table")  # gemma4_values
# A kind of scales, and for plain ones their dtype.
_SCALES: dict[str, tuple[str, torch.dtype | None]] = {
    "SixBit": ("six_bit", None), "Int8": ("int8", None), "E8m0": ("e8m0", None), "Nested": ("nested", None),
    "Fp16": ("plain", torch.float16), "Bf16": ("plain", torch.bfloat16), "Fp32": ("plain", torch.float32),
}  # fmt: skip
LINEAR = re.compile(
    r"6linear13decode_kernelINS_3ptx4(?P<x>Bf16|Fp16)E.*?\d(?P<scales>Fp16|Bf16|Fp32|E8m0|Int8|SixBit|Nested)Scales?[EI]"
    r".*?ValuesE(?P<values>[0123])E.*?Li(?P<bits>[4568])ELi(?P<tiles>[12])EEEv"
)


def stage_of(found: re.Match[str]) -> Stage:
    """Of a function that LINEAR fits."""
    return Stage(VALUES[int(found["values"])], int(found["bits"]), int(found["tiles"]))


def _linear_decode(found: re.Match[str]) -> Facts:
    stage, scales = stage_of(found), found["scales"]
    kind, dtype = _SCALES[scales]
    layouts = {name: SCHEMES[name] for name in SERVED}
    schemes = [
        name
        for name, layout in layouts.items()
        if (layout.values, layout.bits, layout.scales) == (stage.values, stage.bits, kind)
        and (dtype is None or dtype in layout.scale_dtypes)
    ]
    return Facts(
        name=f"linear {stage.values} ({', '.join(schemes)}), {scales} scales, {found['x']} x, up to {stage.rows} rows",
        warps=WARPS,
        shared_bytes=stage.shared_bytes,
        # A pass of the loop is a round of the ring. Codes alone, so that the figures hold for every size of groups. Scales come
        # on top, and x, from L2.
        loop_bytes=stage.ring_stages * stage.code_bytes,
        loop_macs=stage.ring_stages * cuda_table.OUTPUTS * stage.columns * stage.rows,
        main_loop="copies",
    )


# Attention -----------------------------------------------------------------------------------------------------------

ATTENTION_TILE_ROWS = 16  # packed rows: query heads of a KV head times rows of a request
_FLASH_SLOT_BYTES = 8192  # of keys, and of values, in csrc/attention/flash_decode.cuh
_K_EQ_V_WARPS, _K_EQ_V_KEYS, _K_EQ_V_ROWS = 8, 32, 2 * ATTENTION_TILE_ROWS  # in k_eq_v.cuh
FLASH = re.compile(r"flash_decode_kernelINS_3ptx4(?P<x>Bf16|Fp16)ELi(?P<dim>\d+)ELi(?P<tiles>\d)E")
K_EQ_V = re.compile(
    r"k_eq_v_kernelINS1_10(?:Plain|Coded)CacheINS_3ptx4(?P<x>Bf16|Fp16)E(?:NS1_\d(?P<codes>Float8|Int8)E)?"
    r"Li\d+EEELi(?P<dim>\d+)E"
)


def _flash_decode(found: re.Match[str]) -> Facts:
    head_dim, tiles = int(found["dim"]), int(found["tiles"])
    rows, keys = tiles * ATTENTION_TILE_ROWS, _FLASH_SLOT_BYTES // (2 * head_dim)
    scores = rows * keys * 4 * (2 if head_dim == 256 else 1)  # at 256 columns, of either half
    return Facts(
        name=f"attention flash_decode, head_dim {head_dim}, {found['x']}, up to {rows} packed rows",
        warps=4,
        shared_bytes=3 * _FLASH_SLOT_BYTES + rows * 2 * head_dim + scores,
        loop_bytes=2 * _FLASH_SLOT_BYTES,
        loop_macs=2 * rows * keys * head_dim,
        main_loop="copies",
    )


def _k_eq_v(found: re.Match[str]) -> Facts:
    """It has loops for one tile of rows or two, and for few rotating columns or any number. This is two tiles and few."""
    head_dim, codes = int(found["dim"]), found["codes"]
    scores = _K_EQ_V_WARPS * _K_EQ_V_ROWS * _K_EQ_V_KEYS * 4
    order = 2 * head_dim // 16 + 16
    return Facts(
        name=f"attention k_eq_v, head_dim {head_dim}, {found['x']}, values in {codes or found['x']}, "
        f"up to {_K_EQ_V_ROWS} packed rows",
        warps=_K_EQ_V_WARPS,
        shared_bytes=2 * _K_EQ_V_KEYS * 2 * head_dim + scores + _K_EQ_V_ROWS * (_K_EQ_V_KEYS * 2 + 4) + order,
        loop_bytes=_K_EQ_V_KEYS * head_dim * (1 if codes else 2),
        loop_macs=2 * _K_EQ_V_ROWS * _K_EQ_V_KEYS * head_dim,
        main_loop="fast macs",
    )


# Kernels of which no loop streams what has to be read ----------------------------------------------------------------

# (function, what it is called, warps of a block, dynamic shared memory). None: the length of a row decides, or the size of a
# structure. The tiles of verification read all of their logits before their first loop.
_OTHERS: tuple[tuple[str, str, int | None, int | None], ...] = (
    (r"6linear\S*?add_pieces_kernel", "linear sum of pieces", 4, 0),
    (r"6linear\S*?argmax_of_pieces_kernel", "linear argmax of pieces", 8, None),
    (r"6linear\S*?argmax_of_blocks_kernel", "linear argmax of blocks", 8, None),
    (r"6linear\S*?embedding_kernel", "linear rows by token id", 4, 0),
    (r"9attention\S*?combine_kernel", "attention sum of chunks", 4, 0),
    (r"8prologue\S*?prologue_kernel", "attention prologue", 4, 0),
    (r"sandwich_norm_kernel", "sandwich norm", None, None),
    (r"12verification\S*?tiles_kernel", "verification tiles", 4, None),
    (r"12verification\S*?survey_kernel", "verification survey", 4, None),
    (r"12verification\S*?rows_kernel", "verification rows", 8, None),
    (r"12verification\S*?residuals_kernel", "verification residuals", 8, None),
)


def _other(name: str, warps: int | None, shared_bytes: int | None) -> Callable[[re.Match[str]], Facts]:
    def describe(found: re.Match[str]) -> Facts:
        arguments = [
            text or number for text, number in re.findall(r"(Bf16|Fp16|Fp32)|Li(\d+)E", found.string[found.end() :])
        ]
        return Facts(", ".join([name, *arguments]), warps, shared_bytes)

    return describe


# (mangled name, what to say of the kernel). A family joins with its lines.
KNOWN: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Facts]], ...] = (
    (LINEAR, _linear_decode),
    (FLASH, _flash_decode),
    (K_EQ_V, _k_eq_v),
    *((re.compile(pattern), _other(name, warps, shared)) for pattern, name, warps, shared in _OTHERS),
)

# Everything ----------------------------------------------------------------------------------------------------------


def facts(function: str) -> Facts:
    """What is known of a function by its mangled name."""
    for pattern, describe in KNOWN:
        if found := pattern.search(function):
            return describe(found)
    return Facts(plain_name(function))


def plain_name(function: str) -> str:
    """ "attention split_kernel" and the arguments of its template as they are mangled, which tell its instances apart."""
    names, rest = [], function.removeprefix("_ZN")
    while (size := re.match(r"\d+", rest)) and rest != function:
        start, end = size.end(), size.end() + int(size[0])
        names.append(rest[start:end])
        rest = rest[end:]
    # Of namespaces those that a person named, without the one that all have in common.
    names = [name for name in names if not name.startswith(("_GLOBAL__N_", "_INTERNAL_")) and name != "gemma4"]
    if not names:
        return function
    return " ".join(names) + (f" <{rest[1:]}>" if rest.startswith("I") else "")


def module() -> Path | None:
    """Where gemma4_kernels._C is; it is not loaded."""
    found = find_spec("gemma4_kernels._C")
    return Path(found.origin) if found and found.origin else None


def machine_code(architecture: str) -> list[bytes]:
    """The module's cubins for an architecture, one for each source file with kernels. Raises UnavailableError without one."""
    path, tool = module(), sass.cuobjdump()
    if path is None:
        raise UnavailableError("gemma4_kernels._C is not built, so no compiled CUDA kernel is read (docs/cuda.md)")
    if tool is None:
        raise UnavailableError("cuobjdump is missing, so no compiled CUDA kernel is read")
    with tempfile.TemporaryDirectory() as folder:
        command = [tool, "-xelf", f"{architecture}.cubin", str(path)]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
        cubins = [each.read_bytes() for each in sorted(Path(folder).glob("*.cubin"))]
    return [cubin for cubin in cubins if functions(cubin)]


def functions(cubin: bytes) -> list[str]:
    """The kernels of a cubin, by their mangled names: each has a section of its own."""
    return sorted({name.decode() for name in re.findall(rb"\0\.text\.(\w+)", cubin)})


def provide(architecture: str) -> Iterator[CompiledKernel]:
    """For `bench --static`."""
    cubins = machine_code(architecture)
    if not cubins:
        raise UnavailableError(f"gemma4_kernels._C has no machine code for {architecture}")
    for cubin in cubins:
        for function in functions(cubin):
            known = facts(function)
            yield CompiledKernel(
                known.name, architecture, cubin, known.shared_bytes, known.warps, known.loop_bytes, known.loop_macs,
                known.main_loop, function,
            )  # fmt: skip
