"""Which configuration a call gets, and why: data, looked up by (kernel, class of architectures, head_dim, dtype).

Kernels. "prefill" and "k_eq_v prefill" serve more than DECODE_ROWS query rows, one pass over the keys; "decode" and
"k_eq_v decode" serve up to DECODE_ROWS rows, the keys split among programs, and a second kernel combines the parts. The
number of rows decides nothing else: within the decode range one binary serves every number of rows, which keeps a row's
bits. The length of the keys decides how large a split is (`pieces.chunk_size`), on the device.

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


def lookup(kernel: str, architecture: str, head_dim: int, dtype: torch.dtype) -> Config:
    """The first row of the kernel's table that holds head_dim, for the class of the architecture and the dtype."""
    kind = "datacenter" if architecture in _DATACENTER else "consumer"
    if architecture == "interpreter":
        kind = architecture
    for widest, config in TABLE[kernel, kind, dtype.itemsize]:
        if head_dim <= widest:
            return config
    raise ValueError(f"tables.lookup: {kernel} has no row for head_dim {head_dim}")


def columns(config: Config, head_dim: int) -> int:
    """Columns of a product: the configuration's, or the power of two that holds a smaller head_dim."""
    return min(config.columns, max(16, 1 << (head_dim - 1).bit_length()))


# (kernel, class, bytes of an element) -> rows (largest head_dim, configuration).
_16_BIT_PREFILL = [
    (128, Config(128, 64, 128, 8, 2, "placeholder")),
    (256, Config(64, 32, 64, 4, 2, "placeholder")),
    (512, Config(32, 32, 64, 8, 2, "placeholder")),
]
_16_BIT_DECODE = [
    (128, Config(16, 64, 128, 4, 3, "placeholder", tiles=4)),
    (256, Config(16, 32, 64, 4, 3, "placeholder", tiles=2)),
    (512, Config(16, 32, 64, 4, 2, "placeholder")),
]
_32_BIT = [(512, Config(16, 16, 64, 4, 1, "placeholder"))]
_KEQV_PREFILL = [(512, Config(32, 32, 64, 8, 2, "placeholder"))]
_KEQV_DECODE = [(512, Config(16, 32, 64, 4, 3, "placeholder"))]
TABLE: dict[tuple[str, str, int], list[tuple[int, Config]]] = {}
for _kind in SHARED_BYTES:
    TABLE["prefill", _kind, 2] = _16_BIT_PREFILL
    TABLE["decode", _kind, 2] = _16_BIT_DECODE
    TABLE["k_eq_v prefill", _kind, 2] = _KEQV_PREFILL
    TABLE["k_eq_v decode", _kind, 2] = _KEQV_DECODE
    for _kernel in ("prefill", "decode", "k_eq_v prefill", "k_eq_v decode"):
        TABLE[_kernel, _kind, 4] = _32_BIT
for _kernel in ("prefill", "decode", "k_eq_v prefill", "k_eq_v decode"):
    for _size in (2, 4):
        TABLE[_kernel, "interpreter", _size] = [(w, replace(c, columns=128 if "k_eq" in _kernel else 256)) for w, c in TABLE[_kernel, "consumer", 2]]
