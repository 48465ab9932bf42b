"""Every type of GGUF block: the values of gguf.dequantize, bit for bit, and no bit of the file lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_helpers import GGUF_BLOCKS, gguf_rows, same_bits

from gemma4_kernels import DTypeError, FormatError, QuantizedWeight, ShapeError

TYPES = sorted(GGUF_BLOCKS)


def read(type_name: str, N: int = 9, K: int = 768, seed: int = 0) -> tuple[QuantizedWeight, np.ndarray]:
    rows = gguf_rows(type_name, N, K, seed)
    return QuantizedWeight.from_gguf(torch.from_numpy(rows), type_name, (N, K)), rows


@pytest.mark.parametrize("type_name", TYPES)
def test_values_are_those_of_gguf_bit_for_bit(type_name):
    gguf = pytest.importorskip("gguf")
    weight, rows = read(type_name)
    with np.errstate(over="ignore"):  # the largest scales of MXFP4
        expected = gguf.dequantize(rows, gguf.GGMLQuantizationType[type_name])
    assert same_bits(weight.dequantize(), expected)


@pytest.mark.parametrize("type_name", TYPES)
def test_rows_that_do_not_fit_one_pass_are_read_alike(type_name, monkeypatch):
    from gemma4_kernels.linear import planes

    weight, rows = read(type_name)
    monkeypatch.setattr(planes, "ROWS_BYTES", 2 * rows.shape[1])
    again, _ = read(type_name)
    for name, tensor in weight.tensors().items():
        assert torch.equal(again.tensors()[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("type_name", TYPES)
def test_memory_takes_the_bits_of_the_file(type_name):
    weight, rows = read(type_name, N=64)
    table = 0 if weight.table is None else weight.table.nbytes
    widened = weight.shape[0] * weight.shape[1] // 256 * 2 if type_name == "IQ4_XS" else 0  # 6-bit scales as bytes
    assert weight.nbytes == rows.nbytes + table + widened


@pytest.mark.parametrize("type_name", [name for name in TYPES if name != "MXFP4"])  # whose largest scales overflow
def test_a_fused_multiply_add_gives_the_same_bits(type_name):
    """As QuantizedWeight promises to kernels: one rounding, of the sum, is all that happens in fp32."""
    weight, _ = read(type_name, N=64)
    codes = weight.unpacked_codes().view(64, -1, weight.group_size)
    factors = codes.double() - weight.layout.zero if weight.table is None else weight.table[codes.int()].double()
    exact = weight.group_scale().double()[:, :, None] * factors
    if weight.offsets is not None:
        exact = exact + weight.group_offset().double()[:, :, None]
    assert torch.equal(exact.float().flatten(1), weight.dequantize())
    d = weight.scales.double()
    if weight.layout.scales == "six_bit":  # d and dmin times 6 bits are exact too
        assert torch.equal(
            weight.group_scale().double().view(64, -1, 8), d[:, :, None] * weight._six_bits(slice(None), 0).double()
        )
        minimum = weight.offsets.double()[:, :, None] * weight._six_bits(slice(None), 1).double()
        assert torch.equal(weight.group_offset().double().view(64, -1, 8), -minimum)


def test_infinite_and_nan_scales_pass_through_as_in_gguf():
    gguf = pytest.importorskip("gguf")
    rows = gguf_rows("Q4_0", 2, 64)
    rows[0, :2] = np.array([np.nan], dtype=np.float16).view(np.uint8)
    rows[1, :2] = np.array([np.inf], dtype=np.float16).view(np.uint8)
    weight = QuantizedWeight.from_gguf(torch.from_numpy(rows), "Q4_0", (2, 64))
    with np.errstate(invalid="ignore"):
        expected = gguf.dequantize(rows, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(weight.dequantize().numpy(), expected)


# The file's bytes again, written one value at a time from the description of the block ------------------------------


def six_bits(weight: QuantizedWeight, n: int, s: int, which: int) -> list[int]:
    w = [int(word) & 0xFFFFFFFF for word in weight.group_scales[n, s]]
    return [(w[which] >> 4 * i & 15) + 16 * (w[2] >> (16 * which + 2 * i) & 3) for i in range(8)]


def half(number: torch.Tensor) -> bytes:
    return number.reshape(1).numpy().tobytes()


def nibble_bytes(codes: list[int], run: int) -> bytes:
    """Runs of `run` bytes, low nibbles first."""
    out = bytearray()
    for start in range(0, len(codes), 2 * run):
        out += bytes(codes[start + i] & 15 | (codes[start + run + i] & 15) << 4 for i in range(run))
    return bytes(out)


def fifth_bits(codes: list[int]) -> bytes:
    return sum((code >> 4) << i for i, code in enumerate(codes)).to_bytes(4, "little")


def k_scales(weight: QuantizedWeight, n: int, s: int) -> bytes:
    sc, m = six_bits(weight, n, s, 0), six_bits(weight, n, s, 1)
    out = bytes(sc[j] | (sc[j + 4] >> 4) << 6 for j in range(4))
    out += bytes(m[j] | (m[j + 4] >> 4) << 6 for j in range(4))
    out += bytes(sc[j] & 15 | (m[j] & 15) << 4 for j in range(4, 8))
    return half(weight.scales[n, s]) + half(weight.offsets[n, s]) + out


def block_bytes(weight: QuantizedWeight, codes: list[int], n: int, b: int) -> bytes:
    scheme = weight.scheme
    if scheme == "MXFP4":
        return bytes([int(weight.scales[n, b])]) + nibble_bytes(codes, 16)
    d = half(weight.scales[n, b])
    if scheme in ("Q4_0", "IQ4_NL"):
        return d + nibble_bytes(codes, 16)
    if scheme == "Q4_1":
        return d + half(weight.offsets[n, b]) + nibble_bytes(codes, 16)
    if scheme == "Q5_0":
        return d + fifth_bits(codes) + nibble_bytes(codes, 16)
    if scheme == "Q5_1":
        return d + half(weight.offsets[n, b]) + fifth_bits(codes) + nibble_bytes(codes, 16)
    if scheme == "Q8_0":
        return d + bytes(code & 255 for code in codes)
    if scheme == "Q4_K":
        return k_scales(weight, n, b) + nibble_bytes(codes, 32)
    if scheme == "Q5_K":
        fifth = bytes(sum((codes[32 * j + i] >> 4) << j for j in range(8)) for i in range(32))
        return k_scales(weight, n, b) + fifth + nibble_bytes(codes, 32)
    if scheme == "IQ4_XS":
        inner = [int(scale) + 32 for scale in weight.group_scales[n, 8 * b : 8 * b + 8]]
        upper = sum((scale >> 4) << 2 * i for i, scale in enumerate(inner)).to_bytes(2, "little")
        low = bytes(inner[2 * i] & 15 | (inner[2 * i + 1] & 15) << 4 for i in range(4))
        return d + upper + low + nibble_bytes(codes, 16)
    assert scheme == "Q6_K"
    upper = bytes(
        sum((codes[128 * h + i + 32 * r] >> 4) << 2 * r for r in range(4)) for h in range(2) for i in range(32)
    )
    return nibble_bytes(codes, 64) + upper + weight.group_scales[n, 16 * b : 16 * b + 16].numpy().tobytes() + d


@pytest.mark.parametrize("type_name", TYPES)
def test_the_bytes_of_the_file_can_be_had_back(type_name):
    weight, rows = read(type_name, N=3, K=512, seed=1)
    codes = weight.unpacked_codes().tolist()
    values = GGUF_BLOCKS[type_name][0]
    for n in range(3):
        blocks = [block_bytes(weight, codes[n][values * b : values * (b + 1)], n, b) for b in range(512 // values)]
        assert b"".join(blocks) == rows[n].tobytes()


# Refusals -----------------------------------------------------------------------------------------------------------


def test_a_row_of_the_wrong_length_is_refused_with_the_right_one():
    data = torch.zeros(4, 100, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="data has 100 bytes a row, Q4_0 of K = 256 needs 144"):
        QuantizedWeight.from_gguf(data, "Q4_0", (4, 256))


@pytest.mark.parametrize("type_name", ["Q2_K", "TQ1_0", "EXL3", "F32", "nonsense"])
def test_types_that_are_not_read_are_refused_by_name_with_what_to_use(type_name):
    with pytest.raises(FormatError, match=rf"{type_name} is not .*(use|make)"):
        QuantizedWeight.from_gguf(torch.zeros(4, 144, dtype=torch.uint8), type_name, (4, 256))


@pytest.mark.parametrize(
    ("data", "shape", "error"),
    [
        (torch.zeros(4, 144, dtype=torch.uint8), (5, 256), ShapeError),
        (torch.zeros(4, 144, dtype=torch.int8), (4, 256), DTypeError),
        (torch.zeros(4, 144, dtype=torch.uint8), (4, 250), ShapeError),
        (torch.zeros(4, 0, dtype=torch.uint8), (4, 0), ShapeError),
        (torch.zeros(0, 144, dtype=torch.uint8), (0, 256), ShapeError),
        (torch.zeros(4, 144, dtype=torch.uint8), (4, 16, 16), ShapeError),
        ([1, 2, 3], (4, 256), TypeError),
    ],
)
def test_wrong_arguments_are_refused(data, shape, error):
    with pytest.raises(error, match=r"QuantizedWeight\.from_gguf: "):
        QuantizedWeight.from_gguf(data, "Q4_0", shape)


def test_super_blocks_want_whole_rows_of_them():
    with pytest.raises(ShapeError, match="Q4_K needs K to be a multiple of 256, got 640"):
        QuantizedWeight.from_gguf(torch.zeros(2, 360, dtype=torch.uint8), "Q4_K", (2, 640))
