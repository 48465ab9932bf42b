"""Which configuration a call gets, and why: data, looked up by (kernel, class of architectures, head_dim, dtype).

Kernels. "prefill" and "k_eq_v prefill" serve more than DECODE_ROWS query rows, one pass over the keys; "decode" and
"k_eq_v decode" serve up to DECODE_ROWS rows, the keys split among programs, and a second kernel combines the parts. Within
the decode range the number of rows decides only how many tiles of 16 a program takes one after the other, each with the
same instructions: that keeps a row's bits. The length of the keys decides how large a split is (`pieces.chunk_size`), on the
device.

Classes of architectures. A block may use 99 KiB of shared memory on sm_86, sm_89 and sm_120, 163 KiB on sm_80, 227 KiB on
sm_90 and sm_100. What is in no class is taken for the smallest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

SHARED_BYTES = {"consumer": 101376, "datacenter": 166912}
_DATACENTER = frozenset({"sm_80", "sm_90", "sm_100", "sm_103"})


@dataclass(frozen=True)
class Config:
    """Sizes of one program of a kernel."""

    rows: int
    """Packed query rows (rows times heads of a group) of a tile."""
    keys: int
    """Keys of a tile."""
    columns: int
    """Columns of head_dim that one product takes at a time."""
    warps: int
    stages: int
    """Iterations whose loads are under way, the current one included: stages - 1 tiles of keys in shared memory."""
    reason: str
    tiles: int = 1
    """Decode: tiles of rows that one program serves at most, so that a key leaves memory once for all of them."""


# A chunk of a split is at least so many tiles: below, starting a program costs more than its keys.
MIN_TILES_OF_A_CHUNK = 4


def splits(multiprocessors: int, kv_heads: int) -> int:
    """Chunks into which a row's keys are cut at most: one program per multiprocessor over all KV heads.

    One wave of equal programs leaves no multiprocessor idle, and the parts that they leave stay small beside the keys:
    on a card with 28, at 32768 keys of a full layer, 1.8 MB against 33.5 MB.
    """
    return max(1, -(-multiprocessors // kv_heads))


def slots(split_count: int, min_chunk: int, capacity: int) -> int:
    """Room for the chunks of a row, and for programs: `split_count` chunks that start where the row's keys do not make
    one more; up to 15 keys of a block ahead, another; and rows of one verification may begin in neighbouring chunks."""
    return max(1, min(split_count + 3, -(-capacity // min_chunk)))


def kind_of(architecture: str) -> str:
    """The class of an architecture: of what a block may use, and "interpreter"."""
    if architecture == "interpreter":
        return architecture
    return "datacenter" if architecture in _DATACENTER else "consumer"


def lookup(kernel: str, architecture: str, head_dim: int, dtype: torch.dtype) -> Config:
    """The first row of the kernel's table that holds head_dim, for the class of the architecture and the dtype."""
    for widest, config in TABLE[kernel, kind_of(architecture), dtype.itemsize]:
        if head_dim <= widest:
            return config
    raise ValueError(f"tables.lookup: {kernel} has no row for head_dim {head_dim}")


def columns(config: Config, head_dim: int) -> int:
    """Columns of a product: the configuration's, or the power of two that holds a smaller head_dim."""
    return min(config.columns, max(16, 1 << (head_dim - 1).bit_length()))


def stages(config: Config, indirect: bool) -> int:
    """What `tl.range` is told. Where rows are found through a page table or hidden by ids, those are loaded a pass ahead of
    the rows, and Triton counts the passes of both: as many more keep as many tiles of rows under way."""
    return config.stages + (config.stages - 1 if indirect else 0)


# Rows: the largest head_dim, and the configuration for it. Registers and spills named here are those of sm_86.
#
# Triton divides the first of two chained products among the warps by rows, unless a tile has more keys than rows: with
# fewer than 16 rows a warp, some warps repeat the scores of others. So tiles are tall enough, or wider than tall.
_PREFILL = (
    (128, Config(128, 32, 64, 8, 3, "64 keys would fill the registers; 32 leave two buffers and two blocks an SM")),
    (256, Config(32, 64, 128, 8, 2, "wider than tall: eight warps share out the keys; 64 or 128 rows that do spill")),
    (512, Config(16, 32, 64, 4, 2, "32 keys and values of 512 columns leave room for 16 rows and one buffer of each")),
)
_DECODE = (
    (128, Config(16, 64, 64, 4, 3, "short rows: 64 keys to a tile keep the loads long", tiles=2)),
    (256, Config(16, 32, 64, 4, 3, "two buffers of keys and values; both tiles of 16 rows of a group of 2", tiles=2)),
    (512, Config(16, 16, 64, 4, 3, "two buffers; with 32 keys there would be room for one")),
)
_K_EQ_V_SPILL = (
    "at 512 columns, words that the loop seldom uses wait in local memory: up to 96 bytes of stack, at most 9 of 971 "
    "instructions of a pass on sm_120, none on sm_86 without pages; eight warps would spill nothing and compute half of "
    "their scores twice"
)
_K_EQ_V = (
    (512, Config(16, 32, 64, 4, 3, "two buffers of 32 keys that serve both products; " + _K_EQ_V_SPILL)),
)  # fmt: skip
_K_EQ_V_ANY = ((512, Config(16, 32, 64, 4, 1, "any pairs rotate: never in a Gemma, so small and free of spills")),)
# Products of fp32 run on the ordinary cores, without rounding to tf32: for tests, and for whoever asks for fp32.
_FP32 = (
    (128, Config(16, 16, 64, 4, 1, "few columns keep four warps busy")),
    (
        512,
        Config(
            16, 16, 64, 8, 1, "98,304 bytes at 512 columns, one buffer; at 256, decode parks two words outside its loop"
        ),
    ),
)

KERNELS = {
    "prefill": _PREFILL,
    "decode": _DECODE,
    "k_eq_v prefill": _K_EQ_V,
    "k_eq_v decode": _K_EQ_V,
    "k_eq_v prefill, any pairs": _K_EQ_V_ANY,
    "k_eq_v decode, any pairs": _K_EQ_V_ANY,
}
# What differs on cards with more shared memory.
_DATACENTER_ROWS = {
    "prefill": (*_PREFILL[:2], (512, Config(16, 32, 64, 4, 3, "as on small cards, with a second buffer of each"))),
    "decode": (*_DECODE[:2], (512, Config(16, 32, 64, 4, 3, "two buffers of 32 keys and values: 146 KiB"))),
}


def _interpreted(kernel: str, config: Config) -> Config:
    """The interpreter pays for operations, not for numbers: tiles of 64 rows in prefill and 32 keys at least, and chunks of
    columns that still make four, or four blocks of pairs, of 512."""
    rows = config.rows if "decode" in kernel else max(64, config.rows)
    return replace(config, rows=rows, keys=max(32, config.keys), columns=64 if kernel.startswith("k_eq_v") else 128)


TABLE: dict[tuple[str, str, int], tuple[tuple[int, Config], ...]] = {}
for _kernel, _rows in KERNELS.items():
    TABLE[_kernel, "consumer", 2] = _rows
    TABLE[_kernel, "datacenter", 2] = _DATACENTER_ROWS.get(_kernel, _rows)
    for _size in (2, 4):
        TABLE[_kernel, "interpreter", _size] = tuple((most, _interpreted(_kernel, config)) for most, config in _rows)
    for _kind in SHARED_BYTES:
        TABLE[_kernel, _kind, 4] = _FP32
