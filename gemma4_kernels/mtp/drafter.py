"""The MTP drafter: a few layers without keys and values of their own, which read those of the target.

One step, with the token t at first the bonus token (sampled, not yet in the target's cache) and h at first the target's
hidden state, after its final norm, that produced t:

    x = pre_projection(concat(target_embedding(t), h))               (B, hidden)
    y = norm(layers(x)); their queries attend to the target's last sliding and its last full layer
    draft = choice of head(y);  next t = draft;  next h = post_projection(y)

All steps of a call stand at one position and see the same committed rows, so cos and sin are made once. Nothing here waits
for the device or depends on data: a call can be compiled whole, or captured in a CUDA graph.

Parameter names are those of transformers' `Gemma4UnifiedAssistantForCausalLM`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gemma4_kernels import checks
from gemma4_kernels.geometry import AttentionGeometry
from gemma4_kernels.mtp.drafter_config import DrafterConfig
from gemma4_kernels.mtp.drafter_layers import Decoder
from gemma4_kernels.mtp.heads import CentroidHead, DraftSampling, all_logits, greedy_tokens
from gemma4_kernels.mtp.rows import LayerRows, SharedRows

__all__ = ["DraftSampling", "Drafter", "DrafterConfig", "Drafts"]

PositionRule = Literal["bonus", "last_committed"]
POSITION_RULES = ("bonus", "last_committed")
_NAME = "Drafter.draft"


class Drafts(NamedTuple):
    """The drafts of one call."""

    tokens: Tensor
    """(B, K) int64."""
    logits: Tensor | None
    """(B, K, V) where the drafts were sampled: what `verify_drafts` takes as draft_logits."""


class Drafter(nn.Module):
    """The drafter of a target, in evaluation mode. Make it with `from_model` or `from_folder`.

        drafter = Drafter.from_folder("gemma-4-12B-it-assistant", device="cuda")
        drafts = drafter.draft(bonus_tokens, hidden, SharedRows(sliding, full, lengths), embed, num_drafts=3)

    `replace_linear` quantises its layers as it does those of any model.
    """

    masked_embedding: CentroidHead | None
    num_assistant_tokens: int | None = None
    """Drafts of a round that its makers suggest, from the assistant's generation config."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.pre_projection = nn.Linear(2 * config.target_hidden_size, config.hidden_size, bias=False)
        self.post_projection = nn.Linear(config.hidden_size, config.target_hidden_size, bias=False)
        self.masked_embedding = None
        if config.num_centroids is not None:
            self.masked_embedding = CentroidHead(
                config.hidden_size, config.vocab_size, config.num_centroids, config.centroid_top_k
            )

    @classmethod
    def from_model(cls, assistant: nn.Module) -> Drafter:
        """The drafter that a transformers assistant (gemma4_unified_assistant or gemma4_assistant) or a module with its
        names is. Linear layers, quantised or not, and parameters are shared with it, nothing is copied.

        Raises: TypeError for a module that has not these parts; ShapeError; ValueError for settings that are not computed.
        """
        from gemma4_kernels.mtp.drafter_loading import from_model

        return from_model(cls, assistant)

    @classmethod
    def from_folder(
        cls, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
    ) -> Drafter:
        """The drafter in a downloaded folder: config.json and safetensors, quantised or not. Needs no transformers.

        Memory holds one tensor beside the drafter while it is read.

        Args:
            dtype: of what is not quantised.
        Raises: WeightFileError for a folder that is incomplete, damaged or no drafter; FormatError for weights in a format
            that is not read; OSError.
        """
        from gemma4_kernels.mtp.drafter_loading import from_folder

        return from_folder(cls, path, dtype, device)

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of the rows that it reads."""
        return self.model.norm.weight.dtype

    @torch.no_grad()
    def draft(
        self, tokens: Tensor, hidden: Tensor, rows: SharedRows, embed: Callable[[Tensor], Tensor], num_drafts: int, *,
        position: PositionRule = "bonus", sliding_rows: int | None = None, sampling: DraftSampling | None = None,
    ) -> Drafts:  # fmt: skip
        """K drafts for each of B requests, from committed rows only. No request's drafts depend on the others'.

        Args:
            tokens: (B,) int32 or int64: the bonus tokens, at position `length`.
            hidden: (B, target hidden): the target's states after its final norm that produced them, in the drafter's dtype.
            rows: what the target has committed, in the drafter's dtype.
            embed: token ids (B,) -> (B, target hidden), the target's scaled embedding.
            num_drafts: K.
            position: of all steps: the bonus token's, `length` (transformers, llama.cpp), or that of the last committed row,
                `length` - 1 (vLLM, SGLang).
            sliding_rows: how many of the newest rows sliding layers see. By default window + 1, as in transformers, one more
                than the target's own tokens see.
            sampling: None drafts the most likely token.
        Returns: Drafts.
        Raises: ShapeError, StrideError, DTypeError, DeviceError, ValueError, TypeError, before anything is computed; filters
            are looked at when the first token is drawn, lengths by attention, on the CPU only.
        """
        window = _check(self, tokens, hidden, rows, num_drafts, position, sliding_rows, sampling)
        positions = rows.lengths.long() - int(position == "last_committed")  # (B,)
        rotations = self.model.rotations(positions, self.dtype)
        first = rows.lengths.long() + 1 if sampling is None or sampling.positions is None else sampling.positions

        token, all_tokens, step_logits = tokens, [], []
        for step in range(num_drafts):
            embedded = embed(token)
            if step == 0:
                _check_embedded(embedded, hidden)
            x = self.pre_projection(torch.cat((embedded.view(hidden.shape), hidden), dim=-1))  # (B, hidden)
            y = self.model(x, rows, rotations, window)  # (B, hidden)
            if sampling is None:
                token = greedy_tokens(y, self.lm_head, self.masked_embedding)  # (B,)
            else:
                logits = all_logits(y, self.lm_head, self.masked_embedding)  # (B, V)
                place = torch.zeros_like(positions) + first + step  # (B,)
                # -1 is a row of NaN, which no embedding has.
                token = sampling.sample(logits, place).clamp(min=0)
                step_logits.append(logits)
            all_tokens.append(token)
            if step + 1 < num_drafts:
                hidden = self.post_projection(y)  # (B, target hidden)
        return Drafts(torch.stack(all_tokens, dim=1), torch.stack(step_logits, dim=1) if step_logits else None)


# Checks -------------------------------------------------------------------------------------------------------------


def _check(
    drafter: Drafter, tokens: Tensor, hidden: Tensor, rows: SharedRows, num_drafts: int, position: str,
    sliding_rows: int | None, sampling: Any,
) -> tuple[int, int]:  # fmt: skip
    """Returns the window of sliding layers."""
    config, dtype = drafter.config, drafter.dtype
    checks.has_shape(_NAME, "tokens", tokens, ("B",))
    checks.has_dtype(_NAME, "tokens", tokens, checks.INTEGERS)
    batch = tokens.shape[0]
    checks.has_shape(_NAME, "hidden", hidden, (batch, config.target_hidden_size))
    checks.has_dtype(_NAME, "hidden", hidden, (dtype,))
    checks.whole_number(_NAME, "num_drafts", num_drafts, minimum=1)
    if position not in POSITION_RULES:
        raise ValueError(f"{_NAME}: position must be one of {', '.join(POSITION_RULES)}, got {position!r}")
    if sampling is not None and not isinstance(sampling, DraftSampling):
        raise TypeError(f"{_NAME}: sampling must be a DraftSampling or None, got {type(sampling).__name__}")
    if sampling is not None and isinstance(sampling.positions, Tensor):
        checks.has_shape(_NAME, "sampling.positions", sampling.positions, (batch,))
        checks.has_dtype(_NAME, "sampling.positions", sampling.positions, checks.INTEGERS)
    elif sampling is not None and sampling.positions is not None:
        checks.whole_number(_NAME, "sampling.positions", sampling.positions)
    if not isinstance(rows, SharedRows):
        raise TypeError(f"{_NAME}: rows must be a SharedRows, got {type(rows).__name__}")
    checks.has_shape(_NAME, "rows.lengths", rows.lengths, (batch,))
    checks.has_dtype(_NAME, "rows.lengths", rows.lengths, checks.INTEGERS)
    weight = drafter.model.norm.weight
    checks.same_device(_NAME, tokens=tokens, hidden=hidden, lengths=rows.lengths, weights=weight)
    for kind in drafter.model.kinds:
        layer = rows.sliding if kind == "sliding" else rows.full
        if kind == "sliding" and layer.keys is None:
            raise TypeError(f"{_NAME}: rows.sliding.keys must be a tensor, got None: only full layers can do without")
        _check_rows(f"rows.{kind}", layer, config.attention(kind), tokens, dtype)
    if sliding_rows is None:
        return config.window, 0
    shown = checks.whole_number(_NAME, "sliding_rows", sliding_rows, minimum=1)
    if shown > config.window + 1:  # a ring need not have more
        raise ValueError(f"{_NAME}: sliding_rows must be at most window + 1 = {config.window + 1}, got {shown}")
    return shown - 1, 0


def _check_rows(
    name: str, rows: LayerRows, geometry: AttentionGeometry, tokens: Tensor, dtype: torch.dtype
) -> None:  # fmt: skip
    sizes = (tokens.shape[0], "S") if rows.block_table is None else ("num_pages", "page_size")
    expected = (*sizes, geometry.num_kv_heads, geometry.head_dim)
    checks.has_shape(_NAME, f"{name}.values", rows.values, expected)
    present = {f"{name}.values": rows.values}
    if rows.keys is not None:
        checks.has_shape(_NAME, f"{name}.keys", rows.keys, tuple(rows.values.shape))
        present[f"{name}.keys"] = rows.keys
    elif rows.values_scale is not None:  # k_eq_v_attention looks at values of 8 bits
        present = {}
    for argument, tensor in present.items():
        checks.has_dtype(_NAME, argument, tensor, (dtype,))
        checks.is_dense(_NAME, argument, tensor)
    if rows.block_table is not None:
        checks.has_shape(_NAME, f"{name}.block_table", rows.block_table, (tokens.shape[0], "pages of a request"))
        checks.has_dtype(_NAME, f"{name}.block_table", rows.block_table, checks.INTEGERS)
    if rows.keys is None:
        for argument, factor, size, dtypes in (
            ("k_norm_weight", rows.k_norm_weight, geometry.head_dim, checks.FLOATS),
            ("inv_freq", rows.inv_freq, geometry.head_dim // 2, (torch.float32, torch.float64)),
        ):
            if factor is None:
                raise TypeError(f"{_NAME}: {name}.{argument} must be given where {name}.keys is None, got None")
            checks.has_shape(_NAME, f"{name}.{argument}", factor, (size,))
            checks.has_dtype(_NAME, f"{name}.{argument}", factor, dtypes)
    checks.same_device(
        _NAME, tokens=tokens, **present, block_table=rows.block_table, k_norm_weight=rows.k_norm_weight,
        inv_freq=rows.inv_freq,
    )  # fmt: skip


def _check_embedded(embedded: Any, hidden: Tensor) -> None:
    checks.is_tensor(_NAME, "embed's result", embedded)
    if embedded.numel() != hidden.numel():
        raise checks.ShapeError(
            f"{_NAME}: embed's result must have shape {tuple(hidden.shape)}, got {tuple(embedded.shape)}"
        )
    checks.has_dtype(_NAME, "embed's result", embedded, (hidden.dtype,))
