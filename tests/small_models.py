"""Small random transformers models with the head dims of the 12B, and how their logits are compared.

Head dims (256 and 512), head counts (16 over 8 and 1), K = V, the softcap and the statistics of the norms are Gemma's;
widths, depth, vocabulary and window are small enough for seconds on two cores.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAssistantForCausalLM,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
)

VOCAB = 400
HIDDEN = 64
WINDOW = 12
IMAGE_TOKEN, VIDEO_TOKEN, AUDIO_TOKEN = 390, 391, 392
PATCH_VALUES = 48  # patches of 4 x 4 pixels, 3 colours
POSITIONS = 16
AUDIO_FRAME = 20


def text_config(**overrides: Any) -> Gemma4UnifiedTextConfig:
    """The 12B in small: five sliding layers, then a full one."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": WINDOW,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 4096,
        "eos_token_id": None,
    }
    return Gemma4UnifiedTextConfig(**{**settings, **overrides})


def text_model(seed: int = 0, **overrides: Any) -> Gemma4UnifiedForCausalLM:
    return _ready(Gemma4UnifiedForCausalLM(text_config(**overrides)), seed)


def multimodal_model(seed: int = 0, **overrides: Any) -> Gemma4UnifiedForConditionalGeneration:
    config = Gemma4UnifiedConfig(
        text_config=text_config(**overrides).to_dict(),
        vision_config={
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 40,
            "output_proj_dims": 40,
            "mm_posemb_size": POSITIONS,
        },
        audio_config={"audio_embed_dim": AUDIO_FRAME},
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        audio_token_id=AUDIO_TOKEN,
    )
    return _ready(Gemma4UnifiedForConditionalGeneration(config), seed)


def mtp_pair(
    seed: int = 0, ordered_embeddings: bool = False
) -> tuple[Gemma4UnifiedForCausalLM, Gemma4UnifiedAssistantForCausalLM]:
    """A target that reports its shared keys and values, and a drafter for it.

    As released, transformers 5.23.0 can build neither: `kv_sharing_modes` refuses a model whose layers are all readers
    (every drafter), and marks no layer of a model without readers (the 12B), which then shares nothing. The property
    is only looked at while a model is built.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gemma4UnifiedTextConfig, "kv_sharing_modes", property(_kv_sharing_modes))
        target = text_model(seed)
        config = Gemma4UnifiedAssistantConfig(
            text_config=text_config(
                hidden_size=32,
                num_hidden_layers=4,
                layer_types=["sliding_attention"] * 3 + ["full_attention"],
                final_logit_softcapping=None,
            ),
            backbone_hidden_size=HIDDEN,
            use_ordered_embeddings=ordered_embeddings,
            num_centroids=20,
            centroid_intermediate_top_k=3,
        )
        drafter = _ready(Gemma4UnifiedAssistantForCausalLM(config), seed + 1)
    if ordered_embeddings:
        order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))
        drafter.masked_embedding.token_ordering.copy_(order)
    return target, drafter


def _kv_sharing_modes(config: Gemma4UnifiedTextConfig) -> list[str | None]:
    num_own = config.num_hidden_layers - config.num_kv_shared_layers
    own = config.layer_types[:num_own]
    modes: list[str | None] = [None] * num_own + ["reuse"] * config.num_kv_shared_layers
    for layer_type in set(own):
        modes[num_own - 1 - own[::-1].index(layer_type)] = "store"
    return modes


def _ready(model: Any, seed: int) -> Any:
    """Weights with Gemma-like statistics; eager attention; no gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, mean: float, std: float) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name or "embed_scale" in name or "token_ordering" in name:
                continue
            if name.endswith("layer_scalar"):
                tensor.uniform_(0.6, 1.1, generator=generator)
            elif "k_norm" in name:
                # Scores of a few units: a softmax that is neither flat nor an argmax.
                normal(tensor, 0.12, 0.03)
            elif name.endswith("model.norm.weight"):
                # Logits that feel the softcap.
                normal(tensor, 5.0, 1.0)
            elif "norm" in name or "_ln" in name:
                normal(tensor, 0.0 if name.endswith("bias") else 1.0, 0.25)
            elif "embed_tokens" in name:
                # Small, so that the layers say more about the next token than the tied head's echo of the last one.
                normal(tensor, 0.0, 0.12)
            elif "pos_embedding" in name:
                normal(tensor, 0.0, 0.5)
            elif tensor.ndim == 2:
                normal(tensor, 0.0, tensor.shape[1] ** -0.5)
            else:
                normal(tensor, 0.0, 0.2)
    model.set_attn_implementation("eager")
    return model.eval().requires_grad_(False)


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Text tokens, none of them a placeholder."""
    return torch.randint(1, IMAGE_TOKEN, shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same_logits(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the largest logit. float32 through six layers leaves about 1e-6."""
    assert ours.shape == theirs.shape
    assert not ours.isnan().any()
    error = float((ours - theirs).detach().abs().max() / theirs.abs().max())
    assert error <= tolerance, f"logits differ by {error:.1e} of the largest"


def assert_different_logits(ours: Tensor, theirs: Tensor) -> None:
    """Far from equal: the case at hand does tell two rules apart."""
    assert float((ours - theirs).abs().max() / theirs.abs().max()) > 1e-2
