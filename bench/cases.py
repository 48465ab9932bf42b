"""Every case an implementation must hold, as data.

A case's string is its identity: `parse(str(case)) == case`, and its inputs are drawn from a hash of it, so a case that fails
anywhere can be replayed anywhere from one line:

    flash_attn_func(b=1,sq=5,sk=1030,hq=16,hkv=8,d=256,dtype=bf16,left=1023,right=0)

A family adds its cases here and nothing else.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import gemma4_kernels
from gemma4_kernels import reference
from gemma4_kernels.bench import inputs as draw
from gemma4_kernels.geometry import GEMMA4_12B

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Inputs = dict[str, Any]
Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionCase:
    """One call of a public attention function. What is at its default is left out of the string."""

    op: str
    b: int = 1
    sq: int = 1
    sk: int = 1
    hq: int = 16
    hkv: int = 8
    d: int = 256
    dtype: str = "bf16"
    left: int = -1
    right: int = -1
    scale: float = 1.0
    softcap: float = 0.0
    blocks: str = ""
    """Image blocks "start-stop+start-stop", the same in every request; "pad3" in front makes the first 3 keys padding."""
    lengths: str = ""
    """Keys of each request "7+130+1"; with flash_attn_varlen_func, query rows as "3:7+130:130+1:1"."""
    page: int = 0
    """Rows of a page; 0: contiguous."""
    new: int = 0
    """Rows appended by flash_attn_with_kvcache itself."""
    tags: frozenset[str] = frozenset({"full"})

    def __str__(self) -> str:
        shown = [f.name for f in fields(self) if f.name not in ("op", "tags") and getattr(self, f.name) != f.default]
        return f"{self.op}({','.join(f'{name}={getattr(self, name)}' for name in shown)})"

    @property
    def seed(self) -> int:
        return zlib.crc32(str(self).encode())

    def inputs(self, device: str | torch.device = "cpu") -> Inputs:
        """Keyword arguments of the public function, on a device."""
        made = _INPUTS[self.op](self, draw.generator(self.seed))
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}

    def run(self, made: Inputs) -> Result:
        """The public function; the caller chooses the backend. out and lse."""
        result: Result = getattr(gemma4_kernels, self.op)(**made, return_lse=True)
        return result

    def reference(self, made: Inputs) -> Result:
        """The same in fp64."""
        return _evaluate(self, made, exact=True)

    def plain(self, made: Inputs) -> Result:
        """The same in plain PyTorch at the case's dtype, as the rule of `errors` wants it."""
        return _evaluate(self, made, exact=False)


def parse(text: str) -> AttentionCase:
    """The case of a string that `str(case)` gave. Raises ValueError where the string is not of that form."""
    match = re.fullmatch(r"\s*(\w+)\(([^()]*)\)\s*", text)
    if match is None or match[1] not in _INPUTS:
        raise ValueError(f"parse: a case looks like {AttentionCase('flash_attn_func', sq=5, sk=9)}, got {text!r}")
    kinds = {f.name: type(f.default) for f in fields(AttentionCase) if f.name not in ("op", "tags")}
    given: dict[str, Any] = {}
    for part in filter(None, match[2].split(",")):
        name, _, value = part.partition("=")
        if name not in kinds:
            raise ValueError(f"parse: a case has no field {name!r}; fields are {', '.join(kinds)}")
        given[name] = kinds[name](value)
    case = AttentionCase(match[1], **given)
    return next((known for known in attention_cases() if str(known) == str(case)), case)


# Inputs ------------------------------------------------------------------------------------------------------------------


def _key_lengths(case: AttentionCase) -> list[int]:
    return [int(part.split(":")[-1]) for part in case.lengths.split("+")] if case.lengths else [case.sk] * case.b


def _row_counts(case: AttentionCase) -> list[int]:
    return [int(part.split(":")[0]) for part in case.lengths.split("+")]


def _block_ids(case: AttentionCase) -> Tensor | None:
    if not case.blocks:
        return None
    ids = torch.full((case.b, case.sk), -1, dtype=torch.int32)
    for number, part in enumerate(case.blocks.split("+")):
        if part.startswith("pad"):
            ids[:, : int(part[3:])] = -2
        else:
            start, stop = part.split("-")
            ids[:, int(start) : int(stop)] = number
    return ids


def _common(case: AttentionCase) -> Inputs:
    return {"softmax_scale": case.scale, "window_size": (case.left, case.right), "softcap": case.softcap}


def _flash_attn(case: AttentionCase, rng: torch.Generator) -> Inputs:
    dtype = DTYPES[case.dtype]
    return {
        "q": draw.queries((case.b, case.sq, case.hq, case.d), rng).to(dtype),
        "k": draw.keys((case.b, case.sk, case.hkv, case.d), rng).to(dtype),
        "v": draw.values((case.b, case.sk, case.hkv, case.d), rng).to(dtype),
        "block_ids": _block_ids(case),
        **_common(case),
    }


def _varlen(case: AttentionCase, rng: torch.Generator) -> Inputs:
    dtype = DTYPES[case.dtype]
    rows, lengths = _row_counts(case), _key_lengths(case)
    made = {
        "q": draw.queries((sum(rows), case.hq, case.d), rng).to(dtype),
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
        made["k"] = draw.keys((sum(lengths), case.hkv, case.d), rng).to(dtype)
        made["v"] = draw.values((sum(lengths), case.hkv, case.d), rng).to(dtype)
    return made


def _padded_caches(case: AttentionCase, lengths: list[int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """k and v (B, longest, Hkv, D); rows beyond a request's length hold NaN."""
    shape = (len(lengths), max(lengths), case.hkv, case.d)
    k, v = draw.keys(shape, rng).to(DTYPES[case.dtype]), draw.values(shape, rng).to(DTYPES[case.dtype])
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = float("nan"), float("nan")
    return k, v


def _kvcache(case: AttentionCase, rng: torch.Generator) -> Inputs:
    dtype = DTYPES[case.dtype]
    lengths = _key_lengths(case)
    made: Inputs = {
        "q": draw.queries((len(lengths), case.sq, case.hq, case.d), rng).to(dtype),
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
    if case.page:
        (k, made["block_table"]), (v, _) = (
            draw.scattered_pages(cache, case.page, draw.generator(case.seed)) for cache in (k, v)
        )
    return {**made, "k_cache": k, "v_cache": v}


def _k_eq_v(case: AttentionCase, rng: torch.Generator) -> Inputs:
    dtype = DTYPES[case.dtype]
    lengths = _key_lengths(case)
    made: Inputs = {
        "q": draw.queries((len(lengths), case.sq, case.hq, case.d), rng).to(dtype),
        "k_norm_weight": draw.k_norm_weight(case.d, rng).to(dtype),
        "inv_freq": draw.inv_freq(case.d),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
        "softmax_scale": case.scale,
    }
    values = draw.values((len(lengths), max(lengths), case.hkv, case.d), rng).to(dtype)
    for b, length in enumerate(lengths):
        values[b, length:] = float("nan")
    if case.page:
        values, made["block_table"] = draw.scattered_pages(values, case.page, rng)
    return {**made, "values": values}


_INPUTS = {
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
    return cache[b : b + 1, :length]


def _evaluate(case: AttentionCase, made: Inputs, exact: bool) -> Result:
    """Request by request through the reference, on the CPU."""
    made = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in made.items()}
    outs, lses = [], []
    for b, length in enumerate(_key_lengths(case)):
        q = made["q"][b : b + 1]
        if case.op == "flash_attn_varlen_func":
            q = made["q"][None, int(made["cu_seqlens_q"][b]) : int(made["cu_seqlens_q"][b + 1])]
        if case.op == "k_eq_v_attention":
            arguments = (q, _rows_of(made["values"], made, b, length), made["k_norm_weight"], made["inv_freq"])
            if exact:
                out, lse = reference.k_eq_v_attention(*arguments, softmax_scale=case.scale)
            else:
                out, lse = reference.plain_k_eq_v_attention(*arguments, softmax_scale=case.scale)
        else:
            names = ("k_cache", "v_cache") if case.op == "flash_attn_with_kvcache" else ("k", "v")
            k, v = (_rows_of(made[name], made, b, length - case.new) for name in names)
            if case.new:
                k, v = torch.cat((k, made["k"][b : b + 1]), dim=1), torch.cat((v, made["v"][b : b + 1]), dim=1)
            ids = made.get("block_ids")
            options: Any = {
                "softmax_scale": case.scale, "window_size": (case.left, case.right), "softcap": case.softcap,
                "block_ids": None if ids is None else ids[b : b + 1],
            }  # fmt: skip
            function = reference.flash_attention if exact else reference.plain_attention
            out, lse = function(q, k, v, **options)
        outs.append(out)
        lses.append(lse)
    if case.op == "flash_attn_varlen_func":
        return torch.cat(outs, dim=1)[0], torch.cat(lses, dim=2)[0]
    return torch.cat(outs), torch.cat(lses)


# The list ----------------------------------------------------------------------------------------------------------------

_SLIDING, _FULL = GEMMA4_12B.sliding, GEMMA4_12B.full
_QUICK = frozenset({"quick", "full"})
# Around tile edges, and around the sliding window.
_LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 130)
_WINDOW_LENGTHS = (1022, 1023, 1024, 1025, 1030)


def _sliding(op: str, **changes: Any) -> AttentionCase:
    base = AttentionCase(op, hq=_SLIDING.num_heads, hkv=_SLIDING.num_kv_heads, d=_SLIDING.head_dim, left=1023, right=0)
    return replace(base, **changes)


def _full(op: str, **changes: Any) -> AttentionCase:
    base = AttentionCase(op, hq=_FULL.num_heads, hkv=_FULL.num_kv_heads, d=_FULL.head_dim)
    if op != "k_eq_v_attention":
        base = replace(base, right=0)
    return replace(base, **changes)


def _attention() -> Iterator[AttentionCase]:
    # Both kinds of layers of the 12B, prefill and decode, every dtype.
    for dtype in ("bf16", "fp16", "fp32"):
        yield _sliding("flash_attn_func", sq=130, sk=130, dtype=dtype, tags=_QUICK)
        yield _sliding("flash_attn_func", sq=5, sk=1030, dtype=dtype, tags=_QUICK)
        yield _full("flash_attn_func", sq=130, sk=130, dtype=dtype, tags=_QUICK)
        yield _full("flash_attn_func", sq=5, sk=1030, dtype=dtype, tags=_QUICK)
        yield _full("k_eq_v_attention", sq=130, sk=130, dtype=dtype, tags=_QUICK)
        yield _full("k_eq_v_attention", sq=5, sk=1030, dtype=dtype, tags=_QUICK)
    # Lengths around tile edges, few and many rows, aligned at the bottom right.
    for sk in _LENGTHS:
        yield _sliding("flash_attn_func", sq=sk, sk=sk, left=31)
        yield _full("k_eq_v_attention", sq=sk, sk=sk)
        yield _full("k_eq_v_attention", sq=1, sk=sk)
        yield _sliding("flash_attn_func", sq=min(sk, 3), sk=sk, left=31)
    for sk in _WINDOW_LENGTHS:
        yield _sliding("flash_attn_func", sq=1, sk=sk)
        yield _sliding("flash_attn_func", sq=40, sk=sk)
        yield _full("k_eq_v_attention", sq=5, sk=sk)
    # More query rows than keys: the first rows see nothing.
    yield AttentionCase("flash_attn_func", sq=9, sk=4, hq=4, hkv=2, d=64, right=0, tags=_QUICK)
    yield AttentionCase("flash_attn_func", sq=40, sk=20, hq=4, hkv=2, d=64, right=0)
    yield AttentionCase("flash_attn_func", sq=3, sk=0, hq=4, hkv=2, d=64)
    yield _full("k_eq_v_attention", sq=9, sk=4)
    # Head dims, groups, windows, no mask at all.
    for d in (64, 80, 128, 192, 256, 320, 512):
        yield AttentionCase("flash_attn_func", sq=33, sk=65, hq=4, hkv=2, d=d, scale=d**-0.5)
    for hq, hkv in ((4, 4), (8, 1), (16, 2), (32, 4)):
        yield AttentionCase("flash_attn_func", b=2, sq=20, sk=50, hq=hq, hkv=hkv, d=64, right=0)
        yield AttentionCase("k_eq_v_attention", b=2, sq=20, sk=50, hq=hq, hkv=hkv, d=128)
    for left, right in ((-1, 7), (7, -1), (7, 7), (0, 0), (5, 0)):
        yield AttentionCase("flash_attn_func", sq=70, sk=90, hq=4, hkv=2, d=64, left=left, right=right)
    yield AttentionCase("flash_attn_func", sq=20, sk=50, hq=4, hkv=2, d=64, right=0, softcap=5.0)
    # Image blocks: across tile edges, across the window's edge, longer than the window, at the end; padding in front.
    for blocks in ("5-20", "5-20+20-40+90-130", "60-140", "130-160", "pad7+20-60", "pad40"):
        yield _sliding("flash_attn_func", sq=160, sk=160, left=31, blocks=blocks, hq=4, hkv=2, d=64)
        yield _sliding("flash_attn_func", sq=12, sk=160, left=31, blocks=blocks, hq=4, hkv=2, d=64)
    yield _sliding("flash_attn_func", b=2, sq=700, sk=700, blocks="100-380+400-680", hq=2, hkv=1, tags=_QUICK)
    # Requests of different lengths; pages in scrambled order with a partial last one; rows appended by the call.
    ragged = "1:1+7:7+130:130+5:40+1:70"
    for page in (0, 16, 32, 64):
        tags = _QUICK if page == 16 else frozenset({"full"})
        yield _sliding("flash_attn_varlen_func", lengths=ragged, left=31, page=page, tags=tags)
        yield _full("flash_attn_varlen_func", lengths=ragged, page=page)
        yield _sliding("flash_attn_with_kvcache", sq=1, lengths="1+7+130+40", left=31, page=page, tags=tags)
        yield _sliding("flash_attn_with_kvcache", sq=5, new=5, lengths="5+7+130+40", left=31, page=page, tags=tags)
        yield _full("flash_attn_with_kvcache", sq=5, new=5, lengths="5+7+130+40", page=page)
        yield _full("k_eq_v_attention", sq=1, lengths="1+7+130+40", page=page, tags=tags)
        yield _full("k_eq_v_attention", sq=5, lengths="5+7+130+600", page=page)
    yield AttentionCase("flash_attn_with_kvcache", sq=3, lengths="0+1+2", hq=4, hkv=2, d=64, right=0)


@lru_cache
def attention_cases() -> tuple[AttentionCase, ...]:
    """All attention cases, each once."""
    return tuple({str(case): case for case in _attention()}.values())


def select(cases: Iterable[AttentionCase], tag: str) -> list[AttentionCase]:
    return [case for case in cases if tag in case.tags]
