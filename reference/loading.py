"""Weights of a transformers model in a module of the reference that has the same names."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import nn

from gemma4_kernels.reference.decoder import TextModel

Module = TypeVar("Module", bound=nn.Module)


def tie_head(module: Any, text: TextModel) -> None:
    """Make `module.lm_head` the embedding table; checkpoints may then leave it out."""
    module.lm_head.weight = text.embed_tokens.weight
    embed_name = next(name for name, weight in module.named_parameters() if weight is text.embed_tokens.weight)

    def fill_in_head(_module: nn.Module, state: dict[str, Any], *_unused: Any) -> None:
        if embed_name in state:
            state.setdefault("lm_head.weight", state[embed_name])

    module.register_load_state_dict_pre_hook(fill_in_head)


def load_copy(model: Module, text: TextModel, hf_model: Any, dtype: torch.dtype | None) -> Module:
    """Give a module on the meta device copies of a transformers model's tensors, and make it ready for inference."""
    state = {
        name: tensor.detach().to(dtype=dtype if tensor.is_floating_point() else None, copy=True)
        for name, tensor in hf_model.state_dict().items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    if text.config.tied_head:
        cast(Any, model).lm_head.weight = text.embed_tokens.weight
    text.embed_tokens.scale_dtype = next(hf_model.parameters()).dtype
    return model.eval().requires_grad_(False)
