"""GGUF files: what is in them, read one at a time, and each fault named."""

from __future__ import annotations

import struct
import weakref

import numpy as np
import pytest
import torch
from linear_helpers import gguf_rows
from weight_files import gguf_file, pair, small_gguf, strings, text

from gemma4_kernels import FormatError, QuantizedWeight, WeightFileError, open_weights
from gemma4_kernels.linear.files import gguf as gguf_files


@pytest.fixture
def opened(tmp_path):
    """Write bytes as a file and open it."""

    def write_and_open(raw: bytes, name: str = "model.gguf"):
        (tmp_path / name).write_bytes(raw)
        return open_weights(tmp_path / name)

    return write_and_open


def test_a_file_lists_its_tensors_with_scheme_shape_and_bytes(opened):
    files = opened(small_gguf())
    assert files.format == "gguf"
    assert files.metadata["general.architecture"] == "gemma4"
    assert files.metadata["gemma4.block_count"] == 1
    assert "tokenizer.ggml.tokens" not in files.metadata  # arrays are stepped over
    listed = [(info.name, info.scheme, info.shape, info.nbytes, info.quantized) for info in files.tensors.values()]
    assert listed == [
        ("blk.0.attn_q.weight", "Q4_0", (4, 64), 144, True),
        ("blk.0.attn_norm.weight", "F32", (64,), 256, False),
        ("blk.0.ffn_up.weight", "Q4_K", (2, 256), 288, True),
        ("token_embd.weight", "Q6_K", (3, 256), 630, True),
    ]
    assert files.nbytes == 144 + 256 + 288 + 630


@pytest.mark.parametrize("options", [{}, {"alignment": 64}, {"alignment": 1}, {"version": 2}])
def test_each_tensor_is_the_one_that_was_written(opened, options):
    files = opened(small_gguf(**options))
    for name, scheme, N, K in (("blk.0.attn_q.weight", "Q4_0", 4, 64), ("token_embd.weight", "Q6_K", 3, 256)):
        expected = QuantizedWeight.from_gguf(torch.from_numpy(gguf_rows(scheme, N, K)), scheme, (N, K))
        assert torch.equal(files.load(name).dequantize(), expected.dequantize())
    assert torch.equal(files.load("blk.0.attn_norm.weight"), torch.arange(64.0))
    assert [weight.name for weight in files.weights()] == [
        "blk.0.attn_q.weight", "blk.0.ffn_up.weight", "token_embd.weight",
    ]  # fmt: skip


def test_no_weight_is_kept_while_the_next_is_read(opened, monkeypatch):
    files = opened(small_gguf())
    load, seen = files.load, []

    def watched(name):
        assert all(earlier() is None for earlier in seen)
        return load(name)

    monkeypatch.setattr(files, "load", watched)
    for weight in files.weights():
        seen.append(weakref.ref(weight))
        del weight
    assert len(seen) == 3


def test_files_of_the_gguf_library_are_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "gemma4")
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    rows = gguf_rows("Q5_K", 3, 512)
    writer.add_tensor("a.weight", rows, raw_dtype=gguf.GGMLQuantizationType.Q5_K)
    writer.add_tensor("norm.weight", np.ones(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = open_weights(path)
    assert files.metadata["gemma4.block_count"] == 2
    expected = gguf.dequantize(rows, gguf.GGMLQuantizationType.Q5_K)
    np.testing.assert_array_equal(files.load("a.weight").dequantize().numpy(), expected)
    assert torch.equal(files.load("norm.weight"), torch.ones(7))


def test_the_table_of_types_is_that_of_the_gguf_library():
    gguf = pytest.importorskip("gguf")
    theirs = {
        int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind])
        for kind in gguf.GGMLQuantizationType
        if kind in gguf.GGML_QUANT_SIZES
    }
    assert {number: gguf_files.TYPES[number] for number in theirs if number in gguf_files.TYPES} == {
        number: theirs[number] for number in gguf_files.TYPES
    }


def test_shards_are_read_as_one_model(tmp_path):
    for number in (1, 2):
        row = gguf_rows("Q4_0", 2, 32, seed=number).tobytes()
        raw = gguf_file({f"blk.{number}.weight": ("Q4_0", (2, 32), row)})
        (tmp_path / f"m-{number:05}-of-00002.gguf").write_bytes(raw)
    for path in (tmp_path / "m-00002-of-00002.gguf", tmp_path):
        assert list(open_weights(path).tensors) == ["blk.1.weight", "blk.2.weight"]
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(WeightFileError, match=r"is one of 2 shards, and m-00002-of-00002\.gguf is not there"):
        open_weights(tmp_path)


def test_types_that_are_not_read_are_listed_and_refused_when_loaded(opened):
    files = opened(gguf_file({"w": ("Q2_K", (2, 256), bytes(168)), "x": ("Q4_0", (2, 2, 32), bytes(72))}))
    assert files.tensors["w"].scheme == "Q2_K"
    with pytest.raises(FormatError, match="w: type Q2_K is not read; use a Q4_0"):
        files.load("w")
    with pytest.raises(FormatError, match="x: Q4_0 with 3 dims is not read"):
        files.load("x")
    with pytest.raises(KeyError):
        files.load("y")


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_not_a_crash(opened, tmp_path):
    files = opened(small_gguf())
    raw = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(raw[:-700])
    with pytest.raises(WeightFileError, match=r"the file ends \d+ bytes before its data does"):
        files.load("token_embd.weight")


# Faults -------------------------------------------------------------------------------------------------------------

Q4 = ("Q4_0", (2, 32), bytes(36))
HUGE = 2**62


def one(**options) -> bytes:
    return gguf_file({"w": Q4}, **options)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "header of 0 bytes in a file of 0"),
        (b"GGUF", "needs 4 bytes at byte 4, and the file ends at byte 4"),
        (one()[:30], "and the file ends at byte 30"),
        (one()[:-40], "ends at byte .*, the file at byte .*: truncated"),
        (one(version=1), "version 1; versions 2 and 3 are read"),
        (b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(64), "big-endian"),
        (one(counts=(HUGE, 1)), f"claims {HUGE} tensors"),
        (one(counts=(1, 2**64 - 1)), "pairs of metadata; read are up to 16384 and 4096"),
        (one(counts=(2, 1)), "must have a name of 1 to 255 bytes"),
        (one(offsets={"w": 16}), "offset 16, which is beyond the file or not aligned to 32"),
        (one(offsets={"w": 2**64 - 32}), "which is beyond the file or not aligned"),
        (gguf_file({"v": Q4, "w": Q4}, offsets={"w": 0}), "'w' at byte .* overlaps 'v'"),
        (gguf_file({"v": Q4, "w": Q4}, offsets={"w": 32}), "'w' at byte .* overlaps 'v'"),
        (gguf_file({"w": ("Q4_0", (HUGE, HUGE), b"")}), "it cannot be in a file of"),
        (gguf_file({"w": ("Q4_0", (2**32, 2**32), b"")}), "it cannot be in a file of"),
        (gguf_file({"w": ("Q4_0", (0, 32), b"")}), "it cannot be in a file of"),
        (gguf_file({"w": ("Q4_0", (2, 33), bytes(36))}), "blocks of 32"),
        (gguf_file({"w": ("F32", (), bytes(36))}), "has 0 dims"),
        (gguf_file({"w": ("F32", (1,) * 5, bytes(36))}), "has 5 dims"),
        (gguf_file({"w": ("99", (2, 32), bytes(36))}), "type number 99, which is unknown here; use a Q4_0"),
        (gguf_file({"w": ("4", (2, 32), bytes(36))}), "type Q4_2, which ggml has removed; use a Q4_0"),
        (one(pairs=[struct.pack("<Q", HUGE)]), f"needs {HUGE} bytes"),
        (one(pairs=[pair("k", 99, b"")]), "type 99 of the value"),
        (one(pairs=[pair("k", 9, struct.pack("<IQ", 5, HUGE))]), "needs .* bytes"),
        (one(pairs=[pair("k", 9, struct.pack("<IQ", 8, HUGE))]), f"claims {HUGE} strings"),
        (one(pairs=[pair("k", 9, struct.pack("<IQ", 9, HUGE))]), f"claims {HUGE} arrays"),
        (one(pairs=[pair("k", 9, struct.pack("<IQ", 8, 9) + struct.pack("<Q", HUGE) * 9)]), "over the end of the file"),
        (one(pairs=[pair("k", 9, struct.pack("<IQ", 9, 1) * 9)]), "nested more than 4 deep"),
        (one(pairs=[pair("k", 8, text(b"\xff\xfe"))]), "is not UTF-8"),
        (one(pairs=[pair("k", 8, text("a"))] * 2), "metadata 'k' occurs twice"),
        (one(pairs=[pair("general.alignment", 4, struct.pack("<I", 0))]), "must be a power of two"),
        (one(pairs=[pair("general.alignment", 4, struct.pack("<I", 48))]), "must be a power of two"),
        (one(pairs=[pair("general.alignment", 8, text("32"))]), "must be a power of two"),
    ],
)
def test_each_fault_of_a_header_is_named(opened, raw, message):
    with pytest.raises(WeightFileError, match=message):
        opened(raw)


def test_two_tensors_of_one_name_are_refused(opened):
    raw = gguf_file({"v": Q4, "w": Q4}).replace(text("v"), text("w"))
    with pytest.raises(WeightFileError, match="tensor 'w' occurs twice"):
        opened(raw)


def test_files_from_before_gguf_and_files_of_nothing_are_refused_by_name(opened, tmp_path):
    with pytest.raises(FormatError, match="from before GGUF; use a GGUF file"):
        opened(b"tjgg" + bytes(100))
    with pytest.raises(WeightFileError, match="is neither a file nor a folder"):
        open_weights(tmp_path / "absent.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightFileError, match=r"holds no \.gguf or \.safetensors file"):
        open_weights(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match="pickles"):
        open_weights(tmp_path / "empty")


def test_metadata_that_would_take_long_to_walk_is_refused(opened, monkeypatch):
    raw = gguf_file({"w": Q4}, pairs=[pair(f"k{i}", 9, strings([""] * 300)) for i in range(4)])
    opened(raw)
    monkeypatch.setattr(gguf_files, "MAX_STEPS", 1000)
    with pytest.raises(WeightFileError, match="claims 300 strings; its metadata may have 1000 in all"):
        opened(raw)


def test_a_long_vocabulary_costs_no_memory(opened):
    import tracemalloc

    raw = gguf_file({"w": Q4}, pairs=[pair("tokenizer.ggml.tokens", 9, strings(["token"] * 100_000))])
    tracemalloc.start()
    try:
        opened(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(raw) / 4
