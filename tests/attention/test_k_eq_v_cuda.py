"""The compiled K-equals-V kernel on the emulator: values, row bits, pages, positions; what it refuses, and why.

Most tests have head_dim 128, a quarter of a full layer's, and all that the kernel does with 512.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import row_bits
import torch
from emulated import DTYPES, _emulate, needs_emulator  # noqa: F401

from gemma4_kernels import BackendError, k_eq_v_attention, reference
from gemma4_kernels.attention import cuda, value_codes
from gemma4_kernels.bench import inputs as draw
from gemma4_kernels.bench import validation
from gemma4_kernels.bench.cases import attention_cases
from gemma4_kernels.bench.errors import judge

pytestmark = needs_emulator


class Drawn(NamedTuple):
    q: torch.Tensor  # (B, rows, kv_heads * group, head_dim)
    values: torch.Tensor  # (B, keys, kv_heads, head_dim)
    weight: torch.Tensor
    inv_freq: torch.Tensor


def drawn(rows=1, keys=70, *, batch=1, group=16, kv_heads=1, head_dim=128, dtype=torch.bfloat16, seed=0) -> Drawn:
    rng = draw.generator(seed)
    return Drawn(
        draw.rows(draw.queries, (batch, rows, kv_heads * group, head_dim), rng, dtype),
        draw.rows(draw.values, (batch, keys, kv_heads, head_dim), rng, dtype),
        draw.k_norm_weight(head_dim, rng),
        draw.inv_freq(head_dim),
    )


def assert_attends(call: Drawn, lengths: list[int] | None = None, scale: float = 1.0) -> None:
    """Out and lse keep the error rule; keys beyond the lengths hold NaN while the kernel runs."""
    cache = call.values.clone()
    key_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    for b, length in enumerate(lengths or []):
        cache[b, length:] = float("nan")
    got = k_eq_v_attention(
        call.q, cache, call.weight, call.inv_freq, cache_seqlens=key_lengths, softmax_scale=scale, return_lse=True
    )
    options = {"key_lengths": key_lengths, "softmax_scale": scale}
    exact = reference.k_eq_v_attention(*call, **options)
    plain = reference.plain_k_eq_v_attention(*call, **options)
    for name, result, expected, ordinary in zip(("out", "lse"), got, exact, plain, strict=True):
        assert (verdict := judge(result, expected, ordinary)).ok, f"{name}: {verdict}"


# Values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 3, 8, 16, 32])
@pytest.mark.parametrize("rows", range(1, 17))
def test_every_number_of_rows_and_heads_keeps_the_error_rule(rows, group):
    kv_heads = max(1, 8 // group)  # the rule wants more than a few numbers of a result
    dtype = DTYPES[(rows + group) % 2]
    assert_attends(drawn(rows, keys=33 + rows, group=group, kv_heads=kv_heads, dtype=dtype, seed=rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "rows", "kv_heads"), [(512, 1, 1), (512, 5, 1), (512, 3, 2), (256, 2, 3)])
def test_full_layers_keep_the_error_rule(head_dim, rows, kv_heads, dtype):
    assert_attends(drawn(rows, 100, head_dim=head_dim, kv_heads=kv_heads, dtype=dtype), scale=1.25)


@pytest.mark.parametrize("rows", [1, 5])
def test_lengths_around_the_edges_of_tiles_and_chunks(rows):
    lengths = [0, 1, 2, 3, 4, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 130, 150]
    assert_attends(drawn(rows, 150, batch=len(lengths), group=4), lengths)


def test_more_rows_than_keys():
    call = drawn(rows=6, keys=4, group=2)
    out, lse = k_eq_v_attention(*call, return_lse=True)
    assert torch.equal(out[:, :2], torch.zeros_like(out[:, :2]))
    assert torch.equal(lse[..., :2], torch.full((1, 2, 2), float("-inf")))
    assert_attends(call)


def test_nothing_to_attend_to():
    out, lse = k_eq_v_attention(*drawn(rows=2, keys=0), return_lse=True)
    assert not out.any()
    assert bool((lse == float("-inf")).all())
    assert k_eq_v_attention(*drawn(rows=0)).shape == (1, 0, 16, 128)
    assert k_eq_v_attention(*drawn(batch=0)).shape == (0, 1, 16, 128)


def some_pairs(head_dim: int, pairs: list[int]) -> torch.Tensor:
    inv_freq = torch.zeros(head_dim // 2)
    inv_freq[pairs] = 10.0 ** -torch.linspace(0, 4, len(pairs))
    return inv_freq


@pytest.mark.parametrize(
    ("head_dim", "pairs"),
    [
        (128, []),
        (128, list(range(64))),
        (256, list(range(128))),
        (256, [3, 40, 127]),
        (256, list(range(5, 128, 8))),
        (512, list(range(256))),
        (512, [0, 255]),
    ],
)
def test_any_pairs_may_rotate(head_dim, pairs):
    call = drawn(2, 50, group=2, head_dim=head_dim)
    assert_attends(call._replace(inv_freq=some_pairs(head_dim, pairs)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_weights_and_frequencies_of_any_dtype(dtype):
    call = drawn(2, 40, group=2)
    assert_attends(call._replace(weight=call.weight.to(dtype), inv_freq=call.inv_freq.double()))


def test_the_last_positions_of_the_longest_cache():
    """Every page is one of seven, so the cache is small; the query looks for one key near the end."""
    length, page_size, rng = 262143, 37, draw.generator(1)
    call = drawn(group=2, keys=7 * page_size)
    per_request = -(-length // page_size)
    table = torch.randint(7, (1, per_request), generator=rng, dtype=torch.int32)
    pages = call.values.view(7, page_size, 1, 128)
    cache = pages[table[0].long()].flatten(0, 1)[None, :length]  # (1, length, 1, 128)
    wanted = length - 7
    key = reference.keys_from_values(
        cache[:, wanted : wanted + 1].double(), call.weight, call.inv_freq, torch.tensor([wanted])
    )
    q = (4 * key).expand(1, 1, 2, 128).to(call.q.dtype)
    got = k_eq_v_attention(
        q, pages, call.weight, call.inv_freq, cache_seqlens=length, block_table=table, return_lse=True
    )
    exact = reference.k_eq_v_attention(q, cache, call.weight, call.inv_freq)
    plain = reference.plain_k_eq_v_attention(q, cache, call.weight, call.inv_freq)
    for result, expected, ordinary in zip(got, exact, plain, strict=True):
        assert (verdict := judge(result, expected, ordinary)).ok, str(verdict)


# Values in 8 bits ---------------------------------------------------------------------------------------------------

CODES = [torch.float8_e4m3fn, torch.int8]


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [0, 24])
def test_codes_have_the_bits_of_the_values_that_they_stand_for(codes, dtype, page_size):
    call = drawn(3, 75, batch=2, kv_heads=2, group=5, dtype=dtype)
    scale = value_codes.FLOAT8_SCALE * torch.tensor([1.0, 0.7])
    coded, scale = value_codes.encode(call.values, codes, scale)
    values = value_codes.decode(coded, scale).to(dtype)
    options = {"cache_seqlens": torch.tensor([75, 40], dtype=torch.int32), "return_lse": True}
    expected = k_eq_v_attention(call.q, values, *call[2:], **options)
    if page_size:
        coded, table = draw.scattered_pages(coded.float(), page_size, draw.generator(3))
        coded = coded.nan_to_num(0).to(codes)
        if codes == torch.int8:
            scale = draw.scattered_pages(scale.unsqueeze(-1), page_size, draw.generator(3))[0].squeeze(-1)
        options["block_table"] = table
    got = k_eq_v_attention(call.q, coded, *call[2:], values_scale=scale, **options)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_every_code_of_a_full_layer(codes):
    """A key alone, so that out is its value; and a code that is no number."""
    every = torch.arange(256, dtype=torch.uint8).repeat(2)[None, None, None].view(codes)  # (1, 1, 1, 512)
    is_number = ~every.float().isnan()
    numbers = torch.where(is_number, every.float(), 0).to(codes)
    scale = torch.tensor([0.37]) if codes == torch.float8_e4m3fn else torch.full((1, 1, 1), 0.37)
    q, _, *weights = drawn(head_dim=512)
    out = k_eq_v_attention(q, numbers, *weights, values_scale=scale)
    assert torch.equal(out, value_codes.decode(numbers, scale).to(q.dtype).expand_as(out))
    if not is_number.all():
        assert bool(k_eq_v_attention(q, every, *weights, values_scale=scale).isnan().all())


# Where rows lie -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 5, 16, 32, 48, 200])
def test_pages_in_any_order_give_the_same_bits(page_size):
    call = drawn(3, 150, batch=2, group=2)
    lengths = torch.tensor([141, 70], dtype=torch.int32)
    pages, table = draw.scattered_pages(call.values, page_size, draw.generator(3))
    for b, length in enumerate(lengths.tolist()):  # no entry is read that no length reaches
        table[b, -(-length // page_size) :] = -(2**31)
    weights = (call.weight, call.inv_freq)
    got = k_eq_v_attention(call.q, pages, *weights, cache_seqlens=lengths, block_table=table, return_lse=True)
    expected = k_eq_v_attention(call.q, call.values, *weights, cache_seqlens=lengths, return_lse=True)
    assert all(map(torch.equal, got, expected))


def test_rows_of_a_larger_tensor():
    rng = draw.generator(4)
    q = draw.queries((2, 6, 12, 160), rng).bfloat16()[:, ::2, 2:10:2, 16:144]
    values = draw.values((4, 150, 3, 152), rng).bfloat16()[::2, 40:140, 1:, 8:136]
    weights = drawn()[2:]
    got = k_eq_v_attention(q, values, *weights)
    assert torch.equal(got, k_eq_v_attention(q.contiguous(), values.contiguous(), *weights))
    assert_attends(Drawn(q.contiguous(), values.contiguous(), *weights))
    unaligned = q[..., 1:].new_zeros(2, 3, 4, 136)[..., 3:131].copy_(q)
    assert torch.equal(k_eq_v_attention(unaligned, values, *weights), got)


def test_lengths_and_pages_of_a_device_are_held_within_what_exists():
    """Only the host's checks are left out here, as for tensors of a GPU."""
    call = drawn(2, 64, batch=3, group=2)
    lengths = torch.tensor([64, 900, -7], dtype=torch.int32)
    got, lse = cuda.k_eq_v_attention(*call, lengths, None, 1.0)
    assert torch.equal(got[:2], k_eq_v_attention(*call)[:2])
    assert not got[2].any()
    assert bool((lse[2] == float("-inf")).all())
    pages = call.values.reshape(12, 16, 1, 128)
    table = torch.tensor([[0, 1, 2, 3], [4, 99, -5, 7], [8, 9, 10, 11]], dtype=torch.int32)
    got, _ = cuda.k_eq_v_attention(call.q, pages, *call[2:], torch.full((3,), 64, dtype=torch.int32), table, 1.0)
    held = k_eq_v_attention(call.q, pages, *call[2:], cache_seqlens=64, block_table=table.clamp(0, 11))
    assert torch.equal(got, held)


# Bits ---------------------------------------------------------------------------------------------------------------


def test_a_row_keeps_its_bits_alone():
    row_bits.assert_k_eq_v_rows_alone(row_bits.Setting("cpu", torch.bfloat16, 3, 1, 128, 75, -1))
    row_bits.assert_k_eq_v_rows_alone(row_bits.Setting("cpu", torch.float16, 16, 1, 128, 140, -1))


def test_a_row_keeps_its_bits_alone_in_a_full_layer():
    call = drawn(4, 70, head_dim=512)
    together = k_eq_v_attention(*call)
    for row in range(4):
        end = 70 - 3 + row
        alone = k_eq_v_attention(call.q[:, row : row + 1], call.values[:, :end], *call[2:])
        assert torch.equal(alone, together[:, row : row + 1])


@pytest.mark.parametrize("keys", [192, 199, 207, 208, 290])
def test_a_row_keeps_its_bits_where_two_sizes_of_chunks_meet(keys):
    """Eight KV heads have three chunks each on the emulator's 28 multiprocessors: 64 keys up to 192, then more."""
    setting = row_bits.Setting("cpu", torch.bfloat16, 8, 8, 128, keys, -1)
    row_bits.assert_k_eq_v_rows_alone(setting)
    q, _, values = setting.drawn()
    assert_attends(Drawn(q, values, *setting.weights()))


def test_a_request_keeps_its_bits_in_any_batch_and_capacity():
    call = drawn(5, 140, batch=3, group=4)
    lengths = torch.tensor([17, 140, 66], dtype=torch.int32)
    together, lse = k_eq_v_attention(*call, cache_seqlens=lengths, return_lse=True)
    order = torch.tensor([2, 0, 1])
    permuted = k_eq_v_attention(call.q[order], call.values[order], *call[2:], cache_seqlens=lengths[order])
    assert torch.equal(permuted, together[order])
    for b, length in enumerate(lengths.tolist()):
        alone = k_eq_v_attention(call.q[b : b + 1], call.values[b : b + 1, :length], *call[2:], return_lse=True)
        assert torch.equal(alone[0][0], together[b])
        assert torch.equal(alone[1][0], lse[b])


def test_special_numbers_stay_in_their_row():
    call = drawn(4, 70, group=5)
    expected = k_eq_v_attention(*call)
    q = call.q.clone()
    q[0, 1, 2, 7], q[0, 3, 0, 100] = float("nan"), float("inf")
    got = k_eq_v_attention(q, *call[1:])
    assert bool(got[0, 1, 2].isnan().all())
    assert not bool(got[0, 3, 0].isfinite().any())
    kept = torch.ones(4, 5, dtype=torch.bool)
    kept[1, 2] = kept[3, 0] = False
    assert torch.equal(got[0, kept], expected[0, kept])


# The list of cases --------------------------------------------------------------------------------------------------

SERVED_CASES = [
    case
    for case in attention_cases()
    if case.op == "k_eq_v_attention" and case.sq <= 16 and case.dtype != "fp32" and case.d in cuda.K_EQ_V_HEAD_DIMS
]


@pytest.mark.parametrize("case", SERVED_CASES, ids=str)
def test_a_case_keeps_the_error_rule(case):
    (check,) = validation.check_case(case, ["cuda"], torch.device("cpu"))
    assert check.status == "held", check.reasons


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("goes to 16 rows", {"rows": 17}),
        ("takes bfloat16, float16, not float32", {"dtype": torch.float32}),
        ("has head_dim 128, 256, 512, the call has 64", {"head_dim": 64}),
    ],
)
def test_what_no_kernel_serves_has_a_reason(reason, options):
    with pytest.raises(BackendError, match=reason):
        k_eq_v_attention(*drawn(**options))


def test_a_cache_that_cannot_be_copied_16_bytes_at_a_time_is_refused():
    call = drawn()
    values = torch.zeros(1, 70, 1, 129, dtype=torch.bfloat16)[..., 1:]
    with pytest.raises(BackendError, match="unaligned_cache"):
        k_eq_v_attention(call.q, values, *call[2:])
