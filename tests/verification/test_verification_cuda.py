"""The compiled kernels of verification on the emulator: every bit of the eager backend, for every filter and method."""

from __future__ import annotations

import math

import pytest
import torch
from emulated import _emulate, needs_emulator  # noqa: F401
from verification_helpers import (
    FILTERS,
    assert_eager,
    assert_same,
    each,
    on_cuda,
    planned,
    randn,
    rows_of_logits,
    sampled_drafts,
    wanting,
)

from gemma4_kernels import BackendError, explain, sample_tokens, use_backend, verify_drafts
from gemma4_kernels.bench import validation
from gemma4_kernels.bench.verification_cases import verification_cases
from gemma4_kernels.geometry import GEMMA4_12B
from gemma4_kernels.verification import cuda, eager

pytestmark = needs_emulator
METHODS = ["match", "rejection", "block"]
INF = math.inf
COUNT = len(FILTERS)


def same(logits, drafts=None, num_drafts=None, **settings):
    return assert_same(logits, drafts, num_drafts, on=on_cuda, **settings)


# Rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "logits"), list(rows_of_logits(COUNT, 4500)), ids=lambda x: x if isinstance(x, str) else ""
)
def test_mixed_requests_sample_what_the_eager_backend_samples(name, logits):
    same(logits, seeds=torch.arange(COUNT), positions=2**33 + 1, **each(*FILTERS))


@pytest.mark.parametrize("size", [1, 2, 5, 7, 8, 63, 127, 129, 2047, 2048, 2049, 4097, 6145])
def test_sizes_around_those_of_tiles_and_groups(size):
    logits = randn(COUNT, size, seed=size)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        same(logits.to(dtype), seeds=torch.arange(COUNT) - 5, positions=size, **each(*FILTERS))


def test_a_vocabulary_too_large_for_lists():
    filters = each({"top_k": 5}, {"top_k": 5, "top_p": 0.5}, {"top_p": 0.9})
    same(randn(3, 2**20 + 9), seeds=torch.arange(3), **filters)


def test_logits_that_crowd_the_list_of_one_tile():
    """Runs of 128 neighbours share a tile: more of the largest than it lists, equal or not."""
    for step in (0.0, 2.0**-6):
        logits = randn(6, 5000) - 20
        logits[:, 256:384] = 10 - step * torch.arange(128)
        filters = each(*({"top_k": k, "top_p": p} for k in (20, 64, 100) for p in (1.0, 0.6)))
        same(logits, seeds=torch.arange(6), **filters)


def test_what_one_filter_leaves_above_a_sample_that_it_removes():
    """Of flat rows the sample is often removed, and more lies above it than lists hold; of steep ones less."""
    for scale in (0.1, 0.7, 3.0):
        names = (
            {"top_p": 0.5},
            {"top_p": 0.9, "min_p": 0.3},
            {"top_k": 600},
            {"top_k": 600, "min_p": 0.2},
            {"top_p": 0.02},
        )
        filters = each(*names, *names, *names)
        same(scale * randn(15, 4300), seeds=torch.arange(15), **filters)


@pytest.mark.parametrize("count", [4, 10])
def test_top_p_at_a_boundary_drops_the_lowest_of_equal_tokens(count):
    """Multiples of 1/4 and 1/10 of equal tokens, over several tiles; each with its neighbours in fp32."""
    logits = torch.full((3 * (count - 1), 2700), -INF)
    logits[:, torch.arange(count) * 269] = 1.25
    shares = torch.arange(1, count) / count
    nearby = torch.stack((shares.nextafter(torch.tensor(0.0)), shares, shares.nextafter(torch.tensor(1.0))))
    for top_k in (0, 64):
        same(logits, top_p=nearby.T.flatten(), top_k=top_k, seeds=torch.arange(len(logits)))


def test_a_temperature_that_leads_out_of_range():
    same(torch.tensor([[-3e38, -3e38, -3e38], [3e38, 1.0, 3e38], [0.0, 3e38, -3e38]]), temperature=1e-30)


def test_seeds_positions_and_streams_of_every_size():
    seeds = torch.tensor([0, -1, 2**62, -(2**63), 2**63 - 1, 12345])
    positions = torch.tensor([0, 2**32 - 1, 2**32, 2**62, 7, 2**40])
    for stream in (0, 3):
        same(randn(6, 2100), seeds=seeds, positions=positions, stream=stream)


# Whole calls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", range(8))
def test_random_calls(method, number):
    """Whatever comes: filters, ties, drafts, lengths, ends, budgets, dtypes."""
    rng = torch.Generator().manual_seed(100 * number + len(method))

    def one_of(*values):
        return values[int(torch.randint(len(values), (), generator=rng))]

    batch, k, size = 5, one_of(0, 1, 2, 4), int(torch.randint(1, 3000, (), generator=rng))
    logits = randn(batch, k + 1, size, seed=number) * one_of(0.3, 1.0, 4.0)
    if one_of(True, False):
        logits = (logits * 2).round() / 2
    dtype = one_of(torch.float32, torch.bfloat16, torch.float16)
    requests = [
        {
            "temperature": one_of(0.0, 0.5, 1.0, 3.0), "top_k": one_of(0, 0, 1, 3, 9, 64, 70, 600, 800),
            "top_p": one_of(1.0, 1.0, 0.95, 0.6, 0.1), "min_p": one_of(0.0, 0.0, 0.05, 0.5),
            "softcap": one_of(0.0, 0.0, 2.0),
        }
        for _ in range(batch)
    ]  # fmt: skip
    settings = {**each(*requests), "seeds": torch.arange(batch) + number, "positions": torch.arange(batch)}
    draft_logits = logits[:, :k] + 0.5 * randn(batch, k, size, seed=9)
    drafts = torch.empty(batch, 0, dtype=torch.int64)
    if k:
        drafts = logits[:, :k].argmax(-1) if one_of(True, False) else sampled_drafts(draft_logits, **settings)
    told = method != "match" and one_of(True, True, False)
    arguments = list(
        planned(
            logits.to(dtype), drafts, torch.randint(0, k + 1, (batch,), generator=rng), method=method,
            draft_logits=draft_logits.to(one_of(dtype, torch.float32)) if told else None,
            eos_token_ids=one_of((), tuple(range(0, size, 7))[:64]),
            max_new_tokens=one_of(None, torch.randint(0, 6, (batch,), generator=rng)), **settings,
        )
    )  # fmt: skip
    arguments[1] = drafts + torch.randint(0, 9, drafts.shape, generator=rng).eq(0) * one_of(size, -(2**40))
    assert_eager(arguments, on_cuda)


def test_drafts_are_kept_while_they_are_the_samples():
    logits, seeds = randn(6, 4, 150), torch.arange(6)
    settings = each(*(FILTERS[index] for index in (0, 1, 4, 6, 9, 10)))
    with use_backend("eager"):
        samples = torch.stack(
            [sample_tokens(logits[:, row], seeds=seeds, positions=5 + row, **settings) for row in range(4)], dim=1
        )
    drafts = samples[:, :3].clone()
    drafts[0, 1], drafts[2, 0], drafts[3, 2] = -1, 150, 2**40
    num_drafts = torch.tensor([3, 2, 1, 3, 0, 1], dtype=torch.int32)
    arguments = list(planned(logits, samples[:, :3], num_drafts, seeds=seeds, **settings))
    # Behind them stands junk, or what would have been right.
    behind = torch.where(torch.arange(6)[:, None] % 2 == 1, samples[:, :3], -(2**62))
    arguments[1] = torch.where(torch.arange(3) < num_drafts[:, None], drafts, behind)
    assert assert_eager(arguments, on_cuda)[1].tolist() == [1, 2, 0, 2, 0, 1]
    # On a device nobody looks at num_drafts before the kernel: out of range, it means the nearest that is possible.
    arguments[2] = torch.tensor([99, -5, 2**40, 3, -(2**62), 1])
    assert_eager(arguments, on_cuda)


@pytest.mark.parametrize("method", METHODS)
def test_ends_of_text_and_budgets(method):
    logits = wanting(1, 2, 9, 4).expand(7, -1, -1)
    drafts = torch.tensor([[1, 2, 9], [1, 9, 3], [9, 9, 9], [1, 2, 9], [1, 2, 9], [1, 2, 9], [1, 2, 3]])
    settings = {"temperature": 0.0, "method": method}
    same(logits[:2], drafts[:2], eos_token_ids=(1,), **settings)
    budgets = torch.tensor([4, 9, 2**40, 0, 1, 3, 4])
    for ends in ((2**40,), (9, 4)):
        same(logits, drafts, max_new_tokens=budgets, eos_token_ids=ends, **settings)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_without_a_distribution_is_refused_and_what_follows_the_drafts_is_not_read(method):
    logits = randn(9, 3, 2130)
    drafts = logits.argmax(-1)[:, :2]
    lengths = torch.tensor([2, 2, 2, 2, 1, 0, 2, 2, 2])
    logits[0, 0, 2129] = torch.nan
    logits[1, 2, 7] = INF
    logits[2, 1] = -INF
    logits[3, 1, 64] = -torch.nan
    logits[4, 2] = torch.nan  # behind its drafts
    logits[5, 1:] = INF
    logits[6, 0, 3], logits[6, 0, 4] = INF, torch.nan
    settings = each({}, {"top_k": 3}, {"top_p": 0.5}, {"softcap": 3.0}, {"top_k": 9, "top_p": 0.5}, *([{}] * 4))
    settings["temperature"] = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 1, 1])
    result = same(logits, drafts, lengths, method=method, **settings)
    assert result[6].tolist() == [True, True, True, True, False, False, True, False, False]


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_a_drafter_without_a_distribution_is_refused(method):
    logits, draft_logits = randn(4, 3, 90), randn(4, 2, 90)
    draft_logits[1, 1, 4], draft_logits[2, 0], draft_logits[3, 1] = torch.nan, -INF, torch.nan
    lengths = torch.tensor([2, 2, 1, 1])
    result = same(logits, draft_logits.argmax(-1), lengths, method=method, draft_logits=draft_logits)
    assert result[6].tolist() == [False, True, True, False]


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_sampled_drafts_over_several_segments(method):
    logits, seeds = randn(6, 3, 9001), torch.arange(6)
    draft_logits = logits[:, :2] + 0.3 * randn(6, 2, 9001, seed=7)
    settings = each(
        {}, {"top_k": 64, "top_p": 0.95}, {"top_p": 0.9}, {"min_p": 0.05}, {"temperature": 0.7}, {"top_k": 700}
    )
    drafts = sampled_drafts(draft_logits, seeds, **settings)
    result = same(logits, drafts, method=method, draft_logits=draft_logits, seeds=seeds, **settings)
    assert 0 < int(result[1].sum()) < 12  # both answers happen


# Bits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strides_and_dtypes_of_views(method, dtype):
    """Rows that begin at any element, negative and zero strides between them."""
    wide = randn(3, 7, 2330).to(dtype)
    for logits in (
        wide[:, 1:4, 11:2312],
        wide[:, 1:4, 8:2312],
        wide[:, ::3, 1:2305],
        wide[:, :1, 8:72].expand(3, 3, 64),
    ):
        drafts = logits.argmax(-1)[:, :2].int()
        settings = {"method": method, "seeds": torch.arange(6)[::2], "top_k": torch.tensor([3, 0, 90]).int()}
        got = same(logits, drafts.mT.contiguous().mT, **settings)
        again = same(logits.float().contiguous(), drafts.long(), **settings)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_tokens_do_not_depend_on_the_batch(method):
    logits, draft_logits = randn(4, 3, 2150), randn(4, 2, 2150, seed=1)
    tensors = {
        **each(*(FILTERS[index] for index in (6, 4, 9, 8))), "seeds": torch.arange(4) - 3, "positions": torch.arange(4),
    }  # fmt: skip
    if method != "match":
        tensors["draft_logits"] = draft_logits
    drafts = draft_logits.argmax(-1)

    def run(which):
        return on_cuda(
            planned(logits[which], drafts[which], method=method, **{n: x[which] for n, x in tensors.items()})
        )

    whole, order = run(torch.arange(4)), torch.tensor([2, 0, 3, 1])
    assert all(torch.equal(a, b[order]) for a, b in zip(run(order), whole, strict=True))
    assert all(torch.equal(a[0], b[1]) for a, b in zip(run(torch.tensor([1])), whole, strict=True))


def test_a_row_samples_alone_what_it_samples_among_drafts():
    logits, seeds = randn(3, 4, 2500), torch.arange(3)
    filters = each({"top_p": 0.8}, {"top_k": 9}, {"min_p": 0.1})
    drafts = torch.zeros(3, 3, dtype=torch.int64)
    for row in range(4):
        alone = on_cuda(planned(logits[:, row], seeds=seeds, positions=7 + row, **filters))[2]
        among = on_cuda(planned(logits, drafts, seeds=seeds, positions=7, **filters))[0][:, row]
        assert torch.equal(alone, among)
        if row < 3:
            drafts[:, row] = alone


# The list of cases --------------------------------------------------------------------------------------------------

# Every third of the small ones, from the second on, has every feature: a test below. Of the vocabulary of Gemma one.
CASES = [case for case in verification_cases() if case.v < 6000][1::3]
LARGE_CASES = [case for case in verification_cases() if case.v == GEMMA4_12B.vocab_size and case.k == 0]


@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES[:1]], ids=str)
def test_a_case_has_the_references_tokens(case):
    (check,) = validation.check_case(case, ["cuda"], torch.device("cpu"))
    assert check.status == "held", check.reasons


def test_the_cases_run_here_have_every_feature():
    for field, wanted in {
        "method": set(METHODS), "dtype": {"bf16", "fp16", "fp32"}, "stream": {"target", "draft"}, "mixed": {0, 1},
        "ragged": {0, 1}, "eos": {0, 1}, "strided": {0, 1}, "sure": {0, 1}, "op": {"verify_drafts", "sample_tokens"},
    }.items():  # fmt: skip
        assert {getattr(case, field) for case in CASES} >= wanted, field
    for name, unset in {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "softcap": 0}.items():
        assert any(getattr(case, name) != unset for case in CASES), name


# The backend --------------------------------------------------------------------------------------------------------


def test_public_functions_reach_it_by_name():
    logits, drafts = randn(2, 3, 90), torch.zeros(2, 2, dtype=torch.int64)
    arguments = {"seeds": 4, "positions": 1, "top_k": 9, "top_p": 0.9}
    assert explain("verify_drafts", logits=logits, draft_tokens=drafts).taken == "cuda"
    got = verify_drafts(logits, drafts, **arguments), sample_tokens(logits[:, 0], stream="draft", **arguments)
    with use_backend("eager"):
        expected = verify_drafts(logits, drafts, **arguments), sample_tokens(logits[:, 0], stream="draft", **arguments)
    assert all(torch.equal(a, b) for a, b in zip(got[0], expected[0], strict=True))
    assert torch.equal(got[1], expected[1])


def test_what_it_does_not_do_is_said():
    logits, drafts = randn(2, 3, 90), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(BackendError, match="float64"):
        verify_drafts(logits.double(), drafts)
    with pytest.raises(BackendError, match="does not support draft_logits in fp64"):
        verify_drafts(logits, drafts, method="block", draft_logits=logits[:, :2].double())
    verify_drafts(logits, drafts, eos_token_ids=range(cuda.MOST_ENDS))
    with pytest.raises(BackendError, match="does not support more than 64 eos_token_ids"):
        verify_drafts(logits, drafts, eos_token_ids=range(cuda.MOST_ENDS + 1))


@pytest.mark.parametrize("method", METHODS)
def test_no_requests_and_no_drafts(method):
    arguments = planned(torch.zeros(0, 3, 5), torch.zeros(0, 2, dtype=torch.int64), method=method)
    assert cuda.verify_drafts(*arguments)[0].shape == (0, 3)
    assert_eager(planned(randn(3, 1, 40), torch.zeros(3, 0, dtype=torch.int64), method=method), on_cuda)
    assert eager.METHODS.keys() == cuda._METHODS.keys()
