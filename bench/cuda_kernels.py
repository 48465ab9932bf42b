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

from gemma4_kernels.bench import cuda_layers, sass
from gemma4_kernels.bench.static import CompiledKernel, UnavailableError
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


# Products with 4-bit weights -----------------------------------------------------------------------------------------

VALUES = ("centred", "zeros", "offsets", "table")  # gemma4_values
# A kind of scales, and for plain ones their dtype.
_SCALES: dict[str, tuple[str, torch.dtype | None]] = {
    "SixBit": ("six_bit", None), "Int8": ("int8", None), "E8m0": ("e8m0", None),
    "Fp16": ("plain", torch.float16), "Bf16": ("plain", torch.bfloat16), "Fp32": ("plain", torch.float32),
}  # fmt: skip


def _linear_decode(found: re.Match[str]) -> Facts:
    values, scales, tiles = VALUES[int(found["values"])], found["scales"], int(found["tiles"])
    rows = cuda_layers.TILE_ROWS * tiles
    kind, dtype = _SCALES[scales]
    layouts = {name: SCHEMES[name] for name in SERVED}
    schemes = [
        name
        for name, layout in layouts.items()
        if (layout.values, layout.scales) == (values, kind) and (dtype is None or dtype in layout.scale_dtypes)
    ]
    stages = cuda_layers.ring_stages(rows)  # a pass of the loop is a round of the ring
    return Facts(
        name=f"linear {values} ({', '.join(schemes)}), {scales} scales, {found['x']} x, up to {rows} rows",
        warps=cuda_layers.WARPS,
        shared_bytes=cuda_layers.shared_bytes(values, rows),
        # Codes alone, so that the figures hold for every size of groups. Scales come on top, and x, from L2.
        loop_bytes=stages * cuda_layers.STAGE_CODE_BYTES,
        loop_macs=stages * cuda_layers.STAGE_CODE_BYTES * 2 * rows,
        main_loop="copies",
    )


LINEAR = re.compile(
    r"6linear13decode_kernelINS_3ptx4(?P<x>Bf16|Fp16)E.*?\d(?P<scales>Fp16|Bf16|Fp32|E8m0|Int8|SixBit)Scales?E"
    r".*?ValuesE(?P<values>[0123])E.*?Li(?P<tiles>[12])EEEv"
)

# (mangled name, what to say of the kernel). A family joins with its lines.
KNOWN: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Facts]], ...] = (
    (LINEAR, _linear_decode),
    (
        re.compile(r"add_pieces_kernelINS_3ptx4(?P<x>Bf16|Fp16)E"),
        lambda found: Facts(f"linear sum of pieces, {found['x']}", warps=4, shared_bytes=0),
    ),
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
