"""transformers' Gemma 4 models as targets of speculative generation.

The model's own forward runs, with two of its parts exchanged: its cache is a `SpeculativeCache`, and its attention reads that.
So every model of the family is served, with its experts, per-layer embeddings and images, and with quantised layers if
`replace_linear` has put them there. What a drafter reads lies in the cache; that transformers 5.23 shares no keys and
values of a 12B (`kv_sharing_modes`) does not matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from gemma4_kernels import checks
from gemma4_kernels.attention.api import flash_attn_func
from gemma4_kernels.geometry import KIND_OF
from gemma4_kernels.mtp.cache import CachedLayer, SpeculativeCache
from gemma4_kernels.mtp.rows import SharedRows
from gemma4_kernels.mtp.target import Pass

NAME = "gemma4_kernels_speculative"
_OWN_INPUTS = {
    "args", "attention_mask", "input_ids", "inputs_embeds", "kwargs", "labels", "logits_to_keep", "past_key_values",
    "per_layer_inputs", "position_ids", "return_dict", "use_cache",
}  # fmt: skip
"""What a pass sets itself, or what has no place in generation."""


class TransformersTarget:
    """A transformers Gemma 4 model (`Gemma4UnifiedForCausalLM`, `...ForConditionalGeneration`, or those of `gemma4`).

    Args:
        model: in evaluation mode, on one device.
        values_only: full layers whose keys are a function of their values cache the values alone, which is half the memory.
        values_dtype: of those; float8_e4m3fn or int8 halves a bf16 cache once more, and changes the text (docs/attention.md).
        max_rows: the most rows of a pass over drafts; a batch with more is read in groups, and its prompts one by one. With 16,
            and layers whose rows do not change one another's bits up to 16 (QuantizedLinear), a text has the same bits behind
            it with drafts or without, whatever the batch, at the price of reading the weights for each group.
        prefill_chunk: prompts of text are read so many tokens at a time, which bounds the memory for activations. Prompts with
            images, video or audio are read at once.
    Raises: ValueError for a model that is none of these.
    """

    def __init__(
        self, model: Any, *, values_only: bool = True, values_dtype: torch.dtype | None = None,
        max_rows: int | None = None, prefill_chunk: int = 2048,
    ) -> None:  # fmt: skip
        self.model = model
        self.config = model.config.get_text_config()
        kinds = getattr(self.config, "layer_types", None)
        if kinds is None or not set(kinds) <= KIND_OF.keys() or not hasattr(self.config, "num_kv_shared_layers"):
            raise ValueError(
                f"TransformersTarget: model must be a Gemma 4 model of transformers, got {type(model).__name__}"
            )
        self.text = model.get_decoder()
        self.device: torch.device = model.device
        self.vocab_size: int = self.config.vocab_size
        self.softcap = float(self.config.final_logit_softcapping or 0.0)
        self.eos_token_ids = _eos_token_ids(model)
        self.cache: SpeculativeCache | None = None
        num_own = len(kinds) - (self.config.num_kv_shared_layers or 0)
        last = {kind: index for index, kind in enumerate(kinds[:num_own])}  # the last owner of each kind
        self._owner = [index if index < num_own else last[kind] for index, kind in enumerate(kinds)]
        self._shared = {KIND_OF[kind]: index for kind, index in last.items()}
        self._layers = {index: self._cached_layer(index, values_only) for index in range(num_own)}
        if values_dtype is not None and not values_only:
            raise ValueError(f"TransformersTarget: values_dtype must be None without values_only, got {values_dtype}")
        self._values_dtype = values_dtype
        self.max_rows = max_rows
        if max_rows is not None:
            checks.whole_number("TransformersTarget", "max_rows", max_rows, minimum=1)
        self.prefill_chunk = checks.whole_number("TransformersTarget", "prefill_chunk", prefill_chunk, minimum=1)
        self._blocks: Tensor | None = None  # (B, S) block ids of the prompts
        self._start: int | None = None  # position of the first row of a pass over prompts
        self._before: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # sliding layer -> keys and values that its chunk sees besides
        AttentionInterface.register(NAME, _attention)

    def _cached_layer(self, index: int, values_only: bool) -> CachedLayer:
        attention = self.text.layers[index].self_attn
        kind = self.config.layer_types[index]
        heads = self.config.num_attention_heads // attention.num_key_value_groups
        if kind == "sliding_attention":
            return CachedLayer("sliding", heads, attention.head_dim, window=attention.sliding_window)
        if not values_only or attention.v_proj is not None:
            return CachedLayer("full", heads, attention.head_dim)
        inv_freq = getattr(self.text.rotary_emb, f"{kind}_inv_freq").to(self.device, torch.float32)
        weight = attention.k_norm.weight.detach()
        return CachedLayer("full", heads, attention.head_dim, k_norm_weight=weight, inv_freq=inv_freq)

    # The protocol of `mtp.target.Target` ---------------------------------------------------------------------------

    def prefill(
        self, tokens: Tensor, lengths: list[int], *, max_positions: int, tentative_rows: int, inputs: dict[str, Any]
    ) -> Pass:
        batch = tokens.shape[0]
        self._check_inputs(inputs)
        if self.max_rows is not None and tentative_rows > self.max_rows:
            raise ValueError(
                f"TransformersTarget: max_rows must be at least the {tentative_rows} rows of a request, its drafts and one, "
                f"got {self.max_rows}"
            )
        self.cache = None  # the one before need not stay while this one is made
        self.cache = SpeculativeCache(
            self._layers, batch=batch, max_positions=max_positions, tentative_rows=tentative_rows,
            dtype=self.model.dtype, device=self.device, values_dtype=self._values_dtype,
        )  # fmt: skip
        self._blocks = self._block_ids(inputs.get("mm_token_type_ids"))
        given = {name: value for name, value in inputs.items() if value is not None}
        # Images and the like come for the whole batch.
        groups = [slice(0, batch)] if given or self.max_rows is None else [slice(b, b + 1) for b in range(batch)]
        try:
            rows = torch.cat([self._read_prompts(tokens[group], lengths[group], group, given) for group in groups])
        finally:
            self._start, self._blocks = None, None
            self._before.clear()
        self.cache.commit(torch.tensor(lengths, device=self.device))
        return Pass(self._head(rows), rows)

    def _read_prompts(self, tokens: Tensor, lengths: list[int], group: slice, given: dict[str, Any]) -> Tensor:
        """Hidden states (B, 1, hidden) of the last tokens of a group's prompts."""
        longest = max(lengths)
        chunk = longest if given else self.prefill_chunk
        last: dict[int, Tensor] = {}
        for start in range(0, longest, chunk):
            stop = min(start + chunk, longest)
            self._begun().begin_prompts(lengths, start, stop, group)
            self._start = start
            positions = torch.arange(start, stop, device=self.device).expand(len(lengths), -1)  # (B, rows)
            hidden = self._forward(tokens[:, start:stop], positions, given)  # (B, rows, hidden)
            last |= {b: hidden[b, n - 1 - start] for b, n in enumerate(lengths) if start < n <= stop}
        return torch.stack([last[b] for b in range(len(lengths))])[:, None]

    def step(self, tokens: Tensor) -> Pass:
        cache, (batch, rows) = self._begun(), tokens.shape
        size = batch if self.max_rows is None else max(1, self.max_rows // rows)
        passes = []
        for start in range(0, batch, size):
            group = slice(start, start + size)
            hidden = self._forward(
                tokens[group], cache.begin_rows(rows, group), {}
            )  # (requests of the group, rows, hidden)
            passes.append((self._head(hidden), hidden))
        logits, hiddens = zip(*passes, strict=True)
        return Pass(torch.cat(logits), torch.cat(hiddens))

    def _head(self, hidden: Tensor) -> Tensor:
        """(B, S, hidden) -> logits (B, S, V), no more than max_rows rows at a time."""
        head, flat = self.model.get_output_embeddings(), hidden.flatten(0, 1)
        size = flat.shape[0] if self.max_rows is None else self.max_rows
        logits = torch.cat([head(part) for part in flat.split(size)])  # (B * S, V)
        return logits.view(*hidden.shape[:2], -1)

    def commit(self, count: Tensor) -> None:
        self._begun().commit(count)

    def keep(self, requests: Tensor) -> None:
        self._begun().keep(requests)

    def embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(tokens)
        return embedded

    def rows(self) -> SharedRows:
        return self._begun().rows(self._shared["sliding"], self._shared["full"])

    # What transformers' layers call --------------------------------------------------------------------------------

    def update(self, keys: Tensor, values: Tensor, index: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """`Cache.update`: keys and values (B, Hkv, S, D) of a layer's new rows."""
        cache = self._begun()
        if self._start and cache.layers[index].kind == "sliding":  # before its rows are overwritten
            self._before[index] = cache.newest(index, self._start)
        cache.write(index, keys.transpose(1, 2), values.transpose(1, 2))
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """`Cache.get_seq_length`. Requests differ in theirs; positions are given, and nobody needs this number."""
        return 0

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one layer: query (B, Hq, S, D), the pass's own key and value (B, Hkv, S, D)."""
        q, owner, is_sliding = query.transpose(1, 2), self._owner[module.layer_idx], module.sliding_window is not None
        if self._start is None or (self._start and not is_sliding):
            return self._begun().attend(owner, q, softmax_scale=scale)
        # A ring has no room for all rows of a prompt, and of the first rows everything that they see is at hand.
        k, v = key.transpose(1, 2), value.transpose(1, 2)  # (B, S, Hkv, D)
        if self._start:
            k, v = (torch.cat(both, dim=1) for both in zip(self._before[owner], (k, v), strict=True))
        out = flash_attn_func(
            q, k, v, scale, causal=True, window_size=(module.sliding_window - 1, 0) if is_sliding else (-1, -1),
            block_ids=self._blocks if is_sliding else None,
        )  # fmt: skip
        assert isinstance(out, Tensor)  # without return_lse
        return out

    def _forward(self, tokens: Tensor, positions: Tensor, inputs: dict[str, Any]) -> Tensor:
        """(B, S, hidden) after the final norm."""
        with _implementation(self.config, NAME):
            out = self.model.base_model(
                input_ids=tokens, position_ids=positions, past_key_values=self, use_cache=True,
                # Ready-made masks, so that transformers makes none: the attention knows what is visible.
                attention_mask={"full_attention": None, "sliding_attention": None},
                speculative_target=self, return_dict=True, **inputs,
            )  # fmt: skip
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _check_inputs(self, inputs: dict[str, Any]) -> None:
        """transformers' forward takes any keyword and leaves out what it does not know, a misspelt one too."""
        known = inspect.signature(self.model.base_model.forward).parameters.keys() - _OWN_INPUTS
        for name, value in inputs.items():
            if value is not None and name not in known:
                raise TypeError(
                    f"generate: {name} must be an argument of generate or an input of {type(self.model).__name__}, one of "
                    f"{', '.join(sorted(known)) or 'none'}"
                )

    def _block_ids(self, token_types: Tensor | None) -> Tensor | None:
        """(B, S) int32: which tokens belong to one image or video, -1 for text and audio."""
        if token_types is None or self.config.use_bidirectional_attention != "vision":
            return None
        visual = (token_types == 1) | (token_types == 2)
        starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
        return torch.where(visual, starts.cumsum(1) - 1, -1).to(device=self.device, dtype=torch.int32)

    def _begun(self) -> SpeculativeCache:
        if self.cache is None:
            raise ValueError("TransformersTarget: prefill must come first, got no prompts yet")
        return self.cache


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    speculative_target: TransformersTarget, scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: (B, S, Hq, D), and no weights."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return speculative_target.attend(module, query, key, value, scale), None


@contextmanager
def _implementation(config: Any, name: str) -> Iterator[None]:
    """Only the text model's attention is exchanged, and only for the time of a pass."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _eos_token_ids(model: Any) -> tuple[int, ...]:
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(torch.as_tensor(found).flatten().tolist())
    return ()
