"""What machine this is, as far as it can be found out, and nothing about whose it is.

Everything that cannot be found out is None with a reason beside it. No host name, user name or path is ever read.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from gemma4_kernels._version import __version__

# Where a last-level cache cannot be found out: larger than most, since too many buffers cost memory, too few the truth.
UNKNOWN_CACHE_BYTES = 32 << 20
_SMI_FIELDS = {
    "driver": "driver_version", "sm_clock_mhz": "clocks.sm", "memory_clock_mhz": "clocks.mem",
    "max_sm_clock_mhz": "clocks.max.sm", "power_limit_w": "power.limit", "temperature_c": "temperature.gpu",
}  # fmt: skip


def default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def known_device(text: str) -> torch.device:
    """The device of a command-line argument. Raises ValueError where this machine has no such device."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {text!r}") from None
    here = device.type == "cpu"
    if device.type == "cuda":
        here = (device.index or 0) < torch.cuda.device_count()
    elif device.type == "mps":
        here = torch.backends.mps.is_available()
    if not here:
        raise ValueError(f"this machine has no device {text!r} that this build of torch can use")
    return device


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """The card's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or "Apple GPU"
    return _processor()


def device_memory(device: torch.device) -> int | None:
    """Bytes of a card's own memory; None where memory is the host's."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def answers(device: torch.device) -> bool:
    """Whether the device still works: an illegal access by a kernel breaks it for the rest of the process."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def free_memory(device: torch.device) -> int | None:
    """Bytes that a program may still allocate; None if nobody says."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        # What torch has taken from the driver and does not use is free as well.
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: L2 of a GPU, L3 of a CPU."""
    if device.type == "cuda":
        found = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
    else:
        found = _cpu_cache_bytes()
    return found or UNKNOWN_CACHE_BYTES


def describe(device: torch.device) -> dict[str, Any]:
    """The `machine` part of a record."""
    smi, reason = _nvidia_smi(device)
    memory = device_memory(device)
    found: dict[str, Any] = {
        "device": device.type,
        "name": device_name(device),
        "architecture": _architecture(device),
        "memory_gib": None if memory is None else round(memory / 2**30, 1),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "package": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    found.update(smi)
    found["unknown_because"] = reason
    return found


def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that this package runs from; None where it runs from no checkout."""
    root = str(Path(__file__).resolve().parents[1])
    top = _output(["git", "-C", root, "rev-parse", "--show-toplevel"])
    commit = _output(["git", "-C", root, "rev-parse", "HEAD"])
    if not commit or not top or Path(top).resolve() != Path(root):
        return {"commit": None, "dirty": None}
    # A record that is being written is no change of the code that it describes.
    changes = _output(["git", "-C", root, "status", "--porcelain", "--", ".", ":(exclude)bench/records/*.json"])
    return {"commit": commit, "dirty": changes is None or bool(changes)}


def _architecture(device: torch.device) -> str:
    from gemma4_kernels.backends import architecture_of

    return architecture_of(device)


def _nvidia_smi(device: torch.device) -> tuple[dict[str, Any], str | None]:
    """Driver, clocks, power limit and temperature, or nulls and the reason."""
    nothing: dict[str, Any] = dict.fromkeys(_SMI_FIELDS)
    if device.type != "cuda":
        return nothing, f"{device.type} has no nvidia-smi"
    if shutil.which("nvidia-smi") is None:
        return nothing, "nvidia-smi is not installed"
    query = [f"--query-gpu={','.join(_SMI_FIELDS.values())}", "--format=csv,noheader,nounits"]
    # By its own identity: torch numbers devices differently from nvidia-smi where CUDA_VISIBLE_DEVICES is set.
    identity = str(getattr(torch.cuda.get_device_properties(device), "uuid", "") or device.index or 0)
    identity = identity if identity.startswith("GPU-") or identity.isdigit() else f"GPU-{identity}"
    line = _output(["nvidia-smi", "-i", identity, *query])
    if not line:
        return nothing, "nvidia-smi gave no answer"
    values: dict[str, Any] = dict(
        zip(_SMI_FIELDS, (part.strip() for part in line.splitlines()[0].split(",")), strict=False)
    )
    numbers = {name: value if name == "driver" else _number(value) for name, value in values.items()}
    absent = [name for name in _SMI_FIELDS if numbers.get(name) is None]
    return {**nothing, **numbers}, f"nvidia-smi does not say: {', '.join(absent)}" if absent else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]", "[Not Supported]"
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cpu_cache_bytes() -> int:
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text().strip()
            largest = max(largest, int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return largest


def _version(library: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    """What a program prints, or None where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, env={**os.environ, "LC_ALL": "C"}
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
