"""`replace_linear`: the linear layers of any PyTorch model, from the quantised weights of a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gemma4_kernels.checks import ShapeError
from gemma4_kernels.linear.files.listing import WeightFiles
from gemma4_kernels.linear.modules import QuantizedEmbedding, QuantizedLinear
from gemma4_kernels.linear.weight import QuantizedWeight

FUNCTION = "replace_linear"

# Names of layers in GGUF files (llama.cpp's gguf-py/gguf/tensor_mapping.py), and in transformers' Gemma models.
_GGUF_LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_WHOLE = {"token_embd": "embed_tokens", "output": "lm_head"}


class Replaced(NamedTuple):
    """What `replace_linear` did."""

    modules: tuple[str, ...]
    """Names of the modules that are quantised now, tied ones too."""
    unmatched: tuple[str, ...]
    """Names of weights that no module has."""


def replace_linear(
    model: nn.Module, weights: Mapping[str, QuantizedWeight] | WeightFiles, *, strict: bool = True
) -> Replaced:
    """Put quantised weights in the place of a model's dense ones, one layer after the other, in place.

    A weight named "layers.0.mlp.up_proj.weight", with or without the last part, belongs to the `nn.Linear` or `nn.Embedding`
    of that name, or to the only one whose name ends with it after a dot. Names of GGUF files ("blk.0.ffn_up.weight") are
    known too. Modules that share one weight, as a tied head does with its embedding, share the quantised one. What a
    weight is loaded for is replaced before the next is loaded, so memory never holds more than one layer twice.

    Args:
        model: any module. Its layers keep their names and biases; each weight goes to the device of the one it replaces,
            unless that is "meta".
        weights: name -> QuantizedWeight, which may load when asked, or what `open_weights` gives: all quantised tensors.
        strict: False leaves weights out that no module has; they are in the result.
    Returns: Replaced.
    Raises: ValueError for weights without a module, for two weights of one module, and for names that fit several modules;
        TypeError for modules with a forward of their own; ShapeError. All of these before anything is replaced, except for
        shapes that a mapping tells only when a weight is loaded.
    """
    names = _names(weights)
    targets = {name: _module_of(model, name) for name in names}
    unmatched = tuple(name for name in names if targets[name] is None)
    if unmatched and strict:
        raise ValueError(
            f"{FUNCTION}: weights must each have an nn.Linear or nn.Embedding, got {', '.join(unmatched[:8])}"
            f"{' and more' if len(unmatched) > 8 else ''}, which the model has not; strict=False leaves them out"
        )
    groups = _modules_by_parameter(model)
    plan: dict[str, list[str]] = {}  # weight -> modules
    owner: dict[str, str] = {}
    for name, target in targets.items():
        if target is None:
            continue
        module = model.get_submodule(target)
        plan[name] = groups[_key(module)]
        for each in plan[name]:
            if each in owner:
                raise ValueError(f"{FUNCTION}: {each} must have one weight, got {owner[each]} and {name}")
            owner[each] = name
            _check_replaceable(each, model.get_submodule(each))
        if (shape := _shape(weights, name)) is not None:
            _check_shape(name, shape, target, module)
    done: list[str] = []
    for name, modules in plan.items():
        weight = weights.load(name) if isinstance(weights, WeightFiles) else weights[name]
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"{FUNCTION}: weights[{name!r}] must be a QuantizedWeight, got {type(weight).__name__}")
        _replace(model, modules, weight, name)
        done += modules
        del weight
    return Replaced(tuple(done), unmatched)


# Names --------------------------------------------------------------------------------------------------------------


def _names(weights: Any) -> list[str]:
    if isinstance(weights, WeightFiles):
        return [name for name, info in weights.tensors.items() if info.quantized]
    if isinstance(weights, Mapping):
        return list(weights)
    raise TypeError(
        f"{FUNCTION}: weights must map names to QuantizedWeights or come from open_weights, got {type(weights).__name__}"
    )


def _module_of(model: nn.Module, name: str) -> str | None:
    wanted = _translated(name.removesuffix(".weight"))
    candidates = _candidates(model)
    if wanted in candidates:
        return wanted
    # One module may have several paths; one of them will do.
    fitting = {id(module): path for path, module in candidates.items() if path.endswith(f".{wanted}")}
    if len(fitting) > 1 and wanted != name.removesuffix(".weight"):  # a GGUF file names the layers of the text model so
        fitting = {key: path for key, path in fitting.items() if "language_model." in path} or fitting
    if len(fitting) > 1:
        raise ValueError(
            f"{FUNCTION}: {name} must name one module, got {' and '.join(fitting.values())}; "
            "give the part of the model that is meant"
        )
    return next(iter(fitting.values()), None)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of all that could be replaced; a module that stands in two places has both."""
    found = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in found if path and isinstance(module, (nn.Linear, nn.Embedding))}


def _translated(name: str) -> str:
    if name in _GGUF_WHOLE:
        return _GGUF_WHOLE[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", name)
    if found and found[2] in _GGUF_LAYERS:
        return f"layers.{found[1]}.{_GGUF_LAYERS[found[2]]}"
    return name


def _modules_by_parameter(model: nn.Module) -> dict[int, list[str]]:
    """id of a weight -> the modules that have it."""
    groups: dict[int, list[str]] = {}
    for path, module in _candidates(model).items():
        groups.setdefault(_key(module), []).append(path)
    return groups


def _key(module: nn.Module) -> int:
    """Of its weight; of itself where it makes its weight at each use, as parametrised modules do."""
    weight = module._parameters.get("weight")
    return id(module) if weight is None else id(weight)


# Modules ------------------------------------------------------------------------------------------------------------


def _dense(module: nn.Module) -> Tensor:
    """The weight of an nn.Linear or nn.Embedding."""
    weight: Any = module.weight
    return weight  # type: ignore[no-any-return]


def _check_replaceable(path: str, module: nn.Module) -> None:
    base = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
    scaled = base is nn.Embedding and hasattr(module, "embed_scale")  # transformers' scaled embeddings
    if (type(module).forward is not base.forward and not scaled) or isinstance(module, NonDynamicallyQuantizableLinear):
        raise TypeError(f"{FUNCTION}: {path} must compute what {base.__name__} does, got {type(module).__name__}")
    if module._parameters.get("weight") is None:
        raise TypeError(f"{FUNCTION}: {path} must hold its weight as a parameter, got a parametrised {base.__name__}")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise TypeError(f"{FUNCTION}: {path} must not change its weight, got an nn.Embedding with max_norm")


def _shape(weights: Any, name: str) -> tuple[int, ...] | None:
    """As far as it is known without loading anything."""
    if isinstance(weights, WeightFiles):
        return weights.tensors[name].shape
    return weights[name].shape if type(weights) is dict and isinstance(weights[name], QuantizedWeight) else None


def _check_shape(name: str, shape: tuple[int, ...], path: str, module: nn.Module) -> None:
    expected = tuple(_dense(module).shape)
    if tuple(shape) != expected:
        raise ShapeError(f"{FUNCTION}: {name} must have shape {expected} for {path}, got {tuple(shape)}")


def _replace(model: nn.Module, paths: list[str], weight: QuantizedWeight, name: str) -> None:
    modules = [model.get_submodule(path) for path in paths]
    for path, module in zip(paths, modules, strict=True):
        _check_shape(name, weight.shape, path, module)
    dense = _dense(modules[0])
    if dense.device.type != "meta":
        weight = weight.to(dense.device)
    shared: Any = weight
    replaced: dict[int, QuantizedLinear | QuantizedEmbedding] = {}  # a module in two places stays one
    for path, module in zip(paths, modules, strict=True):
        made = replaced.get(id(module))
        if made is None and isinstance(module, nn.Linear):
            made = QuantizedLinear(shared, module.bias)
        elif made is None:
            made = QuantizedEmbedding(shared, _floating(dense.dtype), _embed_scale(module))
        made.train(module.training)
        replaced[id(module)], shared = made, made.quantized
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, made)


def _floating(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def _embed_scale(module: nn.Module) -> float:
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
    return float(scale)
