"""A safetensors file, or a folder of them with config.json and, where there are several, an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gemma4_kernels.checks import WeightFileError
from gemma4_kernels.linear import safetensors_file
from gemma4_kernels.linear.files.layers import Layer, find_layers
from gemma4_kernels.linear.files.listing import Reader, TensorInfo, WeightFiles
from gemma4_kernels.linear.safetensors_file import Entry
from gemma4_kernels.linear.weight import QuantizedWeight

INDEX = "model.safetensors.index.json"
KEPT = ("model_type", "architectures", "torch_dtype", "dtype")
"""What of config.json is shown."""


def open_safetensors(path: Path) -> WeightFiles:
    """A file or a folder. Raises WeightFileError, OSError."""
    folder = path if path.is_dir() else path.parent
    files = _files(path) if path.is_dir() else [path]
    places: dict[str, tuple[Path, Entry]] = {}
    for file in files:
        for name, entry in safetensors_file.read_header(file).entries.items():
            if name in places:
                raise WeightFileError(f"{file}: tensor {name!r} is in {places[name][0].name} too")
            places[name] = (file, entry)
    total = sum(entry.nbytes for _, entry in places.values())
    config = _json(folder / "config.json", total)
    if "quantization_config" not in config:  # AutoGPTQ's older files keep it apart
        config |= {"quantize_config": _json(folder / "quantize_config.json", total)}
    entries = {name: entry for name, (_, entry) in places.items()}
    layers = find_layers(path, entries, config, lambda name: _read(*places[name], name))
    part_of = {member: name for name, layer in layers.items() for member in layer.members.values()}

    tensors: dict[str, TensorInfo] = {}
    readers: dict[str, Reader] = {}
    for name, (file, entry) in places.items():
        owner = part_of.get(name, name)
        if owner in tensors:
            continue
        if owner in layers:
            layer = layers[owner]
            nbytes = sum(places[member][1].nbytes for member in layer.members.values())
            tensors[owner] = TensorInfo(owner, layer.scheme, layer.shape, nbytes, True, layer.refusal)
            readers[owner] = _layer_reader(owner, layer, places)
        else:
            dtype = safetensors_file.NAMES[entry.dtype]
            tensors[name] = TensorInfo(name, dtype, entry.shape, entry.nbytes, False)
            readers[name] = _tensor_reader(file, name, entry)
    kept = {name: str(config[name])[:200] for name in KEPT if name in config}
    return WeightFiles(path, "safetensors", kept, tensors, readers)


def _files(folder: Path) -> list[Path]:
    """The files of a folder: those of its index, or all."""
    there = sorted(found for found in folder.glob("*.safetensors") if found.is_file())
    index = folder / INDEX
    if not index.is_file():
        return there
    size = sum(found.stat().st_size for found in there)
    weight_map = _json(index, size).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightFileError(f"{index}: weight_map must map tensors to files")
    names = {file.name for file in there}
    files = []
    for name in sorted(set(weight_map.values())):
        if name not in names:  # nor may an index lead out of its folder
            raise WeightFileError(
                f"{index}: names the file {name[:200]!r}, which is not in its folder: is the download complete?"
            )
        files.append(folder / name)
    return files


def _json(path: Path, described_bytes: int) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    return safetensors_file.read_json(path, described_bytes) if path.is_file() else {}


def _read(file: Path, entry: Entry, name: str) -> Tensor:
    with file.open("rb") as opened:
        return safetensors_file.read_tensor(opened, entry, f"{file}: {name}")


def _tensor_reader(file: Path, name: str, entry: Entry) -> Reader:
    return lambda: _read(file, entry, name)


def _layer_reader(owner: str, layer: Layer, places: Mapping[str, tuple[Path, Entry]]) -> Reader:
    def read() -> QuantizedWeight:
        tensors = {argument: _read(*places[member], member) for argument, member in layer.members.items()}
        return layer.make(**tensors, name=owner)

    return read
