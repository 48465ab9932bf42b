"""csrc/build.py for tests, and where its outputs go."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "csrc"

_spec = importlib.util.spec_from_file_location("gemma4_kernels_build", ROOT / "csrc" / "build.py")
assert _spec is not None
assert _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = build
_spec.loader.exec_module(build)


def skip_without_compiler() -> None:
    if build.find_cxx() is None:
        pytest.skip("no C++ compiler", allow_module_level=True)
    if build._ninja() is None and build.shutil.which("make") is None:
        pytest.skip("neither ninja nor make", allow_module_level=True)
