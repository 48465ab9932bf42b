"""What a speculative generation did and where its time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

PHASES = ("prefill", "draft", "verify", "sample")
"""Reading the prompts, drafting, passes of the target, turning logits into tokens."""


@dataclass
class Statistics:
    """Of a generation, or of one request of it. Times are of the whole batch."""

    offered: list[int] = field(default_factory=list)
    """[i]: rounds in which there was a draft at place i."""
    accepted: list[int] = field(default_factory=list)
    """[i]: rounds in which it was accepted and emitted."""
    target_passes: int = 0
    """Passes of the target over a request, without the one over its prompt: of a batch, those of all requests together."""
    rounds: int = 0
    """Passes of the target over the batch, likewise."""
    tokens: int = 0
    """Emitted, the one that the prompt's pass gave included."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted; NaN without drafts."""
        offered = sum(self.offered)
        return sum(self.accepted) / offered if offered else float("nan")

    @property
    def acceptance_by_place(self) -> list[float]:
        """Share of the drafts at each place that were accepted, those after a rejection counted as rejected."""
        return [accepted / offered for accepted, offered in zip(self.accepted, self.offered, strict=True)]

    @property
    def tokens_per_pass(self) -> float:
        """Tokens for each pass of the target over a request, the prompt's own token left out; plain decoding has 1."""
        return (self.tokens - self._first) / self.target_passes if self.target_passes else float("nan")

    _first: int = 0
    """Tokens that came from passes over prompts."""

    def saw(self, offered: int, accepted: int, emitted: int) -> None:
        """Count one round of one request."""
        missing = offered - len(self.offered)
        self.offered += [0] * missing
        self.accepted += [0] * missing
        for place in range(offered):
            self.offered[place] += 1
            self.accepted[place] += place < accepted
        self.target_passes += 1
        self.tokens += emitted

    def saw_first(self, emitted: int) -> None:
        """Count the token that followed from the prompt."""
        self._first += emitted
        self.tokens += emitted

    def __str__(self) -> str:
        places = ", ".join(f"{share:.0%}" for share in self.acceptance_by_place) or "no drafts"
        spent = sum(self.seconds.values())
        split = ", ".join(f"{name} {self.seconds[name]:.2f} s" for name in PHASES)
        rate = f", {self.tokens / spent:.1f} tokens/s" if spent else ""
        return (
            f"{self.tokens} tokens in {self.target_passes} passes ({self.tokens_per_pass:.2f} a pass){rate}; "
            f"accepted by place: {places}; {split}"
        )


class Stopwatch:
    """Seconds of phases; on CUDA by events, which wait for nothing until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()  # type: ignore[no-untyped-call]
            yield
            end.record()  # type: ignore[no-untyped-call]
            self._events.append((name, start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """Seconds so far."""
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._seconds)
