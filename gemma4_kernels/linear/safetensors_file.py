"""The safetensors container, read with suspicion and written plainly.

    8 bytes         length H of the header, little-endian
    H bytes         JSON: {"name": {"dtype": "F16", "shape": [..], "data_offsets": [begin, end]}, .., "__metadata__": {..}}
    the rest        the data; begin and end count from here, and the tensors cover all of it without overlap

A reader of files from elsewhere must not believe a number before it has compared it with the size of the file. JSON is
the other danger: three bytes of it can become a hundred bytes of objects, so a header beyond 1 MiB must be a small part of
its file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from gemma4_kernels.checks import WeightFileError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 100_000_000  # the limit of the safetensors library
FREE_JSON = 1 << 20
JSON_GROWTH = 16
"""JSON beyond FREE_JSON bytes may be at most this part of the file, or of the folder, that it describes."""
MAX_DIMS = 8


class Entry(NamedTuple):
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Of its data, in bytes from the start of the file."""
    nbytes: int


class Header(NamedTuple):
    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Names, dtypes, shapes and places of all tensors. Raises WeightFileError; OSError where there is no such file."""
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        _refuse_other_files(path, head)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, MAX_HEADER):
            raise WeightFileError(f"{path}: not a safetensors file: a header of {length} bytes in a file of {size}")
        _check_json_size(length, f"{path}: header", size)
        described = parse_json(file.read(length), f"{path}: header")
    metadata = described.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightFileError(f"{path}: __metadata__ must map names to strings")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in described.items()}
    _check_cover(path, entries, 8 + length, size)
    return Header(entries, metadata)


def read_json(path: Path, described_bytes: int = 0) -> dict[str, Any]:
    """A file that is a JSON object, beside files of that many bytes. Raises WeightFileError, OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        _check_json_size(size, str(path), described_bytes)
        return parse_json(file.read(size), str(path))


def _check_json_size(size: int, where: str, described_bytes: int) -> None:
    if size > max(FREE_JSON, described_bytes // JSON_GROWTH):
        raise WeightFileError(f"{where} has {size} bytes of JSON for {described_bytes} bytes of tensors")


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises WeightFileError, with `where` in front."""
    try:
        parsed = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise WeightFileError(f"{where} is not JSON: {str(error)[:200]}") from None
    if not isinstance(parsed, dict):
        raise WeightFileError(f"{where} must be a JSON object, got {type(parsed).__name__}")
    return parsed


def read_tensor(file: BinaryIO, entry: Entry, where: str) -> Tensor:
    """Read one tensor; `where` starts the message if the file has become shorter meanwhile."""
    data = read_bytes(file, entry.start, entry.nbytes, where)
    return data.view(entry.dtype).view(entry.shape)


def read_bytes(file: BinaryIO, start: int, nbytes: int, where: str) -> Tensor:
    """uint8 (nbytes,) from byte `start` of a file."""
    data = torch.empty(nbytes, dtype=torch.uint8)
    file.seek(start)
    view = memoryview(data.numpy())  # type: ignore[arg-type]
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise WeightFileError(f"{where}: the file ends {len(view)} bytes before its data does")
        view = view[count:]
    return data


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file that appears under its name only when it is complete."""
    # The widest dtypes first: then each tensor is aligned to its own, as the header is padded to 8 bytes.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": NAMES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end],
        }  # fmt: skip
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    unfinished = Path(f"{os.fspath(path)}.{os.getpid()}.part")
    try:
        with unfinished.open("xb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for name in order:
                file.write(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _refuse_other_files(path: str | os.PathLike[str], head: bytes) -> None:
    """Name the files that people mistake for safetensors; pickles above all, which run code when they are loaded."""
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise WeightFileError(f"{path}: is a pickle (.bin, .pt), which is never loaded; use safetensors or GGUF")
    if head.startswith(b"GGUF"):
        raise WeightFileError(f"{path}: is a GGUF file, not safetensors; open it with open_weights")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return found


def _entry(path: str | os.PathLike[str], name: str, value: Any, data_start: int) -> Entry:
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise WeightFileError(f"{where} must have dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise WeightFileError(f"{where} has dtype {str(value['dtype'])[:40]!r}, known are {', '.join(DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _whole_numbers(shape) or len(shape) > MAX_DIMS:
        raise WeightFileError(f"{where} must have a shape of up to {MAX_DIMS} sizes, got {str(shape)[:80]}")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise WeightFileError(f"{where} must have two data_offsets, got {str(offsets)[:80]}")
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    if offsets[1] - offsets[0] != nbytes:
        raise WeightFileError(f"{where} needs {nbytes} bytes for its shape, its data_offsets are {offsets}")
    return Entry(dtype, tuple(shape), data_start + offsets[0], nbytes)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_cover(path: str | os.PathLike[str], entries: dict[str, Entry], data_start: int, size: int) -> None:
    """All bytes of the data belong to one tensor each."""
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            kind = (
                "overlaps another tensor" if entry.start < end else f"leaves {entry.start - end} bytes before it unused"
            )
            raise WeightFileError(f"{path}: tensor {name[:200]!r} {kind}")
        end += entry.nbytes
    if end != size:
        raise WeightFileError(f"{path}: its tensors end at byte {end}, the file at byte {size}: truncated or damaged")
