"""Generation, plain and speculative, for one request. Both give the same text, token for token.

In exact arithmetic, that is: a verification runs several rows at once and plain decoding one, so their logits agree
to rounding only. In float64 no argmax turns on it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma4_kernels.reference.cache import ReferenceCache
from gemma4_kernels.reference.drafter import PositionRule, ReferenceDrafter, SharedKV
from gemma4_kernels.reference.masks import BlockRule
from gemma4_kernels.reference.model import ReferenceModel
from gemma4_kernels.reference.verification import GREEDY, SamplingFilters, gumbel_noise, sample_tokens, verify_drafts


@dataclass(frozen=True)
class DraftContext:
    """What a drafter may look at when it is asked for drafts."""

    tokens: Tensor
    """(T,) the text so far; the last one is the bonus token, which the target has not read yet."""
    hidden: Tensor
    """(target hidden,) the target's state after its final norm that produced the bonus token."""
    shared_kv_states: SharedKV
    """(1, Hkv, T - 1, D): keys and values of the committed tokens in the last sliding and the last full layer."""
    num_drafts: int
    """Drafts wanted; fewer are fine."""


DraftFunction = Callable[[DraftContext], Tensor]
"""Returns (up to num_drafts,) token ids."""


@dataclass(frozen=True)
class SpeculativeResult:
    """A speculative generation."""

    tokens: Tensor
    """(1, prompt + new)"""
    rounds: tuple[tuple[int, int], ...]
    """For each verification: drafts offered, drafts accepted."""


def drafts_of(
    drafter: ReferenceDrafter,
    model: ReferenceModel,
    *,
    position: PositionRule = "bonus",
    sliding_rows: int | None = None,
) -> DraftFunction:
    """A `ReferenceDrafter` as a `DraftFunction`; the options are those of `ReferenceDrafter.draft`."""

    def draft(context: DraftContext) -> Tensor:
        drafts = drafter.draft(
            context.tokens[-1:],
            context.hidden[None],
            context.shared_kv_states,
            model.embed,
            num_drafts=context.num_drafts,
            position=position,
            sliding_rows=sliding_rows,
        )
        return drafts.tokens[0]

    return draft


@torch.no_grad()
def generate(
    model: ReferenceModel,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    filters: SamplingFilters = GREEDY,
    seed: int = 0,
    eos_token_ids: Collection[int] | None = None,
    values_only: bool = False,
    block_rule: BlockRule = "window",
    **inputs: Any,
) -> Tensor:
    """Token after token.

    Args:
        input_ids: (1, prompt).
        filters, seed: how to sample; the noise of a token depends on the seed and on its index in the sequence.
        eos_token_ids: generation ends after one of them; None takes the model's.
        values_only: full layers cache values alone.
        block_rule: how image blocks change the masks, see `masks.layer_visible`; the default is the model's own rule.
        inputs: images, audio and token types of the prompt, as `ReferenceModel.forward` takes them.
    Returns: (1, prompt + new).
    Raises: ValueError, TypeError naming the argument.
    """
    _check_prompt(input_ids, max_new_tokens, inputs)
    eos = model.config.eos_token_ids if eos_token_ids is None else eos_token_ids
    cache = ReferenceCache(values_only=values_only)
    text = input_ids  # (1, T)
    new_tokens = input_ids
    for _ in range(max_new_tokens):
        hidden = model.forward(new_tokens, past_key_values=cache, block_rule=block_rule, **inputs).hidden
        inputs = {}  # they belong to the prompt
        noise = _noise(model, filters, seed, text.shape[1], 1)
        new_tokens = sample_tokens(model.head(hidden[:, -1:]), filters, noise)  # (1, 1)
        text = torch.cat((text, new_tokens), dim=1)
        if int(new_tokens) in eos:
            break
    return text


@torch.no_grad()
def speculative_generate(
    model: ReferenceModel,
    drafter: ReferenceDrafter | DraftFunction,
    input_ids: Tensor,
    *,
    num_drafts: int,
    max_new_tokens: int,
    filters: SamplingFilters = GREEDY,
    seed: int = 0,
    eos_token_ids: Collection[int] | None = None,
    values_only: bool = False,
    block_rule: BlockRule = "window",
    **inputs: Any,
) -> SpeculativeResult:
    """The text of `generate` in fewer passes of the model: drafts are guessed, then verified all at once.

    Args:
        drafter: a `ReferenceDrafter` (see `drafts_of` for its options) or any function that guesses tokens.
        num_drafts: drafts wanted in a round.
        All others: as in `generate`.
    Raises: ValueError, TypeError naming the argument.
    """
    _check_prompt(input_ids, max_new_tokens, inputs)
    if num_drafts < 1:
        raise ValueError(f"num_drafts: expected at least 1, got {num_drafts}")
    draft = drafts_of(drafter, model) if isinstance(drafter, ReferenceDrafter) else drafter
    eos = model.config.eos_token_ids if eos_token_ids is None else eos_token_ids
    cache = ReferenceCache(values_only=values_only)
    text = input_ids[0]  # (T,); once there is a bonus token, the cache holds T - 1
    end = input_ids.shape[1] + max_new_tokens
    rounds: list[tuple[int, int]] = []

    out = model.forward(input_ids, past_key_values=cache, block_rule=block_rule, **inputs)
    last_hidden = out.hidden[0, -1]  # (hidden,)
    noise = _noise(model, filters, seed, len(text), 1)
    text = torch.cat((text, sample_tokens(model.head(last_hidden[None, None]), filters, noise)[0]))
    while len(text) < end and int(text[-1]) not in eos:
        committed = len(text) - 1
        shared = {
            name: (keys[:, :, :committed], values[:, :, :committed])
            for name, (keys, values) in out.shared_kv_states.items()
        }
        # A round emits up to one token more than it has drafts.
        wanted = min(num_drafts, end - len(text) - 1)
        drafts = text[:0]
        if wanted:
            drafts = draft(DraftContext(text, last_hidden, shared, wanted))
            if drafts.ndim != 1 or len(drafts) > wanted:
                raise ValueError(f"drafter: expected up to {wanted} tokens, got shape {tuple(drafts.shape)}")

        out = model.forward(torch.cat((text[-1:], drafts))[None], past_key_values=cache)  # rows: bonus token, drafts
        noise = _noise(model, filters, seed, len(text), len(drafts) + 1)
        verified = verify_drafts(model.head(out.hidden), drafts[None], filters=filters, noise=noise, eos_token_ids=eos)
        emitted, num_accepted = verified.tokens[0], int(verified.num_accepted)
        emitted = emitted[emitted != -1]
        rounds.append((len(drafts), num_accepted))
        text = torch.cat((text, emitted))
        # The last token emitted has not been read; what the model read after the one before it was rejected.
        cache.truncate(len(text) - 1)
        last_hidden = out.hidden[0, len(emitted) - 1]
    return SpeculativeResult(text[None], tuple(rounds))


def _noise(model: ReferenceModel, filters: SamplingFilters, seed: int, position: int, rows: int) -> Tensor | None:
    """Noise (1, rows, V) for the tokens at `position` and after; greedy decoding needs none."""
    if filters.temperature == 0:
        return None
    vocab_size = model.config.vocab_size
    return torch.stack([gumbel_noise(seed, position + row, vocab_size) for row in range(rows)])[None]


def _check_prompt(input_ids: Tensor, max_new_tokens: int, inputs: dict[str, Any]) -> None:
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids: expected (1, prompt), got shape {tuple(input_ids.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    for name in ("attention_mask", "position_ids", "inputs_embeds", "past_key_values"):
        if inputs.get(name) is not None:
            raise ValueError(f"{name}: expected None, generation makes its own for a single prompt")
