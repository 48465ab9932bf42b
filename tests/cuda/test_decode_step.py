"""A whole decode step of examples/decode_step.py: against the reference, each op on one backend, text with and without drafts."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulated import needs_emulator

from gemma4_kernels import backends, use_backend
from gemma4_kernels.cuda_common import support
from gemma4_kernels.linear import cuda as linear_cuda

EXAMPLE = Path(__file__).parents[2] / "examples" / "decode_step.py"
OPS = {
    "quantized_embedding", "qkv_norm_rope_append", "k_eq_v_norm_rope_append", "flash_attn_kvcache", "k_eq_v_attention",
    "quantized_linear", "quantized_geglu", "sandwich_norm", "verify_drafts",
}  # fmt: skip
"""Of a step: all that is not PyTorch's own."""


@pytest.fixture(scope="module")
def example():
    """The example as a module, with a model of one layer of each kind."""
    spec = importlib.util.spec_from_file_location("decode_step", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    small = module.SMALL
    module.SMALL = replace(small, num_layers=2, pattern=("sliding", "full"), vocab_size=300)
    return module


@pytest.fixture(params=["eager", pytest.param("cuda", marks=needs_emulator)])
def backend(request, monkeypatch):
    monkeypatch.setenv("GEMMA4_EMULATE", "1")
    backends._select.cache_clear()
    backends._logged.clear()
    with use_backend(request.param):
        yield request.param
    backends._select.cache_clear()


def test_a_step_keeps_the_error_rule_and_its_rows_their_bits(example, backend):
    example.check(torch.device("cpu"), tokens=12, rows=4)
    served = backends.served()
    assert {taken for _, _, taken in served} == {backend}
    assert {op for op, _, _ in served} == OPS


@needs_emulator
@torch.no_grad()
def test_launches_of_a_step_are_counted(example, backend):
    """Two layers of 5 products, a prologue, attention and two norms; products and attention may take a second launch each."""
    step = example.DecodeStep(example.SMALL, batch=1, drafts=0, context=32, device=torch.device("cpu"))
    launches = example.compiled_launches_of(step)
    if backend == "eager":
        assert launches == 0
        return
    assert launches == example.compiled_launches_of(step)
    calls = sum(count for op, count in example.calls_of(step).items() if op != "PyTorch's own")
    assert calls <= launches <= 2 * calls + 4
    module = support.module_for(torch.device("cpu"))
    before = module.launches()
    weight = linear_cuda._fields(step.head, torch.device("cpu"))
    refused = module.EmbeddingArguments(
        weight=weight, m=1, ids=0, ids_are_64_bit=True, columns=0, out=0, out_stride=0, dtype=0
    )  # fmt: skip
    with pytest.raises(ValueError, match="gemma4_embedding: ids is null"):
        module.embedding(refused, 0)
    assert module.launches() == before


def text_of(step, first: int, count: int, drafts: torch.Tensor | None) -> list[int]:
    """Greedy text behind one token. With drafts, which continue the text or do not, as many tokens a step as are right."""
    text = [first]
    while len(text) <= count:
        step.tokens.fill_(0)
        step.tokens[0, 0] = text[-1]
        if drafts is not None:
            ahead = drafts[len(text) : len(text) + step.rows - 1]
            step.tokens[0, 1 : 1 + len(ahead)] = ahead
        step.lengths.fill_(len(text) - 1)
        step.run()
        text += [token for token in step.verified[0].tolist() if token >= 0]
    return text[: count + 1]


@torch.no_grad()
def test_greedy_text_with_drafts_is_the_text_without(example, backend):
    def step(drafts: int):
        made = example.DecodeStep(example.SMALL, batch=1, drafts=drafts, context=32, device=torch.device("cpu"))
        # Random weights would repeat one token for ever: its own embedding rules the hidden state, and the softcap makes large
        # logits equal.
        signs = torch.randn(made.final_norm.shape, generator=torch.Generator().manual_seed(3))
        made.final_norm.copy_(0.005 * signs)
        for layer in made.layers:
            layer.norms["post_attention"] *= 1 << 14
            layer.norms["post_feedforward"] *= 1 << 14
        return made

    plain = text_of(step(0), 100, 12, None)
    assert len(set(plain)) > 4, plain
    drafts = torch.tensor(plain)
    drafts[[4, 5, 9]] += 1  # some are wrong
    assert text_of(step(3), 100, 12, drafts % example.SMALL.vocab_size) == plain
