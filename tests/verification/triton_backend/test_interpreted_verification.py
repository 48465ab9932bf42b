"""Sampling and matching in Triton's interpreter: the tokens of the eager backend, for every filter and awkward row."""

from __future__ import annotations

import math

import pytest
import torch
from verification_helpers import (
    FILTERS,
    assert_same,
    each,
    on_triton,
    planned,
    randn,
    rows_of_logits,
    sampled_drafts,
    small_programs,
    wanting,
)

from gemma4_kernels import BackendError, environment, explain, sample_tokens, use_backend, verify_drafts
from gemma4_kernels.bench.guards import same_bits
from gemma4_kernels.verification import eager, noise, portable_math

pytest.importorskip("triton")
if not environment.triton_interprets():
    pytest.skip("needs TRITON_INTERPRET=1; `make test` runs it in a second process", allow_module_level=True)

import triton
import triton.language as tl

from gemma4_kernels.verification.triton import backend, tables
from gemma4_kernels.verification.triton import portable_math as triton_math

INF = math.inf


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_programs(monkeypatch)


# Functions and noise --------------------------------------------------------------------------------------------------


@triton.jit
def functions_kernel(x_ptr, exp_ptr, log_ptr, tanh_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(x_ptr + index)
    tl.store(exp_ptr + index, triton_math.exp(x))
    tl.store(log_ptr + index, triton_math.log(tl.abs(x) + 1e-30))
    tl.store(tanh_ptr + index, triton_math.tanh(x))


@triton.jit
def noise_kernel(words_ptr, uniform_ptr, exponential_ptr, gumbel_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    word = tl.load(words_ptr + index).to(tl.uint32)
    tl.store(uniform_ptr + index, triton_math.uniform(word))
    tl.store(exponential_ptr + index, triton_math.exponential(word))
    tl.store(gumbel_ptr + index, triton_math.gumbel(word))


@triton.jit
def words_kernel(four_ptr, one_ptr, seed_ptr, position_ptr, first, stream, SIZE: tl.constexpr):
    block = first // 4 + tl.arange(0, SIZE // 4)
    token = block[:, None] * 4 + tl.arange(0, 4)[None, :]
    seed, position = tl.load(seed_ptr), tl.load(position_ptr)
    tl.store(four_ptr + token - first, triton_math.words_of_blocks(block, seed, position, stream).to(tl.int64))
    tl.store(one_ptr + token - first, triton_math.words_of(token, seed, position, stream).to(tl.int64))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_exp_log_and_tanh_have_the_bits_of_the_eager_backend():
    spread = torch.linspace(-90, 88, 2**16)
    x = torch.cat((spread, randn(2**14), 1e-3 * randn(2**14), spread[: 2**15] * 1e30))
    x[:4] = torch.tensor([-INF, 0.0, -0.0, INF])
    got = [torch.full_like(x, 7.0) for _ in range(3)]
    functions_kernel[(1,)](x, *got, len(x), enable_fp_fusion=False)
    bounded = x.clamp(max=88)
    assert same_bits(got[0][x <= 88], portable_math.exp(bounded)[x <= 88])
    finite = x.abs() < INF
    assert same_bits(got[1][finite], portable_math.log(x.abs() + 1e-30)[finite])
    assert same_bits(got[2], portable_math.tanh(x))


def test_noise_has_the_bits_of_the_eager_backend():
    near = [2**power - 2000 + torch.arange(4000) for power in range(12, 33)]
    words = torch.cat(
        (*near, *(2**32 - part for part in near), torch.randint(0, 2**32, (2**18,)), torch.arange(2000))
    ).clamp(0, 2**32 - 1)[: 2**18]
    got = [torch.empty(len(words)) for _ in range(3)]
    noise_kernel[(1,)](words, *got, len(words), enable_fp_fusion=False)
    for mine, function in zip(got, (noise.uniform, noise.exponential, noise.gumbel), strict=True):
        assert same_bits(mine, function(words))


@pytest.mark.parametrize(("seed", "position", "stream"), [(-(2**62) + 12345, 2**33 + 7, 3), (7, 0, 0), (2**40, 9, 1)])
def test_words_are_those_of_the_eager_backend(seed, position, stream):
    four, one = torch.empty(2, 1024, dtype=torch.int64)
    seeds, positions = torch.tensor([seed]), torch.tensor([position])
    words_kernel[(1,)](four, one, seeds, positions, 2**24 - 1024, stream, 1024)
    expected = noise.words_of(seeds, positions, torch.arange(2**24 - 1024, 2**24)[None], stream)[0]
    assert torch.equal(four, expected)
    assert torch.equal(one, expected)


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "logits"), list(rows_of_logits(len(FILTERS), 300)), ids=lambda x: x if isinstance(x, str) else ""
)
def test_mixed_requests_sample_what_the_eager_backend_samples(name, logits):
    assert_same(logits, seeds=torch.arange(len(logits)), positions=2**33 + 1, **each(*FILTERS))


@pytest.mark.parametrize("size", [1, 5, 127, 128, 129, 1025])
def test_a_vocabulary_of_any_size(size):
    chosen = [FILTERS[index] for index in (4, 6, 9, 11)]
    assert_same(randn(4, size, seed=size), seeds=torch.arange(4), **each(*chosen))


@pytest.mark.parametrize("size", [3000, 5003])
def test_programs_of_the_size_that_cards_run(size, monkeypatch):
    monkeypatch.undo()
    assert tables.TILE == 2048
    chosen = [FILTERS[index] for index in (0, 4, 5, 7, 9, 11)]
    assert_same(3 * randn(6, size).bfloat16(), seeds=torch.arange(6), **each(*chosen))


@pytest.mark.parametrize("distinct", [True, False], ids=["distinct", "ties"])
def test_top_k_around_the_longest_of_the_lists(distinct, monkeypatch):
    small_programs(monkeypatch, SCRATCH=128, LIST=32)
    logits = randn(5, 250, seed=4)
    if not distinct:
        logits = logits.round()
    assert_same(logits, top_k=torch.tensor([1, 63, 64, 65, 1000]), seeds=torch.arange(5), temperature=4.0)


def test_ties_at_the_last_place_of_top_k_all_stay():
    """All of one tile, one of each tile, more than a list holds, more than the scratch list holds."""
    logits = torch.full((7, 300), -20.0) + 1e-3 * randn(7, 300)
    logits[:, 150] = 1.0
    in_a_tile = [
        token for chunk in range(0, 300, 48) for token in range(chunk, chunk + 12)
    ]  # three tiles, chunks of 16
    and_others = [*in_a_tile, 16, 17, 32, 33]  # which are listed, as many as top-k wants
    places = [
        in_a_tile[:3], in_a_tile[:5], in_a_tile, and_others, range(0, 300, 61), range(0, 300, 2), range(10, 80)
    ]  # fmt: skip
    for row, place in zip(logits, places, strict=True):
        row[list(place)] = 1.0
    for top_k in (2, 4):
        result = assert_same(logits, top_k=top_k, seeds=torch.arange(7))
        assert all(
            int(token) in {150, *place} for token, place in zip(result[2], places, strict=True) if len(place) > 3
        )


def test_the_first_token_stays_where_it_ties_at_the_last_place():
    """Longer than a list holds, then top-p: token 0 has the lowest place of all that tie."""
    row = torch.full((300,), -20.0)
    row[1:80] = 1.0 + torch.arange(79) / 100
    row[[0, 200]] = 0.9
    filters = {"top_k": 80, "top_p": 0.999, "temperature": 8.0}
    with use_backend("eager"):
        drawn = sample_tokens(row.expand(2000, 300), seeds=torch.arange(2000), positions=0, **filters)
    seeds = (drawn == 0).nonzero().flatten()[:8]  # for which token 0 is the sample
    assert len(seeds) == 8
    assert_same(row.expand(8, 300), seeds=seeds, positions=0, **filters)


@pytest.mark.parametrize("count", [4, 10])
def test_top_p_at_a_boundary_drops_the_lowest_of_equal_tokens(count):
    """Multiples of 1/4 and 1/10 of equal tokens, over several tiles; each with its neighbours in fp32."""
    logits = torch.full((3 * (count - 1), 200), -INF)
    logits[:, torch.arange(count) * 19] = 1.25
    shares = torch.arange(1, count).repeat_interleave(3) / count
    nearby = torch.stack((shares.nextafter(torch.tensor(0.0)), shares, shares.nextafter(torch.tensor(1.0))))[
        :, ::3
    ].T.flatten()
    result = assert_same(logits, top_p=nearby, seeds=torch.arange(len(logits)))
    kept = torch.arange(1, count).repeat_interleave(3)
    assert bool((result[2] >= 19 * (count - kept - 1)).all())


def test_random_calls():
    """Whatever comes: filters, ties, sizes of programs."""
    rng = torch.Generator().manual_seed(11)

    def one_of(*values):
        return values[int(torch.randint(len(values), (), generator=rng))]

    for call in range(5):
        size = int(torch.randint(1, 400, (), generator=rng))
        logits = randn(6, size, seed=call) * one_of(0.3, 1.0, 4.0)
        if one_of(True, False):
            logits = (logits * 2).round() / 2
        requests = [
            {
                "temperature": one_of(0.0, 0.5, 1.0, 3.0), "top_k": one_of(0, 0, 1, 3, 9, 40, 64, 70, 200),
                "top_p": one_of(1.0, 1.0, 0.95, 0.6, 0.1), "min_p": one_of(0.0, 0.0, 0.05, 0.5),
                "softcap": one_of(0.0, 0.0, 2.0),
            }
            for _ in range(6)
        ]  # fmt: skip
        assert_same(logits, seeds=torch.arange(6) + call, positions=torch.arange(6), **each(*requests))


def test_a_temperature_that_leads_out_of_range():
    logits = torch.tensor([[-3e38, -3e38, -3e38], [3e38, 1.0, 3e38], [0.0, 3e38, -3e38]])
    assert_same(logits, temperature=1e-30)


# Drafts ---------------------------------------------------------------------------------------------------------------


def test_drafts_are_kept_while_they_are_the_samples():
    logits, seeds = randn(6, 4, 150), torch.arange(6)
    settings = each(*(FILTERS[index] for index in (0, 1, 4, 6, 9, 10)))
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
    expected = eager.verify_drafts(*arguments)
    assert expected[1].tolist() == [1, 2, 0, 2, 0, 1]
    assert all(torch.equal(a, b) for a, b in zip(on_triton(arguments), expected, strict=True))
    # On a device nobody looks at num_drafts before the kernel: out of range, it means the nearest that is possible.
    arguments = list(planned(logits, samples[:, :3], None, seeds=seeds, **settings))
    expected = on_triton(arguments)
    arguments[2] = torch.full((6,), 99)
    assert all(torch.equal(a, b) for a, b in zip(on_triton(arguments), expected, strict=True))


@pytest.mark.parametrize("method", ["match", "rejection", "block"])
def test_ends_of_text_and_budgets(method):
    logits = wanting(1, 2, 9, 4).expand(7, -1, -1)
    drafts = torch.tensor([[1, 2, 9], [1, 9, 3], [9, 9, 9], [1, 2, 9], [1, 2, 9], [1, 2, 9], [1, 2, 3]])
    settings = {"temperature": 0.0, "method": method}
    assert_same(logits[:2], drafts[:2], eos_token_ids=(1,), **settings)
    budgets = torch.tensor([4, 9, 2**40, 0, 1, 3, 4])
    for ends in ((2**40,), (9, 4)):
        assert_same(logits, drafts, max_new_tokens=budgets, eos_token_ids=ends, **settings)


@pytest.mark.parametrize("method", ["match", "rejection", "block"])
def test_a_row_without_a_distribution_is_refused_and_what_follows_the_drafts_is_not_read(method):
    logits = randn(9, 3, 130)
    drafts = logits.argmax(-1)[:, :2]
    lengths = torch.tensor([2, 2, 2, 2, 1, 0, 2, 2, 2])
    logits[0, 0, 129] = torch.nan
    logits[1, 2, 7] = INF
    logits[2, 1] = -INF
    logits[3, 1, 64] = -torch.nan
    logits[4, 2] = torch.nan  # behind its drafts
    logits[5, 1:] = INF
    logits[6, 0, 3], logits[6, 0, 4] = INF, torch.nan
    settings = each({}, {"top_k": 3}, {"top_p": 0.5}, {"softcap": 3.0}, {"top_k": 9, "top_p": 0.5}, *([{}] * 4))
    settings["temperature"] = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 1, 1])
    result = assert_same(logits, drafts, lengths, method=method, **settings)
    assert result[6].tolist() == [True, True, True, True, False, False, True, False, False]


@pytest.mark.parametrize("method", ["match", "rejection", "block"])
def test_strides_and_dtypes_of_views(method):
    wide = randn(3, 7, 330).bfloat16()
    logits = wide[:, 1:4, 11:312]
    drafts = logits.argmax(-1)[:, :2].int()
    settings = {"method": method, "seeds": torch.arange(6)[::2], "top_k": torch.tensor([3] * 3).int()}
    got = assert_same(logits, drafts.mT.contiguous().mT, **settings)
    again = assert_same(logits.float().contiguous(), drafts.long(), **settings)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("method", ["match", "rejection", "block"])
def test_tokens_do_not_depend_on_the_batch(method):
    logits, draft_logits = randn(4, 3, 150), randn(4, 2, 150, seed=1)
    tensors = {
        **each(*(FILTERS[index] for index in (6, 4, 9, 8))), "seeds": torch.arange(4) - 3, "positions": torch.arange(4),
    }  # fmt: skip
    if method != "match":
        tensors["draft_logits"] = draft_logits
    drafts = draft_logits.argmax(-1)

    def run(which):
        return on_triton(
            planned(logits[which], drafts[which], method=method, **{n: x[which] for n, x in tensors.items()})
        )

    whole, order = run(torch.arange(4)), torch.tensor([2, 0, 3, 1])
    assert all(torch.equal(a, b[order]) for a, b in zip(run(order), whole, strict=True))
    assert all(torch.equal(a[0], b[1]) for a, b in zip(run(torch.tensor([1])), whole, strict=True))


# Rejection and block --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rejection", "block"])
@pytest.mark.parametrize("told", ["told", "told in another dtype", "not told"])
def test_sampled_drafts_are_verified_as_the_eager_backend_verifies_them(method, told):
    accepted = torch.zeros(0, dtype=torch.int64)
    for part in (0, 1) if told == "told" else (1,):
        settings = each(*FILTERS[part::2][:6])
        seeds = torch.arange(6) + 10 * part
        logits = randn(6, 3, 200, seed=part)
        draft_logits = logits[:, :2] + 0.3 * randn(6, 2, 200, seed=7)
        if told == "told in another dtype":
            draft_logits = draft_logits.round().bfloat16()
        drafts = sampled_drafts(draft_logits, seeds, **settings)
        drafts[1, 1], drafts[3, 0] = -5, 200
        lengths = torch.tensor([2, 2, 1, 2, 0, 2])
        arguments = list(planned(logits, drafts.clamp(0, 199), lengths, method=method, seeds=seeds, **settings))
        arguments[1] = drafts
        if told != "not told":
            arguments[10] = draft_logits
        expected = eager.verify_drafts(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(on_triton(arguments), expected, strict=True))
        accepted = torch.cat((accepted, expected[1]))
    assert 0 < int(accepted.sum()) < len(accepted) // 6 * 8  # both answers happen


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_a_drafter_without_a_distribution_is_refused(method):
    logits, draft_logits = randn(4, 3, 90), randn(4, 2, 90)
    draft_logits[1, 1, 4], draft_logits[2, 0], draft_logits[3, 1] = torch.nan, -INF, torch.nan
    lengths = torch.tensor([2, 2, 1, 1])
    result = assert_same(logits, draft_logits.argmax(-1), lengths, method=method, draft_logits=draft_logits)
    assert result[6].tolist() == [False, True, True, False]


@pytest.mark.parametrize("method", ["rejection", "block"])
def test_a_distribution_that_agrees_accepts_everything(method):
    logits, seeds = randn(4, 3, 90), torch.arange(4)
    drafts = sampled_drafts(logits[:, :2], seeds, top_p=0.9)
    result = assert_same(logits, drafts, method=method, draft_logits=logits[:, :2].clone(), seeds=seeds, top_p=0.9)
    assert result[1].tolist() == [2] * 4


# The backend ----------------------------------------------------------------------------------------------------------


def test_public_functions_reach_it_by_name():
    logits, drafts = randn(2, 3, 90), torch.zeros(2, 2, dtype=torch.int64)
    arguments = {"seeds": 4, "positions": 1, "top_k": 9, "top_p": 0.9}
    expected = verify_drafts(logits, drafts, **arguments), sample_tokens(logits[:, 0], stream="draft", **arguments)
    with use_backend("triton"):
        assert explain("verify_drafts", logits=logits, draft_tokens=drafts).taken == "triton"
        got = verify_drafts(logits, drafts, **arguments), sample_tokens(logits[:, 0], stream="draft", **arguments)
    assert all(torch.equal(a, b) for a, b in zip(got[0], expected[0], strict=True))
    assert torch.equal(got[1], expected[1])


def test_what_it_does_not_do_is_said():
    logits, drafts = randn(2, 3, 90), torch.zeros(2, 2, dtype=torch.int64)
    with use_backend("triton"):
        with pytest.raises(BackendError, match="float64"):
            verify_drafts(logits.double(), drafts)
        with pytest.raises(BackendError, match="does not support draft_logits in fp64"):
            verify_drafts(logits, drafts, method="block", draft_logits=logits[:, :2].double())


@pytest.mark.parametrize("method", ["match", "rejection", "block"])
def test_no_requests_and_no_drafts(method):
    assert on_triton(planned(torch.zeros(0, 3, 5), torch.zeros(0, 2, dtype=torch.int64), method=method))[0].shape == (
        0,
        3,
    )
    assert_same(randn(3, 1, 40), torch.zeros(3, 0, dtype=torch.int64), method=method)


def test_a_plan_reads_no_numbers():
    """Tensors of the meta device hold none."""
    logits = torch.empty(3, 5, 1000, device="meta")
    each_request = [torch.empty(3, device="meta", dtype=dtype) for dtype in (torch.float32, torch.int64)]
    reals, whole = each_request
    drafts = torch.empty(3, 4, device="meta", dtype=torch.int64)
    for method in ("match", "rejection", "block"):
        draft_logits = None if method == "match" else logits[:, :4]
        launches, out = backend.plan(
            logits,
            drafts,
            whole,
            reals,
            whole,
            reals,
            reals,
            reals,
            whole,
            whole,
            draft_logits,
            whole,
            (1, 2),
            method,
            0,
        )
        assert len(launches) == (2 if method == "match" else 3)
        assert out[0].shape == (3, 5)
