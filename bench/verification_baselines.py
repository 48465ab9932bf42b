"""Other ways from logits to tokens: what the same call costs without this package.

    transformers  its processors of logits, then what its assisted generation does: `_speculative_sampling` where the drafter's
                  logits are given, else a sample of each row and a comparison. It knows one request at a time
    softmax       sort, softmax and cumulative sums, a sample of each row, a comparison: what one writes in PyTorch, for
                  all requests at once

Both give tokens (B, K + 1), or (B,) without drafts, from torch's own random numbers: of the same distribution, but not the
same tokens, except for greedy ones. Where there is none the reason is a sentence.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Baseline = Callable[[], Tensor]

NAMES = ("transformers", "softmax")
_FILTERS = ("temperature", "top_k", "top_p", "min_p")


def verification(arguments: dict[str, Any]) -> dict[str, Baseline | str]:
    """The baselines of one call of `verify_drafts` or `sample_tokens`: name -> ready to run, or why not.

    Args:
        arguments: the keyword arguments.
    """
    reason = _beyond_the_baselines(arguments)
    if reason is not None:
        return dict.fromkeys(NAMES, reason)
    return {"transformers": _transformers(arguments), "softmax": _softmax(arguments)}


def _beyond_the_baselines(arguments: dict[str, Any]) -> str | None:
    softcap = arguments["softcap"]
    if isinstance(softcap, Tensor) or softcap:
        return "softcap is part of the model there"
    if arguments.get("num_drafts") is not None or arguments.get("eos_token_ids"):
        return "requests with fewer drafts and ends of text are not compared"
    if arguments.get("method", "match") == "block":
        return "it does not verify whole blocks"
    if arguments.get("method", "match") == "rejection" and arguments["draft_logits"] is None:
        return "rejection without the drafter's logits is not compared"
    if arguments["logits"].shape[0] == 0:
        return "there are no requests"
    return None


def _three_dimensional(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits (B, K + 1, V) and drafts (B, K)."""
    logits: Tensor = arguments["logits"]
    if logits.ndim == 2:
        return logits[:, None], torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    return logits, arguments["draft_tokens"]


def _accepted_then_one(drafts: Tensor, count: Tensor, own: Tensor) -> Tensor:
    """(B, K + 1): count (B,) drafts, then own (B,), then -1."""
    column = torch.arange(drafts.shape[1] + 1, device=drafts.device)
    tokens = torch.nn.functional.pad(drafts, (0, 1), value=-1)
    tokens = torch.where(column < count[:, None], tokens, -1)
    return tokens.scatter(1, count[:, None], own[:, None])


# transformers -------------------------------------------------------------------------------------------------------


def _transformers(arguments: dict[str, Any]) -> Baseline | str:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    try:
        warpers = importlib.import_module("transformers.generation.logits_process")
        speculative = importlib.import_module("transformers.generation.utils")._speculative_sampling
    except Exception as error:  # another release, or one whose own dependencies are missing
        return f"transformers has no speculative sampling here ({type(error).__name__})"
    logits, drafts = _three_dimensional(arguments)
    draft_logits = arguments.get("draft_logits")
    batch = len(logits)
    chains = []
    for b in range(batch):
        value = {name: arguments[name] for name in _FILTERS}
        value = {name: x[b].item() if isinstance(x, Tensor) else x for name, x in value.items()}
        chains.append(_chain(warpers, value) if value["temperature"] else None)

    def run() -> Tensor:
        rows = []
        for b, chain in enumerate(chains):
            if chain is None:
                rows.append(_compared(logits[b].argmax(-1), drafts[b]))
            elif draft_logits is None:
                probabilities = chain(logits[b].float()).softmax(-1)
                rows.append(_compared(torch.multinomial(probabilities, 1)[:, 0], drafts[b]))
            else:
                target, drafter = chain(logits[b].float())[None], chain(draft_logits[b].float())[None]
                found, _ = speculative(drafts[b : b + 1], drafter, drafts.shape[1], target)
                rows.append(torch.nn.functional.pad(found[0], (0, logits.shape[1] - found.shape[1]), value=-1))
        tokens = torch.stack(rows)
        return tokens if arguments["logits"].ndim == 3 else tokens[:, 0]

    return run


def _chain(warpers: Any, value: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The processors that generate() would make, in its order."""
    made = []
    if value["temperature"] != 1:
        made.append(warpers.TemperatureLogitsWarper(float(value["temperature"])))
    if value["top_k"]:
        made.append(warpers.TopKLogitsWarper(int(value["top_k"])))
    if value["top_p"] < 1:
        made.append(warpers.TopPLogitsWarper(float(value["top_p"])))
    if value["min_p"] > 0:
        made.append(warpers.MinPLogitsWarper(float(value["min_p"])))

    def warped(scores: Tensor) -> Tensor:
        for processor in made:
            scores = processor(None, scores)
        return scores

    return warped


def _compared(samples: Tensor, drafts: Tensor) -> Tensor:
    """(K + 1,): samples up to the first that differs from its draft, then -1."""
    matches = ((~(drafts == samples[:-1])).cumsum(dim=-1) < 1).sum()
    column = torch.arange(len(samples), device=samples.device)
    return torch.where(column <= matches, samples, -1)


# softmax ------------------------------------------------------------------------------------------------------------


def _softmax(arguments: dict[str, Any]) -> Baseline:
    logits, drafts = _three_dimensional(arguments)
    draft_logits, batch = arguments.get("draft_logits"), len(logits)
    value = {
        name: x if not isinstance(x := arguments[name], Tensor) else x[:, None, None] for name in _FILTERS
    }  # numbers, or (B, 1, 1)
    greedy = value["temperature"] == 0

    def run() -> Tensor:
        if greedy is True:
            samples = logits.argmax(-1)
        else:
            p = _probabilities(logits, value)
            if draft_logits is not None:
                return _by_rejection(p, _probabilities(draft_logits, value), drafts)
            samples = torch.multinomial(p.flatten(0, 1), 1).view(batch, -1)
            if isinstance(greedy, Tensor):
                samples = torch.where(greedy[:, 0], logits.argmax(-1), samples)
        matches = (samples[:, :-1] == drafts).long().cumprod(-1).sum(-1)  # (B,)
        column = torch.arange(samples.shape[1], device=samples.device)
        tokens = torch.where(column <= matches[:, None], samples, -1)
        return tokens if arguments["logits"].ndim == 3 else tokens[:, 0]

    return run


def _probabilities(logits: Tensor, value: dict[str, Any]) -> Tensor:
    """(B, rows, V) fp32 after filters, not normalised."""
    temperature, top_k, top_p, min_p = (value[name] for name in _FILTERS)
    vocab_size = logits.shape[-1]
    if isinstance(temperature, Tensor):
        temperature = torch.where(temperature == 0, 1.0, temperature)
    p: Tensor = (logits.float() / temperature).softmax(-1)
    by_rank = isinstance(top_k, Tensor) or isinstance(top_p, Tensor) or top_k > 0 or top_p < 1
    if by_rank:
        p, order = p.sort(dim=-1, descending=True)
        rank = torch.arange(vocab_size, device=p.device)
        if isinstance(top_k, Tensor):
            p = p.masked_fill(rank >= torch.where(top_k > 0, top_k, vocab_size), 0.0)
        elif top_k > 0:
            p = p.masked_fill(rank >= top_k, 0.0)
        if isinstance(top_p, Tensor) or top_p < 1:
            p = p / p.sum(-1, keepdim=True)
            p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
        p = torch.zeros_like(p).scatter(-1, order, p)
    if isinstance(min_p, Tensor) or min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0.0)
    return p


def _by_rejection(p: Tensor, q: Tensor, drafts: Tensor) -> Tensor:
    """p (B, K + 1, V), q (B, K, V), drafts (B, K)."""
    p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))
    p_draft, q_draft = (x[:, : drafts.shape[1]].gather(-1, drafts[..., None])[..., 0] for x in (p, q))
    accepts = torch.rand_like(p_draft) * q_draft < p_draft
    count = accepts.long().cumprod(-1).sum(-1)  # (B,)
    each = torch.arange(len(p), device=p.device)
    at_the_end = torch.nn.functional.pad(q, (0, 0, 0, 1))  # behind all drafts, nothing is taken away
    residual = (p[each, count] - at_the_end[each, count]).clamp(min=0)
    return _accepted_then_one(drafts, count, torch.multinomial(residual, 1)[:, 0])
