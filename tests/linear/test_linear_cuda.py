"""The compiled products on the emulator: values, row bits, strides and ragged sizes; what they refuse, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated import DTYPES, _emulate, needs_emulator  # noqa: F401
from linear_products import assert_linear, cancelling, drawn
from linear_weights import random_weight

from gemma4_kernels import BackendError, backends, explain, quantized_linear, use_backend
from gemma4_kernels.backends import Call
from gemma4_kernels.bench import validation
from gemma4_kernels.bench.linear_cases import linear_cases
from gemma4_kernels.cuda_common import support
from gemma4_kernels.linear import cuda
from gemma4_kernels.linear.schemes import SCHEMES

# Values -------------------------------------------------------------------------------------------------------------


@needs_emulator
@pytest.mark.parametrize("rows", range(1, 17))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", cuda.SERVED)
def test_every_scheme_and_number_of_rows_keeps_the_error_rule(scheme, dtype, rows):
    columns = 768 if SCHEMES[scheme].scales in ("six_bit", "int8") else 416
    weight = random_weight(scheme, (70, columns))
    bias = drawn(70, dtype=(torch.float32, *DTYPES)[rows % 3], seed=2) if rows % 2 else None
    assert_linear(drawn(rows, columns, dtype=dtype), weight, bias)


@needs_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["Q4_0", "W4A16_ASYM", "Q5_0", "Q6_K", "Q8_0"])
def test_every_code_in_every_column_is_its_value(scheme, dtype):
    """x picks one column a time, so a product is one value of the weight and must be it, rounded once."""
    columns = 256 if scheme == "Q6_K" else 160
    weight = random_weight(scheme, (256, columns))
    values = weight.dequantize(dtype)
    for first in range(0, columns, 16):
        x = torch.eye(columns, dtype=dtype)[first : first + 16]
        assert torch.equal(quantized_linear(x, weight), values[:, first : first + 16].T)


@needs_emulator
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("scheme", "group"),
    [
        *(("W4A16", group) for group in (32, 64, 96, 128, 384)),
        *(("AWQ", group) for group in (32, 96, 128)),
        ("MLX", 32),
        ("MLX", 64),
        ("MLX", 128),
    ],
)
def test_groups_and_scales_of_every_kind(scheme, group, scale_dtype):
    weight = random_weight(scheme, (33, 1152), group)
    changed = {
        name: getattr(weight, name).to(scale_dtype) for name in ("scales", "offsets") if name in weight.tensors()
    }
    assert_linear(drawn(3, 1152), replace(weight, **changed))


@needs_emulator
@pytest.mark.parametrize("group", [32, 96, 1152])
def test_nested_scales_whose_outer_numbers_serve_parts_of_rows(group):
    weight = random_weight("NF4_NESTED", (97, 1152), group)
    assert_linear(drawn(3, 1152), weight)


@needs_emulator
@pytest.mark.parametrize("shape", [(1, 32), (64, 256), (65, 288), (129, 512), (16, 2048), (40, 4512), (70, 3840)])
@pytest.mark.parametrize("scheme", ["Q4_0", "Q5_0", "Q8_0"])
def test_ragged_sizes_and_cut_columns(scheme, shape):
    for rows in (1, 9):
        assert_linear(drawn(rows, shape[1]), random_weight(scheme, shape))


@needs_emulator
@pytest.mark.parametrize("scheme", ["Q5_1", "Q5_K", "Q6_K", "NF4_NESTED"])
def test_ragged_outputs_and_cut_columns(scheme):
    for shape in ((1, 256), (65, 2304), (16, 3840)):
        assert_linear(drawn(9, shape[1]), random_weight(scheme, shape))


@needs_emulator
def test_zero_points_of_every_value():
    weight = random_weight("GPTQ", (17, 320))
    zeros = torch.arange(17, dtype=torch.uint8)[:, None].repeat(1, 10)
    for dtype in DTYPES:
        assert_linear(drawn(4, 320, dtype=dtype), replace(weight, zeros=zeros))


@needs_emulator
def test_columns_in_another_order_and_rows_of_a_larger_tensor():
    order = torch.randperm(320, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    assert_linear(drawn(3, 320), replace(random_weight("GPTQ", (70, 320)), columns=order))
    weight = random_weight("Q4_0", (70, 160))
    x = drawn(2, 6, 300)
    for part in (x[:, ::2, 100:260], x[:1, 1, 3:163], x[0, :, 64:224], x[:, 0, :160].expand(2, 160)):
        got = quantized_linear(part, weight)
        assert torch.equal(got, quantized_linear(part.contiguous(), weight))
    assert quantized_linear(x[0, :0, :160], weight).shape == (0, 70)


@needs_emulator
def test_special_numbers_stay_in_their_row():
    weight, x = random_weight("Q4_0", (70, 288)), drawn(5, 288)
    expected = quantized_linear(x, weight)
    x[1, 7], x[3, 287] = float("nan"), float("inf")
    got = quantized_linear(x, weight)
    assert bool(got[1].isnan().all())
    assert not bool(got[3].isfinite().any())
    assert torch.equal(got[[0, 2, 4]], expected[[0, 2, 4]])


# Bits ---------------------------------------------------------------------------------------------------------------


@needs_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("scheme", "shape"),
    [
        ("Q4_0", (70, 4512)), ("W4A16", (200, 640)), ("AWQ", (33, 2304)), ("Q4_K", (40, 2304)), ("NF4", (70, 640)),
        ("NF4_NESTED", (70, 640)), ("Q5_0", (33, 2080)), ("Q5_K", (40, 2304)), ("Q6_K", (70, 2304)), ("Q8_0", (70, 2080)),
    ],
)  # fmt: skip
def test_a_row_keeps_its_bits_among_others(scheme, shape, dtype):
    weight, x = cancelling(scheme, shape, 16, dtype)
    together = quantized_linear(x, weight)
    assert bool(together.count_nonzero() > together.numel() / 2)
    for first, last in ((0, 1), (9, 10), (15, 16), (3, 8), (2, 10), (5, 16)):
        assert torch.equal(quantized_linear(x[first:last], weight), together[first:last])
    assert torch.equal(quantized_linear(x.flip(0), weight).flip(0), together)
    others = x.clone()
    others[:4] = float("nan")
    assert torch.equal(quantized_linear(others, weight)[4:], together[4:])


# The list of cases --------------------------------------------------------------------------------------------------

SERVED_CASES = [
    case
    for case in linear_cases()
    if case.op == "quantized_linear"
    and case.scheme in cuda.SERVED
    and case.m <= cuda.MOST_ROWS
    and case.dtype != "fp32"
]


@needs_emulator
@pytest.mark.parametrize("case", SERVED_CASES, ids=str)
def test_a_case_keeps_the_error_rule(case):
    (check,) = validation.check_case(case, ["cuda"], torch.device("cpu"))
    assert check.status == "held", check.reasons


# What is refused ----------------------------------------------------------------------------------------------------


@needs_emulator
@pytest.mark.parametrize(
    ("reason", "scheme", "group", "rows", "dtype"),
    [
        ("multiple of 32 columns, the weight has 16", "W4A16", 16, 1, torch.bfloat16),
        ("goes to 16 rows", "Q4_0", 32, 17, torch.bfloat16),
        ("takes bfloat16, float16, not float32", "Q4_0", 32, 1, torch.float32),
    ],
)
def test_what_no_kernel_serves_has_a_reason(reason, scheme, group, rows, dtype):
    weight = random_weight(scheme, (70, 512), group)
    with pytest.raises(BackendError, match=reason):
        quantized_linear(drawn(rows, 512, dtype=dtype), weight)


@needs_emulator
def test_a_scheme_that_is_not_in_the_table_has_a_reason(monkeypatch):
    monkeypatch.delitem(cuda.SERVED, "Q6_K")
    with pytest.raises(BackendError, match=r"reads Q4_0, W4A16, .*, not Q6_K"):
        quantized_linear(drawn(1, 512), random_weight("Q6_K", (70, 512)))


def call(architecture: str) -> Call:
    return Call("quantized_linear", "cuda", architecture, scheme="Q4_0", group_size=32, shape_class="decode, Q4_0")


class Module:
    """A compiled module of another machine."""

    def __init__(self, architectures: str, problem: str | None = None):
        self.architectures = lambda: architectures
        self.driver_problem = lambda: problem


@pytest.mark.parametrize(
    ("module", "architecture", "reason"),
    [
        (Module("80 86 89 90 120"), "sm_86", None),
        (Module("80 86 89 90 120"), "sm_87", None),
        (Module("80 86 89 90 120"), "sm_100", None),
        (Module("80 86 89 90 120"), "sm_121", None),
        (Module("80 86 89 90 120"), "sm_75", "needs sm_80 or newer, this is sm_75"),
        (Module("89"), "sm_86", "was built for sm_89, not for sm_86"),
        (Module("89"), "sm_120", None),
        (Module("86"), "sm_86", None),
        (Module("86", "the driver knows CUDA up to 12.4"), "sm_86", "the driver knows CUDA up to 12.4"),
        ("gemma4_kernels._C is not built", "sm_86", "gemma4_kernels._C is not built"),
    ],
)  # fmt: skip
def test_a_module_that_does_not_fit_is_a_reason(module, architecture, reason, monkeypatch):
    monkeypatch.setattr(support, "_load", lambda name: module)
    support._driver_problem.cache_clear()
    assert cuda.refuses(call(architecture)) == reason
    support._driver_problem.cache_clear()


def test_a_module_that_does_not_load_is_a_reason(monkeypatch):
    assert "is not built" in support._load.__wrapped__("_C_of_nobody")
    monkeypatch.setattr(support, "find_spec", lambda name: object())
    assert "does not load: ModuleNotFoundError" in support._load.__wrapped__("_C_of_nobody")
    monkeypatch.setattr(support.importlib, "import_module", lambda name: type("Old", (), {"abi_version": lambda: 0}))
    assert "of another version" in support._load.__wrapped__("_C_old")


def test_the_emulator_runs_only_where_it_is_asked_for(monkeypatch):
    x, weight = drawn(1, 160), random_weight("Q4_0")
    with use_backend("auto"):
        assert explain("quantized_linear", x=x, weight=weight).taken == "eager"
    monkeypatch.delenv("GEMMA4_EMULATE")
    backends._select.cache_clear()
    with pytest.raises(BackendError, match="GEMMA4_EMULATE=1"):
        quantized_linear(drawn(2, 160, seed=9), weight)


def test_the_table_names_every_scheme():
    assert cuda.SERVED.keys() == SCHEMES.keys()
    assert all(layout.values in cuda._VALUES and layout.scales in cuda._SCALES for layout in SCHEMES.values())
