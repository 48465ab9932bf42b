"""What a configuration becomes, and what is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import random_ids, text_config
from transformers import Gemma4TextConfig

from gemma4_kernels.geometry import GEMMA4_12B, GEMMA4_31B, AttentionGeometry
from gemma4_kernels.reference import DrafterConfig, ReferenceConfig, ReferenceDrafter, ReferenceModel


def test_the_12b_of_transformers_is_the_12b_of_the_geometry() -> None:
    hf_config = text_config(
        vocab_size=262144,
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        sliding_window=1024,
    )
    assert ReferenceConfig.from_transformers(hf_config) == ReferenceConfig.from_geometry(GEMMA4_12B)


def test_layer_names_and_shapes_of_the_12b() -> None:
    with torch.device("meta"):
        model = ReferenceModel(ReferenceConfig.from_geometry(GEMMA4_12B))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["model.layers.46.self_attn.v_proj.weight"] == (2048, 3840)
    assert shapes["model.layers.47.self_attn.q_proj.weight"] == (8192, 3840)
    assert shapes["model.layers.47.self_attn.k_proj.weight"] == (512, 3840)
    assert "model.layers.47.self_attn.v_proj.weight" not in shapes
    assert sum(tensor.numel() for tensor in model.parameters()) == pytest.approx(11.95e9, rel=0.01)


def test_layer_names_and_size_of_the_drafter() -> None:
    from gemma4_kernels.geometry import GEMMA4_12B_DRAFTER

    config = DrafterConfig(text=ReferenceConfig.from_geometry(GEMMA4_12B_DRAFTER), target_hidden_size=3840)
    with torch.device("meta"):
        drafter = ReferenceDrafter(config)
    assert not any("k_proj" in name or "v_proj" in name for name in drafter.state_dict())
    assert sum(tensor.numel() for tensor in drafter.parameters()) == pytest.approx(423e6, rel=0.01)


def test_overrides_replace_fields_of_a_geometry() -> None:
    config = ReferenceConfig.from_geometry(GEMMA4_31B, hidden_size=32, layers=("sliding", "full"), vocab_size=50)
    assert (config.hidden_size, config.layers, config.full) == (32, ("sliding", "full"), GEMMA4_31B.full)
    with pytest.raises(TypeError, match="windows"):
        ReferenceConfig.from_geometry(GEMMA4_31B, windows=3)


def test_a_random_model_from_a_geometry_runs() -> None:
    config = ReferenceConfig.from_geometry(
        GEMMA4_12B, hidden_size=32, intermediate_size=48, layers=("sliding", "full"), vocab_size=400
    )
    logits = ReferenceModel(config).logits(random_ids(1, 5))
    assert logits.shape == (1, 5, 400)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"attention_bias": True}, "attention_bias"),
        (
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                }
            },
            r"rope_parameters\['sliding_attention'\]",
        ),
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ReferenceConfig.from_transformers(text_config(**settings))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input"),
        (
            {
                "hidden_size_per_layer_input": 0,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 8,
            },
            "enable_moe_block",
        ),
    ],
)
def test_features_of_siblings_are_refused_by_name(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ReferenceConfig.from_transformers(Gemma4TextConfig(**settings))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers": ()}, "layers: expected at least one"),
        ({"num_kv_shared_layers": 49}, "num_kv_shared_layers: expected 0 to 48"),
        ({"sliding": GEMMA4_12B.full}, "sliding.window: expected a positive number"),
        ({"sliding": AttentionGeometry(16, 8, 256, 1024, True, 1e4, 1.0)}, "sliding.k_eq_v: expected False"),
    ],
)
def test_impossible_configurations_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReferenceConfig.from_geometry(GEMMA4_12B, **overrides)
