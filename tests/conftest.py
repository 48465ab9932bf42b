"""Common to all tests: one thread, and derandomised hypothesis.

Triton's kernels have two kinds of tests, in folders named triton_backend. With TRITON_INTERPRET they run on the CPU, in NumPy:
test_interpreted_*.py. Without it they are compiled, for cards that are not here. Triton decides when it is imported, so each
kind has a process of its own: `make test` starts both.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from gemma4_kernels import environment

# The tensors are small: more threads would mostly wait for each other, for minutes where other jobs hold the cores.
torch.set_num_threads(1)

try:
    import hypothesis
except ImportError:  # an optional test dependency: tests that need it skip themselves
    pass
else:
    # The same draws every time; `--hypothesis-profile=explore` draws others.
    hypothesis.settings.register_profile("repeat", derandomize=True, deadline=None, max_examples=60)
    hypothesis.settings.register_profile("explore", deadline=None, max_examples=300)
    hypothesis.settings.load_profile("repeat")


# On a machine without a registry the optional libraries may be missing; what needs them is left out, the rest runs.
NEEDS = {
    "transformers": (
        "reference",
        "integrations",
        "linear/test_modules.py",
        "mtp/test_*drafter*.py",
        "verification/test_filters.py",
    ),
    "yaml": ("attention/test_ops.py",),
}
collect_ignore_glob = [path for module, paths in NEEDS.items() if find_spec(module) is None for path in paths]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def patch_once():
    """Triton's interpreter patches `triton.language` again at every call of a function of a kernel: a third of the time."""
    if not environment.triton_interprets():
        yield
        return
    from triton.runtime import interpreter

    patched: set[int] = set()

    def call(function, *args, **kwargs):
        namespace = function.fn.__globals__
        if id(namespace) not in patched:
            patched.add(id(namespace))
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    before = interpreter.InterpretedFunction.__call__
    interpreter.InterpretedFunction.__call__ = call
    yield
    interpreter.InterpretedFunction.__call__ = before
