"""A key/value cache that keeps everything: no window, no paging, no rounding."""

from __future__ import annotations

import torch
from torch import Tensor


class ReferenceCache:
    """Rows of every layer that owns keys and values, in order of arrival; layers are told apart by their index.

    Args:
        values_only: on full layers whose keys are a function of their values, keep the values alone; the layer rebuilds
            its keys from them and `positions`. Logits are the same.

    Rows: keys and values (B, length, Hkv, D), positions (B, length).
    """

    def __init__(self, *, values_only: bool = False) -> None:
        self.values_only = values_only
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.positions: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return 0 if self.positions is None else self.positions.shape[1]

    def append_positions(self, positions: Tensor) -> Tensor:
        """Announce the tokens of a forward pass, (B, S); returns the positions of all tokens, theirs included."""
        self.positions = _append(self.positions, positions)
        return self.positions

    def append_keys(self, layer: int, keys: Tensor) -> Tensor:
        """Add a layer's rows (B, S, Hkv, D); returns all of its rows."""
        self.keys[layer] = _append(self.keys.get(layer), keys)
        return self.keys[layer]

    def append_values(self, layer: int, values: Tensor) -> Tensor:
        """Add a layer's rows (B, S, Hkv, D); returns all of its rows."""
        self.values[layer] = _append(self.values.get(layer), values)
        return self.values[layer]

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens, as after a rejected draft.

        Raises: ValueError unless 0 <= length <= the present length.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, the tokens in the cache, got {length}")
        if self.positions is not None:
            self.positions = self.positions[:, :length]
        for rows in (self.keys, self.values):
            for layer, tensor in rows.items():
                rows[layer] = tensor[:, :length]


def _append(old: Tensor | None, new: Tensor) -> Tensor:
    if old is None:
        return new
    if old.shape[0] != new.shape[0]:
        raise ValueError(f"past_key_values: holds {old.shape[0]} rows, the input has {new.shape[0]}")
    return torch.cat((old, new), dim=1)
