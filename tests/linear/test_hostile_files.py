"""Thousands of damaged files: each opens and loads, or is one named error; none crashes, hangs or takes memory.

The files are small, so that a header which claims much more than there is stands out. The damage is drawn from a seed.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from weight_files import FOLDERS, named, pair, safetensors_file, small_gguf, strings, text

from gemma4_kernels import FormatError, QuantizedWeight, WeightFileError, open_weights
from gemma4_kernels.linear import safetensors_file as reader

GGUF_FILES = 5000
FILES_OF_EACH_LAYER = 800  # of seven layers
FLOOR = 1 << 18  # bytes of Python objects that reading even the smallest file takes
EXTREMES = (0, 1, 2, 7, 8, 31, 33, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def damaged(raw: bytes, generator: np.random.Generator) -> bytes:
    """The file with one to four faults in it."""
    for _ in range(generator.integers(1, 5)):
        raw = FAULTS[generator.integers(len(FAULTS))](raw, generator)
    return raw


def _place(raw: bytes, generator: np.random.Generator) -> int:
    """Mostly in the header."""
    end = len(raw) if generator.random() < 0.2 else min(len(raw), 900)
    return int(generator.integers(max(end, 1)))


def _flip(raw: bytes, generator: np.random.Generator) -> bytes:
    at = _place(raw, generator)
    return raw[:at] + bytes([generator.integers(256)]) + raw[at + 1 :]


def _number(raw: bytes, generator: np.random.Generator) -> bytes:
    at, size = _place(raw, generator), int(generator.choice([1, 2, 4, 8]))
    values = (*EXTREMES, len(raw), len(raw) - 1, len(raw) + 1, len(raw) - at)
    value = int(values[generator.integers(len(values))]) % 256**size
    return raw[:at] + value.to_bytes(size, "little") + raw[at + size :]


def _digits(raw: bytes, generator: np.random.Generator) -> bytes:
    """A number in JSON."""
    at = _place(raw, generator)
    while at < len(raw) and not raw[at : at + 1].isdigit():
        at += 1
    end = at
    while end < len(raw) and raw[end : end + 1].isdigit():
        end += 1
    values = (*map(str, EXTREMES), "-1", "1e999", "0.5", "null", "[]", "{}", '"8"', "true", "9" * 400, "NaN")
    return raw[:at] + values[generator.integers(len(values))].encode() + raw[end:]


def _cut(raw: bytes, generator: np.random.Generator) -> bytes:
    return raw[: generator.integers(len(raw) + 1)] if generator.random() < 0.3 else raw


def _delete(raw: bytes, generator: np.random.Generator) -> bytes:
    at = _place(raw, generator)
    return raw[:at] + raw[at + int(generator.integers(1, 40)) :]


def _repeat(raw: bytes, generator: np.random.Generator) -> bytes:
    at, size = _place(raw, generator), int(generator.integers(1, 80))
    return raw[:at] + raw[at : at + size] * int(generator.integers(2, 4)) + raw[at + size :]


def _move(raw: bytes, generator: np.random.Generator) -> bytes:
    first, second, size = _place(raw, generator), _place(raw, generator), int(generator.integers(1, 40))
    return raw[:second] + raw[first : first + size] + raw[second + size :]


FAULTS = (_flip, _flip, _number, _number, _digits, _cut, _delete, _repeat, _move)


def with_a_header_that_fits(raw: bytes) -> bytes:
    """The length of a safetensors header made right again, or damage would end there every time."""
    end = raw.find(b"}}", 8)
    return struct.pack("<Q", end + 2 - 8) + raw[8:] if end > 0 else raw


class Judge:
    """Opens files and counts what became of them."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.read = self.refused = 0
        self.size = 0
        read_bytes = reader.read_bytes

        def measured(file, start, nbytes, where):
            assert nbytes <= self.size, f"{nbytes} bytes were to be read from a file of {self.size}"
            return read_bytes(file, start, nbytes, where)

        monkeypatch.setattr(reader, "read_bytes", measured)

    def __call__(self, raw: bytes) -> None:
        self.path.write_bytes(raw)
        self.size = len(raw)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        message = self.read_all()
        _, peak = tracemalloc.get_traced_memory()
        assert peak - before <= 2 * len(raw) + FLOOR
        self.read += not message
        self.refused += bool(message)
        assert not message or (len(message) < 1000 and str(self.path.parent) in message)

    def read_all(self) -> str:
        """The message of the error that ended it, if one did."""
        try:
            files = open_weights(self.path)
            for name, info in files.tensors.items():
                loaded = files.load(name)
                assert not isinstance(loaded, QuantizedWeight) or loaded.shape == info.shape
        except (WeightFileError, FormatError) as error:
            return str(error)
        return ""


@pytest.fixture
def judge(tmp_path, monkeypatch):
    tracemalloc.start()
    yield Judge(tmp_path / "model", monkeypatch)
    tracemalloc.stop()


def test_damaged_gguf_files_are_read_or_refused(judge):
    generator = np.random.default_rng(0)
    extra = [
        pair("general.architecture", 8, text("gemma4")),
        pair("nested", 9, struct.pack("<IQ", 9, 2) + struct.pack("<IQ2H", 2, 2, 1, 2) + strings(["x"])),
        pair("general.alignment", 4, struct.pack("<I", 32)),
    ]
    bases = (small_gguf(), small_gguf(version=2, alignment=64), small_gguf())
    nested = bases[0].replace(pair("general.architecture", 8, text("gemma4")), b"".join(extra), 1)
    bases = (*bases, nested[:16] + struct.pack("<Q", 7) + nested[24:])
    for base in bases[:3]:
        judge(base)
    assert (judge.read, judge.refused) == (3, 0)
    for i in range(GGUF_FILES):
        judge(damaged(bases[i % 4], generator))
    assert judge.read > GGUF_FILES // 20
    assert judge.refused > GGUF_FILES // 2


@pytest.mark.parametrize("scheme", sorted(FOLDERS))
def test_damaged_safetensors_files_are_read_or_refused(judge, scheme):
    generator = np.random.default_rng(1)
    layer, config = FOLDERS[scheme]
    raw_config = json.dumps(config).encode()
    base = safetensors_file(named("layers.0.up", layer.tensors), {"format": "pt"})
    judge.path.with_name("config.json").write_bytes(raw_config)
    judge(base)
    assert (judge.read, judge.refused) == (1, 0)
    for i in range(FILES_OF_EACH_LAYER):
        wrong_config = damaged(raw_config, generator) if i % 3 == 0 else raw_config
        judge.path.with_name("config.json").write_bytes(wrong_config)
        raw = damaged(base, generator)
        judge(with_a_header_that_fits(raw) if i % 2 else raw)
    assert judge.read > 10
    assert judge.refused > FILES_OF_EACH_LAYER // 2


def test_every_truncation_of_a_file_is_refused(judge):
    raw = small_gguf()
    layer, _ = FOLDERS["W4A16"]
    for base in (raw, safetensors_file(named("a", layer.tensors))):
        judge.read = 0
        for length in range(0, len(base) - 32, 7):  # the last tensor of a GGUF file is padded to 32 bytes
            judge(base[:length])
        assert judge.read == 0


def test_damaged_saved_weights_are_read_or_refused(tmp_path):
    generator = np.random.default_rng(2)
    path = tmp_path / "w.safetensors"
    QuantizedWeight.from_mlx(**FOLDERS["MLX"][0].tensors, group_size=64, name="up").save(path)
    base = path.read_bytes()
    refused = 0
    for i in range(600):
        raw = damaged(base, generator)
        path.write_bytes(with_a_header_that_fits(raw) if i % 2 else raw)
        try:
            QuantizedWeight.load(path)
        except WeightFileError:
            refused += 1
    assert 100 < refused < 590
