"""Quantised products in Triton's interpreter: every scheme, few rows and many, pieces of K, permuted columns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_weights import random_weight
from torch.nn.functional import linear as dense_linear

from gemma4_kernels import QuantizedWeight, environment
from gemma4_kernels.bench.errors import judge
from gemma4_kernels.linear.schemes import SCHEMES

pytest.importorskip("triton")
if not environment.triton_interprets():
    pytest.skip("needs TRITON_INTERPRET=1; `make test` runs it in a second process", allow_module_level=True)

from gemma4_kernels.linear.triton import backend, linear, tables

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def drawn(rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_product(weight, x, bias=None, residual=None):
    got = backend.quantized_linear(x, weight, bias, residual)
    exact = dense_linear(x.double(), weight.dequantize(torch.float32).double(), None if bias is None else bias.double())
    plain = dense_linear(x, weight.dequantize(x.dtype), bias)
    if residual is not None:
        exact, plain = exact + residual.double(), plain + residual
    assert got.dtype == x.dtype
    assert (verdict := judge(got, exact, plain)).ok, str(verdict)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_scheme_keeps_the_error_rule(scheme, dtype):
    weight = random_weight(scheme)
    for rows in (1, 5, 17):
        bias = drawn(1, weight.shape[0], dtype, seed=2)[0]
        assert_product(weight, drawn(rows, weight.shape[1], dtype), bias if rows == 5 else None)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_in_registers_are_the_values_of_the_weight(scheme):
    """Bit for bit, in every dtype that a product may want."""
    weight = random_weight(scheme)
    for dtype in DTYPES:
        out = torch.empty(weight.shape, dtype=dtype)
        linear.plan_dequantize(weight, out).run()
        assert torch.equal(out, weight.dequantize(dtype))


@pytest.mark.parametrize("group", [32, 64, 160])
def test_groups_of_any_size(group):
    weight = random_weight("W4A16", (40, 320), group)
    assert_product(weight, drawn(3, 320, torch.bfloat16))


def test_pieces_of_k():
    """A narrow weight of many columns is cut along K, the last piece shorter; the pieces and the bias are added in fp32."""
    weight = random_weight("Q4_0", (40, 128 * 35 + 32))
    config = tables.lookup(4, 40, torch.bfloat16)
    assert tables.splits(40, weight.shape[1], config, 28) == 4
    for rows in (1, 4):
        assert_product(weight, drawn(rows, weight.shape[1], torch.bfloat16), drawn(1, 40, torch.bfloat16)[0])


@pytest.mark.parametrize("columns", [160, 128 * 35 + 32])
def test_a_residual(columns):
    """In one launch, after the pieces of K, and on a weight that is written out; its rows may lie apart."""
    weight = random_weight("Q4_0", (40, columns))
    ones = QuantizedWeight.quantize(torch.ones(40, columns), "Q4_0")
    for dtype in DTYPES:
        x = torch.zeros(1, columns, dtype=dtype)
        x[:, :2] = torch.tensor([256, 0.75])  # a bf16 of their sum is 256 or 258
        got = backend.quantized_linear(x, ones, None, torch.full((1, 40), -256.0, dtype=dtype))
        assert torch.equal(got, torch.full((1, 40), 0.75, dtype=dtype))
    for dtype in DTYPES[:2]:  # in fp32 it is the order of sums that is judged, elsewhere
        for rows in (3, tables.dequantize_from_rows(40, columns, 28)) if columns == 160 else (3,):
            residual = drawn(rows, 50, dtype, seed=2)[:, :40]
            assert_product(weight, drawn(rows, columns, dtype), drawn(1, 40, dtype, seed=3)[0], residual)


def test_one_binary_serves_1_to_16_rows():
    """What a row goes through does not depend on how many there are."""
    weight = random_weight("Q4_0", (40, 128 * 35 + 32))
    plans = []
    for rows in range(1, 17):
        x, out = drawn(rows, weight.shape[1], torch.bfloat16), torch.empty(rows, 40, dtype=torch.bfloat16)
        plans.append(
            [(launch.kernel, launch.constants, launch.num_warps) for launch in linear.plan(x, weight, None, out, 28)]
        )
    assert all(plan == plans[0] for plan in plans)


def test_a_row_keeps_its_bits_among_others():
    weight = random_weight("Q4_K", (40, 2048))
    x = drawn(16, 2048, torch.bfloat16)
    together = backend.quantized_linear(x, weight, None)
    for row in (0, 7, 15):
        assert torch.equal(backend.quantized_linear(x[row : row + 1], weight, None)[0], together[row])


def test_columns_in_another_order():
    order = torch.randperm(160, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    weight = replace(random_weight("GPTQ"), columns=order)
    assert_product(weight, drawn(3, 160, torch.float16))


def test_many_rows_take_the_weight_written_out(monkeypatch):
    monkeypatch.setattr(tables, "dequantize_from_rows", lambda outputs, columns, multiprocessors: 20)
    ran = []
    monkeypatch.setattr(linear, "plan", lambda *arguments: ran.append("tiles"))
    assert_product(random_weight("Q6_K"), drawn(20, 512, torch.bfloat16), drawn(1, 70, torch.bfloat16)[0])
    assert not ran


def test_rows_of_a_larger_tensor():
    x = drawn(8, 320, torch.bfloat16)
    assert_product(random_weight("Q4_1"), x[::2, 100:260])


def test_what_lies_behind_the_weight_is_not_read():
    weight = random_weight("Q4_1")
    padded = {name: torch.cat((tensor, torch.full_like(tensor[:8], float("nan") if tensor.is_floating_point() else -1)))
              for name, tensor in weight.tensors().items()}  # fmt: skip
    guarded = replace(weight, **{name: tensor[:70] for name, tensor in padded.items()})
    x = drawn(3, 160, torch.bfloat16)
    assert torch.equal(backend.quantized_linear(x, guarded, None), backend.quantized_linear(x, weight, None))


@pytest.mark.parametrize("bias", [drawn(1, 140, torch.bfloat16)[0][::2], drawn(1, 1, torch.bfloat16)[0].expand(70)])
def test_a_bias_with_strides(bias):
    weight = random_weight("Q4_0")
    assert_product(weight, drawn(3, weight.shape[1], torch.bfloat16), bias)
