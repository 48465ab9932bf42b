"""What data sheets promise: memory bandwidth and dense bf16 rate of common cards, each with its source.

These figures stand in a second column beside the ceilings measured on the card, and nowhere else. A card that is not
listed, or whose name does not tell its variants apart, is "unknown".

Rates are dense (no sparsity) with fp32 accumulation, TFLOP/s; bandwidths GB/s. A GeForce rate that no paper states is
the product behind it: SMs x 512 operations per SM and clock (the rate of fp32 accumulation in Ampere, Ada and Blackwell
GeForce) x boost clock.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Card(NamedTuple):
    bandwidth: float | None
    rate: float | None
    source: str
    min_memory_gib: float = 0.0
    """A smaller card of the same name is another card."""


_GEFORCE_OPERATIONS = 512  # bf16 x bf16 + fp32, per SM and clock


def _geforce(bandwidth: float, sms: int, boost_ghz: float, source: str, min_memory_gib: float = 0.0) -> Card:
    rate = round(sms * _GEFORCE_OPERATIONS * boost_ghz / 1e3, 1)
    return Card(
        bandwidth, rate, f"{source}; rate computed: {sms} SMs x {_GEFORCE_OPERATIONS} x {boost_ghz} GHz", min_memory_gib
    )


_AMPERE = "NVIDIA, GeForce RTX 30 series specifications and GA102 whitepaper"
_ADA = "NVIDIA, GeForce RTX 40 series specifications and Ada whitepaper"
_BLACKWELL = "NVIDIA, GeForce RTX 50 series specifications and RTX Blackwell whitepaper"
_APPLE = "Apple, technical specifications and chip announcement"
_VARIANTS = "the name covers variants with different memory"

CARDS: dict[str, Card] = {
    "rtx 3060": _geforce(360.0, 28, 1.777, f"{_AMPERE} (12 GB)", min_memory_gib=10.0),
    "rtx 3060 laptop gpu": _geforce(336.0, 30, 1.703, f"{_AMPERE}, highest boost clock of the laptop range"),
    "rtx 3090": Card(936.0, 71.0, "NVIDIA GA102 whitepaper, table of GeForce RTX 3090: peak bf16 with fp32 accumulate"),
    "rtx 4060": _geforce(272.0, 24, 2.46, _ADA),
    "rtx 4060 laptop gpu": _geforce(256.0, 24, 2.37, f"{_ADA}, highest boost clock of the laptop range"),
    "rtx 4060 ti": _geforce(288.0, 34, 2.535, _ADA),
    "rtx 4090": Card(1008.0, 165.2, "NVIDIA Ada whitepaper, table of GeForce RTX 4090: peak bf16 with fp32 accumulate"),
    "rtx 5060": _geforce(448.0, 30, 2.497, _BLACKWELL),
    "rtx 5060 ti": _geforce(448.0, 36, 2.572, _BLACKWELL),
    "rtx 5070": _geforce(672.0, 48, 2.512, _BLACKWELL),
    "rtx 5070 ti": _geforce(896.0, 70, 2.452, _BLACKWELL),
    "rtx 5080": _geforce(960.0, 84, 2.617, _BLACKWELL),
    "rtx 5090": Card(1792.0, 209.5, "NVIDIA RTX Blackwell whitepaper, table of GeForce RTX 5090: peak bf16, fp32 accumulate"),
    "h100 80gb hbm3": Card(3350.0, 989.0, "NVIDIA H100 data sheet, SXM (the rate printed there is twice this, with sparsity)"),
    "h100 pcie": Card(2000.0, 756.0, "NVIDIA H100 data sheet, PCIe (the rate printed there is twice this, with sparsity)"),
    "h200": Card(4800.0, 989.0, "NVIDIA H200 data sheet, SXM (the rate printed there is twice this, with sparsity)"),
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

UNKNOWN = Card(None, None, "unknown: the card is not listed")


def find(name: str, memory_gib: float | None = None) -> Card:
    """The card that a driver calls `name`; UNKNOWN if it is not listed. The whole name has to match: "RTX 4060" is not
    "RTX 4060 Ti"."""
    key = re.sub(r"\s+", " ", re.sub(r"\b(nvidia|geforce)\b", "", name.lower())).strip()
    card = CARDS.get(key, UNKNOWN)
    return UNKNOWN if memory_gib is not None and memory_gib < card.min_memory_gib else card
