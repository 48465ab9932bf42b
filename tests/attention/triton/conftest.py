"""Two kinds of tests live here. Without TRITON_INTERPRET kernels are compiled, for cards that are not here; with it they run
on the CPU, in NumPy. Triton decides when it is imported, so each kind needs a process of its own: `make test` starts both.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from gemma4_kernels import environment

INTERPRETED = environment.triton_interprets()


def pytest_collection_modifyitems(items):
    for item in items:
        if "attention/triton/" not in str(item.path):
            continue
        wants = item.path.name.startswith("test_interpreted")
        if wants and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1; `make test` runs it in a second process"))
        if not wants and INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="compiles kernels, which TRITON_INTERPRET=1 prevents"))


@pytest.fixture(autouse=True, scope="session")
def patch_once():
    """Triton's interpreter patches `triton.language` again at every call of a function of a kernel: a third of the time."""
    if not INTERPRETED:
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
