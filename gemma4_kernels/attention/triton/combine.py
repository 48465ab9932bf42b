"""The parts that the splits of one row leave, and their sum.

    partial      (B, HQ, ROWS, SLOTS, D) fp32: softmax(...) @ v over one chunk of the row's keys
    partial_lse  (B, HQ, ROWS, SLOTS) fp32: the log of the sum of exponentials of its scores

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
from gemma4_kernels.attention.triton.call import AttentionCall
from gemma4_kernels.attention.triton.pieces import UNSPECIALISED, chunks_of, log_sum, request_of
from gemma4_kernels.attention.triton.tables import Config
from gemma4_kernels.triton_common.devices import Card
from gemma4_kernels.triton_common.launch import INTERPRETED, Launch
from gemma4_kernels.triton_common.rounding import round_to

SLOT_BLOCK = 8


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
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGED: tl.constexpr, BLOCKS: tl.constexpr, FREE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, MIN_CHUNK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (B * ROWS, blocks of heads, blocks of columns). A row's chunks are found again as `decode_kernel` found them."""
    b = tl.program_id(0) // num_rows
    i = tl.program_id(0) % num_rows
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)  # (H,)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    first_row, rows, _first_key, start, end, _entry = request_of(
        b, num_rows, capacity, total_rows, total_keys, num_entries, cu_q_ptr, cu_k_ptr, lengths_ptr, first_ptr,
        entry_ptr, PAGED,
    )  # fmt: skip
    if i >= rows:
        return
    _chunk, _first, count = chunks_of(end - rows + i, start, end, left, right, BLOCKS, FREE, SPLITS, BLOCK_N, MIN_CHUNK)
    count = tl.minimum(count, num_slots)
    is_head = head < HEADS
    place = (((b.to(tl.int64) * HEADS + head) * num_rows + i) * num_slots)[:, None] + tl.arange(0, BLOCK_S)[
        None, :
    ]  # (H, S)
    slot = tl.zeros([BLOCK_H, BLOCK_S], tl.int32) + tl.arange(0, BLOCK_S)[None, :]
    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    for s in range(0, count, BLOCK_S):
        present = (s + slot < count) & is_head[:, None]
        lse = tl.load(partial_lse_ptr + place + s, mask=present, other=float("-inf"))
        highest = tl.maximum(highest, tl.max(lse, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([BLOCK_H], tl.float32)
    result = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for s in range(0, count, BLOCK_S):
        present = (s + slot < count) & is_head[:, None]
        weight = tl.exp(
            tl.load(partial_lse_ptr + place + s, mask=present, other=float("-inf")) - safe[:, None]
        )  # (H, S)
        part = tl.load(
            partial_ptr + (place + s)[:, :, None] * HEAD_DIM + column[None, None, :],
            mask=present[:, :, None] & (column < HEAD_DIM)[None, None, :], other=0.0,
        )  # (H, S, BLOCK_D)  # fmt: skip
        total += tl.sum(weight, 1)
        result += tl.sum(weight[:, :, None] * part, 1)
    result = result / tl.where(total == 0, 1.0, total)[:, None]
    row = (first_row + i).to(tl.int64)
    tl.store(
        out_ptr + b.to(tl.int64) * stride_ob + row * stride_os + head[:, None] * stride_oh + column[None, :],
        round_to(result, out_ptr.dtype.element_ty),
        mask=is_head[:, None] & (column < HEAD_DIM)[None, :],
    )  # fmt: skip
    lse_place = lse_ptr + b.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + row
    tl.store(lse_place, log_sum(safe, total), mask=is_head & (tl.program_id(2) == 0))


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
        # Small blocks start many programs at once. The interpreter starts them one by one.
        block_h, block_d = (16, 512) if INTERPRETED else (1, 128)
        grid = (call.batch * call.num_rows, triton.cdiv(heads, block_h), triton.cdiv(call.head_dim, block_d))
        arguments = call.request_arguments() | call.result_arguments(out, lse) | self.arguments()
        constants = {
            "HEADS": heads, "HEAD_DIM": call.head_dim, "PAGED": call.table is not None, "BLOCKS": call.ids is not None,
            "FREE": call.free_blocks, "BLOCK_N": config.keys, "BLOCK_H": block_h, "BLOCK_S": SLOT_BLOCK,
            "BLOCK_D": block_d,
        }  # fmt: skip
        return Launch(combine_kernel, grid, arguments, constants | self.constants(), num_warps=4)
