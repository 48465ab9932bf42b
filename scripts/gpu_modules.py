#!/usr/bin/env python3
"""Build the compiled kernels for this machine's card, into the source tree, and say whether they serve it.

A stage of gpu_check.py; by itself: `python scripts/gpu_modules.py cuda`. Machine code for this card only, unless
GEMMA4_CUDA_ARCHITECTURES says otherwise, and no emulator. The package has to be importable.

Exit status: 0 they serve it; 1 they could not be built, or not for this card: the last line says why.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(name: str) -> str | None:
    """None, or why there are no compiled kernels."""
    sys.path.insert(0, str(ROOT / "csrc"))
    import torch

    import build
    from gemma4_kernels import backends
    from gemma4_kernels.cuda_common import support

    device = torch.device(name)
    call = backends.Call("any", device_type=device.type, architecture=backends.architecture_of(device))
    number = call.architecture.removeprefix("sm_")
    if number in build.ARCHITECTURES:
        os.environ.setdefault("GEMMA4_CUDA_ARCHITECTURES", number)
    os.environ["GEMMA4_EMULATOR"] = "0"
    try:
        said = build.modules(ROOT / "gemma4_kernels", ROOT / "build" / "csrc")["_C"]
    except subprocess.CalledProcessError:
        return "_C could not be built: the compiler's words are above"
    if said != "built":
        return f"_C cannot be built here: {said}"
    importlib.invalidate_caches()
    print(f"_C: {support.describe()['_C']}")
    return support.refuses(call)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
