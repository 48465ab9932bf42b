"""Verification on Triton: two launches, no wait and no allocation that depends on what the tensors hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from gemma4_kernels.triton_common.launch import Launch
from gemma4_kernels.verification.outcome import Outcome
from gemma4_kernels.verification.triton import drafts, match, tables, tiles


def verify_drafts(*arguments: Any) -> Outcome:
    """The op, see `ops.SCHEMA`."""
    launches, out = plan(*arguments)
    for launch in launches:
        launch.run()
    return out


def plan(
    logits: Tensor, draft_tokens: Tensor, num_drafts: Tensor | None, temperature: Tensor, top_k: Tensor, cut: Tensor,
    min_p: Tensor, softcap: Tensor, seeds: Tensor, positions: Tensor, draft_logits: Tensor | None,
    max_new_tokens: Tensor | None, eos_token_ids: Sequence[int], method: str, stream: int,
) -> tuple[list[Launch], Outcome]:  # fmt: skip
    """The launches and what they fill."""
    batch, rows, vocab_size = logits.shape
    if method == "match" or rows == 1:
        draft_logits = None
    if draft_logits is not None and draft_logits.dtype != logits.dtype:
        logits, draft_logits = logits.float(), draft_logits.float()  # exact
    drafter_rows = 0 if draft_logits is None else rows - 1
    count = triton.cdiv(vocab_size, tables.TILE)
    length = tables.list_length(count)

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    facts = empty(batch, rows + drafter_rows, 4, count)
    lists = empty(batch, rows + drafter_rows, count, length)
    tokens, results, flags = empty(batch, rows), empty(4, batch), empty(2, batch, dtype=torch.uint8)
    common: dict[str, Any] = {
        "logits_ptr": logits, "drafts_ptr": draft_tokens.contiguous(), "num_drafts_ptr": _dense(num_drafts),
        "temperature_ptr": temperature.contiguous(), "top_k_ptr": top_k.contiguous(), "softcap_ptr": softcap.contiguous(),
        "seeds_ptr": seeds.contiguous(), "positions_ptr": positions.contiguous(), "facts_ptr": facts, "lists_ptr": lists,
        "stride_batch": logits.stride(0), "stride_row": logits.stride(1), "ROWS": rows, "V": vocab_size, "TILES": count,
        "stream": stream,
    }  # fmt: skip
    drafter: dict[str, Any] = {
        "draft_logits_ptr": draft_logits,
        "draft_stride_batch": 0 if draft_logits is None else draft_logits.stride(0),
        "draft_stride_row": 0 if draft_logits is None else draft_logits.stride(1),
    }
    # Without lists, top-k reads the row again.
    shared = {"LIST": max(length, 2), "LONGEST_TOP_K": tables.LONGEST_TOP_K if length else 0}
    over_tiles = _launch(
        tiles.tiles_kernel,
        count * (rows + drafter_rows) * batch,
        {**common, **drafter, "DRAFTER_ROWS": drafter_rows},
        {**shared, "TOKENS": tables.TILE, "CHUNK": tables.CHUNK, "EVERY_ROW": method == "match"},
        tables.TILE_WARPS,
    )
    filters = {"cut_ptr": cut.contiguous(), "min_p_ptr": min_p.contiguous()}
    results_of = {
        "max_new_tokens_ptr": _dense(max_new_tokens), "tokens_ptr": tokens, "results_ptr": results, "flags_ptr": flags,
        "B": batch,
    }  # fmt: skip
    finishing = {
        **shared, "TOKENS": tables.READ, "FACT_TILES": tables.FACT_TILES, "THRESHOLDS": tables.THRESHOLDS,
        "SCRATCH": tables.SCRATCH,
    }  # fmt: skip
    ends = tuple(eos_token_ids)
    ending = {"EOS": ends, "EOS_COUNT": len(ends)}
    if method == "match":
        scratch = {"scratch_ptr": empty(batch, tables.SCRATCH)}
        launches = [
            over_tiles,
            _launch(match.match_kernel, batch, {**common, **filters, **scratch, **results_of}, {**finishing, **ending}),
        ]
    else:
        all_rows = rows + drafter_rows
        every = {**common, **drafter, **filters, "DRAFTER_ROWS": drafter_rows, "made_ptr": empty(batch, all_rows, 5)}
        scratch = {"scratch_ptr": empty(batch, all_rows, tables.SCRATCH)}
        deciding = {
            "BLOCKS": method == "block", "TOKENS": tables.READ, "FACT_TILES": tables.FACT_TILES, **ending
        }  # fmt: skip
        launches = [
            over_tiles,
            _launch(drafts.rows_kernel, all_rows * batch, {**every, **scratch}, finishing),
            _launch(drafts.drafts_kernel, batch, {**every, **results_of}, deciding),
        ]
    finished, refused = flags.view(torch.bool)
    return launches, (tokens, *results, finished, refused)


def _launch(
    kernel: Any, programs: int, arguments: dict[str, Any], constants: dict[str, Any], warps: int = tables.FINISH_WARPS
) -> Launch:
    """Of the arguments, those that the kernel has."""
    names = kernel.arg_names
    mine = {name: value for name, value in arguments.items() if name in names}
    return Launch(kernel, (programs,), mine, constants, warps, enable_fp_fusion=False)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
