"""The small parts of Gemma 4: RMSNorm, both kinds of RoPE, the gated MLP, the softcap, the scaled embedding.

Everything computes in float32 where transformers does (norms, angles), except that float64 inputs stay float64: a
float64 model is float64 from the embedding to the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a sensitive step computes in: float32, or float64 if that is what comes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times the weight (as it is: Gemma 4 adds no 1).

    Args:
        x: (..., D), any floating dtype.
        weight: (D,) or None for no weight (v_norm, the norm in front of the multimodal projections).
    Returns: (..., D) in x's dtype.
    """
    wide = x.to(compute_dtype(x.dtype))
    normed = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    if weight is not None:
        normed = normed * weight.to(normed.dtype)
    return normed.to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with its weight (D,); `with_scale=False` has no parameter at all."""

    weight: nn.Parameter | None

    def __init__(self, dim: int, eps: float = 1e-6, with_scale: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.ones(dim)) if with_scale else None)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def default_inv_freq(head_dim: int, theta: float) -> Tensor:
    """Frequencies of ordinary RoPE (sliding layers): theta^(-2i / D). Returns (D / 2,) float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / theta**exponents


def proportional_inv_freq(head_dim: int, theta: float, fraction: float) -> Tensor:
    """Frequencies of "proportional" RoPE (full layers): the first `fraction` of the D / 2 pairs turn, the rest have 0.

    The exponent is divided by the whole head dim, not by the rotated part, so the rotated pairs are the ones that
    ordinary RoPE would turn fastest. As pair i is (i, i + D / 2), the rotated dims are no prefix: with D = 512 and a
    quarter they are 0..63 and 256..319.

    Returns: (D / 2,) float32.
    """
    num_rotated = int(fraction * head_dim // 2)
    inv_freq = torch.zeros(head_dim // 2, dtype=torch.float32)
    inv_freq[:num_rotated] = default_inv_freq(head_dim, theta)[:num_rotated]
    return inv_freq


def rotation(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, each frequency twice: for dims i and i + D / 2.

    Args:
        positions: (...) integers.
        inv_freq: (D / 2,), float32 as the builders above make it.
        dtype: of the result. Angles are float32 (float64 for a float64 result) before they are rounded to it.
    Returns: cos, sin (..., D).
    """
    wide = compute_dtype(dtype)
    angles = positions[..., None].to(wide) * inv_freq.to(wide)  # (..., D / 2)
    angles = torch.cat((angles, angles), dim=-1)  # (..., D)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a), a and b the halves of the last dim."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every pair (i, i + D / 2) of x (B, S, H, D) by its angle; cos and sin (B or 1, S, D)."""
    return x * cos[..., None, :] + rotate_half(x) * sin[..., None, :]


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap); x itself if there is no cap (None or 0)."""
    return cap * torch.tanh(x / cap) if cap else x


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), with the tanh form of gelu."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = functional.gelu(self.gate_proj(x), approximate="tanh")
        down: Tensor = self.down_proj(gate * self.up_proj(x))
        return down


class ScaledEmbedding(nn.Module):
    """Rows of `weight` (V, hidden) times sqrt(hidden).

    Gemma rounds the scale to the weight's dtype: sqrt(3840) = 61.97 is 62.0 in bfloat16, and the checkpoints were
    trained with 62.0. `scale_dtype` remembers that dtype when a checkpoint is evaluated at a wider one.
    """

    def __init__(self, vocab_size: int, hidden_size: int, scale_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)
        self.scale_dtype = scale_dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        hidden_size = self.weight.shape[1]
        scale = torch.tensor(hidden_size**0.5, dtype=torch.float64, device=self.weight.device)
        scale = scale.to(self.scale_dtype or self.weight.dtype).to(self.weight.dtype)
        return functional.embedding(token_ids, self.weight) * scale
