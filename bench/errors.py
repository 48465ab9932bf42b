"""How far a kernel may be from the reference.

At most twice as far as the same computation in plain PyTorch at the same dtype, plus one rounding of the result: no
tolerance is chosen by hand. A kernel that is as good as PyTorch stays within the first term; the second allows for two
correct results that round to different neighbours where PyTorch happens to be exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """One tensor of a result against the rule."""

    ok: bool
    worst: float
    """Largest error as a share of its budget; above 1 the rule is broken, inf where one side is not finite."""
    index: tuple[int, ...]
    got: float
    expected: float
    budget: float

    def __str__(self) -> str:
        return (
            f"element {self.index}: got {self.got!r}, reference {self.expected!r}, "
            f"error {abs(self.got - self.expected):.3g} against a budget of {self.budget:.3g} ({self.worst:.2f} of it)"
        )


def judge(result: Tensor, reference: Tensor, plain: Tensor) -> Verdict:
    """Hold `result` against the rule.

    Args:
        result: what the kernel gave, any float dtype.
        reference: the same in fp64.
        plain: the same from plain PyTorch at the kernel's dtype.
    Where the reference is inf, -inf or NaN the result must be the same.
    """
    if result.shape != reference.shape:
        raise ValueError(f"judge: result has shape {tuple(result.shape)}, reference {tuple(reference.shape)}")
    if result.numel() == 0:
        return Verdict(True, 0.0, (), 0.0, 0.0, 0.0)
    rounding = torch.finfo(result.dtype)
    got, expected, ordinary = (x.detach().cpu().double() for x in (result, reference, plain))
    finite = expected.isfinite()
    ordinary_error = (ordinary - expected).abs()[finite & ordinary.isfinite()]
    twice_ordinary = 2 * float(ordinary_error.max()) if ordinary_error.numel() else 0.0
    budget = twice_ordinary + rounding.eps * expected.abs() + rounding.tiny
    share = (got - expected).abs() / budget
    agrees = (got == expected) | (got.isnan() & expected.isnan())
    share = torch.where(finite & got.isfinite(), share, torch.where(agrees, 0.0, float("inf")))
    flat = int(share.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), share.shape))
    worst = float(share.flatten()[flat])
    return Verdict(worst <= 1, worst, index, float(got[index]), float(expected[index]), float(budget[index]))
