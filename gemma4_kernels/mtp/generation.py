"""Generation for a batch with drafts that are verified all at once: the text of plain decoding, in fewer passes.

A round, for all requests that are not finished:

    draft     up to K tokens for each request, from what the target has committed
    verify    one pass of the target over the bonus token and the drafts: K + 1 rows
    sample    which drafts the target agrees with, and the token that it adds (`verify_drafts`)
    commit    by a length; the hidden state of the last row that counted and the added token start the next round

The host looks at the device once a round, to hand out the tokens. docs/mtp.md says why the text is that of plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gemma4_kernels import checks
from gemma4_kernels.mtp.draft_length import AdaptiveLength, DraftLength
from gemma4_kernels.mtp.drafter import PositionRule
from gemma4_kernels.mtp.drafting import Drafting, to_device
from gemma4_kernels.mtp.prompts import FUNCTION, align
from gemma4_kernels.mtp.statistics import Statistics, Stopwatch
from gemma4_kernels.mtp.stopping import StopStrings
from gemma4_kernels.mtp.target import Pass, Target
from gemma4_kernels.verification.api import Number, VerifyResult, verify_drafts
from gemma4_kernels.verification.ops import METHODS

DEFAULT_DRAFTS = 4
FinishReason = Literal["eos", "length", "stop", "refused"]


class Update(NamedTuple):
    """New tokens of a request."""

    request: int
    """Its index in the batch."""
    tokens: list[int]
    finish_reason: FinishReason | None
    """None: there is more to come."""
    statistics: Statistics
    """Of the whole batch. They go on counting after this update; copy what is to stay."""


@dataclass(frozen=True)
class Generation:
    """What `generate` returns."""

    tokens: list[list[int]]
    """The new tokens of each request, without the prompt. What ended a text (an end of text, the tokens of a stop string)
    is its last."""
    finish_reasons: list[FinishReason]
    """eos, length (max_new_tokens), stop (a stop string), refused (the target's logits held NaN or nothing)."""
    statistics: Statistics
    """Of the whole batch."""
    statistics_by_request: list[Statistics]
    """Without times."""

    def padded(self, pad_token_id: int = 0) -> Tensor:
        """(B, longest) int64: the new tokens, padded on the right."""
        rows = [torch.tensor(tokens, dtype=torch.int64) for tokens in self.tokens]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)


@dataclass
class _Request:
    """What the host knows of a request."""

    index: int
    text: list[int]
    """The prompt and what has been emitted."""
    prompt_length: int
    budget: int
    """Tokens that may still be emitted."""
    drafts: DraftLength
    statistics: Statistics = field(default_factory=Statistics)
    finish_reason: FinishReason | None = None

    @property
    def new(self) -> list[int]:
        return self.text[self.prompt_length :]

    def wanted(self) -> int:
        """Drafts for the next round, which emits up to one token more."""
        return min(self.drafts.wanted(), self.budget - 1)


@dataclass
class _State:
    """What the device knows of the requests that are not finished, one element each."""

    bonus: Tensor
    """(A,) int64: emitted, and not yet read by the target."""
    hidden: Tensor
    """(A, hidden): the target's state that produced it."""
    text_length: Tensor
    """(A,) int64, the bonus token included: the position of the token to be sampled next."""
    budget: Tensor
    """(A,) int64"""
    seeds: Tensor
    filters: dict[str, Tensor]
    """Filters of `verify_drafts`, (A,) each."""

    def keep(self, which: Tensor) -> _State:
        filters = {name: values[which] for name, values in self.filters.items()}
        return _State(
            self.bonus[which],
            self.hidden[which],
            self.text_length[which],
            self.budget[which],
            self.seeds[which],
            filters,
        )


def generate(
    model: Any, drafter: Any, input_ids: Tensor | Sequence[Sequence[int] | Tensor], *,
    attention_mask: Tensor | None = None, max_new_tokens: int | Sequence[int] = 256, num_drafts: int | None = None,
    adaptive: bool | AdaptiveLength = True, temperature: Number = 0.0, top_k: int | Tensor = 0, top_p: Number = 1.0,
    min_p: Number = 0.0, seeds: int | Tensor | None = None, method: str = "match",
    eos_token_ids: int | Collection[int] | None = None, stop_strings: Sequence[str] = (), tokenizer: Any = None,
    position: PositionRule = "bonus", sliding_rows: int | None = None, on_tokens: Callable[[Update], None] | None = None,
    **inputs: Any,
) -> Generation:  # fmt: skip
    """Continue prompts, with drafts or without.

    Args:
        model: a Gemma 4 model of transformers; a `Target`; or anything with a method `speculative_target()`.
        drafter: a `Drafter`; transformers' assistant for the model; a `DraftFunction`; or None for plain decoding.
        input_ids: (B, S) integers with attention_mask (B, S), padded on any side; or a list of prompts.
        max_new_tokens: for all requests, or one number each.
        num_drafts: the most drafts of a round. None: what the assistant's generation config says (num_assistant_tokens),
            or 4.
        adaptive: choose the number of drafts by what has been accepted, up to num_drafts; an `AdaptiveLength` has
            the numbers behind the choice. False: always num_drafts.
        temperature, top_k, top_p, min_p: as in `verify_drafts`, for all requests or one value each. Greedy by default.
        seeds: (B,) int64, or an int s for s, s + 1, ... in the order of the batch; drawn from torch's generator by
            default. By "match", the text of a request is a function of the model, the prompt, the filters and the seed.
        method: "match", or "rejection" or "block", which sample the drafts too (`verify_drafts`).
        eos_token_ids: a text ends with one of these. None: the model's.
        stop_strings: a text ends with the token that completes one of these; needs the tokenizer.
        position, sliding_rows: conventions of the drafter, see `Drafter.draft`.
        on_tokens: called with an `Update` whenever a request has new tokens, within a round in the order of the batch.
        inputs: what else the model's forward takes with the prompts: pixel_values, mm_token_type_ids and so on. A target
            refuses what it does not know.
    Returns: Generation.
    Raises: ValueError, TypeError, ShapeError, DTypeError naming the argument; what the model raises.
    """
    target = _target(model)
    prompts = align(input_ids, attention_mask, inputs, target.device)
    batch = len(prompts.lengths)
    if method not in METHODS:
        raise ValueError(f"{FUNCTION}: method must be one of {', '.join(METHODS)}, got {method!r}")
    drafting = None if drafter is None else Drafting.of(drafter, target, method, position, sliding_rows)
    if num_drafts is None:
        num_drafts = DEFAULT_DRAFTS if drafting is None else drafting.num_drafts or DEFAULT_DRAFTS
    largest = 0 if drafting is None else checks.whole_number(FUNCTION, "num_drafts", num_drafts)
    rule = adaptive if isinstance(adaptive, AdaptiveLength) else AdaptiveLength() if adaptive else None
    eos = _eos(target.eos_token_ids if eos_token_ids is None else eos_token_ids)
    run = _Run(
        target=target, drafting=drafting, method=method, eos=eos, stop=StopStrings(stop_strings, tokenizer),
        on_tokens=on_tokens, watch=Stopwatch(target.device),
        requests=[
            _Request(index, tokens[:length], length, budget, DraftLength(largest, rule))
            for index, (tokens, length, budget) in enumerate(
                zip(prompts.tokens.tolist(), prompts.lengths, _budgets(max_new_tokens, batch), strict=True)
            )
        ],
    )  # fmt: skip
    filters = {
        name: _for_each(name, value, batch, target.device)
        for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p), ("min_p", min_p))
    }
    with torch.no_grad():
        run.prefill(
            prompts.tokens, prompts.lengths, prompts.inputs, largest, filters, _seeds(seeds, batch, target.device)
        )
        while run.active:
            run.round()
    return run.result()


@dataclass
class _Run:
    """A generation under way."""

    target: Target
    drafting: Drafting | None
    method: str
    eos: tuple[int, ...]
    stop: StopStrings
    on_tokens: Callable[[Update], None] | None
    watch: Stopwatch
    requests: list[_Request]
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        self.active = list(self.requests)

    def prefill(
        self, tokens: Tensor, lengths: list[int], inputs: dict[str, Any], num_drafts: int, filters: dict[str, Tensor],
        seeds: Tensor,
    ) -> None:  # fmt: skip
        """Read the prompts and emit the token that follows each."""
        tentative = num_drafts + 1
        longest = max(len(request.text) + request.budget for request in self.requests)
        with self.watch.phase("prefill"):
            out = self.target.prefill(
                tokens, lengths, max_positions=longest + tentative, tentative_rows=tentative, inputs=inputs
            )
        device = tokens.device
        self.state = _State(
            tokens[:, 0], out.hidden[:, 0], to_device(lengths, device),
            to_device([request.budget for request in self.requests], device), seeds, filters,
        )  # fmt: skip
        result = self._verify(out, tokens[:, :0], None, None)
        self._emit(out, result, [0] * len(self.requests), is_first=True)

    def round(self) -> None:
        """One pass of the target, with drafts or without."""
        lengths = [request.wanted() for request in self.active]
        state = self.state
        drafts, draft_logits = state.bonus[:, None][:, :0], None  # (A, 0)
        if max(lengths):
            assert self.drafting is not None  # without one nobody wants drafts
            with self.watch.phase("draft"):
                drafts, draft_logits, lengths = self.drafting.draft(
                    lengths, [(request.index, request.text) for request in self.active], state.bonus, state.hidden,
                    {**state.filters, "seeds": state.seeds, "positions": state.text_length},
                )  # fmt: skip
            longest = max(lengths)
            drafts = drafts[:, :longest]
            draft_logits = None if draft_logits is None else draft_logits[:, :longest]
        num_drafts = to_device(lengths, drafts.device) if min(lengths) < drafts.shape[1] else None
        with self.watch.phase("verify"):
            out = self.target.step(torch.cat((state.bonus[:, None], drafts), dim=1))
        result = self._verify(out, drafts, num_drafts, draft_logits)
        self.target.commit(result.num_emitted)
        self._emit(out, result, lengths)

    def _verify(
        self, out: Pass, drafts: Tensor, num_drafts: Tensor | None, draft_logits: Tensor | None
    ) -> VerifyResult:
        state = self.state
        with self.watch.phase("sample"):
            return verify_drafts(
                out.logits, drafts, num_drafts, softcap=self.target.softcap, seeds=state.seeds,
                positions=state.text_length, method=self.method, draft_logits=draft_logits, eos_token_ids=self.eos,
                max_new_tokens=state.budget, **state.filters,
            )  # fmt: skip

    def _emit(self, out: Pass, result: VerifyResult, offered: list[int], is_first: bool = False) -> None:
        """Hand out what a round has brought, and leave the device ready for the next."""
        state = self.state
        row = result.hidden_row[:, None, None].expand(-1, 1, out.hidden.shape[2])
        self.state = _State(
            result.next_token, out.hidden.gather(1, row)[:, 0], state.text_length + result.num_emitted,
            state.budget - result.num_emitted, state.seeds, state.filters,
        )  # fmt: skip
        numbers = (result.num_emitted, result.num_accepted, result.finished, result.refused)
        columns = torch.stack([number.long() for number in numbers], dim=1)  # (A, 4)
        host = torch.cat((columns, result.tokens), dim=1).tolist()  # the only time that the host waits
        self.statistics.rounds += not is_first
        self.statistics.seconds = self.watch.read()
        for request, drafts, (emitted, accepted, finished, refused, *tokens) in zip(
            self.active, offered, host, strict=True
        ):
            self._take(request, drafts, accepted, tokens[:emitted], bool(finished), bool(refused), is_first)
        kept = [place for place, request in enumerate(self.active) if request.finish_reason is None]
        if 0 < len(kept) < len(self.active):
            which = to_device(kept, state.bonus.device)
            self.state = self.state.keep(which)
            self.target.keep(which)
        self.active = [self.active[place] for place in kept]

    def _take(
        self, request: _Request, offered: int, accepted: int, tokens: list[int], ended: bool, refused: bool,
        is_first: bool,
    ) -> None:  # fmt: skip
        """What a round has brought to one request."""
        stop = self.stop.cut(request.new, tokens)
        if stop is not None:
            ended = ended and stop == len(tokens)
            tokens = tokens[:stop]
            accepted = min(accepted, stop)
        request.text += tokens
        request.budget -= len(tokens)
        if refused:
            request.finish_reason = "refused"
        elif ended:
            request.finish_reason = "eos"
        elif stop is not None:
            request.finish_reason = "stop"
        elif request.budget == 0:
            request.finish_reason = "length"
        for statistics in (request.statistics, self.statistics):
            if is_first:
                statistics.saw_first(len(tokens))
            else:
                statistics.saw(offered, accepted, len(tokens))
        request.statistics.rounds += not is_first
        request.drafts.saw(offered, accepted, len(tokens))
        if self.on_tokens is not None:
            self.on_tokens(Update(request.index, tokens, request.finish_reason, self.statistics))

    def result(self) -> Generation:
        reasons = [request.finish_reason for request in self.requests]
        assert None not in reasons  # all have finished
        self.statistics.seconds = self.watch.read()
        return Generation(
            [request.new for request in self.requests], [reason for reason in reasons if reason is not None],
            self.statistics, [request.statistics for request in self.requests],
        )  # fmt: skip


# Arguments ----------------------------------------------------------------------------------------------------------


def _target(model: Any) -> Target:
    if hasattr(model, "prefill") and hasattr(model, "step"):
        target: Target = model
        return target
    if hasattr(model, "speculative_target"):
        return model.speculative_target()  # type: ignore[no-any-return]
    if not hasattr(model, "config"):
        raise TypeError(f"{FUNCTION}: model must be a model of transformers or a Target, got {type(model).__name__}")
    from gemma4_kernels.integrations.transformers_target import TransformersTarget

    return TransformersTarget(model)


def _eos(given: int | Collection[int]) -> tuple[int, ...]:
    tokens = (given,) if isinstance(given, Integral) else tuple(given)  # type: ignore[arg-type]
    return tuple(checks.whole_number(FUNCTION, "an element of eos_token_ids", token) for token in tokens)


def _budgets(max_new_tokens: int | Sequence[int], batch: int) -> list[int]:
    budgets = list(max_new_tokens) if isinstance(max_new_tokens, Iterable) else [max_new_tokens] * batch
    if len(budgets) != batch:
        raise ValueError(
            f"{FUNCTION}: max_new_tokens must be a number or {batch} of them, one a request, got {len(budgets)}"
        )
    return [checks.whole_number(FUNCTION, "max_new_tokens", budget, minimum=1) for budget in budgets]


def _for_each(name: str, value: Number, batch: int, device: torch.device) -> Tensor:
    """(batch,) on the device; `verify_drafts` checks the values."""
    if isinstance(value, Tensor):
        checks.has_shape(FUNCTION, name, value, (batch,))
        return value.to(device)
    if name == "top_k":
        return torch.full((batch,), checks.whole_number(FUNCTION, name, value), device=device)
    number = checks.real_number(FUNCTION, name, value)
    # 1 - top_p wants more digits than float32 has, which MPS alone is limited to.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.full((batch,), number, dtype=dtype, device=device)


def _seeds(seeds: int | Tensor | None, batch: int, device: torch.device) -> Tensor:
    if isinstance(seeds, Tensor):
        checks.has_shape(FUNCTION, "seeds", seeds, (batch,))
        checks.has_dtype(FUNCTION, "seeds", seeds, checks.INTEGERS)
        return seeds.to(device, torch.int64)
    if seeds is None:
        return torch.randint(-(2**63), 2**63 - 1, (batch,), dtype=torch.int64).to(device)
    first = checks.whole_number(FUNCTION, "seeds", seeds, minimum=-(2**63))
    if first + batch > 2**63:
        raise ValueError(f"{FUNCTION}: seeds must fit into 64 bits for {batch} requests, got {first}")
    return first + torch.arange(batch, device=device)
