"""Every environment variable of the package, read here and nowhere else. docs/environment.md lists them."""

from __future__ import annotations

import os


def requested_backend() -> str | None:
    """GEMMA4_BACKEND: the backend to use for every op; unset, empty or "auto" leaves the choice to the package."""
    value = os.environ.get("GEMMA4_BACKEND", "").strip().lower()
    return None if value in ("", "auto") else value
