"""What data sheets promise of common cards: bandwidth, dense bf16 rate, SMs, clock and tensor cores, each with its source.

Bandwidth and rate stand in a second column beside the ceilings measured on the card; `static` predicts from all of them what
binds a kernel that no card has run yet. They stand nowhere else. A card that is not listed, or whose name does not tell its
variants apart, is "unknown".

Rates are dense (no sparsity) with fp32 accumulation, TFLOP/s; bandwidths GB/s; clocks GHz. A GeForce rate that no paper
states is the product behind it: SMs x 2 x 256 multiply-accumulates per SM and clock x boost clock.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

# Multiply-accumulates that the tensor cores of one SM do in a clock, dense. Kinds as in `sass.matrix_macs`: "bf16" is any
# 16-bit float summed in fp32.
TensorRates = Mapping[str, int]

# GA102, Ada and RTX Blackwell whitepapers: the ratios of the printed peaks are the same in all three (fp8 since Ada), and the
# bf16 peak is 512 operations per SM and clock.
_GEFORCE: TensorRates = {"bf16": 256, "fp16 sums": 512, "tf32": 128, "fp8": 512, "int8": 1024}
# A100 whitepaper, table "Comparison of NVIDIA Data Center GPUs": 1024 FMA of fp16 per SM and clock.
_A100: TensorRates = {"bf16": 1024, "fp16 sums": 1024, "tf32": 512, "int8": 2048, "fp64": 64}
# H100 whitepaper: twice an A100's SM at the same clock. Only wgmma (HGMMA) is promised that rate.
_H100: TensorRates = {"bf16": 2048, "fp16 sums": 2048, "tf32": 1024, "fp8": 4096, "int8": 4096, "fp64": 128}


class Card(NamedTuple):
    bandwidth: float | None
    rate: float | None
    source: str
    min_memory_gib: float = 0.0
    """A smaller card of the same name is another card."""
    architecture: str | None = None
    sms: int | None = None
    clock: float | None = None
    """Boost clock; for a data-centre card the clock behind its printed rate."""
    tensor: TensorRates | None = None


def _geforce(
    bandwidth: float, architecture: str, sms: int, clock: float, source: str,
    rate: float | None = None, min_memory_gib: float = 0.0,
) -> Card:  # fmt: skip
    if rate is None:
        rate = round(sms * 2 * _GEFORCE["bf16"] * clock / 1e3, 1)
        source = f"{source}; rate computed: {sms} SMs x {2 * _GEFORCE['bf16']} x {clock} GHz"
    return Card(bandwidth, rate, source, min_memory_gib, architecture, sms, clock, _GEFORCE)


def _data_centre(bandwidth: float, rate: float, architecture: str, sms: int, tensor: TensorRates, source: str) -> Card:
    clock = round(rate * 1e3 / (sms * 2 * tensor["bf16"]), 3)
    return Card(bandwidth, rate, source, 0.0, architecture, sms, clock, tensor)


_AMPERE = "NVIDIA, GeForce RTX 30 series specifications and GA102 whitepaper"
_ADA = "NVIDIA, GeForce RTX 40 series specifications and Ada whitepaper"
_BLACKWELL = "NVIDIA, GeForce RTX 50 series specifications and RTX Blackwell whitepaper"
_RTX_3090 = "NVIDIA GA102 whitepaper, table of GeForce RTX 3090"
_RTX_4090 = "NVIDIA Ada whitepaper, table of GeForce RTX 4090"
_RTX_5090 = "NVIDIA RTX Blackwell whitepaper, table of GeForce RTX 5090"
_SPARSE = "the rate printed there is twice this, with sparsity"
_APPLE = "Apple, technical specifications and chip announcement"
_VARIANTS = "the name covers variants with different memory"

CARDS: dict[str, Card] = {
    "rtx 3060": _geforce(360.0, "sm_86", 28, 1.777, f"{_AMPERE} (12 GB)", min_memory_gib=10.0),
    "rtx 3060 laptop gpu": _geforce(336.0, "sm_86", 30, 1.703, f"{_AMPERE}, highest boost clock of the laptop range"),
    "rtx 3090": _geforce(936.0, "sm_86", 82, 1.695, f"{_RTX_3090}: peak bf16 with fp32 accumulate", rate=71.0),
    "rtx 4060": _geforce(272.0, "sm_89", 24, 2.46, _ADA),
    "rtx 4060 laptop gpu": _geforce(256.0, "sm_89", 24, 2.37, f"{_ADA}, highest boost clock of the laptop range"),
    "rtx 4060 ti": _geforce(288.0, "sm_89", 34, 2.535, _ADA),
    "rtx 4070": _geforce(504.0, "sm_89", 46, 2.475, f"{_ADA} (GDDR6X)"),
    "rtx 4090": _geforce(1008.0, "sm_89", 128, 2.52, f"{_RTX_4090}: peak bf16 with fp32 accumulate", rate=165.2),
    "rtx 5060": _geforce(448.0, "sm_120", 30, 2.497, _BLACKWELL),
    "rtx 5060 ti": _geforce(448.0, "sm_120", 36, 2.572, _BLACKWELL),
    "rtx 5070": _geforce(672.0, "sm_120", 48, 2.512, _BLACKWELL),
    "rtx 5070 ti": _geforce(896.0, "sm_120", 70, 2.452, _BLACKWELL),
    "rtx 5080": _geforce(960.0, "sm_120", 84, 2.617, _BLACKWELL),
    "rtx 5090": _geforce(1792.0, "sm_120", 170, 2.407, f"{_RTX_5090}: peak bf16, fp32 accumulate", rate=209.5),
    "a100-pcie-40gb": _data_centre(1555.0, 312.0, "sm_80", 108, _A100, "NVIDIA A100 data sheet, 40 GB PCIe"),
    "a100-sxm4-40gb": _data_centre(1555.0, 312.0, "sm_80", 108, _A100, "NVIDIA A100 data sheet, 40 GB SXM"),
    "a100 80gb pcie": _data_centre(1935.0, 312.0, "sm_80", 108, _A100, "NVIDIA A100 data sheet, 80 GB PCIe"),
    "a100-sxm4-80gb": _data_centre(2039.0, 312.0, "sm_80", 108, _A100, "NVIDIA A100 data sheet, 80 GB SXM"),
    "h100 80gb hbm3": _data_centre(3350.0, 989.0, "sm_90", 132, _H100, f"NVIDIA H100 data sheet, SXM ({_SPARSE})"),
    "h100 pcie": _data_centre(2000.0, 756.0, "sm_90", 114, _H100, f"NVIDIA H100 data sheet, PCIe ({_SPARSE})"),
    "h200": _data_centre(4800.0, 989.0, "sm_90", 132, _H100, f"NVIDIA H200 data sheet, SXM ({_SPARSE})"),
    # Apple prints bandwidths, and no bf16 rate of any of these GPUs.
    "apple m1": Card(68.25, None, f"{_APPLE} of M1: LPDDR4X-4266, 128 bits"),
    "apple m1 pro": Card(200.0, None, _APPLE),
    "apple m1 max": Card(400.0, None, _APPLE),
    "apple m1 ultra": Card(800.0, None, _APPLE),
    "apple m2": Card(100.0, None, _APPLE),
    "apple m2 pro": Card(200.0, None, _APPLE),
    "apple m2 max": Card(400.0, None, _APPLE),
    "apple m2 ultra": Card(800.0, None, _APPLE),
    "apple m3": Card(100.0, None, _APPLE),
    "apple m3 pro": Card(150.0, None, _APPLE),
    "apple m3 max": Card(None, None, f"{_APPLE}: 300 or 400 GB/s, {_VARIANTS}"),
    "apple m3 ultra": Card(819.0, None, _APPLE),
    "apple m4": Card(120.0, None, _APPLE),
    "apple m4 pro": Card(273.0, None, _APPLE),
    "apple m4 max": Card(None, None, f"{_APPLE}: 410 or 546 GB/s, {_VARIANTS}"),
}  # fmt: skip

# Memory that a card of CARDS is sold with, GiB: the specifications and data sheets named there. Data-centre cards are named by
# theirs in GB of 10^9 or GiB, as their data sheets do; the smaller is taken.
MEMORY_GIB: dict[str, tuple[float, ...]] = {
    "rtx 3060": (12,), "rtx 3060 laptop gpu": (6,), "rtx 3090": (24,), "rtx 4060": (8,), "rtx 4060 laptop gpu": (8,),
    "rtx 4060 ti": (8, 16), "rtx 4090": (24,), "rtx 5060": (8,), "rtx 5060 ti": (8, 16), "rtx 5070": (12,),
    "rtx 5070 ti": (16,), "rtx 5080": (16,), "rtx 5090": (32,), "a100-pcie-40gb": (40e9 / 2**30,),
    "a100-sxm4-40gb": (40e9 / 2**30,), "a100 80gb pcie": (80e9 / 2**30,), "a100-sxm4-80gb": (80e9 / 2**30,),
    "h100 80gb hbm3": (80e9 / 2**30,), "h100 pcie": (80e9 / 2**30,), "h200": (141e9 / 2**30,),
}  # fmt: skip

UNKNOWN = Card(None, None, "unknown: the card is not listed")


# One for each architecture, the first two the cards that this package is made for.
REPRESENTATIVES = ("rtx 3060", "rtx 4060", "rtx 5060", "a100-sxm4-80gb", "h100 80gb hbm3")


def predictable() -> list[str]:
    """The cards of CARDS with everything that a prediction needs; REPRESENTATIVES come first."""
    known = [name for name, card in CARDS.items() if card.tensor and card.bandwidth]
    return [*REPRESENTATIVES, *(name for name in known if name not in REPRESENTATIVES)]


def find(name: str, memory_gib: float | None = None) -> Card:
    """The card that a driver calls `name`; UNKNOWN if it is not listed. The whole name has to match: "RTX 4060" is not
    "RTX 4060 Ti"."""
    card = CARDS.get(_key(name), UNKNOWN)
    return UNKNOWN if memory_gib is not None and memory_gib < card.min_memory_gib else card


def memory_gib(name: str) -> float:
    """The memory of a card. Raises ValueError where the card is not listed, or sold with more than one size."""
    sizes = MEMORY_GIB.get(_key(name), ())
    if len(sizes) == 1:
        return sizes[0]
    if not sizes:
        raise ValueError(f"card {name!r} has no memory in the list: {', '.join(MEMORY_GIB)}")
    raise ValueError(f"card {name!r} is sold with {' and '.join(f'{size:g}' for size in sizes)} GiB: say which")


def _key(name: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"\b(nvidia|geforce)\b", "", name.lower())).strip()
