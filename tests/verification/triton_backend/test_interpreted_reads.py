"""How often the Triton backend reads a row of logits: counted, load by load, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from verification_helpers import planned, randn, small_programs

from gemma4_kernels import environment

pytest.importorskip("triton")
if not environment.triton_interprets():
    pytest.skip("needs TRITON_INTERPRET=1; `make test` runs it in a second process", allow_module_level=True)

from triton.runtime.interpreter import InterpreterBuilder

from gemma4_kernels.bench.verification_kernels import READS
from gemma4_kernels.verification.triton import backend


@pytest.fixture
def reads(monkeypatch):
    """A function: how often the elements of logits (B, V) are loaded, over their number, when these filters sample."""
    loaded = []
    original = InterpreterBuilder.create_masked_load

    def counting(builder, pointers, mask, *arguments):
        loaded.append(pointers.data[mask.data.astype(bool)])
        return original(builder, pointers, mask, *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting)

    def count(logits, **settings):
        arguments = planned(logits, **settings)
        loaded.clear()
        backend.verify_drafts(*arguments)
        first = logits.data_ptr()
        last = first + logits.numel() * logits.element_size()
        elements = sum(int(((x >= first) & (x < last)).sum()) for x in loaded)
        return elements / logits.numel()

    return count


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("greedy", {"temperature": 0.0}, 1),
        ("sample", {}, 1),
        ("sample", {"temperature": 0.7, "softcap": 30.0}, 1),
        ("lists", {"top_k": 64}, 1),
        ("lists", {"top_k": 64, "top_p": 0.95, "temperature": 1.5}, 1),
        ("lists", {"top_k": 1, "min_p": 0.1}, 1),
        ("min_p", {"min_p": 1e-9}, 1),
        ("min_p", {"min_p": 1.0}, 2),
        ("top_p", {"top_p": 0.95}, 2),
        ("top_k", {"top_k": 65}, 2),
        ("top_k", {"top_k": 1000}, 2),
    ],
)
def test_usual_logits_are_read_as_often_as_is_said(kind, settings, expected, reads):
    """With the sizes that cards run: nine tiles."""
    got = reads(3 * randn(1, 18000, seed=2).bfloat16(), **settings)
    assert READS[kind].least <= expected <= READS[kind].most
    # One logit, of the sample, may be looked up again.
    assert expected <= got <= expected + 1 / 18000


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("lists", {"top_k": 2}),
        ("lists", {"top_k": 5, "top_p": 0.5}),
        ("min_p", {"min_p": 0.9}),
        ("top_p", {"top_p": 0.5}),
        ("top_k", {"top_k": 100}),
        ("top_k and top_p", {"top_k": 100, "top_p": 0.4}),
    ],
    ids=str,
)
@pytest.mark.parametrize("logits", ["equal", "flat", "two levels"])
def test_awkward_logits_stay_below_the_most(kind, settings, logits, reads, monkeypatch):
    """More ties than a list holds, and more survivors than the scratch list."""
    small_programs(monkeypatch)
    rows = {
        "equal": torch.full((2, 500), 0.5), "flat": 0.01 * randn(2, 500),
        "two levels": torch.where(torch.rand(2, 500, generator=torch.Generator().manual_seed(0)) < 0.4, 2.0, -1.0),
    }[logits]  # fmt: skip
    got = reads(rows, seeds=torch.tensor([1, 2]), **settings)
    assert READS[kind].least <= got <= READS[kind].most
