"""Fused kernels for Gemma 4."""

from gemma4_kernels._version import __version__
from gemma4_kernels.geometry import GEMMA4_12B, GEMMA4_12B_DRAFTER

__all__ = ["GEMMA4_12B", "GEMMA4_12B_DRAFTER", "__version__"]
