"""Other people's attention on the inputs of a case: what the same call costs without this package.

    sdpa            torch.nn.functional.scaled_dot_product_attention
    transformers    Gemma 4's eager attention, the code of transformers' own model
    flex_attention  torch.nn.attention.flex_attention, compiled; on CUDA devices
    split_kv        this package's own attention on keys and values stored side by side, for K-equals-V calls

A baseline is prepared outside the clock (masks, keys of a K-equals-V layer, which everyone else caches beside the values)
and then runs alone. It gives `out` and no lse. Where there is none the reason is a sentence.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gemma4_kernels import flash_attn_func, reference

Baseline = Callable[[], Tensor]

NAMES = ("sdpa", "transformers", "flex_attention", "split_kv")
# Both stand on whole masks, transformers on whole score matrices: 1 GiB of a 2-byte dtype at most.
MAX_SCORES = 1 << 29
# Above this head_dim, SDPA with enable_gqa takes the slowest of its paths; with heads repeated beforehand it does not.
GQA_HEAD_DIM = 256


def attention(op: str, made: dict[str, Any]) -> dict[str, Baseline | str]:
    """The baselines of one attention call: name -> ready to run, or why not; one that this kind of call has not is absent.

    Args:
        op: name of the public function.
        made: its keyword arguments. Keys and values are (B, Sk, Hkv, D).
    """
    reason = _beyond_the_baselines(op, made)
    if reason is not None:
        return dict.fromkeys(NAMES, reason)
    q = made["q"]
    if op == "k_eq_v_attention":
        v = made["values"]
        k = reference.keys_from_values(
            v, made["k_norm_weight"], made["inv_freq"], torch.arange(v.shape[1], device=v.device)
        )
        window, scale = (-1, 0), made["softmax_scale"]
    else:
        k, v, window, scale = made["k"], made["v"], made["window_size"], made["softmax_scale"]
    if q.shape[1] == 1 and window[1] == 0 and 0 <= window[0] < k.shape[1] - 1:
        # One row at the end of its window: the keys that it sees are a slice, and nobody would send a mask.
        k, v, window = k[:, -window[0] - 1 :], v[:, -window[0] - 1 :], (-1, 0)
    found: dict[str, Baseline | str] = {}
    if op == "k_eq_v_attention":
        found["split_kv"] = _split_kv(q, k, v, scale)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, S, D), as the others want it
    if q.device.type == "cuda":  # elsewhere its first call needs a C++ compiler
        found["flex_attention"] = _flex_attention(q, k, v, window, scale)
    found["sdpa"] = _sdpa(q, k, v, window, scale)
    found["transformers"] = _transformers(q, k, v, window, scale)
    return {name: found[name] for name in NAMES if name in found}


def _beyond_the_baselines(op: str, made: dict[str, Any]) -> str | None:
    if op not in ("flash_attn_func", "k_eq_v_attention"):
        return f"{op} has no counterpart there"
    if made.get("block_table") is not None:
        return "it reads no pages"
    if made.get("block_ids") is not None or made.get("softcap"):
        return "image blocks and softcap are not compared"
    lengths = made.get("cache_seqlens")
    if lengths is not None and bool((lengths != made["values"].shape[1]).any()):
        return "requests of different lengths are not compared"
    return None


def _mask(rows: int, keys: int, window: tuple[int, int], device: torch.device) -> Tensor | None:
    """(rows, keys) bool, True where a row sees a key, bottom-right aligned; None where every row sees every key."""
    left, right = window
    if (left < 0 or left >= keys - 1) and (right < 0 or rows == 1):
        return None
    token = torch.arange(keys - rows, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    seen = torch.ones((rows, keys), dtype=torch.bool, device=device)
    if left >= 0:
        seen &= key >= token - left
    if right >= 0:
        seen &= key <= token + right
    return seen


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], scale: float) -> Baseline | str:
    (_, heads, rows, dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    causal = rows == keys and window[1] == 0 and (window[0] < 0 or window[0] >= keys - 1)
    if not causal and rows * keys > MAX_SCORES:
        return f"its mask would hold {rows * keys:.1e} elements"
    mask = None if causal else _mask(rows, keys, window, q.device)
    # With a mask, CUDA's fast paths take no groups: left to the flag, SDPA would fall to its slowest one.
    grouped = heads != kv_heads and dim <= GQA_HEAD_DIM and (mask is None or q.device.type != "cuda")

    def run() -> Tensor:
        keys_, values = k, v
        if heads != kv_heads and not grouped:
            if kv_heads == 1:  # a view: one head read by all costs no memory
                keys_, values = (x.expand(-1, heads, -1, -1) for x in (k, v))
            else:
                keys_, values = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        out = functional.scaled_dot_product_attention(
            q, keys_, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    return run


def _split_kv(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Baseline:
    """q (B, Sq, Hq, D), k, v (B, Sk, Hkv, D): the same tokens from a cache of twice the bytes."""

    def run() -> Tensor:
        out = flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
        assert isinstance(out, Tensor)  # without return_lse
        return out

    return run


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], scale: float) -> Baseline:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, keys, (left, right) = q.shape[2], k.shape[2], window

    def seen(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        token = row + (keys - rows)
        inside = key >= token - left if left >= 0 else key >= 0
        return inside & (key <= token + right) if right >= 0 else inside

    mask = create_block_mask(seen, None, None, rows, keys, device=q.device)
    attend = torch.compile(flex_attention, dynamic=False)

    def run() -> Tensor:
        out: Tensor = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return run


def _transformers(q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], scale: float) -> Baseline | str:
    (batch, heads, rows, _), (kv_heads, keys) = q.shape, k.shape[1:3]
    if batch * heads * rows * keys > MAX_SCORES:
        return f"its score matrix would hold {batch * heads * rows * keys:.1e} elements"
    forward = _transformers_attention()
    if isinstance(forward, str):
        return forward
    seen = _mask(rows, keys, window, q.device)
    bias = None
    if seen is not None:
        bias = torch.zeros((1, 1, rows, keys), dtype=q.dtype, device=q.device)
        bias.masked_fill_(~seen, torch.finfo(q.dtype).min)
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, training=False, head_dim=q.shape[-1])

    def run() -> Tensor:
        out: Tensor = forward(module, q, k, v, bias, scaling=scale)[0]
        return out

    return run


def _transformers_attention() -> Callable[..., Any] | str:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    try:
        from transformers.models.gemma4 import modeling_gemma4

        forward: Callable[..., Any] = modeling_gemma4.eager_attention_forward
    except Exception as error:  # an older release, or one whose own dependencies are missing
        return f"transformers has no Gemma 4 attention here ({type(error).__name__})"
    return forward
