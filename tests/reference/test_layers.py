"""The small parts compute what transformers computes, and stay in float64 when they are given float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import randn, text_config, text_model
from transformers.models.gemma4_unified.modeling_gemma4_unified import (
    Gemma4UnifiedRMSNorm,
    Gemma4UnifiedTextMLP,
    Gemma4UnifiedTextRotaryEmbedding,
    apply_rotary_pos_emb,
)

from gemma4_kernels.reference import (
    ReferenceModel,
    RMSNorm,
    apply_rope,
    default_inv_freq,
    proportional_inv_freq,
    rms_norm,
    rotation,
    softcap,
)
from gemma4_kernels.reference.layers import GatedMLP


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_scale", [False, True])
def test_rms_norm_has_the_bits_of_transformers(dtype: torch.dtype, with_scale: bool) -> None:
    theirs, ours = Gemma4UnifiedRMSNorm(64, with_scale=with_scale), RMSNorm(64, with_scale=with_scale)
    if with_scale:
        theirs.weight.data = randn(64, seed=1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = randn(3, 5, 64).to(dtype)
    assert torch.equal(ours.to(dtype)(x), theirs.to(dtype)(x))


def test_rms_norm_of_float64_is_float64() -> None:
    x, weight = randn(4, 512, dtype=torch.float64), randn(512, seed=1, dtype=torch.float64)
    exact = weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert float((rms_norm(x, weight) - exact).abs().max()) < 1e-14


@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
def test_frequencies_and_rotation_have_the_bits_of_transformers(layer_type: str) -> None:
    config = text_config()
    rope: Any = Gemma4UnifiedTextRotaryEmbedding(config)
    head_dim = {"sliding_attention": 256, "full_attention": 512}[layer_type]
    ours = default_inv_freq(256, 1e4) if layer_type == "sliding_attention" else proportional_inv_freq(512, 1e6, 0.25)
    assert torch.equal(ours, getattr(rope, f"{layer_type}_inv_freq"))

    x, positions = randn(2, 3, 4, head_dim), torch.tensor([[0, 5, 77777], [262143, 1, 2]])
    cos, sin = rope(x, positions, layer_type)
    theirs = apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=2)
    assert torch.equal(apply_rope(x, *rotation(positions, ours, torch.float32)), theirs)


def test_proportional_rope_turns_pairs_and_not_a_prefix() -> None:
    x = randn(1, 1, 1, 512)
    turned = apply_rope(x, *rotation(torch.tensor([[1]]), proportional_inv_freq(512, 1e6, 0.25), torch.float32))
    moved = (turned != x)[0, 0, 0].nonzero().flatten().tolist()
    assert moved == [*range(64), *range(256, 320)]


def test_proportional_rope_of_all_pairs_is_ordinary_rope() -> None:
    assert torch.equal(proportional_inv_freq(256, 1e4, 1.0), default_inv_freq(256, 1e4))


def test_gated_mlp_has_the_bits_of_transformers() -> None:
    theirs, ours = Gemma4UnifiedTextMLP(text_config(), 0), GatedMLP(64, 96)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = randn(2, 3, 64)
    assert torch.equal(ours(x), theirs(x))


def test_softcap_bounds_and_keeps_small_values() -> None:
    x = torch.tensor([-1e6, -0.01, 0.0, 0.01, 1e6], dtype=torch.float64)
    assert softcap(x, 30.0).tolist() == pytest.approx([-30, -0.01, 0, 0.01, 30], rel=1e-6)
    assert softcap(x, None) is x


def test_embedding_scale_is_rounded_to_the_dtype_of_the_checkpoint() -> None:
    hf_model = text_model(hidden_size=60).to(torch.bfloat16)  # sqrt(60) = 7.746, in bf16 7.75
    ids = torch.arange(5)
    theirs = hf_model.model.embed_tokens(ids)
    assert torch.equal(ReferenceModel.from_transformers(hf_model).embed(ids), theirs)
    wide = ReferenceModel.from_transformers(hf_model, dtype=torch.float64).embed(ids)
    assert torch.equal(wide, hf_model.model.embed_tokens.weight[:5].double() * 7.75)
