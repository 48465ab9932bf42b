"""The compiled verification on the GPU that is there: the eager backend's bits over the whole vocabulary; streams, graphs."""

from __future__ import annotations

import pytest
import torch
from on_gpu import _cuda_backend, captured, needs_gpu, on_another_stream, same_bits  # noqa: F401
from verification_helpers import _NAMES, FILTERS, each, planned, randn, rows_of_logits, sampled_drafts

from gemma4_kernels import sample_tokens, use_backend, verify_drafts
from gemma4_kernels.geometry import GEMMA4_12B
from gemma4_kernels.verification import cuda, eager

pytestmark = needs_gpu

DEVICE = "cuda"
VOCABULARY = GEMMA4_12B.vocab_size
COUNT = len(FILTERS)
METHODS = ["match", "rejection", "block"]


def moved(arguments):
    return tuple(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments)


def assert_eager(arguments) -> None:
    """The eager backend computes on the CPU: its bits are the same everywhere."""
    got, expected = cuda.verify_drafts(*moved(arguments)), eager.verify_drafts(*arguments)
    for name, mine, theirs in zip(_NAMES, got, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs), f"{name}: {mine.tolist()}, the eager backend says {theirs.tolist()}"


def drafts_of(method: str, rows: int, size: int, dtype: torch.dtype):
    """Arguments of a call with COUNT requests, each with filters of its own and drafts of which some are taken."""
    logits = randn(COUNT, rows + 1, size).to(dtype)
    settings = {"seeds": torch.arange(COUNT), **each(*FILTERS)}
    with use_backend("eager"):
        if method == "match":
            drawn = [sample_tokens(logits[:, row], positions=5 + row, **settings) for row in range(rows)]
            drafts = torch.stack(drawn, dim=1)
            drafts[::3, -1] = 0
        else:
            settings["draft_logits"] = (logits[:, :rows].float() + 0.3 * randn(COUNT, rows, size, seed=1)).to(dtype)
            drafts = sampled_drafts(**settings)
    return planned(logits, drafts, torch.arange(COUNT) % (rows + 1), method=method, eos_token_ids=(1, 106), **settings)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_drafts_over_the_whole_vocabulary(dtype, method):
    assert_eager(drafts_of(method, 2, VOCABULARY, dtype))


@pytest.mark.parametrize(
    ("name", "logits"), list(rows_of_logits(COUNT, 4500)), ids=lambda x: x if isinstance(x, str) else ""
)
def test_awkward_rows(name, logits):
    assert_eager(planned(logits, seeds=torch.arange(COUNT), positions=2**33 + 1, **each(*FILTERS)))


def step(logits: torch.Tensor, drafts: torch.Tensor):
    """A verification and a sample, by the public functions; whatever is not a number is on the device already."""
    filters = {name: value.to(DEVICE) for name, value in each(*FILTERS[:4]).items()}
    filters |= {"seeds": torch.arange(4, device=DEVICE), "positions": torch.full((4,), 2**33, device=DEVICE)}

    def run():
        result = verify_drafts(logits, drafts, **filters)
        return result.tokens, result.num_accepted, sample_tokens(logits[:, 0], **filters)

    return run


def drawn_step():
    logits = randn(4, 5, VOCABULARY).bfloat16().to(DEVICE)
    return logits, step(logits, logits[:, :4].argmax(-1))


def test_another_stream():
    _, run = drawn_step()
    expected = run()
    assert same_bits(on_another_stream(run), expected)


def test_a_captured_graph_reads_what_is_there_at_its_replay():
    logits, run = drawn_step()
    results, graph = captured(run)
    for seed in (5, 6):
        logits.copy_(randn(4, 5, VOCABULARY, seed=seed))
        graph.replay()
        assert same_bits(results, run())
