"""Attention over keys and values that lie side by side: prefill in one pass, decode and verification in splits.

    q        (B, ROWS, HQ, D) or packed (total, HQ, D)
    k, v     (entries, S, HKV, D), packed (total, HKV, D), or pages (P, PAGE_SIZE, HKV, D)
    out      like q;  lse (B, HQ, ROWS) fp32, the natural log of the sum of exponentials
    partial  (B, HQ, ROWS, SLOTS, D) fp32, and its log-sum-exp (B, HQ, ROWS, SLOTS): what the splits leave

One program owns a tile of packed query rows (or TILES of them) of one KV head, walks over the tiles of keys that any of its
rows sees, and keeps an online softmax (Milakov and Gimelshein 2018) in fp32. Tiles that nobody sees are not visited; a mask
is formed only in tiles that an edge crosses. head_dim is taken in chunks of BLOCK_D columns, so that 192 or 320
columns cost what they are.

Decode splits the keys of each row into chunks whose size depends on the row's own number of keys (`pieces.chunk_size`).
Rows of one verification nearly always have one size; where two meet, a second set of programs serves the rows of the
second. `combine.py` adds the chunks in their order.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gemma4_kernels.attention.triton import tables
from gemma4_kernels.attention.triton.call import AttentionCall
from gemma4_kernels.attention.triton.combine import Splits, part_of
from gemma4_kernels.attention.triton.pieces import (
    ABSENT,
    UNSPECIALISED,
    capped,
    choose_chunk,
    chunks_of,
    crosses_edge,
    first_of_blocks,
    last_of_blocks,
    log_sum,
    online_softmax_step,
    own_block,
    page_and_row,
    plus_product,
    request_of,
    scaled,
    visible,
)
from gemma4_kernels.attention.triton.tables import Config
from gemma4_kernels.op_support import DECODE_ROWS
from gemma4_kernels.triton_common.devices import Card
from gemma4_kernels.triton_common.launch import Launch, dot_dtype
from gemma4_kernels.triton_common.rounding import operand, round_to


@triton.jit
def _attend(
    q, token, own_id, first_token, last_token, begin, stop, end,
    k_ptr, v_ptr, ids_ptr, table_ptr, num_pages, stride_ke, stride_ks, stride_ve, stride_vs,
    scale, softcap, left, right,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, FREE: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Keys begin..stop for TILES tiles of rows: (maxima, sums, accumulators), each a tuple, accumulators by column chunk.

    q: TILES * CHUNKS tiles (BLOCK_M, BLOCK_D); token, own_id: TILES tiles (BLOCK_M,).
    """
    CHUNKS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    BLOCKS: tl.constexpr = ids_ptr is not None
    column = tl.arange(0, BLOCK_D)
    running_max, running_sum, accumulated = (), (), ()
    for _ in tl.static_range(TILES):
        running_max = running_max + (tl.full([BLOCK_M], float("-inf"), tl.float32),)
        running_sum = running_sum + (tl.zeros([BLOCK_M], tl.float32),)
        for _ in tl.static_range(CHUNKS):
            accumulated = accumulated + (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)
    for tile in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
        keys = tile + tl.arange(0, BLOCK_N)  # (N,)
        inside = keys < end
        page, row = page_and_row(keys, inside, table_ptr, num_pages, PAGE_SIZE)
        ids = keys
        if BLOCKS:
            ids = tl.load(ids_ptr + keys, mask=inside, other=ABSENT)
            inside = ids != ABSENT
        if not FREE:
            # Left of every row's window; there may be a page that belongs to somebody else by now.
            inside = inside & (keys >= first_token - left)
        k_row = k_ptr + page * stride_ke + row.to(tl.int64) * stride_ks
        v_row = v_ptr + page * stride_ve + row.to(tl.int64) * stride_vs
        k, v = (), ()
        for c in tl.static_range(CHUNKS):
            mask = inside[:, None]
            if HEAD_DIM % BLOCK_D != 0:
                mask = mask & (c * BLOCK_D + column < HEAD_DIM)[None, :]
            k = k + (tl.load(k_row[:, None] + (c * BLOCK_D + column)[None, :], mask=mask, other=0.0),)  # (N, BLOCK_D)
            v = v + (tl.load(v_row[:, None] + (c * BLOCK_D + column)[None, :], mask=mask, other=0.0),)
        new_max, new_sum, new_accumulated = (), (), ()
        for t in tl.static_range(TILES):
            scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for c in tl.static_range(CHUNKS):
                k_turned = tl.trans(k[c].to(DOT_DTYPE))  # (BLOCK_D, N)
                scores = plus_product(scores, q[t * CHUNKS + c], k_turned, scale, DOT_DTYPE)
            scores = scaled(scores, scale, DOT_DTYPE)
            if SOFTCAP:
                scores = capped(scores, softcap)
            if BLOCKS:
                scores = tl.where(inside[None, :], scores, float("-inf"))
            if crosses_edge(tile, BLOCK_N, first_token, last_token, end, left, right):
                seen = visible(token[t], own_id[t], keys, ids, end, left, right, BLOCKS, FREE)
                scores = tl.where(seen, scores, float("-inf"))
            weights, tile_max, tile_sum, rescale = online_softmax_step(scores, running_max[t], running_sum[t])
            weights = operand(weights, v_ptr.dtype.element_ty, DOT_DTYPE)  # (M, N)
            new_max = new_max + (tile_max,)
            new_sum = new_sum + (tile_sum,)
            for c in tl.static_range(CHUNKS):
                kept = accumulated[t * CHUNKS + c] * rescale[:, None]
                product = tl.dot(weights, v[c].to(DOT_DTYPE), kept, input_precision="ieee")  # (M, BLOCK_D)
                new_accumulated = new_accumulated + (product,)
        running_max, running_sum, accumulated = new_max, new_sum, new_accumulated
    return running_max, running_sum, accumulated


@triton.jit
def _load_rows(
    q_ptr, packed, is_row, stride_qs, stride_qh,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """The chunks (BLOCK_M, BLOCK_D) of packed query rows `packed` (BLOCK_M,) of one KV head."""
    column = tl.arange(0, BLOCK_D)
    row = q_ptr + (packed // GROUP).to(tl.int64) * stride_qs + (packed % GROUP).to(tl.int64) * stride_qh
    q = ()
    for c in tl.static_range((HEAD_DIM + BLOCK_D - 1) // BLOCK_D):
        here = c * BLOCK_D + column
        loaded = tl.load(row[:, None] + here[None, :], mask=is_row[:, None] & (here < HEAD_DIM)[None, :], other=0.0)
        q = q + (loaded.to(DOT_DTYPE),)
    return q


@triton.jit(do_not_specialize=UNSPECIALISED)
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, lengths_ptr, first_ptr, entry_ptr, table_ptr, ids_ptr,
    stride_qb, stride_qs, stride_qh, stride_ke, stride_ks, stride_kh, stride_ve, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, stride_lb, stride_lh, stride_tb, stride_ib,
    num_rows, capacity, total_rows, total_keys, num_entries, num_pages, scale, softcap, left, right,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, FREE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of packed rows, KV heads, B)."""
    # The last rows see most keys: they start first, so that a short tile ends the launch.
    m_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2)
    first_row, rows, first_key, start, end, entry = request_of(
        b, num_rows, capacity, total_rows, total_keys, num_entries, cu_q_ptr, cu_k_ptr, lengths_ptr, first_ptr,
        entry_ptr, PAGE_SIZE > 0,
    )  # fmt: skip
    if m_tile * BLOCK_M >= rows * GROUP:
        return
    packed = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
    is_row = packed < rows * GROUP
    token = end - rows + packed // GROUP  # (M,)
    first_token = end - rows + m_tile * BLOCK_M // GROUP
    last_token = end - rows + tl.minimum((m_tile * BLOCK_M + BLOCK_M - 1) // GROUP, rows - 1)

    q_rows = q_ptr + b.to(tl.int64) * stride_qb + first_row.to(tl.int64) * stride_qs + kv_head * GROUP * stride_qh
    q = _load_rows(q_rows, packed, is_row, stride_qs, stride_qh, HEAD_DIM, GROUP, BLOCK_D, DOT_DTYPE)
    k_rows = k_ptr + kv_head * stride_kh + first_key.to(tl.int64) * stride_ks
    v_rows = v_ptr + kv_head * stride_vh + first_key.to(tl.int64) * stride_vs
    table = table_ptr
    if PAGE_SIZE > 0:
        table = table_ptr + b.to(tl.int64) * stride_tb
    else:
        k_rows += entry.to(tl.int64) * stride_ke
        v_rows += entry.to(tl.int64) * stride_ve

    begin = tl.maximum(first_token - left, start)
    stop = tl.minimum(last_token + right + 1, end)
    ids = ids_ptr
    own_id = token
    if ids_ptr is not None:
        ids = ids_ptr + b.to(tl.int64) * stride_ib
        own_id = own_block(ids, token, is_row, capacity)
        stop = last_of_blocks(ids, own_id, tl.maximum(stop, start), end, SCAN=1024)
        if FREE:
            begin = first_of_blocks(ids, own_id, start, tl.minimum(begin, end), SCAN=1024)
    begin = start + (begin - start) // BLOCK_N * BLOCK_N
    running_max, running_sum, accumulated = _attend(
        q, (token,), (own_id,), first_token, last_token, begin, stop, end,
        k_rows, v_rows, ids, table, num_pages, stride_ke, stride_ks, stride_ve, stride_vs, scale, softcap, left, right,
        HEAD_DIM, PAGE_SIZE, SOFTCAP, FREE, 1, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, DOT_DTYPE,
    )  # fmt: skip

    total = running_sum[0]
    inverse = 1.0 / tl.where(total == 0, 1.0, total)
    head = tl.program_id(1) * GROUP + packed % GROUP
    row = (first_row + packed // GROUP).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    out_row = out_ptr + b.to(tl.int64) * stride_ob + row * stride_os + head * stride_oh
    for c in tl.static_range((HEAD_DIM + BLOCK_D - 1) // BLOCK_D):
        here = c * BLOCK_D + column
        result = round_to(accumulated[c] * inverse[:, None], out_ptr.dtype.element_ty)
        mask = is_row[:, None] & (here < HEAD_DIM)[None, :]
        tl.store(out_row[:, None] + here[None, :], result, mask=mask)
    lse = log_sum(running_max[0], total)
    tl.store(lse_ptr + b.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + row, lse, mask=is_row)


@triton.jit(do_not_specialize=UNSPECIALISED)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, partial_ptr, partial_lse_ptr, cu_q_ptr, cu_k_ptr, lengths_ptr, first_ptr, entry_ptr, table_ptr,
    ids_ptr, stride_qb, stride_qs, stride_qh, stride_ke, stride_ks, stride_kh, stride_ve, stride_vs, stride_vh,
    stride_tb, stride_ib,
    num_rows, num_slots, capacity, total_rows, total_keys, num_entries, num_pages, scale, softcap, left, right,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, FREE: tl.constexpr,
    TILES: tl.constexpr, SPLITS: tl.constexpr, MIN_CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles / TILES * SLOTS, KV heads, 2 B): programs that share keys start next to one another."""
    num_groups = tl.cdiv(tl.cdiv(num_rows * GROUP, BLOCK_M), TILES)
    group = tl.program_id(0) % num_groups
    split = tl.program_id(0) // num_groups
    kv_head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2) // 2
    second_size = tl.program_id(2) % 2
    first_row, rows, first_key, start, end, entry = request_of(
        b, num_rows, capacity, total_rows, total_keys, num_entries, cu_q_ptr, cu_k_ptr, lengths_ptr, first_ptr,
        entry_ptr, PAGE_SIZE > 0,
    )  # fmt: skip
    group_row = group * (TILES * BLOCK_M)
    if group_row >= rows * GROUP:
        return

    first_token = end - rows + group_row // GROUP
    last_token = end - rows + tl.minimum((group_row + TILES * BLOCK_M - 1) // GROUP, rows - 1)
    size, index, exists = choose_chunk(
        split, second_size, first_token, last_token, start, end, left, right, ids_ptr is not None, FREE, SPLITS,
        BLOCK_N, MIN_CHUNK,
    )  # fmt: skip
    if not exists:
        return
    begin = start + index * size
    stop = tl.minimum(begin + size, end)
    if ids_ptr is None:
        stop = tl.minimum(stop, tl.maximum(last_token + right + 1, begin))
        # Whole tiles that lie before every row's window, in the first of its chunks.
        begin += tl.maximum(first_token - left - begin, 0) // BLOCK_N * BLOCK_N

    q_rows = q_ptr + b.to(tl.int64) * stride_qb + first_row.to(tl.int64) * stride_qs + kv_head * GROUP * stride_qh
    k_rows = k_ptr + kv_head * stride_kh + first_key.to(tl.int64) * stride_ks
    v_rows = v_ptr + kv_head * stride_vh + first_key.to(tl.int64) * stride_vs
    table = table_ptr
    if PAGE_SIZE > 0:
        table = table_ptr + b.to(tl.int64) * stride_tb
    else:
        k_rows += entry.to(tl.int64) * stride_ke
        v_rows += entry.to(tl.int64) * stride_ve
    ids = ids_ptr
    if ids_ptr is not None:
        ids = ids_ptr + b.to(tl.int64) * stride_ib
    q, token, own_id, packed, is_row = (), (), (), (), ()
    for t in tl.static_range(TILES):
        packed = packed + (group_row + t * BLOCK_M + tl.arange(0, BLOCK_M),)
        is_row = is_row + (packed[t] < rows * GROUP,)
        token = token + (end - rows + packed[t] // GROUP,)
        q = q + _load_rows(q_rows, packed[t], is_row[t], stride_qs, stride_qh, HEAD_DIM, GROUP, BLOCK_D, DOT_DTYPE)
        if ids_ptr is not None:
            own_id = own_id + (own_block(ids, token[t], is_row[t], capacity),)
        else:
            own_id = own_id + (token[t],)
    running_max, running_sum, accumulated = _attend(
        q, token, own_id, first_token, last_token, begin, stop, end,
        k_rows, v_rows, ids, table, num_pages, stride_ke, stride_ks, stride_ve, stride_vs, scale, softcap, left, right,
        HEAD_DIM, PAGE_SIZE, SOFTCAP, FREE, TILES, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, DOT_DTYPE,
    )  # fmt: skip
    CHUNKS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    column = tl.arange(0, BLOCK_D)
    for t in tl.static_range(TILES):
        chunk, first, count = chunks_of(
            token[t], start, end, left, right, ids_ptr is not None, FREE, SPLITS, BLOCK_N, MIN_CHUNK
        )
        slot = index - first
        mine = is_row[t] & (chunk == size) & (slot >= 0) & (slot < tl.minimum(count, num_slots))
        place = part_of(b, tl.program_id(1), packed[t], slot, num_rows, num_slots, GROUP)
        inverse = 1 / tl.where(running_sum[t] == 0, 1.0, running_sum[t])
        for c in tl.static_range(CHUNKS):
            here = c * BLOCK_D + column
            part = accumulated[t * CHUNKS + c] * inverse[:, None]
            where = partial_ptr + place[:, None] * HEAD_DIM + here[None, :]
            tl.store(where, part, mask=mine[:, None] & (here < HEAD_DIM)[None, :])
        tl.store(partial_lse_ptr + place, log_sum(running_max[t], running_sum[t]), mask=mine)


# Launchers ----------------------------------------------------------------------------------------------------------


def plan(call: AttentionCall, out: Tensor, lse: Tensor, card: Card) -> list[Launch]:
    """The launches that fill out and lse, in order; what they need besides is allocated here."""
    return (_plan_decode if call.num_rows <= DECODE_ROWS else _plan_prefill)(call, out, lse, card)


def _plan_prefill(call: AttentionCall, out: Tensor, lse: Tensor, card: Card) -> list[Launch]:
    config = tables.lookup("prefill", card.architecture, call.head_dim, call.q.dtype)
    grid = (triton.cdiv(call.num_rows * call.group, config.rows), call.kv_heads, call.batch)
    arguments = _arguments(call) | call.result_arguments(out, lse)
    return [Launch(prefill_kernel, grid, arguments, _constants(call, config), config.warps)]


def _plan_decode(call: AttentionCall, out: Tensor, lse: Tensor, card: Card) -> list[Launch]:
    config = tables.lookup("decode", card.architecture, call.head_dim, call.q.dtype)
    splits = Splits.of(call, config, card)
    tiles = triton.cdiv(call.num_rows * call.group, config.rows)
    per_program = triton.cdiv(tiles, triton.cdiv(tiles, config.tiles)) if tiles else 1
    grid = (triton.cdiv(tiles, per_program) * splits.num_slots, call.kv_heads, 2 * call.batch)
    constants = _constants(call, config) | splits.constants() | {"TILES": per_program}
    attend = Launch(decode_kernel, grid, _arguments(call) | splits.arguments(), constants, config.warps)
    return [attend, splits.plan_combine(call, config, out, lse)]


def _arguments(call: AttentionCall) -> dict[str, Any]:
    return {
        **call.query_arguments(), **call.cache_arguments("k", call.k), **call.cache_arguments("v", call.v),
        **call.request_arguments(), **call.table_arguments(), "ids_ptr": call.ids,
        "stride_ib": 0 if call.ids is None else call.ids.stride(0), "scale": call.scale,
        "softcap": call.softcap,
    }  # fmt: skip


def _constants(call: AttentionCall, config: Config) -> dict[str, Any]:
    return {
        "HEAD_DIM": call.head_dim, "GROUP": call.group, "PAGE_SIZE": call.page_size, "SOFTCAP": call.softcap != 0,
        "FREE": call.free_blocks, "BLOCK_M": config.rows, "BLOCK_N": config.keys,
        "BLOCK_D": tables.columns(config, call.head_dim),
        "STAGES": tables.stages(config, call.table is not None or call.ids is not None), "DOT_DTYPE": dot_dtype(call.q.dtype),
    }  # fmt: skip
