"""A drafter out of another module, or out of a downloaded folder."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemma4_kernels import checks
from gemma4_kernels.checks import FormatError, ShapeError, WeightFileError
from gemma4_kernels.linear import safetensors_file
from gemma4_kernels.linear.files import WeightFiles, open_weights
from gemma4_kernels.linear.replace import replace_linear
from gemma4_kernels.mtp.drafter_config import DrafterConfig

if TYPE_CHECKING:
    from gemma4_kernels.mtp.drafter import Drafter

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_UNREAD = re.compile(r"model\.layers\.\d+\.self_attn\.[kv]_(proj|norm)\.weight")
"""Layers that share keys and values have no use for these, but some checkpoints carry them along."""


def from_model(cls: type[Drafter], assistant: Any) -> Drafter:
    if not isinstance(assistant, nn.Module) or not hasattr(assistant, "config"):
        raise TypeError(f"Drafter.from_model: assistant must be a module with a config, got {type(assistant).__name__}")
    with torch.device("meta"):
        drafter = cls(DrafterConfig.from_config(assistant.config))
    for path, own in list(drafter.named_modules()):
        if isinstance(own, (nn.Linear, nn.Embedding)):
            _put(drafter, path, _shared_layer(assistant, path, own))
        else:
            for name, tensor in [*own.named_parameters(recurse=False), *own.named_buffers(recurse=False)]:
                if name not in own._non_persistent_buffers_set:
                    full_name = f"{path}.{name}"
                    _set(own, name, _shared_tensor(assistant, full_name, tensor))
    drafter.num_assistant_tokens = getattr(getattr(assistant, "generation_config", None), "num_assistant_tokens", None)
    return _ready(drafter, drafter.model.norm.weight.device)


def _shared_layer(assistant: nn.Module, path: str, own: nn.Linear | nn.Embedding) -> nn.Module:
    try:
        layer = assistant.get_submodule(path)
    except AttributeError:
        raise TypeError(
            f"Drafter.from_model: assistant must have a layer {path}, got {type(assistant).__name__}"
        ) from None
    sizes = ("out_features", "in_features") if isinstance(own, nn.Linear) else ("num_embeddings", "embedding_dim")
    expected, got = (tuple(getattr(module, size, None) for size in sizes) for module in (own, layer))
    if None not in got and got != expected:
        raise ShapeError(f"Drafter.from_model: {path} must have shape {expected}, got {got}")
    return layer


def _shared_tensor(assistant: nn.Module, name: str, own: Tensor) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    try:
        tensor = getattr(assistant.get_submodule(parent), leaf)
    except AttributeError:
        raise TypeError(f"Drafter.from_model: assistant must have {name}, got {type(assistant).__name__}") from None
    checks.has_shape("Drafter.from_model", name, tensor, tuple(own.shape))
    return tensor  # type: ignore[no-any-return]


def from_folder(
    cls: type[Drafter], path: str | os.PathLike[str], dtype: torch.dtype, device: torch.device | str
) -> Drafter:
    if dtype not in checks.FLOATS:
        raise checks.DTypeError(f"Drafter.from_folder: dtype must be a float dtype, got {dtype}")
    path = Path(path)
    if not path.is_dir():
        raise WeightFileError(f"{path}: is no folder")
    if not (path / "config.json").is_file():
        raise WeightFileError(f"{path}: holds no config.json: is the download complete?")
    files = open_weights(path)
    if files.format != "safetensors":
        raise FormatError(f"{path}: a drafter is not read from {files.format}; use its safetensors")
    try:
        config = DrafterConfig.from_config(safetensors_file.read_json(path / "config.json", files.nbytes))
        if _HEAD in files.tensors:  # what the file has wins: then the table is of no use
            config = replace(config, tied_head=False)
        drafter, expected = _empty(cls, files, config, dtype)
        _refuse_unknown(files, expected)
        replace_linear(drafter, files, strict=False)  # a table that is not the head has no module
    except (FormatError, WeightFileError):
        raise
    except (TypeError, ValueError) as error:
        raise WeightFileError(f"{path}: is no drafter that can be read: {error}") from error
    for name in expected:
        if not files.tensors[name].quantized:
            _load(drafter, files, name, dtype, device)
    drafter.num_assistant_tokens = _suggested_drafts(path / "generation_config.json", files.nbytes)
    if config.tied_head and not files.tensors[_EMBEDDING].quantized:
        drafter.lm_head.weight = drafter.model.embed_tokens.weight
    return _ready(drafter.to(device), device).requires_grad_(False)


def _suggested_drafts(path: Path, largest: int) -> int | None:
    found = safetensors_file.read_json(path, largest).get("num_assistant_tokens") if path.is_file() else None
    if found is not None and (not isinstance(found, int) or isinstance(found, bool) or found < 0):
        raise WeightFileError(f"{path}: num_assistant_tokens must be a whole number, got {str(found)[:200]}")
    return found


def _empty(
    cls: type[Drafter], files: WeightFiles, config: DrafterConfig, dtype: torch.dtype
) -> tuple[Drafter, list[str]]:
    """A drafter without memory, and the names of the tensors that it needs, all of which the file has."""
    last = f"model.layers.{len(config.layers) - 1}.layer_scalar"
    if last not in files.tensors:  # before any number of layers is built because a config says so
        raise WeightFileError(f"{files.path}: has no {last}, but {len(config.layers)} layers in its config.json")
    with torch.device("meta"):
        drafter = cls(config).to(dtype)
    expected = [name for name in drafter.state_dict() if not (config.tied_head and name == _HEAD)]
    missing = [name for name in expected if name not in files.tensors]
    if missing:
        raise WeightFileError(
            f"{files.path}: has no {', '.join(missing[:8])}{' and more' if len(missing) > 8 else ''}: is the download complete?"
        )
    return drafter, expected


def _refuse_unknown(files: WeightFiles, expected: list[str]) -> None:
    """A tensor that nothing reads would have changed the result: a bias, an adapter, another architecture."""
    known = {*expected, _EMBEDDING}
    unknown = [name for name in files.tensors if name not in known and not _UNREAD.fullmatch(name)]
    if unknown:
        raise WeightFileError(f"{files.path}: holds {unknown[0][:200]!r}, which no drafter has")


def _load(drafter: nn.Module, files: WeightFiles, name: str, dtype: torch.dtype, device: torch.device | str) -> None:
    parent, _, leaf = name.rpartition(".")
    module = drafter.get_submodule(parent)
    own = getattr(module, leaf)
    where = f"{files.path}: {name}"
    if files.tensors[name].shape != tuple(own.shape):
        raise WeightFileError(f"{where} must have shape {tuple(own.shape)}, got {files.tensors[name].shape}")
    tensor = files.load(name)
    assert isinstance(tensor, Tensor)  # no quantised weight is asked for
    if own.is_floating_point():
        if tensor.dtype not in checks.FLOATS:
            raise FormatError(f"{where}: {tensor.dtype} without scales is not read")
        tensor = tensor.to(device=device, dtype=dtype)
    else:
        if tensor.dtype not in checks.INTEGERS:
            raise WeightFileError(f"{where} must hold int32 or int64, got {tensor.dtype}")
        if not torch.equal(tensor.sort().values, torch.arange(tensor.numel(), dtype=tensor.dtype)):
            raise WeightFileError(f"{where} must name each token once")
        tensor = tensor.to(device=device, dtype=torch.int64)
    _set(module, leaf, nn.Parameter(tensor, requires_grad=False) if leaf in module._parameters else tensor)


# Modules ------------------------------------------------------------------------------------------------------------


def _put(drafter: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(drafter.get_submodule(parent), child, layer)


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = tensor  # type: ignore[assignment]
    else:
        module._buffers[name] = tensor


def _ready(drafter: Drafter, device: torch.device | str) -> Drafter:
    """The frequencies, which no file and no other module holds, where the weights are."""
    for name, buffer in drafter.model.named_buffers(recurse=False):
        drafter.model._buffers[name] = buffer.to(device)
    return drafter.eval()
