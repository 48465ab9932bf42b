"""The op as PyTorch sees it, `explain`, and the choice of a backend."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemma4_kernels import BackendError, explain, sample_tokens, use_backend, verify_drafts
from gemma4_kernels.verification import api, eager, ops


def inputs(batch=3, k=4, vocab_size=50):
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(batch, k + 1, vocab_size, generator=rng)
    return logits, torch.randint(0, vocab_size, (batch, k), generator=rng)


@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize("k", [0, 4])
def test_opcheck(method, k):
    logits, drafts = inputs(k=k)
    draft_logits = None if method == "match" else torch.randn(3, k, 50)
    arguments = api._plan(
        "verify_drafts", logits, drafts, torch.tensor([k, 0, k // 2]), 1.0, 5, torch.tensor([1.0, 0.9, 0.5]), 0.0, 0.0,
        7, torch.arange(3), method, draft_logits, (3, 5), torch.tensor([9, 1, 2]), 0,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.gemma4_kernels.verify_drafts.default, arguments)


def test_compile_without_a_graph_break():
    def step(logits, drafts, seeds, positions, temperature, top_p):
        result = verify_drafts(
            logits, drafts, seeds=seeds, positions=positions, temperature=temperature, top_k=9, top_p=top_p,
            eos_token_ids=(1, 2), max_new_tokens=3,
        )  # fmt: skip
        following = sample_tokens(logits[:, 0], temperature=0.7, seeds=3, positions=positions + result.num_emitted)
        return *result, following

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch, temperature, top_p in ((2, 1.0, 0.95), (3, 0.5, 0.9), (5, 0.25, 0.8)):
        logits, drafts = inputs(batch)
        arguments = (logits, drafts, torch.arange(batch), torch.arange(batch) + 4, temperature, top_p)
        for got, expected in zip(compiled(*arguments), step(*arguments), strict=True):
            assert torch.equal(got, expected)


def test_default_seeds_compile():
    compiled = torch.compile(lambda x: sample_tokens(x, top_k=5), fullgraph=True, backend="aot_eager")
    assert compiled(torch.randn(4, 30)).shape == (4,)


def test_a_device_other_than_the_cpu_is_never_waited_for():
    """Tensors of the meta device hold no numbers, so anything that would read one raises."""
    logits, drafts = (x.to("meta") for x in inputs())
    each = {name: torch.zeros(3, device="meta") for name in ("temperature", "top_p", "min_p", "softcap")}
    for method in ops.METHODS:
        draft_logits = None if method == "match" else logits[:, :4]
        plan = api._plan(
            "verify_drafts", logits, drafts, drafts[:, 0], *(each["temperature"], 3, each["top_p"], each["min_p"]),
            each["softcap"], 7, 0, method, draft_logits, (3, 5), None, 0,
        )  # fmt: skip
        out = eager.verify_drafts(*plan)
        assert [x.device.type for x in out] == ["meta"] * 7
        assert out[0].shape == (3, 5)


def test_explain_knows_both_functions():
    logits, drafts = inputs()
    before = torch.get_rng_state()
    assert explain("verify_drafts", logits=logits, draft_tokens=drafts, top_k=3, method="block").taken == "eager"
    assert explain("sample_tokens", logits=logits[:, 0], temperature=0.0).taken == "eager"
    assert torch.equal(torch.get_rng_state(), before)


def test_a_backend_asked_for_by_name_is_not_replaced():
    with use_backend("cuda"), pytest.raises(BackendError, match="cuda"):
        sample_tokens(torch.zeros(1, 5))


def test_autocast_and_gradients_change_nothing():
    logits, drafts = inputs()
    expected = verify_drafts(logits, drafts, seeds=1, positions=0)
    with torch.autocast("cpu", torch.bfloat16):
        got = verify_drafts(logits.requires_grad_(), drafts, seeds=1, positions=0)
    assert torch.equal(got.tokens, expected.tokens)
    assert not got.tokens.requires_grad


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made that is not a view of `inputs`."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in inputs}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, leaf.numel())
        return out


@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize("filters", [{}, {"top_k": 64, "top_p": 0.95}, {"top_p": 0.9}, {"softcap": 30.0}], ids=str)
def test_memory_is_that_of_one_chunk(method, filters):
    logits = torch.randn(3, 3, 100_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    draft_logits = None if method == "match" else logits[:, :2]
    drafts = logits[:, :2].argmax(-1)
    settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "softcap": 0.0, **filters}
    plan = api._plan(
        "verify_drafts", logits, drafts, None, 1.0, **settings, seeds=7, positions=0, method=method,
        draft_logits=draft_logits, eos_token_ids=(), max_new_tokens=None, stream=0,
    )  # fmt: skip
    with Largest(logits) as made:
        eager.verify_drafts(*plan)
    assert made.elements <= eager.CHUNK_ELEMENTS
