"""For tests of compiled kernels on the emulator: `needs_emulator`, and the fixture that makes cuda serve CPU tensors.

A test file imports both; the fixture is used by whatever test of it runs.
"""

from __future__ import annotations

import pytest
import torch

from gemma4_kernels import backends, use_backend
from gemma4_kernels.cuda_common import support

_module = support._load("_C_emulated")
needs_emulator = pytest.mark.skipif(isinstance(_module, str), reason=str(_module))
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _emulate(monkeypatch):
    monkeypatch.setenv("GEMMA4_EMULATE", "1")
    backends._select.cache_clear()  # what is chosen is kept for the process, like the variable outside of tests
    with use_backend("cuda"):
        yield
    backends._select.cache_clear()
