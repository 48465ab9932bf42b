"""Gemma 4 12B from token ids to logits, text only or with images, video and audio.

Names of parameters and buffers are those of transformers' `Gemma4UnifiedForCausalLM` (text only) and
`Gemma4UnifiedForConditionalGeneration` (multimodal), so `load_state_dict` takes their checkpoints strictly, and
`logits` takes the keyword arguments of their `forward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemma4_kernels.geometry import LAYER_TYPE, LayerKind
from gemma4_kernels.reference.cache import ReferenceCache
from gemma4_kernels.reference.config import ReferenceConfig
from gemma4_kernels.reference.decoder import TextModel
from gemma4_kernels.reference.embedders import MultimodalModel
from gemma4_kernels.reference.layers import softcap
from gemma4_kernels.reference.loading import load_copy, tie_head
from gemma4_kernels.reference.masks import BLOCK_RULES, NO_BLOCK, BlockRule, block_ids_from_token_types, layer_visible
from gemma4_kernels.reference.target import ReferenceTarget

AttentionMask = Tensor | dict[str, Tensor | None]


@dataclass(frozen=True)
class ReferenceOutput:
    """What one forward pass leaves behind for the head and for the drafter."""

    hidden: Tensor
    """(B, S, hidden) after the final norm."""
    shared_kv_states: dict[str, tuple[Tensor, Tensor]]
    """Keys and values (B, Hkv, rows, D) of the last sliding and the last full layer, by transformers' layer type."""


class ReferenceModel(nn.Module):
    """The oracle. Built from a `ReferenceConfig` with random weights, or from a transformers model."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        self.model: nn.Module = MultimodalModel(config) if config.multimodal else TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_head:
            tie_head(self, self.text)

    @classmethod
    def from_transformers(cls, hf_model: Any, dtype: torch.dtype | None = None) -> ReferenceModel:
        """A copy of a `Gemma4UnifiedForCausalLM` or `Gemma4UnifiedForConditionalGeneration`.

        Args:
            dtype: to compute in; None keeps the model's own. The scale of the embedding stays rounded to the model's
                own dtype, which is the scale that it was trained with.
        """
        with torch.device("meta"):
            model = cls(ReferenceConfig.from_transformers(hf_model.config))
        return load_copy(model, model.text, hf_model, dtype)

    @property
    def text(self) -> TextModel:
        """The text layers, wherever they live."""
        text = self.model.language_model if isinstance(self.model, MultimodalModel) else self.model
        assert isinstance(text, TextModel)
        return text

    def embed(self, token_ids: Tensor) -> Tensor:
        """Scaled embeddings of text tokens, (...) -> (..., hidden): what the drafter is fed with."""
        embedded: Tensor = self.text.embed_tokens(token_ids)
        return embedded

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states after the final norm: (..., hidden) -> (..., V), softcap included."""
        return softcap(self.lm_head(hidden), self.config.final_softcap)

    def speculative_target(self) -> ReferenceTarget:
        """This model as a target of `gemma4_kernels.mtp.generate`."""
        return ReferenceTarget(self)

    def logits(self, input_ids: Tensor | None = None, *, logits_to_keep: int | Tensor = 0, **inputs: Any) -> Tensor:
        """Logits (B, S, V) of a forward pass.

        Args:
            logits_to_keep: only the last n tokens, or the tokens at these indices (1-D); 0 keeps all.
            inputs: as in `forward`.
        """
        return self.head(_rows_to_keep(self.forward(input_ids, **inputs).hidden, logits_to_keep))

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        attention_mask: AttentionMask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ReferenceCache | None = None,
        mm_token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_position_ids: Tensor | None = None,
        video_position_ids: Tensor | None = None,
        num_frames_per_video: Tensor | None = None,
        use_cache: bool | None = None,
        block_rule: BlockRule = "forward",
    ) -> ReferenceOutput:
        """Hidden states of one pass over (B, S) new tokens; the arguments are those of transformers' `forward`.

        Args:
            input_ids: (B, S). inputs_embeds: (B, S, hidden) in their place, scaled already.
            pixel_values: (images, patches, values); image_position_ids: (images, patches, 2), (-1, -1) for padding.
            pixel_values_videos: (frames, patches, values) of all videos; video_position_ids: (frames, patches, 2);
                num_frames_per_video: (videos,).
            input_features: (clips, frames, samples); input_features_mask: (clips, frames).
            attention_mask: (B, past + S), 0 for padding; or (B or 1, H or 1, S, keys) bool (True = visible) or floating
                (added to the scores), which replaces the model's own mask; or a dictionary of those under
                "full_attention" and "sliding_attention", None for plainly causal. With fewer keys than there are, such
                a mask is one for the newest.
            position_ids: (1 or B, S), for the rotation only; default: the index in the cache. Masks go by the index.
            past_key_values: a `ReferenceCache`, which this call extends.
            mm_token_type_ids: (B, up to past + S) from the very first token of the sequence on (transformers reads
                them by index); missing ones are text.
            use_cache: accepted, without effect: a cache is used if there is one.
            block_rule: how image blocks change the masks, see `masks.layer_visible`. "window" is the model's own rule;
                the default is the one that transformers' `forward` has.
        Raises: ValueError, TypeError naming the argument.
        """
        features = {
            "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos,
            "input_features": input_features,
            "input_features_mask": input_features_mask,
            "image_position_ids": image_position_ids,
            "video_position_ids": video_position_ids,
            "num_frames_per_video": num_frames_per_video,
        }
        if not self.config.multimodal:
            for name, value in {**features, "mm_token_type_ids": mm_token_type_ids}.items():
                if value is not None:
                    raise ValueError(f"{name}: expected None, this model reads text only")
        if block_rule not in BLOCK_RULES:
            raise ValueError(f"block_rule: expected one of {BLOCK_RULES}, got {block_rule!r}")
        if past_key_values is not None and not isinstance(past_key_values, ReferenceCache):
            raise TypeError(f"past_key_values: expected a ReferenceCache, got {type(past_key_values).__name__}")

        hidden = self._embed_inputs(input_ids, inputs_embeds, features)  # (B, S, hidden)
        batch, num_tokens = hidden.shape[:2]
        past = 0 if past_key_values is None else past_key_values.length
        positions = self._positions(position_ids, batch, num_tokens, past, hidden.device)  # (B, S)
        if position_ids is not None and attention_mask is None and past_key_values is None:
            self._refuse_packed(positions, use_cache)
        block_ids = self._block_ids(mm_token_type_ids, batch, past + num_tokens)
        masks = self._masks(attention_mask, block_ids, block_rule, (batch, num_tokens), past, hidden.device)

        if past_key_values is not None:
            past_key_values.append_positions(positions)
        hidden, shared = self.text(hidden, positions, masks, past_key_values)
        shared_kv_states = {
            LAYER_TYPE[kind]: (keys.transpose(1, 2), values.transpose(1, 2)) for kind, (keys, values) in shared.items()
        }
        return ReferenceOutput(hidden, shared_kv_states)

    def _embed_inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, features: dict[str, Tensor | None]
    ) -> Tensor:
        """Text embeddings with soft tokens in the place of their placeholders: (B, S, hidden)."""
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them")
        placeholders = (config.image_token_id, config.video_token_id, config.audio_token_id)
        if inputs_embeds is not None:
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != config.hidden_size:
                raise ValueError(
                    f"inputs_embeds: expected (batch, tokens, {config.hidden_size}), got {tuple(inputs_embeds.shape)}"
                )
            embedded = inputs_embeds
        else:
            assert input_ids is not None
            if input_ids.ndim != 2:
                raise ValueError(f"input_ids: expected (batch, tokens), got shape {tuple(input_ids.shape)}")
            text_ids = input_ids
            if config.multimodal:
                # A placeholder may lie outside the vocabulary; padding stands in for it.
                is_placeholder = torch.isin(input_ids, torch.tensor(placeholders, device=input_ids.device))
                text_ids = input_ids.masked_fill(is_placeholder, config.pad_token_id)
            if text_ids.numel() and not 0 <= int(text_ids.min()) <= int(text_ids.max()) < config.vocab_size:
                raise ValueError(
                    f"input_ids: expected 0 to {config.vocab_size - 1}, got {int(text_ids.min())} to {int(text_ids.max())}"
                )
            embedded = self.embed(text_ids)

        found = self.model.soft_tokens(features) if isinstance(self.model, MultimodalModel) else []
        for name, token_id, soft_tokens in found:
            if input_ids is not None:
                is_soft = input_ids == token_id  # (B, S)
            else:
                is_soft = (embedded == self.embed(torch.tensor(token_id, device=embedded.device))).all(dim=-1)
            if int(is_soft.sum()) != soft_tokens.shape[0]:
                raise ValueError(
                    f"{name}: expected one soft token for each of the {int(is_soft.sum())} tokens {token_id}, got"
                    f" {soft_tokens.shape[0]}"
                )
            embedded = embedded.masked_scatter(is_soft[..., None], soft_tokens.to(embedded.dtype))
        return embedded

    def _positions(
        self, position_ids: Tensor | None, batch: int, num_tokens: int, past: int, device: torch.device
    ) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(past, past + num_tokens, device=device)[None]
        if position_ids.shape not in ((1, num_tokens), (batch, num_tokens)):
            raise ValueError(f"position_ids: expected (1 or {batch}, {num_tokens}), got {tuple(position_ids.shape)}")
        return position_ids.expand(batch, -1)

    def _refuse_packed(self, positions: Tensor, use_cache: bool | None) -> None:
        """transformers takes a jump in position_ids for the start of another sequence, if nothing else tells it.

        (Without a mask and without a cache; the text-only model makes a cache of its own unless told not to.)
        """
        packs = self.config.multimodal or use_cache is False
        if packs and not bool((positions.diff(dim=1) == 1).all()):
            raise ValueError(
                "position_ids: expected consecutive positions where there is neither an attention_mask nor a cache;"
                " packed sequences are not supported"
            )

    def _block_ids(self, mm_token_type_ids: Tensor | None, batch: int, total: int) -> Tensor | None:
        """(B, total) block ids of the whole sequence, or None."""
        if mm_token_type_ids is None or not self.config.image_blocks:
            return None
        if mm_token_type_ids.shape[0] != batch:
            raise ValueError(f"mm_token_type_ids: expected {batch} rows, got shape {tuple(mm_token_type_ids.shape)}")
        block_ids = block_ids_from_token_types(mm_token_type_ids)[:, :total]
        return nn.functional.pad(block_ids, (0, total - block_ids.shape[1]), value=NO_BLOCK)

    def _masks(
        self,
        attention_mask: AttentionMask | None,
        block_ids: Tensor | None,
        block_rule: BlockRule,
        shape: tuple[int, int],
        past: int,
        device: torch.device,
    ) -> dict[LayerKind, Tensor]:
        """One mask for each kind of layer: the caller's, or the model's own."""
        (batch, num_tokens), total = shape, past + shape[1]
        prepared: dict[str, Tensor | None] = {}
        key_visible = None
        if isinstance(attention_mask, dict):
            prepared, block_ids = attention_mask, None
        elif attention_mask is not None and attention_mask.ndim == 4:
            prepared = {LAYER_TYPE[kind]: attention_mask for kind in self.config.layers}
        elif attention_mask is not None:
            if attention_mask.shape != (batch, total):
                raise ValueError(
                    f"attention_mask: expected {(batch, total)}, cached tokens included, got {tuple(attention_mask.shape)}"
                )
            key_visible = attention_mask.bool()

        masks: dict[LayerKind, Tensor] = {}
        for kind in set(self.config.layers):
            name = f"attention_mask[{LAYER_TYPE[kind]!r}]"
            if prepared and LAYER_TYPE[kind] not in prepared:
                raise ValueError(f"{name}: missing, got {sorted(prepared)}")
            mask = prepared.get(LAYER_TYPE[kind])
            if mask is None:
                mask = layer_visible(
                    kind,
                    num_tokens,
                    total,
                    window=self.config.window,
                    block_ids=block_ids,
                    key_visible=key_visible,
                    block_rule=block_rule,
                    device=device,
                )
            elif mask.ndim != 4 or mask.shape[2] != num_tokens or not 0 < mask.shape[3] <= total:
                raise ValueError(f"{name}: expected (batch, heads, {num_tokens}, {total}), got {tuple(mask.shape)}")
            elif mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(f"{name}: expected a bool or floating dtype, got {mask.dtype}")
            masks[kind] = mask
        return masks


def _rows_to_keep(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """(B, S, hidden) -> (B, n, hidden): the last n tokens (0: all), or those at the given indices."""
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep: expected 0 (all) or a number of tokens, got {logits_to_keep}")
        return hidden[:, -logits_to_keep:]
    if logits_to_keep.ndim != 1:
        raise ValueError(f"logits_to_keep: expected an int or 1-D indices, got shape {tuple(logits_to_keep.shape)}")
    return hidden[:, logits_to_keep]
