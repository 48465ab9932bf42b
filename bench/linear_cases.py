"""The cases of quantised linear layers, as data: see `cases`, whose conventions these follow.

    quantized_linear(m=5,n=15360,k=3840,scheme=Q4_0)

The reference is the fp64 product with the exactly dequantised weight, plain PyTorch the product with the weight in the case's
dtype. Of a large result both compute an excerpt: all rows of x, and outputs at both ends and in the middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

import gemma4_kernels
from gemma4_kernels.bench import inputs as draw
from gemma4_kernels.bench import linear_baselines
from gemma4_kernels.bench.attention_calls import DTYPES, Inputs
from gemma4_kernels.bench.case_strings import BENCH, BENCH_QUICK, EXCERPT_ABOVE, QUICK, CaseString, each_once
from gemma4_kernels.bench.linear_inputs import default_group, random_weight, weight_bytes
from gemma4_kernels.checks import ShapeError
from gemma4_kernels.geometry import GEMMA4_12B
from gemma4_kernels.linear.schemes import SCHEMES, check_sizes
from gemma4_kernels.linear.weight import TENSORS, QuantizedWeight

LINEAR_OPS = ("quantized_linear", "quantized_geglu", "quantized_argmax", "quantized_embedding")
EXCERPT_OUTPUTS = 64
Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class LinearCase(CaseString):
    """One call of a public function on quantised weights. What is at its default is left out of the string."""

    family: ClassVar[str] = "linear"
    outputs: ClassVar[tuple[str, ...]] = ("out",)

    op: str
    m: int = 1
    """Rows of x, or token ids."""
    n: int = 64
    k: int = 256
    scheme: str = "Q4_0"
    group: int = 0
    """0: 32, or the only size that the scheme has."""
    dtype: str = "bf16"
    bias: int = 0
    """1: with a bias in the case's dtype."""
    shuffled: int = 0
    """1: columns in another order (act-order)."""
    tags: frozenset[str] = field(default=frozenset({"full"}), compare=False)

    @classmethod
    def refuse(cls, op: str, given: dict[str, Any]) -> None:
        """Raise ValueError unless the fields of a case string make a case of `op`."""
        if given.get("m", cls.m) < 0:
            raise ValueError(f"parse: m must be at least 0, got {given['m']}")
        for name in ("bias", "shuffled"):
            if given.get(name, 0) not in (0, 1):
                raise ValueError(f"parse: {name} must be 0 or 1, got {given[name]}")
        if given.get("bias") and op != "quantized_linear":
            raise ValueError(f"parse: {op} has no use for bias")
        if given.get("dtype", cls.dtype) not in DTYPES:
            raise ValueError(f"parse: dtype must be one of {', '.join(DTYPES)}, got {given['dtype']!r}")
        scheme = given.get("scheme", cls.scheme)
        if scheme not in SCHEMES:
            raise ValueError(f"parse: scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
        group = given.get("group", 0) or default_group(scheme)
        try:
            check_sizes("parse", scheme, (given.get("n", cls.n), given.get("k", cls.k)), group)
        except ShapeError as error:
            raise ValueError(str(error)) from error

    @property
    def _weights(self) -> tuple[str, ...]:
        return ("gate", "up") if self.op == "quantized_geglu" else ("weight",)

    @property
    def _is_embedding(self) -> bool:
        return self.op == "quantized_embedding"

    def inputs(self, device: str | torch.device = "cpu") -> Inputs:
        """x, bias and token_ids, and the tensors of a weight as "weight.codes" and so on, on a device."""
        rng = draw.generator(self.seed)
        dtype = DTYPES[self.dtype]
        made: Inputs = {}
        for name in self._weights:
            weight = random_weight(self.scheme, (self.n, self.k), self.group, generator=rng)
            if self.shuffled:
                weight = replace(weight, columns=torch.randperm(self.k, generator=rng).to(torch.int32))
            made |= {f"{name}.{field}": tensor for field, tensor in weight.tensors().items()}
        if self._is_embedding:
            made["token_ids"] = torch.randint(0, self.n, (self.m,), generator=rng)
        elif self.op == "quantized_argmax":
            # Each row of x lies along a row of the weight, which no rounding can then bring to second place.
            winner = torch.randint(0, self.n, (self.m,), generator=rng)
            along = self._weight(made, "weight").rows(winner)
            noise = torch.randn(self.m, self.k, generator=rng)
            made["x"] = (along / along.square().mean(dim=1, keepdim=True).sqrt() + 0.1 * noise).to(dtype)
        else:
            # Results around one: in gelu's bend, and within fp16.
            some = self._weight(made, self._weights[0]).rows(slice(0, 16))
            size = float(some.square().mean().sqrt()) * self.k**0.5
            made["x"] = (torch.randn(self.m, self.k, generator=rng) / size).to(dtype)
        if self.op == "quantized_linear":
            made["bias"] = torch.randn(self.n, generator=rng).to(dtype) if self.bias else None
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}

    def _weight(self, made: Inputs, name: str) -> QuantizedWeight:
        group = self.group or default_group(self.scheme)
        tensors = [made.get(f"{name}.{field}") for field in TENSORS]
        return QuantizedWeight.from_checked(self.scheme, (self.n, self.k), group, tensors)

    def arguments(self, made: Inputs) -> dict[str, Any]:
        """What `inputs` made, as keyword arguments of the public function."""
        found = {name: value for name, value in made.items() if "." not in name}
        found |= {name: self._weight(made, name) for name in self._weights}
        if self._is_embedding:
            found["dtype"] = DTYPES[self.dtype]
        return found

    def run(self, made: Inputs) -> Result:
        """The public function; the caller chooses the backend."""
        return (getattr(gemma4_kernels, self.op)(**self.arguments(made)),)

    def reference(self, made: Inputs) -> Result:
        return self._evaluate(made, torch.float64)

    def plain(self, made: Inputs) -> Result:
        return self._evaluate(made, DTYPES[self.dtype])

    def _evaluate(self, made: Inputs, dtype: torch.dtype) -> Result:
        made = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in made.items()}
        weight = self._weight(made, self._weights[0])
        if self._is_embedding:
            return (weight.rows(made["token_ids"]).to(dtype),)
        x = made["x"].to(dtype)
        if self.op == "quantized_argmax":
            return (_logits(x, weight).argmax(dim=1),)
        outputs = self._excerpt()
        if self.op == "quantized_geglu":
            up = self._weight(made, "up")
            gated, passed = (linear(x, each.rows(outputs).to(dtype)) for each in (weight, up))
            return (gelu(gated, approximate="tanh") * passed,)
        bias = made["bias"]
        return (linear(x, weight.rows(outputs).to(dtype), None if bias is None else bias[outputs].to(dtype)),)

    def _excerpt(self) -> Tensor | slice:
        """The outputs that are judged; all of them where that does not take long."""
        if self.operations() <= EXCERPT_ABOVE or self.n <= 3 * EXCERPT_OUTPUTS:
            return slice(None)
        starts = (0, (self.n - EXCERPT_OUTPUTS) // 2, self.n - EXCERPT_OUTPUTS)
        return torch.cat([torch.arange(start, start + EXCERPT_OUTPUTS) for start in starts])

    def judged(self, result: Result) -> Result:
        """What of `run`'s result `reference` and `plain` give."""
        outputs = self._excerpt()
        if isinstance(outputs, slice) or self._is_embedding or self.op == "quantized_argmax":
            return result
        return (result[0][:, outputs.to(result[0].device)],)

    def changes(self, made: Inputs) -> Inputs:
        return {}

    def baselines(self, made: Inputs) -> dict[str, linear_baselines.Baseline | str]:
        """Other ways to the same result, ready to run, or why there is none."""
        return linear_baselines.linear(self.op, self.arguments(made), DTYPES[self.dtype])

    def input_bytes(self) -> int:
        one = weight_bytes(self.scheme, (self.n, self.k), self.group)
        return len(self._weights) * one + self.m * self.k * DTYPES[self.dtype].itemsize

    def bytes_moved(self) -> int:
        """Each byte of the weights and of x read once, each of the result written once."""
        itemsize = DTYPES[self.dtype].itemsize
        if self._is_embedding:
            row = weight_bytes(self.scheme, (self.n, self.k), self.group) / self.n
            return round(self.m * (row + self.k * itemsize))
        out = 8 * self.m if self.op == "quantized_argmax" else self.m * self.n * itemsize
        return self.input_bytes() + out

    def operations(self) -> int:
        """Multiplications and additions."""
        return self.m * self.k if self._is_embedding else 2 * len(self._weights) * self.m * self.n * self.k


def _logits(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x @ W.T in x's dtype, W a few thousand rows at a time."""
    N, step = weight.shape[0], 4096
    return torch.cat(
        [linear(x, weight.rows(slice(first, min(first + step, N))).to(x.dtype)) for first in range(0, N, step)], dim=1
    )


# The list ----------------------------------------------------------------------------------------------------------------

_COMMON = ("Q4_0", "W4A16", "Q4_K", "Q6_K")


def _columns(scheme: str) -> int:
    """No multiple of a tile, where the scheme lets it be none."""
    return 768 if SCHEMES[scheme].scales in ("int8", "six_bit") else 416


def _linear() -> Iterator[LinearCase]:
    dtypes = ("bf16", "fp16", "fp32")
    for number, scheme in enumerate(SCHEMES):
        base = LinearCase("quantized_linear", n=70, k=_columns(scheme), scheme=scheme)
        for place, m in enumerate((1, 5, 16, 17, 300)):
            dtype = dtypes[(number + place) % 3]
            tags = QUICK if scheme in _COMMON and m in (1, 17) else frozenset({"full"})
            yield replace(base, m=m, dtype=dtype, bias=int(m == 5), tags=tags)
        yield replace(base, op="quantized_geglu", m=(1, 5, 40)[number % 3], dtype=dtypes[number % 3])
        yield replace(base, op="quantized_argmax", m=(1, 5, 40)[number % 3], n=999)
        yield replace(base, op="quantized_embedding", m=33, dtype=dtypes[number % 3])
    # Outputs that PyTorch's own 4-bit kernel takes, every dtype, few and many rows.
    for dtype in dtypes:
        for m in (1, 5, 64):
            yield LinearCase("quantized_linear", m=m, n=96, k=416, dtype=dtype, tags=QUICK)
            yield LinearCase("quantized_linear", m=m, n=96, k=416, dtype=dtype, scheme="W4A16", group=416)
        yield LinearCase("quantized_geglu", m=5, n=96, k=416, dtype=dtype, tags=QUICK)
    for group in (32, 64, 128):
        yield LinearCase("quantized_linear", m=5, n=70, k=640, scheme="W4A16", group=group)
        yield LinearCase("quantized_linear", m=5, n=70, k=640, scheme="MLX", group=group)
    # Columns in another order; a weight that is cut along K; no rows; the smallest weight.
    for m in (1, 16, 40):
        yield LinearCase("quantized_linear", m=m, n=70, k=416, scheme="GPTQ", shuffled=1)
        yield LinearCase("quantized_linear", m=m, n=40, k=4512)
    yield LinearCase("quantized_embedding", m=9, n=70, k=416, scheme="GPTQ", shuffled=1)
    yield LinearCase("quantized_argmax", m=3, n=5003, k=512, scheme="Q6_K", tags=QUICK)
    yield LinearCase("quantized_embedding", m=33, n=70, k=512, scheme="Q6_K", tags=QUICK)
    for op in LINEAR_OPS:
        yield LinearCase(op, m=0)
    yield LinearCase("quantized_linear", m=3, n=1, k=32)


def model_shapes() -> dict[str, tuple[int, int]]:
    """(N, K) of the linear layers of the 12B. Its full layers have no v; q, k and v of a sliding layer are one stream."""
    hidden, wide = GEMMA4_12B.hidden_size, GEMMA4_12B.intermediate_size
    found = {"gate or up": (wide, hidden), "down": (hidden, wide)}
    for kind in ("sliding", "full"):
        attention = GEMMA4_12B.sliding if kind == "sliding" else GEMMA4_12B.full
        q, kv = (heads * attention.head_dim for heads in (attention.num_heads, attention.num_kv_heads))
        found |= {f"{kind} q": (q, hidden), f"{kind} kv": (kv, hidden), f"{kind} o": (hidden, q)}
        found[f"{kind} qkv"] = (q + kv if attention.k_eq_v else q + 2 * kv, hidden)
    return found


_ROWS = (1, 2, 4, 5, 8, 16, 64, 512, 4096)


def _linear_bench() -> Iterator[LinearCase]:
    """Decode, verification of drafts, small and large prefills; the quick ones are small enough for a CPU."""
    shapes = model_shapes()
    head = (GEMMA4_12B.vocab_size, GEMMA4_12B.hidden_size)
    for m in _ROWS:
        for n, k in dict.fromkeys(shapes.values()):
            for scheme in ("Q4_0", "W4A16", "Q4_K"):
                quick = (n, k) == shapes["sliding o"] and m in (1, 5)
                tags = BENCH_QUICK if quick else BENCH
                yield LinearCase("quantized_linear", m=m, n=n, k=k, scheme=scheme, tags=tags)
        for scheme in ("Q4_0", "Q4_K"):
            n, k = shapes["gate or up"]
            yield LinearCase("quantized_geglu", m=m, n=n, k=k, scheme=scheme, tags=BENCH)
        if m <= 64:
            for op in ("quantized_linear", "quantized_argmax"):
                yield LinearCase(op, m=m, n=head[0], k=head[1], scheme="Q6_K", tags=BENCH)
        yield LinearCase("quantized_embedding", m=m, n=head[0], k=head[1], scheme="Q6_K", tags=BENCH)


@lru_cache
def linear_cases() -> tuple[LinearCase, ...]:
    """Cases for correctness, each once."""
    return each_once(_linear())


@lru_cache
def linear_bench_cases() -> tuple[LinearCase, ...]:
    return each_once(_linear_bench())
