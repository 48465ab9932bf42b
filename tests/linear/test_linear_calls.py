"""The functions on quantised weights, on the eager backend: values, row bits, memory, arguments, torch.library."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_products import assert_linear, drawn
from linear_weights import random_weight
from torch.nn.functional import gelu, linear
from torch.utils._python_dispatch import TorchDispatchMode

from gemma4_kernels import (
    BackendError,
    DeviceError,
    DTypeError,
    QuantizedWeight,
    ShapeError,
    StrideError,
    explain,
    quantized_argmax,
    quantized_embedding,
    quantized_geglu,
    quantized_linear,
    use_backend,
)
from gemma4_kernels.bench.errors import judge
from gemma4_kernels.linear import eager, eager_int4, ops
from gemma4_kernels.linear.schemes import SCHEMES

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _eager():
    with use_backend("eager"):
        yield


def geglu(x, gate, up, dtype):
    gated, passed = (linear(x.to(dtype), w.dequantize(torch.float32).to(dtype)) for w in (gate, up))
    return gelu(gated, approximate="tanh") * passed


def for_int4(scheme: str, scale_dtype: torch.dtype | None = None, group: int = 32) -> QuantizedWeight:
    """A weight whose scales PyTorch's own 4-bit product can hold."""
    weight = random_weight(scheme, (80, 320), group)
    if scale_dtype is not None:
        scales = {
            name: getattr(weight, name).to(scale_dtype)
            for name in ("scales", "offsets")
            if weight.tensors().get(name) is not None
        }
        weight = replace(weight, **scales)
    return weight


INT4 = [
    for_int4("W4A16", torch.bfloat16), for_int4("W4A16", torch.bfloat16, 64), for_int4("W4A16", torch.float16),
    for_int4("Q4_0"), for_int4("GPTQ", torch.bfloat16), for_int4("AWQ", torch.float16),
]  # fmt: skip
INT4_IDS = [f"{w.scheme}-{w.scales.dtype}-{w.group_size}" for w in INT4]


# Values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_scheme_keeps_the_error_rule(scheme, dtype):
    weight = random_weight(scheme)
    for rows in (1, 5, 16, 17, 70):
        bias = drawn(weight.shape[0], dtype=dtype, seed=2) if rows == 5 else None
        assert_linear(drawn(rows, weight.shape[1], dtype=dtype), weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_is_added_in_fp32(dtype):
    """Where PyTorch's own 4-bit product would round first, too."""
    for weight in (random_weight("Q4_K"), for_int4("Q4_0")):
        for rows in (1, 16, 40):
            x, residual = (drawn(rows, size, dtype=dtype, seed=size) for size in (weight.shape[1], weight.shape[0]))
            assert_linear(x, weight, residual=residual)
            assert_linear(x, weight, drawn(weight.shape[0], seed=3).to(dtype), residual)
    x = torch.zeros(2, 3, 320, dtype=dtype)
    x[..., :2] = torch.tensor([256, 0.75])
    ones = QuantizedWeight.quantize(torch.ones(64, 320), "Q4_0")
    got = quantized_linear(x, ones, residual=torch.full((2, 1, 64), -256.0, dtype=dtype).expand(2, 3, 64))
    assert torch.equal(got, torch.full((2, 3, 64), 0.75, dtype=dtype))


@pytest.mark.parametrize("weight", INT4, ids=INT4_IDS)
def test_torch_int4_makes_the_very_weights(weight):
    """Multiplied with a row of the identity it gives a column of the weight, rounded once for each product."""
    x = torch.eye(320, dtype=torch.bfloat16)
    assert eager_int4.refusal(x[:1], weight) is None
    packed = eager_int4.find(weight)
    got = eager_int4.product(x, weight).T
    if len(packed.scales_and_zeros) == 1:
        assert torch.equal(got, weight.dequantize(torch.bfloat16))
    else:
        rest = weight.dequantize(torch.float32) - got.float()
        assert bool((rest.abs() <= 2**-7 * got.float().abs()).all())  # half a unit in the last place, twice
        scale, zero = (sum(part.double()[:, :, i] for part in packed.scales_and_zeros).T for i in (0, 1))
        codes = weight.unpacked_codes().view(80, -1, weight.group_size).double() - 8
        exact = (codes * scale[:, :, None] + zero[:, :, None]).flatten(1)
        assert torch.equal(exact, weight.dequantize(torch.float32).double())


@pytest.mark.parametrize("weight", INT4, ids=INT4_IDS)
def test_torch_int4_keeps_the_error_rule_and_the_bits_of_a_row(weight):
    x = drawn(16, 320)
    together = quantized_linear(x, weight)
    for rows in range(1, 17):
        assert_linear(x[:rows], weight)
        assert torch.equal(quantized_linear(x[:rows], weight), together[:rows])
    assert torch.equal(quantized_linear(x.flip(0), weight).flip(0), together)


def test_torch_int4_is_left_where_it_is_not_exact_or_slow():
    weight, x = for_int4("W4A16", torch.bfloat16), drawn(1, 320)
    assert eager_int4.refusal(x, weight) is None
    assert "float32" in eager_int4.refusal(x.float(), weight)
    assert "bias" in eager_int4.refusal(x, weight, has_addend=True)
    assert "rows" in eager_int4.refusal(drawn(200, 320), weight)
    assert "exactly" in eager_int4.refusal(x, replace(weight, scales=drawn(80, 10, dtype=torch.float32)))
    nineteen_bits = torch.full((80, 10), 1 + 2**-9 + 2**-18)
    assert "exactly" in eager_int4.refusal(x, replace(weight, scales=nineteen_bits))
    assert "groups" in eager_int4.refusal(x, for_int4("W4A16", torch.bfloat16, 160))
    assert "outputs" in eager_int4.refusal(x, random_weight("W4A16", (70, 320)))
    for scheme in ("NF4", "Q5_0", "Q8_0"):
        assert "values" in eager_int4.refusal(drawn(1, 160), random_weight(scheme))


def test_torch_int4_takes_offsets_that_it_can_hold():
    weight = for_int4("Q4_1")
    on_a_grid = replace(
        weight, scales=torch.full_like(weight.scales, 0.25), offsets=(weight.offsets * 8).round().div(8)
    )
    assert eager_int4.refusal(drawn(1, 320), on_a_grid) is None
    assert_linear(drawn(3, 320), on_a_grid)


def test_codes_changed_in_place_are_packed_again():
    weight, x = for_int4("W4A16", torch.bfloat16), drawn(1, 320)
    before = quantized_linear(x, weight)
    weight.codes.bitwise_not_()
    assert not torch.equal(quantized_linear(x, weight), before)
    assert_linear(x, weight)
    assert_linear(x, replace(weight, scales=weight.scales * 2))
    weight.scales.mul_(4)
    assert_linear(x, weight)


def test_inference_tensors():
    with torch.inference_mode():
        assert_linear(drawn(2, 320), for_int4("W4A16", torch.bfloat16))


def test_a_packed_copy_goes_with_its_weight():
    weight, before = for_int4("W4A16", torch.bfloat16), len(eager_int4._packed)
    quantized_linear(drawn(1, 320), weight)
    assert len(eager_int4._packed) == before + 1
    del weight
    assert len(eager_int4._packed) == before


def test_the_copy_can_be_forbidden(monkeypatch):
    monkeypatch.setenv("GEMMA4_PACKED_COPIES", "0")
    weight, x = for_int4("W4A16", torch.bfloat16), drawn(2, 320)
    assert "GEMMA4_PACKED_COPIES" in eager_int4.refusal(x, weight)
    assert_linear(x, weight)
    assert weight.codes not in eager_int4._packed


@pytest.mark.parametrize("scheme", ["Q4_K", "NF4_NESTED", "Q8_0"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_keeps_its_bits_among_others(scheme, dtype):
    weight = random_weight(scheme, (70, 1280))
    x = drawn(16, 1280, dtype=dtype)
    together, gated = quantized_linear(x, weight), quantized_geglu(x, weight, weight)
    for rows in (1, 2, 7):
        few = x[9 : 9 + rows]
        assert torch.equal(quantized_linear(few, weight), together[9 : 9 + rows])
        assert torch.equal(quantized_geglu(few, weight, weight), gated[9 : 9 + rows])
    others = x.clone()
    others[1:] = float("nan")
    assert torch.equal(quantized_linear(others, weight)[0], together[0])


def test_columns_in_another_order():
    order = torch.randperm(320, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    for weight in (replace(for_int4("GPTQ", torch.bfloat16), columns=order), replace(for_int4("NF4"), columns=order)):
        for rows in (3, 40):
            assert_linear(drawn(rows, 320), weight)


def test_leading_dims_and_rows_of_a_larger_tensor():
    weight = random_weight("Q5_1")
    x = drawn(2, 6, 300)[:, ::2, 100:260]
    got = quantized_linear(x, weight)
    assert got.shape == (2, 3, 70)
    assert torch.equal(got.view(6, 70), quantized_linear(x.reshape(6, 160).contiguous(), weight))
    assert quantized_linear(x[0, 0], weight).shape == (70,)
    assert quantized_linear(x[:0], weight).shape == (0, 3, 70)


@pytest.mark.parametrize("scheme", ["W4A16", "Q4_K", "MXFP4"])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_geglu(scheme, rows):
    gate, up = (random_weight(scheme, seed=seed) for seed in (0, 1))
    # In fp32 and near zero gelu's two forms differ by more than the rule allows.
    for x in (drawn(rows, gate.shape[1]), 0.01 * drawn(rows, gate.shape[1], dtype=torch.float32)):
        got = quantized_geglu(x, gate, up)
        verdict = judge(got, geglu(x, gate, up, torch.float64), geglu(x, gate, up, x.dtype))
        assert verdict.ok, str(verdict)


def test_geglu_of_two_schemes_and_of_packed_weights():
    x = drawn(3, 320)
    for gate, up in ((for_int4("Q4_0"), for_int4("GPTQ", torch.bfloat16)), (for_int4("Q4_0"), for_int4("NF4"))):
        got = quantized_geglu(x, gate, up)
        verdict = judge(got, geglu(x, gate, up, torch.float64), geglu(x, gate, up, torch.bfloat16))
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax_is_that_of_the_logits(dtype, monkeypatch):
    monkeypatch.setattr(eager, "_ARGMAX_ROWS", 4)
    weight = random_weight("Q6_K")
    x = drawn(7, weight.shape[1], dtype=dtype)
    expected = quantized_linear(x, weight).argmax(-1)
    assert torch.equal(quantized_argmax(x, weight), expected)
    x[2] = 0  # all equal
    x[5, 3] = float("nan")
    got = quantized_argmax(x.view(7, 1, -1), weight)
    assert got.shape == (7, 1)
    expected[2], expected[5] = 0, -1
    assert torch.equal(got[:, 0], expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_embedding_is_a_row_of_the_weight(scheme):
    weight = random_weight(scheme)
    if scheme == "GPTQ":
        weight = replace(weight, columns=torch.randperm(weight.shape[1]).to(torch.int32))
    ids = torch.tensor([[3, 69, 0], [3, 1, 30]])
    for dtype in DTYPES:
        assert torch.equal(quantized_embedding(ids, weight, dtype), weight.dequantize(dtype)[ids])
    assert quantized_embedding(ids.int(), weight).dtype == torch.bfloat16
    assert quantized_embedding(ids[:0], weight).shape == (0, 3, weight.shape[1])


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("rows", [1, 40])
def test_no_whole_dequantised_matrix(rows):
    weight = random_weight("Q4_K", (6000, 1024))
    with Largest() as largest:
        eager.quantized_linear(drawn(rows, 1024), weight, None)
    assert 2**19 <= largest.elements <= 2**22  # the weight has 6.1 million values


# Arguments ----------------------------------------------------------------------------------------------------------

WEIGHT = random_weight("Q4_0")
X = drawn(3, 160)
BAD = {
    "x of another dtype": (DTypeError, "x must be", lambda: quantized_linear(X.double(), WEIGHT)),
    "x of integers": (DTypeError, "x must be", lambda: quantized_linear(X.int(), WEIGHT)),
    "x is no tensor": (TypeError, "x must be a tensor", lambda: quantized_linear([1.0], WEIGHT)),
    "x of other columns": (ShapeError, r"x must have shape \(\.\.\., 160\)", lambda: quantized_linear(X[:, :128], WEIGHT)),
    "x without dims": (ShapeError, "x must have shape", lambda: quantized_linear(X[0, 0], WEIGHT)),
    "x with strides": (StrideError, "x must be dense", lambda: quantized_linear(drawn(160, 3).T, WEIGHT)),
    "a dense weight": (TypeError, "weight must be a QuantizedWeight", lambda: quantized_linear(X, drawn(70, 160))),
    "a weight elsewhere": (DeviceError, "weight must be on cpu", lambda: quantized_linear(X, WEIGHT.to("meta"))),
    "a bias of another size": (ShapeError, r"bias must have shape \(70\)", lambda: quantized_linear(X, WEIGHT, X[0])),
    "a bias of integers": (DTypeError, "bias must be", lambda: quantized_linear(X, WEIGHT, torch.ones(70).int())),
    "a residual of another size": (
        ShapeError, r"residual must have shape \(3, 70\), got \(70\)", lambda: quantized_linear(X, WEIGHT, residual=X[0, :70])
    ),
    "a residual of another dtype": (
        DTypeError, "residual must be bfloat16", lambda: quantized_linear(X, WEIGHT, residual=X[:, :70].float())
    ),
    "a residual with strides": (
        StrideError, "residual must be dense", lambda: quantized_linear(X, WEIGHT, residual=drawn(70, 3).T)
    ),
    "a residual elsewhere": (
        DeviceError, "residual must be on cpu", lambda: quantized_linear(X, WEIGHT, residual=X[:, :70].to("meta"))
    ),
    "up of another shape": (
        ShapeError, r"up must have shape \(70, 160\)", lambda: quantized_geglu(X, WEIGHT, random_weight("Q4_0", (71, 160)))
    ),
    "up of other columns": (ShapeError, "for up", lambda: quantized_geglu(X, WEIGHT, random_weight("Q4_0", (70, 192)))),
    "a head of other columns": (ShapeError, "x must", lambda: quantized_argmax(X[:, :128], WEIGHT)),
    "ids of floats": (DTypeError, "token_ids must be", lambda: quantized_embedding(X, WEIGHT)),
    "an id too large": (ValueError, r"\[0, 69\], got 70", lambda: quantized_embedding(torch.tensor([70]), WEIGHT)),
    "an id below zero": (ValueError, "got -1", lambda: quantized_embedding(torch.tensor([0, -1]), WEIGHT)),
    "an embedding in fp64": (
        DTypeError, "dtype must be", lambda: quantized_embedding(torch.tensor([0]), WEIGHT, torch.float64)
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    error, text, call = BAD[what]
    with pytest.raises(error, match=text):
        call()


def test_an_id_out_of_range_gives_nan_where_nobody_looked():
    got = eager.quantized_embedding(torch.tensor([70, -1, 3]), WEIGHT, torch.float32)
    assert bool(got[:2].isnan().all())
    assert torch.equal(got[2], WEIGHT.dequantize()[3])


def test_a_backend_asked_for_by_name_is_not_replaced():
    with use_backend("cuda"), pytest.raises(BackendError, match="runs on cuda, not on cpu"):
        quantized_linear(X, WEIGHT)
    with use_backend("cuda"), pytest.raises(BackendError, match="runs on cuda, not on cpu"):
        quantized_embedding(torch.tensor([1]), WEIGHT)


def test_explain_says_which_kernel_of_torch():
    packed = explain("quantized_linear", x=drawn(1, 320), weight=for_int4("Q4_0"))
    assert packed.taken == "eager"
    assert "PyTorch's own 4-bit kernel, on a packed copy" in str(packed)
    assert "has no values like those of NF4" in str(explain("quantized_argmax", x=X, weight=random_weight("NF4")))
    assert explain("quantized_embedding", token_ids=torch.tensor([1]), weight=WEIGHT).taken == "eager"
    assert explain("quantized_geglu", x=X, gate=WEIGHT, up=WEIGHT).taken == "eager"


# torch.library ------------------------------------------------------------------------------------------------------


def calls():
    weight = ops.weight_arguments(WEIGHT)
    yield "quantized_linear", (X, *weight, None, None)
    yield "quantized_linear", (X.float(), *ops.weight_arguments(random_weight("Q4_1")), drawn(70), None)
    yield "quantized_linear", (X, *weight, drawn(70), drawn(3, 70))
    yield "quantized_geglu", (X, *weight, *ops.weight_arguments(random_weight("NF4")))
    yield "quantized_argmax", (X, *weight)
    yield "quantized_embedding", (torch.tensor([1, 5]), *weight, torch.float16)


@pytest.mark.parametrize(("op", "arguments"), list(calls()))
def test_opcheck(op, arguments):
    torch.library.opcheck(getattr(torch.ops.gemma4_kernels, op).default, arguments)


def test_compiled_as_one_graph():
    weight = random_weight("Q4_K")
    embedding = random_weight("Q4_0")

    def step(ids, x):
        hidden = quantized_embedding(ids, embedding, x.dtype).repeat(1, 4)[:, :512] + x
        hidden = quantized_linear(hidden, weight) * quantized_geglu(hidden, weight, weight)
        return hidden, quantized_argmax(x, weight)

    ids, x = torch.tensor([1, 2, 69]), drawn(3, 512)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(ids, x), step(ids, x), strict=True):
        assert torch.equal(got, expected)


def test_no_gradient_flows_back():
    x = drawn(2, 160, dtype=torch.float32).requires_grad_()
    out = quantized_linear(x, WEIGHT)
    with pytest.raises(NotImplementedError, match="inference"):
        out.sum().backward()


def test_autocast_changes_nothing():
    x = drawn(3, 160, dtype=torch.float32)
    expected = quantized_linear(x, WEIGHT)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantized_linear(x, WEIGHT), expected)
