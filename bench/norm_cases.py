"""The cases of the norms between sublayers, as data: see `cases`, whose conventions these follow.

    sandwich_norm(m=5,n=3840)

The reference is the same computation in fp64, plain PyTorch that of transformers' decoder layer in the case's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

import gemma4_kernels
from gemma4_kernels.bench import inputs as draw
from gemma4_kernels.bench.attention_calls import DTYPES, Inputs
from gemma4_kernels.bench.case_strings import BENCH, BENCH_QUICK, QUICK, CaseString, each_once
from gemma4_kernels.geometry import GEMMA4_12B
from gemma4_kernels.reference.layers import rms_norm

NORM_OPS = ("sandwich_norm",)
Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class NormCase(CaseString):
    """One call of `sandwich_norm`. What is at its default is left out of the string."""

    family: ClassVar[str] = "norms"
    outputs: ClassVar[tuple[str, ...]] = ("hidden", "normed")

    op: str
    m: int = 1
    """Rows."""
    n: int = 256
    """Numbers in a row."""
    dtype: str = "bf16"
    pre: int = 1
    """0: there is no norm to follow."""
    scalar: int = 0
    """1: with a layer scalar, as after the feed-forward part."""
    tags: frozenset[str] = field(default=frozenset({"full"}), compare=False)

    @classmethod
    def refuse(cls, op: str, given: dict[str, Any]) -> None:
        """Raise ValueError unless the fields of a case string make a case of `op`."""
        for name, least in (("m", 0), ("n", 1)):
            if given.get(name, least) < least:
                raise ValueError(f"parse: {name} must be at least {least}, got {given[name]}")
        for name in ("pre", "scalar"):
            if given.get(name, 0) not in (0, 1):
                raise ValueError(f"parse: {name} must be 0 or 1, got {given[name]}")
        if given.get("dtype", cls.dtype) not in DTYPES:
            raise ValueError(f"parse: dtype must be one of {', '.join(DTYPES)}, got {given['dtype']!r}")

    def inputs(self, device: str | torch.device = "cpu") -> Inputs:
        """Keyword arguments of the public function, on a device: a residual stream larger than what a sublayer adds."""
        rng = draw.generator(self.seed)
        scale = torch.exp(0.7 * torch.randn((self.m, 1), generator=rng))
        made: Inputs = {
            "x": (scale * torch.randn((self.m, self.n), generator=rng)).to(DTYPES[self.dtype]),
            "residual": (3 * torch.randn((self.m, self.n), generator=rng)).to(DTYPES[self.dtype]),
            "post_weight": (1 + 0.2 * torch.randn(self.n, generator=rng)).to(DTYPES[self.dtype]),
            "pre_weight": (1 + 0.2 * torch.randn(self.n, generator=rng)).to(DTYPES[self.dtype]) if self.pre else None,
            "layer_scalar": torch.tensor([0.37]).to(DTYPES[self.dtype]) if self.scalar else None,
        }
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}

    def arguments(self, made: Inputs) -> dict[str, Any]:
        """What `inputs` made, as keyword arguments of the public function."""
        return made

    def run(self, made: Inputs) -> Result:
        """The public function; the caller chooses the backend."""
        return _both(gemma4_kernels.sandwich_norm(**made))

    def reference(self, made: Inputs) -> Result:
        wide = {name: value.cpu().double() if isinstance(value, Tensor) else value for name, value in made.items()}
        return _both(in_pytorch(**wide))

    def plain(self, made: Inputs) -> Result:
        near = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in made.items()}
        return _both(in_pytorch(**near))

    def judged(self, result: Result) -> Result:
        return result

    def changes(self, made: Inputs) -> Inputs:
        return {}

    def baselines(self, made: Inputs) -> dict[str, Callable[[], Tensor] | str]:
        """The same call in PyTorch's own operations, one launch each."""
        return {"pytorch": lambda: in_pytorch(**made)[0]}

    def input_bytes(self) -> int:
        return (2 * self.m + 1 + self.pre) * self.n * DTYPES[self.dtype].itemsize

    def bytes_moved(self) -> int:
        """x, residual and the weights read once, hidden and normed written once."""
        return self.input_bytes() + (1 + self.pre) * self.m * self.n * DTYPES[self.dtype].itemsize

    def operations(self) -> int:
        """Multiplications and additions: a square and its sum, two products for each norm; the residual sum; the scalar."""
        return (4 * (1 + self.pre) + 1 + self.scalar) * self.m * self.n


def in_pytorch(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor | None, layer_scalar: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """hidden and normed, as transformers' decoder layer makes them."""
    hidden = residual + rms_norm(x, post_weight)
    if layer_scalar is not None:
        hidden = hidden * layer_scalar
    return hidden, None if pre_weight is None else rms_norm(hidden, pre_weight)


def _both(result: tuple[Tensor, Tensor | None]) -> Result:
    hidden, normed = result
    return hidden, hidden.new_empty(0) if normed is None else normed


# The list ----------------------------------------------------------------------------------------------------------------


def _norms() -> Iterator[NormCase]:
    hidden = GEMMA4_12B.hidden_size
    for dtype in ("bf16", "fp16", "fp32"):
        for m in (1, 5, 16, 40):
            yield NormCase("sandwich_norm", m=m, n=hidden, dtype=dtype, tags=QUICK if m < 16 else frozenset({"full"}))
            yield NormCase("sandwich_norm", m=m, n=hidden, dtype=dtype, scalar=1)
        # Around what a thread, a warp and a block hold, and no multiple of 16 bytes.
        for n in (1, 2, 7, 8, 9, 255, 256, 257, 1000, 4096, 8191, 8192, 8193, 16383, 16384):
            yield NormCase("sandwich_norm", m=2, n=n, dtype=dtype, scalar=1)
        yield NormCase("sandwich_norm", m=5, n=hidden, dtype=dtype, pre=0, scalar=1, tags=QUICK)
    yield NormCase("sandwich_norm", m=0)


def _norms_bench() -> Iterator[NormCase]:
    """Decode, verification of drafts and prefill of the 12B, after attention and after the feed-forward part."""
    for m in (1, 2, 4, 5, 8, 16, 64, 512, 4096):
        for scalar in (0, 1):
            tags = BENCH_QUICK if m in (1, 5) and not scalar else BENCH
            yield NormCase("sandwich_norm", m=m, n=GEMMA4_12B.hidden_size, scalar=scalar, tags=tags)


@lru_cache
def norm_cases() -> tuple[NormCase, ...]:
    """Cases for correctness, each once."""
    return each_once(_norms())


@lru_cache
def norm_bench_cases() -> tuple[NormCase, ...]:
    return each_once(_norms_bench())
