"""QuantizedWeight itself: bit order, rounding, saving, moving, refusing."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from linear_helpers import GGUF_BLOCKS, bitsandbytes_layer, compressed_tensors_layer, gguf_rows, gptq_layer

from gemma4_kernels import DTypeError, QuantizedWeight, ShapeError, StrideError, WeightFileError
from gemma4_kernels.linear import planes


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
