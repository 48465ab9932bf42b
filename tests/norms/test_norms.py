"""The norms between sublayers in one call: transformers' bits, in every dtype, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from norms_helpers import DTYPES, assert_bits, drawn, with_exact_sums

from gemma4_kernels import DeviceError, DTypeError, ShapeError, StrideError, explain, sandwich_norm
from gemma4_kernels.norms.ops import MOST_NUMBERS
from gemma4_kernels.reference.layers import rms_norm

WIDTH = 3840

# The numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scalar", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_of_transformers_modules(dtype, scalar):
    pytest.importorskip("transformers")
    call = drawn(dtype, 3, WIDTH, layer_scalar=None if scalar is None else torch.tensor([0.37], dtype=scalar))
    assert_bits(call.run(), call.expected())
    assert_bits(replace(call, pre_weight=None).run(), (call.expected()[0], None))
    exact = with_exact_sums(dtype, 3, WIDTH)
    assert_bits(exact.run(), exact.expected())


@torch.no_grad()
def test_bits_of_a_decoder_layer():
    """Both sandwiches of transformers' layer in bf16, its sublayers run by themselves."""
    pytest.importorskip("transformers")
    from small_models import text_model

    model = text_model().to(torch.bfloat16)
    layer, following = model.model.layers[0], model.model.layers[1]
    for module in (layer, following):
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            weight = getattr(module, f"{name}_layernorm").weight
            weight.copy_(1 + 0.3 * torch.randn(weight.shape))
    layer.layer_scalar.fill_(0.37)
    x = torch.randn(2, 7, model.config.hidden_size).bfloat16()
    attended = torch.randn_like(x)
    layer.self_attn.forward = lambda **_: (attended, None)
    expected = layer(x)
    hidden, normed = sandwich_norm(
        attended, x, layer.post_attention_layernorm.weight, layer.pre_feedforward_layernorm.weight
    )
    got, after = sandwich_norm(
        layer.mlp(normed), hidden, layer.post_feedforward_layernorm.weight, following.input_layernorm.weight,
        layer_scalar=layer.layer_scalar,
    )  # fmt: skip
    assert torch.equal(got, expected)
    assert torch.equal(after, following.input_layernorm(expected))


def test_fp64_stays_fp64():
    call = drawn(torch.float64, 2, 3, 20, eps=0.5)
    hidden, normed = call.run()
    wide = (call.residual + rms_norm(call.x, call.post_weight, 0.5)) * call.layer_scalar.double()
    assert torch.equal(hidden, wide)
    assert torch.equal(normed, rms_norm(wide, call.pre_weight, 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_keeps_its_bits_among_others(dtype):
    call = drawn(dtype, 16, 1000)
    together = call.run()
    for first, last in ((0, 1), (9, 10), (3, 8), (5, 16)):
        part = replace(call, x=call.x[first:last], residual=call.residual[first:last])
        assert_bits(part.run(), tuple(whole[first:last] for whole in together))


def test_shapes_and_strides():
    call = drawn(torch.bfloat16, 2, 3, 40)
    hidden, normed = call.run()
    assert hidden.shape == normed.shape == (2, 3, 40)
    assert hidden.is_contiguous()
    assert normed.is_contiguous()
    wide_x, wide_residual = (torch.cat((each, each.flip(-1)), dim=-1) for each in (call.x, call.residual))
    assert_bits(replace(call, x=wide_x[..., :40], residual=wide_residual[..., :40]).run(), (hidden, normed))
    turned = replace(call, x=call.x.transpose(0, 1), residual=call.residual.transpose(0, 1))
    assert_bits(turned.run(), (hidden.transpose(0, 1), normed.transpose(0, 1)))
    one = replace(call, x=call.x[0, 0], residual=call.residual[0, 0])
    assert_bits(one.run(), (hidden[0, 0], normed[0, 0]))
    none = replace(call, x=call.x[:0], residual=call.residual[:0])
    assert [each.shape for each in none.run()] == [(0, 3, 40), (0, 3, 40)]


# Wrong calls --------------------------------------------------------------------------------------------------------

ROWS, WEIGHT = torch.zeros(2, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"x": torch.zeros(2, 8, dtype=torch.int32)}, DTypeError, "x must be bfloat16 or"),
        ({"x": torch.tensor(1.0)}, ShapeError, r"x must have shape \(..., N\) with N at least 1, got \(\)"),
        ({"x": torch.zeros(2, 0)}, ShapeError, "with N at least 1"),
        ({"x": torch.zeros(8, 2).T}, StrideError, "x must be dense in its last dim"),
        ({"residual": torch.zeros(3, 8)}, ShapeError, r"residual must have shape \(2, 8\), got \(3, 8\)"),
        ({"residual": ROWS.half()}, DTypeError, "residual must be float32, got float16"),
        ({"residual": torch.zeros(8, 2).T}, StrideError, "residual must be dense in its last dim"),
        ({"residual": ROWS.to("meta")}, DeviceError, "residual must be on cpu like x, got meta"),
        ({"post_weight": None}, TypeError, "post_weight must be a tensor, got NoneType"),
        ({"post_weight": torch.ones(7)}, ShapeError, r"post_weight must have shape \(8\), got \(7\)"),
        ({"post_weight": torch.ones(8, dtype=torch.int64)}, DTypeError, "post_weight must be bfloat16 or"),
        ({"pre_weight": torch.ones(2, 8)}, ShapeError, r"pre_weight must have shape \(8\), got \(2, 8\)"),
        ({"pre_weight": torch.ones(16)[::2]}, StrideError, "pre_weight must be dense in its last dim"),
        ({"pre_weight": WEIGHT.to("meta")}, DeviceError, "pre_weight must be on cpu like x, got meta"),
        ({"layer_scalar": 0.5}, TypeError, "layer_scalar must be a tensor, got float"),
        ({"layer_scalar": torch.ones(2)}, ShapeError, r"layer_scalar must have shape \(\) or \(1\), got \(2,\)"),
        ({"layer_scalar": torch.ones(1).long()}, DTypeError, "layer_scalar must be bfloat16 or"),
        ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        ({"eps": "small"}, TypeError, "eps must be a number, got 'small'"),
    ],
)
def test_a_wrong_call_is_refused_by_name(changes, error, says):
    call = {"x": ROWS, "residual": ROWS, "post_weight": WEIGHT, "pre_weight": WEIGHT, "layer_scalar": torch.ones(1)}
    sandwich_norm(**call)
    with pytest.raises(error, match=says) as caught:
        sandwich_norm(**(call | changes))
    assert str(caught.value).startswith("sandwich_norm: ")


# As PyTorch sees the op ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_pre", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, has_pre):
    call = drawn(dtype, 3, 40)
    pre, scalar = (call.pre_weight, call.layer_scalar) if has_pre else (None, None)
    arguments = (call.x, call.residual, call.post_weight, pre, scalar, 1e-6)
    torch.library.opcheck(torch.ops.gemma4_kernels.sandwich_norm.default, arguments)


def test_compile_without_a_graph_break():
    """The same bits as outside of a graph, shapes that change included."""

    def layer(x, residual, post, pre, scalar):
        hidden, normed = sandwich_norm(x, residual, post, pre)
        last, nothing = sandwich_norm(normed * 2, hidden, post, layer_scalar=scalar)
        assert nothing is None
        return last

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (1, 3, 5):
        call = drawn(torch.bfloat16, rows, 40)
        arguments = (call.x, call.residual, call.post_weight, call.pre_weight, call.layer_scalar)
        assert torch.equal(compiled(*arguments), layer(*arguments))


def test_a_forward_works_outside_no_grad_and_its_backward_says_why_not():
    call = drawn(torch.float32, 3, 40)
    call.x.requires_grad_()
    hidden, _ = call.run()
    with pytest.raises(NotImplementedError, match="inference"):
        hidden.sum().backward()


def test_autocast_changes_nothing():
    call = drawn(torch.float32, 3, 40)
    expected = call.run()
    with torch.autocast("cpu", torch.bfloat16):
        assert_bits(call.run(), expected)


def test_explain_knows_it():
    call = drawn(torch.bfloat16, 3, 40)
    assert explain("sandwich_norm", x=call.x, residual=call.residual, post_weight=call.post_weight).taken == "eager"
    long = torch.zeros(1, MOST_NUMBERS + 1)
    said = str(explain("sandwich_norm", x=long, residual=long, post_weight=long[0]))
    assert "does not support rows of more than 16384 numbers" in said
    assert sandwich_norm(long, long, long[0])[0].shape == long.shape


def test_on_a_device_it_uses_ops_that_mps_has_and_reads_nothing_back():
    pytest.importorskip("yaml")
    from device_ops import SYNCS, Recorder, has_mps_kernel, native_functions

    from gemma4_kernels.norms import eager

    call = drawn(torch.bfloat16, 3, 40)
    tensors = (call.x, call.residual, call.post_weight, call.pre_weight, call.layer_scalar)
    recorder = Recorder()
    with recorder:
        eager.sandwich_norm(*(tensor.to("meta") for tensor in tensors), 1e-6)
    entries = native_functions()
    assert len(recorder.seen) > 5
    assert not [name for name in recorder.seen if not has_mps_kernel(name, entries)]
    assert not [name for name in recorder.seen if name.split("::")[1].split(".")[0] in SYNCS]
    assert torch.float64 not in recorder.dtypes
