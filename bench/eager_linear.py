"""The eager backend's quantised product against dense bf16 and against making the whole weight, on this CPU, in one run.

    python -m gemma4_kernels.bench.eager_linear [--pairs N]

CPU timings are noisy; each pair is taken back to back, and the median of the ratios is what counts.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from gemma4_kernels import QuantizedWeight, quantized_linear, use_backend
from gemma4_kernels.bench import inputs as draw
from gemma4_kernels.bench.eager_attention import compare
from gemma4_kernels.bench.linear_inputs import random_weight
from gemma4_kernels.geometry import GEMMA4_12B

# W4A16 has bf16 scales here, which PyTorch's own 4-bit kernel takes in one pass, Q4_0 fp16 scales, which cost it two, and
# Q4_K is made a few rows at a time.
SCHEMES = ("W4A16", "Q4_0", "Q4_K")
ROWS = (1, 5, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description="Eager quantised products against dense ones on this CPU.")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of timings for each comparison (default 5)")
    pairs = parser.parse_args().pairs
    N, K = GEMMA4_12B.intermediate_size, GEMMA4_12B.hidden_size
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, x in bfloat16, {pairs} pairs, median")
    with torch.inference_mode(), use_backend("eager"):
        for number, scheme in enumerate(SCHEMES):
            weight = random_weight(scheme, (N, K), seed=number)
            dense = weight.dequantize(torch.bfloat16)
            for rows in ROWS:
                x = torch.randn(rows, K, generator=draw.generator(rows)).to(torch.bfloat16)
                print(f"\n{scheme} {N} x {K}, {rows} rows")
                ours = partial(quantized_linear, x, weight)
                compare("dense bf16", ours, partial(linear, x, dense), 3 * pairs)
                compare("dequantise, then dense", ours, partial(_dequantise_first, x, weight), pairs)


def _dequantise_first(x: Tensor, weight: QuantizedWeight) -> Tensor:
    return linear(x, weight.dequantize(x.dtype))


if __name__ == "__main__":
    main()
