"""Which tensors of safetensors files belong together as one quantised layer, and which constructor reads them.

Formats are known by the names and dtypes of their tensors; the folder's config.json adds what names cannot say (bits, group
size, version). A layer X is listed as "X.weight", the name that it has where it is not quantised.

Each layer is looked at once, with look-ups by name only: a header may claim a million of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma4_kernels.checks import ShapeError, WeightFileError
from gemma4_kernels.linear.formats.bitsandbytes import STATE_BYTES, parse_state, state_shape
from gemma4_kernels.linear.safetensors_file import Entry
from gemma4_kernels.linear.weight import QuantizedWeight

INSTEAD = "use a Q4_0 or Q4_K_M GGUF file or a 4-bit compressed-tensors folder of the same model"
Shape = tuple[int, ...]


class Layer(NamedTuple):
    """One layer that a file keeps as several tensors."""

    scheme: str
    shape: Shape
    members: dict[str, str]
    """Argument of the constructor -> tensor in the file."""
    make: Callable[..., QuantizedWeight]
    refusal: str = ""


@dataclass(frozen=True)
class Folder:
    """What the finders below look at."""

    path: Path
    entries: Mapping[str, Entry]
    siblings: Mapping[str, list[str]]
    """prefix -> all tensors "prefix.name"."""
    quantization: Mapping[str, Any]
    """That part of config.json."""
    packed_bits: frozenset[int]
    """Bits of compressed-tensors' groups of layers; empty where the config does not say."""
    read: Callable[[str], Tensor]

    def has(self, prefix: str, *names: str) -> bool:
        return all(f"{prefix}.{name}" in self.entries for name in names)

    def members(self, prefix: str, *names: str) -> dict[str, str]:
        """Those of the tensors "prefix.name" that there are."""
        return {name: f"{prefix}.{name}" for name in names if f"{prefix}.{name}" in self.entries}

    def setting(self, *names: str, default: Any) -> Any:
        return next((self.quantization[name] for name in names if name in self.quantization), default)

    def refused(self, scheme: str, prefix: str, shape: Shape, why: str) -> Layer:
        """A layer that is listed with all of its tensors, and not read."""
        members = {name: name for name in self.siblings[prefix] if not name.endswith(".bias")}
        return Layer(scheme, shape, members, QuantizedWeight, f"{why}; {INSTEAD}")


def find_layers(
    path: Path, entries: Mapping[str, Entry], config: Mapping[str, Any], read: Callable[[str], Tensor]
) -> dict[str, Layer]:
    """All quantised layers, by name. `read` gives a tensor; nothing but a few bytes of settings is read.

    Raises: WeightFileError.
    """
    siblings: dict[str, list[str]] = {}
    for name in entries:
        siblings.setdefault(name.rpartition(".")[0], []).append(name)
    quantization = _section(config, "quantization_config", "compression_config", "quantization", "quantize_config")
    folder = Folder(path, entries, siblings, quantization, _packed_bits(quantization), read)
    found: dict[str, Layer] = {}
    for name in entries:
        prefix, _, last = name.rpartition(".")
        layer = FINDERS[last](prefix, folder) if last in FINDERS else None
        if layer:
            found[f"{prefix}.weight"] = layer
    return found


def _section(config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The first of these that is an object; an empty one if none is."""
    return next((config[name] for name in names if isinstance(config.get(name), dict)), {})


def _matrix(entry: Entry, packed_axis: int) -> Shape:
    """The shape, with 8 codes to a word along one axis; that of the tensor itself where it is no matrix."""
    if len(entry.shape) != 2:
        return entry.shape
    return tuple(8 * size if axis == packed_axis else size for axis, size in enumerate(entry.shape))


# compressed-tensors -------------------------------------------------------------------------------------------------


def _packed_bits(quantization: Mapping[str, Any]) -> frozenset[int]:
    groups = [group for group in _section(quantization, "config_groups").values() if isinstance(group, dict)]
    bits = [_section(group, "weights").get("num_bits") for group in groups]
    return frozenset(number for number in bits if type(number) is int)


def _compressed_tensors(prefix: str, folder: Folder) -> Layer | None:
    if not folder.has(prefix, "weight_scale", "weight_shape"):
        return None
    packed = folder.entries[f"{prefix}.weight_packed"]
    shape = _matrix(packed, 1)
    if packed.dtype != torch.int32 or (folder.packed_bits and 4 not in folder.packed_bits):
        bits = " and ".join(map(str, sorted(folder.packed_bits))) or "unknown"
        why = f"compressed-tensors with {bits[:40]} bits in {packed.dtype} is not read"
        return folder.refused("compressed-tensors", prefix, shape, why)
    names = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    members = folder.members(prefix, *names)
    scheme = "W4A16_ASYM" if "weight_zero_point" in members else "W4A16"
    return Layer(scheme, shape, members, _read_compressed_tensors)


def _read_compressed_tensors(*, weight_scale: Tensor, weight_packed: Tensor, **others: Any) -> QuantizedWeight:
    if weight_scale.dim() != 2 or weight_packed.dim() != 2 or not weight_scale.shape[1]:
        shapes = f"{tuple(weight_packed.shape)} and {tuple(weight_scale.shape)}"
        raise ShapeError(f"weight_packed and weight_scale must be matrices, got {shapes}")
    group_size = 8 * weight_packed.shape[1] // weight_scale.shape[1]
    return QuantizedWeight.from_compressed_tensors(
        weight_scale=weight_scale, weight_packed=weight_packed, group_size=group_size, **others
    )


# GPTQ and AWQ -------------------------------------------------------------------------------------------------------


def _gptq_or_awq(prefix: str, folder: Folder) -> Layer | None:
    """Both call their tensors alike. The shapes tell them apart: AWQ packs qweight along N, GPTQ along K."""
    if not folder.has(prefix, "qzeros", "scales"):
        return None
    qweight, scales = folder.entries[f"{prefix}.qweight"], folder.entries[f"{prefix}.scales"]
    bits = folder.setting("bits", "w_bit", default=4)
    if len(qweight.shape) == 2 and len(scales.shape) == 2 and 8 * qweight.shape[1] == scales.shape[1]:
        shape = _matrix(qweight, 1)[::-1]
        version = str(folder.setting("version", default="gemm")).lower()[:20]
        if bits != 4 or version != "gemm":
            why = f"AWQ with {str(bits)[:20]} bits, version {version!r}, is not read"
            return folder.refused("AWQ", prefix, shape, why)
        return Layer("AWQ", shape, folder.members(prefix, "qweight", "qzeros", "scales"), QuantizedWeight.from_awq)
    shape = _matrix(qweight, 0)[::-1]
    if bits != 4:
        return folder.refused("GPTQ", prefix, shape, f"GPTQ with {str(bits)[:20]} bits is not read")
    form = str(folder.setting("checkpoint_format", default="gptq"))[:20]

    def make(**tensors: Any) -> QuantizedWeight:
        return QuantizedWeight.from_gptq(checkpoint_format=form, **tensors)

    return Layer("GPTQ", shape, folder.members(prefix, "qweight", "qzeros", "scales", "g_idx"), make)


# bitsandbytes and MLX -----------------------------------------------------------------------------------------------


def _bitsandbytes_or_mlx(prefix: str, folder: Folder) -> Layer | None:
    dtype = folder.entries[f"{prefix}.weight"].dtype
    if dtype == torch.uint8 and folder.has(f"{prefix}.weight", "absmax", "quant_map"):
        return _bitsandbytes(f"{prefix}.weight", folder)
    if dtype == torch.uint32 and folder.has(prefix, "scales"):
        return _mlx(prefix, folder)
    return None


def _bitsandbytes(weight: str, folder: Folder) -> Layer | None:
    states = {kind: f"{weight}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}
    kind = next((kind for kind, name in states.items() if name in folder.entries), None)
    if kind is None:
        return None
    if folder.entries[states[kind]].nbytes > STATE_BYTES:
        raise WeightFileError(f"{folder.path}: {states[kind]} must have at most {STATE_BYTES} bytes")
    try:
        shape = state_shape(parse_state(folder.read(states[kind])))
    except (TypeError, ValueError) as error:
        raise WeightFileError(f"{folder.path}: {states[kind]}: {error}") from error
    members = folder.members(weight, "absmax", "quant_map", "nested_absmax", "nested_quant_map")
    members |= {"quant_state": states[kind], "weight": weight}
    scheme = kind.upper() + ("_NESTED" if "nested_absmax" in members else "")
    return Layer(scheme, shape, members, QuantizedWeight.from_bitsandbytes)


def _mlx(prefix: str, folder: Folder) -> Layer:
    own = _section(folder.quantization, prefix)  # a layer may have settings of its own
    bits, mode, group_size = (
        own.get(name, folder.quantization.get(name, default))
        for name, default in (("bits", 4), ("mode", "affine"), ("group_size", None))
    )
    weight, scales = folder.entries[f"{prefix}.weight"], folder.entries[f"{prefix}.scales"]
    shape = _matrix(weight, 1)
    if bits != 4 or mode != "affine" or not folder.has(prefix, "biases"):
        if len(shape) == 2 and type(bits) is int and 0 < bits <= 8:
            shape = (shape[0], weight.shape[1] * 32 // bits)
        why = f"MLX with {str(bits)[:20]} bits, mode {str(mode)[:20]!r}, is not read"
        return folder.refused("MLX", prefix, shape, why)
    if group_size is None and len(scales.shape) == 2 and len(shape) == 2 and scales.shape[1]:
        group_size = shape[1] // scales.shape[1]

    def make(**tensors: Any) -> QuantizedWeight:
        return QuantizedWeight.from_mlx(group_size=group_size, **tensors)  # type: ignore[arg-type]  # it checks

    return Layer("MLX", shape, folder.members(prefix, "weight", "scales", "biases"), make)


# Formats that are refused by name -----------------------------------------------------------------------------------


def _exl2(prefix: str, folder: Folder) -> Layer:
    shape = folder.entries[f"{prefix}.q_weight"].shape
    if len(shape) == 2 and folder.has(prefix, "q_invperm"):
        shape = (shape[1], *folder.entries[f"{prefix}.q_invperm"].shape)
    return folder.refused("EXL2", prefix, shape, "EXL2 (groups of mixed bit widths) is not read")


def _exl3(prefix: str, folder: Folder) -> Layer:
    shape = folder.entries[f"{prefix}.trellis"].shape
    if len(shape) == 3:  # tiles of 16 x 16, (K/16, N/16, words of a tile)
        shape = (16 * shape[1], 16 * shape[0])
    return folder.refused("EXL3", prefix, shape, "EXL3 (trellis codes) is not read")


FINDERS: dict[str, Callable[[str, Folder], Layer | None]] = {
    "weight_packed": _compressed_tensors,
    "qweight": _gptq_or_awq,
    "weight": _bitsandbytes_or_mlx,
    "q_weight": _exl2,
    "trellis": _exl3,
}
