"""Time calls so that a number means the same tomorrow: cold buffers, interleaved rounds, no mean of a noisy sample.

A subject (a kernel on a case, a baseline, a ceiling) has one call per copy of its inputs, more copies than the last cache
holds. A round goes once through all subjects and gives each a slice of time, in which its copies take turns. What a
neighbour on the machine or a throttled clock does therefore falls on every subject alike, and on some rounds only.

A round's value is the fastest batch in its slice: disturbances only ever add time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from gemma4_kernels.bench import machine

Action = Callable[[], object]

# Copies of the inputs: twice the cache, so that a copy has left it when its turn comes again; not more than this many.
CACHE_MULTIPLE = 2
MAX_COPIES = 64

# A call that takes seconds gets fewer rounds.
PATIENCE = 2
MIN_ROUNDS = 8


class Batch(NamedTuple):
    """Calls that are timed together: on a GPU one pass over all copies, since one call is shorter than its launch."""

    run: Action
    calls: int
    method: str
    """How it is timed: cpu time, clock, events, graph."""


class Clock(Protocol):
    def batches(self, calls: Sequence[Action]) -> list[Batch]:
        """The calls, warmed up, in the form in which this clock times them."""

    def time(self, batch: Batch) -> float:
        """Seconds for the whole batch."""


class HostClock:
    """A clock of the host around a call, with whatever synchronisation the device needs.

    With several threads, and on MPS, it is the wall's. With one thread on a CPU it is the processor time of this process: a
    neighbour that takes the core for a while is not in it. With as many threads as cores it would stall every parallel region
    of a call, and make it ten times slower rather than two.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.now, self.method = (time.process_time, "cpu time") if alone else (time.perf_counter, "clock")

    def batches(self, calls: Sequence[Action]) -> list[Batch]:
        for call in calls[:2]:
            call()
        return [Batch(call, 1, self.method) for call in calls]

    def time(self, batch: Batch) -> float:
        machine.synchronize(self.device)
        start = self.now()
        batch.run()
        machine.synchronize(self.device)
        return self.now() - start


class CudaClock:
    """Events on the stream around one pass over all copies, replayed as a CUDA graph where it can be captured.

    A graph takes Python and launch overhead out of the figure: what remains is what a runtime with its own graphs pays.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def batches(self, calls: Sequence[Action]) -> list[Batch]:
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # captures want their first calls, with compilation and handles, outside
                for call in calls:
                    call()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for call in calls:
                        call()
                torch.cuda.synchronize()
                return [Batch(graph.replay, len(calls), "graph")]
            except Exception:  # a baseline that reads a number back, a library that allocates its own way
                torch.cuda.synchronize()

        def one_by_one() -> None:
            for call in calls:
                call()

        return [Batch(one_by_one, len(calls), "events")]

    def time(self, batch: Batch) -> float:
        with torch.cuda.device(self.device):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            batch.run()
            stop.record()
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3


@contextmanager
def threads(number: int) -> Iterator[None]:
    """torch with so many threads, inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock(device)


@dataclass
class Subject:
    """Something that is timed. `rounds` collects seconds per call, one value a round."""

    name: str
    calls: Sequence[Action]
    rounds: list[float] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    num_calls: int = 0
    used_seconds: float = 0.0
    turn: int = 0

    error: str | None = None
    """Why it cannot be timed, once a call has raised: a case that barely fits may not fit beside its own copies."""

    def play_round(self, clock: Clock, slice_seconds: float) -> None:
        try:
            self._play(clock, slice_seconds)
        except RuntimeError as error:  # out of memory is one
            self.error = f"raised {type(error).__name__} while it was timed"
            self.rounds, self.batches, self.calls = [], [], []

    def _play(self, clock: Clock, slice_seconds: float) -> None:
        if not self.batches:
            self.batches = clock.batches(self.calls)
        fastest, used = math.inf, 0.0
        while used < slice_seconds:
            batch = self.batches[self.turn % len(self.batches)]
            self.turn += 1
            seconds = clock.time(batch)
            self.num_calls += batch.calls
            fastest = min(fastest, seconds / batch.calls)
            used += max(seconds, 1e-6)  # a clock that stands still must not keep us here
        self.rounds.append(fastest)
        self.used_seconds += used


def interleave(
    subjects: Sequence[Subject], clock: Clock, rounds: int, slice_seconds: float,
    progress: Callable[[int], None] = lambda done: None,
) -> None:  # fmt: skip
    """Fill `rounds` of every subject, one after the other within a round.

    A subject that has used PATIENCE slices' worth of all its rounds sits out the rest, once it has MIN_ROUNDS.
    """
    patience = PATIENCE * rounds * slice_seconds
    for done in range(rounds):
        for subject in subjects:
            if subject.error is None and (subject.used_seconds < patience or len(subject.rounds) < MIN_ROUNDS):
                subject.play_round(clock, slice_seconds)
        progress(done + 1)


class Summary(NamedTuple):
    """Seconds per call over the rounds of a subject."""

    median: float
    quartile: float
    """A quarter of the rounds were faster."""
    fastest: float
    spread: float
    """Distance between the quartiles as a share of the median."""


def summarise(rounds: Sequence[float]) -> Summary:
    """Median, fastest and spread. Raises ValueError for an empty or a non-finite sample."""
    if not rounds or not all(math.isfinite(value) and value > 0 for value in rounds):
        raise ValueError(f"summarise: rounds must be positive times, got {list(rounds)[:3]}")
    if len(rounds) == 1:
        return Summary(rounds[0], rounds[0], rounds[0], 0.0)
    lower, median, upper = statistics.quantiles(rounds, n=4, method="inclusive")
    return Summary(median, lower, min(rounds), (upper - lower) / median)


def copies_needed(touched: int, input_bytes: int, cache: int, room: int | None) -> int:
    """How many copies of the inputs the calls rotate over.

    Args:
        touched: bytes of one copy that a call reads or writes; a window leaves most of a long cache alone.
        input_bytes: of one copy, in memory.
        cache: bytes of the last cache.
        room: bytes that all copies may take together; None for no limit.
    """
    wanted = -(-CACHE_MULTIPLE * cache // max(1, touched)) + 1
    affordable = MAX_COPIES if room is None else room // max(1, input_bytes)
    return max(1, min(wanted, MAX_COPIES, affordable))


def are_cold(copies: int, touched: int, cache: int) -> bool:
    """Whether a copy has left the cache when its turn comes again: the others, or itself alone, are larger."""
    return (copies - 1) * touched >= cache or touched > CACHE_MULTIPLE * cache
