"""Shapes, strides, masks and lengths that nobody thought of."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")
import any_shape
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("check", any_shape.CHECKS, ids=lambda check: check.__name__)
def test_any_shape(check):
    given(data=st.data())(check)()
