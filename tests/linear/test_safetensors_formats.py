"""compressed-tensors, GPTQ, AWQ, MLX, bitsandbytes: the values of a scalar loop over their files, bit for bit."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from linear_helpers import awq_layer, bitsandbytes_layer, compressed_tensors_layer, gptq_layer, mlx_layer, same_bits

from gemma4_kernels import DTypeError, FormatError, QuantizedWeight, ShapeError
from gemma4_kernels.linear import planes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("symmetric", "group"), [(True, 32), (True, 64), (False, 32), (False, 64)])
def test_compressed_tensors_gives_the_values_of_the_loop(symmetric, group, act_order, dtype):
    layer = compressed_tensors_layer(11, 192, group, symmetric=symmetric, act_order=act_order, dtype=dtype)
    weight = QuantizedWeight.from_compressed_tensors(**layer.tensors, group_size=group)
    assert same_bits(weight.dequantize(), layer.w)


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed_tensors is not installed")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("symmetric", "group"), [(True, 32), (True, None), (False, 32), (False, 64)])
def test_compressed_tensors_gives_the_values_of_its_own_library(symmetric, group, dtype):
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "channel" if group is None else "group"
    arguments = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy=strategy, group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    generator = torch.Generator().manual_seed(1)
    groups = 256 // (group or 256)
    state = {
        "weight": torch.randn(24, 256, generator=generator).mul_(0.05).to(dtype),
        "weight_scale": torch.rand(24, groups, generator=generator).mul_(0.02).add_(1e-3).to(dtype),
    }
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-8, 8, (24, groups), generator=generator, dtype=torch.int8)
    held = Compressor.compress(state, scheme)
    expected = Compressor.decompress(held, scheme)["weight"]
    weight = QuantizedWeight.from_compressed_tensors(**held, group_size=group)
    assert torch.equal(weight.dequantize(dtype), expected)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_gives_the_values_of_the_loop(version, act_order, group):
    layer = gptq_layer(16, 256, group, version=version, act_order=act_order)
    form = {1: "gptq", 2: "gptq_v2"}[version]
    weight = QuantizedWeight.from_gptq(**layer.tensors, checkpoint_format=form)
    assert weight.group_size == group
    assert same_bits(weight.dequantize(), layer.w)


def test_a_g_idx_that_changes_nothing_is_not_kept():
    layer = gptq_layer(8, 128, 32)
    assert QuantizedWeight.from_gptq(**layer.tensors).columns is None
    del layer.tensors["g_idx"]
    assert same_bits(QuantizedWeight.from_gptq(**layer.tensors).dequantize(), layer.w)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("N", [8, 200])  # more rows than are turned at a time
def test_awq_gives_the_values_of_the_loop(group, N, monkeypatch):
    monkeypatch.setattr(planes, "ROWS_BYTES", 1 << 16)
    layer = awq_layer(N, 128, group)
    assert same_bits(QuantizedWeight.from_awq(**layer.tensors).dequantize(), layer.w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_mlx_gives_the_values_of_the_loop(group, dtype):
    layer = mlx_layer(7, 256, group, dtype)
    assert same_bits(QuantizedWeight.from_mlx(**layer.tensors, group_size=group).dequantize(), layer.w)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("N", "K"), [(6, 192), (130, 256)])  # with and without a whole number of nested blocks
def test_bitsandbytes_gives_the_values_of_the_loop(N, K, kind, nested):
    layer = bitsandbytes_layer(N, K, kind=kind, nested=nested)
    weight = QuantizedWeight.from_bitsandbytes(**layer.tensors)
    assert weight.scheme == kind.upper() + ("_NESTED" if nested else "")
    assert same_bits(weight.dequantize(), layer.w)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_gives_the_values_of_its_own_library(kind, nested, dtype):
    from bitsandbytes import functional

    w = torch.randn(96, 512, generator=torch.Generator().manual_seed(4)).mul_(0.03).to(dtype)
    packed, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=nested, quant_type=kind)
    held = state.as_dict(packed=True)  # as it goes into a file
    tensors = {"quant_state" if "bitsandbytes__" in name else name: tensor for name, tensor in held.items()}
    weight = QuantizedWeight.from_bitsandbytes(weight=packed, **tensors)
    assert torch.equal(weight.dequantize(dtype), functional.dequantize_4bit(packed, state))


@pytest.mark.skipif(find_spec("mlx") is None, reason="mlx is not installed")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_mlx_gives_the_values_of_its_own_library(group, dtype):
    mx = pytest.importorskip("mlx.core")
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(5)).mul_(0.03)
    kind = getattr(mx, str(dtype).removeprefix("torch."))
    packed, scales, biases = mx.quantize(mx.array(w.numpy()).astype(kind), group_size=group, bits=4)
    # In fp32, because MLX rounds twice in a narrower dtype: the product, and the sum.
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    expected = mx.dequantize(packed, scales, biases, group_size=group, bits=4)
    weight = QuantizedWeight.from_mlx(
        weight=torch.from_numpy(np.array(packed)), scales=torch.from_numpy(np.array(scales)).to(dtype),
        biases=torch.from_numpy(np.array(biases)).to(dtype), group_size=group,
    )  # fmt: skip
    assert same_bits(weight.dequantize(), np.array(expected))


def test_nested_scales_stay_as_small_as_in_the_file():
    layer = bitsandbytes_layer(64, 256, nested=True)
    weight = QuantizedWeight.from_bitsandbytes(**layer.tensors)
    held = sum(tensor.nbytes for name, tensor in layer.tensors.items() if name != "quant_state")
    assert weight.nbytes == held + 4  # the offset, which the file has in its JSON


def test_files_of_four_and_a_half_bits_stay_that_small():
    layer = compressed_tensors_layer(8, 256, 32)
    weight = QuantizedWeight.from_compressed_tensors(**layer.tensors, group_size=32)
    assert weight.bits_per_weight == 4.5


def test_channel_wise_scales_are_one_group_a_row():
    layer = compressed_tensors_layer(8, 96, 96)
    for group_size in (None, -1, 96):
        weight = QuantizedWeight.from_compressed_tensors(**layer.tensors, group_size=group_size)
        assert same_bits(weight.dequantize(), layer.w)


# Refusals -----------------------------------------------------------------------------------------------------------


def test_a_g_idx_with_groups_of_other_sizes_is_refused():
    layer = gptq_layer(8, 128, 32)
    layer.tensors["g_idx"][0] = 3
    with pytest.raises(ValueError, match=r"from_gptq: g_idx must name each group from 0 to 3 32 times"):
        QuantizedWeight.from_gptq(**layer.tensors)
    layer.tensors["g_idx"][0] = -5
    with pytest.raises(ValueError, match="g_idx must name each group"):
        QuantizedWeight.from_gptq(**layer.tensors)


def test_eight_bit_gptq_is_not_taken_for_four_bits():
    layer = gptq_layer(16, 256, 128)
    layer.tensors["qzeros"] = torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(ShapeError, match=r"qzeros must have shape \(2, 2\), got \(2, 4\)"):
        QuantizedWeight.from_gptq(**layer.tensors)


@pytest.mark.parametrize(
    ("make", "read", "change", "error", "message"),
    [
        (compressed_tensors_layer, "compressed_tensors", {"group_size": 48}, ShapeError, "must divide K = 128"),
        (compressed_tensors_layer, "compressed_tensors", {"weight_shape": torch.tensor([8])}, ShapeError, "two sizes"),
        (compressed_tensors_layer, "compressed_tensors", {"weight_shape": (8, 256)}, ShapeError, r"\(8, 32\)"),
        (compressed_tensors_layer, "compressed_tensors", {"weight_packed": torch.zeros(8, 16)}, DTypeError, "int32"),
        (gptq_layer, "gptq", {"checkpoint_format": "marlin"}, ValueError, "one of gptq, gptq_v2"),
        (gptq_layer, "gptq", {"scales": torch.zeros(0, 8).half()}, ShapeError, "0 groups"),
        (gptq_layer, "gptq", {"g_idx": torch.zeros(4)}, ShapeError, r"g_idx must have shape \(128\)"),
        (awq_layer, "awq", {"scales": torch.zeros(3, 8).half()}, ShapeError, "do not divide K = 128"),
        (mlx_layer, "mlx", {"group_size": 16}, ShapeError, "groups of MLX have 32 or 64 or 128 columns, got 16"),
        (mlx_layer, "mlx", {"biases": torch.zeros(8, 4)}, DTypeError, "biases must be bfloat16"),
        (bitsandbytes_layer, "bitsandbytes", {"quant_state": torch.zeros(3).byte()}, ValueError, "is not JSON"),
        (bitsandbytes_layer, "bitsandbytes", {"quant_state": {"shape": [8, 96], "quant_type": "nf4", "blocksize": 64}},
         ShapeError, "blocks that cross rows"),
        (bitsandbytes_layer, "bitsandbytes", {"quant_state": {"shape": [8, 128], "quant_type": "int8"}}, FormatError,
         "quant_type must be nf4 or fp4, got 'int8'"),
        (bitsandbytes_layer, "bitsandbytes", {"nested_absmax": torch.zeros(1)}, ValueError, "given together"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_with_their_names(make, read, change, error, message):
    groups = () if make is bitsandbytes_layer else (32,)
    arguments = dict(make(8, 128, *groups).tensors)
    if read in ("mlx", "compressed_tensors"):
        arguments["group_size"] = 32
    constructor = getattr(QuantizedWeight, f"from_{read}")
    constructor(**arguments)
    with pytest.raises(error, match=rf"QuantizedWeight\.from_{read}: .*{message}"):
        constructor(**arguments | change)
