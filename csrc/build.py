"""Builds what is in this folder with ninja, or make: the modules of the package, the C library, and the programs of the tests.

    _C               the kernels for GPUs, by nvcc, with the bindings for Python
    _C_emulated      the same sources for the CPU, by g++: any machine with a C++ compiler
    library          libgemma4_kernels.so, the C interface alone, and the example that calls it
    checks           the programs of tests/cuda, plain and under two sanitizers
    counted          _C_emulated for bench/conflicts.py, which counts what kernels do to memory

setup.py builds the first two when the package is installed. By hand, into the source tree: `python csrc/build.py`. Nothing
needs torch. Environment variables: GEMMA4_CUDA=0 leaves the first out and GEMMA4_EMULATOR=0 the second, GEMMA4_NVCC names nvcc,
GEMMA4_CUDA_ARCHITECTURES ("86 89") builds for these only.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
ROOT = SOURCES.parent
KERNELS = (
    "common/status.cu",
    "linear/embedding.cu", "linear/linear.cu", "linear/weight_checks.cu", "linear/pieces.cu",
    "linear/decode_bf16.cu", "linear/decode_fp16.cu",
    "linear/decode_offsets_bf16.cu", "linear/decode_offsets_fp16.cu",
    "linear/decode_table_bf16.cu", "linear/decode_table_fp16.cu", "linear/decode_wide_bf16.cu", "linear/decode_wide_fp16.cu",
    "attention/combine.cu", "attention/flash.cu", "attention/flash_decode_bf16.cu", "attention/flash_decode_fp16.cu",
    "attention/k_eq_v.cu", "attention/k_eq_v_bf16.cu", "attention/k_eq_v_fp16.cu",
    "attention/k_eq_v_codes_bf16.cu", "attention/k_eq_v_codes_fp16.cu", "attention/prologue.cu",
    "norms/sandwich_norm.cu",
    "verification/verification.cu", "verification/tiles.cu", "verification/rows.cu", "verification/residuals.cu",
)  # fmt: skip
BINDINGS = (
    "bindings/module.cpp", "bindings/linear.cpp", "bindings/attention.cpp", "bindings/prologue.cpp", "bindings/norms.cpp",
    "bindings/verification.cpp",
)  # fmt: skip
EMULATOR = ("emulator/fiber.cpp", "emulator/runtime.cpp", "emulator/collectives.cpp", "emulator/counts.cpp")
ARCHITECTURES = ("80", "86", "89", "90", "120")
# The oldest machine code serves cards of its own major version only; newer ones (sm_100, and what comes) compile this PTX.
PTX = "90"
OLDEST_NVCC = (12, 8)  # the first that knows sm_120
_NO_NINJA = "neither ninja nor make is installed"
# "counted" is ThreadSanitizer's instrumentation with the functions of emulator/counts.cpp behind it.
COUNTED = "counted"
SANITIZERS = {"plain": (), "address": ("-fsanitize=address",), "thread": ("-fsanitize=thread",)}
_KERNEL_FLAGS = {**SANITIZERS, COUNTED: ("-fsanitize=thread", "-DGEMMA4_COUNTED")}
_MACHINERY_FLAGS = {**SANITIZERS, "thread": ("-DGEMMA4_THREAD_SANITIZER",), COUNTED: ("-DGEMMA4_COUNTED",)}
_LINK_FLAGS = {**SANITIZERS, COUNTED: ("-pie", "-ldl")}

_COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden")
# Type punning through pointers is CUDA's way and the emulator's; a contraction to fused multiply-adds would hide what a kernel
# asks for; and GCC tells ThreadSanitizer nothing of a memset or memcpy that it makes of a loop.
_EMULATED = (
    *_COMMON, "-O1", "-g", "-DGEMMA4_EMULATED", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-builtin",
    "-fno-tree-loop-distribute-patterns", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
)  # fmt: skip


@dataclass(frozen=True)
class Compiler:
    """nvcc, and where its libraries are."""

    path: Path
    library_folders: tuple[Path, ...] = ()
    version: str = ""


@dataclass
class Plan:
    """A ninja file in the making, and the same for make. Several of one folder share the objects that are the same."""

    folder: Path
    name: str
    lines: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    targets: list[Path] = field(default_factory=list)
    compiled: set[Path] = field(default_factory=set)

    def edge(self, output: Path, inputs: Iterable[Path], command: Sequence[str | Path], depfile: bool = False) -> None:
        words = " ".join(_quoted(str(word)) for word in command)
        rule = f"r{len(self.lines)}"
        self.lines.append(f"rule {rule}\n  command = {words}\n  description = {output.name}")
        if depfile:
            self.lines[-1] += f"\n  depfile = {_escaped(output)}.d\n  deps = gcc"
        self.lines.append(f"build {_escaped(output)}: {rule} {' '.join(map(_escaped, inputs))}")
        needs = " ".join(map(_for_make, inputs))
        self.rules.append(
            f"{_for_make(output)}: {needs}\n\t@echo {output.name}\n\t@{words}\n-include {_for_make(output)}.d"
        )

    def compile(self, source: str | Path, kind: str, command: Sequence[str | Path]) -> Path:
        """An object file of `source`; `kind` tells those of the same source apart."""
        source = SOURCES / source
        output = self.folder / kind / (source.name + ".o")
        if output not in self.compiled:
            self.compiled.add(output)
            output.parent.mkdir(parents=True, exist_ok=True)
            dependencies = ("-MD", "-MF", f"{output}.d")
            self.edge(output, [source], [*command, *dependencies, "-c", source, "-o", output], depfile=True)
        return output

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        ninja, make = _ninja(), shutil.which("make")
        if ninja is not None:
            file = self.folder / f"{self.name}.ninja"
            file.write_text("\n".join(self.lines) + "\n")
            command = [*ninja, "-C", self.folder, "-f", file.name, *self.targets]
        elif make is not None:
            file = self.folder / f"{self.name}.make"
            file.write_text("\n".join(self.rules) + "\n")
            command = [make, f"-j{os.cpu_count()}", "-C", self.folder, "-f", file.name, *self.targets]
        else:
            raise RuntimeError(_NO_NINJA)
        subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)


# What is here -------------------------------------------------------------------------------------------------------


def find_nvcc() -> Compiler | str:
    """nvcc, or a sentence on why there is none: named by GEMMA4_NVCC, on the PATH, in CUDA_HOME, or from PyPI's packages."""
    if os.environ.get("GEMMA4_CUDA", "").strip() == "0":
        return "GEMMA4_CUDA=0 was set"
    folders = [Path(name) for name in dict.fromkeys([*sys.path, sysconfig.get_path("purelib")]) if name]
    wheels = [folder / "nvidia" / "cu13" for folder in folders]
    candidates = [os.environ.get("GEMMA4_NVCC"), shutil.which("nvcc")]
    candidates += [f"{os.environ['CUDA_HOME']}/bin/nvcc"] if os.environ.get("CUDA_HOME") else []
    candidates += ["/usr/local/cuda/bin/nvcc", *(str(wheel / "bin" / "nvcc") for wheel in wheels)]
    problem = "no nvcc was found"
    for candidate in candidates:
        if not candidate or not os.access(candidate, os.X_OK):
            continue
        path = Path(candidate)
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        found = re.search(r"release (\d+)\.(\d+)", done.stdout)
        if not found:
            problem = f"{path} does not run"
        elif (int(found[1]), int(found[2])) < OLDEST_NVCC:
            problem = (
                f"{path} is of CUDA {found[1]}.{found[2]}, {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} is the oldest that will do"
            )
        else:
            libraries = tuple(wheel / "lib" for wheel in wheels if wheel in path.parents)
            return Compiler(path, libraries, f"{found[1]}.{found[2]}")
    return problem


def find_cxx() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def obstacles() -> dict[str, str | None]:
    """For each of the two Python modules what it needs and is not here, or None."""
    nvcc, missing = find_nvcc(), _missing_for_bindings()
    unwanted = "GEMMA4_EMULATOR=0 was set" if os.environ.get("GEMMA4_EMULATOR", "").strip() == "0" else None
    return {"_C": missing or (nvcc if isinstance(nvcc, str) else None), "_C_emulated": missing or unwanted}


def _missing_for_bindings() -> str | None:
    if find_cxx() is None:
        return "no C++ compiler was found"
    if _pybind11() is None:
        return "pybind11 is not installed, nor torch, which has its headers"
    if _ninja() is None and shutil.which("make") is None:
        return _NO_NINJA
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's own headers (Python.h) are not installed"
    return None


def _pybind11() -> Path | None:
    """The folder of its headers: its own, or, on a machine without a registry, torch's copy of them."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            if Path(place, "include", "pybind11", "pybind11.h").is_file():
                return Path(place, "include")
    return None


def _ninja() -> list[str] | None:
    if found := shutil.which("ninja"):
        return [found]
    return [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else None


def architectures() -> tuple[str, ...]:
    return tuple(os.environ.get("GEMMA4_CUDA_ARCHITECTURES", "").replace(",", " ").split()) or ARCHITECTURES


# What is built ------------------------------------------------------------------------------------------------------


def add_kernels(plan: Plan, nvcc: Compiler) -> list[Path]:
    """Objects of the C interface for GPUs. Through ccache, where there is one."""
    numbers = architectures()
    generate = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    # PTX of the newest architecture that is built and not newer than PTX says.
    ptx = max((number for number in numbers if int(number) <= int(PTX)), key=int, default=min(numbers, key=int))
    generate.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    command = [
        *_cache(), nvcc.path, "-std=c++17", "-O3", *generate, f'-DGEMMA4_ARCHITECTURES="{" ".join(numbers)}"',
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Xfatbin=-compress-all",
    ]  # fmt: skip
    return [plan.compile(source, "gpu", command) for source in KERNELS]


def add_emulated(plan: Plan, build: str = "plain") -> list[Path]:
    """Objects of the C interface for the CPU. The machinery itself is never instrumented for ThreadSanitizer."""
    kind = f"emulated-{build}"
    command = [*_cache(), _cxx(), *_EMULATED]
    kernels = [*command, *_KERNEL_FLAGS[build], '-DGEMMA4_ARCHITECTURES=""', "-x", "c++"]
    return [
        *(plan.compile(source, kind, [*command, *_MACHINERY_FLAGS[build]]) for source in EMULATOR),
        *(plan.compile(source, kind, kernels) for source in KERNELS),
    ]


def add_module(plan: Plan, name: str, objects: Sequence[Path], output: Path, link: Sequence[str | Path]) -> None:
    include = [f"-I{folder}" for folder in (_pybind11(), sysconfig.get_path("include"))]
    command = [*_cache(), _cxx(), *_COMMON, "-O1", f"-DGEMMA4_MODULE={name}", *include]
    inputs = [*(plan.compile(source, f"bindings{name}", command) for source in BINDINGS), *objects]
    plan.edge(output, inputs, [*link, "-shared", *inputs, "-o", output])
    plan.targets.append(output)


def add_library(plan: Plan, objects: Sequence[Path], link: Sequence[str | Path], name: str) -> Path:
    """The C interface as a shared library, and the example as a program that finds it beside itself."""
    library, program = plan.folder / f"lib{name}.so", plan.folder / f"{name}_example"
    plan.edge(library, objects, [*link, "-shared", *objects, "-o", library])
    source = ROOT / "examples" / "c_interface.cpp"
    header = SOURCES / "include"
    define = ["-DGEMMA4_EMULATED"] if name.endswith("emulated") else []
    plan.edge(
        program, [source, library, header / "gemma4_kernels.h"],
        [_cxx(), "-std=c++17", "-O1", "-Wall", *define, f"-I{header}", source, library, "-Wl,-rpath,$$ORIGIN", "-o", program],
    )  # fmt: skip
    plan.targets.append(program)
    return program


def link_gpu(nvcc: Compiler) -> list[str | Path]:
    # The static runtime: no libcudart has to be found, and none of another release gets in the way. Symbolic, because the two
    # modules define the same functions.
    folders = [f"-L{folder}" for folder in nvcc.library_folders]
    return [nvcc.path, "-cudart=static", *folders, "-Xlinker=--exclude-libs,ALL,-Bsymbolic"]


def link_cpu() -> list[str | Path]:
    return [_cxx(), "-Wl,--exclude-libs,ALL,-Bsymbolic"]


def modules(into: Path, folder: Path) -> dict[str, str]:
    """Build what can be built of `_C` and `_C_emulated` into a folder. Name -> "built", or why not."""
    found, nvcc = obstacles(), find_nvcc()
    plan = Plan(folder, "modules")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if found["_C"] is None and isinstance(nvcc, Compiler):
        add_module(plan, "_C", add_kernels(plan, nvcc), into / f"_C{suffix}", link_gpu(nvcc))
    if found["_C_emulated"] is None:
        add_module(plan, "_C_emulated", add_emulated(plan), into / f"_C_emulated{suffix}", link_cpu())
    if plan.targets:
        into.mkdir(parents=True, exist_ok=True)
        plan.run()
    return {name: reason or "built" for name, reason in found.items()}


def counted_module(folder: Path) -> Path:
    """Build `_C_counted` for bench/conflicts.py: the emulated module in its counted build, installed nowhere.

    Raises RuntimeError where it cannot be built.
    """
    if missing := _missing_for_bindings():
        raise RuntimeError(missing)
    plan = Plan(folder, COUNTED)
    output = folder / f"_C_counted{sysconfig.get_config_var('EXT_SUFFIX')}"
    add_module(plan, "_C_counted", add_emulated(plan, COUNTED), output, link_cpu())
    plan.run()
    return output


def library(folder: Path, emulated: bool) -> Path:
    """Build the C library and its example; the example's path. Raises RuntimeError where there is no compiler for it."""
    plan = Plan(folder, "emulated_library" if emulated else "library")
    if emulated:
        program = add_library(plan, add_emulated(plan), link_cpu(), "gemma4_kernels_emulated")
    else:
        nvcc = find_nvcc()
        if isinstance(nvcc, str):
            raise RuntimeError(nvcc)
        program = add_library(plan, add_kernels(plan, nvcc), link_gpu(nvcc), "gemma4_kernels")
    plan.run()
    return program


def checks(
    folder: Path, names: Sequence[str], builds: Sequence[str] = tuple(SANITIZERS)
) -> dict[tuple[str, str], Path]:
    """Build programs of tests/cuda on the emulator: (program, build) -> path."""
    plan, found = Plan(folder, "_".join(("checks", *names))), {}
    for build in builds:
        objects = add_emulated(plan, build)
        for name in names:
            source = ROOT / "tests" / "cuda" / f"{name}.cpp"
            main = plan.compile(source, f"emulated-{build}", [*_cache(), _cxx(), *_EMULATED, *_KERNEL_FLAGS[build]])
            found[name, build] = folder / f"{name}-{build}"
            plan.edge(
                found[name, build],
                [*objects, main],
                [_cxx(), *objects, main, *_LINK_FLAGS[build], "-o", found[name, build]],
            )
    plan.targets += found.values()
    plan.run()
    return found


def _cache() -> list[str]:
    found = shutil.which("ccache")
    return [found] if found else []


def _cxx() -> str:
    found = find_cxx()
    if found is None:
        raise RuntimeError("no C++ compiler was found")
    return found


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _for_make(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "\\ ")


def _quoted(word: str) -> str:
    """For the shell; `$$` is ninja's own dollar, and make's."""
    return word if re.fullmatch(r"[\w@%+=:,./\-]+", word) else "'" + word.replace("'", "'\\''") + "'"


if __name__ == "__main__":
    for module, said in modules(ROOT / "gemma4_kernels", ROOT / "build" / "csrc").items():
        print(f"{module}: {said}")
