"""The layers of a drafter: queries only, over the rows of its target.

    x (B, hidden)     q (B, 1, Hq, D)     rows (B, S, Hkv, D) or pages

Operations and roundings are those of transformers' `gemma4_unified`: norms in fp32 and rounded once, RoPE in the dtype of
the activations, from angles in fp32. A float64 drafter is float64 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gemma4_kernels.attention.api import flash_attn_with_kvcache, k_eq_v_attention
from gemma4_kernels.geometry import AttentionGeometry, LayerKind
from gemma4_kernels.linear.api import quantized_geglu
from gemma4_kernels.linear.modules import QuantizedLinear
from gemma4_kernels.mtp.drafter_config import DrafterConfig
from gemma4_kernels.mtp.rows import LayerRows, SharedRows

Rotations = dict[LayerKind, tuple[Tensor, Tensor]]
"""cos and sin (B, 1, 1, D) for each kind of layers."""


class Decoder(nn.Module):
    """The layers and the final norm; embed_tokens only where the head is tied to it."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        if config.tied_head:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config, kind) for kind in config.layers)
        self.norm = nn.RMSNorm(config.hidden_size, config.eps)
        self.kinds = tuple(dict.fromkeys(config.layers))
        for kind in self.kinds:
            # As integers of the same bits: a change of the model's dtype must not round frequencies.
            bits = inverse_frequencies(config.attention(kind)).view(torch.int32)
            self.register_buffer(f"_{kind}_frequency_bits", bits, persistent=False)

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> Rotations:
        """cos and sin (B, 1, 1, D) for the queries of each kind of layers; angles in fp32, as transformers has them."""
        wide = _wide(dtype)
        turns: Rotations = {}
        for kind in self.kinds:
            inv_freq = getattr(self, f"_{kind}_frequency_bits").view(torch.float32)  # (D / 2,)
            angles = (positions[:, None].to(wide) * inv_freq.to(wide)).repeat(1, 2)[:, None, None]  # (B, 1, 1, D)
            turns[kind] = angles.cos().to(dtype), angles.sin().to(dtype)
        return turns

    def forward(self, x: Tensor, rows: SharedRows, rotations: Rotations, window: tuple[int, int]) -> Tensor:
        for layer in self.layers:
            x = layer(x, rows, rotations, window)
        normed: Tensor = self.norm(x)
        return normed


class _Layer(nn.Module):
    """Norms before and after attention and MLP, and one scalar at the end."""

    layer_scalar: Tensor

    def __init__(self, config: DrafterConfig, kind: LayerKind) -> None:
        super().__init__()
        self.kind: LayerKind = kind
        self.self_attn = _Attention(config, config.attention(kind))
        self.mlp = _GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(config.hidden_size, config.eps)
        self.post_feedforward_layernorm = nn.RMSNorm(config.hidden_size, config.eps)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, x: Tensor, rows: SharedRows, rotations: Rotations, window: tuple[int, int]) -> Tensor:
        sliding = self.kind == "sliding"
        attended = self.self_attn(
            self.input_layernorm(x), rows.sliding if sliding else rows.full, rows.lengths, rotations[self.kind],
            window if sliding else (-1, 0),
        )  # fmt: skip
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return (x * self.layer_scalar).to(x.dtype)  # the scalar may be kept in fp32


class _Attention(nn.Module):
    """Queries only. With one query row, bottom-right alignment makes it the last committed row's."""

    def __init__(self, config: DrafterConfig, geometry: AttentionGeometry) -> None:
        super().__init__()
        self.num_heads, self.head_dim = geometry.num_heads, geometry.head_dim
        self.q_proj = nn.Linear(config.hidden_size, geometry.num_heads * geometry.head_dim, bias=False)
        self.q_norm = nn.RMSNorm(geometry.head_dim, config.eps)
        self.o_proj = nn.Linear(geometry.num_heads * geometry.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rows: LayerRows, lengths: Tensor, rotation: tuple[Tensor, Tensor], window: tuple[int, int]
    ) -> Tensor:
        q = self.q_norm(self.q_proj(x).view(x.shape[0], 1, self.num_heads, self.head_dim))  # (B, 1, Hq, D)
        cos, sin = rotation
        first, second = q.chunk(2, dim=-1)
        q = q * cos + torch.cat((-second, first), dim=-1) * sin
        if rows.keys is None:
            assert rows.k_norm_weight is not None  # Drafter.draft has looked
            assert rows.inv_freq is not None
            out = k_eq_v_attention(
                q, rows.values, rows.k_norm_weight, rows.inv_freq, cache_seqlens=lengths, block_table=rows.block_table,
                values_scale=rows.values_scale,
            )  # fmt: skip
        else:
            out = flash_attn_with_kvcache(
                q, rows.keys, rows.values, cache_seqlens=lengths, block_table=rows.block_table, softmax_scale=1.0,
                causal=True, window_size=window,
            )  # fmt: skip
        assert isinstance(out, Tensor)  # without return_lse
        projected: Tensor = self.o_proj(out.flatten(1))  # (B, hidden)
        return projected


class _GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), with the tanh form of gelu."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate: nn.Module = self.gate_proj
        up: nn.Module = self.up_proj
        if isinstance(gate, QuantizedLinear) and isinstance(up, QuantizedLinear) and not _has_bias(gate, up):
            inner = quantized_geglu(x, gate.weight, up.weight)  # (B, intermediate)
        else:
            inner = functional.gelu(gate(x), approximate="tanh") * up(x)
        down: Tensor = self.down_proj(inner)
        return down


def _has_bias(*layers: QuantizedLinear) -> bool:
    return any(layer.bias is not None for layer in layers)


def inverse_frequencies(geometry: AttentionGeometry) -> Tensor:
    """(D / 2,) fp32: theta^(-2i / D) for the first `rope_fraction` of the pairs, 0 for the rest.

    On the CPU always, as transformers makes them: another device's power function may differ in the last bit, and a
    quarter of a million positions multiply that.
    """
    half = geometry.head_dim // 2
    pairs = torch.arange(half, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / geometry.rope_theta ** (2 * pairs / geometry.head_dim)
    return torch.where(pairs < int(geometry.rope_fraction * geometry.head_dim // 2), frequencies, 0.0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sensitive steps."""
    return torch.float64 if dtype == torch.float64 else torch.float32
