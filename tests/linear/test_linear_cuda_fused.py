"""The fused forms of the compiled product on the emulator: GeGLU, argmax, a residual, q, k and v as one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated import DTYPES, _emulate, needs_emulator  # noqa: F401
from linear_products import assert_linear, drawn
from linear_weights import random_weight
from torch.nn.functional import gelu, linear

from gemma4_kernels import (
    BackendError,
    QuantizedWeight,
    explain,
    quantized_argmax,
    quantized_geglu,
    quantized_linear,
    use_backend,
)
from gemma4_kernels.bench import validation
from gemma4_kernels.bench.errors import judge
from gemma4_kernels.bench.linear_cases import linear_cases
from gemma4_kernels.linear import cuda
from gemma4_kernels.linear.schemes import SCHEMES

pytestmark = needs_emulator


def columns_of(scheme: str) -> int:
    return 768 if SCHEMES[scheme].scales in ("six_bit", "int8") else 416


# GeGLU --------------------------------------------------------------------------------------------------------------


def geglu(x, gate, up, dtype):
    gated, passed = (linear(x.to(dtype), w.dequantize(torch.float32).to(dtype)) for w in (gate, up))
    return gelu(gated, approximate="tanh") * passed


def assert_geglu(x: torch.Tensor, gate: QuantizedWeight, up: QuantizedWeight) -> None:
    got = quantized_geglu(x, gate, up)
    assert got.dtype == x.dtype
    verdict = judge(got, geglu(x, gate, up, torch.float64), geglu(x, gate, up, x.dtype))
    assert verdict.ok, str(verdict)


def pair(scheme: str, shape: tuple[int, int], group: int | None = None) -> tuple[QuantizedWeight, QuantizedWeight]:
    return random_weight(scheme, shape, group, seed=0), random_weight(scheme, shape, group, seed=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", cuda.SERVED)
def test_geglu_of_every_scheme(scheme, dtype):
    gate, up = pair(scheme, (70, columns_of(scheme)))
    for rows in (1, 5, 8, 13):
        # Gates around one: in gelu's bend, and within fp16.
        x = drawn(rows, gate.shape[1]) / (float(gate.dequantize().square().mean().sqrt()) * gate.shape[1] ** 0.5)
        assert_geglu(x.to(dtype), gate, up)


@pytest.mark.parametrize("shape", [(1, 32), (32, 256), (33, 288), (129, 512), (16, 2048), (40, 4512)])
def test_geglu_of_ragged_sizes_and_cut_columns(shape):
    gate, up = pair("Q4_0", shape)
    for rows in (1, 9):
        assert_geglu(0.1 * drawn(rows, shape[1]), gate, up)


def test_geglu_far_from_zero_and_of_special_numbers():
    """A gate far below zero gives nothing, one far above itself; NaN and infinity stay in their row."""
    gate, up = pair("Q4_0", (70, 288))
    x = drawn(6, 288, dtype=torch.bfloat16)
    assert_geglu(1000 * x, gate, up)
    expected = quantized_geglu(x, gate, up)
    x[1, 7], x[4, 287] = float("nan"), float("inf")
    got = quantized_geglu(x, gate, up)
    assert bool(got[1].isnan().all())
    assert not bool((got[4].isfinite() & (got[4] != 0)).any())
    assert torch.equal(got[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])


def test_geglu_rounds_once():
    """GeLU of 256.75 is itself, and three times that is 772 in bf16; three times what a bf16 makes of it is 768 or 776."""
    gate, up = torch.zeros(64, 32), torch.zeros(64, 32)
    gate[:, :2], up[:, 2] = 1, 1
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, :3] = torch.tensor([256, 0.75, 3])
    got = quantized_geglu(x, *(QuantizedWeight.quantize(w, "W4A16") for w in (gate, up)))
    assert got.tolist() == [[772.0] * 64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("scheme", "shape"), [("Q4_0", (70, 640)), ("Q4_K", (40, 2048)), ("AWQ", (33, 2304)), ("NF4", (70, 640))]
)
def test_a_row_of_geglu_keeps_its_bits_among_others(scheme, shape, dtype):
    (gate, up), x = pair(scheme, shape), 0.2 * drawn(16, shape[1], dtype=dtype)
    together = quantized_geglu(x, gate, up)
    for first, last in ((0, 1), (9, 10), (15, 16), (3, 8), (2, 10), (5, 16)):
        assert torch.equal(quantized_geglu(x[first:last], gate, up), together[first:last])
    others = x.clone()
    others[:4] = float("nan")
    assert torch.equal(quantized_geglu(others, gate, up)[4:], together[4:])


def test_geglu_of_two_tables_of_shared_columns_and_of_rows_of_a_larger_tensor():
    gate, up = pair("NF4", (70, 160))
    up = replace(up, table=up.table.flip(0) * 0.5)
    assert_geglu(drawn(3, 160), gate, up)
    order = torch.randperm(320, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    gate, up = (replace(weight, columns=order) for weight in pair("GPTQ", (70, 320)))
    assert_geglu(0.1 * drawn(3, 320), gate, up)
    gate, up = pair("Q4_0", (70, 160))
    part = drawn(2, 6, 300)[:, ::2, 100:260]
    got = quantized_geglu(part, gate, up)
    assert got.shape == (2, 3, 70)
    assert torch.equal(got, quantized_geglu(part.contiguous(), gate, up))
    assert quantized_geglu(part[:0], gate, up).shape == (0, 3, 70)


# Argmax -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3700, 64), (70, 416), (40, 2048), (1, 32)])
def test_argmax_is_that_of_the_products_own_outputs(shape, dtype):
    weight = random_weight("Q4_0", shape)
    for rows in (1, 6, 8, 16):
        x = drawn(rows, shape[1], dtype=dtype, seed=rows)
        assert torch.equal(quantized_argmax(x, weight), quantized_linear(x, weight).argmax(-1))


@pytest.mark.parametrize("scheme", cuda.SERVED)
def test_argmax_of_every_scheme(scheme):
    weight, x = random_weight(scheme, (130, columns_of(scheme))), drawn(9, columns_of(scheme))
    assert torch.equal(quantized_argmax(x, weight), quantized_linear(x, weight).argmax(-1))


def repeated(shape: tuple[int, int], places: list[int]) -> QuantizedWeight:
    """A weight whose rows at these places are one and the same."""
    weight = random_weight("Q4_0", shape)
    codes = weight.codes.clone()
    codes[places] = weight.codes[places[0]]
    return replace(weight, codes=codes, scales=torch.full_like(weight.scales, 0.125))


@pytest.mark.parametrize("shape", [(200, 64), (200, 2048)])
def test_the_lowest_of_equal_logits(shape):
    """In other warps, lanes and blocks, and in one; with one piece of K and with several."""
    for places in ([130, 17, 199], [63, 64], [5, 13], [9, 8], [40, 47]):
        weight = repeated(shape, places)
        x = weight.dequantize(torch.bfloat16)[places[:1]].repeat(3, 1)
        assert quantized_argmax(x, weight).tolist() == [min(places)] * 3
        assert torch.equal(quantized_argmax(x, weight), quantized_linear(x, weight).argmax(-1))


@pytest.mark.parametrize(("shape", "places"), [((16500, 32), [16330, 16400, 16499]), ((700, 2048), [255, 511, 699])])
def test_no_output_is_overlooked(shape, places):
    """More blocks, and more outputs of a cut weight, than the last kernel has threads; all logits but one are zero."""
    weight = random_weight("Q4_0", shape)
    codes = torch.full_like(weight.codes, 0x08080808 * 17 - 2**32)
    for column, place in enumerate(places):
        codes[place, column] = 7 + 0x08080808 * 17 - 2**32  # column 8 * column is 7
    weight = replace(weight, codes=codes, scales=torch.ones_like(weight.scales))
    x = torch.zeros(3, shape[1], dtype=torch.bfloat16)
    x[range(3), [0, 8, 16]] = 1
    assert quantized_argmax(x, weight).tolist() == places


def test_logits_that_are_equal_once_they_are_rounded():
    """448 and a little, in steps of 2: some outputs become 450, and the largest of them is not the first."""
    weight = random_weight("W4A16", (500, 64))
    weight = replace(weight, scales=torch.ones_like(weight.scales), codes=weight.codes.clone())
    weight.codes[:, 0] |= 15  # column 0 is 7
    x = torch.full((1, 64), 1.5 * 2.0**-6, dtype=torch.bfloat16)
    x[0, 0] = 64
    logits = quantized_linear(x, weight)
    assert int((logits == logits.max()).sum()) > 5
    largest = linear(x.float(), weight.dequantize()).argmax(-1)
    assert not torch.equal(logits.argmax(-1), largest)
    assert torch.equal(quantized_argmax(x, weight), logits.argmax(-1))


@pytest.mark.parametrize("shape", [(200, 64), (200, 2048)])
def test_rows_with_nan_with_infinity_and_of_zeros(shape):
    weight = random_weight("Q4_0", shape)
    scales = weight.scales.clone()
    scales[150] = float("nan")
    x = drawn(5, shape[1])
    expected = quantized_argmax(x, weight)
    x[1, 3], x[2] = float("nan"), 0
    expected[1], expected[2] = -1, 0
    assert torch.equal(quantized_argmax(x, weight), expected)
    assert quantized_argmax(x[[0, 3]], replace(weight, scales=scales)).tolist() == [-1, -1]
    # One logit of plus infinity, and all of them minus infinity.
    scales[150] = float("inf")
    x = torch.ones(2, shape[1], dtype=torch.bfloat16)
    codes = torch.full_like(weight.codes, -1)  # 15 - 8
    assert quantized_argmax(x, replace(weight, codes=codes, scales=scales.abs())).tolist() == [150, 150]
    all_infinite = replace(weight, codes=codes, scales=torch.full_like(scales, float("-inf")))
    assert quantized_argmax(x, all_infinite).tolist() == [0, 0]


def test_an_argmax_does_not_depend_on_other_rows():
    weight, x = random_weight("Q4_K", (130, 2048)), drawn(16, 2048)
    together = quantized_argmax(x, weight)
    for first, last in ((0, 1), (15, 16), (3, 8), (5, 16)):
        assert torch.equal(quantized_argmax(x[first:last], weight), together[first:last])
    assert quantized_argmax(x[:0], weight).shape == (0,)


# A residual ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 416), (200, 64), (33, 2304)])
def test_a_residual_is_added_before_the_one_rounding(shape, dtype):
    weight = random_weight("Q4_0", shape)
    for rows in (1, 8, 11):
        x, residual = drawn(rows, shape[1], dtype=dtype), drawn(rows, shape[0], dtype=dtype, seed=2)
        assert_linear(x, weight, residual=residual)
        assert_linear(x, weight, drawn(shape[0], dtype=torch.float32, seed=3), residual=residual)


def test_a_residual_is_added_to_what_has_not_been_rounded():
    """256.75 - 256 is 0.75, where a bf16 of 256.75 is 256 or 258."""
    weight = QuantizedWeight.quantize(torch.ones(64, 32), "Q4_0")
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, :2] = torch.tensor([256, 0.75])
    residual = torch.full((1, 64), -256.0, dtype=torch.bfloat16)
    assert quantized_linear(x, weight, residual=residual).tolist() == [[0.75] * 64]
    assert quantized_linear(x, weight, torch.full((64,), 0.25), residual=residual).tolist() == [[1.0] * 64]


def test_strides_of_a_residual():
    weight, x = random_weight("Q4_0", (70, 160)), drawn(2, 3, 160)
    residual = drawn(2, 6, 100, seed=2)[:, ::2, 11:81]
    got = quantized_linear(x, weight, residual=residual)
    assert got.shape == (2, 3, 70)
    assert torch.equal(got, quantized_linear(x, weight, residual=residual.contiguous()))
    same = residual[:1, :1].expand(2, 3, 70)
    assert torch.equal(quantized_linear(x, weight, residual=same), quantized_linear(x, weight, residual=same.clone()))


# One stream for q, k and v ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["Q4_0", "Q4_K", "W4A16"])
def test_q_k_and_v_as_one_weight_have_the_bits_of_three(scheme):
    """Where K is not cut, or cut alike, an output does not know what stands beside it."""
    parts = [random_weight(scheme, (N, 768), seed=N) for N in (128, 64, 64)]
    whole, x = QuantizedWeight.concatenate(parts, name="qkv"), drawn(5, 768)
    assert torch.equal(quantized_linear(x, whole), torch.cat([quantized_linear(x, part) for part in parts], dim=1))


# The list of cases, and what is refused -----------------------------------------------------------------------------

SERVED_CASES = [
    case
    for case in linear_cases()
    if case.op in ("quantized_geglu", "quantized_argmax")
    and case.scheme in cuda.SERVED
    and case.m <= cuda.MOST_ROWS
    and case.dtype != "fp32"
]


@pytest.mark.parametrize("case", SERVED_CASES, ids=str)
def test_a_case_keeps_the_error_rule(case):
    (check,) = validation.check_case(case, ["cuda"], torch.device("cpu"))
    assert check.status == "held", check.reasons


def test_two_weights_that_no_kernel_reads_at_once_have_a_reason():
    gate, x = random_weight("Q4_0"), drawn(2, 160)
    for up in (
        random_weight("Q4_1"),
        random_weight("NF4"),
        replace(random_weight("GPTQ"), columns=torch.arange(160).int()),
    ):
        said = explain("quantized_geglu", x=x, gate=gate, up=up)
        assert said.taken is None
        with pytest.raises(BackendError, match="does not support gate and up of different schemes"):
            quantized_geglu(x, gate, up)
        with use_backend("auto"):
            assert explain("quantized_geglu", x=x, gate=gate, up=up).taken == "eager"
    assert explain("quantized_geglu", x=x, gate=gate, up=random_weight("Q4_0", seed=1)).taken == "cuda"


def test_what_no_kernel_serves_has_a_reason():
    for call in (quantized_argmax, lambda x, weight: quantized_geglu(x, weight, weight)):
        for reason, scheme, rows, dtype in (
            ("goes to 16 rows", "Q4_0", 17, torch.bfloat16),
            ("not float32", "Q4_0", 1, torch.float32),
        ):
            weight = random_weight(scheme, (70, 512))
            with pytest.raises(BackendError, match=reason):
                call(drawn(rows, 512, dtype=dtype), weight)
    assert explain("quantized_argmax", x=drawn(1, 160), weight=random_weight("Q4_0")).taken == "cuda"
