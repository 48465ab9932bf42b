"""The inputs of an attention case, and the reference's answer to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma4_kernels import reference
from gemma4_kernels.attention import value_codes
from gemma4_kernels.bench import inputs as draw

if TYPE_CHECKING:
    from gemma4_kernels.bench.cases import AttentionCase, Part

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""What `cache` of a case says of values of 8 bits."""
Inputs = dict[str, Any]
Result = tuple[Tensor, Tensor]


# Inputs ------------------------------------------------------------------------------------------------------------------


def key_lengths(case: AttentionCase) -> list[int]:
    return [int(part.split(":")[-1]) for part in case.lengths.split("+")] if case.lengths else [case.sk] * case.b


def row_counts(case: AttentionCase) -> list[int]:
    return [int(part.split(":")[0]) for part in case.lengths.split("+")]


def first_rows(case: AttentionCase) -> list[int]:
    return [int(part) for part in case.leftpad.split("+")] if case.leftpad else [0] * len(key_lengths(case))


def _block_ids(case: AttentionCase, requests: int, keys: int) -> Tensor | None:
    """(requests, keys) int32, or None."""
    if not case.blocks:
        return None
    ids = torch.full((requests, keys), -1, dtype=torch.int32)
    layouts = case.blocks.split("/")
    for b in range(requests):
        for number, part in enumerate(layouts[b % len(layouts)].split("+")):
            if part.startswith("pad"):
                ids[b, : int(part[3:])] = -2
            else:
                start, stop = part.split("-")
                ids[b, int(start) : int(stop)] = number
    return ids


def _common(case: AttentionCase) -> Inputs:
    return {"softmax_scale": case.scale, "window_size": (case.left, case.right), "softcap": case.softcap}


def _flash_attn(case: AttentionCase, rng: torch.Generator) -> Inputs:
    dtype = DTYPES[case.dtype]
    return {
        "q": draw.rows(draw.queries, (case.b, case.sq, case.hq, case.d), rng, dtype),
        "k": draw.rows(draw.keys, (case.b, case.sk, case.hkv, case.d), rng, dtype),
        "v": draw.rows(draw.values, (case.b, case.sk, case.hkv, case.d), rng, dtype),
        "block_ids": _block_ids(case, case.b, case.sk),
        "window_limits_blocks": not case.free,
        **_common(case),
    }


def _varlen(case: AttentionCase, rng: torch.Generator) -> Inputs:
    dtype = DTYPES[case.dtype]
    rows, lengths = row_counts(case), key_lengths(case)
    made = {
        "q": draw.rows(draw.queries, (sum(rows), case.hq, case.d), rng, dtype),
        "cu_seqlens_q": torch.tensor([0, *rows]).cumsum(0).to(torch.int32),
        "cu_seqlens_k": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "max_seqlen_q": max(rows),
        "max_seqlen_k": max(lengths),
        **_common(case),
    }
    if case.page:
        caches = _padded_caches(case, lengths, rng)
        (made["k"], made["block_table"]), (made["v"], _) = (
            draw.scattered_pages(cache, case.page, draw.generator(case.seed)) for cache in caches
        )
    else:
        made["k"] = draw.rows(draw.keys, (sum(lengths), case.hkv, case.d), rng, dtype)
        made["v"] = draw.rows(draw.values, (sum(lengths), case.hkv, case.d), rng, dtype)
    return made


def _padded_caches(case: AttentionCase, lengths: list[int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """k and v (B, longest, Hkv, D); rows beyond a request's length hold NaN."""
    shape = (len(lengths), max(lengths), case.hkv, case.d)
    k, v = draw.rows(draw.keys, shape, rng, DTYPES[case.dtype]), draw.rows(draw.values, shape, rng, DTYPES[case.dtype])
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = float("nan"), float("nan")
    return k, v


def _kvcache(case: AttentionCase, rng: torch.Generator) -> Inputs:
    dtype = DTYPES[case.dtype]
    lengths = key_lengths(case)
    made: Inputs = {
        "q": draw.rows(draw.queries, (len(lengths), case.sq, case.hq, case.d), rng, dtype),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32) - case.new,
        **_common(case),
    }
    k, v = _padded_caches(case, lengths, rng)
    if case.new:
        last = torch.tensor(lengths)[:, None] - case.new + torch.arange(case.new)  # (B, new)
        made["k"] = k[torch.arange(len(lengths))[:, None], last].clone()
        made["v"] = v[torch.arange(len(lengths))[:, None], last].clone()
        for cache in (k, v):
            cache[torch.arange(len(lengths))[:, None], last] = float("nan")
    if case.leftpad:
        made["cache_leftpad"] = torch.tensor(first_rows(case), dtype=torch.int32)
        for b, first in enumerate(first_rows(case)):
            k[b, :first], v[b, :first] = float("nan"), float("nan")
    made["block_ids"] = _block_ids(case, len(lengths), k.shape[1])
    if case.shuffled:
        order = torch.randperm(2 * len(lengths), generator=rng)[: len(lengths)]
        made["cache_batch_idx"] = order.to(torch.int32)
        caches = [cache.new_full((2 * len(lengths), *cache.shape[1:]), float("nan")) for cache in (k, v)]
        caches[0][order], caches[1][order] = k, v
        k, v = caches
    if case.page:
        (k, made["block_table"]), (v, _) = (
            draw.scattered_pages(cache, case.page, draw.generator(case.seed)) for cache in (k, v)
        )
        if made["block_ids"] is not None:  # the partial last page has ids too, which no length reaches
            spare = made["block_table"].shape[1] * case.page - made["block_ids"].shape[1]
            made["block_ids"] = torch.nn.functional.pad(made["block_ids"], (0, spare), value=-1)
    return {**made, "k_cache": k, "v_cache": v}


def _k_eq_v(case: AttentionCase, rng: torch.Generator) -> Inputs:
    dtype = DTYPES[case.dtype]
    lengths = key_lengths(case)
    made: Inputs = {
        "q": draw.rows(draw.queries, (len(lengths), case.sq, case.hq, case.d), rng, dtype),
        "k_norm_weight": draw.k_norm_weight(case.d, rng).to(dtype),
        "inv_freq": draw.inv_freq(case.d),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
        "softmax_scale": case.scale,
    }
    values = draw.rows(draw.values, (len(lengths), max(lengths), case.hkv, case.d), rng, dtype)
    if case.cache:
        # A scale of its own for each head, and some numbers beyond its range.
        scale = value_codes.FLOAT8_SCALE * torch.tensor([1.0, 0.1])[torch.arange(case.hkv) % 2]
        values, made["values_scale"] = value_codes.encode(values, CODES[case.cache], scale)
    caches = {"values": values}
    if case.cache == "int8":  # the scale of a row lies as the row does
        caches["values_scale"] = made["values_scale"].unsqueeze(-1)
    for name, cache in caches.items():
        for b, length in enumerate(lengths):
            cache[b, length:] = float("nan") if cache.is_floating_point() else -128
        if case.page:
            caches[name], made["block_table"] = draw.scattered_pages(cache, case.page, draw.generator(case.seed))
    if case.cache == "int8":
        made["values_scale"] = caches["values_scale"].squeeze(-1)
    return {**made, "values": caches["values"]}


INPUTS = {
    "flash_attn_func": _flash_attn,
    "flash_attn_varlen_func": _varlen,
    "flash_attn_with_kvcache": _kvcache,
    "k_eq_v_attention": _k_eq_v,
}


# Reference ---------------------------------------------------------------------------------------------------------------


def _rows_of(cache: Tensor, made: Inputs, b: int, length: int) -> Tensor:
    """(1, length, Hkv, D): the rows of one request, wherever they lie."""
    if made.get("block_table") is not None:
        cache = cache[made["block_table"][b].long()].flatten(0, 1)[None]
        return cache[:, :length]
    if "cu_seqlens_k" in made:
        start = int(made["cu_seqlens_k"][b])
        return cache[None, start : start + length]
    entry = int(made["cache_batch_idx"][b]) if "cache_batch_idx" in made else b
    return cache[entry : entry + 1, :length]


def _decoded(case: AttentionCase, codes: Tensor, made: Inputs, b: int, length: int, exact: bool) -> Tensor:
    """(1, length, Hkv, D): the values that codes stand for, exactly or at the case's dtype."""
    scale = made["values_scale"]  # (Hkv,)
    if case.cache == "int8":
        scale = _rows_of(scale, made, b, length)  # (1, length, Hkv)
    wide: Tensor = codes.double() * scale.double().unsqueeze(-1)
    return wide if exact else wide.to(DTYPES[case.dtype])


def evaluate(case: AttentionCase, made: Inputs, exact: bool) -> Result:
    """Request by request, or part by part, through the reference, on the CPU."""
    if parts := case.parts():
        pieces = [_evaluate_request(case, made, part.request, exact, part) for part in parts]
        return torch.cat([out[0, :, 0] for out, _ in pieces]), torch.cat([lse[0, 0] for _, lse in pieces])
    pieces = [_evaluate_request(case, made, b, exact) for b in range(len(key_lengths(case)))]
    if case.op == "flash_attn_varlen_func":
        return torch.cat([out[0] for out, _ in pieces]), torch.cat([lse[0] for _, lse in pieces], dim=1)
    return torch.cat([out for out, _ in pieces]), torch.cat([lse for _, lse in pieces])


def _evaluate_request(case: AttentionCase, made: Inputs, b: int, exact: bool, part: Part | None = None) -> Result:
    """out (1, rows, heads, D) and lse (1, heads, rows) of one request, or of one head and some rows of it."""
    length = key_lengths(case)[b]
    if case.op == "flash_attn_varlen_func":
        q = made["q"][None, int(made["cu_seqlens_q"][b]) : int(made["cu_seqlens_q"][b + 1])]
    else:
        q = made["q"][b : b + 1]
    if case.op == "k_eq_v_attention":
        caches = [_rows_of(made["values"], made, b, length)]
        if case.cache:
            caches = [_decoded(case, caches[0], made, b, length, exact)]
    else:
        names = ("k_cache", "v_cache") if case.op == "flash_attn_with_kvcache" else ("k", "v")
        caches = [_rows_of(made[name], made, b, length - case.new) for name in names]
    if case.new:
        caches = [torch.cat((cache, made[name][b : b + 1]), dim=1) for cache, name in zip(caches, "kv", strict=True)]
    first = first_rows(case)[b]
    caches = [cache[:, first:] for cache in caches]
    if part is not None:
        # A causal row sees no later key: without the rows and keys behind it, it is aligned as before.
        hidden, kv_head = q.shape[1] - part.stop, part.head // (case.hq // case.hkv)
        q = q[:, part.start : part.stop, part.head : part.head + 1]
        caches = [cache[:, : length - hidden, kv_head : kv_head + 1] for cache in caches]
    q, caches = q.cpu(), [cache.cpu() for cache in caches]
    if case.op == "k_eq_v_attention":
        weight, frequency = made["k_norm_weight"].cpu(), made["inv_freq"].cpu()
        function = reference.k_eq_v_attention if exact else reference.plain_k_eq_v_attention
        result: Result = function(q, caches[0], weight, frequency, softmax_scale=case.scale)
        return result
    ids = made.get("block_ids")
    options: Any = {
        "softmax_scale": case.scale, "window_size": (case.left, case.right), "softcap": case.softcap,
        "block_ids": None if ids is None else ids[b : b + 1, first:length].cpu(),
        "block_rule": "forward" if case.free else "window",
    }  # fmt: skip
    result = (reference.flash_attention if exact else reference.plain_attention)(q, *caches, **options)
    return result
