"""The text layers of Gemma 4, shared by the model and its drafter.

Parameter and buffer names are those of transformers' `gemma4_unified`, so that its checkpoints load strictly.

    hidden (B, S, hidden)      keys, values (B, rows, Hkv, D)      masks (B or 1, S, rows) or (B or 1, H or 1, S, rows)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma4_kernels.geometry import LayerKind
from gemma4_kernels.reference.attention import attention
from gemma4_kernels.reference.cache import ReferenceCache
from gemma4_kernels.reference.config import ReferenceConfig
from gemma4_kernels.reference.k_eq_v import keys_from_values
from gemma4_kernels.reference.layers import (
    GatedMLP,
    RMSNorm,
    ScaledEmbedding,
    apply_rope,
    proportional_inv_freq,
    rotation,
)

KeysValues = tuple[Tensor, Tensor]


class DecoderAttention(nn.Module):
    """Attention of one layer. Queries and keys are normed per head, so the softmax scale is 1."""

    v_proj: nn.Linear | None

    def __init__(self, config: ReferenceConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.kind = config.layers[layer]
        self.geometry = config.attention(self.kind)
        self.owns_kv = config.owns_kv(layer)
        head_dim = self.geometry.head_dim
        q_size = self.geometry.num_heads * head_dim
        kv_size = self.geometry.num_kv_heads * head_dim

        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.q_norm = RMSNorm(head_dim, config.eps)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        if self.owns_kv:
            self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
            self.k_norm = RMSNorm(head_dim, config.eps)
            self.v_norm = RMSNorm(head_dim, config.eps, with_scale=False)
            self.v_proj = None if self.geometry.k_eq_v else nn.Linear(config.hidden_size, kv_size, bias=False)

    def inv_freq(self, device: torch.device) -> Tensor:
        """(D / 2,) float32. A sliding layer turns all pairs: fraction 1, where "proportional" is ordinary RoPE."""
        geometry = self.geometry
        return proportional_inv_freq(geometry.head_dim, geometry.rope_theta, geometry.rope_fraction).to(device)

    def own_keys_values(self, hidden: Tensor, positions: Tensor, cache: ReferenceCache | None) -> KeysValues:
        """The rows of this layer, those in the cache first; `hidden` is added to the cache."""
        head_dim = self.geometry.head_dim
        inv_freq = self.inv_freq(hidden.device)
        raw_keys: Tensor = self.k_proj(hidden).unflatten(-1, (-1, head_dim))  # (B, S, Hkv, D)
        raw_values = raw_keys if self.v_proj is None else self.v_proj(hidden).unflatten(-1, (-1, head_dim))
        values: Tensor = self.v_norm(raw_values)
        keys: Tensor = apply_rope(self.k_norm(raw_keys), *rotation(positions, inv_freq, hidden.dtype))
        if cache is None:
            return keys, values
        values = cache.append_values(self.layer, values)
        if cache.values_only and self.v_proj is None:
            assert self.k_norm.weight is not None  # k_norm has one
            assert cache.positions is not None  # append_positions came first
            return keys_from_values(values, self.k_norm.weight, inv_freq, cache.positions), values
        return cache.append_keys(self.layer, keys), values

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        mask: Tensor,
        cache: ReferenceCache | None,
        shared: dict[LayerKind, KeysValues],
    ) -> tuple[Tensor, KeysValues]:
        """Returns the layer's output (B, S, hidden) and the keys and values it has used."""
        queries: Tensor = self.q_norm(self.q_proj(hidden).unflatten(-1, (-1, self.geometry.head_dim)))  # (B, S, Hq, D)
        queries = apply_rope(queries, *rotation(positions, self.inv_freq(hidden.device), hidden.dtype))
        if self.owns_kv:
            keys, values = self.own_keys_values(hidden, positions, cache)
        else:
            keys, values = shared[self.kind]

        # A mask over fewer columns is one for the newest rows: transformers forgets what has left the window.
        num_keys = mask.shape[-1]
        boolean = mask.dtype == torch.bool
        out, _ = attention(
            queries,
            keys[:, -num_keys:],
            values[:, -num_keys:],
            scale=1.0,
            visible=mask if boolean else None,
            bias=None if boolean else mask,
        )
        projected: Tensor = self.o_proj(out.flatten(2))
        return projected, (keys, values)


class DecoderLayer(nn.Module):
    """Norms before and after the attention, before and after the MLP, and one scalar at the end."""

    layer_scalar: Tensor

    def __init__(self, config: ReferenceConfig, layer: int) -> None:
        super().__init__()
        wide = config.double_wide_mlp and not config.owns_kv(layer)
        self.self_attn = DecoderAttention(config, layer)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size * (2 if wide else 1))
        self.input_layernorm = RMSNorm(config.hidden_size, config.eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.eps)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        mask: Tensor,
        cache: ReferenceCache | None,
        shared: dict[LayerKind, KeysValues],
    ) -> tuple[Tensor, KeysValues]:
        attended, keys_values = self.self_attn(self.input_layernorm(hidden), positions, mask, cache, shared)
        hidden = hidden + self.post_attention_layernorm(attended)
        hidden = hidden + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden)))
        return hidden * self.layer_scalar, keys_values


class TextModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(len(config.layers)))
        self.norm = RMSNorm(config.hidden_size, config.eps)

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        masks: dict[LayerKind, Tensor],
        cache: ReferenceCache | None = None,
        shared: dict[LayerKind, KeysValues] | None = None,
    ) -> tuple[Tensor, dict[LayerKind, KeysValues]]:
        """Run all layers.

        Args:
            hidden: (B, S, hidden) embedded tokens. positions: (B, S).
            masks: for each kind of layer, bool (True = visible) or floating (added to the scores).
            shared: keys and values for layers that have none, if they are another model's (the drafter).
        Returns: (B, S, hidden) after the final norm; the keys and values of the last layer of each kind that owns them.
        """
        shared = dict(shared or {})
        for layer, kind in enumerate(self.config.layers):
            hidden, keys_values = self.layers[layer](hidden, positions, masks[kind], cache, shared)
            if self.config.owns_kv(layer):
                shared[kind] = keys_values
        normed: Tensor = self.norm(hidden)
        return normed, shared
