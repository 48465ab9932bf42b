"""A drafter out of other modules and out of downloaded folders; each fault of a folder has its message."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_models
import torch
from linear_helpers import compressed_tensors_layer, mlx_layer
from mtp_helpers import committed, pair
from small_models import HIDDEN, VOCAB, WINDOW, assert_same_logits
from torch import Tensor, nn
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig
from weight_files import named, safetensors_file, small_gguf

from gemma4_kernels import (
    GEMMA4_12B_DRAFTER,
    DTypeError,
    FormatError,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    ShapeError,
    WeightFileError,
    replace_linear,
)
from gemma4_kernels.mtp.drafter import Drafter, DrafterConfig, DraftSampling
from gemma4_kernels.mtp.rows import LayerRows, SharedRows
from gemma4_kernels.reference import ReferenceDrafter

GREEDY_LOGITS = DraftSampling(temperature=0.0)


def drafts_of(drafter: Drafter, ordered_embeddings: bool = False) -> Tensor:
    now = committed(pair(ordered_embeddings)[0], [WINDOW + 3, 5])
    logits = drafter.draft(**now.arguments, num_drafts=3, sampling=GREEDY_LOGITS).logits
    assert logits is not None
    return logits


# Other modules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered_embeddings", [False, True])
def test_names_are_those_of_transformers(ordered_embeddings: bool) -> None:
    assistant = pair(ordered_embeddings)[1]
    drafter = Drafter(DrafterConfig.from_config(assistant.config))
    state = assistant.state_dict()
    assert drafter.state_dict().keys() == state.keys()
    drafter.load_state_dict(state, strict=True)
    expected = drafts_of(Drafter.from_model(assistant), ordered_embeddings)
    assert torch.equal(drafts_of(drafter, ordered_embeddings), expected)


@pytest.mark.parametrize("ordered_embeddings", [False, True])
@pytest.mark.parametrize("kind", ["transformers", "reference"])
def test_weights_are_shared_with_the_model_they_come_from(ordered_embeddings: bool, kind: str) -> None:
    model: Any = pair(ordered_embeddings)[1]
    if kind == "reference":
        model = ReferenceDrafter.from_transformers(model)
    drafter = Drafter.from_model(model)
    theirs = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, tensor in drafter.state_dict(keep_vars=True).items():
        assert tensor is theirs[name], name
    assert drafter.lm_head.weight is drafter.model.embed_tokens.weight
    assert not drafter.training


def test_quantised_modules_are_taken_as_they_are() -> None:
    assistant = copy.deepcopy(pair()[1])
    expected = drafts_of(Drafter.from_model(assistant))
    weights = {
        name: QuantizedWeight.quantize(module.weight, "Q8_0")
        for name, module in assistant.named_modules()
        if isinstance(module, nn.Linear)
    }
    replace_linear(assistant, weights)
    drafter = Drafter.from_model(assistant)
    assert isinstance(drafter.lm_head, QuantizedLinear)
    assert isinstance(drafter.model.embed_tokens, QuantizedEmbedding)
    assert drafter.lm_head.quantized is drafter.model.embed_tokens.quantized
    for name in weights:
        assert drafter.get_submodule(name) is assistant.get_submodule(name)
    logits = drafts_of(drafter)
    assert not torch.equal(logits, expected)
    assert_same_logits(logits[:, :1], expected[:, :1], tolerance=0.05)  # 8 bits are close


def test_the_smaller_models_have_a_drafter_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """gemma4_assistant, for E2B and E4B: no K = V, other head counts, a centroid head."""
    monkeypatch.setattr(Gemma4TextConfig, "kv_sharing_modes", property(small_models._kv_sharing_modes))
    text = Gemma4TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=256, global_head_dim=512, sliding_window=WINDOW, num_kv_shared_layers=4,
        layer_types=["sliding_attention"] * 3 + ["full_attention"], hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
    )  # fmt: skip
    config = Gemma4AssistantConfig(
        text_config=text, backbone_hidden_size=HIDDEN, use_ordered_embeddings=True, num_centroids=20,
        centroid_intermediate_top_k=3,
    )  # fmt: skip
    assistant = small_models._ready(Gemma4AssistantForCausalLM(config), seed=4)
    assistant.masked_embedding.token_ordering.copy_(torch.randperm(VOCAB))
    drafter = Drafter.from_model(assistant)
    length = 2 * WINDOW
    shapes = {"sliding_attention": (1, 2, length, 256), "full_attention": (1, 2, length, 512)}
    hf_rows = {name: tuple(0.3 * small_models.randn(*shape, seed=s) for s in (1, 2)) for name, shape in shapes.items()}
    layers = (LayerRows(*(rows.transpose(1, 2) for rows in tensors)) for tensors in hf_rows.values())
    hidden, embedded = small_models.randn(1, HIDDEN), small_models.randn(1, HIDDEN, seed=1)
    drafts = drafter.draft(
        torch.tensor([5]), hidden, SharedRows(*layers, torch.tensor([length])), lambda ids: embedded, 1,
        sampling=GREEDY_LOGITS,
    )  # fmt: skip
    theirs = assistant(
        inputs_embeds=torch.cat((embedded, hidden), dim=-1)[:, None],
        position_ids=torch.tensor([[length]]),
        shared_kv_states=hf_rows,
    )
    assert torch.equal(drafts.tokens, theirs.logits.argmax(-1))
    assert drafts.logits is not None
    scored = drafts.logits > -torch.inf
    assert_same_logits(drafts.logits[scored], theirs.logits[scored], 1e-4)


def test_a_model_without_the_parts_of_a_drafter_is_refused() -> None:
    target, assistant = pair()
    with pytest.raises(TypeError, match="assistant must be a module with a config, got Linear"):
        Drafter.from_model(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="config must be a configuration of an assistant, got Gemma4UnifiedTextConfig"):
        Drafter.from_model(target)
    headless = nn.Module()
    headless.config, headless.model = assistant.config, assistant.model
    with pytest.raises(TypeError, match="assistant must have a layer lm_head, got Module"):
        Drafter.from_model(headless)
    other = copy.deepcopy(assistant)
    other.post_projection = nn.Linear(32, 8)
    with pytest.raises(ShapeError, match=r"post_projection must have shape \(64, 32\), got \(8, 32\)"):
        Drafter.from_model(other)
    other = copy.deepcopy(assistant)
    other.model.layers[2].layer_scalar = torch.ones(2)
    with pytest.raises(ShapeError, match=r"model.layers.2.layer_scalar must have shape \(1\), got \(2\)"):
        Drafter.from_model(other)
    del other.model.layers[1].self_attn.q_norm
    with pytest.raises(TypeError, match=r"must have model\.layers\.1\.self_attn\.q_norm\.weight"):
        Drafter.from_model(other)


# Configurations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered_embeddings", [False, True])
def test_a_configuration_says_the_same_in_all_its_forms(ordered_embeddings: bool, tmp_path: Path) -> None:
    assistant = pair(ordered_embeddings)[1]
    config = DrafterConfig.from_config(assistant.config)
    assert config.layers == ("sliding", "sliding", "sliding", "full")
    assert (config.window, config.full.head_dim, config.full.num_kv_heads) == (WINDOW, 512, 1)
    assert config.num_centroids == (20 if ordered_embeddings else None)
    assert DrafterConfig.from_config(config) is config
    assert DrafterConfig.from_config(assistant.config.to_dict()) == config
    assert DrafterConfig.from_config(ReferenceDrafter.from_transformers(assistant).config) == config
    assistant.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert DrafterConfig.from_config(saved) == config
    wide = json.loads((tmp_path / "config.json").read_text())
    wide["text_config"]["use_double_wide_mlp"] = True
    assert DrafterConfig.from_config(wide) == replace(config, intermediate_size=2 * config.intermediate_size)
    # Before per_layer_config, and without what has a default.
    text = saved["text_config"]
    for name in ("per_layer_config", "rope_parameters", "rms_norm_eps", "use_double_wide_mlp", "attention_bias"):
        del text[name]
    text |= {"num_global_key_value_heads": 1, "global_head_dim": 512}
    assert DrafterConfig.from_config(saved) == config


def test_the_drafter_of_the_12b() -> None:
    """As its config.json has it, at the longest context; on the meta device, where it takes no memory."""
    text = {
        "vocab_size": 262144, "hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "num_global_key_value_heads": 1, "global_head_dim": 512,
        "attention_k_eq_v": True, "sliding_window": 1024, "num_kv_shared_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    }  # fmt: skip
    config = DrafterConfig.from_config({"text_config": text, "backbone_hidden_size": 3840})
    assert (config.layers, config.sliding, config.full) == (
        GEMMA4_12B_DRAFTER.layers, GEMMA4_12B_DRAFTER.sliding, GEMMA4_12B_DRAFTER.full,
    )  # fmt: skip
    with torch.device("meta"):
        drafter = Drafter(config).bfloat16()
    assert sum(parameter.numel() for parameter in drafter.parameters()) == 422_856_960
    drafter = drafter.to("meta")
    batch, context = 2, 262144

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ring = LayerRows(*(empty(130, 16, 8, 256) for _ in range(2)), empty(batch, context // 16, dtype=torch.int32))
    full = LayerRows(None, empty(batch, context, 1, 512), None, empty(512), empty(256, dtype=torch.float32))
    rows = SharedRows(ring, full, empty(batch, dtype=torch.int32))
    drafts = drafter.draft(
        empty(batch, dtype=torch.int64), empty(batch, 3840), rows, lambda ids: empty(batch, 3840), num_drafts=4
    )
    assert drafts.tokens.shape == (batch, 4)


def edited(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets config["a"]["b"] for "a.b"; None removes it."""

    def edit(config: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            config = config[name]
        if value is None:
            config.pop(last, None)
        else:
            config[last] = value

    return edit


BAD_CONFIGS = [
    ("text_config", None, "text_config: expected in the configuration"),
    ("text_config", [1], "text_config: expected an object, got list"),
    ("backbone_hidden_size", None, "backbone_hidden_size: expected in the configuration"),
    ("backbone_hidden_size", 10**30, "backbone_hidden_size: expected a whole number from 1 to"),
    ("num_centroids", 7, "num_centroids: expected a divisor of vocab_size 400, got 7"),
    ("num_centroids", None, "num_centroids: expected in the configuration"),
    ("centroid_intermediate_top_k", 21, "centroid_intermediate_top_k: expected a whole number from 1 to 20, got 21"),
    ("text_config.vocab_size", "400", "vocab_size: expected a whole number from 1 to 16777216, got 400"),
    ("text_config.hidden_size", True, "hidden_size: expected a whole number"),
    ("text_config.intermediate_size", -1, "intermediate_size: expected a whole number"),
    ("text_config.head_dim", 10**9, "head_dim of sliding layers: expected a whole number from 1 to 512"),
    ("text_config.head_dim", 255, "sliding layers: expected an even head_dim"),
    ("text_config.num_key_value_heads", 3, "whole groups of query heads"),
    (
        "text_config.num_key_value_heads",
        32,
        "num_key_value_heads of sliding layers: expected a whole number from 1 to 16",
    ),
    ("text_config.layer_types", [], "layer_types: expected"),
    ("text_config.layer_types", "full_attention", "layer_types: expected a list"),
    ("text_config.layer_types", [["full_attention"]], "layer_types: expected a list"),
    ("text_config.layer_types", ["linear_attention"], "layer_types: expected a list"),
    ("text_config.per_layer_config", 3, "per_layer_config: expected an object"),
    ("text_config.per_layer_config", {"3": 3}, r"per_layer_config\[3\]: expected an object"),
    ("text_config.per_layer_config", {"1": {"head_dim": 128}}, "expected one shape for all sliding_attention layers"),
    ("text_config.num_kv_shared_layers", 2, "num_kv_shared_layers: expected 4, all layers, got 2"),
    ("text_config.sliding_window", None, "sliding_window: expected in the configuration"),
    ("text_config.sliding_window", 0, "sliding_window: expected a whole number"),
    ("text_config.rms_norm_eps", "x", "rms_norm_eps: expected a positive number"),
    ("text_config.rope_parameters", 5, "rope_parameters: expected an object for sliding_attention"),
    ("text_config.rope_parameters.full_attention", None, "rope_parameters: expected an object for full_attention"),
    ("text_config.rope_parameters.full_attention.rope_type", "yarn", "expected default or proportional"),
    ("text_config.rope_parameters.full_attention.factor", 8.0, "expected default or proportional"),
    ("text_config.rope_parameters.full_attention.rope_theta", -1, "rope_theta: expected a positive number"),
    (
        "text_config.rope_parameters.full_attention.partial_rotary_factor",
        2,
        "partial_rotary_factor: expected a positive",
    ),
    ("text_config.enable_moe_block", True, "enable_moe_block: expected False in a drafter"),
    ("text_config.attention_bias", True, "attention_bias: expected False in a drafter"),
    ("text_config.hidden_activation", "silu", "hidden_activation: expected 'gelu_pytorch_tanh'"),
    ("text_config.hidden_size_per_layer_input", 256, "hidden_size_per_layer_input: expected 0"),
    ("text_config.use_bidirectional_attention", "all", "use_bidirectional_attention: expected"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assistant")
    pair(True)[1].save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("path", "value", "message"), BAD_CONFIGS)
def test_bad_configurations_are_refused_by_name(
    saved: Path, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    config = json.loads((saved / "config.json").read_text())
    edited(path, value)(config)
    with pytest.raises(ValueError, match=message):
        DrafterConfig.from_config(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    with pytest.raises(WeightFileError, match=f"is no drafter that can be read: .*{message}"):
        Drafter.from_folder(tmp_path)


def test_what_is_no_configuration_is_refused() -> None:
    with pytest.raises(TypeError, match="config must be a configuration of an assistant, got SimpleNamespace"):
        DrafterConfig.from_config(SimpleNamespace())


# Folders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered_embeddings", [False, True])
def test_a_saved_folder_gives_the_drafter_back(ordered_embeddings: bool, tmp_path: Path) -> None:
    assistant = pair(ordered_embeddings)[1]
    assistant.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    drafter = Drafter.from_folder(tmp_path, dtype=torch.float32)
    expected = drafts_of(Drafter.from_model(assistant), ordered_embeddings)
    assert torch.equal(drafts_of(drafter, ordered_embeddings), expected)
    assert drafter.lm_head.weight is drafter.model.embed_tokens.weight
    assert not drafter.training
    assert not any(parameter.requires_grad for parameter in drafter.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_read_in_the_dtype_asked_for(saved: Path, dtype: torch.dtype) -> None:
    drafter = Drafter.from_folder(saved, dtype=dtype)
    state = pair(True)[1].state_dict()
    for name, tensor in drafter.state_dict().items():
        expected = state[name].to(dtype) if state[name].is_floating_point() else state[name]
        assert torch.equal(tensor, expected), name
        assert tensor.dtype == expected.dtype


def test_bfloat16_is_the_default(saved: Path) -> None:
    assert Drafter.from_folder(str(saved)).dtype == torch.bfloat16


def folder_of(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    (path / "model.safetensors").write_bytes(safetensors_file(tensors))
    (path / "config.json").write_text(json.dumps(config))
    return path


def contents(ordered_embeddings: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config.json of a folder."""
    assistant = pair(ordered_embeddings)[1]
    tensors = {name: tensor for name, tensor in assistant.state_dict().items() if name != "lm_head.weight"}
    return tensors, assistant.config.to_dict() | {"dtype": "float32"}


def test_a_head_in_the_file_is_the_head(tmp_path: Path) -> None:
    tensors, config = contents()
    head = small_models.randn(VOCAB, 32)
    drafter = Drafter.from_folder(folder_of(tmp_path, tensors | {"lm_head.weight": head}, config), dtype=torch.float32)
    assert torch.equal(drafter.lm_head.weight, head)
    assert not hasattr(drafter.model, "embed_tokens")
    del tensors["model.embed_tokens.weight"]
    config["tie_word_embeddings"] = False
    untied = Drafter.from_folder(folder_of(tmp_path, tensors | {"lm_head.weight": head}, config), dtype=torch.float32)
    assert torch.equal(drafts_of(drafter), drafts_of(untied))
    with pytest.raises(WeightFileError, match=r"has no lm_head\.weight"):
        Drafter.from_folder(folder_of(tmp_path, tensors, config))


def test_keys_and_values_that_no_layer_reads_are_left_out(tmp_path: Path) -> None:
    tensors, config = contents()
    extra = {f"model.layers.0.self_attn.{name}.weight": torch.ones(4) for name in ("k_proj", "v_proj", "k_norm")}
    drafter = Drafter.from_folder(folder_of(tmp_path, tensors | extra, config), dtype=torch.float32)
    assert torch.equal(drafts_of(drafter), drafts_of(Drafter.from_model(pair()[1])))


@pytest.mark.parametrize("ordered_embeddings", [False, True])
@pytest.mark.parametrize("scheme", ["W4A16", "MLX"])
@pytest.mark.parametrize("head", ["tied", "own", "dense"])
def test_quantised_folders(ordered_embeddings: bool, scheme: str, head: str, tmp_path: Path) -> None:
    tensors, config = contents(ordered_embeddings)
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    if scheme == "MLX":
        config |= {"quantization_config": None, "quantization": {"bits": 4, "group_size": 32}}
    values: dict[str, Tensor] = {}
    for name in list(tensors):
        some = name.startswith(("model.layers.0.", "pre_")) and "proj" in name
        if some or "centroids" in name or (name == "model.embed_tokens.weight" and head != "dense"):
            shape = tensors.pop(name).shape
            make = compressed_tensors_layer if scheme == "W4A16" else mlx_layer
            layer = make(shape[0], shape[1], 32)
            prefix = name.removesuffix(".weight")
            if head == "own" and name == "model.embed_tokens.weight":
                prefix = "lm_head"
            tensors |= named(prefix, layer.tensors)
            values[f"{prefix}.weight"] = torch.from_numpy(layer.w.astype("float32"))
    drafter = Drafter.from_folder(folder_of(tmp_path, tensors, config), dtype=torch.float32)
    assert isinstance(drafter.pre_projection, QuantizedLinear)
    assert isinstance(drafter.lm_head, nn.Linear if head == "dense" else QuantizedLinear)
    if head == "tied":
        assert drafter.lm_head.quantized is drafter.model.embed_tokens.quantized
    for name, value in values.items():
        weight = drafter.get_submodule(name.removesuffix(".weight")).weight
        assert isinstance(weight, QuantizedWeight)
        assert torch.allclose(weight.dequantize(torch.float32), value, rtol=2**-7)
    assert drafts_of(drafter, ordered_embeddings).isnan().sum() == 0


def without(name: str) -> Any:
    return lambda tensors, config: tensors.pop(name)


def with_tensor(name: str, tensor: Tensor) -> Any:
    return lambda tensors, config: tensors.update({name: tensor})


BAD_FOLDERS: list[tuple[Any, type[Exception], str]] = [
    (without("model.layers.2.mlp.up_proj.weight"), WeightFileError, "has no model.layers.2.mlp.up_proj.weight: is the"),
    (without("model.embed_tokens.weight"), WeightFileError, "has no model.embed_tokens.weight"),
    (without("masked_embedding.token_ordering"), WeightFileError, "has no masked_embedding.token_ordering"),
    (without("model.layers.3.layer_scalar"), WeightFileError, "has no model.layers.3.layer_scalar, but 4 layers in its"),
    (
        lambda tensors, config: config["text_config"].update(
            layer_types=["sliding_attention"] * 20000 + ["full_attention"],
            num_kv_shared_layers=0,
            per_layer_config={"20000": {"head_dim": 512, "num_key_value_heads": 1}},
        ),
        WeightFileError, "has no model.layers.20000.layer_scalar, but 20001 layers",
    ),
    (
        with_tensor("model.norm.weight", torch.ones(31)), WeightFileError,
        r"model.norm.weight must have shape \(32,\), got \(31,\)",
    ),
    (
        with_tensor("masked_embedding.token_ordering", torch.zeros(VOCAB, dtype=torch.int64)), WeightFileError,
        "masked_embedding.token_ordering must name each token once",
    ),
    (
        with_tensor("masked_embedding.token_ordering", torch.arange(VOCAB) + 1), WeightFileError,
        "masked_embedding.token_ordering must name each token once",
    ),
    (
        with_tensor("masked_embedding.token_ordering", torch.zeros(VOCAB)), WeightFileError,
        "masked_embedding.token_ordering must hold int32 or int64, got torch.float32",
    ),
    (
        with_tensor("pre_projection.weight", torch.zeros(32, 128, dtype=torch.uint8)), FormatError,
        "pre_projection.weight: torch.uint8 without scales is not read",
    ),
    (with_tensor("pre_projection.bias", torch.zeros(32)), WeightFileError, "holds 'pre_projection.bias', which no drafter"),
    (with_tensor("model.layers.4.norm", torch.zeros(32)), WeightFileError, "holds 'model.layers.4.norm', which no drafter"),
    (
        lambda tensors, config: tensors.update(named("model.layers.9.q_proj", mlx_layer(8, 64, 64).tensors)),
        WeightFileError, "holds 'model.layers.9.q_proj.weight', which no drafter has",
    ),
    (
        lambda tensors, config: (
            tensors.pop("pre_projection.weight"),
            tensors.update(named("pre_projection", compressed_tensors_layer(8, 64, 32).tensors)),
        ),
        WeightFileError, r"pre_projection.weight must have shape \(32, 128\) for pre_projection, got \(8, 64\)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD_FOLDERS, ids=range(len(BAD_FOLDERS)))
def test_bad_folders_are_refused_with_the_fault(
    change: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    tensors, config = contents(True)
    change(tensors, config)
    with pytest.raises(error, match=message) as raised:
        Drafter.from_folder(folder_of(tmp_path, tensors, config))
    assert str(tmp_path) in str(raised.value)


def test_what_is_no_folder_of_a_drafter_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightFileError, match="is no folder"):
        Drafter.from_folder(tmp_path / "missing")
    with pytest.raises(WeightFileError, match=r"holds no config\.json: is the download complete"):
        Drafter.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightFileError, match=r"holds no \.gguf or \.safetensors file"):
        Drafter.from_folder(tmp_path)
    raw = (saved / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(WeightFileError, match=r"config\.json is not JSON"):
        Drafter.from_folder(tmp_path)
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(raw[:-8])
    with pytest.raises(WeightFileError, match="truncated or damaged"):
        Drafter.from_folder(tmp_path)
    with pytest.raises(DTypeError, match=r"dtype must be a float dtype, got torch\.int64"):
        Drafter.from_folder(saved, dtype=torch.int64)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.gguf").write_bytes(small_gguf())
    with pytest.raises(FormatError, match="a drafter is not read from gguf; use its safetensors"):
        Drafter.from_folder(tmp_path)


def test_the_suggested_number_of_drafts_is_read(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "assistant"
    shutil.copytree(saved, folder)
    for text, expected in (('{"num_assistant_tokens": 6}', 6), ("{}", None)):
        (folder / "generation_config.json").write_text(text)
        assert Drafter.from_folder(folder).num_assistant_tokens == expected
    (folder / "generation_config.json").write_text('{"num_assistant_tokens": "many"}')
    with pytest.raises(WeightFileError, match="num_assistant_tokens must be a whole number, got many"):
        Drafter.from_folder(folder)
    (folder / "generation_config.json").unlink()
    assert Drafter.from_folder(folder).num_assistant_tokens is None
