"""Verification on Triton beside the eager backend: the same arguments, all seven results compared."""

from __future__ import annotations

import pytest
import torch

from gemma4_kernels.bench.guards import GuardedInputs, poisoned_memory
from gemma4_kernels.verification import api, eager

# Programs small enough for the interpreter: the vocabulary of a test still has several tiles, lists that overflow, and
# rows that are read in steps.
SMALL = {"TILE": 128, "CHUNK": 16, "LIST": 4, "SHORTEST_LIST": 4, "SCRATCH": 64, "READ": 256, "FACT_TILES": 2}
_DEFAULTS = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "softcap": 0.0, "seeds": 3, "positions": 5,
    "method": "match", "draft_logits": None, "eos_token_ids": (), "max_new_tokens": None, "stream": 0,
}  # fmt: skip
_NAMES = ("tokens", "num_accepted", "next_token", "num_emitted", "hidden_row", "finished", "refused")


def randn(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
    """The seven results. Workspaces hold rubbish before the call, logits lie between NaN, and nothing may change."""
    from gemma4_kernels.verification.triton import backend

    named = {"logits": arguments[0], "draft_logits": arguments[10]}
    guarded = GuardedInputs({name: x for name, x in named.items() if x is not None}, torch.device("cpu"))
    inside = list(arguments)
    if arguments[0].is_contiguous():
        inside[0] = guarded.arguments["logits"]
    if arguments[10] is not None:
        inside[10] = guarded.arguments["draft_logits"]
    with poisoned_memory():
        results = backend.verify_drafts(*inside)
    assert not guarded.damage({name: x for name, x in named.items() if x is not None})
    return results


def assert_same(logits, drafts=None, num_drafts=None, **settings):
    """Triton gives what the eager backend gives. Returns it."""
    arguments = planned(logits, drafts, num_drafts, **settings)
    got = on_triton(arguments)
    expected = eager.verify_drafts(*arguments)
    for name, mine, theirs in zip(_NAMES, got, expected, strict=True):
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine, theirs), f"{name}: {mine.tolist()}, the eager backend says {theirs.tolist()}"
    return expected
