"""The arguments that the attention kernels share, from the arguments of an op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma4_kernels.attention.triton.pieces import NO_LIMIT


@dataclass(frozen=True)
class AttentionCall:
    """Queries, a cache, and which part of it belongs to whom. With `cu_q`, q is packed (total, HQ, D)."""

    q: Tensor  # (B, ROWS, HQ, D)
    k: Tensor  # (entries, S, HKV, D), packed (total, HKV, D), or pages (P, PAGE_SIZE, HKV, D)
    v: Tensor
    batch: int
    num_rows: int
    """Query rows of a request, the most with `cu_q`."""
    capacity: int
    """The most keys that a request can have."""
    scale: float
    left: int
    right: int
    softcap: float = 0.0
    cu_q: Tensor | None = None  # (B + 1,)
    cu_k: Tensor | None = None  # (B + 1,)
    lengths: Tensor | None = None  # (B,)
    first: Tensor | None = None  # (B,)
    entry: Tensor | None = None  # (B,)
    table: Tensor | None = None  # (B, pages of a request)
    ids: Tensor | None = None  # (B, capacity)
    free_blocks: bool = False

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[-2]

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[-2] // self.kv_heads

    @property
    def page_size(self) -> int:
        return 0 if self.table is None else self.k.shape[1]

    def results(self) -> tuple[Tensor, Tensor]:
        """Room for out, like q, and lse (B, HQ, ROWS) or (HQ, total) fp32."""
        *batch, rows, heads, dim = self.q.shape
        return self.q.new_empty((*batch, rows, heads, dim)), self.q.new_empty(
            (*batch, heads, rows), dtype=torch.float32
        )

    def request_arguments(self) -> dict[str, Any]:
        """What finds the rows and keys of a request (`pieces.request_of`), and the window."""
        packed = self.k.dim() == 3
        return {
            "cu_q_ptr": self.cu_q, "cu_k_ptr": self.cu_k, "lengths_ptr": self.lengths, "first_ptr": self.first,
            "entry_ptr": self.entry, "num_rows": self.num_rows, "capacity": self.capacity,
            "total_rows": self.q.shape[0] if self.cu_q is not None else 0,
            "total_keys": self.k.shape[0] if packed else 0,
            "num_entries": 0 if packed else self.k.shape[0],
            "left": NO_LIMIT if self.left < 0 else min(self.left, NO_LIMIT),
            "right": NO_LIMIT if self.right < 0 else min(self.right, NO_LIMIT),
        }  # fmt: skip

    def query_arguments(self) -> dict[str, Any]:
        return {"q_ptr": self.q} | _strides("q", self.q)

    def cache_arguments(self, name: str, cache: Tensor) -> dict[str, Any]:
        """Pointer and strides of keys or values: of an entry or page, a row, a head."""
        entry = 0 if cache.dim() == 3 else cache.stride(0)
        row, head = cache.stride(-3), cache.stride(-2)
        return {
            f"{name}_ptr": cache, f"stride_{name}e": entry, f"stride_{name}s": row, f"stride_{name}h": head
        }  # fmt: skip

    def table_arguments(self) -> dict[str, Any]:
        return {
            "table_ptr": self.table, "stride_tb": 0 if self.table is None else self.table.stride(0),
            "num_pages": 0 if self.table is None else self.k.shape[0],
        }  # fmt: skip

    def result_arguments(self, out: Tensor, lse: Tensor) -> dict[str, Any]:
        batch = lse.stride(0) if lse.dim() == 3 else 0
        return {
            "out_ptr": out, "lse_ptr": lse, "stride_lb": batch, "stride_lh": lse.stride(-2), **_strides("o", out)
        }  # fmt: skip


def _strides(letter: str, rows: Tensor) -> dict[str, int]:
    """Of a request, a row, a head; 0 of a request where rows are packed."""
    batch = rows.stride(0) if rows.dim() == 4 else 0
    return {f"stride_{letter}b": batch, f"stride_{letter}s": rows.stride(-3), f"stride_{letter}h": rows.stride(-2)}


def dense(numbers: Tensor | None) -> Tensor | None:
    """Kernels step over lengths, ids and page numbers one by one."""
    return numbers if numbers is None or numbers.stride(-1) == 1 or numbers.shape[-1] <= 1 else numbers.contiguous()
