"""Rounds, copies and summaries, under a clock that ticks as it is told."""

from __future__ import annotations

import time

import pytest
import torch

from gemma4_kernels.bench import cards, ceilings, timing
from gemma4_kernels.bench.timing import Batch, Subject, are_cold, copies_needed, interleave, summarise


class ScriptedClock:
    """Every batch takes what `seconds(name)` says; nothing is run."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.played = []

    def batches(self, calls):
        return [Batch(call, 1, "script") for call in calls]

    def time(self, batch):
        self.played.append(batch.run)
        return self.seconds(batch.run)


def test_subjects_take_turns_and_so_do_copies():
    clock = ScriptedClock(lambda name: 1.0)
    subjects = [Subject("a", ["a0", "a1"]), Subject("b", ["b0"])]
    interleave(subjects, clock, rounds=3, slice_seconds=1.0)
    assert clock.played == ["a0", "b0", "a1", "b0", "a0", "b0"]
    assert [len(subject.rounds) for subject in subjects] == [3, 3]


def test_a_round_fills_its_slice_and_keeps_the_fastest_batch():
    times = iter([0.4, 0.1, 0.5, 0.3, 0.3, 0.4])
    subject = Subject("a", ["a0"])
    interleave([subject], ScriptedClock(lambda name: next(times)), rounds=2, slice_seconds=1.0)
    assert subject.rounds == [0.1, 0.3]
    assert subject.num_calls == 6


def test_a_slow_call_sits_out_rounds_but_not_all():
    slow, quick = Subject("slow", ["slow"]), Subject("quick", ["quick"])
    clock = ScriptedClock({"slow": 100.0, "quick": 0.5}.get)
    interleave([slow, quick], clock, rounds=30, slice_seconds=0.5)
    assert (len(slow.rounds), len(quick.rounds)) == (timing.MIN_ROUNDS, 30)


def test_a_clock_that_stands_still_does_not_hang():
    subject = Subject("a", ["a"])
    interleave([subject], ScriptedClock(lambda name: 0.0), rounds=1, slice_seconds=1e-5)
    assert subject.num_calls == 10


def test_a_call_that_fails_while_it_is_timed_stops_nobody_else():
    def fail(name):
        if name == "fails":
            raise torch.OutOfMemoryError("no room")
        return 1.0

    failing, other = Subject("failing", ["fails"]), Subject("other", ["works"])
    interleave([failing, other], ScriptedClock(fail), rounds=3, slice_seconds=1.0)
    assert (failing.error, failing.rounds) == ("raised OutOfMemoryError while it was timed", [])
    assert other.rounds == [1.0, 1.0, 1.0]


def test_a_batch_counts_its_calls():
    class PassClock(ScriptedClock):
        def batches(self, calls):
            return [Batch("all", len(calls), "graph")]

    subject = Subject("a", ["a0", "a1", "a2", "a3"])
    interleave([subject], PassClock(lambda name: 8.0), rounds=1, slice_seconds=1.0)
    assert subject.rounds == [2.0]


def test_the_host_clock_calls_every_copy():
    seen = []
    clock = timing.clock_for(torch.device("cpu"))
    batches = clock.batches([lambda: seen.append(0), lambda: seen.append(1), lambda: seen.append(2)])
    seen.clear()
    assert all(clock.time(batch) >= 0 for batch in batches)
    assert seen == [0, 1, 2]


def test_one_thread_is_timed_by_its_own_processor_time():
    cpu = torch.device("cpu")
    before = torch.get_num_threads()
    with timing.threads(1):
        clock = timing.clock_for(cpu)
        assert (clock.now, clock.batches([list])[0].method) == (time.process_time, "cpu time")
    with timing.threads(2):
        clock = timing.clock_for(cpu)
        assert (clock.now, clock.batches([list])[0].method) == (time.perf_counter, "clock")
    assert torch.get_num_threads() == before


def test_summary():
    summary = summarise([5.0, 1.0, 2.0, 3.0, 4.0])
    assert summary == (3.0, 2.0, 1.0, pytest.approx(2 / 3))
    assert summarise([2.0]) == (2.0, 2.0, 2.0, 0.0)


@pytest.mark.parametrize("rounds", [[], [1.0, float("nan")], [0.0], [float("inf")]])
def test_a_sample_that_is_none_is_refused(rounds):
    with pytest.raises(ValueError, match="summarise"):
        summarise(rounds)


def test_copies_exceed_the_cache_twice():
    assert copies_needed(10, 10, cache=100, room=None) == 21
    assert are_cold(21, 10, cache=100)
    assert copies_needed(1000, 1000, cache=100, room=None) == 2
    assert are_cold(1, 1000, cache=100)  # by itself it exceeds the cache
    assert not are_cold(1, 150, cache=100)


def test_a_window_over_a_long_cache_is_cold_by_what_it_touches():
    """A call that reads 10 of 1000 bytes finds them in the cache again, however large its inputs are."""
    assert copies_needed(10, 1000, cache=100, room=None) == 21
    assert copies_needed(10, 1000, cache=100, room=2000) == 2
    assert not are_cold(2, 10, cache=100)


def test_copies_stay_within_the_room_and_say_that_they_are_warm():
    copies = copies_needed(10, 10, cache=100, room=45)
    assert copies == 4
    assert not are_cold(copies, 10, cache=100)
    assert copies_needed(10, 10, cache=100, room=5) == 1
    assert copies_needed(1, 1, cache=10**9, room=None) == timing.MAX_COPIES


def test_ceilings_are_bytes_and_operations_over_the_fastest_round():
    measured = ceilings.CeilingSubjects(torch.device("cpu"), ["bf16"], scale=1 / 64)
    measured.copy.rounds, measured.products["bf16"].rounds = [2.0, 1.0], [0.5]
    measured.products["fp32"].rounds = [1.0]
    found = measured.result()
    assert found.copy_gbs == 2 * measured.copy_bytes / 1e9
    assert found.matmul_tflops == {"bf16": 2 * measured.size**3 / 0.5 / 1e12}
    measured.products["fp32"].rounds = [0.25]  # a CPU that is better at fp32
    assert measured.result().matmul_tflops == {"bf16": 2 * measured.size**3 / 0.25 / 1e12}


def test_a_ceiling_that_could_not_be_measured_is_unknown():
    found = ceilings.CeilingSubjects(torch.device("cpu"), ["bf16"], scale=1 / 64).result()
    assert (found.copy_gbs, found.matmul_tflops) == (None, {"bf16": None})


def test_ceilings_really_copy_and_multiply():
    measured = ceilings.CeilingSubjects(torch.device("cpu"), ["fp16"], scale=1 / 64)
    assert [subject.name for subject in measured.subjects] == ["copy", "matmul fp16", "matmul fp32"]
    for subject in measured.subjects:
        (call,) = subject.calls
        result = call()
        assert result.count_nonzero() > 0.9 * result.numel()


def test_a_card_is_found_by_its_whole_name():
    assert cards.find("NVIDIA GeForce RTX 4060").bandwidth == 272.0
    assert cards.find("NVIDIA GeForce RTX 4060 Ti").bandwidth == 288.0
    assert cards.find("NVIDIA GeForce RTX 4060 Laptop GPU").bandwidth == 256.0
    assert cards.find("NVIDIA H100 80GB HBM3").rate == 989.0
    assert cards.find("NVIDIA GeForce RTX 9999") == cards.UNKNOWN


def test_the_small_3060_is_another_card():
    assert cards.find("NVIDIA GeForce RTX 3060", memory_gib=11.6).bandwidth == 360.0
    assert cards.find("NVIDIA GeForce RTX 3060", memory_gib=7.8) == cards.UNKNOWN


def test_every_card_has_its_source_and_the_computed_rates_match_the_printed_ones():
    assert all(len(card.source) > 20 for card in cards.CARDS.values())
    wanted = {
        "rtx 3060",
        "rtx 3060 laptop gpu",
        "rtx 3090",
        "rtx 4060",
        "rtx 4060 ti",
        "rtx 4060 laptop gpu",
        "rtx 4090",
    }
    wanted |= {"rtx 5060", "rtx 5070", "rtx 5080", "rtx 5090", "h100 pcie", "h200", "apple m1", "apple m2", "apple m3"}
    assert wanted | {"apple m4"} <= cards.CARDS.keys()
    for name, sms, clock in (("rtx 3090", 82, 1.695), ("rtx 4090", 128, 2.52), ("rtx 5090", 170, 2.407)):
        assert cards.CARDS[name].rate == pytest.approx(sms * 512 * clock / 1e3, rel=0.01)
