"""How much memory a model takes on a card, and the longest context that fits: arithmetic, nothing is loaded or allocated.

    weights     the bytes of QuantizedWeight for each tensor of the file, those of the file for what is not quantised
    caches      full layers: every row of the context, values alone (bf16, fp8, int8) or keys and values ("both"), in pages;
                sliding layers: rings of the window and the rows of one pass, keys and values in bf16
    workspace   what a pass needs beside them: bounds, each with its formula where it is made
    reserve     what is no tensor of ours, an assumption: the CUDA context and libraries, a display, fragments

`model_of_files` reads the sizes of a file's tensors, `model_of_geometry` makes them from a geometry and the names of schemes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from gemma4_kernels import checks, geometry
from gemma4_kernels.attention.ring import RingCache
from gemma4_kernels.attention.triton import tables
from gemma4_kernels.linear import safetensors_file
from gemma4_kernels.linear.files import TensorInfo, WeightFiles, open_weights
from gemma4_kernels.linear.schemes import SCHEMES, check_sizes, expected_tensors
from gemma4_kernels.mtp.cache import FULL_PAGE

GIB = 2**30
Form = Literal["bf16", "fp8", "int8", "both"]
FORMS: dict[Form, str] = {
    "bf16": "values alone, 16 bits",
    "fp8": "values alone, e4m3, one scale",
    "int8": "values alone, int8, a scale a row and KV head",
    "both": "keys and values, 16 bits",
}
DENSE = {"BF16": 2, "F16": 2, "F32": 4}
VERIFIED_ROWS = 16
"""The most rows that a pass decodes or verifies at once: a token and its drafts."""
CHUNK = 512
"""Rows of a prompt that one pass takes, unless the caller says otherwise."""
RESERVE = GIB
"""A PyTorch process holds 0.3 to 0.7 GiB before its first tensor, a card of 12 GiB shows its user 11.75 to 12, and a display
takes what it takes. Nobody has measured it with this package: an assumption, to be replaced by one's own."""
MOST_REQUESTS, MOST_ROWS = 1 << 16, 1 << 20
MULTIPROCESSORS = 128
"""Of an unknown card: more than most have, which makes a bound of what follows from it."""


@dataclass(frozen=True)
class Weight:
    """One tensor: what it is kept as, and its bytes in memory."""

    name: str
    scheme: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class CacheLayer:
    """What one layer caches."""

    kind: geometry.LayerKind
    num_kv_heads: int
    head_dim: int
    k_eq_v: bool = False


@dataclass(frozen=True)
class Model:
    """All of a model that its memory depends on."""

    name: str
    weights: tuple[Weight, ...]
    layers: tuple[CacheLayer, ...]
    """Those with keys and values of their own."""
    window: int
    num_heads: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    max_context: int
    notes: tuple[str, ...] = ()

    def of(self, kind: geometry.LayerKind) -> list[CacheLayer]:
        return [layer for layer in self.layers if layer.kind == kind]

    @property
    def values_suffice(self) -> bool:
        """Keys of all full layers are a function of their values."""
        return all(layer.k_eq_v for layer in self.of("full"))


@dataclass(frozen=True)
class Item:
    """One line of a plan."""

    part: str
    """weights, drafter, cache, workspace or reserve."""
    name: str
    nbytes: int
    detail: str = ""


@dataclass(frozen=True)
class Setting:
    """What of a plan is not the model's."""

    context: int
    batch: int = 1
    form: Form = "bf16"
    chunk: int = CHUNK
    reserve: int = RESERVE
    multiprocessors: int = MULTIPROCESSORS


# The plan -----------------------------------------------------------------------------------------------------------


def plan(model: Model, setting: Setting, drafter: Model | None = None) -> list[Item]:
    """Every line of the memory that a model takes. Raises ValueError for a setting that the model cannot have."""
    for name, least in (("context", 1), ("batch", 1), ("chunk", 1), ("reserve", 0), ("multiprocessors", 1)):
        checks.whole_number("plan", name, getattr(setting, name), minimum=least)
    for name, most in (("context", model.max_context), ("chunk", MOST_ROWS), ("batch", MOST_REQUESTS)):
        if getattr(setting, name) > most:
            raise ValueError(f"plan: {name} must be at most {most} for {model.name}, got {getattr(setting, name)}")
    if setting.form not in FORMS:
        raise ValueError(f"plan: cache must be one of {', '.join(FORMS)}, got {setting.form!r}")
    if setting.form != "both" and not model.values_suffice:
        raise ValueError(
            f"plan: full layers of {model.name} have their own values: cache must be both, got {setting.form}"
        )
    lines = [*_weight_items("weights", model), *(_weight_items("drafter", drafter) if drafter else ())]
    lines += _cache_items(model, setting)
    lines += _workspace_items(model, setting)
    return [*lines, Item("reserve", "everything else", setting.reserve, "assumed")]


def total(items: list[Item]) -> int:
    return sum(item.nbytes for item in items)


def longest_context(model: Model, setting: Setting, memory: int, drafter: Model | None = None) -> int:
    """The most positions, in whole pages or all that the model has, with which the plan fits into so many bytes; 0: none."""

    def fits(context: int) -> bool:
        return total(plan(model, replace(setting, context=context), drafter)) <= memory

    if fits(model.max_context):
        return model.max_context
    low, high = 0, -(-model.max_context // FULL_PAGE)  # pages: low fit, high do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * FULL_PAGE) else (low, middle)
    return low * FULL_PAGE


def _weight_items(part: str, model: Model) -> Iterator[Item]:
    """By scheme, the one with most bytes first."""
    by_scheme: dict[str, list[Weight]] = {}
    for weight in model.weights:
        by_scheme.setdefault(weight.scheme, []).append(weight)
    for scheme, weights in sorted(by_scheme.items(), key=lambda row: -sum(weight.nbytes for weight in row[1])):
        parameters = sum(prod(weight.shape) for weight in weights)
        count = f"{len(weights)} tensor{'s' if len(weights) > 1 else ''}"
        yield Item(
            part, scheme, sum(weight.nbytes for weight in weights), f"{count}, {parameters / 1e6:.1f} M parameters"
        )


def _cache_items(model: Model, setting: Setting) -> Iterator[Item]:
    for (heads, dim), count in _alike(model.of("full")).items():
        per_request = -(-setting.context // FULL_PAGE) * FULL_PAGE
        rows = setting.batch * per_request
        row_bytes = {"bf16": 2 * dim, "fp8": dim, "int8": dim + 4, "both": 4 * dim}[setting.form] * heads
        scales = 4 * heads if setting.form == "fp8" else 0
        table = 4 * setting.batch * per_request // FULL_PAGE  # one for all layers, int32
        what = f"{setting.batch} x {per_request} rows of {heads} x {dim}: {FORMS[setting.form]}"
        yield Item("cache", f"{count} full layers", count * (rows * row_bytes + scales) + table, what)
    rows_of_a_pass = max(VERIFIED_ROWS, setting.chunk)
    for (heads, dim), count in _alike(model.of("sliding")).items():
        ring = RingCache.allocate(
            setting.batch, model.window, heads, dim, dtype=torch.bfloat16, device="meta", tentative_rows=rows_of_a_pass
        )
        table = 4 * setting.batch * -(-setting.context // ring.page_size)
        what = f"{setting.batch} x {ring.capacity} rows of {heads} x {dim}: keys and values of a window and a pass"
        yield Item("cache", f"{count} sliding layers", count * (ring.k.nbytes + ring.v.nbytes) + table, what)


def _alike(layers: list[CacheLayer]) -> dict[tuple[int, int], int]:
    """(KV heads, head_dim) -> how many layers."""
    shapes = [(layer.num_kv_heads, layer.head_dim) for layer in layers]
    return {shape: shapes.count(shape) for shape in dict.fromkeys(shapes)}


def _workspace_items(model: Model, setting: Setting) -> Iterator[Item]:
    """One layer's at a time: what a layer gives back, the next takes."""
    batch, rows = setting.batch, VERIFIED_ROWS
    # As `slots` of attention/triton/tables.py, without its bound by the capacity: numbers of one row of one head.
    slots = {
        layer: tables.splits(setting.multiprocessors, layer.num_kv_heads) + 3 for layer in dict.fromkeys(model.layers)
    }
    parts = batch * model.num_heads * rows * max(count * (layer.head_dim + 1) for layer, count in slots.items())
    detail = f"fp32, {rows} rows, {setting.multiprocessors} multiprocessors"
    yield Item("workspace", "attention partials", 4 * parts, detail)
    # csrc/linear/linear.cu halves K until there are two blocks of 64 outputs a multiprocessor: fewer than four.
    pieces = 4 * setting.multiprocessors * 64 * rows
    yield Item("workspace", "pieces of products", 4 * pieces, f"fp32, {rows} rows")
    yield Item("workspace", "logits", batch * rows * model.vocab_size * (2 + 4), f"{rows} rows in 16 bits and in fp32")
    widest = max(layer.head_dim for layer in model.layers)
    widest_kv = max(layer.num_kv_heads * layer.head_dim for layer in model.layers)
    # Residual, its norm, an output and a sum; queries and what attention gives; keys and values; gate and up before, one after.
    numbers = 4 * model.hidden_size + 2 * model.num_heads * widest + 2 * widest_kv + 3 * model.intermediate_size
    yield Item(
        "workspace", "rows of a pass", 2 * numbers * max(setting.chunk, batch * rows), f"16 bits, {setting.chunk} rows"
    )
    # Many rows are multiplied with a weight written out (linear/triton); the head only ever meets few.
    matrices = [
        w for w in model.weights if len(w.shape) == 2 and w.scheme in SCHEMES and w.shape[0] != model.vocab_size
    ]
    if matrices:
        largest = max(matrices, key=lambda weight: prod(weight.shape))
        yield Item("workspace", "one weight in 16 bits", 2 * prod(largest.shape), largest.name)


# Models -------------------------------------------------------------------------------------------------------------


def model_of(name: str) -> Model:
    """From a file or folder that `open_weights` takes, or "12B:Q4_0+Q6_K head".

    Raises: ValueError, OSError.
    """
    model = model_of_geometry(name) if _names_a_geometry(name) else model_of_files(open_weights(name))
    if not model.layers:
        raise ValueError(f"plan: {name} caches nothing of its own: it is a drafter, which goes beside a model")
    return model


def drafter_of(name: str) -> Model:
    """Likewise, of a drafter: only its weights count. Raises ValueError, OSError."""
    if _names_a_geometry(name):
        return model_of_geometry(name)
    files = open_weights(name)
    weights = tuple(Weight(info.name, info.scheme, info.shape, loaded_bytes(info)) for info in files.tensors.values())
    return Model(files.path.name, weights, (), 1, 1, 1, 1, 1, 1)


def _names_a_geometry(name: str) -> bool:
    return name.partition(":")[0].upper() in GEOMETRIES and not Path(name).exists()


GEOMETRIES = {"12B": geometry.GEMMA4_12B, "31B": geometry.GEMMA4_31B, "12B-DRAFTER": geometry.GEMMA4_12B_DRAFTER}
"""Those whose matrices follow from their geometry: dense models without embeddings for each layer."""


def model_of_geometry(text: str) -> Model:
    """ "12B" (bf16), "12B:Q4_0", "12B:Q4_0+Q6_K head": the schemes of the layers and of the embedding, which is the head too.

    Raises: ValueError.
    """
    name, colon, schemes = text.partition(":")
    found = re.fullmatch(r"(\w+)(?:\+(\w+) head)?", schemes if colon else "BF16")
    if found is None or name.upper() not in GEOMETRIES:
        raise ValueError(f"plan: expected a model as 12B:Q4_0 or '12B:Q4_0+Q6_K head', got {text!r}")
    shape, layers, head = GEOMETRIES[name.upper()], found[1], found[2] or found[1]
    weights = tuple(_weight(part, head if part == "head" else layers, size) for part, size in _matrices(shape))
    own = shape.num_layers - shape.num_kv_shared_layers
    cached = [
        CacheLayer(
            kind, shape.attention(kind).num_kv_heads, shape.attention(kind).head_dim, shape.attention(kind).k_eq_v
        )
        for kind in shape.layers[:own]
    ]
    assert shape.sliding.window is not None
    return Model(
        text, weights, tuple(cached), shape.sliding.window, shape.sliding.num_heads, shape.vocab_size, shape.hidden_size,
        shape.intermediate_size, shape.max_context, ("text only: the inputs for images and audio are not in it",),
    )  # fmt: skip


def _matrices(shape: geometry.ModelGeometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each weight; (N,) for norms."""
    hidden, own = shape.hidden_size, shape.num_layers - shape.num_kv_shared_layers
    for index, kind in enumerate(shape.layers):
        attention = shape.attention(kind)
        queries, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        yield f"layers.{index}.q", (queries, hidden)
        yield f"layers.{index}.o", (hidden, queries)
        yield f"layers.{index}.q_norm", (attention.head_dim,)
        if index < own:
            yield f"layers.{index}.k", (keys, hidden)
            yield f"layers.{index}.k_norm", (attention.head_dim,)
            if not attention.k_eq_v:
                yield f"layers.{index}.v", (keys, hidden)
        yield f"layers.{index}.gate", (shape.intermediate_size, hidden)
        yield f"layers.{index}.up", (shape.intermediate_size, hidden)
        yield f"layers.{index}.down", (hidden, shape.intermediate_size)
        for place in ("before_attention", "after_attention", "before_mlp", "after_mlp"):
            yield f"layers.{index}.{place}", (hidden,)
    yield "norm", (hidden,)
    yield "head", (shape.vocab_size, hidden)
    if own == 0:  # a drafter: from the target's embedding and hidden state to its own, and back
        target = geometry.GEMMA4_12B.hidden_size
        yield "pre_projection", (hidden, 2 * target)
        yield "post_projection", (target, hidden)


def _weight(name: str, scheme: str, shape: tuple[int, ...]) -> Weight:
    """A matrix in a scheme or a dtype; a norm in fp32, which no file exceeds."""
    if len(shape) == 1:
        return Weight(name, "F32", shape, 4 * shape[0])
    if scheme in DENSE:
        return Weight(name, scheme, shape, DENSE[scheme] * prod(shape))
    if scheme not in SCHEMES:
        raise ValueError(f"plan: scheme must be one of {', '.join((*SCHEMES, *DENSE))}, got {scheme!r}")
    group = (SCHEMES[scheme].group_sizes or (32,))[0]
    N, K = shape
    check_sizes("plan", scheme, (N, K), group)
    return Weight(name, scheme, shape, quantized_bytes(scheme, (N, K), group))


def quantized_bytes(scheme: str, shape: tuple[int, int], group_size: int) -> int:
    """The bytes of a QuantizedWeight, with the smallest of the dtypes that its scales may have."""
    expected = expected_tensors(SCHEMES[scheme], shape, group_size).values()
    return sum(prod(size) * min(dtype.itemsize for dtype in dtypes) for size, dtypes in expected)


# Files --------------------------------------------------------------------------------------------------------------

_ATTENTION = re.compile(r"(?:^|\.)(?:blk|layers)\.(\d+)\.(?:self_attn\.)?(?:attn_)?([qkv])(_proj|_norm)?\.weight$")
_EMBEDDING = re.compile(r"(?:^|\.)(?:token_embd|embed_tokens)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:output|lm_head)\.weight$")
_UP = re.compile(r"(?:^|\.)(?:blk|layers)\.\d+\.(?:mlp\.up_proj|ffn_up)\.weight$")
_TOWERS = ("vision", "audio")  # their layers are named like the text model's


def model_of_files(files: WeightFiles) -> Model:
    """From the sizes of a file's tensors and what its header or config.json says. Raises ValueError, OSError."""
    text = [info for info in files.tensors.values() if not any(tower in info.name for tower in _TOWERS)]
    settings = _settings(files)
    embedding = next((info for info in text if _EMBEDDING.search(info.name)), None)
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{files.path}: has no embedding (token_embd, embed_tokens): is it a language model?")
    tied = settings.get("tie_word_embeddings") is True
    kept = [info for info in files.tensors.values() if not (tied and _HEAD.search(info.name))]
    weights = tuple(Weight(info.name, info.scheme, info.shape, loaded_bytes(info)) for info in kept)
    layers, num_heads = _layers(files, text, settings)
    refused = sorted({info.scheme for info in files.tensors.values() if info.refusal})
    return Model(
        name=str(files.path.name), weights=weights, layers=tuple(layers),
        window=_number(files, settings, "sliding_window"), num_heads=num_heads, vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        intermediate_size=max((info.shape[0] for info in text if _UP.search(info.name)), default=0),
        max_context=_number(files, settings, "context_length", "max_position_embeddings"),
        notes=tuple(f"{scheme} is not read: its bytes are the file's" for scheme in refused),
    )  # fmt: skip


def loaded_bytes(info: TensorInfo) -> int:
    """Bytes of a tensor of a file in memory. At most so many where the file does not say the size of its groups."""
    if info.refusal or not info.quantized or len(info.shape) != 2:
        return info.nbytes
    layout = SCHEMES[info.scheme]
    N, K = info.shape
    if len(layout.group_sizes) == 1:
        return quantized_bytes(info.scheme, (N, K), layout.group_sizes[0])
    if layout.values != "zeros":
        return info.nbytes
    # Zero points become bytes: a group with a scale of 16 bits has 3 bytes in memory, and 2.5 in the file.
    codes = N * K // 2
    return codes + (info.nbytes - codes) * 6 // 5


def _settings(files: WeightFiles) -> Mapping[str, Any]:
    """GGUF: the last part of each key of the header. safetensors: config.json, that of the text model."""
    if files.format == "gguf":
        architecture = files.metadata.get("general.architecture")
        own = {key: value for key, value in files.metadata.items() if key.startswith(f"{architecture}.")}
        return {key.rpartition(".")[2]: value for key, value in own.items()} | {"model_type": architecture}
    config = (files.path if files.path.is_dir() else files.path.parent) / "config.json"
    whole = safetensors_file.read_json(config, files.nbytes) if config.is_file() else {}
    text = whole.get("text_config")
    return whole | text if isinstance(text, dict) else whole


def _number(files: WeightFiles, settings: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = settings.get(name)
        if type(value) is int and 0 < value <= 2**31:
            return value
    raise ValueError(f"{files.path}: says no {' or '.join(names)}: name a model as 12B:Q4_0 instead")


def _layers(files: WeightFiles, text: list[TensorInfo], settings: Mapping[str, Any]) -> tuple[list[CacheLayer], int]:
    """The layers that cache, and the query heads, from the shapes of projections and of their norms."""
    shapes: dict[int, dict[str, tuple[int, ...]]] = {}
    for info in text:
        if found := _ATTENTION.search(info.name):
            name = found[2] + ("_norm" if found[3] == "_norm" else "")
            shapes.setdefault(int(found[1]), {})[name] = info.shape
    shared = settings.get("num_kv_shared_layers", settings.get("shared_kv_layers", 0))
    own = len(shapes) - shared if type(shared) is int and 0 <= shared <= len(shapes) else len(shapes)
    kept = [shapes[index] for index in sorted(shapes)[:own] if {"q", "k", "k_norm"} <= shapes[index].keys()]
    ranks = [(len(each["q"]), len(each["k"]), len(each["k_norm"])) for each in kept]
    if set(ranks) != {(2, 2, 1)} or any(not 0 < each["k_norm"][0] <= min(each["q"][0], each["k"][0]) for each in kept):
        raise ValueError(f"{files.path}: has no layers with queries, keys and their norms: is it a Gemma model?")
    dims = [each["k_norm"][0] for each in kept]
    widest = max(dims)
    # Of Gemma 4 the full layers have the larger heads; of Gemma 3, where all are alike, every sixth is full.
    full = [dim == widest if min(dims) < widest else index % 6 == 5 for index, dim in enumerate(dims)]
    layers = [
        CacheLayer("full" if is_full else "sliding", each["k"][0] // dim, dim, "v" not in each)
        for each, dim, is_full in zip(kept, dims, full, strict=True)
    ]
    return layers, max(each["q"][0] // dim for each, dim in zip(kept, dims, strict=True))
