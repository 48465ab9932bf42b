"""Keys and values of a batch under speculation: tentative rows beside committed ones, and a length that says which are which.

A pass writes the rows of a bonus token and its drafts at positions length, length + 1, ..., and attends to everything up to
them. What the verification keeps becomes part of the text by `commit`, which adds to the length and moves nothing; the
next pass overwrites the rest.

Sliding layers lie in rings (`attention.ring`) of window + tentative rows, so that no row of a pass takes the place of a key
that an earlier row of the same pass, or the drafter after it, still needs. Full layers whose keys are a function of their
values keep the values alone. Both are pages behind a block table, one table for all layers of a kind: a request that has
ended leaves the batch with its row of the table, and no row of a cache moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gemma4_kernels import checks
from gemma4_kernels.attention import value_codes
from gemma4_kernels.attention.api import flash_attn_with_kvcache, k_eq_v_attention
from gemma4_kernels.attention.ring import RingCache
from gemma4_kernels.mtp.rows import LayerRows, SharedRows

FULL_PAGE = 64
"""Rows of a page of a full layer."""
_ALL = slice(None)


@dataclass(frozen=True)
class CachedLayer:
    """What a layer caches. Layers without keys and values of their own have none of these."""

    kind: Literal["sliding", "full"]
    num_heads: int
    """Of keys and values."""
    head_dim: int
    window: int | None = None
    """Of a sliding layer: keys that a row sees, itself included."""
    k_norm_weight: Tensor | None = None
    """(D,), of a full layer whose keys are rope(value * k_norm_weight): it caches values alone. None: it caches both."""
    inv_freq: Tensor | None = None
    """(D/2,), with k_norm_weight."""


class SpeculativeCache:
    """The cache of one batch.

    Args:
        layers: index -> CachedLayer.
        batch: B.
        max_positions: the longest text of a request, tentative rows included.
        tentative_rows: the most rows of a pass after the first.
        dtype, device: of keys and values.
        values_dtype: of the layers that cache values alone: dtype, or float8_e4m3fn or int8, half the bytes of a bf16 cache
            at the error that docs/attention.md states.
    Raises: ValueError, TypeError.
    """

    def __init__(
        self, layers: Mapping[int, CachedLayer], *, batch: int, max_positions: int, tentative_rows: int,
        dtype: torch.dtype, device: torch.device | str, values_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        name = "SpeculativeCache"
        values_dtype = values_dtype or dtype
        if values_dtype not in (dtype, *value_codes.FEATURES):
            raise checks.DTypeError(
                f"{name}: values_dtype must be {dtype}, torch.float8_e4m3fn or torch.int8, got {values_dtype}"
            )
        checks.whole_number(name, "batch", batch, minimum=1)
        checks.whole_number(name, "max_positions", max_positions, minimum=1)
        checks.whole_number(name, "tentative_rows", tentative_rows, minimum=1)
        windows = {layer.window for layer in layers.values() if layer.kind == "sliding"}
        if len(windows) > 1 or None in windows:
            raise ValueError(f"{name}: layers must have one window, got {sorted(windows, key=str)}")
        self.layers = dict(layers)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)  # committed rows
        self._pages: dict[int, tuple[Tensor | None, Tensor]] = {}  # (num_pages, page_size, Hkv, D) of keys and values
        self._scales: dict[int, Tensor] = {}  # of values of 8 bits: (Hkv,) or (num_pages, page_size, Hkv)
        self._tables: dict[str, Tensor] = {}  # kind -> (B, pages of a request) int32
        self._page_sizes: dict[str, int] = {}
        self._capacity = 0  # rows of a ring
        self._group = slice(None)  # the requests of a pass
        self._places: dict[str, Tensor] = {}  # kind -> where a pass writes, in rows of all pages
        self._sources: dict[str, Tensor | None] = {}  # kind -> which rows of the pass (B * S) it writes, None for all
        self._attended = self.lengths  # rows that a request has during a pass
        per_request = -(-max_positions // FULL_PAGE)
        for index, layer in self.layers.items():
            heads, head_dim = layer.num_heads, layer.head_dim
            if layer.kind == "sliding":
                assert layer.window is not None  # checked above
                ring = RingCache.allocate(
                    batch, layer.window, heads, head_dim, dtype=dtype, device=device, tentative_rows=tentative_rows
                )
                self._pages[index], self._capacity = ring.pages(), ring.capacity
                table, page_size = ring.block_table(max_positions), ring.page_size
            else:
                shape = (batch * per_request, FULL_PAGE, heads, head_dim)
                if layer.k_norm_weight is None:
                    self._pages[index] = (
                        torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
                    )  # fmt: skip
                elif values_dtype == dtype:
                    self._pages[index] = (None, torch.zeros(shape, dtype=dtype, device=device))
                else:
                    values, self._scales[index] = value_codes.allocate(shape, values_dtype, device)
                    self._pages[index] = (None, values)
                pages = torch.arange(batch * per_request, dtype=torch.int32, device=device)
                table, page_size = pages.view(batch, per_request), FULL_PAGE
            self._tables[layer.kind], self._page_sizes[layer.kind] = table, page_size

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, with their scales."""
        scales = sum(scale.nbytes for scale in self._scales.values())
        return scales + sum(rows.nbytes for pages in self._pages.values() for rows in pages if rows is not None)

    def begin_prompts(self, lengths: list[int], start: int, stop: int, group: slice = _ALL) -> None:
        """Announce a pass over positions start to stop - 1 of the prompts of a group of requests, padded on the right to
        stop; `lengths` says how much of each of them is text.

        What is written is what later rows and the drafter will read: of sliding layers, the end of each prompt.
        """
        self._group = group
        device = self.lengths.device
        for kind in self._tables:
            table = self._table(kind)
            keep = self._capacity if kind == "sliding" else max(lengths)
            # A chunk in the middle of a prompt is followed by rows that see its end.
            ends = [max(start, min(length, stop)) for length in lengths]
            spans = [torch.arange(max(start, end - keep), end) for end in ends]
            request = torch.cat([torch.full_like(span, b) for b, span in enumerate(spans)]).to(device)
            position = torch.cat(spans).to(device)
            self._places[kind] = self._place(kind, table[request], position[:, None])[:, 0]
            self._sources[kind] = request * (stop - start) + position - start
        self._attended = torch.full_like(self.lengths[group], stop)

    def newest(self, index: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, n, Hkv, D) of a sliding layer at positions stop - n to stop - 1, n those that the row at `stop`
        sees."""
        layer, (keys, values) = self.layers[index], self._pages[index]
        assert layer.window is not None
        assert keys is not None
        count = min(stop, layer.window - 1)
        table = self._table(layer.kind)
        positions = torch.arange(stop - count, stop, device=keys.device).expand(table.shape[0], -1)
        place = self._place(layer.kind, table, positions)  # (B, n)
        return keys.flatten(0, 1)[place], values.flatten(0, 1)[place]

    def begin_rows(self, rows: int, group: slice = _ALL) -> Tensor:
        """Announce a pass over `rows` tentative rows of a group of requests. Returns their positions (B, rows) int64."""
        self._group = group
        lengths = self.lengths[group]
        positions = lengths[:, None] + torch.arange(rows, device=lengths.device)  # (B, rows) int64
        for kind in self._tables:
            self._places[kind] = self._place(kind, self._table(kind), positions).flatten()
            self._sources[kind] = None
        self._attended = lengths + rows
        return positions

    def _table(self, kind: str) -> Tensor:
        """(B, pages of a request) of the requests of a pass."""
        return self._tables[kind][self._group]

    def _place(self, kind: str, table: Tensor, positions: Tensor) -> Tensor:
        """The row, counted over all pages, of each of positions (R, S) in requests with the tables (R, pages)."""
        page_size = self._page_sizes[kind]
        page = table.long().gather(1, positions.long() // page_size)
        return page * page_size + positions % page_size

    def write(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Put a layer's rows of the pass (B, S, Hkv, D), normed and rotated, where they belong."""
        kind = self.layers[index].kind
        source, scale = self._sources[kind], self._scales.get(index)
        for pages, rows in zip(self._pages[index], (keys, values), strict=True):
            if pages is not None:
                flat = rows.flatten(0, 1)
                flat = flat if source is None else flat[source]
                if scale is not None:
                    flat, row_scale = value_codes.encode(flat, pages.dtype, scale)
                    if scale.dim() == 3:  # a scale for each row
                        scale.flatten(0, 1)[self._places[kind]] = row_scale
                pages.flatten(0, 1)[self._places[kind]] = flat.to(pages.dtype)

    def attend(self, index: int, q: Tensor, *, softmax_scale: float) -> Tensor:
        """Attention of tentative rows q (B, S, Hq, D) to what a layer holds: (B, S, Hq, D)."""
        layer, (keys, values) = self.layers[index], self._pages[index]
        table = self._table(layer.kind)
        if keys is None:
            assert layer.k_norm_weight is not None  # or keys would be there
            assert layer.inv_freq is not None
            out = k_eq_v_attention(
                q, values, layer.k_norm_weight, layer.inv_freq, cache_seqlens=self._attended, block_table=table,
                softmax_scale=softmax_scale, values_scale=self._scales.get(index),
            )  # fmt: skip
        else:
            window = (-1, -1) if layer.window is None else (layer.window - 1, 0)
            out = flash_attn_with_kvcache(
                q, keys, values, cache_seqlens=self._attended, block_table=table, softmax_scale=softmax_scale,
                causal=True, window_size=window,
            )  # fmt: skip
        assert isinstance(out, Tensor)  # without return_lse
        return out

    def commit(self, count: Tensor) -> None:
        """Add to each request's length count (B,) rows of its last pass; the others are forgotten."""
        self.lengths = self.lengths + count.to(torch.int32)

    def keep(self, requests: Tensor) -> None:
        """Go on with these requests (R,) of the batch, in this order."""
        self.lengths = self.lengths[requests]
        self._tables = {kind: table[requests] for kind, table in self._tables.items()}

    def rows(self, sliding: int, full: int) -> SharedRows:
        """The committed rows of two layers, for a drafter."""

        def of(index: int) -> LayerRows:
            layer, (keys, values) = self.layers[index], self._pages[index]
            return LayerRows(
                keys, values, self._tables[layer.kind], layer.k_norm_weight, layer.inv_freq, self._scales.get(index)
            )

        return SharedRows(of(sliding), of(full), self.lengths)
