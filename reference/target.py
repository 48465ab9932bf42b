"""The reference model as a target of speculative generation: one request after the other, each with its own cache.

It has the methods that `gemma4_kernels.mtp.target.Target` names, and what they return has the fields named there.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gemma4_kernels.geometry import LAYER_TYPE, LayerKind
from gemma4_kernels.reference.cache import ReferenceCache

if TYPE_CHECKING:
    from gemma4_kernels.reference.model import ReferenceModel, ReferenceOutput


class ReferencePass(NamedTuple):
    """Rows that a pass has computed."""

    logits: Tensor
    """(B, S, V), without the softcap."""
    hidden: Tensor
    """(B, S, hidden)"""


class ReferenceTarget:
    """State of a batch in a `ReferenceModel`."""

    def __init__(self, model: ReferenceModel) -> None:
        self.model = model
        self.device = model.lm_head.weight.device
        self.vocab_size = model.config.vocab_size
        self.softcap = model.config.final_softcap or 0.0
        self.eos_token_ids = model.config.eos_token_ids
        self.caches: list[ReferenceCache] = []
        self.lengths: list[int] = []
        self.shared: list[dict[str, tuple[Tensor, Tensor]]] = []

    @torch.no_grad()
    def prefill(
        self, tokens: Tensor, lengths: list[int], *, max_positions: int, tentative_rows: int, inputs: dict[str, Any]
    ) -> ReferencePass:
        """Read tokens (B, S), of which `lengths` are text. Returns the last row of each."""
        if any(value is not None for value in inputs.values()):
            raise ValueError(f"inputs: expected none, the reference generates from text, got {sorted(inputs)}")
        self.caches, self.shared = [ReferenceCache() for _ in lengths], []
        outputs = [self._read(b, tokens[b : b + 1, :length]) for b, length in enumerate(lengths)]
        self.lengths = list(lengths)
        hidden = torch.cat([out.hidden[:, -1:] for out in outputs])
        return ReferencePass(self.model.lm_head(hidden), hidden)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> ReferencePass:
        """Read tokens (B, S) behind the committed ones."""
        for cache, length in zip(self.caches, self.lengths, strict=True):
            cache.truncate(length)
        hidden = torch.cat([self._read(b, tokens[b : b + 1]).hidden for b in range(len(self.lengths))])
        return ReferencePass(self.model.lm_head(hidden), hidden)

    def commit(self, count: Tensor) -> None:
        self.lengths = [length + rows for length, rows in zip(self.lengths, count.tolist(), strict=True)]

    def keep(self, requests: Tensor) -> None:
        kept = requests.tolist()
        self.caches = [self.caches[b] for b in kept]
        self.lengths = [self.lengths[b] for b in kept]
        self.shared = [self.shared[b] for b in kept]

    def embed(self, tokens: Tensor) -> Tensor:
        """(...) -> (..., hidden), scaled."""
        return self.model.embed(tokens)

    def rows(self) -> SimpleNamespace:
        """The committed rows of the last sliding and the last full layer, padded to one length."""

        def of(kind: LayerKind) -> SimpleNamespace:
            keys, values = (self._padded([shared[LAYER_TYPE[kind]][i] for shared in self.shared]) for i in range(2))
            return SimpleNamespace(keys=keys, values=values, block_table=None, k_norm_weight=None, inv_freq=None)

        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        return SimpleNamespace(sliding=of("sliding"), full=of("full"), lengths=lengths)

    def _padded(self, rows: list[Tensor]) -> Tensor:
        """(1, Hkv, S_b, D) of each request -> (B, longest, Hkv, D)."""
        sequences = [each[0].transpose(0, 1)[:length] for each, length in zip(rows, self.lengths, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)

    def _read(self, request: int, tokens: Tensor) -> ReferenceOutput:
        out = self.model.forward(tokens, past_key_values=self.caches[request], block_rule="window")
        if len(self.shared) <= request:
            self.shared.append({})
        self.shared[request] = out.shared_kv_states
        return out
