"""Folders of safetensors: layers put together, read one at a time, and each fault named."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from linear_helpers import gptq_layer, mlx_layer, same_bits
from weight_files import FOLDERS, named, safetensors_file, with_header

from gemma4_kernels import FormatError, QuantizedWeight, WeightFileError, open_weights

NORM = torch.ones(5, dtype=torch.bfloat16)


@pytest.fixture
def folder(tmp_path):
    """Write files (name -> bytes, or what becomes JSON) and return their folder."""

    def write(**files):
        for name, content in files.items():
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            (tmp_path / name.replace("__", ".")).write_bytes(raw)
        return tmp_path

    return write


@pytest.mark.parametrize("scheme", sorted(FOLDERS))
def test_a_folder_lists_and_reads_the_layers_of_each_format(folder, scheme):
    layer, config = FOLDERS[scheme]
    raw = safetensors_file({**named("layers.0.q_proj", layer.tensors), "norm.weight": NORM}, {"format": "pt"})
    files = open_weights(folder(model__safetensors=raw, config__json=config | {"model_type": "gemma4"}))
    assert files.format == "safetensors"
    assert files.metadata == {"model_type": "gemma4"}
    info = files.tensors["layers.0.q_proj.weight"]
    assert (info.scheme, info.shape, info.quantized, info.refusal) == (scheme, layer.w.shape, True, "")
    assert files.tensors.keys() == {"layers.0.q_proj.weight", "norm.weight"}
    expected_bytes = sum(tensor.nbytes for tensor in layer.tensors.values())
    if scheme == "AWQ":
        assert info.nbytes == expected_bytes
    assert files.nbytes == expected_bytes + NORM.nbytes
    (weight,) = files.weights()
    assert weight.name == "layers.0.q_proj.weight"
    assert same_bits(weight.dequantize(), layer.w)
    assert torch.equal(files.load("norm.weight"), NORM)


def test_a_file_by_itself_is_read_like_its_folder(folder):
    layer, config = FOLDERS["MLX"]
    path = folder(model__safetensors=safetensors_file(named("a", layer.tensors)), config__json=config)
    assert same_bits(open_weights(path / "model.safetensors").load("a.weight").dequantize(), layer.w)


def test_files_of_an_index_are_one_model(folder):
    first, second = safetensors_file({"a.weight": NORM}), safetensors_file({"b.weight": NORM})
    index = {"weight_map": {"a.weight": "1.safetensors", "b.weight": "2.safetensors"}}
    path = folder(
        **{"1__safetensors": first, "2__safetensors": second, "3__safetensors": b"not of this model"},
        model__safetensors__index__json=index,
    )
    assert list(open_weights(path).tensors) == ["a.weight", "b.weight"]


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": "../../etc/passwd"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "2.safetensors"}},
        {"weight_map": {"a": 3}},
        {"weight_map": []},
        {},
        [],
    ],
)
def test_an_index_cannot_lead_out_of_its_folder_or_to_nothing(folder, index):
    path = folder(**{"1__safetensors": safetensors_file({"a": NORM})}, model__safetensors__index__json=index)
    with pytest.raises(WeightFileError, match=r"index\.json"):
        open_weights(path)


def test_one_name_in_two_files_is_refused(folder):
    raw = safetensors_file({"a": NORM})
    with pytest.raises(WeightFileError, match=r"'a' is in 1\.safetensors too"):
        open_weights(folder(**{"1__safetensors": raw, "2__safetensors": raw}))


def test_settings_of_one_layer_stand_above_those_of_the_model(folder):
    small, large = mlx_layer(4, 64, 64), mlx_layer(4, 64, 32, seed=1)
    raw = safetensors_file({**named("a", small.tensors), **named("b", large.tensors), **named("c", large.tensors)})
    settings = {"bits": 4, "group_size": 64, "b": {"bits": 4, "group_size": 32}, "c": {"bits": 8, "group_size": 16}}
    files = open_weights(folder(model__safetensors=raw, config__json={"quantization": settings}))
    assert same_bits(files.load("a.weight").dequantize(), small.w)
    assert same_bits(files.load("b.weight").dequantize(), large.w)
    assert files.tensors["c.weight"].shape == (4, 32)
    with pytest.raises(FormatError, match="MLX with 8 bits, mode 'affine', is not read; use a Q4_0"):
        files.load("c.weight")


def test_formats_that_are_not_read_are_listed_and_refused_by_name(folder):
    words = torch.zeros(4, 4, dtype=torch.int32)
    tensors = {
        "a.trellis": torch.zeros(4, 2, 64, dtype=torch.int16), "a.suh": NORM, "a.svh": NORM, "a.bias": NORM,
        "b.q_weight": words, "b.q_invperm": words[0], "b.q_scale": words,
        "c.qweight": words, "c.qzeros": words, "c.scales": words.half(),
    }  # fmt: skip
    path = folder(model__safetensors=safetensors_file(tensors), config__json={"quantization_config": {"bits": 8}})
    files = open_weights(path)
    assert [(info.name, info.scheme) for info in files.tensors.values()] == [
        ("a.weight", "EXL3"), ("a.bias", "BF16"), ("b.weight", "EXL2"), ("c.weight", "GPTQ"),
    ]  # fmt: skip
    assert files.tensors["a.weight"].shape == (32, 64)
    for name, words in (("a", "EXL3"), ("b", "EXL2"), ("c", "GPTQ with 8 bits")):
        with pytest.raises(FormatError, match=rf"{words}.* is not read; use a Q4_0 or Q4_K_M GGUF file"):
            files.load(f"{name}.weight")


def test_compressed_tensors_of_eight_bits_are_refused_by_name(folder):
    layer, _ = FOLDERS["W4A16"]
    config = {"quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}}
    path = folder(model__safetensors=safetensors_file(named("a", layer.tensors)), config__json=config)
    with pytest.raises(FormatError, match="compressed-tensors with 8 bits"):
        open_weights(path).load("a.weight")


def test_a_layer_whose_tensors_do_not_fit_is_one_error_with_its_name(folder):
    tensors = named("layers.3.up", gptq_layer(8, 64, 32).tensors)
    tensors["layers.3.up.qzeros"] = torch.zeros(3, 1, dtype=torch.int32)
    files = open_weights(folder(model__safetensors=safetensors_file(tensors)))
    with pytest.raises(
        WeightFileError, match=r"layers\.3\.up\.weight: .*qzeros must have shape \(2, 1\), got \(3, 1\)"
    ):
        files.load("layers.3.up.weight")


def test_a_weight_that_was_saved_by_itself_is_read_by_load(tmp_path):
    weight = QuantizedWeight.quantize(torch.ones(2, 32), "Q4_0")
    weight.save(tmp_path / "w.safetensors")
    assert open_weights(tmp_path / "w.safetensors").tensors.keys() == {"codes", "scales"}


# Faults of a header -------------------------------------------------------------------------------------------------

GOOD = {"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}


def described(**changes) -> bytes:
    return with_header(json.dumps({"w": GOOD["w"] | changes}).encode(), bytes(8))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\x01\x02", "not a safetensors file"),
        (with_header(b"{}", b"", length=2**63), "a header of 9223372036854775808 bytes in a file of 10"),
        (with_header(b"{}", b"", length=3), "a header of 3 bytes in a file of 10"),
        (with_header(b"{", b""), "is not JSON"),
        (with_header(b"\xff\xff", b""), "is not JSON"),
        (with_header(b"[]", b""), "must be a JSON object, got list"),
        (with_header(b"[" * 100_000, b""), "is not JSON"),
        (with_header(b'{"w": ' + b"1" * 5000 + b"}", b""), "is not JSON"),
        (with_header(b'{"__metadata__": {"a": 1}}', b""), "__metadata__ must map names to strings"),
        (with_header(b'{"w": 3}', b""), "must have dtype, shape and data_offsets"),
        (with_header(b'{"w": {}, "w": {}}', b""), "occurs twice"),
        (described(dtype="Q4"), "has dtype 'Q4', known are"),
        (described(dtype=["U8"]), "has dtype"),
        (described(shape=[2**62, 2**62]), "needs .* bytes for its shape"),
        (described(shape=[-8]), "must have a shape"),
        (described(shape=[8.0]), "must have a shape"),
        (described(shape=[True]), "must have a shape"),
        (described(shape=[1] * 9), "must have a shape of up to 8 sizes"),
        (described(shape="8"), "must have a shape"),
        (described(data_offsets=[0, 8, 8]), "must have two data_offsets"),
        (described(data_offsets=[8, 0]), "needs 8 bytes for its shape"),
        (described(data_offsets=[4, 12]), "leaves 4 bytes before it unused"),
        (described(shape=[16], data_offsets=[0, 16]), "truncated or damaged"),
        (described(shape=[4], data_offsets=[0, 4]), "truncated or damaged"),
        (with_header(json.dumps(GOOD | {"v": GOOD["w"]}).encode(), bytes(8)), "overlaps another tensor"),
        (described() + b"more", "truncated or damaged"),
        (struct.pack("<Q", 8) + b"PK\x03\x04" + bytes(4), "is not JSON"),
        (b"PK\x03\x04" + bytes(100), "is a pickle"),
        (b"\x80\x02}q\x00." + bytes(10), "is a pickle"),
    ],
)
def test_each_fault_of_a_header_is_named(tmp_path, raw, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(WeightFileError, match=message):
        open_weights(path)


def test_json_beside_little_data_is_refused_before_it_is_parsed(tmp_path):
    import tracemalloc

    # Three bytes become an object of sixty: 3 MB of header would become 90 MB.
    header = b'{"w": [' + b"[]," * 1_000_000 + b"[]]}"
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(header, b""))
    tracemalloc.start()
    try:
        with pytest.raises(WeightFileError, match="bytes of JSON for"):
            open_weights(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(header)


def test_a_file_of_numbers_beyond_every_limit_stays_an_error(folder):
    config = b'{"quantization_config": {"bits": 1e999, "config_groups": {"a": {"weights": {"num_bits": [1]}}}}}'
    layer, _ = FOLDERS["GPTQ"]
    files = open_weights(folder(model__safetensors=safetensors_file(named("a", layer.tensors)), config__json=config))
    with pytest.raises(FormatError, match="GPTQ with inf bits"):
        files.load("a.weight")
