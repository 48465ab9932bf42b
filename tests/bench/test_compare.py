"""SAME, FAST and SLOW from samples whose truth is known."""

from __future__ import annotations

import random

import pytest
from bench_helpers import record, row

from gemma4_kernels.bench import compare
from gemma4_kernels.bench.timing import summarise


def timed(case, seconds, **changes):
    summary = summarise(seconds)
    return row(
        case=case, median_us=summary.median, quartile_us=summary.quartile, fastest_us=summary.fastest,
        spread=summary.spread, rounds=len(seconds), **changes,
    )  # fmt: skip


def noisy(rng, cost, rounds=20):
    """Rounds of a kernel on a shared machine: a floor, jitter of some percent, and now and then a neighbour."""
    return [
        cost * (1 + rng.expovariate(30)) * (rng.uniform(1.2, 5.0) if rng.random() < 0.25 else 1.0)
        for _ in range(rounds)
    ]


def run_of(seed, slowed=1.0, cases=200):
    rng = random.Random(seed)
    return record([timed(f"case {number}", noisy(rng, slowed * (100 + number))) for number in range(cases)])


def verdicts(before, after):
    return compare.compare(before, after).counts


def test_two_noisy_runs_of_the_same_kernels_are_the_same():
    assert verdicts(run_of(1), run_of(2))["SAME"] >= 0.98 * 200


@pytest.mark.parametrize("slowed", [4 / 3, 1.5])
def test_kernels_slowed_by_a_third_are_slow(slowed):
    assert verdicts(run_of(3), run_of(4, slowed))["SLOW"] >= 0.98 * 200


def test_kernels_that_gained_a_third_are_fast():
    assert verdicts(run_of(5, 4 / 3), run_of(6))["FAST"] >= 0.98 * 200


def test_one_slow_kernel_among_many_is_the_one_that_is_named():
    rng = random.Random(7)
    before = [timed(f"case {n}", noisy(rng, 100)) for n in range(10)]
    after = [timed(f"case {n}", noisy(rng, 134 if n == 4 else 100)) for n in range(10)]
    found = compare.compare(record(before), record(after))
    assert [line.case for line in found.lines if line.verdict == "SLOW"] == ["case 4"]
    assert found.counts["SAME"] == 9


def baselines(factor):
    return [timed(f"case {n}", [factor * (50 + n)] * 8, kind="baseline", by="sdpa") for n in range(5)]


def test_a_machine_that_became_slower_as_a_whole_is_taken_out():
    before = record([timed("case", [100.0] * 8), *baselines(1.0)])
    after = record([timed("case", [150.0] * 8), *baselines(1.5)])
    found = compare.compare(before, after)
    assert found.machine_ratio == pytest.approx(1.5)
    assert found.counts == {"SAME": 1}
    assert "1.50 times slower in the second run" in compare.render(found)


def test_a_slow_kernel_is_slow_on_a_slower_machine_too():
    before = record([timed("case", [100.0] * 8), *baselines(1.0)])
    after = record([timed("case", [200.0] * 8), *baselines(1.5)])
    assert compare.compare(before, after).counts == {"SLOW": 1}


def test_baselines_of_another_torch_are_no_control():
    before = record([timed("case", [100.0] * 8), *baselines(1.0)])
    after = record([timed("case", [150.0] * 8), *baselines(1.5)], torch="2.12.0")
    found = compare.compare(before, after)
    assert found.machine_ratio == 1.0
    assert found.counts == {"SLOW": 1}
    assert "The records differ in torch: 2.11.0, 2.12.0." in found.remarks


def test_same_from_a_hopelessly_noisy_run_is_not_sold_as_evidence():
    noisy_rounds = [100.0, 400.0, 900.0, 1000.0, 1000.0]
    found = compare.compare(record([timed("case", noisy_rounds)]), record([timed("case", noisy_rounds)]))
    assert found.counts == {"SAME": 1}
    assert found.lines[0].sees == pytest.approx(1.1 * 4)
    assert "too noisy to show a slowdown by a third" in compare.render(found)


def test_rows_of_one_record_only_are_counted():
    before = record([timed("a", [1.0] * 4), timed("b", [1.0] * 4)])
    after = record([timed("a", [1.0] * 4), row(case="c", median_us=None, quartile_us=None, fastest_us=None)])
    found = compare.compare(before, after)
    assert (len(found.lines), found.only_before, found.only_after) == (1, 1, 0)
    assert "1 rows are in the first record only." in compare.render(found)
