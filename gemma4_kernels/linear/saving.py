"""A QuantizedWeight as a safetensors file of its own: its fields as tensors, the rest as metadata."""

from __future__ import annotations

import os
from pathlib import Path

from gemma4_kernels.checks import WeightFileError
from gemma4_kernels.linear import safetensors_file
from gemma4_kernels.linear.schemes import SCHEMES, Parts

FORMAT = "gemma4_kernels.QuantizedWeight"
VERSION = "1"
"""Rises when a field gets another meaning. A file of another version is refused."""


def save(path: str | os.PathLike[str], parts: Parts, name: str) -> None:
    N, K = parts.shape
    metadata = {
        "format": FORMAT, "version": VERSION, "scheme": parts.scheme, "rows": str(N), "columns": str(K),
        "group_size": str(parts.group_size), "name": name,
    }  # fmt: skip
    safetensors_file.write(path, parts.tensors, metadata)


def load(path: str | os.PathLike[str]) -> tuple[Parts, str]:
    header = safetensors_file.read_header(path)
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise WeightFileError(f"{path}: was not written by QuantizedWeight.save; for a model use open_weights")
    if metadata.get("version") != VERSION:
        raise WeightFileError(f"{path}: has version {metadata.get('version')!r}, this package reads {VERSION}")
    if metadata.get("scheme") not in SCHEMES:
        raise WeightFileError(f"{path}: has scheme {metadata.get('scheme')!r}, known are {', '.join(SCHEMES)}")
    sizes = [metadata.get(name, "") for name in ("rows", "columns", "group_size")]
    if not all(size.isascii() and size.isdigit() and len(size) < 19 for size in sizes):
        raise WeightFileError(f"{path}: rows, columns and group_size must be whole numbers, got {', '.join(sizes)}")
    rows, columns, group_size = map(int, sizes)
    with Path(path).open("rb") as file:
        tensors = {name: safetensors_file.read_tensor(file, entry, str(path)) for name, entry in header.entries.items()}
    return Parts(metadata["scheme"], (rows, columns), group_size, tensors), metadata.get("name", "")
