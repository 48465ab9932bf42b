"""A random reference model small enough for hundreds of generations, whose text is no echo of its last token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemma4_kernels.geometry import AttentionGeometry
from gemma4_kernels.reference import DrafterConfig, ReferenceConfig, ReferenceDrafter, ReferenceModel

VOCAB, HIDDEN, WINDOW = 96, 32, 12
SLIDING = AttentionGeometry(4, 2, 16, WINDOW, False, 1e4, 1.0)
FULL = AttentionGeometry(4, 1, 32, None, True, 1e6, 0.25)


def config(**overrides: Any) -> ReferenceConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "layers": ("sliding", "sliding", "full"),
        "sliding": SLIDING, "full": FULL, "final_softcap": 30.0, "tied_head": False,
    }  # fmt: skip
    return ReferenceConfig(**{**settings, **overrides})


def target(seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> ReferenceModel:
    return _ready(ReferenceModel(config(**overrides)), seed, dtype)


def drafter(seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> ReferenceDrafter:
    text = config(
        hidden_size=24, layers=("sliding", "sliding", "sliding", "full"), num_kv_shared_layers=4, final_softcap=None,
        **overrides,
    )  # fmt: skip
    return _ready(ReferenceDrafter(DrafterConfig(text, target_hidden_size=HIDDEN)), seed, dtype)


def _ready(model: Any, seed: int, dtype: torch.dtype) -> Any:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            drawn = torch.randn(tensor.shape, generator=rng)
            if name.endswith("model.norm.weight"):
                drawn = 5.0 + drawn
            elif "k_norm" in name:
                drawn = 0.4 + 0.1 * drawn
            elif "norm" in name:
                drawn = 1.0 + 0.25 * drawn
            elif "embed_tokens" in name:
                drawn = 0.12 * drawn
            else:
                drawn = drawn * tensor.shape[-1] ** -0.5
            tensor.copy_(drawn)
    made: nn.Module = model.to(dtype).eval().requires_grad_(False)
    return made


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of every length around the window, and of others."""
    rng = torch.Generator().manual_seed(seed)
    lengths = [WINDOW - 1, WINDOW, WINDOW + 1, 2, 1, 2 * WINDOW + 3, 5]
    drawn: Tensor = torch.randint(1, 3 * WINDOW, (count,), generator=rng)
    return [
        torch.randint(1, VOCAB, (lengths[i % 14] if i % 14 < len(lengths) else int(drawn[i]),), generator=rng).tolist()
        for i in range(count)
    ]
