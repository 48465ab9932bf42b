"""The verification op: schema, fake, what a call needs, checks of values, and who serves it.

The same pattern as `attention.ops`. One op serves both public functions: sampling is verification without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemma4_kernels import backends, checks
from gemma4_kernels.backends import Call, Implementation
from gemma4_kernels.cuda_common import support as cuda_support
from gemma4_kernels.op_support import fp32_sums, refuse_backward
from gemma4_kernels.triton_common import support
from gemma4_kernels.verification import cuda

METHODS = ("match", "rejection", "block")
LARGEST_VOCABULARY = 2**24
"""Sums of probabilities are whole numbers of 2**-38 in 64 bits."""

# cut is 1 - top_p, which float32 holds better than a top_p near 1. stream: see noise.STREAMS.
# Returns tokens, num_accepted, next_token, num_emitted, hidden_row, finished, refused.
SCHEMA = (
    "(Tensor logits, Tensor draft_tokens, Tensor? num_drafts, Tensor temperature, Tensor top_k, Tensor cut, Tensor min_p, "
    "Tensor softcap, Tensor seeds, Tensor positions, Tensor? draft_logits, Tensor? max_new_tokens, int[] eos_token_ids, "
    "str method, int stream) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


FP64_DRAFTER = "draft_logits in fp64"
"""A feature: the other dtypes are scored in fp32."""
MANY_ENDS = f"more than {cuda.MOST_ENDS} eos_token_ids"
"""A feature: the compiled kernels have room for so many."""


def describe(logits: Tensor, draft_tokens: Tensor, num_drafts: Tensor | None, *rest: Any) -> Call:
    *_, draft_logits, _max_new_tokens, eos_token_ids, method, _stream = rest
    drafts = draft_tokens.shape[1]
    features = {method}
    if draft_logits is not None and draft_logits.dtype == torch.float64:
        features.add(FP64_DRAFTER)
    if len(eos_token_ids) > cuda.MOST_ENDS:
        features.add(MANY_ENDS)
    return Call(
        op="verify_drafts",
        device_type=logits.device.type,
        architecture=backends.architecture_of(logits.device),
        dtype=logits.dtype,
        features=frozenset(features),
        shape_class=f"{method}, {'no drafts' if drafts == 0 else 'drafts'}",
    )


def _check_values(
    function: str, logits: Tensor, draft_tokens: Tensor, num_drafts: Tensor | None, temperature: Tensor, top_k: Tensor,
    cut: Tensor, min_p: Tensor, softcap: Tensor, seeds: Tensor, positions: Tensor, draft_logits: Tensor | None,
    max_new_tokens: Tensor | None, *_: Any,
) -> None:  # fmt: skip
    """What the host can see without a sync."""
    _batch, rows, vocab_size = logits.shape
    checks.values_within(function, "num_drafts", num_drafts, 0, rows - 1)
    checks.values_within(function, "top_k", top_k, 0, 2**62)
    checks.values_within(function, "positions", positions, 0, 2**62)
    checks.values_within(function, "max_new_tokens", max_new_tokens, 0, 2**62)
    largest = torch.finfo(torch.float32).max
    _reals_within(function, "temperature", temperature, 0, largest, "0 (greedy) or a positive number")
    _reals_within(function, "top_p", 1 - cut, 0, 1, "from 0 to 1")
    _reals_within(function, "min_p", min_p, 0, 1, "from 0 to 1")
    _reals_within(function, "softcap", softcap, 0, largest, "0 (none) or a positive number")
    if draft_tokens.device.type == "cpu" and draft_tokens.numel():
        used = draft_tokens
        if num_drafts is not None and num_drafts.device.type == "cpu":
            used = draft_tokens[torch.arange(rows - 1) < num_drafts[:, None]]
        checks.values_within(function, "a draft of draft_tokens", used, 0, vocab_size - 1)


def _reals_within(function: str, name: str, tensor: Tensor, low: float, high: float, expected: str) -> None:
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return
    bad = ~((tensor >= low) & (tensor <= high))  # NaN is bad
    if bool(bad.any()):
        raise ValueError(f"{function}: {name} must be {expected}, got {float(tensor[bad][0])}")


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    """Check what the host can see, then let the chosen backend do it."""
    _check_values("verify_drafts" if arguments[1].shape[1] else "sample_tokens", *arguments)
    function = backends.dispatch(describe(*arguments))
    with fp32_sums(arguments[0].device.type):
        out: tuple[Tensor, ...] = function(*arguments)
    return out


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    batch, rows, _vocab = logits.shape

    def a_request(dtype: torch.dtype) -> Tensor:
        return logits.new_empty((batch,), dtype=dtype)

    numbers = [a_request(torch.int64) for _ in range(4)]
    return (logits.new_empty((batch, rows), dtype=torch.int64), *numbers, a_request(torch.bool), a_request(torch.bool))


def call(*arguments: Any) -> Sequence[Tensor]:
    made: Sequence[Tensor] = torch.ops.gemma4_kernels.verify_drafts(*arguments)
    return made


torch.library.define("gemma4_kernels::verify_drafts", SCHEMA)
torch.library.impl("gemma4_kernels::verify_drafts", "CompositeExplicitAutograd", _run)
torch.library.register_fake("gemma4_kernels::verify_drafts", _fake)
torch.library.register_autograd("gemma4_kernels::verify_drafts", refuse_backward("verify_drafts"))
backends.register(
    Implementation(
        op="verify_drafts",
        backend="eager",
        entry="gemma4_kernels.verification.eager:verify_drafts",
        dtypes=frozenset(checks.FLOATS),
        features=frozenset({*METHODS, FP64_DRAFTER, MANY_ENDS}),
    )
)
backends.register(
    support.implementation(
        "verify_drafts", "gemma4_kernels.verification.triton.backend:verify_drafts", frozenset({*METHODS, MANY_ENDS})
    )
)
backends.register(
    Implementation(
        op="verify_drafts",
        backend="cuda",
        entry="gemma4_kernels.verification.cuda:verify_drafts",
        dtypes=frozenset(cuda_support.DTYPE_CODES),
        features=frozenset(METHODS),
        refuses=cuda_support.refuses,
        only_by_name=cuda_support.only_by_name,
    )
)
