"""Every case an implementation must hold, as data.

A case's string is its identity: `parse(str(case)) == case`, and its inputs are drawn from a hash of it, so a case that fails
anywhere can be replayed anywhere from one line:

    flash_attn_func(b=1,sq=5,sk=1030,hq=16,hkv=8,d=256,dtype=bf16,left=1023,right=0)

A family adds its cases here and nothing else: a class with the methods of `Case`, and a line in `FAMILIES`. Tags: "quick"
and "full" for correctness, "bench" and "bench-quick" for what is worth timing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

import gemma4_kernels
from gemma4_kernels.bench import attention_work, baselines
from gemma4_kernels.bench import inputs as draw
from gemma4_kernels.bench.attention_calls import (
    CODES,
    DTYPES,
    INPUTS,
    Inputs,
    Result,
    evaluate,
    key_lengths,
    row_counts,
)
from gemma4_kernels.bench.case_strings import BENCH, BENCH_QUICK, EXCERPT_ABOVE, QUICK, CaseString, each_once
from gemma4_kernels.bench.linear_cases import LINEAR_OPS, LinearCase, linear_bench_cases, linear_cases
from gemma4_kernels.bench.verification_cases import CASES_OF as VERIFICATION
from gemma4_kernels.bench.verification_cases import verification_bench_cases, verification_cases
from gemma4_kernels.geometry import GEMMA4_12B

EXCERPT_ROWS = 16


class Case(Protocol):
    """What `validate` and `bench` ask of a case, whatever its family."""

    family: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]]
    """Names of the tensors that `run` returns."""

    @property
    def op(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def tags(self) -> frozenset[str]: ...
    @property
    def seed(self) -> int: ...
    @property
    def result_depends_on_the_noise(self) -> bool: ...
    def inputs(self, device: str | torch.device = "cpu") -> Inputs: ...
    def arguments(self, made: Inputs) -> dict[str, Any]: ...
    def run(self, made: Inputs) -> tuple[Tensor, ...]: ...
    def reference(self, made: Inputs) -> tuple[Tensor, ...]: ...
    def plain(self, made: Inputs) -> tuple[Tensor, ...]: ...
    def judged(self, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]: ...
    def changes(self, made: Inputs) -> Inputs: ...
    def baselines(self, made: Inputs) -> dict[str, baselines.Baseline | str]: ...
    @classmethod
    def refuse(cls, op: str, given: dict[str, Any]) -> None: ...
    def input_bytes(self) -> int: ...
    def bytes_moved(self) -> int: ...
    def operations(self) -> int: ...


_ALL = {"hq", "hkv", "d", "dtype", "scale"}
_MASKED = _ALL | {"left", "right", "softcap"}
FIELDS_OF: dict[str, set[str]] = {
    "flash_attn_func": _MASKED | {"b", "sq", "sk", "blocks", "free"},
    "flash_attn_varlen_func": _MASKED | {"lengths", "page"},
    "flash_attn_with_kvcache": _MASKED | {"b", "sq", "sk", "lengths", "page", "new", "blocks", "leftpad", "shuffled"},
    "k_eq_v_attention": _ALL | {"b", "sq", "sk", "lengths", "page", "cache"},
}
"""What each function's cases may set."""


class Part(NamedTuple):
    """Rows of one head of one request: a piece of a result that depends on nothing else in the call."""

    request: int
    head: int
    start: int
    stop: int


@dataclass(frozen=True)
class AttentionCase(CaseString):
    """One call of a public attention function. What is at its default is left out of the string."""

    family: ClassVar[str] = "attention"
    outputs: ClassVar[tuple[str, ...]] = ("out", "lse")

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
    """Image blocks "start-stop+start-stop", and "pad3" where the first 3 keys are padding; the same in every request, or one
    layout a request between slashes."""
    free: int = 0
    """1: tokens of a block see each other beyond the window (window_limits_blocks=False)."""
    lengths: str = ""
    """Keys of each request "7+130+1"; with flash_attn_varlen_func, query rows as "3:7+130:130+1:1"."""
    page: int = 0
    """Rows of a page; 0: contiguous."""
    new: int = 0
    """Rows appended by flash_attn_with_kvcache itself."""
    leftpad: str = ""
    """First row of each request in its cache, "3+0+7" (cache_leftpad)."""
    shuffled: int = 0
    """1: the cache has twice as many entries, and cache_batch_idx says which are used."""
    cache: str = ""
    """"fp8" or "int8": values of 8 bits."""
    tags: frozenset[str] = field(default=frozenset({"full"}), compare=False)

    @classmethod
    def refuse(cls, op: str, given: dict[str, Any]) -> None:
        """Raise ValueError unless the fields of a case string make a case of `op`."""
        limits = {"b": 1, "sq": 0, "sk": 0, "hq": 1, "hkv": 1, "d": 1, "left": -1, "right": -1, "page": 0, "new": 0}
        for name, least in limits.items():
            if given.get(name, least) < least:
                raise ValueError(f"parse: {name} must be at least {least}, got {given[name]}")
        for name in ("free", "shuffled"):
            if given.get(name, 0) not in (0, 1):
                raise ValueError(f"parse: {name} must be 0 or 1, got {given[name]}")
        if given.get("dtype", cls.dtype) not in DTYPES:
            raise ValueError(f"parse: dtype must be one of {', '.join(DTYPES)}, got {given['dtype']!r}")
        if given.get("cache", "") not in ("", *CODES):
            raise ValueError(f"parse: cache must be one of {', '.join(CODES)}, got {given['cache']!r}")
        if given.get("hq", cls.hq) % given.get("hkv", cls.hkv):
            raise ValueError("parse: hq must be a multiple of hkv")
        if useless := given.keys() - FIELDS_OF[op]:
            raise ValueError(f"parse: {op} has no use for {', '.join(sorted(useless))}")
        number = r"\d+:\d+" if op == "flash_attn_varlen_func" else r"\d+"
        layout = r"(pad\d+|\d+-\d+)"
        forms = {
            "lengths": rf"{number}(\+{number})*",
            "leftpad": r"\d+(\+\d+)*",
            "blocks": rf"{layout}([+/]{layout})*",
        }
        for name, form in forms.items():
            if name in given and not re.fullmatch(form, given[name]):
                raise ValueError(f"parse: {name} must look like {form}, got {given[name]!r}")
        if op == "flash_attn_varlen_func" and "lengths" not in given:
            raise ValueError(f"parse: {op} needs lengths")

    def inputs(self, device: str | torch.device = "cpu") -> Inputs:
        """Tensors and plain values by name, on a device; here the keyword arguments of the public function."""
        made = INPUTS[self.op](self, draw.generator(self.seed))
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}

    def arguments(self, made: Inputs) -> dict[str, Any]:
        """What `inputs` made, as keyword arguments of the public function."""
        return made

    def run(self, made: Inputs) -> Result:
        """The public function; the caller chooses the backend. out and lse."""
        result: Result = getattr(gemma4_kernels, self.op)(**made, return_lse=True)
        return result

    def reference(self, made: Inputs) -> Result:
        """The same in fp64; of a case with `parts`, those only."""
        return evaluate(self, made, exact=True)

    def plain(self, made: Inputs) -> Result:
        """The same in plain PyTorch at the case's dtype, as the rule of `errors` wants it."""
        return evaluate(self, made, exact=False)

    def parts(self) -> tuple[Part, ...]:
        """The excerpt on which a large case is held against the reference; empty: on all of it.

        The first and the last request, the first and the last head, rows at both ends and in the middle.
        """
        causal = (self.right == 0 and not self.blocks) or self.op == "k_eq_v_attention"
        if self.operations() <= EXCERPT_ABOVE or not causal or self.op == "flash_attn_varlen_func":
            return ()
        starts = {0, (self.sq - EXCERPT_ROWS) // 2, self.sq - EXCERPT_ROWS} if self.sq > EXCERPT_ROWS else {0}
        requests = len(key_lengths(self))
        where = {(0, 0), (requests - 1, self.hq - 1)}
        return tuple(
            Part(request, head, start, min(self.sq, start + EXCERPT_ROWS))
            for request, head in sorted(where)
            for start in sorted(starts)
        )

    def judged(self, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What of `run`'s result `reference` and `plain` give: all of it, or (rows, D) and (rows,) of the parts.

        A result without an lse, such as a baseline's, stays without one.
        """
        parts = self.parts()
        if not parts:
            return result
        out, *lse = result
        return (
            torch.cat([out[b, start:stop, head] for b, head, start, stop in parts]),
            *(torch.cat([sums[b, head, start:stop] for b, head, start, stop in parts]) for sums in lse),
        )

    def changes(self, made: Inputs) -> Inputs:
        """The inputs that the call changes, as it must leave them: caches with the new rows in place."""
        if not self.new:
            return {}
        changed = {name: made[name].clone() for name in ("k_cache", "v_cache")}
        for b, length in enumerate(key_lengths(self)):
            for step in range(self.new):
                row = length - self.new + step
                entry, offset = int(made["cache_batch_idx"][b]) if self.shuffled else b, row
                if self.page:
                    entry, offset = int(made["block_table"][b, row // self.page]), row % self.page
                changed["k_cache"][entry, offset] = made["k"][b, step]
                changed["v_cache"][entry, offset] = made["v"][b, step]
        return changed

    def baselines(self, made: Inputs) -> dict[str, baselines.Baseline | str]:
        """Other people's implementations of the same call, ready to run, or why there is none."""
        return baselines.attention(self.op, made)

    def requests(self) -> list[attention_work.Request]:
        rows = row_counts(self) if self.op == "flash_attn_varlen_func" else [self.sq] * len(key_lengths(self))
        return [attention_work.Request(*pair) for pair in zip(rows, key_lengths(self), strict=True)]

    def input_bytes(self) -> int:
        """Bytes of the tensors that `inputs` makes, near enough to know whether they fit."""
        requests = self.requests()
        keys = len(requests) * max(request.keys for request in requests) * (2 if self.page else 1)
        rows = sum(request.rows for request in requests)
        return keys * self._key_bytes() + DTYPES[self.dtype].itemsize * self.d * rows * self.hq

    def bytes_moved(self) -> int:
        """Fewest bytes through the device's memory: see `attention_work.bytes_moved`."""
        left, right = self._window()
        return attention_work.bytes_moved(
            self.requests(), left, right, query_heads=self.hq, head_dim=self.d,
            itemsize=DTYPES[self.dtype].itemsize, key_bytes=self._key_bytes(), new_rows=self.new,
        )  # fmt: skip

    def _key_bytes(self) -> int:
        """Of a key's rows in all caches: values alone where K is a function of V, with the scale of a row where it has one."""
        if self.op != "k_eq_v_attention":
            return 2 * self.hkv * self.d * DTYPES[self.dtype].itemsize
        itemsize = CODES[self.cache].itemsize if self.cache else DTYPES[self.dtype].itemsize
        return self.hkv * (self.d * itemsize + (4 if self.cache == "int8" else 0))

    def operations(self) -> int:
        """Multiplications and additions of both products: see `attention_work.operations`."""
        left, right = self._window()
        return attention_work.operations(self.requests(), left, right, self.hq, self.d)

    def _window(self) -> tuple[int, int]:
        return (-1, 0) if self.op == "k_eq_v_attention" else (self.left, self.right)


def parse(text: str) -> Any:
    """The case of a string that `str(case)` gave. Raises ValueError where the string is not of that form."""
    match = re.fullmatch(r"\s*(\w+)\(([^()]*)\)\s*", text)
    if match is None or match[1] not in CASE_TYPES:
        raise ValueError(f"parse: a case looks like {AttentionCase('flash_attn_func', sq=5, sk=9)}, got {text!r}")
    case_type = CASE_TYPES[match[1]]
    kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(case_type) if f.name not in ("op", "tags")}
    given: dict[str, Any] = {}
    for part in filter(None, match[2].split(",")):
        name, _, value = part.partition("=")
        if name not in kinds:
            raise ValueError(f"parse: a case has no field {name!r}; fields are {', '.join(kinds)}")
        given[name] = kinds[name](value)
    case_type.refuse(match[1], given)
    case = case_type(match[1], **given)
    return next((known for known in all_cases() if str(known) == str(case)), case)


# The list ----------------------------------------------------------------------------------------------------------------

_SLIDING, _FULL = GEMMA4_12B.sliding, GEMMA4_12B.full
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
        yield _sliding("flash_attn_func", sq=130, sk=130, dtype=dtype, tags=QUICK)
        yield _sliding("flash_attn_func", sq=5, sk=1030, dtype=dtype, tags=QUICK)
        yield _full("flash_attn_func", sq=130, sk=130, dtype=dtype, tags=QUICK)
        yield _full("flash_attn_func", sq=5, sk=1030, dtype=dtype, tags=QUICK)
        yield _full("k_eq_v_attention", sq=130, sk=130, dtype=dtype, tags=QUICK)
        yield _full("k_eq_v_attention", sq=5, sk=1030, dtype=dtype, tags=QUICK)
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
    # One key short of a tile's edge on the right, and a tile that the left edge cuts for the last rows only; in fp32, where a
    # key too many shows.
    yield AttentionCase("flash_attn_func", sq=2, sk=64, hq=4, hkv=2, d=64, right=0, dtype="fp32", tags=QUICK)
    yield AttentionCase("flash_attn_func", sq=5, sk=130, hq=4, hkv=2, d=64, left=63, right=0, dtype="fp32", tags=QUICK)
    # A block that ends more than a thousand keys before the last one.
    yield AttentionCase("flash_attn_func", sq=1300, sk=1300, hq=1, hkv=1, d=16, left=15, right=0, blocks="5-600")
    # More query rows than keys: the first rows see nothing.
    yield AttentionCase("flash_attn_func", sq=9, sk=4, hq=4, hkv=2, d=64, right=0, tags=QUICK)
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
    yield _sliding("flash_attn_func", b=2, sq=700, sk=700, blocks="100-380+400-680", hq=2, hkv=1, tags=QUICK)
    # Requests of different lengths; pages in scrambled order with a partial last one; rows appended by the call.
    ragged = "1:1+7:7+130:130+5:40+1:70"
    for page in (0, 16, 32, 64):
        tags = QUICK if page == 16 else frozenset({"full"})
        yield _sliding("flash_attn_varlen_func", lengths=ragged, left=31, page=page, tags=tags)
        yield _full("flash_attn_varlen_func", lengths=ragged, page=page)
        yield _sliding("flash_attn_with_kvcache", sq=1, lengths="1+7+130+40", left=31, page=page, tags=tags)
        yield _sliding("flash_attn_with_kvcache", sq=5, new=5, lengths="5+7+130+40", left=31, page=page, tags=tags)
        yield _full("flash_attn_with_kvcache", sq=5, new=5, lengths="5+7+130+40", page=page)
        yield _full("k_eq_v_attention", sq=1, lengths="1+7+130+40", page=page, tags=tags)
        yield _full("k_eq_v_attention", sq=5, lengths="5+7+130+600", page=page)
        for codes in CODES:
            yield _full("k_eq_v_attention", sq=1, lengths="1+7+130+40", page=page, cache=codes, tags=tags)
            yield _full("k_eq_v_attention", sq=5, lengths="5+7+130", page=page, cache=codes, dtype="fp16")
            yield AttentionCase("k_eq_v_attention", sq=3, lengths="70+3", hq=4, hkv=2, d=128, page=page, cache=codes)
    yield AttentionCase("flash_attn_with_kvcache", sq=3, lengths="0+1+2", hq=4, hkv=2, d=64, right=0)
    # One layout of blocks a request; blocks that the window does not limit, on both kinds of layers.
    small: Any = {"hq": 4, "hkv": 2, "d": 64, "right": 0}
    layouts = "5-20+60-140/pad7+20-60/0-160"
    for rows in (12, 160):
        for free in (0, 1):
            yield AttentionCase("flash_attn_func", b=3, sq=rows, sk=160, left=31, blocks=layouts, free=free, **small)
        yield AttentionCase("flash_attn_func", b=3, sq=rows, sk=160, blocks=layouts, **small)
    # Caches as runtimes keep them: entries in any order, rows that start later, blocks in pages, appends to all of these.
    for rows in (1, 5, 20):
        cache: Any = {"sq": rows, "lengths": "20+130+41", "left": 31, **small}
        for new in (0, min(rows, 5)):
            yield AttentionCase("flash_attn_with_kvcache", shuffled=1, new=new, **cache)
            yield AttentionCase("flash_attn_with_kvcache", leftpad="3+0+30", new=new, **cache)
            yield AttentionCase("flash_attn_with_kvcache", leftpad="3+0+30", shuffled=1, new=new, **cache)
            for page in (0, 16):
                blocks = "2-18/pad7+60-120/10-41"
                yield AttentionCase("flash_attn_with_kvcache", blocks=blocks, page=page, new=new, **cache)


def _attention_bench() -> Iterator[AttentionCase]:
    """What a 12B does in service: prefill, decode, verification of four drafts; both kinds of layers."""
    for tokens in (512, 1024, 2048, 4096, 8192, 16384, 32768):
        tags = BENCH_QUICK if tokens == 512 else BENCH
        yield _sliding("flash_attn_func", sq=tokens, sk=tokens, tags=tags)
        yield _full("flash_attn_func", sq=tokens, sk=tokens, tags=BENCH)
        yield _full("k_eq_v_attention", sq=tokens, sk=tokens, tags=tags)
    for rows in (1, 5):
        for b in (1, 4, 16):
            # A sliding layer reads its window and no more: 32K of cache must cost what 1K costs.
            for sk in (1024, 32768):
                tags = BENCH_QUICK if sk == 1024 and (b == 1 or (b, rows) == (4, 1)) else BENCH
                yield _sliding("flash_attn_func", b=b, sq=rows, sk=sk, tags=tags)
            for sk in (1024, 4096, 16384, 65536, 262144):
                tags = BENCH_QUICK if sk == 4096 and b == 1 else BENCH
                yield _full("flash_attn_func", b=b, sq=rows, sk=sk, tags=tags)
                yield _full("k_eq_v_attention", b=b, sq=rows, sk=sk, tags=tags)
                if b == 1 and sk >= 16384:
                    yield _full("k_eq_v_attention", sq=rows, sk=sk, cache="fp8", tags=BENCH)
                    yield _full("k_eq_v_attention", sq=rows, sk=sk, cache="int8", tags=BENCH)
    # Pages, as servers keep them.
    for rows in (1, 5):
        for page in (16, 64):
            lengths = "+".join(["16384"] * 4)
            yield _full("flash_attn_with_kvcache", sq=rows, lengths=lengths, page=page, tags=BENCH)
            yield _full("k_eq_v_attention", sq=rows, lengths=lengths, page=page, tags=BENCH)
            yield _sliding("flash_attn_with_kvcache", sq=rows, lengths="+".join(["2048"] * 4), page=page, tags=BENCH)


@lru_cache
def attention_cases() -> tuple[AttentionCase, ...]:
    """Attention cases for correctness, each once."""
    return each_once(_attention())


@lru_cache
def attention_bench_cases() -> tuple[AttentionCase, ...]:
    return each_once(_attention_bench())


# family -> its lists; and the class that a case string's op belongs to.
FAMILIES: dict[str, tuple[Callable[[], tuple[Case, ...]], ...]] = {
    "attention": (attention_cases, attention_bench_cases),
    "linear": (linear_cases, linear_bench_cases),
    "verification": (verification_cases, verification_bench_cases),
}
CASE_TYPES: dict[str, Any] = {
    **dict.fromkeys(INPUTS, AttentionCase), **dict.fromkeys(LINEAR_OPS, LinearCase), **VERIFICATION
}  # fmt: skip


def all_cases() -> list[Case]:
    """Every case of every family once, in the order of the lists; one that stands in two lists has the tags of both."""
    merged: dict[str, Any] = {}
    for case in (case for lists in FAMILIES.values() for cases in lists for case in cases()):
        known = merged.get(str(case))
        merged[str(case)] = case if known is None else replace(known, tags=known.tags | case.tags)
    return list(merged.values())


def select(cases: Iterable[Case], tag: str) -> list[Case]:
    return [case for case in cases if tag in case.tags]
