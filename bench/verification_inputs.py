"""Logits, drafts and seeds of a verification case, and what must come out: by the reference, in float64.

No decision of a case hangs on a rounding: a request whose decisions do gets another seed. Logits have the shape of a
model's: a few dozen contenders above a bulk of all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma4_kernels.bench import inputs as draw
from gemma4_kernels.bench.attention_calls import DTYPES, Inputs
from gemma4_kernels.reference import KeyedNoise, Sampler, SamplingFilters, draft_by_sampling, verify_request

if TYPE_CHECKING:
    from gemma4_kernels.bench.verification_cases import VerificationCase

KINDS = ("model", "normal", "ties", "levels", "flat", "sparse", "far", "peak")
"""Of logits: like a model's, one bell, rounded to whole numbers, two levels, all equal, mostly -inf, hundreds apart, and one
token that has nearly everything."""
FILTERS = ("temperature", "top_k", "top_p", "min_p", "softcap")
MIXED: tuple[dict[str, float], ...] = (
    {"top_k": 64, "top_p": 0.95}, {"temperature": 0.0}, {"temperature": 0.7, "min_p": 0.1}, {},
    {"top_k": 5}, {"temperature": 1.5, "top_k": 20, "top_p": 0.75, "min_p": 0.02, "softcap": 8.0}, {"top_p": 0.9},
)  # fmt: skip
"""Filters of requests 0, 1, .. of a mixed case."""
PERIOD = 3
LARGE = 1 << 23
"""Logits. In a larger case request i repeats request i mod PERIOD: to draw and to verify each would take minutes."""
# Roundings of fp32 move a score and its noise by less, and a sum of probabilities by less than the second.
LEAST_MARGIN, SUM_ROUNDING = 2e-5, 2e-6
_PAD_BEFORE, _PAD_BEHIND = 3, 10
_ATTEMPTS = 300


@dataclass(frozen=True)
class Request:
    """One request of a case, on the CPU."""

    logits: Tensor
    """(rows, V)"""
    draft_logits: Tensor | None
    filters: dict[str, float]
    seed: int
    position: int
    drafts: list[int]

    def sampler(self, nudge: float = 0.0) -> Sampler:
        """Filters and noise. nudge: how much more than the filters say they leave."""
        value = self.filters
        top_p, min_p = value["top_p"], value["min_p"]
        filters = SamplingFilters(
            value["temperature"], int(value["top_k"]), top_p if top_p == 1 else min(1.0, max(0.0, top_p + nudge)),
            min(1.0, min_p * (1 - nudge)),
        )  # fmt: skip
        return Sampler(filters, KeyedNoise(self.seed, self.position, self.logits.shape[1]), value["softcap"])

    def outcome(self, case: VerificationCase, sampler: Sampler, ends: Sequence[int] = ()) -> tuple[list[int], int]:
        """Emitted tokens, and how many of them are drafts."""
        if case.stream == "draft":
            return draft_by_sampling(self.logits, sampler), 0
        return verify_request(
            self.logits, self.drafts, sampler, method=case.method, draft_logits=self.draft_logits, eos_token_ids=ends
        )

    def is_certain(self, case: VerificationCase) -> bool:
        """No decision hangs on a rounding: with a little more and a little less left by the filters, all is the same."""
        outcomes, margins = [], []
        for nudge in (0.0, SUM_ROUNDING, -SUM_ROUNDING):
            sampler = self.sampler(nudge)
            outcomes.append(self.outcome(case, sampler))
            margins += sampler.margins
        return outcomes[0] == outcomes[1] == outcomes[2] and min(margins, default=1.0) > LEAST_MARGIN


def draw_inputs(case: VerificationCase) -> Inputs:
    """All tensors and plain values of a case by name, on the CPU."""
    rng = draw.generator(case.seed)
    distinct = _distinct(case)
    dtype = DTYPES[case.dtype]
    logits = _logits(case.kind, (distinct, case.k + 1, case.v), rng).to(dtype)  # (B, K + 1, V)
    drafter = logits[:, : case.k]  # (B, K, V)
    if case.method != "match":
        # The less is to be accepted, the less the drafter knows of the target.
        strange = 2 * (1 - case.acceptance) * torch.randn(drafter.shape, generator=rng)
        drafter = (drafter.float() + strange).to(dtype)
    made: Inputs = _mixed_filters(case.b) if case.mixed else {}
    lengths = [(b + 1) % (case.k + 1) if case.ragged else case.k for b in range(distinct)]
    requests = [
        _draw_request(case, logits[b], drafter[b, : lengths[b]], filters_of(case, made, b), b, rng)
        for b in range(distinct)
    ]
    made["logits"] = logits
    made["draft_logits"] = drafter if case.has_draft_logits else None
    made["draft_tokens"] = _drafts([request.drafts for request in requests], case.k)
    made["seeds"] = torch.tensor([request.seed for request in requests], dtype=torch.int64)
    made["positions"] = torch.tensor([request.position for request in requests], dtype=torch.int64)
    made["num_drafts"] = torch.tensor(lengths) if case.ragged else None
    made["eos_token_ids"] = _ends(case, requests) if case.eos else ()
    if distinct < case.b:
        each = torch.arange(case.b) % distinct
        repeated = ("logits", "draft_logits", "draft_tokens", "seeds", "positions", "num_drafts")
        made |= {name: made[name][each] for name in repeated if made[name] is not None}
    for name in ("logits", "draft_logits"):
        if case.strided and made[name] is not None:
            made[f"{name} in more"] = _surrounded(made.pop(name))
    return made


def inside(case: VerificationCase, made: Inputs, name: str) -> Tensor | None:
    """logits or draft_logits (B, rows, V), as the view of something larger where the case is strided."""
    if f"{name} in more" not in made:
        whole: Tensor | None = made[name]
        return whole
    more: Tensor = made[f"{name} in more"]
    return more[:, 1:, _PAD_BEFORE : _PAD_BEFORE + case.v]


def expected(case: VerificationCase, made: Inputs) -> tuple[Tensor, Tensor]:
    """tokens (B, K + 1) and num_accepted (B,)."""
    tokens = torch.full((case.b, case.k + 1), -1)
    num_accepted = torch.zeros(case.b, dtype=torch.int64)
    distinct = _distinct(case)
    for b in range(distinct):
        request = request_of(case, made, b)
        emitted, accepted = request.outcome(case, request.sampler(), made["eos_token_ids"])
        tokens[b::distinct, : len(emitted)] = torch.tensor(emitted)
        num_accepted[b::distinct] = accepted
    return tokens, num_accepted


def request_of(case: VerificationCase, made: Inputs, b: int) -> Request:
    """Request b of what `draw_inputs` made."""
    logits, given = inside(case, made, "logits"), inside(case, made, "draft_logits")
    assert logits is not None
    length = case.k if made["num_drafts"] is None else int(made["num_drafts"][b])
    return Request(
        logits[b].cpu(), None if given is None else given[b].cpu(), filters_of(case, made, b), int(made["seeds"][b]),
        int(made["positions"][b]), made["draft_tokens"][b, :length].tolist(),
    )  # fmt: skip


def filters_of(case: VerificationCase, made: Inputs, b: int) -> dict[str, float]:
    return {name: made[name][b].item() if name in made else getattr(case, name) for name in FILTERS}


def _distinct(case: VerificationCase) -> int:
    return min(case.b, PERIOD) if case.b * (case.k + 1) * case.v > LARGE else case.b


def _draw_request(
    case: VerificationCase, logits: Tensor, drafter: Tensor, filters: dict[str, float], b: int, rng: torch.Generator
) -> Request:
    """Seed, position and drafts of a request none of whose decisions hangs on a rounding."""
    for _ in range(_ATTEMPTS):
        seed = int(torch.randint(-(2**63), 2**63 - 1, (), generator=rng))
        # Some beyond 32 bits.
        position = int(torch.randint(0, 9000, (), generator=rng)) + (b % 2) * 2**33
        request = Request(logits, drafter if case.has_draft_logits else None, filters, seed, position, [])
        request = replace(request, drafts=_draw_drafts(case, request, drafter, rng))
        if request.is_certain(case):
            return request
    raise RuntimeError(f"{case}: every seed left a decision to a rounding")


def _draw_drafts(case: VerificationCase, request: Request, drafter: Tensor, rng: torch.Generator) -> list[int]:
    """Drafts for drafter (length, V): for "match" the target's samples or other tokens, else what the drafter says."""
    if case.sure:
        best: list[int] = drafter.argmax(-1).tolist()
        return best
    if case.method != "match":
        return draft_by_sampling(drafter, request.sampler())
    drafts: list[int] = []
    right = True
    for row, logits in enumerate(drafter):
        right = right and float(torch.rand((), generator=rng)) < case.acceptance
        other = int(torch.randint(0, case.v, (), generator=rng))
        drafts.append(request.sampler().sample(logits, row) if right else other)
    return drafts


def _drafts(requests: list[list[int]], k: int) -> Tensor:
    """(B, K). What lies behind a request's drafts is no token."""
    tokens = torch.full((len(requests), k), -(2**40))
    for b, drafts in enumerate(requests):
        tokens[b, : len(drafts)] = torch.tensor(drafts, dtype=torch.int64)
    return tokens


def _ends(case: VerificationCase, requests: list[Request]) -> tuple[int, ...]:
    """Two ends of text: a token that is emitted in the middle, where there is one, and the first of the last request."""
    emitted = [request.outcome(case, request.sampler())[0] for request in requests]
    inner = [token for tokens in emitted for token in tokens[1:-1]]
    return (inner[0] if inner else 0, emitted[-1][0])


def _mixed_filters(batch: int) -> Inputs:
    """One value a request, each (B,)."""
    default = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "softcap": 0.0}
    each = [{**default, **MIXED[b % len(MIXED)]} for b in range(batch)]
    dtypes = {"top_k": torch.int64}
    return {name: torch.tensor([one[name] for one in each], dtype=dtypes.get(name, torch.float32)) for name in FILTERS}


def _surrounded(logits: Tensor) -> Tensor:
    """(B, rows + 1, pads + V): the logits in the midst of NaN."""
    batch, rows, vocab_size = logits.shape
    more = logits.new_full((batch, rows + 1, _PAD_BEFORE + vocab_size + _PAD_BEHIND), math.nan)
    more[:, 1:, _PAD_BEFORE : _PAD_BEFORE + vocab_size] = logits
    return more


def _logits(kind: str, shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """(B, rows, V) fp32 of a kind."""
    bulk = torch.randn(shape, generator=rng)
    if kind == "model":
        batch, rows, vocab_size = shape
        count = max(1, min(40, vocab_size // 4))
        which = torch.randint(0, vocab_size, (batch, rows, count), generator=rng)
        height = 18 + 4 * torch.rand((batch, rows, count), generator=rng).log()
        return (2 * bulk).scatter(-1, which, height)
    if kind == "levels":
        return torch.where(bulk > 1.5, 2.0, -1.0)
    if kind == "sparse":
        return (2.5 * bulk).masked_fill(_all_but_one(bulk < 1.3), -math.inf)
    if kind == "peak":
        return bulk + 30 * (bulk == bulk.amax(-1, keepdim=True))
    return {
        "normal": 2.5 * bulk, "ties": (2.5 * bulk).round(), "flat": torch.full(shape, 1.25), "far": 300 * bulk
    }[kind]  # fmt: skip


def _all_but_one(mask: Tensor) -> Tensor:
    """A row that is True everywhere is not, in its last place."""
    mask[..., -1] &= ~mask.all(-1)
    return mask
