"""What a plan needs to know of the device that it is for."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gemma4_kernels import backends
from gemma4_kernels.triton_common.launch import INTERPRETED


class Card(NamedTuple):
    """What a plan needs to know of a device. The bits of a decode row depend on it, and on nothing else but the row."""

    architecture: str
    multiprocessors: int


# The interpreter walks the paths of a card that people own, an RTX 3060.
INTERPRETED_CARD = Card("interpreter", 28)


def card_of(device: torch.device) -> Card:
    if INTERPRETED:
        return INTERPRETED_CARD
    return Card(backends.architecture_of(device), backends.multiprocessors_of(device))
