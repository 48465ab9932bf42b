"""The build. Everything declarative is in pyproject.toml; here the compiled modules are made, where there are compilers.

csrc/build.py knows how. Where it cannot build a module, the package installs without it, and `gemma4-kernels info` and
`explain` say what is missing.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _builder():
    spec = importlib.util.spec_from_file_location("gemma4_kernels_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildModules(build_ext):
    """Both modules in one run of ninja, straight into the place where setuptools wants them."""

    def run(self):
        into = ROOT / "gemma4_kernels" if self.inplace else Path(self.build_lib).resolve() / "gemma4_kernels"
        for name, said in builder.modules(into, ROOT / "build" / "csrc").items():
            self.announce(f"gemma4_kernels.{name}: {said}", level=3)

    def get_outputs(self):
        return [str(path) for path in (Path(self.build_lib) / "gemma4_kernels").glob("_C*.so")]

    def get_output_mapping(self):
        return {}


builder = _builder()
# Without modules the wheel serves every machine; with one it is for this platform, which setuptools tells by the extensions.
names = [f"gemma4_kernels.{name}" for name, obstacle in builder.obstacles().items() if obstacle is None]
setup(ext_modules=[Extension(name, []) for name in names], cmdclass={"build_ext": BuildModules})
