"""QuantizedWeight itself: bit order, rounding, saving, moving, refusing."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from linear_helpers import GGUF_BLOCKS, bitsandbytes_layer, compressed_tensors_layer, gguf_rows, gptq_layer
from linear_weights import random_weight

from gemma4_kernels import DTypeError, QuantizedWeight, ShapeError, StrideError, WeightFileError
from gemma4_kernels.linear import planes
from gemma4_kernels.linear.schemes import SCHEMES


def some_weights() -> list[QuantizedWeight]:
    """One of each scheme of GGUF, one with columns in another order, one with nested scales."""
    found = [
        QuantizedWeight.from_gguf(torch.from_numpy(gguf_rows(name, 5, 256)), name, (5, 256), name=f"blk.0.{name}")
        for name in GGUF_BLOCKS
    ]
    found.append(QuantizedWeight.from_gptq(**gptq_layer(8, 128, 32, act_order=True).tensors))
    found.append(QuantizedWeight.from_bitsandbytes(**bitsandbytes_layer(4, 128, nested=True).tensors))
    return found


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_even_codes_fill_the_low_half_of_a_word_and_odd_codes_the_high_half(bits):
    codes = torch.randint(0, 1 << bits, (3, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = planes.pack(codes, bits)
    per_word = 32 // bits
    for n in range(3):
        for k in range(96):
            word, place = divmod(k, per_word)
            bit = 16 * (place % 2) + bits * (place // 2)
            assert int(words[n, word]) >> bit & ((1 << bits) - 1) == int(codes[n, k])
    assert torch.equal(planes.unpack(words, bits), codes)


def test_a_pair_of_columns_is_one_shift_and_one_mask_away():
    """As docs/quantization.md promises it to kernels: columns 2i and 2i + 1 in the two halves of a register."""
    codes = torch.randint(0, 64, (2, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for bits, mask, step in ((5, 0x00010001, 4), (6, 0x00030003, 8)):
        held = planes.split(codes & ((1 << bits) - 1), bits)
        words_of_high = 8 // (2 * bits - 8)  # words of low bits beside one of high bits: 4 or 2
        for n in range(2):
            for index in range(8):
                low = int(held["codes"][n, index]) & 0xFFFFFFFF
                high = int(held["high"][n, index // words_of_high]) & 0xFFFFFFFF
                c = index % words_of_high
                for i in range(4):
                    pair = (low >> 4 * i) & 0x000F000F
                    upper = (high >> (step * c + (bits - 4) * i)) & mask
                    expected = [int(code) & ((1 << bits) - 1) for code in codes[n, 8 * index + 2 * i :][:2]]
                    assert [pair & 15 | (upper & 3) << 4, pair >> 16 | (upper >> 16) << 4] == expected


def test_rows_made_a_few_at_a_time_are_the_same(monkeypatch):
    weights = [*some_weights(), QuantizedWeight.from_bitsandbytes(**bitsandbytes_layer(130, 256, nested=True).tensors)]
    whole = [weight.dequantize() for weight in weights]
    monkeypatch.setattr(planes, "ROWS_BYTES", 3000)
    for weight, expected in zip(weights, whole, strict=True):
        assert torch.equal(weight.dequantize(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_the_fp32_values_rounded_once(dtype):
    for weight in some_weights():
        assert torch.equal(weight.dequantize(dtype), weight.dequantize().to(dtype))


def test_a_weight_comes_back_from_its_file_bit_for_bit(tmp_path):
    for weight in some_weights():
        weight.save(tmp_path / "w.safetensors")
        again = QuantizedWeight.load(tmp_path / "w.safetensors")
        assert repr(again) == repr(weight)
        assert again.tensors().keys() == weight.tensors().keys()
        for name, tensor in weight.tensors().items():
            assert again.tensors()[name].dtype == tensor.dtype
            assert torch.equal(again.tensors()[name].view(torch.uint8), tensor.view(torch.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_the_safetensors_library_reads_what_is_saved(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    weight = some_weights()[0]
    weight.save(tmp_path / "w.safetensors")
    read = library.load_file(tmp_path / "w.safetensors")
    assert read.keys() == weight.tensors().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in weight.tensors().items())


def test_saved_tensors_are_aligned_to_their_dtypes(tmp_path):
    from gemma4_kernels.linear import safetensors_file

    for weight in some_weights():
        weight.save(tmp_path / "w.safetensors")
        for entry in safetensors_file.read_header(tmp_path / "w.safetensors").entries.values():
            assert entry.start % entry.dtype.itemsize == 0


def test_a_file_that_cannot_be_written_leaves_the_one_before_it(tmp_path):
    weight = some_weights()[0]
    weight.save(tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()
    with pytest.raises(NotImplementedError):
        weight.to("meta").save(tmp_path / "w.safetensors")  # has no data to write
    assert (tmp_path / "w.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_pickles_are_never_loaded(tmp_path):
    torch.save({"w": torch.zeros(3)}, tmp_path / "w.pt")
    (tmp_path / "w.bin").write_bytes(pickle.dumps({"w": 3}))
    for name in ("w.pt", "w.bin"):
        with pytest.raises(WeightFileError, match="is a pickle"):
            QuantizedWeight.load(tmp_path / name)


def test_a_file_of_something_else_is_refused(tmp_path):
    from gemma4_kernels.linear import safetensors_file

    path = tmp_path / "w.safetensors"
    safetensors_file.write(path, {"w": torch.zeros(3)}, {})
    with pytest.raises(WeightFileError, match="was not written by QuantizedWeight"):
        QuantizedWeight.load(path)
    weight = some_weights()[0]
    good = {
        "format": "gemma4_kernels.QuantizedWeight", "version": "1", "scheme": "Q4_0", "rows": "5", "columns": "256",
        "group_size": "32",
    }  # fmt: skip
    safetensors_file.write(path, weight.tensors(), good)
    QuantizedWeight.load(path)
    for change in ({"version": "2"}, {"scheme": "Q9"}, {"rows": "-1"}, {"rows": "\u0665"}, {"columns": "9" * 30}):
        safetensors_file.write(path, weight.tensors(), good | change)
        with pytest.raises(WeightFileError):
            QuantizedWeight.load(path)
    safetensors_file.write(path, weight.tensors(), good | {"rows": "6"})
    with pytest.raises(WeightFileError, match=r"codes must have shape \(6, 32\)"):
        QuantizedWeight.load(path)


def test_moving_to_where_it_is_returns_itself():
    weight = some_weights()[0]
    assert weight.to("cpu") is weight
    there = weight.to("meta")
    assert there.device.type == "meta"
    assert there.nbytes == weight.nbytes


def test_fields_that_do_not_fit_the_scheme_are_refused():
    weight = next(found for found in some_weights() if found.scheme == "Q4_0")
    with pytest.raises(ValueError, match="scheme must be one of Q4_0"):
        replace(weight, scheme="Q9")
    with pytest.raises(ValueError, match="Q4_1 has codes, scales, offsets, got codes, scales"):
        replace(weight, scheme="Q4_1")
    with pytest.raises(ShapeError, match=r"scales must have shape \(5, 8\), got \(5, 7\)"):
        replace(weight, scales=weight.scales[:, :7].contiguous())
    with pytest.raises(DTypeError, match="scales must be float16, got float32"):
        replace(weight, scales=weight.scales.float())
    with pytest.raises(StrideError, match="codes must be contiguous"):
        replace(weight, codes=torch.zeros(32, 5, dtype=torch.int32).T)
    with pytest.raises(ShapeError, match="groups of Q4_0 have 32 columns, got 64"):
        replace(weight, group_size=64)
    with pytest.raises(DTypeError, match="dtype must be bfloat16, float16 or float32"):
        weight.dequantize(torch.int8)


def test_what_it_prints_tells_name_scheme_sizes_and_bits():
    weight = QuantizedWeight.from_compressed_tensors(
        **compressed_tensors_layer(8, 128, 32).tensors, group_size=32, name="layers.0.mlp.up_proj"
    )
    assert repr(weight) == (
        "QuantizedWeight('layers.0.mlp.up_proj', W4A16, 8 x 128, groups of 32, 4.500 bits a weight, cpu)"
    )


def test_a_single_group_a_row_is_dense_too(tmp_path):
    """A transposed matrix of one column calls itself contiguous whatever its strides are."""
    for weight in (
        QuantizedWeight.from_gptq(**gptq_layer(8, 64, 64).tensors),
        QuantizedWeight.from_compressed_tensors(
            **compressed_tensors_layer(8, 64, 64, symmetric=False).tensors, group_size=64
        ),
    ):
        assert all(tensor.stride(-1) == 1 for tensor in weight.tensors().values())
        weight.save(tmp_path / "w.safetensors")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_concatenated_weights_have_the_rows_of_all(scheme):
    K = 512 if SCHEMES[scheme].scales in ("int8", "six_bit") else 256
    parts = [
        random_weight(scheme, (rows, K), seed=rows) for rows in (64, 32, 7)
    ]  # 64 and 32 rows of 8 groups: 512, 256
    shared = ("table", "scale_table", "scale_offset")
    parts = [replace(part, **{name: getattr(parts[0], name) for name in shared}) for part in parts]
    whole = QuantizedWeight.concatenate(parts, name="qkv")
    assert (whole.shape, whole.name, whole.group_size) == ((103, K), "qkv", parts[0].group_size)
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert whole.nbytes <= sum(part.nbytes for part in parts)


def test_concatenated_weights_keep_their_columns():
    order = torch.randperm(160, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    parts = [replace(random_weight("GPTQ", seed=seed), columns=order.clone()) for seed in (1, 2)]
    whole = QuantizedWeight.concatenate(parts)
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_one_weight_concatenated_is_itself():
    for weight in some_weights():
        assert torch.equal(QuantizedWeight.concatenate([weight]).dequantize(), weight.dequantize())


def test_weights_that_are_not_alike_are_not_concatenated():
    order = torch.arange(160, dtype=torch.int32)
    gptq, nested, table = random_weight("GPTQ"), random_weight("NF4_NESTED", (64, 256)), random_weight("IQ4_NL")
    w4a16 = random_weight("W4A16", (8, 320), 32)
    refused = [
        ([], ValueError, "at least one weight"),
        (
            [random_weight("Q4_0"), random_weight("Q4_1")],
            ValueError,
            r"weights\[1\] must have scheme Q4_0 .*, got Q4_1",
        ),
        ([random_weight("Q4_0"), random_weight("Q4_0", (8, 320))], ShapeError, "must have K = 160 .*, got 320"),
        ([w4a16, w4a16, random_weight("W4A16", (8, 320), 64)], ValueError, r"weights\[2\] must have group_size 32"),
        ([w4a16, replace(w4a16, scales=w4a16.scales.float())], DTypeError, r"weights\[1\].scales must be bfloat16"),
        ([w4a16, w4a16.to("meta")], ValueError, "must be on cpu like"),
        ([gptq, replace(gptq, columns=order)], ValueError, r"only weights\[1\] has them"),
        ([replace(gptq, columns=order), gptq], ValueError, r"only weights\[0\] has them"),
        (
            [replace(gptq, columns=order), replace(gptq, columns=order.flip(0).contiguous())],
            ValueError,
            "the columns of",
        ),
        ([table, replace(table, table=table.table + 1)], ValueError, "the table of"),
        ([nested, replace(nested, scale_table=nested.scale_table + 1)], ValueError, "the scale_table of"),
        ([nested, replace(nested, scale_offset=nested.scale_offset + 1)], ValueError, "the scale_offset of"),
    ]
    for weights, error, message in refused:
        with pytest.raises(error, match=message):
            QuantizedWeight.concatenate(weights)


def test_nested_scales_that_would_be_shared_across_weights_are_refused():
    part = random_weight("NF4_NESTED", (33, 256))  # 264 groups of 32 columns
    with pytest.raises(ValueError, match=r"weights\[0\] must have a multiple of 256 groups.*got 33 x 8 = 264"):
        QuantizedWeight.concatenate([part, part])
