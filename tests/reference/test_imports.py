"""The oracle stands on torch and the geometry alone: what it is held against cannot have leaked into it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from gemma4_kernels import reference

FILES = sorted(Path(reference.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_torch_and_the_geometry_are_imported(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [node.module or ""]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            top = module.partition(".")[0]
            own = module == "gemma4_kernels.geometry" or module.startswith("gemma4_kernels.reference.")
            assert own or top == "torch" or top in sys.stdlib_module_names, module


def test_every_public_name_exists_and_is_documented() -> None:
    for name in reference.__all__:
        value = getattr(reference, name)
        if callable(value):
            assert value.__doc__, name
