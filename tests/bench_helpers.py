"""Broken kernels, cheap cases and records for the tests of the bench machinery."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backend_helpers import standing_in

from gemma4_kernels.attention import eager
from gemma4_kernels.backends import Implementation
from gemma4_kernels.bench import records
from gemma4_kernels.bench.cases import AttentionCase
from gemma4_kernels.checks import FLOATS

SMALL = AttentionCase("flash_attn_func", b=2, sq=5, sk=33, hq=4, hkv=2, d=64, right=0)
APPENDING = AttentionCase("flash_attn_with_kvcache", sq=2, hq=4, hkv=2, d=64, right=0, new=2, lengths="9+4", page=4)

_current: dict[str, Callable[..., Any]] = {}


def serve(*arguments: Any) -> Any:
    """What the "triton" backend runs while `kernel` is active."""
    return _current["kernel"](*arguments)


@contextmanager
def kernel(op: str, function: Callable[..., Any]) -> Iterator[None]:
    """Serve an op on the backend "triton" with a Python function that takes the op's arguments."""
    _current["kernel"] = function
    stand_in = Implementation(
        op=op, backend="triton", entry=f"{__name__}:serve", dtypes=frozenset(FLOATS),
        features=frozenset({"block_ids", "softcap", "window", "paged"}),
    )  # fmt: skip
    with standing_in(stand_in):
        yield


def spoiled(spoil: Callable[[torch.Tensor, torch.Tensor], None]) -> Callable[..., Any]:
    """flash_attn whose results go through `spoil(out, lse)`, which changes them in place."""

    def function(*arguments: Any) -> Any:
        out, lse = eager.flash_attn(*arguments)
        spoil(out, lse)
        return out, lse

    return function


def row(**changes: Any) -> dict[str, Any]:
    """A row that was validated and timed."""
    made: dict[str, Any] = {
        "case": "flash_attn_func(sq=5,sk=33)", "family": "attention", "op": "flash_attn_func", "dtype": "bf16",
        "by": "triton", "kind": "kernel", "status": "held", "reason": None, "worst": 0.4, "median_us": 110.0,
        "quartile_us": 105.0, "fastest_us": 100.0, "spread": 0.06, "rounds": 20, "calls": 40, "copies": 3, "cold": True,
        "timed_with": "graph", "bytes": 1000, "operations": 2000, "gbs": 90.0, "tflops": 0.5, "copy_gbs": 300.0,
        "matmul_tflops": 20.0, "bound": "bytes", "share": 0.3, "sheet_share": 0.25,
    }  # fmt: skip
    assert made.keys() == records.ROW.keys()
    return {**made, **changes}


def record(rows: list[dict[str, Any]] | None = None, **machine: Any) -> dict[str, Any]:
    """A record that may be quoted."""
    described: dict[str, Any] = {
        "device": "cuda", "name": "NVIDIA Test Card", "architecture": "sm_86", "memory_gib": 12.0, "processor": "CPU",
        "threads": 2, "system": "Linux x86_64", "python": "3.12.0", "torch": "2.11.0", "torch_cuda": "13.0",
        "triton": "3.6.0", "transformers": None, "time": "2026-01-01T00:00:00Z", "driver": "580.1",
        "sm_clock_mhz": 1700.0, "memory_clock_mhz": 7500.0, "max_sm_clock_mhz": 2100.0, "power_limit_w": 170.0,
        "temperature_c": 40.0, "unknown_because": None,
    }  # fmt: skip
    assert described.keys() == records.MACHINE.keys()
    return {
        "schema": records.SCHEMA, "package": "0.1.0", "commit": "0" * 40, "dirty": False,
        "command": "gemma4-kernels bench", "sheet_source": "unknown: the card is not listed",
        "temperature_after_c": 60.0, "machine": {**described, **machine}, "rows": [row()] if rows is None else rows,
    }  # fmt: skip
