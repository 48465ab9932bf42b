"""Every environment variable of the package, read here and nowhere else. docs/environment.md lists them."""

from __future__ import annotations

import os
from pathlib import Path


def requested_backend() -> str | None:
    """GEMMA4_BACKEND: the backend to use for every op; unset, empty or "auto" leaves the choice to the package."""
    value = os.environ.get("GEMMA4_BACKEND", "").strip().lower()
    return None if value in ("", "auto") else value


def triton_interprets() -> bool:
    """TRITON_INTERPRET, Triton's own variable: its kernels run on the CPU. Triton reads it when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in ("1", "true", "on", "y", "yes")


def emulates() -> bool:
    """GEMMA4_EMULATE: CUDA kernels run on the CPU, thread by thread, where the cuda backend is asked for by name."""
    return os.environ.get("GEMMA4_EMULATE", "").strip() == "1"


def emulate() -> None:
    """Set GEMMA4_EMULATE for this process."""
    os.environ["GEMMA4_EMULATE"] = "1"


def ollama_models() -> Path | None:
    """OLLAMA_MODELS: the folder where Ollama keeps its models, as Ollama itself reads it; None where it is not set."""
    value = os.environ.get("OLLAMA_MODELS", "").strip()
    return Path(value) if value else None


def packed_copies() -> bool:
    """GEMMA4_PACKED_COPIES: whether a backend may keep a second copy of a weight, packed for a library's own kernel."""
    return os.environ.get("GEMMA4_PACKED_COPIES", "").strip() != "0"
