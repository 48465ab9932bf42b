"""The public functions that turn logits into tokens: `verify_drafts` and `sample_tokens`.

B requests, K drafts, V tokens. Each function checks its arguments and turns them into those of one op (`ops.SCHEMA`).
Errors are those of `gemma4_kernels.checks`. docs/mtp.md has the noise, the proof that samples stay samples of the target,
and what exactly is the same under which changes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma4_kernels import backends, checks
from gemma4_kernels.backends import Call
from gemma4_kernels.verification import noise, ops

Number = float | Tensor
"""A number for all requests, or a tensor (B,) with one for each."""


class VerifyResult(NamedTuple):
    """What a verification emits and where it leaves each request. Tensors on the logits' device, made without a sync."""

    tokens: Tensor
    """(B, K + 1) int64: accepted drafts, then one token of the target's own; -1 behind."""
    num_accepted: Tensor
    """(B,) int64: drafts among the emitted tokens."""
    next_token: Tensor
    """(B,) int64: the last emitted token, which the target reads next; -1 if nothing was emitted."""
    num_emitted: Tensor
    """(B,) int64: by so much the text grows, and so do the rows of the cache to keep: the last token has not been read,
    but the one that the previous call emitted last has."""
    hidden_row: Tensor
    """(B,) int64: the row whose hidden state produced next_token, num_emitted - 1; 0 if nothing was emitted."""
    finished: Tensor
    """(B,) bool: next_token ends the text (eos_token_ids)."""
    refused: Tensor
    """(B,) bool: a row held NaN or +inf, or nothing but -inf. The request emits nothing."""


def verify_drafts(
    logits: Tensor, draft_tokens: Tensor, num_drafts: Tensor | None = None, *, temperature: Number = 1.0,
    top_k: int | Tensor = 0, top_p: Number = 1.0, min_p: Number = 0.0, softcap: Number = 0.0,
    seeds: int | Tensor | None = None, positions: int | Tensor | None = None, method: str = "match",
    draft_logits: Tensor | None = None, eos_token_ids: Collection[int] = (), max_new_tokens: int | Tensor | None = None,
) -> VerifyResult:  # fmt: skip
    """Which drafts the target agrees with, and the token that it adds.

    Filters act as transformers' do, in this order: softcap, temperature, top_k, top_p, min_p.

    Args:
        logits: (B, K + 1, V) bf16, fp16, fp32 or fp64, any strides with a dense last dim. Row i is what the target says
            after the bonus token and i drafts.
        draft_tokens: (B, K) int32 or int64. What lies behind a request's drafts may be anything.
        num_drafts: (B,) int32 or int64, 0 to K: how many drafts a request has; K by default.
        temperature, top_k, top_p, min_p, softcap: a number or (B,). Temperature 0 is greedy: the first maximum. top_k 0,
            top_p 1, min_p 0 and softcap 0 change nothing. A float32 top_p is taken as it is, 0.95 at 0.94999999.
        seeds: int (for all requests) or (B,) int64. By default drawn from torch's generator.
        positions: int or (B,): the index in its text of the token that row 0 predicts. Required with seeds, because noise
            that is used twice is no noise.
        method: "match" samples the target at each row and accepts drafts that equal the sample. The text depends on the
            seed alone, not on the drafts. "rejection" accepts with probability p / q; "block" accepts blocks as a whole,
            never fewer tokens in expectation. Those two are for drafts that were sampled.
        draft_logits: (B, K, V) for "rejection" and "block": the drafts were sampled from these under the same filters
            (`sample_tokens(..., stream="draft")`). None: the drafts were no samples (an argmax).
        eos_token_ids: nothing is emitted after one of these.
        max_new_tokens: int or (B,): at most so many tokens are emitted.
    Returns: VerifyResult.
    Raises: ShapeError, StrideError, DeviceError, ValueError, DTypeError, TypeError; BackendError where the backend asked
        for by name cannot do it. Values are looked at only on the CPU; on a device, a temperature that is none is greedy
        and a draft that is no token is not accepted.
    """
    arguments = _plan(
        "verify_drafts", logits, draft_tokens, num_drafts, temperature, top_k, top_p, min_p, softcap, seeds, positions,
        method, draft_logits, eos_token_ids, max_new_tokens, noise.TARGET,
    )  # fmt: skip
    return VerifyResult(*ops.call(*arguments))


def sample_tokens(
    logits: Tensor, *, temperature: Number = 1.0, top_k: int | Tensor = 0, top_p: Number = 1.0, min_p: Number = 0.0,
    softcap: Number = 0.0, seeds: int | Tensor | None = None, positions: int | Tensor | None = None,
    stream: str = "target",
) -> Tensor:  # fmt: skip
    """One token a request: what `verify_drafts` by "match" emits without drafts. Same seed and position, same token.

    Args:
        logits: (B, V).
        stream: "target", or "draft" for a drafter whose drafts "rejection" or "block" verifies: its noise is another.
        The others: as in `verify_drafts`.
    Returns: (B,) int64; -1 where the logits hold NaN or +inf, or nothing but -inf.
    Raises: as `verify_drafts`.
    """
    arguments = _plan_sampling(logits, temperature, top_k, top_p, min_p, softcap, seeds, positions, stream)
    return ops.call(*arguments)[2]


def _describe(logits: Tensor, draft_tokens: Tensor, num_drafts: Tensor | None = None, **rest: Any) -> Call:
    named = {**_DEFAULTS, "method": "match", "draft_logits": None, "eos_token_ids": (), "max_new_tokens": None}
    return ops.describe(*_plan("verify_drafts", logits, draft_tokens, num_drafts, **{**named, **rest}, stream=0))


def _describe_sampling(logits: Tensor, **rest: Any) -> Call:
    return ops.describe(*_plan_sampling(logits, **{**_DEFAULTS, "stream": "target", **rest}))


_DEFAULTS: dict[str, Any] = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "softcap": 0.0, "seeds": 0, "positions": 0
}  # fmt: skip

backends.register_describer("verify_drafts", "verify_drafts", _describe)
backends.register_describer("sample_tokens", "verify_drafts", _describe_sampling)


# Checks -------------------------------------------------------------------------------------------------------------


def _plan_sampling(
    logits: Tensor, temperature: Number, top_k: int | Tensor, top_p: Number, min_p: Number, softcap: Number,
    seeds: int | Tensor | None, positions: int | Tensor | None, stream: str,
) -> tuple[Any, ...]:  # fmt: skip
    name = "sample_tokens"
    checks.has_shape(name, "logits", logits, ("B", "V"))
    if stream not in noise.STREAMS:
        raise ValueError(f"{name}: stream must be one of {', '.join(noise.STREAMS)}, got {stream!r}")
    no_drafts = torch.empty(logits.shape[0], 0, dtype=torch.int64, device=logits.device)
    return _plan(
        name, logits[:, None], no_drafts, None, temperature, top_k, top_p, min_p, softcap, seeds, positions, "match",
        None, (), None, noise.STREAMS[stream],
    )  # fmt: skip


def _plan(
    name: str, logits: Tensor, draft_tokens: Tensor, num_drafts: Tensor | None, temperature: Number, top_k: int | Tensor,
    top_p: Number, min_p: Number, softcap: Number, seeds: int | Tensor | None, positions: int | Tensor | None,
    method: str, draft_logits: Tensor | None, eos_token_ids: Collection[int], max_new_tokens: int | Tensor | None,
    stream: int,
) -> tuple[Any, ...]:  # fmt: skip
    """The op's arguments."""
    _check_logits(name, "logits", logits, ("B", "K + 1", "V"))
    batch, rows, vocab_size = logits.shape
    if rows == 0 or not 0 < vocab_size <= ops.LARGEST_VOCABULARY:
        raise checks.ShapeError(
            f"{name}: logits must have at least one row and 1 to {ops.LARGEST_VOCABULARY} tokens, got {tuple(logits.shape)}"
        )
    checks.has_shape(name, "draft_tokens", draft_tokens, (batch, rows - 1))
    checks.has_dtype(name, "draft_tokens", draft_tokens, checks.INTEGERS)
    if method not in ops.METHODS:
        raise ValueError(f"{name}: method must be one of {', '.join(ops.METHODS)}, got {method!r}")
    if draft_logits is not None:
        if method == "match":
            raise ValueError(f'{name}: draft_logits must be None with method "match", which looks at drafts only')
        _check_logits(name, "draft_logits", draft_logits, (batch, rows - 1, vocab_size))
    if num_drafts is not None:
        checks.has_shape(name, "num_drafts", num_drafts, (batch,))
        checks.has_dtype(name, "num_drafts", num_drafts, checks.INTEGERS)
    numbers = _Numbers(name, batch, logits.device)
    greedy = not isinstance(temperature, Tensor) and temperature == 0
    if seeds is not None and positions is None and not greedy:
        raise ValueError(f"{name}: positions must be given with seeds, got None: noise must not repeat")
    if seeds is None:
        draws = torch.zeros if greedy else _any_seeds
        seeds = draws((batch,), dtype=torch.int64, device=logits.device)
    cut = 1.0 - (top_p if isinstance(top_p, Tensor) else numbers.real_scalar("top_p", top_p, 1.0))
    arguments = (
        logits, draft_tokens, num_drafts, numbers.reals("temperature", temperature), numbers.whole("top_k", top_k),
        numbers.reals("top_p", cut), numbers.reals("min_p", min_p, 1.0), numbers.reals("softcap", softcap),
        numbers.whole("seeds", seeds, minimum=-(2**63)), numbers.whole("positions", 0 if positions is None else positions),
        draft_logits, None if max_new_tokens is None else numbers.whole("max_new_tokens", max_new_tokens),
        [checks.whole_number(name, "an element of eos_token_ids", token) for token in eos_token_ids], method, stream,
    )  # fmt: skip
    checks.same_device(
        name, logits=logits, draft_tokens=draft_tokens, num_drafts=num_drafts, draft_logits=draft_logits,
        temperature=arguments[3], top_k=arguments[4], top_p=arguments[5], min_p=arguments[6], softcap=arguments[7],
        seeds=arguments[8], positions=arguments[9], max_new_tokens=arguments[11],
    )  # fmt: skip
    return arguments


def _any_seeds(size: tuple[int, ...], **options: Any) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, size, **options)


def _check_logits(name: str, argument: str, logits: Tensor, shape: tuple[int | str, ...]) -> None:
    checks.has_shape(name, argument, logits, shape)
    checks.has_dtype(name, argument, logits, checks.FLOATS)
    checks.is_dense(name, argument, logits)


class _Numbers:
    """Arguments that are a number or a tensor with one for each request, made into tensors (B,)."""

    def __init__(self, function: str, batch: int, device: torch.device) -> None:
        self.function, self.batch, self.device = function, batch, device

    def real_scalar(self, name: str, value: object, high: float = math.inf) -> float:
        number = checks.real_number(self.function, name, value)
        if not 0 <= number <= high or number == math.inf:
            limit = "finite and not negative" if high == math.inf else f"from 0 to {high:g}"
            raise ValueError(f"{self.function}: {name} must be {limit}, got {number}")
        return number

    def reals(self, name: str, value: Number, high: float = math.inf) -> Tensor:
        if isinstance(value, Tensor):
            checks.has_shape(self.function, name, value, (self.batch,))
            checks.has_dtype(self.function, name, value, checks.FLOATS)
            return value.to(torch.float32)
        number = self.real_scalar(name, value, high)
        return torch.full((self.batch,), number, dtype=torch.float32, device=self.device)

    def whole(self, name: str, value: int | Tensor, minimum: int = 0) -> Tensor:
        if isinstance(value, Tensor):
            checks.has_shape(self.function, name, value, (self.batch,))
            checks.has_dtype(self.function, name, value, checks.INTEGERS)
            return value.to(torch.int64)
        number = checks.whole_number(self.function, name, value, minimum)
        if number >= 2**63:
            raise ValueError(f"{self.function}: {name} must fit into 64 bits, got {number}")
        return torch.full((self.batch,), number, dtype=torch.int64, device=self.device)
