"""Verification by the compiled kernels of csrc/verification: the eager backend's bits in three launches.

Shapes and dtypes have been checked before; `refuses` has said that there is a module for the device. Nothing waits for the
device, and no size depends on what the tensors hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma4_kernels.cuda_common import support
from gemma4_kernels.cuda_common.arguments import address, run
from gemma4_kernels.verification.outcome import Outcome

_METHODS = {"match": 0, "rejection": 1, "block": 2}  # gemma4_method
MOST_ENDS = 64  # they travel as parameters of the kernels


def verify_drafts(
    logits: Tensor, draft_tokens: Tensor, num_drafts: Tensor | None, temperature: Tensor, top_k: Tensor, cut: Tensor,
    min_p: Tensor, softcap: Tensor, seeds: Tensor, positions: Tensor, draft_logits: Tensor | None,
    max_new_tokens: Tensor | None, eos_token_ids: Sequence[int], method: str, stream: int,
) -> Outcome:  # fmt: skip
    """The op, see `ops.SCHEMA`."""
    batch, rows, vocab_size = logits.shape
    device = logits.device
    if method == "match" or rows == 1:
        draft_logits = None
    if draft_logits is not None and draft_logits.dtype != logits.dtype:
        logits, draft_logits = logits.float(), draft_logits.float()  # exact
    tokens = torch.empty(batch, rows, dtype=torch.int64, device=device)
    results = torch.empty(4, batch, dtype=torch.int64, device=device)
    flags = torch.empty(2, batch, dtype=torch.uint8, device=device)
    # Names keep what is converted here alive until the kernels are on their way.
    drafts, lengths, budget = _whole(draft_tokens), _whole(num_drafts), _whole(max_new_tokens)
    reals = [x.contiguous() for x in (temperature, cut, min_p, softcap)]
    wholes = [x.contiguous() for x in (top_k, seeds, positions)]
    module = support.module_for(device)
    arguments = module.VerifyArguments(
        batch=batch, drafts_count=rows - 1, vocabulary=vocab_size, logits=logits.data_ptr(),
        stride_batch=logits.stride(0), stride_row=logits.stride(1), draft_logits=address(draft_logits),
        draft_stride_batch=0 if draft_logits is None else draft_logits.stride(0),
        draft_stride_row=0 if draft_logits is None else draft_logits.stride(1), draft_tokens=address(drafts),
        num_drafts=address(lengths), max_new_tokens=address(budget), temperature=reals[0].data_ptr(),
        top_k=wholes[0].data_ptr(), cut=reals[1].data_ptr(), min_p=reals[2].data_ptr(), softcap=reals[3].data_ptr(),
        seeds=wholes[1].data_ptr(), positions=wholes[2].data_ptr(), ends=list(eos_token_ids), tokens=tokens.data_ptr(),
        num_accepted=results[0].data_ptr(), next_token=results[1].data_ptr(), num_emitted=results[2].data_ptr(),
        hidden_row=results[3].data_ptr(), finished=flags[0].data_ptr(), refused=flags[1].data_ptr(),
        dtype=support.DTYPE_CODES[logits.dtype], method=_METHODS[method], stream=stream,
    )  # fmt: skip
    run(module.verify, module.verify_workspace, arguments, device)
    finished, refused = flags.view(torch.bool)
    return (tokens, *results, finished, refused)


def _whole(tensor: Tensor | None) -> Tensor | None:
    """The kernels read whole numbers of 64 bits, next to each other."""
    return None if tensor is None else tensor.long().contiguous()
