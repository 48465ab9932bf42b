"""The Triton kernel in front of attention, interpreted on the CPU: run with TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from prologue_helpers import (
    DTYPES,
    GEMMA,
    KINDS,
    assert_leaves_out_rows_beyond,
    sliding_layer,
    with_exact_sums,
    written,
)

from gemma4_kernels import RingCache, environment, explain, qkv_norm_rope_append, use_backend
from gemma4_kernels.bench.errors import judge
from gemma4_kernels.reference.layers import apply_rope, rms_norm

pytest.importorskip("triton")
if not environment.triton_interprets():
    pytest.skip("needs TRITON_INTERPRET=1; `make test` runs it in a second process", allow_module_level=True)

import triton
import triton.language as tl

from gemma4_kernels.attention.triton import prologue
from gemma4_kernels.triton_common import rounding

kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def on_triton():
    with use_backend("triton"):
        yield


def eager(layer, caches, *args, **changes):
    with use_backend("eager"):
        return layer.append(caches, *args, **changes)


# The numbers --------------------------------------------------------------------------------------------------------


@kinds
@dtypes
def test_bits_of_transformers_where_sums_are_exact(kind, dtype):
    """The order of the sum of squares is all that may differ, and here it makes no difference."""
    pytest.importorskip("transformers")
    layer = with_exact_sums(KINDS[kind](dtype, **GEMMA[kind]))
    caches = layer.caches(8)
    out = layer.append(caches)
    q, rows = layer.expected()
    assert torch.equal(out, q)
    for got, want in zip(written(caches, layer), rows, strict=True):
        assert torch.equal(got, want)


def ulp(x):
    """The distance between neighbours around x (fp32, of numbers in dtype `x.dtype`)."""
    return torch.exp2(x.abs().float().log2().floor()) * torch.finfo(x.dtype).eps


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nearly_all_bits_of_transformers_where_sums_are_rounded(kind, dtype):
    pytest.importorskip("transformers")
    layer = KINDS[kind](dtype, rows=8, **GEMMA[kind])
    caches = layer.caches(13)
    out = layer.append(caches)
    q, rows = layer.expected()
    pairs = list(zip([out, *written(caches, layer)], [q, *rows], strict=True))
    for got, want in pairs:
        assert float((got == want).double().mean()) >= 0.999
    norm, expected_norm = pairs[-1]  # v is a norm and nothing else
    assert bool(((norm.float() - expected_norm.float()).abs() <= ulp(expected_norm)).all())
    for got, want in pairs[:-1]:
        # One unit of the norm, through products and a sum that are rounded themselves; the larger of a pair sets the unit.
        low, high = want.float().chunk(2, dim=-1)
        reach = torch.cat([torch.hypot(low, high)] * 2, dim=-1).to(dtype)
        assert bool(((got.float() - want.float()).abs() <= 2 * ulp(reach)).all())


@kinds
def test_fp32_holds_the_error_rule(kind):
    """In fp32 the last bit of the mean reaches the result; the error against fp64 is PyTorch's."""
    layer = KINDS[kind](torch.float32, rows=8, **GEMMA[kind])
    caches = layer.caches(13)
    out = layer.append(caches)
    plain_caches = layer.caches(13)
    plain = eager(layer, plain_caches)
    wide = [x.double() for x in (layer.q, layer.q_weight, layer.cos, layer.sin, layer.v)]
    exact = apply_rope(rms_norm(wide[0], wide[1]), wide[2], wide[3])
    assert judge(out, exact, plain).ok
    values, plain_values = written(caches, layer)[-1], written(plain_caches, layer)[-1]
    assert judge(values, rms_norm(wide[4]), plain_values).ok


@kinds
@dtypes
@pytest.mark.parametrize("head_dim", [2, 6, 80, 96, 130, 384])
def test_any_even_head_dim(kind, dtype, head_dim):
    layer = with_exact_sums(KINDS[kind](dtype, d=head_dim, hq=6))
    caches, expected_caches = layer.caches(8, fill=3.0), layer.caches(8, fill=3.0)
    assert torch.equal(layer.append(caches), eager(layer, expected_caches))
    for got, want in zip(caches, expected_caches, strict=True):
        assert torch.equal(got, want)


@triton.jit
def _there_and_back(x_ptr, rounded_ptr, widened_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rounded = rounding.round_to(tl.load(x_ptr + index), tl.bfloat16)
    tl.store(rounded_ptr + index, rounded)
    tl.store(widened_ptr + index, rounding.to_fp32(rounded))


def test_bf16_is_rounded_as_pytorch_rounds_it():
    """Every bf16 number, the numbers between it and the next one, ties both ways, subnormals, infinities and NaN."""
    patterns = torch.arange(1 << 16).repeat_interleave(4) << 16
    patterns += torch.tensor([0x0000, 0x7FFF, 0x8000, 0x8001]).repeat(1 << 16)
    x = patterns.to(torch.int32).view(torch.float32)
    rounded, widened = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x)
    _there_and_back[(len(x) >> 12,)](x, rounded, widened, BLOCK=1 << 12)
    expected = x.to(torch.bfloat16)
    finite = ~x.isnan()
    assert torch.equal(rounded[finite].view(torch.int16), expected[finite].view(torch.int16))
    assert bool(rounded[~finite].isnan().all())
    assert torch.equal(widened[finite].view(torch.int32), expected[finite].float().view(torch.int32))


@kinds
def test_the_angles_of_a_pair_need_not_be_equal(kind):
    """transformers repeats each angle; the formula does not ask for it."""
    layer = with_exact_sums(KINDS[kind](torch.bfloat16))
    layer = replace(layer, cos=torch.randn(layer.cos.shape).bfloat16(), sin=torch.randn(layer.sin.shape).bfloat16())
    caches, expected = layer.caches(8, fill=0.0), layer.caches(8, fill=0.0)
    assert torch.equal(layer.append(caches), eager(layer, expected))
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


@kinds
def test_eps_goes_to_every_norm(kind):
    layer = with_exact_sums(KINDS[kind](torch.bfloat16))
    caches, expected = layer.caches(8, fill=0.0), layer.caches(8, fill=0.0)
    assert torch.equal(layer.append(caches, eps=8.0), eager(layer, expected, eps=8.0))
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


@kinds
def test_weights_of_any_dtype(kind):
    layer = KINDS[kind](torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cast = replace(layer, q_weight=layer.q_weight.to(dtype), k_weight=layer.k_weight.to(dtype))
        caches, expected = cast.caches(8, fill=0.0), cast.caches(8, fill=0.0)
        assert torch.equal(cast.append(caches), eager(cast, expected))
        assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


# Where rows go ------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_pages_and_lengths_of_both_integer_dtypes(kind, integers):
    layer = with_exact_sums(KINDS[kind](torch.bfloat16, rows=7))
    layer.lengths = torch.tensor([3, 0], dtype=integers)
    table = torch.tensor([[5, 0, 2, 99], [1, 7, -1, 3]], dtype=integers)  # 4 rows a page; no row reaches 99 or -1
    pages, expected = ([cache.view(9, 4, *cache.shape[2:]) for cache in layer.caches(18, fill=3.0)] for _ in range(2))
    assert torch.equal(layer.append(pages, table), eager(layer, expected, table))
    assert all(torch.equal(a, b) for a, b in zip(pages, expected, strict=True))


def test_a_ring_is_written_across_its_seam():
    layer = with_exact_sums(sliding_layer(torch.bfloat16, rows=7))
    layer.lengths = torch.tensor([20, 93])
    rings = [RingCache.allocate(2, 8, 2, 64, dtype=torch.bfloat16, page_size=4) for _ in range(2)]
    table = rings[0].block_table(100)
    assert torch.equal(layer.append(rings[0].pages(), table), eager(layer, rings[1].pages(), table))
    for got, want in ((rings[0].k, rings[1].k), (rings[0].v, rings[1].v)):
        assert torch.equal(got, want)
        used = got.ne(0).any(dim=-1).any(dim=-1)  # (B, 24)
        assert used[0].nonzero().flatten().tolist() == [0, 1, 2, 20, 21, 22, 23]
        assert used[1].nonzero().flatten().tolist() == [0, 1, 2, 3, 21, 22, 23]


@kinds
def test_strides_are_taken_as_they_are(kind):
    """Heads before rows in memory, a rotation for all requests, and a cache that is part of a larger one."""
    layer = with_exact_sums(KINDS[kind](torch.bfloat16, rows=5))
    layer = replace(layer, cos=layer.cos[:1], sin=layer.sin[:1])
    expected = layer.caches(12, fill=3.0)
    out = eager(layer, expected)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (layer.q, layer.k, layer.v))
    cos = torch.cat((layer.cos, layer.sin), dim=-1)[..., :64]
    turned = replace(layer, q=q, k=k, v=k if layer.k_eq_v else v, cos=cos)
    caches = [cache.new_full((3, 20, 5, 80), 3.0)[1:, 2:14, : cache.shape[2], :64] for cache in expected]
    assert torch.equal(turned.append(caches), out)
    for got, want in zip(caches, expected, strict=True):
        assert torch.equal(got, want)
        around = got._base.clone()
        around[1:, 2:14, : got.shape[2], :64] = 3.0
        assert bool((around == 3.0).all())


@kinds
@pytest.mark.parametrize(
    ("lengths", "table", "kept"),
    [
        ([-2, 6], None, [1, 2]),  # the first request's third row is position 0; of the second, 6 and 7 fit
        ([2**33, 5], None, [0, 3]),
        ([1, 6], [[0, 9], [-1, 2]], [3, 2]),
        ([2, 3], [[4, 0], [1, -5]], [1, 1]),
    ],
    ids=["lengths", "a length beyond 32 bits", "no such column", "no such page"],
)
def test_the_kernel_leaves_out_rows_beyond_the_cache(kind, lengths, table, kept):
    """What a GPU call may hold unnoticed, as the host does not look at its numbers."""
    layer = KINDS[kind](torch.bfloat16)
    out = assert_leaves_out_rows_beyond(prologue, layer, lengths, table, kept)
    with use_backend("eager"):
        assert torch.equal(out, layer.append(layer.caches(8)))


def test_row_bits_do_not_depend_on_the_batch():
    layer = sliding_layer(torch.bfloat16, rows=5)
    caches = layer.caches(12)
    out, rows = layer.append(caches), written(caches, layer)
    for request in range(2):
        for row in range(5):
            one = (slice(request, request + 1), slice(row, row + 1))
            alone = replace(
                layer, q=layer.q[one], k=layer.k[one], v=layer.v[one], cos=layer.cos[one], sin=layer.sin[one],
                lengths=torch.tensor([2]),
            )  # fmt: skip
            single = alone.caches(4)
            assert torch.equal(alone.append(single), out[one])
            for got, want in zip(single, rows, strict=True):
                assert torch.equal(got[:, 2:3], want[one])


@kinds
def test_no_rows_and_no_requests_are_calls_too(kind):
    for empty in (KINDS[kind](torch.float32, rows=0), KINDS[kind](torch.float32, batch=0)):
        caches = empty.caches(8, fill=0.0)
        assert empty.append(caches).shape == empty.q.shape


def test_explain_says_why_it_is_passed_over():
    with use_backend(None):
        assert "only where asked for by name" in str(explain("qkv_norm_rope_append"))
    assert explain("qkv_norm_rope_append", dtype=torch.bfloat16, head_dim=256).taken == "triton"
    assert "takes bfloat16" in str(explain("k_eq_v_norm_rope_append", dtype=torch.float64))


def test_compiled_graphs_call_the_kernel():
    layer = sliding_layer(torch.bfloat16)
    compiled = torch.compile(qkv_norm_rope_append, fullgraph=True, backend="aot_eager")
    head = (layer.q, layer.k, layer.v, layer.q_weight, layer.k_weight, layer.cos, layer.sin)
    caches, expected = layer.caches(8, fill=0.0), layer.caches(8, fill=0.0)
    out = compiled(*head, *caches, cache_seqlens=layer.lengths)
    assert torch.equal(out, layer.append(expected))
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))
