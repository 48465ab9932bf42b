#!/usr/bin/env python3
"""Everything that one wants to know of a machine with a GPU, in one command and without a network: `make gpu-check`.

Uses the Python that runs it, with whatever torch is there. Each stage goes on after a failure and says so; a short table
ends the output. Logs of all stages lie in build/gpu-check/.

Exit status: 0 every stage passed; 1 at least one failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu-check"
COMMAND = [sys.executable, "-m", "gemma4_kernels"]

# Short: the sanitizers slow a kernel down by two or three orders of magnitude. A case of each op, kind of layer and layout of
# codes, some long enough for several blocks to share a row; all but the first go to the compiled kernels too.
SANITIZED = (
    "flash_attn_func(sq=33,sk=65,hq=4,hkv=2,scale=0.0625)",
    "flash_attn_func(sq=5,sk=70,hq=4,hkv=2,left=31,right=0)",
    "flash_attn_func(sq=16,sk=300,hq=4,hkv=2,right=0)",
    "flash_attn_varlen_func(hq=4,hkv=2,left=31,right=0,lengths=1:1+7:7+5:40,page=16)",
    "flash_attn_with_kvcache(sq=5,hq=4,hkv=2,left=31,right=0,lengths=5+7+40,page=16,new=5)",
    "k_eq_v_attention(sq=5,sk=65,hkv=1,d=512)",
    "k_eq_v_attention(sq=5,hkv=1,d=512,lengths=5+7+300,page=16)",
    "k_eq_v_attention(sq=5,hkv=1,d=512,lengths=5+7+130,page=16,cache=fp8)",
    "k_eq_v_attention(sk=130,hkv=1,d=512,cache=int8)",
    "quantized_linear(m=5,n=70,k=416)",
    "quantized_linear(m=16,n=70,k=768,scheme=Q4_K)",
    "quantized_linear(m=5,n=70,k=768,scheme=Q5_K)",
    "quantized_linear(n=70,k=768,scheme=Q6_K)",
    "quantized_linear(m=16,n=70,k=416,scheme=Q8_0)",
    "quantized_linear(m=5,n=70,k=512,scheme=NF4)",
    "quantized_geglu(m=5,n=70,k=416)",
    "quantized_argmax(m=5,n=999,k=416)",
    "sandwich_norm(m=5,n=3840,scalar=1)",
    "verify_drafts(b=3,v=1003,temperature=0.0)",
    "verify_drafts(b=2,v=5003,top_k=64,top_p=0.95)",
    "verify_drafts(b=2,v=1003,top_k=64,method=rejection,acceptance=0.9)",
    "verify_drafts(b=2,v=1003,min_p=0.05,method=block,acceptance=0.9)",
    "sample_tokens(b=2,v=5003,top_p=0.9)",
)
# What stands in front of attention changes caches and has no cases: its tests run under the sanitizers instead. Not those that
# capture a graph, during which no memory can be allocated without torch's pool.
SANITIZED_TESTS = ROOT / "tests" / "attention" / "test_prologue_cuda_gpu.py"
SANITIZERS = ("memcheck", "racecheck", "synccheck")


@dataclass(frozen=True)
class Stage:
    """Commands that are run in order; the stage fails if one does, or if a tool that it needs is missing."""

    name: str
    commands: Sequence[Sequence[str]]
    tool: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    what_exit_codes_mean: dict[int, str] = field(default_factory=dict)
    skip: Callable[[], str | None] = lambda: None
    """Why there is nothing to do, or None."""


@dataclass(frozen=True)
class Outcome:
    name: str
    passed: bool
    seconds: float
    sentence: str


def stages(device: str, record: Path) -> list[Stage]:
    only = [part for case in SANITIZED for part in ("--only", case)]
    kernels = ["--backend", "cuda", "--backend", "triton"]
    validate = [*COMMAND, "validate", "--device", device]
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    tests = [*pytest, "-k", "not graph", str(SANITIZED_TESTS)]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--editable",
        str(ROOT),
    ]
    no_gpu = "raise SystemExit(0 if torch.cuda.is_available() else 'torch sees no GPU')"
    return [
        Stage("device", [[sys.executable, "-c", f"import torch; print(torch.__version__); {no_gpu}"]],
            what_exit_codes_mean={1: "torch is missing or sees no GPU"},
        ),
        # Without modules, which are built next: whatever stops a compiler, Triton's and PyTorch's kernels are still checked.
        Stage(
            "install", [pip], environment={"GEMMA4_CUDA": "0", "GEMMA4_EMULATOR": "0"}, skip=_installed_from_here
        ),
        Stage(
            "compiled kernels", [[sys.executable, str(ROOT / "scripts" / "gpu_modules.py"), device]],
            what_exit_codes_mean={1: "no compiled kernels for this card; what follows checks Triton's and PyTorch's"},
        ),
        Stage("info", [[*COMMAND, "info"]]),
        Stage(
            "gpu tests",
            [[*pytest, "--continue-on-collection-errors", str(ROOT / "tests")]],
            what_exit_codes_mean={1: "a test failed, or pytest is missing", 2: "collection failed", 5: "no test is marked gpu"},
        ),
        Stage(
            "validate --full", [[*validate, "--full"]],
            what_exit_codes_mean={1: "a kernel breaks the rule", 2: "no such device", 3: "nothing was checked"},
        ),
        Stage(
            "compute-sanitizer",
            [
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", *checked]
                for checked in ([*validate, *kernels, *only], tests)
                for tool in SANITIZERS
            ],
            tool="compute-sanitizer",
            # torch's own pool would hide a read beyond one tensor that lands in the next.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            what_exit_codes_mean={99: "the sanitizer found an error", 1: "a kernel breaks the rule, or a test failed",
                                  3: "nothing was checked"},
        ),
        Stage(
            "bench", [[*COMMAND, "bench", "--device", device, "--save", str(record)]],
            what_exit_codes_mean={1: "a kernel failed its validation", 2: "no such device, or the record was not written"},
        ),
    ]  # fmt: skip


def run(stage: Stage, number: int) -> Outcome:
    print(f"\n== {stage.name}", flush=True)
    start = time.monotonic()

    def outcome(passed: bool, sentence: str) -> Outcome:
        print(f"== {stage.name}: {'passed' if passed else 'FAILED'}{', ' + sentence if sentence else ''}", flush=True)
        return Outcome(stage.name, passed, time.monotonic() - start, sentence)

    if reason := stage.skip():
        return outcome(True, reason)
    if stage.tool and shutil.which(stage.tool) is None:
        return outcome(False, f"{stage.tool} is not installed or not on the PATH")
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{number}-{re.sub(r'[^a-z]+', '-', stage.name.lower()).strip('-')}.log"
    with log.open("w", encoding="utf-8") as file:
        for command in stage.commands:
            code = _run_into(command, {**os.environ, **stage.environment}, file.write)
            if code:
                meaning = stage.what_exit_codes_mean.get(code, f"exit status {code}")
                return outcome(False, f"{meaning}: see {log.relative_to(ROOT)}")
    return outcome(True, "")


def table(outcomes: Sequence[Outcome]) -> str:
    width = max(len(outcome.name) for outcome in outcomes)
    return "\n".join(
        f"{o.name:<{width}}  {'passed' if o.passed else 'FAILED'}  {o.seconds:6.0f} s  {o.sentence}".rstrip()
        for o in outcomes
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check this machine's GPU; see docs/validating-a-gpu.md.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--record", type=Path, help="by default bench/records/<gpu>.json")
    parsed = parser.parse_args(arguments)
    record = parsed.record or ROOT / "bench" / "records" / f"{_card()}.json"
    outcomes = [run(stage, number) for number, stage in enumerate(stages(parsed.device, record), start=1)]
    print(f"\n{table(outcomes)}")
    if outcomes[-1].passed:
        print(f"\nrecord: {os.path.relpath(record, ROOT)}; bench/records/README.md says how to submit it")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _card() -> str:
    """The card's name as a file name."""
    code = "import torch; print(torch.cuda.get_device_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    name = done.stdout.strip() if done.returncode == 0 else "unknown"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "").replace("geforce", "")).strip("-") or "unknown"


def _installed_from_here() -> str | None:
    """An editable install of this checkout is up to date."""
    code = "import gemma4_kernels, gemma4_kernels.bench; print(gemma4_kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    here = done.returncode == 0 and Path(done.stdout.strip()).resolve().is_relative_to(ROOT)
    return "this checkout is installed already" if here else None


def _run_into(command: Sequence[str], environment: dict[str, str], write: Callable[[str], object]) -> int:
    """Run a command, its output here and in the log."""
    write(f"$ {' '.join(command)}\n")
    try:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            cwd=ROOT,
        )
    except OSError as error:
        print(error, flush=True)
        write(f"{error}\n")
        return 127
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        write(line)
    return process.wait()


if __name__ == "__main__":
    raise SystemExit(main())
