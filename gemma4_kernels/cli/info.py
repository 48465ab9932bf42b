"""`gemma4-kernels info`: versions, devices, and which backend serves which op on each device, with every refusal's reason.

It must answer on any machine: whatever cannot be found out becomes a sentence in its place. With --model it shows what is in a
file of weights instead, with --plan the memory that a model takes.

Exit status: 0; 1 where the model cannot be read or planned.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

import torch

from gemma4_kernels import backends, environment
from gemma4_kernels._version import __version__
from gemma4_kernels.cli import model_info, plan_info
from gemma4_kernels.cuda_common import support as cuda_support

LIBRARIES = ("torch", "numpy", "triton", "transformers", "gguf")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("info", help="versions, devices, and which backend serves what, and why")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--model", metavar="MODEL",
        help="show what is in a GGUF file, a safetensors file or folder, ollama:NAME:TAG or lmstudio:PUBLISHER/MODEL",
    )  # fmt: skip
    plan_info.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.plan is not None:
        return _run_shown(plan_info, arguments, arguments.json)
    if stray := plan_info.stray_options(arguments):
        print(f"gemma4-kernels info: {stray} goes with --plan", file=sys.stderr)
        return 1
    if arguments.model is not None:
        return _run_shown(model_info, arguments.model, arguments.json)
    found = collect()
    print(json.dumps(found, indent=2) if arguments.json else render(found))
    return 0


def _run_shown(module: Any, wanted: Any, as_json: bool) -> int:
    try:
        found = module.collect(wanted)
    except (OSError, ValueError) as error:
        print(model_info.plain(f"gemma4-kernels info: {error}"), file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2) if as_json else module.render(found))
    return 0


def collect() -> dict[str, Any]:
    """All that `info` shows, as plain data."""
    devices, problems = _devices()
    return {
        "gemma4_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "compiled_modules": cuda_support.describe(),
        "torch_cuda_build": torch.version.cuda or "none",
        "environment": {"GEMMA4_BACKEND": environment.requested_backend() or "auto"},
        "devices": devices,
        "problems": problems,
        "ops": {op: {device["name"]: _choices(op, device) for device in devices} for op in backends.ops()},
    }


def render(found: dict[str, Any]) -> str:
    lines = [f"gemma4_kernels {found['gemma4_kernels']}, Python {found['python']}, {found['platform']}", ""]
    rows = [(name, version) for name, version in found["libraries"].items()]
    rows += list(found["compiled_modules"].items())
    rows += [(name, value) for name, value in found["environment"].items()]
    width = max(len(name) for name, _ in rows)
    lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    lines += ["", "Devices"]
    lines += [f"  {device['name']}: {device['detail']}" for device in found["devices"]]
    lines += [f"  {problem}" for problem in found["problems"]]
    for op, by_device in found["ops"].items():
        lines += ["", op]
        for device, choices in by_device.items():
            lines.append(f"  on {device}")
            lines += [
                f"    {'->' if choice['taken'] else '  '} {choice['backend']:<7} {choice['reason']}"
                for choice in choices
            ]
    return "\n".join(lines)


def _version(library: str) -> str:
    """What is installed, without importing it: a broken installation must not break `info`."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    except Exception as error:
        return f"unknown ({_sentence(error)})"


def _devices() -> tuple[list[dict[str, str]], list[str]]:
    """The devices, and a sentence for each kind that could not be listed."""
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    devices = [{"name": "cpu", "device_type": "cpu", "architecture": "cpu", "detail": cpu}]
    problems = []
    for kind, look in (("cuda", _cuda_devices), ("mps", _mps_devices)):
        try:
            devices += look()
        except Exception as error:  # a driver may fail in any way it likes
            problems.append(f"{kind} devices could not be listed: {_sentence(error)}")
    return devices, problems


def _cuda_devices() -> list[dict[str, str]]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        architecture = f"sm_{properties.major}{properties.minor}"
        detail = (
            f"{properties.name}, {architecture}, {properties.total_memory / 2**30:.1f} GiB, "
            f"{properties.multi_processor_count} SMs"
        )
        found.append({"name": f"cuda:{index}", "device_type": "cuda", "architecture": architecture, "detail": detail})
    return found


def _mps_devices() -> list[dict[str, str]]:
    if not torch.backends.mps.is_available():
        return []
    return [{"name": "mps", "device_type": "mps", "architecture": "mps", "detail": "Apple GPU"}]


def _choices(op: str, device: dict[str, str]) -> list[dict[str, Any]]:
    try:
        explanation = backends.explain(
            op, device_type=device["device_type"], architecture=device["architecture"], dtype=torch.bfloat16
        )
    except Exception as error:
        return [{"backend": "all", "taken": False, "reason": _sentence(error)}]
    return [vars(choice) for choice in explanation.choices]


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
