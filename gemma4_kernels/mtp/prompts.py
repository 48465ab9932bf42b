"""Prompts of different lengths as one tensor with the padding on the right, however they came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma4_kernels import checks

FUNCTION = "generate"
_PER_TOKEN = ("mm_token_type_ids", "token_type_ids")
"""Inputs of transformers' models that have an element for each token of the prompts."""


class Prompts(NamedTuple):
    """A batch of B prompts."""

    tokens: Tensor
    """(B, S) int64 on the target's device, S the longest prompt's length."""
    lengths: list[int]
    inputs: dict[str, Any]
    """What else belongs to them; what has an element for each token is moved as the tokens are."""


def align(
    input_ids: Tensor | Sequence[Sequence[int] | Tensor], attention_mask: Tensor | None, inputs: dict[str, Any],
    device: torch.device,
) -> Prompts:  # fmt: skip
    """Move each prompt's tokens to the left, in their order.

    Args:
        input_ids: (B, S) integers, padded on any side; or a prompt a request, each as long as it likes.
        attention_mask: (B, S), 0 for padding; None for none.
    Raises: ShapeError, DTypeError, TypeError, ValueError.
    """
    if not isinstance(input_ids, Tensor):
        if attention_mask is not None:
            raise ValueError(f"{FUNCTION}: attention_mask must be None with a list of prompts, which have no padding")
        moved = {name for name in _PER_TOKEN if inputs.get(name) is not None}
        if moved:
            raise ValueError(f"{FUNCTION}: {', '.join(sorted(moved))} must come with input_ids in one tensor")
        prompts = [_prompt(prompt) for prompt in input_ids]
        _check_lengths([len(prompt) for prompt in prompts])
        tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)  # (B, S)
        return Prompts(tokens.to(device), [len(prompt) for prompt in prompts], dict(inputs))
    checks.has_shape(FUNCTION, "input_ids", input_ids, ("B", "S"))
    checks.has_dtype(FUNCTION, "input_ids", input_ids, checks.INTEGERS)
    if attention_mask is None:
        lengths = [input_ids.shape[1]] * input_ids.shape[0]
        _check_lengths(lengths)
        return Prompts(input_ids.to(device, torch.int64), lengths, dict(inputs))
    checks.has_shape(FUNCTION, "attention_mask", attention_mask, tuple(input_ids.shape))
    is_text = attention_mask.to(input_ids.device) != 0  # (B, S)
    lengths = is_text.sum(dim=1).tolist()
    _check_lengths(lengths)
    order = (~is_text).to(torch.int8).argsort(dim=1, stable=True)[:, : max(lengths)]  # (B, longest)

    def moved_left(tensor: Tensor) -> Tensor:
        return tensor.gather(1, order.to(tensor.device))

    inputs = {
        name: moved_left(value) if name in _PER_TOKEN and value is not None else value for name, value in inputs.items()
    }
    return Prompts(moved_left(input_ids).to(device, torch.int64), lengths, inputs)


def _prompt(prompt: Sequence[int] | Tensor) -> Tensor:
    tokens = torch.as_tensor(prompt).cpu()
    if tokens.numel() == 0:  # of no dtype yet
        tokens = tokens.long()
    checks.has_shape(FUNCTION, "a prompt of input_ids", tokens, ("S",))
    checks.has_dtype(FUNCTION, "a prompt of input_ids", tokens, checks.INTEGERS)
    return tokens.long()


def _check_lengths(lengths: list[int]) -> None:
    if not lengths or min(lengths) == 0:
        raise ValueError(f"{FUNCTION}: input_ids must hold a token for each of at least one request, got {lengths}")
