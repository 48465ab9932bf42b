"""Caches of 8 bits: what is written is the nearest code, what is read is what was written, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from prologue_helpers import full_layer, written

from gemma4_kernels import DTypeError, ShapeError, StrideError, explain, k_eq_v_attention, k_eq_v_norm_rope_append
from gemma4_kernels.attention import value_codes
from gemma4_kernels.attention.value_codes import FLOAT8_SCALE, decode, encode
from gemma4_kernels.bench import inputs as draw

FP8, INT8 = torch.float8_e4m3fn, torch.int8
KINDS = [FP8, INT8]
HEADS, DIM = 2, 64


def layer_and_cache(kind, dtype=torch.bfloat16, capacity=12):
    """A layer of two KV heads, an empty cache of codes, and its scales."""
    layer = full_layer(dtype, hkv=HEADS)
    values = torch.zeros((2, capacity, HEADS, DIM)).to(kind)
    scale = torch.full((HEADS,), FLOAT8_SCALE) if kind == FP8 else torch.full((2, capacity, HEADS), 7.0)
    return layer, values, scale


def append(layer, values, scale, **changes):
    places = {"cache_seqlens": layer.lengths} | changes
    return k_eq_v_norm_rope_append(
        layer.q, layer.k, layer.q_weight, layer.cos, layer.sin, values, values_scale=scale, **places
    )


def attend(layer, q, values, scale, **changes):
    return k_eq_v_attention(
        q, values, layer.k_weight, draw.inv_freq(DIM), cache_seqlens=layer.lengths + layer.q.shape[1], values_scale=scale,
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_is_written_is_the_nearest_code(kind, dtype):
    layer, values, scale = layer_and_cache(kind, dtype)
    wide = layer.caches(12, fill=0.0)
    assert torch.equal(append(layer, values, scale), layer.append(wide))
    expected = written(wide, layer)[0].double()  # (B, S, Hkv, D), rounded to the layer's dtype as without codes
    codes = written([values.view(torch.uint8)], layer)[0].view(kind)
    row_scale = scale if kind == FP8 else written([scale.unsqueeze(-1)], layer)[0].squeeze(-1)
    every = torch.arange(256).to(torch.uint8).view(kind)
    possible = every.double()[every.float().isfinite()]  # (codes,)
    if kind == INT8:
        possible = possible[possible != -128]  # symmetric: its negative has no code
        largest = expected.abs().amax(-1)
        torch.testing.assert_close(row_scale.double(), largest / 127, rtol=1e-7, atol=0)
    steps = expected / row_scale.double().unsqueeze(-1)
    nearest = (steps.unsqueeze(-1) - possible).abs().amin(-1)
    # One rounding of fp32 in front of the choice may move a number that lies between two codes.
    assert bool(((steps - codes.double()).abs() <= nearest * (1 + 1e-6) + 1e-5).all())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("paged", [False, True])
def test_attention_reads_what_was_written(kind, paged):
    """The same as over the decoded values: bit for bit, because fp32 holds each product of a code and its scale."""
    layer, values, scale = layer_and_cache(kind, torch.float32)
    q = append(layer, values, scale)
    decoded = decode(values, scale)
    expected = k_eq_v_attention(
        q, decoded, layer.k_weight, draw.inv_freq(DIM), cache_seqlens=layer.lengths + layer.q.shape[1]
    )
    if paged:
        table = torch.tensor([[5, 0, 2], [1, 7, 3]], dtype=torch.int32)
        pages = torch.zeros((9, 4, HEADS, DIM)).to(kind)
        pages[table.long().flatten()] = values.view(6, 4, HEADS, DIM)
        if kind == INT8:
            spread = torch.full((9, 4, HEADS), float("nan"))
            spread[table.long().flatten()] = scale.view(6, 4, HEADS)
            scale = spread
        assert torch.equal(attend(layer, q, pages, scale, block_table=table), expected)
    else:
        assert torch.equal(attend(layer, q, values, scale), expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_pages_get_the_same_codes_and_nothing_else_changes(kind):
    layer, values, scale = layer_and_cache(kind)
    append(layer, values, scale)
    table = torch.tensor([[5, 0, 2], [1, 7, 3]], dtype=torch.int32)
    pages = torch.zeros((9, 4, HEADS, DIM)).to(kind)
    scales = scale if kind == FP8 else torch.full((9, 4, HEADS), 7.0)
    append(layer, pages, scales, block_table=table)
    order = table.long().flatten()
    assert torch.equal(pages.view(torch.uint8)[order].view(2, 12, HEADS, DIM), values.view(torch.uint8))
    others = [page for page in range(9) if page not in order]
    assert not pages.view(torch.uint8)[others].any()
    if kind == INT8:
        assert torch.equal(scales[order].view(2, 12, HEADS), scale)
        assert bool((scales[others] == 7.0).all())
        kept = torch.ones(2, 12, dtype=torch.bool)
        for request, length in enumerate(layer.lengths.tolist()):
            kept[request, length : length + 3] = False
        assert bool((scale[kept] == 7.0).all())
    else:
        assert bool((scale == FLOAT8_SCALE).all())


def test_special_rows():
    rows = torch.zeros(5, 1, 4)
    rows[1] = torch.tensor([1.0, float("nan"), 0.0, 0.0])
    rows[2] = torch.tensor([1.0, float("inf"), 0.0, 0.0])
    rows[3] = torch.tensor([1e6, -1e6, 1.0, 0.0])
    rows[4] = torch.tensor([127.0, -127.0, 0.49, 0.51])
    codes, scale = encode(rows, INT8, None)
    assert decode(codes, scale)[0].eq(0).all()  # a row of zeros stays one
    assert decode(codes, scale)[1:3].isnan().all()  # what a row cannot hold is not made a number
    assert decode(codes, scale)[3, 0, :2].tolist() == [1e6, -1e6]
    assert codes[4, 0].tolist() == [127, -127, 0, 1]
    codes, scale = encode(rows, FP8, torch.tensor([0.5]))
    assert decode(codes, scale)[3, 0, :2].tolist() == [224.0, -224.0]  # the largest, not infinity
    assert bool(decode(codes, scale)[1, 0, 1].isnan())


def test_the_scale_that_fits_what_a_norm_gives():
    """A row of root mean square 1 with all of it in one column."""
    row = torch.zeros(1, 1, 512)
    row[..., 3] = 512**0.5
    codes, scale = encode(row, FP8, torch.tensor([FLOAT8_SCALE]))
    assert float(codes.float().max()) < value_codes.FLOAT8_MAX
    assert abs(float(decode(codes, scale).max()) / 512**0.5 - 1) <= 2**-4


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_error_that_the_page_on_attention_states(kind):
    """Of the output against the values in bf16: root mean square over root mean square, on the statistics of the layer."""
    rng = draw.generator(3)
    q = draw.queries((1, 1, 16, 512), rng).bfloat16()
    values = draw.values((1, 2000, 1, 512), rng).bfloat16()
    weights = draw.k_norm_weight(512, rng), draw.inv_freq(512)
    exact = k_eq_v_attention(q.double(), values.double(), *weights)
    codes, scale = encode(values, kind, torch.tensor([FLOAT8_SCALE]))
    got = k_eq_v_attention(q, codes, *weights, values_scale=scale)
    error = float(((got.double() - exact).pow(2).mean() / exact.pow(2).mean()).sqrt())
    assert 0.001 < error < (0.06 if kind == FP8 else 0.02), error


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "scale", "error", "words"),
    [
        (FP8, None, ValueError, "values_scale must be given with values of float8_e4m3fn, got None"),
        (INT8, None, ValueError, "values_scale must be given with values of int8, got None"),
        (torch.bfloat16, torch.ones(HEADS), ValueError, "values_scale must be None for values of bfloat16"),
        (FP8, torch.ones(3), ShapeError, r"values_scale must have shape \(2\), got \(3\)"),
        (INT8, torch.ones(HEADS), ShapeError, r"values_scale must have shape \(2, 12, 2\), got \(2\)"),
        (FP8, torch.ones(HEADS).half(), DTypeError, "values_scale must be float32, got float16"),
        (torch.uint8, torch.ones(HEADS), DTypeError, "values must be bfloat16 or float8_e4m3fn or int8, got uint8"),
        (FP8, torch.ones(HEADS, device="meta"), ValueError, "values_scale must be on cpu like q, got meta"),
    ],
)
def test_a_scale_that_does_not_go_with_the_values(kind, scale, error, words):
    layer, values, _ = layer_and_cache(FP8)
    values = torch.zeros(values.shape).to(kind)
    with pytest.raises(error, match=f"k_eq_v_norm_rope_append: {words}"):
        append(layer, values, scale)
    with pytest.raises(error, match=f"k_eq_v_attention: {words}"):
        attend(layer, layer.q, values, scale)


def test_scales_that_share_memory_are_not_written():
    layer, values, _ = layer_and_cache(INT8)
    with pytest.raises(StrideError, match="values_scale must not be expanded"):
        append(layer, values, torch.ones(1).expand(2, 12, HEADS))


def test_a_backend_without_codes_says_so():
    layer, values, scale = layer_and_cache(INT8)
    said = str(explain("k_eq_v_attention", q=layer.q, values=values, k_norm_weight=layer.k_weight,
                       inv_freq=draw.inv_freq(DIM), values_scale=scale))  # fmt: skip
    assert "-> eager" in said


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_opcheck_and_compile(kind):
    layer, values, scale = layer_and_cache(kind)
    layer = replace(layer, lengths=torch.tensor([3, 2]))
    arguments = (layer.q, layer.k, layer.q_weight, layer.cos, layer.sin, values, layer.lengths, None, 1e-6, scale)
    # Not autograd's: an op that changes its arguments has no formula. Schema: equality of float8 tensors is not in PyTorch.
    tests = ("test_faketensor",) if kind == FP8 else ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.gemma4_kernels.k_eq_v_norm_rope_append.default, arguments, test_utils=tests)

    def layer_step(values, scale):
        return attend(layer, append(layer, values, scale), values, scale)

    expected = layer_step(values.clone(), scale.clone())
    assert torch.equal(torch.compile(layer_step, fullgraph=True, backend="aot_eager")(values, scale), expected)
