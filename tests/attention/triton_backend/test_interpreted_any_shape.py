"""Shapes, strides, masks, lengths and rotated pairs that nobody thought of, in Triton's interpreter."""

from __future__ import annotations

import pytest

from gemma4_kernels import environment, use_backend

pytest.importorskip("triton")
pytest.importorskip("hypothesis")
if not environment.triton_interprets():
    pytest.skip("needs TRITON_INTERPRET=1; `make test` runs it in a second process", allow_module_level=True)

import any_shape
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("check", any_shape.CHECKS, ids=lambda check: check.__name__)
def test_any_shape(check):
    @settings(derandomize=True, max_examples=20)
    @given(data=st.data())
    def run(data):
        with use_backend("triton"):
            check(data)

    run()
