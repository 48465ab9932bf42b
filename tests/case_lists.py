"""What holds of the lists of cases of every family."""

from __future__ import annotations

from collections.abc import Sequence

from gemma4_kernels.bench.cases import Case, all_cases, parse


def assert_cases_are_their_strings(cases: Sequence[Case]) -> None:
    """Each is made by its string, draws inputs of its own, and stands in the list of all."""
    for case in cases:
        assert parse(str(case)) == case
    assert len({case.seed for case in cases}) == len({str(case) for case in cases})
    assert {str(case) for case in cases} <= {str(case) for case in all_cases()}
