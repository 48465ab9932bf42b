"""A ring for sliding layers: the keys and values of a window in a buffer of fixed size, however long the text.

The row of position p is p % capacity. Attention reads the ring as pages, through a block table that repeats: entry i of a
request is its page i % (pages of its ring). Lengths, positions and the window then are those of a cache that holds everything,
no function knows of the ring, and a row's tiles, and with them its bits, do not depend on how far the ring has turned.

A verification writes up to `tentative_rows` rows before it is known how many of them stay. The last of them takes the place of
position p - capacity, which its first row must not need any more: hence window + tentative_rows rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma4_kernels import checks


@dataclass(frozen=True)
class RingCache:
    """Keys and values of one sliding layer. Make it with `allocate`.

        ring = RingCache.allocate(batch, 1024, 8, 256, dtype=torch.bfloat16, device="cuda")
        table = ring.block_table(max_positions)  # once; it never changes
        q = qkv_norm_rope_append(q, k, v, ..., *ring.pages(), cache_seqlens=lengths, block_table=table)
        out = flash_attn_with_kvcache(
            q, *ring.pages(), cache_seqlens=lengths + rows, block_table=table, causal=True, window_size=(1023, 0))

    To reject rows, go on from a shorter length: nothing is moved. One call must not write more than `tentative_rows` rows; a
    longer prefill attends to its own keys and leaves only the last rows of its window here, or takes a ring with as many
    tentative rows as a chunk of it has.
    """

    k: Tensor
    v: Tensor
    """(B, capacity, Hkv, D), contiguous."""
    page_size: int

    @classmethod
    def allocate(
        cls, batch: int, window: int, num_heads: int, head_dim: int, *, dtype: torch.dtype,
        device: torch.device | str = "cpu", page_size: int = 16, tentative_rows: int = 16,
    ) -> RingCache:  # fmt: skip
        """An empty ring.

        Args:
            window: keys that a row sees, itself included; Gemma's 1024 is window_size (1023, 0).
            num_heads: of keys and values.
            page_size: rows of a page. The capacity, window + tentative_rows, is rounded up to a multiple of it.
            tentative_rows: the most rows that one call writes.
        Raises: ValueError, TypeError.
        """
        sizes = {
            "window": window, "num_heads": num_heads, "head_dim": head_dim, "page_size": page_size,
            "tentative_rows": tentative_rows,
        }  # fmt: skip
        for name, size in sizes.items():
            checks.whole_number("RingCache.allocate", name, size, minimum=1)
        checks.whole_number("RingCache.allocate", "batch", batch)
        capacity = -(-(window + tentative_rows) // page_size) * page_size
        k, v = (torch.zeros((batch, capacity, num_heads, head_dim), dtype=dtype, device=device) for _ in range(2))
        return cls(k, v, page_size)

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    @property
    def pages_per_request(self) -> int:
        return self.capacity // self.page_size

    def pages(self) -> tuple[Tensor, Tensor]:
        """The same memory as pages (B * capacity / page_size, page_size, Hkv, D): k and v."""
        batch, _, heads, head_dim = self.k.shape
        shape = (batch * self.pages_per_request, self.page_size, heads, head_dim)
        return self.k.view(shape), self.v.view(shape)

    def block_table(self, max_positions: int) -> Tensor:
        """(B, pages of max_positions) int32: where each page of a text of that length lies in `pages`."""
        max_positions = checks.whole_number("RingCache.block_table", "max_positions", max_positions)
        request = torch.arange(self.k.shape[0], dtype=torch.int32, device=self.k.device)[:, None]
        page = torch.arange(-(-max_positions // self.page_size), dtype=torch.int32, device=self.k.device)
        return request * self.pages_per_request + page % self.pages_per_request
