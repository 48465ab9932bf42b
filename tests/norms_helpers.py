"""Calls of `sandwich_norm`, and what transformers' own modules make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma4_kernels import sandwich_norm

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@dataclass
class Sandwich:
    """The arguments of one call."""

    x: Tensor  # (..., N)
    residual: Tensor  # (..., N)
    post_weight: Tensor  # (N,)
    pre_weight: Tensor | None  # (N,)
    layer_scalar: Tensor | None  # (1,)
    eps: float = 1e-6

    def run(self) -> tuple[Tensor, Tensor | None]:
        """The public function."""
        return sandwich_norm(
            self.x, self.residual, self.post_weight, self.pre_weight, layer_scalar=self.layer_scalar, eps=self.eps
        )

    @torch.no_grad()
    def expected(self) -> tuple[Tensor, Tensor | None]:
        """The same as Gemma4UnifiedTextDecoderLayer.forward does it, by its norms."""
        hidden = self.residual + _norm(self.x, self.post_weight, self.eps)
        if self.layer_scalar is not None:
            hidden *= self.layer_scalar
        return hidden, None if self.pre_weight is None else _norm(hidden, self.pre_weight, self.eps)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedRMSNorm

    module = Gemma4UnifiedRMSNorm(x.shape[-1], eps=eps)
    module.weight.data = weight
    return module(x)


def drawn(dtype: torch.dtype, *shape: int, seed: int = 0, **changes: Any) -> Sandwich:
    """A residual stream that is larger than what a sublayer adds, weights around one, in fp32."""
    rng = torch.Generator().manual_seed(seed)
    # Sublayers give rows of a scale of their own.
    scale = torch.exp(0.7 * torch.randn((*shape[:-1], 1), generator=rng))
    x, residual = (torch.randn(shape, generator=rng) for _ in range(2))
    post, pre = (1 + 0.2 * torch.randn(shape[-1], generator=rng) for _ in range(2))
    made = {"layer_scalar": torch.tensor([0.37]), **changes}
    return Sandwich((scale * x).to(dtype), (3 * residual).to(dtype), post, pre, **made)


def with_exact_sums(dtype: torch.dtype, *shape: int, seed: int = 0) -> Sandwich:
    """Both sums of squares are exact in fp32, in whatever order.

    Half of x is 1 or -1, half 3 or -3: mean 5, with eps 16, so the first factor is 1/4 exactly. What is added and multiplied
    then stays a small multiple of 1/16.
    """
    rng = torch.Generator().manual_seed(seed)

    def one_of(numbers: list[float], *size: int) -> Tensor:
        return torch.tensor(numbers)[torch.randint(0, len(numbers), size, generator=rng)]

    x = one_of([-1.0, 1.0], *shape)
    x[..., ::2] *= 3
    residual, post = one_of([-2.0, -1.0, 0.0, 1.0, 2.0], *shape), one_of([0.5, 1.0, 1.5, 2.0], shape[-1])
    pre = 1 + 0.2 * torch.randn(shape[-1], generator=rng)
    return Sandwich(x.to(dtype), residual.to(dtype), post, pre, torch.tensor([0.5]), eps=11.0)


def assert_bits(got: tuple[Tensor, Tensor | None], want: tuple[Tensor, Tensor | None]) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def assert_nearly_all_bits(got: tuple[Tensor, Tensor | None], want: tuple[Tensor, Tensor | None]) -> None:
    """Of bf16 and fp16, where sums of squares are rounded in another order: what differs is a unit in the last place away.

    hidden is a sum of two terms, so the unit is the larger term's; normed carries hidden's on.
    """
    for one, other in zip(got, want, strict=True):
        assert float((one == other).double().mean()) >= 0.999
        largest = other.abs().float().clamp(min=1)
        assert bool(((one.float() - other.float()).abs() <= 4 * torch.finfo(one.dtype).eps * largest).all())
