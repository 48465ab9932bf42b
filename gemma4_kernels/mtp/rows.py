"""What a drafter reads of its target: the committed keys and values of two layers, wherever they lie."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LayerRows:
    """Keys and values of one layer of the target, rotated and normed as its attention uses them."""

    keys: Tensor | None
    """(B, S, Hkv, D), or pages (num_pages, page_size, Hkv, D) with block_table. None: they are a function of the values."""
    values: Tensor
    """Shaped like keys; row j of a request is its position j."""
    block_table: Tensor | None = None
    """(B, pages of a request) int32. A ring's table repeats, see `attention.ring`."""
    k_norm_weight: Tensor | None = None
    """(D,), where keys is None: key[j] = rope(value[j] * k_norm_weight, j)."""
    inv_freq: Tensor | None = None
    """(D/2,) fp32 with its zeros, where keys is None."""
    values_scale: Tensor | None = None
    """fp32, where values are codes of 8 bits: see `k_eq_v_attention`."""


@dataclass(frozen=True)
class SharedRows:
    """The rows of a batch of B requests that are committed: nothing after `lengths` is visible to a drafter."""

    sliding: LayerRows
    """Of the target's last sliding layer. The newest window + 1 positions must be there; older ones are not read."""
    full: LayerRows
    """Of its last full layer."""
    lengths: Tensor
    """(B,) int32: positions 0 to length - 1 are committed. The bonus token has position `length` and is not among them."""

    @classmethod
    def of(cls, rows: Any) -> SharedRows:
        """`rows`, or the same from anything with these fields: a target need not know this class."""
        if isinstance(rows, cls):
            return rows

        def layer(found: Any) -> LayerRows:
            # What has a default may be missing.
            present = [each.name for each in fields(LayerRows) if hasattr(found, each.name)]
            return LayerRows(**{name: getattr(found, name) for name in present})

        return cls(layer(rows.sliding), layer(rows.full), rows.lengths)
