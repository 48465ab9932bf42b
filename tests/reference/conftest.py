"""Models that several test files share; none of them is changed by a test."""

from __future__ import annotations

from typing import Any

import pytest
import small_models as helpers

from gemma4_kernels.reference import ReferenceDrafter, ReferenceModel


@pytest.fixture(scope="session")
def hf_text() -> Any:
    return helpers.text_model()


@pytest.fixture(scope="session")
def text(hf_text: Any) -> ReferenceModel:
    return ReferenceModel.from_transformers(hf_text)


@pytest.fixture(scope="session")
def hf_multimodal() -> Any:
    return helpers.multimodal_model()


@pytest.fixture(scope="session")
def multimodal(hf_multimodal: Any) -> ReferenceModel:
    return ReferenceModel.from_transformers(hf_multimodal)


@pytest.fixture(scope="session")
def hf_mtp() -> tuple[Any, Any]:
    """A target and its drafter."""
    return helpers.mtp_pair()


@pytest.fixture(scope="session")
def drafter(hf_mtp: tuple[Any, Any]) -> ReferenceDrafter:
    return ReferenceDrafter.from_transformers(hf_mtp[1])
