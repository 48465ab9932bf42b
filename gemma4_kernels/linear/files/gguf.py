"""GGUF files, version 2 and 3: a header that is checked against the size of the file before anything is believed.

    "GGUF", u32 version, u64 tensors, u64 pairs
    pairs      string key, u32 type, value
    tensors    string name, u32 dims, u64 sizes[dims] (the fastest first), u32 type of ggml, u64 offset of the data
    data       from the next multiple of general.alignment (32), to which all offsets are relative

A string is u64 bytes and UTF-8. (The specification is docs/gguf.md in the repository of ggml.)

The header is walked over a memory map: arrays, such as the vocabulary, are stepped over and never built. What is kept is
bounded by MAX_PAIRS and MAX_TENSORS whatever the header claims. Data is read with ordinary reads, which see a file that has
become shorter as an error, where a memory map would end the process.
"""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from gemma4_kernels.checks import WeightFileError
from gemma4_kernels.linear import safetensors_file
from gemma4_kernels.linear.files.listing import Reader, TensorInfo, WeightFiles
from gemma4_kernels.linear.formats import gguf
from gemma4_kernels.linear.weight import QuantizedWeight

MAX_PAIRS = 4096
MAX_TENSORS = 16384
MAX_NAME = 255
MAX_DIMS = 4
MAX_DEPTH = 4
"""Of arrays in arrays."""
MAX_STEPS = 1 << 22
"""Strings and inner arrays of the metadata, each of which is a step of a loop. A vocabulary of 262144 with its merges has
less than a million."""

# The types of a value: struct's letter, and its bytes.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# ggml's types: name, values of a block, bytes of a block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1),
    25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
# Types that ggml has taken out again.
REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8",
           38: "IQ4_NL_8_8"}  # fmt: skip

Value = str | int | float | bool


class Placed(NamedTuple):
    """A tensor and where its data starts, from the start of the file."""

    info: TensorInfo
    start: int


def open_gguf(path: Path) -> WeightFiles:
    """A file, with the other shards if it is one of several. Raises WeightFileError, OSError."""
    metadata: dict[str, Value] = {}
    tensors: dict[str, TensorInfo] = {}
    readers: dict[str, Reader] = {}
    for shard in _shards(path):
        found, placed = read_header(shard)
        metadata = found | metadata  # the first shard's values stand
        for name, (info, start) in placed.items():
            if name in tensors:
                raise WeightFileError(f"{shard}: tensor {name!r} is in another shard too")
            tensors[name] = info
            readers[name] = _reader(shard, info, start)
    return WeightFiles(path, "gguf", metadata, tensors, readers)


def _shards(path: Path) -> list[Path]:
    """name-00001-of-00003.gguf stands for all three."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", path.name)
    if not match or not 1 <= int(match[2]) <= int(match[3]):
        return [path]
    count = int(match[3])
    shards = []
    for number in range(1, count + 1):
        shards.append(path.with_name(f"{match[1]}-{number:05}-of-{match[3]}{match[4]}"))
        if not shards[-1].is_file():
            raise WeightFileError(f"{path}: is one of {count} shards, and {shards[-1].name} is not there")
    return shards


def _reader(path: Path, info: TensorInfo, start: int) -> Reader:
    def read() -> QuantizedWeight | Tensor:
        with path.open("rb") as file:
            data = safetensors_file.read_bytes(file, start, info.nbytes, f"{path}: {info.name}")
        if not info.quantized:
            return data.view(safetensors_file.DTYPES[info.scheme]).view(info.shape)
        N, K = info.shape
        return QuantizedWeight.from_gguf(data.view(N, -1), info.scheme, (N, K), name=info.name)

    return read


# The header ---------------------------------------------------------------------------------------------------------


class Cursor:
    """A position in the file that never leaves it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 0
        self.steps = 0

    def error(self, message: str) -> WeightFileError:
        return WeightFileError(f"{self.path}: {message}")

    def skip(self, count: int) -> int:
        """Step over bytes; the position where they start."""
        if count > self.size - self.at:
            raise self.error(f"its header needs {count} bytes at byte {self.at}, and the file ends at byte {self.size}")
        start, self.at = self.at, self.at + count
        return start

    def spend(self, count: int, what: str) -> None:
        """Refuse arrays that would take long to step over. (One that goes beyond the end of the file ends the walk.)"""
        self.steps += count
        if self.steps > MAX_STEPS:
            raise self.error(
                f"an array at byte {self.at} claims {count} {what}; its metadata may have {MAX_STEPS} in all"
            )

    def number(self, letter: str) -> int:
        size = struct.calcsize("<" + letter)
        found: int = struct.unpack_from("<" + letter, self.data, self.skip(size))[0]
        return found

    def string(self, longest: int) -> str | None:
        """None for one that is longer than is kept."""
        length = self.number("Q")
        start = self.skip(length)
        if length > longest:
            return None
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.error(f"the string at byte {start} is not UTF-8") from None

    def name(self, what: str) -> str:
        found = self.string(MAX_NAME)
        if not found:
            raise self.error(f"{what} must have a name of 1 to {MAX_NAME} bytes")
        return found


def read_header(path: Path) -> tuple[dict[str, Value], dict[str, Placed]]:
    """Single values of the metadata, and all tensors. Raises WeightFileError, OSError."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise WeightFileError(f"{path}: is not a GGUF file: it does not start with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = Cursor(path, data)
            cursor.skip(4)
            return _walk(cursor)


def _walk(cursor: Cursor) -> tuple[dict[str, Value], dict[str, Placed]]:
    version = cursor.number("I")
    if version & 0xFFFF == 0 and version:
        raise cursor.error("is a big-endian GGUF file; use the little-endian file of the same model")
    if version not in (2, 3):
        raise cursor.error(f"is GGUF version {version}; versions 2 and 3 are read")
    num_tensors, num_pairs = cursor.number("Q"), cursor.number("Q")
    if num_tensors > MAX_TENSORS or num_pairs > MAX_PAIRS:
        raise cursor.error(
            f"claims {num_tensors} tensors and {num_pairs} pairs of metadata; read are up to {MAX_TENSORS} and {MAX_PAIRS}"
        )
    metadata: dict[str, Value] = {}
    for _ in range(num_pairs):
        key = cursor.name("a pair of metadata")
        value = _value(cursor, cursor.number("I"), depth=0)
        if key in metadata:
            raise cursor.error(f"metadata {key!r} occurs twice")
        if value is not None:
            metadata[key] = value
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment must be a power of two up to {1 << 20}, got {alignment!r}")
    described = [_tensor(cursor, alignment) for _ in range(num_tensors)]
    data_start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Placed] = {}
    for info, offset in described:
        if info.name in tensors:
            raise cursor.error(f"tensor {info.name!r} occurs twice")
        tensors[info.name] = Placed(info, data_start + offset)
    _check_places(cursor, tensors, data_start)
    return metadata, tensors


def _value(cursor: Cursor, kind: int, depth: int) -> Value | None:
    """A single value, or None for an array or a long string, which are stepped over."""
    if kind in SCALARS:
        return cursor.number(SCALARS[kind])
    if kind == STRING:
        return cursor.string(MAX_NAME)
    if kind != ARRAY:
        raise cursor.error(f"type {kind} of the value at byte {cursor.at} is not one of GGUF")
    if depth == MAX_DEPTH:
        raise cursor.error(f"arrays at byte {cursor.at} are nested more than {MAX_DEPTH} deep")
    element, count = cursor.number("I"), cursor.number("Q")
    if element in SCALARS:
        cursor.skip(count * struct.calcsize("<" + SCALARS[element]))
    elif element == STRING:
        _skip_strings(cursor, count)
    else:
        cursor.spend(count, "arrays")
        for _ in range(count):
            _value(cursor, element, depth + 1)
    return None


def _skip_strings(cursor: Cursor, count: int) -> None:
    cursor.spend(count, "strings")
    # A vocabulary has 262144 strings: this loop is the time that opening a file takes.
    at, size, data, unpack = cursor.at, cursor.size, cursor.data, struct.Struct("<Q").unpack_from
    for _ in range(count):
        if at + 8 > size:
            raise cursor.error(f"an array of strings runs over the end of the file at byte {size}")
        at += 8 + unpack(data, at)[0]
    cursor.skip(at - cursor.at)


def _tensor(cursor: Cursor, alignment: int) -> tuple[TensorInfo, int]:
    name = cursor.name("a tensor")
    dims = cursor.number("I")
    if not 1 <= dims <= MAX_DIMS:
        raise cursor.error(f"tensor {name!r} has {dims} dims, GGUF has 1 to {MAX_DIMS}")
    shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in TYPES:
        what = (
            f"{REMOVED[kind]}, which ggml has removed" if kind in REMOVED else f"number {kind}, which is unknown here"
        )
        raise cursor.error(f"tensor {name!r} has type {what}; use a Q4_0, Q4_K_M or Q8_0 file of the same model")
    scheme, values, size = TYPES[kind]
    nbytes = size
    for dim in shape[:-1]:
        nbytes *= dim
    nbytes *= shape[-1] // values
    if shape[-1] % values or not 1 <= nbytes <= cursor.size:
        raise cursor.error(
            f"tensor {name!r} has shape {shape} in {scheme}, blocks of {values}: it cannot be in a file of {cursor.size} bytes"
        )
    if offset % alignment or offset > cursor.size:
        raise cursor.error(
            f"tensor {name!r} has offset {offset}, which is beyond the file or not aligned to {alignment}"
        )
    quantized = values > 1
    refusal = ""
    if quantized and scheme not in gguf.BLOCKS:
        refusal = gguf.refusal(scheme)
    elif quantized and dims != 2:
        refusal = f"{scheme} with {dims} dims is not read; weights have two, (N, K)"
    return TensorInfo(name, scheme, shape, nbytes, quantized, refusal), offset


def _check_places(cursor: Cursor, tensors: dict[str, Placed], data_start: int) -> None:
    """No tensor overlaps another or leaves the file."""
    end, before = data_start, ""
    for name, (info, start) in sorted(tensors.items(), key=lambda item: item[1].start):
        if start < end:
            raise cursor.error(f"tensor {name!r} at byte {start} overlaps {before!r}, which ends at byte {end}")
        end, before = start + info.nbytes, name
        if end > cursor.size:
            raise cursor.error(f"tensor {name!r} ends at byte {end}, the file at byte {cursor.size}: truncated?")
