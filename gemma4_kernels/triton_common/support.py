"""What any family's Triton kernels need of a machine. Triton itself is not imported here."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch

from gemma4_kernels import environment
from gemma4_kernels.backends import Call, Implementation
from gemma4_kernels.op_support import refuses_architecture


@lru_cache
def missing() -> str | None:
    """What the machine lacks, or None."""
    return None if find_spec("triton") else "triton is not installed"


def refuses(call: Call) -> str | None:
    """Why a device cannot run Triton kernels, or None."""
    if call.device_type == "cpu":
        if environment.triton_interprets():
            return None
        return "runs on cuda, not on cpu (on a CPU only in Triton's interpreter: start Python with TRITON_INTERPRET=1)"
    if call.device_type != "cuda":
        return f"runs on cuda, not on {call.device_type}"
    if environment.triton_interprets():
        return "TRITON_INTERPRET is set: kernels are interpreted, on CPU tensors only"
    return refuses_architecture(call)


def only_by_name(call: Call) -> str | None:
    """Why the choice is not left to take Triton by itself, or None."""
    if call.device_type == "cpu":
        return "could interpret it, slowly: only where asked for by name"
    return None


def implementation(op: str, entry: str, features: frozenset[str], max_head_dim: int | None = None) -> Implementation:
    """The declaration of an op's Triton kernels; entry is "package.module:function"."""
    return Implementation(
        op=op,
        backend="triton",
        entry=entry,
        dtypes=frozenset({torch.bfloat16, torch.float16, torch.float32}),
        features=features,
        max_head_dim=max_head_dim,
        missing=missing,
        refuses=refuses,
        only_by_name=only_by_name,
    )
