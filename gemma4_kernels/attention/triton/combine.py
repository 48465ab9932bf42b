"""The parts that the splits of one row leave, and their sum.

    partial      (B, HQ, ROWS, SLOTS, D) fp32: softmax(...) @ v over one chunk of the row's keys
    partial_lse  (B, HQ, ROWS, SLOTS) fp32: log2 of the sum of exp2 of its scores

A row's chunks lie in its slots from 0 on, whatever chunks other rows have. They are added in that order, SLOT_BLOCK at a
time, so that the sum of a row depends on its own chunks alone. Slots that a row has no chunk for are never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_kernels.attention.triton import tables
from gemma4_kernels.attention.triton.call import AttentionCall, Card
from gemma4_kernels.attention.triton.launch import Launch, dot_dtype
from gemma4_kernels.attention.triton.pieces import LN_2, UNSPECIALISED, chunks_of, request_of, rounded
from gemma4_kernels.attention.triton.tables import Config

SLOT_BLOCK = 8
COLUMN_BLOCK = 128


@triton.jit
def part_of(b, kv_head, packed, slot, num_rows, num_slots, GROUP: tl.constexpr):
    """(M,) int64: the index of a packed row's part, in the grid of a kernel whose second axis is the KV heads."""
    head = kv_head * GROUP + packed % GROUP
    heads = tl.num_programs(1) * GROUP
    return ((b.to(tl.int64) * heads + head) * num_rows + packed // GROUP) * num_slots + slot


@triton.jit(do_not_specialize=UNSPECIALISED)
def combine_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, lengths_ptr, first_ptr, entry_ptr,
    stride_ob, stride_os, stride_oh, stride_lb, stride_lh,
    num_rows, num_slots, capacity, total_rows, total_keys, num_entries, left, right,
    HEAD_DIM: tl.constexpr, PAGED: tl.constexpr, BLOCKS: tl.constexpr, FREE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, MIN_CHUNK: tl.constexpr, SLOT_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (B * ROWS, HQ, column blocks). The chunks of a row are found again as `decode_kernel` found them."""
    b = tl.program_id(0) // num_rows
    i = tl.program_id(0) % num_rows
    head = tl.program_id(1)
    column = tl.program_id(2) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    first_row, rows, _first_key, start, end, _entry = request_of(
        b, num_rows, capacity, total_rows, total_keys, num_entries, cu_q_ptr, cu_k_ptr, lengths_ptr, first_ptr,
        entry_ptr, PAGED,
    )  # fmt: skip
    if i >= rows:
        return
    _chunk, _first, count = chunks_of(
        end - rows + i, start, end, left, right, BLOCKS, FREE, SPLITS, BLOCK_N, MIN_CHUNK
    )
    count = tl.minimum(count, num_slots)
    place = ((b.to(tl.int64) * tl.num_programs(1) + head) * num_rows + i) * num_slots
    slot = tl.arange(0, SLOT_BLOCK)
    highest = float("-inf")
    for s in range(0, count, SLOT_BLOCK):
        lse = tl.load(partial_lse_ptr + place + s + slot, mask=s + slot < count, other=float("-inf"))
        highest = tl.maximum(highest, tl.max(lse, 0))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    total = 0.0
    result = tl.zeros([COLUMN_BLOCK], tl.float32)
    for s in range(0, count, SLOT_BLOCK):
        present = s + slot < count
        weight = tl.exp2(tl.load(partial_lse_ptr + place + s + slot, mask=present, other=float("-inf")) - safe)
        part = tl.load(
            partial_ptr + (place + s + slot)[:, None] * HEAD_DIM + column[None, :],
            mask=present[:, None] & (column < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(weight, 0)
        result += tl.sum(weight[:, None] * part, 0)
    result = result / tl.where(total == 0, 1.0, total)
    row = (first_row + i).to(tl.int64)
    tl.store(
        out_ptr + b.to(tl.int64) * stride_ob + row * stride_os + head * stride_oh + column,
        rounded(result, out_ptr.dtype.element_ty, DOT_DTYPE).to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM,
    )  # fmt: skip
    if tl.program_id(2) == 0:
        lse = (safe + tl.log2(total)) * LN_2
        tl.store(lse_ptr + b.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + row, lse)


@dataclass(frozen=True)
class Splits:
    """How the keys of a call are split, and room for the parts."""

    splits: int
    min_chunk: int
    num_slots: int
    partial: Tensor
    partial_lse: Tensor

    @classmethod
    def of(cls, call: AttentionCall, config: Config, card: Card) -> Splits:
        """Room is B * HQ * ROWS * SLOTS * (D + 1) * 4 bytes; SLOTS is bounded by the card, however long the cache."""
        splits = tables.splits(card.multiprocessors, call.kv_heads)
        min_chunk = tables.MIN_TILES_OF_A_CHUNK * config.keys
        num_slots = tables.slots(splits, min_chunk, call.capacity)
        shape = (call.batch, call.kv_heads * call.group, call.num_rows, num_slots)
        partial = torch.empty((*shape, call.head_dim), dtype=torch.float32, device=call.q.device)
        return cls(splits, min_chunk, num_slots, partial, torch.empty(shape, dtype=torch.float32, device=call.q.device))

    def constants(self) -> dict[str, Any]:
        return {"SPLITS": self.splits, "MIN_CHUNK": self.min_chunk}

    def arguments(self) -> dict[str, Any]:
        return {"partial_ptr": self.partial, "partial_lse_ptr": self.partial_lse, "num_slots": self.num_slots}

    def plan_combine(self, call: AttentionCall, config: Config, out: Tensor, lse: Tensor) -> Launch:
        heads = call.kv_heads * call.group
        grid = (call.batch * call.num_rows, heads, triton.cdiv(call.head_dim, COLUMN_BLOCK))
        arguments = call.request_arguments() | call.result_arguments(out, lse) | self.arguments()
        constants = {
            "HEAD_DIM": call.head_dim, "PAGED": call.table is not None, "BLOCKS": call.ids is not None,
            "FREE": call.free_blocks, "BLOCK_N": config.keys, "SLOT_BLOCK": SLOT_BLOCK, "COLUMN_BLOCK": COLUMN_BLOCK,
            "DOT_DTYPE": dot_dtype(call.q.dtype),
        }  # fmt: skip
        return Launch(combine_kernel, grid, arguments, constants | self.constants(), num_warps=4)
