"""K-equals-V attention: full layers from a cache of values alone, k[j] = rope(v[j] * weight, j).

    q       (B, ROWS, HQ, D), normed and rotated
    values  (B, S, HKV, D) or pages (P, PAGE_SIZE, HKV, D)
    out, lse, partial as in `flash.py`

One tile of values in shared memory serves both products. For columns that do not rotate the weight moves to the query:
q . (v * w) = (q * w) . v. A pair (d, d + D/2) that rotates by an angle per position is rebuilt in the kernel: a position
is the first one of its tile plus an offset, R(p) = R(base) R(delta), and R(base) q . R(base) R(delta) x needs R(base) on one
side only. So the query is turned back by the tile's base, and the tile's columns are turned forward by their offset, from
a table of BLOCK_N rows that all tiles share.

Which pairs rotate is data, the zeros of inv_freq, and nobody may wait for it: `turns_kernel` looks on the device. Column
pairs are taken BLOCK_D at a time. If one block holds all pairs that rotate, as in every Gemma, the main loop has that
block at a place chosen at run time and the others without any rotation. If more do, a slower loop turns every column.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_kernels.attention.triton import tables
from gemma4_kernels.attention.triton.call import AttentionCall
from gemma4_kernels.attention.triton.combine import Splits
from gemma4_kernels.attention.triton.pieces import (
    FAR,
    UNSPECIALISED,
    choose_chunk,
    chunk_size,
    log_sum,
    online_softmax_step,
    page_and_row,
    plus_product,
    scaled,
)
from gemma4_kernels.op_support import DECODE_ROWS
from gemma4_kernels.triton_common.devices import Card
from gemma4_kernels.triton_common.launch import Launch, dot_dtype
from gemma4_kernels.triton_common.rounding import operand, round_to

TURN = tl.constexpr(2.0**64)  # a whole turn as a whole number: products with it drop whole turns by overflowing
PER_TURN = tl.constexpr(1 / (2 * math.pi))


# Rotations ----------------------------------------------------------------------------------------------------------


@triton.jit
def cos_sin(position, turns):
    """cos and sin of `position` int64 steps of `turns` / 2**64 turns each, to the last bits wherever the position is.

    A product in fp32 would be off by 0.008 radians at 262144. The whole-number product is exact, and what overflows is
    whole turns. The rest is a quarter turn and at most an eighth more, for which Taylor's series reach 1e-7.
    """
    turn = (position * turns).to(tl.float32) * (1 / TURN)  # [-0.5, 0.5]
    quarter = tl.floor(turn * 4 + 0.5)
    angle = (turn - quarter * 0.25) * (1 / PER_TURN)  # [-pi/4, pi/4]
    square = angle * angle
    cos = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    sin = angle * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
    quadrant = quarter.to(tl.int32) & 3
    swapped = (quadrant & 1) == 1
    turned_cos = tl.where(swapped, sin, cos)
    turned_sin = tl.where(swapped, cos, sin)
    negative_cos = (quadrant == 1) | (quadrant == 2)
    return tl.where(negative_cos, -turned_cos, turned_cos), tl.where(quadrant >= 2, -turned_sin, turned_sin)


@triton.jit
def turns_kernel(
    inv_freq_ptr, turns_ptr, table_ptr, which_ptr,
    HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of column pairs,).

    turns (HALF,) int64: turns per position, times 2**64. table (2, BLOCK_N, HALF) fp32: cos and sin of the offsets in a
    tile. which (2,) int32: how many blocks rotate, and the last of them (0 if none does).
    """
    pair = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = pair < HALF
    turn = tl.load(inv_freq_ptr + pair, mask=mask, other=0.0).to(tl.float64) * PER_TURN
    turns = ((turn - tl.floor(turn + 0.5)) * TURN).to(tl.int64)  # the fraction in [-0.5, 0.5), as a whole number
    tl.store(turns_ptr + pair, turns, mask=mask)
    offset = tl.arange(0, BLOCK_N)
    cos, sin = cos_sin(offset.to(tl.int64)[:, None], turns[None, :])  # (BLOCK_N, BLOCK_D)
    tl.store(table_ptr + offset[:, None] * HALF + pair[None, :], cos, mask=mask[None, :])
    tl.store(table_ptr + (BLOCK_N + offset)[:, None] * HALF + pair[None, :], sin, mask=mask[None, :])
    if tl.program_id(0) == 0:
        every = tl.arange(0, BLOCK_HALF)
        rotates = tl.load(inv_freq_ptr + every, mask=every < HALF, other=0.0) != 0
        last = tl.max(tl.where(rotates, every // BLOCK_D, 0), 0)
        count = 0
        for block in tl.static_range((HALF + BLOCK_D - 1) // BLOCK_D):
            count += tl.max((rotates & (every // BLOCK_D == block)).to(tl.int32), 0)
        tl.store(which_ptr, count)
        tl.store(which_ptr + 1, last)


# The loop -----------------------------------------------------------------------------------------------------------


@triton.jit
def _column_blocks(turning, HALF: tl.constexpr, BLOCK_D: tl.constexpr):
    """The columns of the lower half, block by block: the block `turning` first, then the others in order."""
    column = (turning * BLOCK_D + tl.arange(0, BLOCK_D),)
    for i in tl.static_range(1, (HALF + BLOCK_D - 1) // BLOCK_D):
        column = column + (tl.where(i <= turning, i - 1, i) * BLOCK_D + tl.arange(0, BLOCK_D),)
    return column


@triton.jit
def _load_columns(row, columns, mask):
    """(M, BLOCK_D) fp32 of the rows that `row` (M,) points to."""
    return tl.load(row[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_values(row, columns, inside, HALF: tl.constexpr, BLOCK_D: tl.constexpr, UPPER: tl.constexpr):
    """(N, BLOCK_D) of the columns (BLOCK_D,) of the lower half, or of their partners in the upper one."""
    mask = inside[:, None]
    if HALF % BLOCK_D != 0:
        mask = mask & (columns < HALF)[None, :]
    return tl.load(row[:, None] + (columns + UPPER * HALF)[None, :], mask=mask, other=0.0)


@triton.jit
def _add_turned(
    scores, tile, q_row, is_row, low, high, columns, weight_ptr, turns_ptr, offsets_ptr,
    scale, HALF: tl.constexpr, BLOCK_N: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """scores (M, N) plus the product of queries and keys over the pairs `columns`; low, high (N, BLOCK_D) their values."""
    ELEMENT: tl.constexpr = low.dtype
    exists = columns < HALF
    turns = tl.load(turns_ptr + columns, mask=exists, other=0)
    cos, sin = cos_sin(tl.zeros_like(turns) + tile, turns)  # (BLOCK_D,)
    q_mask = is_row[:, None] & exists[None, :]
    q_low, q_high = _load_columns(q_row, columns, q_mask), _load_columns(q_row, columns + HALF, q_mask)
    back_low = operand(q_low * cos[None, :] + q_high * sin[None, :], ELEMENT, DOT_DTYPE)  # (M, BLOCK_D)
    back_high = operand(q_high * cos[None, :] - q_low * sin[None, :], ELEMENT, DOT_DTYPE)
    offset_row = offsets_ptr + tl.arange(0, BLOCK_N) * HALF
    cos = _load_columns(offset_row, columns, exists[None, :])  # (N, BLOCK_D)
    sin = _load_columns(offset_row + BLOCK_N * HALF, columns, exists[None, :])
    # The weight of a pair comes before its rotation.
    low = low.to(tl.float32) * tl.load(weight_ptr + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    high = high.to(tl.float32) * tl.load(weight_ptr + HALF + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    ahead_low = operand(low * cos - high * sin, ELEMENT, DOT_DTYPE)  # (N, BLOCK_D)
    ahead_high = operand(high * cos + low * sin, ELEMENT, DOT_DTYPE)
    scores = plus_product(scores, back_low, tl.trans(ahead_low), scale, DOT_DTYPE)
    return plus_product(scores, back_high, tl.trans(ahead_high), scale, DOT_DTYPE)


@triton.jit
def _fold(
    scores, tile, token, first_token, running_max, running_sum, scale, BLOCK_N: tl.constexpr, DOT_DTYPE: tl.constexpr
):  # fmt: skip
    """Mask and fold a tile of products into the softmax: as `online_softmax_step`."""
    scores = scaled(scores, scale, DOT_DTYPE)
    if tile + BLOCK_N - 1 > first_token:  # the diagonal; a token is a key, so the end of the keys lies beyond it
        keys = tile + tl.arange(0, BLOCK_N)
        scores = tl.where(keys[None, :] <= token[:, None], scores, float("-inf"))
    return online_softmax_step(scores, running_max, running_sum)


@triton.jit
def _attend(
    q_row, is_row, token, first_token, begin, stop, end, column,
    values_ptr, weight_ptr, turns_ptr, offsets_ptr, table_ptr, num_pages, stride_ve, stride_vs, scale,
    HALF: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Keys begin..stop for one tile of rows: (maximum, sum, accumulators). Of the blocks `column` the first one turns.

    Accumulators come in pairs, lower and upper half of a block.
    """
    BLOCKS: tl.constexpr = (HALF + BLOCK_D - 1) // BLOCK_D
    ELEMENT: tl.constexpr = values_ptr.dtype.element_ty
    folded, accumulated = (), ()
    for _ in tl.static_range(2 * BLOCKS):
        accumulated = accumulated + (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)
    for i in tl.static_range(2, 2 * BLOCKS):
        here, exists = column[i // 2] + (i % 2) * HALF, column[i // 2] < HALF
        weight = tl.load(weight_ptr + here, mask=exists, other=0.0).to(tl.float32)
        q = _load_columns(q_row, here, is_row[:, None] & exists[None, :])
        folded = folded + (operand(q * weight[None, :], ELEMENT, DOT_DTYPE),)  # (M, BLOCK_D)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    for tile in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
        keys = tile + tl.arange(0, BLOCK_N)  # (N,)
        inside = keys < end
        page, row = page_and_row(keys, inside, table_ptr, num_pages, PAGE_SIZE)
        v_row = values_ptr + page * stride_ve + row.to(tl.int64) * stride_vs
        v = ()
        for i in tl.static_range(2 * BLOCKS):
            v = v + (_load_values(v_row, column[i // 2], inside, HALF, BLOCK_D, i % 2),)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in tl.static_range(2, 2 * BLOCKS):
            v_turned = tl.trans(v[i].to(DOT_DTYPE))  # (BLOCK_D, N)
            scores = plus_product(scores, folded[i - 2], v_turned, scale, DOT_DTYPE)
        scores = _add_turned(
            scores, tile, q_row, is_row, v[0], v[1], column[0], weight_ptr, turns_ptr, offsets_ptr,
            scale, HALF, BLOCK_N, DOT_DTYPE,
        )  # fmt: skip
        weights, running_max, running_sum, rescale = _fold(
            scores, tile, token, first_token, running_max, running_sum, scale, BLOCK_N, DOT_DTYPE
        )
        weights = operand(weights, ELEMENT, DOT_DTYPE)  # (M, N)
        new_accumulated = ()
        for i in tl.static_range(2 * BLOCKS):
            kept = accumulated[i] * rescale[:, None]
            new_accumulated = new_accumulated + (tl.dot(weights, v[i].to(DOT_DTYPE), kept, input_precision="ieee"),)
        accumulated = new_accumulated
    return running_max, running_sum, accumulated


@triton.jit
def _attend_turning_all(
    q_row, is_row, token, first_token, begin, stop, end, column,
    values_ptr, weight_ptr, turns_ptr, offsets_ptr, table_ptr, num_pages, stride_ve, stride_vs, scale,
    HALF: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """As `_attend`, whichever pairs rotate. One block of columns is held at a time and values are loaded twice: a path
    that must be right, not fast, and must not take registers from the other."""
    BLOCKS: tl.constexpr = (HALF + BLOCK_D - 1) // BLOCK_D
    accumulated = ()
    for _ in tl.static_range(2 * BLOCKS):
        accumulated = accumulated + (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    for tile in tl.range(begin, stop, BLOCK_N, num_stages=1):
        keys = tile + tl.arange(0, BLOCK_N)  # (N,)
        inside = keys < end
        page, row = page_and_row(keys, inside, table_ptr, num_pages, PAGE_SIZE)
        v_row = values_ptr + page * stride_ve + row.to(tl.int64) * stride_vs
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for block in tl.range(0, BLOCKS, num_stages=1):
            columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
            low = _load_values(v_row, columns, inside, HALF, BLOCK_D, 0)
            high = _load_values(v_row, columns, inside, HALF, BLOCK_D, 1)
            scores = _add_turned(
                scores, tile, q_row, is_row, low, high, columns, weight_ptr, turns_ptr, offsets_ptr,
                scale, HALF, BLOCK_N, DOT_DTYPE,
            )  # fmt: skip
        weights, running_max, running_sum, rescale = _fold(
            scores, tile, token, first_token, running_max, running_sum, scale, BLOCK_N, DOT_DTYPE
        )
        weights = operand(weights, values_ptr.dtype.element_ty, DOT_DTYPE)  # (M, N)
        new_accumulated = ()
        for i in tl.static_range(2 * BLOCKS):
            values = _load_values(v_row, column[i // 2], inside, HALF, BLOCK_D, i % 2).to(DOT_DTYPE)
            kept = accumulated[i] * rescale[:, None]
            new_accumulated = new_accumulated + (tl.dot(weights, values, kept, input_precision="ieee"),)
        accumulated = new_accumulated
    return running_max, running_sum, accumulated


# Kernels ------------------------------------------------------------------------------------------------------------


@triton.jit
def _attend_either(
    q_row, is_row, token, first_token, begin, stop, end, column,
    values_ptr, weight_ptr, turns_ptr, offsets_ptr, table_ptr, num_pages, stride_ve, stride_vs, scale,
    HALF: tl.constexpr, PAGE_SIZE: tl.constexpr, TURN_ALL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    if TURN_ALL:
        return _attend_turning_all(
            q_row, is_row, token, first_token, begin, stop, end, column,
            values_ptr, weight_ptr, turns_ptr, offsets_ptr, table_ptr, num_pages, stride_ve, stride_vs, scale,
            HALF, PAGE_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, DOT_DTYPE,
        )  # fmt: skip
    else:
        return _attend(
            q_row, is_row, token, first_token, begin, stop, end, column,
            values_ptr, weight_ptr, turns_ptr, offsets_ptr, table_ptr, num_pages, stride_ve, stride_vs, scale,
            HALF, PAGE_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, DOT_DTYPE,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def k_eq_v_prefill_kernel(
    q_ptr, values_ptr, weight_ptr, turns_ptr, offsets_ptr, which_ptr, out_ptr, lse_ptr, lengths_ptr, table_ptr,
    stride_qb, stride_qs, stride_qh, stride_ve, stride_vs, stride_vh, stride_ob, stride_os, stride_oh,
    stride_lb, stride_lh, stride_tb, num_rows, capacity, num_pages, scale,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, TURN_ALL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of packed rows, KV heads, B)."""
    if (tl.load(which_ptr) > 1) != TURN_ALL:
        return
    HALF: tl.constexpr = HEAD_DIM // 2
    # The last rows see most keys: they start first, so that a short tile ends the launch.
    first_packed = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    kv_head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    end = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), capacity).to(tl.int32)
    packed = first_packed + tl.arange(0, BLOCK_M)  # (M,)
    is_row = packed < num_rows * GROUP
    token = end - num_rows + packed // GROUP  # (M,)
    first_token = end - num_rows + first_packed // GROUP
    stop = tl.minimum(end - num_rows + (first_packed + BLOCK_M - 1) // GROUP + 1, end)
    head = kv_head * GROUP + packed % GROUP
    row = (packed // GROUP).to(tl.int64)
    q_row = q_ptr + b * stride_qb + row * stride_qs + head * stride_qh
    values = values_ptr + kv_head * stride_vh
    table = table_ptr
    if PAGE_SIZE > 0:
        table = table_ptr + b * stride_tb
    else:
        values += b * stride_ve
    column = _column_blocks(tl.load(which_ptr + 1), HALF, BLOCK_D)
    running_max, total, accumulated = _attend_either(
        q_row, is_row, token, first_token, 0, stop, end, column,
        values, weight_ptr, turns_ptr, offsets_ptr, table, num_pages, stride_ve, stride_vs, scale,
        HALF, PAGE_SIZE, TURN_ALL, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, DOT_DTYPE,
    )  # fmt: skip
    inverse = 1 / tl.where(total == 0, 1.0, total)
    out_row = out_ptr + b * stride_ob + row * stride_os + head * stride_oh
    for i in tl.static_range(2 * ((HALF + BLOCK_D - 1) // BLOCK_D)):
        result = round_to(accumulated[i] * inverse[:, None], out_ptr.dtype.element_ty)
        here = column[i // 2]
        where = out_row[:, None] + (here + (i % 2) * HALF)[None, :]
        tl.store(where, result, mask=is_row[:, None] & (here < HALF)[None, :])
    lse = log_sum(running_max, total)
    tl.store(lse_ptr + b * stride_lb + head * stride_lh + row, lse, mask=is_row)


@triton.jit(do_not_specialize=UNSPECIALISED)
def k_eq_v_decode_kernel(
    q_ptr, values_ptr, weight_ptr, turns_ptr, offsets_ptr, which_ptr, partial_ptr, partial_lse_ptr, lengths_ptr,
    table_ptr, stride_qb, stride_qs, stride_qh, stride_ve, stride_vs, stride_vh, stride_tb,
    num_rows, num_slots, capacity, num_pages, scale,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, TURN_ALL: tl.constexpr,
    SPLITS: tl.constexpr, MIN_CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles * SLOTS, KV heads, 2 B), as `flash.decode_kernel` with one tile of rows a program."""
    if (tl.load(which_ptr) > 1) != TURN_ALL:
        return
    HALF: tl.constexpr = HEAD_DIM // 2
    tiles = tl.cdiv(num_rows * GROUP, BLOCK_M)
    first_packed = tl.program_id(0) % tiles * BLOCK_M
    kv_head = tl.program_id(1).to(tl.int64)
    b = (tl.program_id(2) // 2).to(tl.int64)
    end = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), capacity).to(tl.int32)
    packed = first_packed + tl.arange(0, BLOCK_M)  # (M,)
    is_row = packed < num_rows * GROUP
    token = end - num_rows + packed // GROUP  # (M,)
    first_token = end - num_rows + first_packed // GROUP
    last_token = end - num_rows + tl.minimum((first_packed + BLOCK_M - 1) // GROUP, num_rows - 1)
    size, index, exists = choose_chunk(
        tl.program_id(0) // tiles, tl.program_id(2) % 2, first_token, last_token, 0, end, FAR // 2, 0, False, False,
        SPLITS, BLOCK_N, MIN_CHUNK,
    )  # fmt: skip
    if not exists:
        return
    begin = index * size
    stop = tl.minimum(begin + size, last_token + 1)
    # This chunk of the KV head's first packed row.
    part_index = (b * tl.num_programs(1) + kv_head) * (GROUP * num_rows) * num_slots + index
    part, part_lse = partial_ptr + part_index * HEAD_DIM, partial_lse_ptr + part_index
    head = kv_head * GROUP + packed % GROUP
    q_row = q_ptr + b * stride_qb + (packed // GROUP).to(tl.int64) * stride_qs + head * stride_qh
    values = values_ptr + kv_head * stride_vh
    table = table_ptr
    if PAGE_SIZE > 0:
        table = table_ptr + b * stride_tb
    else:
        values += b * stride_ve
    column = _column_blocks(tl.load(which_ptr + 1), HALF, BLOCK_D)
    running_max, total, accumulated = _attend_either(
        q_row, is_row, token, first_token, begin, stop, end, column,
        values, weight_ptr, turns_ptr, offsets_ptr, table, num_pages, stride_ve, stride_vs, scale,
        HALF, PAGE_SIZE, TURN_ALL, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, DOT_DTYPE,
    )  # fmt: skip
    # Every row sees the keys from 0 on, so a chunk has one index for all rows of its size.
    mine = is_row & (chunk_size(token + 1, SPLITS, BLOCK_N, MIN_CHUNK) == size) & (token >= begin)
    place = (packed % GROUP * num_rows + packed // GROUP) * num_slots  # (M,)
    inverse = 1 / tl.where(total == 0, 1.0, total)
    for i in tl.static_range(2 * ((HALF + BLOCK_D - 1) // BLOCK_D)):
        here = column[i // 2]
        where = part + place[:, None] * HEAD_DIM + (here + (i % 2) * HALF)[None, :]
        tl.store(where, accumulated[i] * inverse[:, None], mask=mine[:, None] & (here < HALF)[None, :])
    tl.store(part_lse + place, log_sum(running_max, total), mask=mine)


# Launchers ----------------------------------------------------------------------------------------------------------


def plan(call: AttentionCall, weight: Tensor, inv_freq: Tensor, out: Tensor, lse: Tensor, card: Card) -> list[Launch]:
    """The launches that fill out and lse, in order. `call` has the values as k and as v, right 0 and no other limit.

    Where pairs of several blocks may rotate, a kernel for one block and a kernel for all are launched, and the device
    knows which of the two has nothing to do.
    """
    half = call.head_dim // 2
    decodes = call.num_rows <= DECODE_ROWS
    kernel = "k_eq_v decode" if decodes else "k_eq_v prefill"
    configs = {False: tables.lookup(kernel, card.architecture, call.head_dim, call.q.dtype)}
    columns = tables.columns(configs[False], half)
    if columns < half:
        configs[True] = tables.lookup(f"{kernel}, any pairs", card.architecture, call.head_dim, call.q.dtype)
    prepare, rotation = _plan_turns(inv_freq, columns, configs[False].keys)
    arguments = {
        **call.query_arguments(), **call.cache_arguments("v", call.v), **call.table_arguments(), **rotation,
        "weight_ptr": weight, "lengths_ptr": call.lengths, "num_rows": call.num_rows, "capacity": call.capacity,
        "scale": call.scale,
    }  # fmt: skip
    arguments["values_ptr"] = arguments.pop("v_ptr")
    if decodes:
        splits = Splits.of(call, configs[False], card)
        arguments |= splits.arguments()
    else:
        arguments |= call.result_arguments(out, lse)
    launches = [prepare]
    assert len({config.keys for config in configs.values()}) == 1  # they share offsets and splits
    for turn_all, config in configs.items():
        tiles = triton.cdiv(call.num_rows * call.group, config.rows)
        constants = {
            "HEAD_DIM": call.head_dim, "GROUP": call.group, "PAGE_SIZE": call.page_size, "TURN_ALL": turn_all,
            "BLOCK_M": config.rows, "BLOCK_N": config.keys, "BLOCK_D": columns,
            "STAGES": tables.stages(config, call.table is not None), "DOT_DTYPE": dot_dtype(call.q.dtype),
        }  # fmt: skip
        if decodes:
            grid = (tiles * splits.num_slots, call.kv_heads, 2 * call.batch)
            constants |= splits.constants()
        else:
            grid = (tiles, call.kv_heads, call.batch)
        attend = k_eq_v_decode_kernel if decodes else k_eq_v_prefill_kernel
        launches.append(Launch(attend, grid, arguments, constants, config.warps))
    if decodes:
        launches.append(splits.plan_combine(call, configs[False], out, lse))
    return launches


def _plan_turns(inv_freq: Tensor, columns: int, keys: int) -> tuple[Launch, dict[str, Any]]:
    """The launch that looks at inv_freq (HALF,), and its results as arguments of the kernels that follow."""
    half = inv_freq.shape[0]
    new = inv_freq.new_empty
    results = {
        "turns_ptr": new((half,), dtype=torch.int64),
        "offsets_ptr": new((2, keys, half), dtype=torch.float32),
        "which_ptr": new((2,), dtype=torch.int32),
    }
    arguments = {
        "inv_freq_ptr": inv_freq, "turns_ptr": results["turns_ptr"], "table_ptr": results["offsets_ptr"],
        "which_ptr": results["which_ptr"],
    }  # fmt: skip
    constants = {"HALF": half, "BLOCK_D": columns, "BLOCK_N": keys, "BLOCK_HALF": triton.next_power_of_2(half)}
    return Launch(turns_kernel, (triton.cdiv(half, columns),), arguments, constants, num_warps=4), results
