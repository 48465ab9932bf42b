"""The bytes and operations that a case declares, against counting them."""

from __future__ import annotations

import pytest

from gemma4_kernels.bench.attention_work import Request, keys_read, visible_keys
from gemma4_kernels.bench.cases import AttentionCase, all_cases, attention_bench_cases, attention_cases, select


@pytest.mark.parametrize("rows", [0, 1, 5, 12])
@pytest.mark.parametrize("keys", [0, 1, 5, 9])
@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (3, 0), (0, 0), (2, 2), (-1, 4)])
def test_visible_keys_are_those_of_the_mask(rows, keys, left, right):
    seen = [
        {
            key
            for key in range(keys)
            if (left < 0 or key >= keys - rows + row - left) and (right < 0 or key <= keys - rows + row + right)
        }
        for row in range(rows)
    ]
    assert visible_keys(Request(rows, keys), left, right) == [len(own) for own in seen]
    assert keys_read(Request(rows, keys), left, right) == len(set().union(*seen))


def test_bytes_of_a_decode_step():
    # q and out 2 x 16 x 512, lse 16 fp32, 4096 rows of values once.
    case = AttentionCase("k_eq_v_attention", sk=4096, hkv=1, d=512)
    assert case.bytes_moved() == 2 * 16 * 512 * 2 + 16 * 4 + 4096 * 512 * 2
    assert case.operations() == 4 * 512 * 16 * 4096
    both = AttentionCase("flash_attn_func", sk=4096, hkv=1, d=512, right=0)
    assert both.bytes_moved() == case.bytes_moved() + 4096 * 512 * 2


def test_a_window_bounds_the_bytes():
    short, long = (AttentionCase("flash_attn_func", sk=sk, left=1023, right=0) for sk in (1024, 32768))
    assert short.bytes_moved() == long.bytes_moved()
    assert short.operations() == long.operations()


def test_the_bench_list_covers_what_a_12b_does_in_service():
    cases = attention_bench_cases()
    assert {case.sq for case in cases if case.sq == case.sk} >= {512, 32768}
    for op in ("flash_attn_func", "k_eq_v_attention"):
        full = [case for case in cases if case.op == op and case.d == 512]
        assert {(case.sq, case.b) for case in full} >= {(rows, b) for rows in (1, 5) for b in (1, 4, 16)}
        assert {case.sk for case in full if case.sq == 1} >= {1024, 262144}


def test_every_case_is_there_once_with_the_tags_of_all_its_lists():
    cases = all_cases()
    assert len({str(case) for case in cases}) == len(cases)
    for known in (*attention_cases(), *attention_bench_cases()):
        (found,) = [case for case in cases if str(case) == str(known)]
        assert found.tags >= known.tags
    assert 5 <= len(select(all_cases(), "bench-quick")) <= 20
