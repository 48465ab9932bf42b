"""Rows of a quantised weight by token id, compiled, on the emulator: bits, far ids, bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated import _emulate, needs_emulator  # noqa: F401
from linear_weights import random_weight

from gemma4_kernels import BackendError, explain, quantized_embedding
from gemma4_kernels.bench import validation
from gemma4_kernels.bench.guards import GuardedInputs
from gemma4_kernels.bench.linear_cases import linear_cases
from gemma4_kernels.linear import cuda
from gemma4_kernels.linear.ops import DTYPES
from gemma4_kernels.linear.schemes import SCHEMES

pytestmark = needs_emulator
schemes = pytest.mark.parametrize("scheme", cuda.SERVED)


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Of numbers, with the sign of zero; one NaN is like another."""
    assert got.dtype == want.dtype
    integers = torch.int32 if got.dtype == torch.float32 else torch.int16
    return bool(((got.view(integers) == want.view(integers)) | (got.isnan() & want.isnan())).all())


def test_every_scheme_has_a_kernel():
    assert cuda.SERVED.keys() == SCHEMES.keys()


@schemes
def test_rows_are_those_of_the_weight_bit_for_bit(scheme):
    weight = random_weight(scheme)
    ids = torch.tensor([5, 0, 69, 5, 17])
    for dtype in DTYPES:
        for integer in (torch.int32, torch.int64):
            assert same_bits(quantized_embedding(ids.to(integer), weight, dtype), weight.dequantize(dtype)[ids])
    assert quantized_embedding(ids[:0], weight).shape == (0, weight.shape[1])


@pytest.mark.parametrize("scales", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["W4A16", "AWQ", "MLX"])
def test_scales_of_any_dtype(scheme, scales):
    weight = random_weight(scheme, (9, 256), 64)
    offsets = None if weight.offsets is None else weight.offsets.to(scales)
    weight = replace(weight, scales=weight.scales.to(scales), offsets=offsets)
    ids = torch.tensor([8, 3])
    assert same_bits(quantized_embedding(ids, weight, torch.float32), weight.dequantize()[ids])


@pytest.mark.parametrize(
    ("scheme", "shape", "group"),
    [
        ("Q4_0", (1, 32), None), ("Q4_1", (3, 1024), None), ("W4A16", (5, 1056), 1056), ("GPTQ", (7, 3840), 96),
        ("Q5_1", (2, 1056), None), ("Q6_K", (3, 3840), None), ("Q8_0", (3, 2080), None), ("Q4_K", (3, 1280), None),
        ("NF4_NESTED", (37, 1056), None),
    ],
    ids=str,
)  # fmt: skip
def test_rows_of_one_block_and_of_several(scheme, shape, group):
    weight = random_weight(scheme, shape, group)
    ids = torch.tensor([shape[0] - 1, 0])
    assert same_bits(quantized_embedding(ids, weight, torch.float32), weight.dequantize()[ids])


def test_codes_at_their_ends():
    """Every code of every scheme with centred values, in every place of its word."""
    for scheme, most in (("W4A16", 16), ("Q5_0", 32), ("Q6_K", 64), ("Q8_0", 256)):
        weight = random_weight(scheme, (most, 512))
        codes = weight.unpacked_codes()
        assert len(codes.unique()) >= most - 1, scheme  # Q8_0 has no -128
        ids = torch.arange(most)
        assert same_bits(quantized_embedding(ids, weight, torch.float32), weight.dequantize())


@pytest.mark.parametrize("scheme", ["GPTQ", "W4A16"])
def test_columns_go_back_to_their_places(scheme):
    order = torch.randperm(160, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    weight = replace(random_weight(scheme), columns=order)
    ids = torch.tensor([3, 69, 0])
    for dtype in DTYPES:
        assert same_bits(quantized_embedding(ids, weight, dtype), weight.dequantize(dtype)[ids])


@schemes
def test_an_id_that_is_no_row_gives_nan_and_nothing_is_read_for_it(scheme):
    """Read with ids so far outside that the process would not survive it. The public function refuses them on a CPU."""
    weight = random_weight(scheme)
    for integer in (torch.int32, torch.int64):
        far = torch.iinfo(integer)
        ids = torch.tensor([1, -1, weight.shape[0], 2, far.min, far.max], dtype=integer)
        got = cuda.quantized_embedding(ids, weight, torch.bfloat16)
        assert same_bits(got[[0, 3]], weight.dequantize(torch.bfloat16)[[1, 2]])
        assert got[[1, 2, 4, 5]].isnan().all()
    with pytest.raises(ValueError, match="must lie in"):
        quantized_embedding(ids, weight)


def test_a_column_that_is_none_is_left_out():
    order = torch.arange(160, dtype=torch.int32)
    order[7], order[150] = -1, 160
    weight = replace(random_weight("GPTQ"), columns=order)
    ids = torch.tensor([69])
    want = replace(weight, columns=None).dequantize(torch.float16)[69]
    got = cuda.quantized_embedding(ids, weight, torch.float16)[0]
    kept = [column for column in range(160) if column not in (7, 150)]
    assert torch.equal(got[kept], want[kept])


@schemes
def test_nothing_but_the_rows_is_touched(scheme):
    weight = random_weight(scheme)
    ids = torch.arange(70)[::23]  # no neighbours in memory; the last row is the weight's last
    given = {**weight.tensors(), "ids": ids}
    inputs = GuardedInputs(given, torch.device("cpu"))
    safe = replace(weight, **{name: inputs.arguments[name] for name in weight.tensors()})
    assert same_bits(quantized_embedding(inputs.arguments["ids"], safe), weight.dequantize(torch.bfloat16)[ids])
    assert not inputs.damage(given)


@pytest.mark.parametrize("case", [case for case in linear_cases() if case.op == "quantized_embedding"], ids=str)
def test_cases_of_the_list(case):
    (check,) = validation.check_case(case, ["cuda"], torch.device("cpu"))
    assert check.status == "held", check.reasons


def test_explain_says_who_serves_it():
    ids, weight = torch.tensor([1]), random_weight("Q6_K")
    assert explain("quantized_embedding", token_ids=ids, weight=weight).taken == "cuda"
    odd = random_weight("W4A16", (8, 96), 48)
    with pytest.raises(BackendError, match="takes groups of a multiple of 32 columns, the weight has 48"):
        quantized_embedding(ids, odd)
