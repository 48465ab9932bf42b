"""csrc/build.py where ninja or pybind11 are missing."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from cuda_build import build


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_does_what_ninja_would(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_ninja", lambda: None)
    source, between, result = (tmp_path / name for name in ("a source", "between", "a result"))
    source.write_text("one")
    plan = build.Plan(tmp_path / "plan", "copies")
    plan.edge(between, [source], ["cp", source, between])
    plan.edge(result, [between], ["cp", between, result])
    plan.targets.append(result)
    plan.run()
    assert result.read_text() == "one"
    between.write_text("two")  # newer than what was made of it
    plan.run()
    assert result.read_text() == "two"


def test_without_either_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_ninja", lambda: None)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="neither ninja nor make is installed"):
        build.Plan(tmp_path, "nothing").run()


def test_headers_of_pybind11_may_be_torchs(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None if name == "pybind11" else real(name))
    assert build._pybind11() == Path(torch.__file__).parent / "include"
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert build._pybind11() is None
