"""For tests of compiled kernels on a GPU: the marks, the fixture that makes cuda serve every call, streams and graphs.

A test file imports the fixture; it is used by whatever test of it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from gemma4_kernels import use_backend
from gemma4_kernels.cuda_common import support

_module = support._load("_C")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(isinstance(_module, str), reason=str(_module))]


@pytest.fixture(autouse=True)
def _cuda_backend():
    with use_backend("cuda"):
        yield


def on_another_stream(run: Callable[[], Any]) -> Any:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = run()
    stream.synchronize()
    return got


def captured(run: Callable[[], Any]) -> tuple[Any, torch.cuda.CUDAGraph]:
    """The results of a graph of one call, written by each replay. One call comes before: the first may load what it needs."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return results, graph


def same_bits(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
