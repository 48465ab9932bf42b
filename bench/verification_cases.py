"""The cases of verification and sampling, as data: see `cases`, whose conventions these follow.

    verify_drafts(b=4,k=4,v=262144,top_k=64,top_p=0.95)

Results are whole numbers and must be equal. What must come out is the reference's: filters, noise and methods in float64, on
inputs that leave no decision to a rounding (`verification_inputs`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

import gemma4_kernels
from gemma4_kernels.bench import verification_baselines
from gemma4_kernels.bench.attention_calls import DTYPES, Inputs
from gemma4_kernels.bench.case_strings import BENCH, BENCH_QUICK, QUICK, CaseString, each_once
from gemma4_kernels.bench.verification_inputs import FILTERS, KINDS, draw_inputs, expected, inside
from gemma4_kernels.geometry import GEMMA4_12B

METHODS = ("match", "rejection", "block")
STREAMS = ("target", "draft")
Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class VerificationCase(CaseString):
    """One call of `verify_drafts`. What is at its default is left out of the string."""

    family: ClassVar[str] = "verification"
    outputs: ClassVar[tuple[str, ...]] = ("tokens", "num_accepted")
    useless: ClassVar[frozenset[str]] = frozenset({"stream"})
    """Fields that the function has not."""

    op: str
    b: int = 1
    k: int = 4
    """Drafts."""
    v: int = 1000
    dtype: str = "bf16"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    softcap: float = 0.0
    method: str = "match"
    kind: str = "model"
    """Of logits: see `verification_inputs.KINDS`."""
    acceptance: float = 0.7
    """Chance of a draft to be the target's own sample ("match"), or how much the drafter knows of the target."""
    sure: int = 0
    """1: drafts are argmaxes, and no draft_logits are given."""
    mixed: int = 0
    """1: each request has its own filters, in tensors."""
    ragged: int = 0
    """1: requests have 0 to k drafts (num_drafts)."""
    eos: int = 0
    """1: tokens that some requests emit are ends of text."""
    strided: int = 0
    """1: logits are a view at an odd place of a larger tensor, in the midst of NaN."""
    stream: str = "target"
    """Of `sample_tokens`: "target" or "draft"."""
    tags: frozenset[str] = field(default=frozenset({"full"}), compare=False)

    @classmethod
    def refuse(cls, op: str, given: dict[str, Any]) -> None:
        """Raise ValueError unless the fields of a case string make a case of `op`."""
        if useless := given.keys() & cls.useless:
            raise ValueError(f"parse: {op} has no use for {', '.join(sorted(useless))}")
        for name, least in {"b": 0, "k": 0, "v": 1, "top_k": 0, "temperature": 0, "softcap": 0}.items():
            if not given.get(name, least) >= least:
                raise ValueError(f"parse: {name} must be at least {least}, got {given[name]}")
        for name in ("top_p", "min_p", "acceptance"):
            if not 0 <= given.get(name, 0) <= 1:
                raise ValueError(f"parse: {name} must be from 0 to 1, got {given[name]}")
        for name in ("sure", "mixed", "ragged", "eos", "strided"):
            if given.get(name, 0) not in (0, 1):
                raise ValueError(f"parse: {name} must be 0 or 1, got {given[name]}")
        choices = {"dtype": tuple(DTYPES), "method": METHODS, "kind": KINDS, "stream": STREAMS}
        for name, known in choices.items():
            if given.get(name, known[0]) not in known:
                raise ValueError(f"parse: {name} must be one of {', '.join(known)}, got {given[name]!r}")
        if given.get("mixed") and (both := given.keys() & set(FILTERS)):
            raise ValueError(f"parse: a mixed case has its own {', '.join(sorted(both))}")

    @property
    def has_draft_logits(self) -> bool:
        return self.method != "match" and not self.sure

    @property
    def result_depends_on_the_noise(self) -> bool:
        """What draws other noise gives other tokens."""
        return bool(self.mixed) or self.temperature != 0

    def inputs(self, device: str | torch.device = "cpu") -> Inputs:
        """Logits, drafts, seeds and so on, on a device."""
        made = draw_inputs(self)
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}

    def arguments(self, made: Inputs) -> dict[str, Any]:
        """What `inputs` made, as keyword arguments of the public function."""
        found = {name: made[name] if name in made else getattr(self, name) for name in FILTERS}
        found |= {name: inside(self, made, name) for name in ("logits", "draft_logits")}
        names = ("draft_tokens", "num_drafts", "seeds", "positions", "eos_token_ids")
        return found | {name: made[name] for name in names} | {"method": self.method}

    def run(self, made: Inputs) -> Result:
        """The public function; the caller chooses the backend."""
        result = gemma4_kernels.verify_drafts(**self.arguments(made))
        return result.tokens, result.num_accepted

    def reference(self, made: Inputs) -> Result:
        return expected(self, made)

    def plain(self, made: Inputs) -> Result:
        """Whole numbers have no error to compare with."""
        return tuple(torch.zeros(()) for _ in self.outputs)

    def judged(self, result: Result) -> Result:
        return result

    def changes(self, made: Inputs) -> Inputs:
        return {}

    def baselines(self, made: Inputs) -> dict[str, verification_baselines.Baseline | str]:
        """Other ways to tokens of the same distribution, ready to run, or why there is none."""
        return verification_baselines.verification(self.arguments(made))

    def input_bytes(self) -> int:
        """Of the target's logits, and the drafter's."""
        rows = self.b * (self.k + 1 + self.k * self.has_draft_logits)
        return rows * self.v * DTYPES[self.dtype].itemsize

    def bytes_moved(self) -> int:
        """Each logit read once, tokens and counts written once."""
        return self.input_bytes() + 8 * self.b * (self.k + 2)

    def operations(self) -> int:
        """One comparison for each logit: which tokens matter. What else there is to do depends on how many do."""
        return self.input_bytes() // DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class SamplingCase(VerificationCase):
    """One call of `sample_tokens`."""

    outputs: ClassVar[tuple[str, ...]] = ("tokens",)
    useless: ClassVar[frozenset[str]] = frozenset({"k", "method", "acceptance", "sure", "ragged", "eos"})

    k: int = 0

    def arguments(self, made: Inputs) -> dict[str, Any]:
        found = super().arguments(made)
        for name in ("draft_tokens", "num_drafts", "draft_logits", "eos_token_ids", "method"):
            del found[name]
        return {**found, "logits": found["logits"][:, 0], "stream": self.stream}

    def run(self, made: Inputs) -> Result:
        return (gemma4_kernels.sample_tokens(**self.arguments(made)),)

    def reference(self, made: Inputs) -> Result:
        return (expected(self, made)[0][:, 0],)

    def bytes_moved(self) -> int:
        return self.input_bytes() + 8 * self.b


# The list ----------------------------------------------------------------------------------------------------------------

_EACH_FILTER: tuple[dict[str, Any], ...] = (
    {}, {"temperature": 0.0}, {"temperature": 0.6}, {"top_k": 1}, {"top_k": 64}, {"top_p": 0.9}, {"top_p": 0.0},
    {"min_p": 0.05}, {"softcap": 30.0}, {"top_k": 64, "top_p": 0.95},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "softcap": 30.0},
)  # fmt: skip
_RECOMMENDED: dict[str, Any] = {"top_k": 64, "top_p": 0.95}
# Where blocks and tiles of kernels end.
_VOCABULARIES = (1, 2, 3, 5, 63, 64, 65, 1023, 1024, 1025, 2047, 2048, 4099, 5003)


def _verify(**fields: Any) -> VerificationCase:
    return VerificationCase("verify_drafts", **fields)


def _sample(**fields: Any) -> SamplingCase:
    return SamplingCase("sample_tokens", **fields)


def _verification() -> Iterator[VerificationCase]:
    # Each filter alone and together, by each method, and without drafts.
    for number, filters in enumerate(_EACH_FILTER):
        dtype = ("bf16", "fp16", "fp32")[number % 3]
        for method in METHODS:
            tags = QUICK if filters in ({}, _RECOMMENDED) else frozenset({"full"})
            yield _verify(b=3, v=1003, method=method, dtype=dtype, tags=tags, **filters)
        yield _sample(b=3, v=1003, dtype=dtype, tags=QUICK, **filters)
        yield _sample(b=2, v=5003, dtype=dtype, stream="draft", **filters)
        yield _verify(b=2, v=5003, dtype=dtype, **filters)
    # Many samples whose filter removes much: one that keeps a little more or less is found out.
    for filters in ({"top_k": 20}, {"top_p": 0.5}, {"min_p": 0.2}, {"temperature": 3.0, "softcap": 5.0}):
        yield _verify(b=32, k=1, v=300, kind="normal", acceptance=1.0, tags=QUICK, **filters)
    # Sizes of the vocabulary, numbers of drafts.
    for number, v in enumerate(_VOCABULARIES):
        yield _verify(b=2, k=2, v=v, tags=QUICK)
        yield _sample(b=2, v=v, **_RECOMMENDED)
        yield _verify(b=2, k=2, v=v, method=METHODS[1 + number % 2], dtype="fp32", top_p=0.8)
    for k in range(9):
        for method in METHODS:
            yield _verify(b=2, k=k, v=301, method=method, acceptance=0.9)
    # Drafts that are all right, all wrong, sure of themselves; a drafter that is the target.
    for acceptance in (0.0, 1.0):
        for method in METHODS:
            yield _verify(b=3, v=515, method=method, acceptance=acceptance)
            yield _verify(b=3, v=515, method=method, acceptance=acceptance, **_RECOMMENDED)
    for method in METHODS:
        yield _verify(b=3, v=515, method=method, sure=1, **_RECOMMENDED)
        yield _verify(b=3, v=515, method=method, sure=1)
        # Requests that differ in everything.
        yield _verify(b=9, v=777, method=method, mixed=1, tags=QUICK)
        yield _verify(b=9, v=777, method=method, mixed=1, ragged=1, eos=1, strided=1, dtype="fp32", tags=QUICK)
        yield _verify(b=8, k=7, v=129, method=method, ragged=1, eos=1, acceptance=0.9)
        yield _verify(b=3, v=2500, method=method, strided=1, **_RECOMMENDED)
    yield _sample(b=9, v=777, mixed=1, tags=QUICK)
    yield _sample(b=9, v=3001, mixed=1, strided=1)
    # Logits that few models have.
    for kind in KINDS[1:]:
        for filters in ({}, _RECOMMENDED, {"top_p": 0.5}, {"min_p": 0.2, "top_k": 7}, {"temperature": 0.0}):
            method = METHODS[len(kind) % 3]
            yield _verify(b=2, k=3, v=2100, kind=kind, **filters)
            yield _verify(b=2, k=3, v=199, kind=kind, method=method, dtype="fp32", **filters)
    yield _verify(b=0)
    yield _sample(b=0)
    # Gemma's vocabulary.
    vocab_size = GEMMA4_12B.vocab_size
    yield _verify(k=2, v=vocab_size, tags=QUICK, **_RECOMMENDED)
    for filters in ({}, {"top_p": 0.95}, {"min_p": 0.05}, {"temperature": 0.0}):
        yield _sample(v=vocab_size, **filters)
    yield _verify(k=1, v=vocab_size, method="block", acceptance=0.9, **_RECOMMENDED)
    yield _sample(v=vocab_size, kind="normal", top_p=0.9)


def _verification_bench() -> Iterator[VerificationCase]:
    """Four drafts of the 12B, and plain decoding."""
    vocab_size = GEMMA4_12B.vocab_size
    for b in (1, 4, 16, 64):
        for filters in ({"temperature": 0.0}, {}, _RECOMMENDED, {"top_p": 0.95}, {"min_p": 0.05}):
            tags = BENCH_QUICK if b == 1 and filters in ({"temperature": 0.0}, _RECOMMENDED) else BENCH
            yield _verify(b=b, v=vocab_size, acceptance=1.0, tags=tags, **filters)
        yield _sample(b=b, v=vocab_size, tags=BENCH, **_RECOMMENDED)
        for method in METHODS[1:]:
            yield _verify(b=b, v=vocab_size, method=method, acceptance=0.9, tags=BENCH, **_RECOMMENDED)


@lru_cache
def verification_cases() -> tuple[VerificationCase, ...]:
    """Cases for correctness, each once."""
    return each_once(_verification())


@lru_cache
def verification_bench_cases() -> tuple[VerificationCase, ...]:
    return each_once(_verification_bench())


CASES_OF: dict[str, type[VerificationCase]] = {"verify_drafts": VerificationCase, "sample_tokens": SamplingCase}
