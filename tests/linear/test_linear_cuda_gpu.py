"""The compiled products on the GPU that is there: values and row bits at sizes of the model; streams and graphs."""

from __future__ import annotations

import pytest
import torch
from linear_weights import random_weight
from on_gpu import captured, needs_gpu, on_another_stream
from torch.nn.functional import gelu, linear

from gemma4_kernels import quantized_argmax, quantized_geglu, quantized_linear, use_backend
from gemma4_kernels.bench.errors import judge
from gemma4_kernels.linear import cuda

pytestmark = needs_gpu


@pytest.mark.parametrize("shape", [(15360, 3840), (3840, 15360), (512, 3840), (70, 768)])
@pytest.mark.parametrize("scheme", cuda.SERVED)
def test_values_and_row_bits(scheme, shape):
    weight = random_weight(scheme, shape).to("cuda")
    dense = weight.dequantize()
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(16, shape[1], generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
        with use_backend("cuda"):
            together = quantized_linear(x, weight)
            for first, last in ((0, 1), (9, 10), (3, 8), (5, 16)):
                assert torch.equal(quantized_linear(x[first:last], weight), together[first:last])
        verdict = judge(together, linear(x.double(), dense.double()), linear(x, dense.to(dtype)))
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize("scheme", ["Q4_0", "Q4_K", "NF4"])
def test_fused_forms(scheme):
    gate, up = (random_weight(scheme, (15360, 3840), seed=seed).to("cuda") for seed in (0, 1))
    x = torch.randn(16, 3840, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16)
    x, residual = x / 64, torch.randn(16, 15360, device="cuda", dtype=torch.bfloat16)
    wide, plain = (
        [linear(x.to(dtype), w.dequantize().to(dtype)) for w in (gate, up)] for dtype in (torch.double, x.dtype)
    )
    with use_backend("cuda"):
        gated, added = quantized_geglu(x, gate, up), quantized_linear(x, gate, residual=residual)
        assert torch.equal(quantized_argmax(x, gate), quantized_linear(x, gate).argmax(-1))
        assert torch.equal(quantized_geglu(x[3:8], gate, up), gated[3:8])
    expected, ordinary = (gelu(g, approximate="tanh") * u for g, u in (wide, plain))
    assert (verdict := judge(gated, expected, ordinary)).ok, str(verdict)
    assert (verdict := judge(added, wide[0] + residual.double(), plain[0] + residual)).ok, str(verdict)


def test_a_captured_graph_and_another_stream():
    weight, x = random_weight("Q4_0", (512, 3840)).to("cuda"), torch.randn(3, 3840, device="cuda", dtype=torch.bfloat16)
    with use_backend("cuda"):
        expected = quantized_linear(x, weight)
        assert torch.equal(on_another_stream(lambda: quantized_linear(x, weight)), expected)
        got, graph = captured(lambda: quantized_linear(x, weight))
        got.zero_()
        graph.replay()
        assert torch.equal(got, expected)
