"""Tensors with the statistics of Gemma 4's attention, from a seed.

q and k are RMS-normed per head and multiplied by a weight, so scores are dot products of vectors of fixed length: with
k_norm weights around 0.12 their standard deviation is about 2 at head_dim 256, a softmax that is neither flat nor an argmax.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

K_NORM_WEIGHT = 0.12

# A long cache repeats its first rows: drawing a quarter of a million of them would take longer than the call. The period
# is a prime, so that a kernel that reads a wrong page or tile reads other numbers.
PERIOD = 4099


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normed(shape: tuple[int, ...], rng: torch.Generator, weight: float = 1.0) -> Tensor:
    """fp32, each vector of the last dim with root mean square 1, times a weight per column around `weight`."""
    x = torch.randn(shape, generator=rng)
    x = x / x.pow(2).mean(dim=-1, keepdim=True).sqrt()
    return x * (weight * (1 + 0.2 * torch.randn(shape[-1], generator=rng)))


def queries(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return normed(shape, rng)


def keys(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return normed(shape, rng, K_NORM_WEIGHT)


def values(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """What v_norm gives: no weight."""
    x = torch.randn(shape, generator=rng)
    return x / x.pow(2).mean(dim=-1, keepdim=True).sqrt()


def rows(
    draw: Callable[[tuple[int, ...], torch.Generator], Tensor], shape: tuple[int, ...], rng: torch.Generator,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`draw(shape)` in a dtype; beyond PERIOD tokens (dim 1 of B, S, H, D) the tokens repeat."""
    if len(shape) < 4 or shape[1] <= PERIOD:
        return draw(shape, rng).to(dtype)
    period = draw((shape[0], PERIOD, *shape[2:]), rng).to(dtype)
    return period[:, torch.arange(shape[1]) % PERIOD]


def k_norm_weight(head_dim: int, rng: torch.Generator) -> Tensor:
    return K_NORM_WEIGHT * (1 + 0.2 * torch.randn(head_dim, generator=rng))


def inv_freq(head_dim: int, fraction: float = 0.25, theta: float = 1e6) -> Tensor:
    """(head_dim / 2,) fp32: "proportional" RoPE, the exponent over the whole head_dim, zeros from `fraction` on."""
    pairs = torch.arange(head_dim // 2, dtype=torch.float64)
    frequency = theta ** (-2 * pairs / head_dim)
    return torch.where(pairs < fraction * head_dim // 2, frequency, 0.0).float()


def scattered_pages(rows: Tensor, page_size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """rows (B, S, H, D) -> pages (P, page_size, H, D) in scrambled order and a block table (B, pages of a request) int32.

    There are twice as many pages as are used; the others, and the end of a partial last page, hold NaN, or -128 as int8.
    """
    unwritten = float("nan") if rows.is_floating_point() else -128
    batch, size, heads, dim = rows.shape
    per_request = -(-size // page_size)
    num_pages = max(1, 2 * batch * per_request)
    order = torch.randperm(num_pages, generator=rng)[: batch * per_request]
    padded = rows.new_full((batch, per_request * page_size, heads, dim), unwritten)
    padded[:, :size] = rows
    pages = rows.new_full((num_pages, page_size, heads, dim), unwritten)
    pages[order] = padded.view(batch * per_request, page_size, heads, dim)
    return pages, order.view(batch, per_request).to(torch.int32)
