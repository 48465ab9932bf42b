"""The two ceilings of a device, measured beside the kernels: a large copy and a large matrix product.

Both are subjects like any other and take part in every round, so they see the same clocks and the same neighbours in the
same minute. The fastest round counts: a ceiling is what the device can do.

Random data: products of zeros run faster than real ones, since fewer transistors switch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gemma4_kernels.bench import cards, machine
from gemma4_kernels.bench.attention_calls import DTYPES
from gemma4_kernels.bench.timing import Action, Subject

# One second of a small CPU's copy at most; on a GPU large against any L2.
COPY_BYTES = {"cuda": 1 << 30, "mps": 1 << 28, "cpu": 1 << 27}
# Large enough for the best tiles, small enough for a fraction of a second.
MATMUL_SIZE = {"cuda": 8192, "mps": 4096, "cpu": 1024}


@dataclass(frozen=True)
class Ceilings:
    """GB/s and TFLOP/s; None where it could not be measured, or the data sheet says nothing."""

    copy_gbs: float | None
    matmul_tflops: dict[str, float | None]
    """dtype -> rate of a large product at that dtype or in fp32, whichever is faster."""
    sheet_gbs: float | None
    sheet_tflops: float | None


class CeilingSubjects:
    """The copy and one product per dtype, to be interleaved with the kernels."""

    def __init__(self, device: torch.device, dtypes: Sequence[str], scale: float = 1.0) -> None:
        """scale shrinks both problems, for tests."""
        self.device = device
        self.copy_bytes = int(COPY_BYTES[device.type] * scale)
        free = machine.free_memory(device)
        if free is not None:
            self.copy_bytes = min(self.copy_bytes, free // 8)
        self.size = max(64, int(MATMUL_SIZE[device.type] * scale))
        source = torch.randint(0, 255, (self.copy_bytes,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.copy = Subject("copy", [lambda: target.copy_(source)])
        # fp32 as well: a kernel may convert, and on a CPU without bf16 arithmetic that is how to be fast.
        self.dtypes = tuple(dict.fromkeys(dtypes))
        self.products = {
            dtype: Subject(f"matmul {dtype}", [self._product(dtype)]) for dtype in dict.fromkeys((*dtypes, "fp32"))
        }

    def _product(self, dtype: str) -> Action:
        left, right = (
            torch.randn((self.size, self.size), device=self.device).to(DTYPES[dtype]) for _ in range(2)
        )  # fmt: skip
        out = torch.empty_like(left)
        return lambda: torch.mm(left, right, out=out)

    @property
    def subjects(self) -> list[Subject]:
        return [self.copy, *self.products.values()]

    def result(self) -> Ceilings:
        """After the rounds."""
        card = data_sheet(self.device)
        rates = {
            name: 2 * self.size**3 / min(subject.rounds) / 1e12
            for name, subject in self.products.items()
            if subject.rounds
        }
        return Ceilings(
            # read and written
            copy_gbs=2 * self.copy_bytes / min(self.copy.rounds) / 1e9 if self.copy.rounds else None,
            matmul_tflops={
                dtype: max((rates[name] for name in (dtype, "fp32") if name in rates), default=None)
                for dtype in self.dtypes
            },
            sheet_gbs=card.bandwidth,
            sheet_tflops=card.rate,
        )


def data_sheet(device: torch.device) -> cards.Card:
    memory = machine.device_memory(device)
    return cards.find(machine.device_name(device), None if memory is None else memory / 2**30)
