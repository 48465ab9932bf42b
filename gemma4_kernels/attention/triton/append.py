"""New rows of keys and values into a cache: contiguous entries, chosen by index or not, or pages.

k, v            (B, ROWS, HKV, D)
k_cache, v_cache  (entries, S, HKV, D) or pages (P, PAGE_SIZE, HKV, D), changed in place
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gemma4_kernels.attention.triton.pieces import UNSPECIALISED
from gemma4_kernels.triton_common.launch import Launch


@triton.jit(do_not_specialize=UNSPECIALISED)
def append_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, lengths_ptr, entry_ptr, table_ptr,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_kce, stride_kcs, stride_kch, stride_vce, stride_vcs, stride_vch, stride_tb,
    num_rows, capacity, num_entries,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (B * ROWS, HKV). A row that has no place is not written: another request may own what lies there."""
    b = (tl.program_id(0) // num_rows).to(tl.int64)
    i = (tl.program_id(0) % num_rows).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    position = tl.load(lengths_ptr + b).to(tl.int64) + i
    if (position < 0) | (position >= capacity):
        return
    if PAGE_SIZE > 0:
        entry = tl.load(table_ptr + b * stride_tb + position // PAGE_SIZE).to(tl.int64)
        row = position % PAGE_SIZE
    else:
        entry = b
        if entry_ptr is not None:
            entry = tl.load(entry_ptr + b).to(tl.int64)
        row = position
    if (entry < 0) | (entry >= num_entries):
        return
    column = tl.arange(0, BLOCK_D)
    mask = column < HEAD_DIM
    k = tl.load(k_ptr + b * stride_kb + i * stride_ks + head * stride_kh + column, mask=mask)
    v = tl.load(v_ptr + b * stride_vb + i * stride_vs + head * stride_vh + column, mask=mask)
    tl.store(k_cache_ptr + entry * stride_kce + row * stride_kcs + head * stride_kch + column, k, mask=mask)
    tl.store(v_cache_ptr + entry * stride_vce + row * stride_vcs + head * stride_vch + column, v, mask=mask)


def plan(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, entry: Tensor | None, table: Tensor | None
) -> Launch:
    """The launch that writes rows of k and v, from `lengths` on."""
    batch, rows, heads, head_dim = k.shape
    arguments: dict[str, Tensor | int | None] = {
        "lengths_ptr": lengths, "entry_ptr": entry, "table_ptr": table, "num_rows": rows,
        "capacity": k_cache.shape[1] * (1 if table is None else table.shape[1]), "num_entries": k_cache.shape[0],
        "stride_tb": 0 if table is None else table.stride(0),
    }  # fmt: skip
    for name, letter, tensor in (("k", "b", k), ("v", "b", v), ("k_cache", "e", k_cache), ("v_cache", "e", v_cache)):
        short = name.replace("_cache", "c")
        arguments[f"{name}_ptr"] = tensor
        for dim, stride in zip((letter, "s", "h"), tensor.stride(), strict=False):
            arguments[f"stride_{short}{dim}"] = stride
    constants = {
        "HEAD_DIM": head_dim, "PAGE_SIZE": 0 if table is None else k_cache.shape[1],
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }  # fmt: skip
    return Launch(append_kernel, (batch * rows, heads), arguments, constants, num_warps=1)
