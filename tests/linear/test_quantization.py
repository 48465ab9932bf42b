"""QuantizedWeight.quantize: lattices are found again, everything else is rounded to the nearest code."""

from __future__ import annotations

import pytest
import torch
from linear_helpers import gguf_rows

from gemma4_kernels import DTypeError, FormatError, QuantizedWeight, ShapeError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def lattice(scale_dtype: torch.dtype, *, low: int = -8, rows: int = 64, negative: bool = False):
    """Codes with a distribution like that of weights, scales, and their products: (N, G, 32), (N, G), (N, G, 32)."""
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(rows, 16, 32, generator=generator) * 2.4).round().clamp(low, 7)
    scale = (torch.rand(rows, 16, generator=generator) * 0.02 + 1e-3).to(scale_dtype)
    if negative:
        # As ggml writes it: the largest weight has the code -8, and the scale its sign.
        codes[:, :, 0] = -8
        scale = scale * torch.where(torch.rand(rows, 16, generator=generator) < 0.5, -1, 1)
    return codes, scale, scale.float()[:, :, None] * codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("low", "negative"), [(-8, False), (-7, False), (-8, True)])
def test_codes_of_a_lattice_are_found_again_and_every_value_with_them(dtype, low, negative):
    codes, scale, values = lattice(torch.float16, low=low, negative=negative)
    w = values.to(dtype).flatten(1)
    weight = QuantizedWeight.quantize(w, "Q4_0")
    assert torch.equal(weight.unpacked_codes().view(codes.shape).int() - 8, codes.int())
    assert torch.equal(weight.dequantize(dtype), w)
    if dtype != torch.bfloat16:  # in bf16 neighbouring scales give the same weights
        assert torch.equal(weight.scales, scale)


def test_codes_of_a_lattice_with_bf16_scales_are_found_again():
    codes, _, values = lattice(torch.bfloat16)
    weight = QuantizedWeight.quantize(values.bfloat16().flatten(1), "W4A16")
    assert weight.scales.dtype == torch.bfloat16
    assert torch.equal(weight.unpacked_codes().view(codes.shape).int() - 8, codes.int())
    assert torch.equal(weight.dequantize(torch.bfloat16), values.bfloat16().flatten(1))


def test_the_bytes_of_a_q4_0_file_are_found_again_from_its_fp32_values():
    rows = torch.from_numpy(gguf_rows("Q4_0", 16, 256))
    rows.view(16, 8, 18)[0, 0, :2] = rows.view(16, 8, 18)[0, 1, :2]  # not the subnormal scale
    there = QuantizedWeight.from_gguf(rows, "Q4_0", (16, 256))
    back = QuantizedWeight.quantize(there.dequantize(), "Q4_0")
    held = (there.unpacked_codes().view(16, 8, 32) == 0).any(dim=2)  # a code of -8 decides the sign of the scale
    assert held.float().mean() > 0.5
    assert torch.equal(back.scales[held], there.scales[held])
    assert torch.equal(back.dequantize(), there.dequantize())


def test_a_plain_conversion_would_have_lost_those_codes():
    from gemma4_kernels.linear import quantization

    codes, _, values = lattice(torch.float16, low=-7)
    _, plain = quantization.from_maximum(values.bfloat16(), torch.float16)
    assert (plain == codes).float().mean() < 0.7


@pytest.mark.parametrize(("scheme", "low", "high"), [("Q4_0", -8, 7), ("W4A16", -8, 7), ("Q8_0", -127, 127)])
def test_other_weights_get_the_nearest_code(scheme, low, high):
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(32, 256, generator=generator).mul_(0.03)
    weight = QuantizedWeight.quantize(w, scheme)
    values = weight.dequantize().view(32, 8, 32)
    scale = weight.scales.float()[:, :, None]
    grid = scale[..., None] * torch.arange(low, high + 1)  # (32, 8, 1, codes)
    nearest = (w.view(32, 8, 32, 1) - grid).abs().amin(dim=3)
    torch.testing.assert_close((w.view(32, 8, 32) - values).abs(), nearest, rtol=0, atol=1e-9)


def test_the_largest_weight_of_a_group_uses_the_last_code():
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    for scheme, last in (("Q4_0", {0}), ("Q8_0", {-127, 127})):
        codes = QuantizedWeight.quantize(w, scheme).unpacked_codes().view(-1, 32)
        largest = codes.gather(1, w.view(-1, 32).abs().argmax(dim=1, keepdim=True))
        assert set(largest.flatten().tolist()) == last


def test_q4_0_has_no_larger_error_than_ggml_on_ordinary_weights():
    gguf = pytest.importorskip("gguf")
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(2)).mul_(0.03)
    ours = QuantizedWeight.quantize(w, "Q4_0").dequantize()
    kind = gguf.GGMLQuantizationType.Q4_0
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(w.numpy(), kind), kind))
    assert (w - ours).square().mean() <= 1.001 * (w - theirs).square().mean()


def test_a_group_beside_a_lattice_is_not_taken_for_one():
    from gemma4_kernels.linear import quantization

    codes, _, values = lattice(torch.float16)
    w = values.bfloat16()
    found, _, _ = quantization.fit_lattice(w, torch.float16)
    assert found.all()
    # One unit in the last place off, of the weights with the code 5: their neighbours leave no scale that gives them.
    off = codes == 5
    w.view(torch.int16)[off] += 1
    found, _, _ = quantization.fit_lattice(w, torch.float16)
    changed = off.any(dim=2) & ((codes.abs() >= 3) & ~off).any(dim=2)
    assert changed.sum() > 100
    assert found[changed].float().mean() < 0.5
    assert found[~off.any(dim=2)].all()


def test_a_code_of_plus_eight_is_not_a_code():
    codes = torch.tensor([-8.0, 8, 1, 3, -5, 7, 2, -1] * 4)
    weight = QuantizedWeight.quantize(
        codes[None] / 64, "Q4_0"
    )  # the scale is an fp16 number, so only the code is amiss
    assert torch.equal((weight.unpacked_codes().int() - 8)[0], codes.int().clamp(max=7))
    assert ((weight.dequantize() - codes / 64).abs() <= 1 / 64).all()  # 8 becomes 7, and nothing else changes


def test_a_group_of_zeros_stays_zero():
    weight = QuantizedWeight.quantize(torch.zeros(2, 64, dtype=torch.bfloat16), "Q4_0")
    assert torch.equal(weight.dequantize(), torch.zeros(2, 64))
    assert torch.equal(QuantizedWeight.quantize(torch.zeros(2, 64), "Q8_0").dequantize(), torch.zeros(2, 64))


def test_weights_that_cannot_be_quantised_are_refused():
    for bad, message in ((float("nan"), "w must be finite"), (float("inf"), "w must be finite"), (1e7, "cannot hold")):
        with pytest.raises(ValueError, match=message):
            QuantizedWeight.quantize(torch.full((2, 64), bad), "Q4_0")
    with pytest.raises(FormatError, match="scheme must be one of Q4_0, W4A16, Q8_0, got 'Q4_K'"):
        QuantizedWeight.quantize(torch.zeros(2, 64), "Q4_K")
    with pytest.raises(ShapeError, match="K a positive multiple of 32"):
        QuantizedWeight.quantize(torch.zeros(2, 65), "Q4_0")
    with pytest.raises(DTypeError, match="w must be bfloat16 or float16 or float32, got int32"):
        QuantizedWeight.quantize(torch.zeros(2, 64, dtype=torch.int32), "Q4_0")
