"""Two kinds of tests live here. Without TRITON_INTERPRET kernels are compiled, for cards that are not here; with it they run
on the CPU, in NumPy: test_interpreted_*.py. Triton decides when it is imported, so each kind has a process of its own:
`make test` starts both.
"""

from __future__ import annotations

import pytest

from gemma4_kernels import environment


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
