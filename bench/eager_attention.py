"""The eager backend against PyTorch's own attention, on this CPU, in pairs in one run.

    python -m gemma4_kernels.bench.eager_attention [--pairs N]

CPU timings are noisy; each pair is taken back to back, and the median of the ratios is what counts. For decoding, SDPA is
given its best layout as well: all query heads of the one KV head as rows of one head, which its GQA flag does not do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from gemma4_kernels import flash_attn_func, k_eq_v_attention, use_backend
from gemma4_kernels.bench import inputs as draw
from gemma4_kernels.geometry import GEMMA4_12B

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description="Eager attention against scaled_dot_product_attention on this CPU.")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of timings for each comparison (default 5)")
    pairs = parser.parse_args().pairs
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, {pairs} pairs, median")
    with torch.inference_mode(), use_backend("eager"):
        sliding_prefill(pairs)
        full_decode(pairs)


def sliding_prefill(pairs: int, keys: int = 8192) -> None:
    """A sliding layer of the 12B over a prompt, against SDPA with the mask that it needs."""
    layer = GEMMA4_12B.sliding
    assert layer.window is not None
    rng = draw.generator(0)
    q = draw.queries((1, keys, layer.num_heads, layer.head_dim), rng)
    k = draw.keys((1, keys, layer.num_kv_heads, layer.head_dim), rng)
    v = draw.values((1, keys, layer.num_kv_heads, layer.head_dim), rng)
    token = torch.arange(keys)
    mask = (token <= token[:, None]) & (token > token[:, None] - layer.window)  # (S, S)
    sdpa_q, sdpa_k, sdpa_v = (x.transpose(1, 2) for x in (q, k, v))  # (1, heads, S, D)

    def ours(size: int = keys) -> torch.Tensor:
        return _out(flash_attn_func(q[:, :size], k[:, :size], v[:, :size], 1.0, True, layer.window_size))

    def theirs() -> torch.Tensor:
        return scaled_dot_product_attention(sdpa_q, sdpa_k, sdpa_v, attn_mask=mask, scale=1.0, enable_gqa=True)

    print(
        f"\nSliding layer, {layer.num_heads} x {layer.head_dim} over {layer.num_kv_heads}, window {layer.window}, S = {keys}"
    )
    compare("SDPA with the mask", ours, theirs, pairs)
    for size in (keys // 4, keys):
        extra = peak_bytes(partial(ours, size))
        print(f"  memory beyond the output at S = {size}: {extra / MIB:.1f} MiB")


def full_decode(pairs: int, keys: int = 32768) -> None:
    """One row over the cache of a full layer: values alone, against SDPA over separate keys and values."""
    layer = GEMMA4_12B.full
    rng = draw.generator(1)
    q = draw.queries((1, 1, layer.num_heads, layer.head_dim), rng)
    values = draw.values((1, keys, 1, layer.head_dim), rng)
    weight, inv_freq = draw.k_norm_weight(layer.head_dim, rng), draw.inv_freq(layer.head_dim)
    k, v = draw.keys((1, 1, keys, layer.head_dim), rng), draw.values((1, 1, keys, layer.head_dim), rng)

    def ours() -> torch.Tensor:
        return _out(k_eq_v_attention(q, values, weight, inv_freq))

    print(f"\nFull layer, one row, {layer.num_heads} x {layer.head_dim} over 1, {keys} cached tokens")
    print(f"  cache: {values.nbytes / MIB:.0f} MiB of values alone, {(k.nbytes + v.nbytes) / MIB:.0f} MiB of both")
    grouped = q.transpose(1, 2)  # (1, Hq, 1, D)
    compare(
        "SDPA with enable_gqa",
        ours,
        lambda: scaled_dot_product_attention(grouped, k, v, scale=1.0, enable_gqa=True),
        pairs,
    )
    compare("SDPA, heads as rows", ours, lambda: scaled_dot_product_attention(q, k, v, scale=1.0), 3 * pairs)


def compare(name: str, ours: Callable[[], torch.Tensor], theirs: Callable[[], torch.Tensor], pairs: int) -> None:
    ours(), theirs()  # first calls allocate and start threads
    times = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    ratio = statistics.median(other / own for own, other in times)
    own, other = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    print(f"  ours {own:.1f} ms, {name} {other:.1f} ms: {ratio:.2f}x as fast")


def _out(result: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    assert isinstance(result, torch.Tensor)  # without return_lse
    return result


def seconds(call: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_bytes(call: Callable[[], torch.Tensor]) -> int:
    """Most bytes that were allocated at one time during a call, without its result, from the profiler's record."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = call()
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak - result.nbytes


if __name__ == "__main__":
    main()
