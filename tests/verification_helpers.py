"""Verification by kernels beside the eager backend: the same arguments, all seven results compared."""

from __future__ import annotations

import math

import pytest
import torch

from gemma4_kernels import sample_tokens
from gemma4_kernels.bench.guards import GuardedInputs, poisoned_memory
from gemma4_kernels.verification import api, eager

# Programs small enough for the interpreter: the vocabulary of a test still has several tiles, lists that overflow, and
# rows that are read in steps.
SMALL = {"TILE": 128, "CHUNK": 16, "LIST": 4, "SHORTEST_LIST": 4, "SCRATCH": 64, "READ": 256, "FACT_TILES": 2}
_DEFAULTS = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "softcap": 0.0, "seeds": 3, "positions": 5,
    "method": "match", "draft_logits": None, "eos_token_ids": (), "max_new_tokens": None, "stream": 0,
}  # fmt: skip
# One for each request of a batch: together they meet every path of a row.
FILTERS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 65, "temperature": 3.0},
    {"top_p": 0.7},
    {"top_p": 0.05, "temperature": 2.0},
    {"min_p": 0.1, "temperature": 2.0},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"softcap": 4.0, "top_k": 64, "top_p": 0.95},
    {"top_k": 150, "top_p": 0.8, "temperature": 1.5},
    {"top_k": 100000, "top_p": 0.0},
]
_NAMES = ("tokens", "num_accepted", "next_token", "num_emitted", "hidden_row", "finished", "refused")


def randn(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of_logits(count, size):
    """(name, logits (count, size)): awkward rows."""
    rng = torch.Generator().manual_seed(0)
    random = randn(count, size)
    yield "random", random
    yield "ties", random.round()
    yield "bf16", random.bfloat16()
    yield "all equal", torch.full((count, size), 1.25)
    one = torch.full((count, size), -math.inf)
    one[torch.arange(count), torch.arange(count) * 29 % size] = 3.0
    yield "one finite", one
    yield "many -inf", random.masked_fill(torch.rand(count, size, generator=rng) < 0.9, -math.inf)
    yield "far apart", random * 1000
    yield "two levels", torch.where(torch.rand(count, size, generator=rng) < 0.1, 2.0, -1.0)
    yield "zeros of both signs", torch.where(torch.rand(count, size, generator=rng) < 0.5, 0.0, -0.0)
    yield "a peak", torch.where(torch.arange(size) == 77, 20.0, random)


def sampled_drafts(draft_logits, seeds, positions=5, **settings):
    """(B, K) drawn from draft_logits, as a drafter does."""
    rows = [
        sample_tokens(draft_logits[:, row].float(), seeds=seeds, positions=positions + row, stream="draft", **settings)
        for row in range(draft_logits.shape[1])
    ]
    return torch.stack(rows, dim=1)


def wanting(*tokens, size=10):
    """(1, rows, V): the argmax of each row is the token given."""
    return torch.nn.functional.one_hot(torch.tensor([tokens]), size).float()


def small_programs(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    from gemma4_kernels.verification.triton import tables

    for name, size in {**SMALL, **sizes}.items():
        monkeypatch.setattr(tables, name, size)


def each(*requests):
    """Filters of a batch, from one dict for each request: tensors (B,)."""
    names = {name for request in requests for name in request}
    return {name: torch.tensor([request.get(name, _DEFAULTS[name]) for request in requests]) for name in names}


def planned(logits, drafts=None, num_drafts=None, **settings):
    """The op's arguments. Without drafts each row of logits (B, V) is a request."""
    if drafts is None:
        logits = logits[:, None]
        drafts = torch.empty(len(logits), 0, dtype=torch.int64)
    return api._plan("verify_drafts", logits, drafts, num_drafts, **{**_DEFAULTS, **settings})


def on_triton(arguments):
    from gemma4_kernels.verification.triton import backend

    return _guarded(backend.verify_drafts, arguments)


def on_cuda(arguments):
    from gemma4_kernels.verification import cuda

    return _guarded(cuda.verify_drafts, arguments)


def _guarded(verify, arguments):
    """The seven results. Workspaces hold rubbish before the call, logits lie between NaN, and nothing may change."""
    named = {"logits": arguments[0], "draft_logits": arguments[10]}
    guarded = GuardedInputs({name: x for name, x in named.items() if x is not None}, torch.device("cpu"))
    inside = list(arguments)
    if arguments[0].is_contiguous():
        inside[0] = guarded.arguments["logits"]
    if arguments[10] is not None:
        inside[10] = guarded.arguments["draft_logits"]
    with poisoned_memory():
        results = verify(*inside)
    assert not guarded.damage({name: x for name, x in named.items() if x is not None})
    return results


def assert_same(logits, drafts=None, num_drafts=None, on=on_triton, **settings):
    """The kernels give what the eager backend gives. Returns it."""
    return assert_eager(planned(logits, drafts, num_drafts, **settings), on)


def assert_eager(arguments, on=on_triton):
    got, expected = on(arguments), eager.verify_drafts(*arguments)
    for name, mine, theirs in zip(_NAMES, got, expected, strict=True):
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine, theirs), f"{name}: {mine.tolist()}, the eager backend says {theirs.tolist()}"
    return expected
