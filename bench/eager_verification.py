"""The eager backend's verification against what one writes in PyTorch and against transformers, on this CPU, in one run.

    python -m gemma4_kernels.bench.eager_verification [--pairs N]

CPU timings are noisy; each pair is taken back to back, and the median of the ratios is what counts. All four drafts are
right, so every row is sampled.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from gemma4_kernels import use_backend
from gemma4_kernels.bench.cases import parse
from gemma4_kernels.bench.eager_attention import compare
from gemma4_kernels.geometry import GEMMA4_12B

# Gemma's own settings, for one request and for four; then what leaves more of a row to look at.
RECOMMENDED = "top_k=64,top_p=0.95"
CALLS = (
    f"k=4,acceptance=1.0,{RECOMMENDED}", f"b=4,k=4,acceptance=1.0,{RECOMMENDED}", "k=4,acceptance=1.0",
    "k=4,acceptance=1.0,top_p=0.95", "k=4,acceptance=1.0,min_p=0.05", "k=4,acceptance=1.0,temperature=0.0",
    f"k=4,acceptance=0.9,{RECOMMENDED},method=rejection",
)  # fmt: skip
NAMES = {"softmax": "softmax and sort", "transformers": "transformers"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Eager verification against PyTorch and transformers on this CPU.")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of timings for each comparison (default 5)")
    pairs = parser.parse_args().pairs
    v = GEMMA4_12B.vocab_size
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bfloat16, {pairs} pairs, median")
    with torch.inference_mode(), use_backend("eager"):
        for call in CALLS:
            verification(f"verify_drafts(v={v},{call})", pairs)


def verification(text: str, pairs: int) -> None:
    """One call of `verify_drafts`, against each baseline that is there."""
    case = parse(text)
    made: dict[str, Any] = case.inputs()
    print(f"\n{text}")

    def ours() -> Tensor:
        tokens: Tensor = case.run(made)[0]
        return tokens

    found = case.baselines(made)
    for name, title in NAMES.items():
        theirs = found[name]
        if isinstance(theirs, str):
            print(f"  {title}: {theirs}")
        else:
            compare(title, ours, theirs, pairs)


if __name__ == "__main__":
    main()
