"""A kernel that is wrong in one way is caught, and the sentence says in which; a right one holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backend_helpers import standing_in
from bench_helpers import APPENDING, SMALL, kernel, spoiled

from gemma4_kernels import backends
from gemma4_kernels.attention import eager
from gemma4_kernels.bench import machine, validation
from gemma4_kernels.bench.cases import attention_bench_cases
from gemma4_kernels.bench.guards import GuardedInputs, poisoned_memory, same_bits
from gemma4_kernels.checks import BackendError

CPU = torch.device("cpu")


def check(function, case=SMALL, op="flash_attn"):
    with kernel(op, function):
        (found,) = validation.check_case(case, ["triton"], CPU)
    return found


def test_a_right_kernel_holds():
    found = check(eager.flash_attn)
    assert (found.status, found.reasons) == ("held", ())
    assert set(found.outputs) == {"out", "lse"}
    assert 0 < found.worst <= 1


def test_one_wrong_element_is_named_with_its_budget():
    def spoil(out, lse):
        out[1, 3, 2, 17] += 1.0

    found = check(spoiled(spoil))
    assert found.status == "failed"
    (reason,) = found.reasons
    assert reason.startswith("out element (1, 3, 2, 17): got ")
    assert "against a budget of" in reason
    assert found.outputs["lse"].ok


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_or_an_infinity_is_not_an_error_within_a_budget(value):
    def spoil(out, lse):
        lse[0, 0, 0] = value

    found = check(spoiled(spoil))
    assert found.status == "failed"
    assert found.reasons[0].startswith("lse element (0, 0, 0)")


def test_a_missing_infinity_is_noticed():
    def spoil(out, lse):
        lse[lse == -torch.inf] = -100.0

    found = check(spoiled(spoil), replace(SMALL, sq=9, sk=4))
    assert found.status == "failed"
    assert found.worst == float("inf")


def test_writing_beyond_an_input_is_noticed():
    def function(q, k, *others):
        beyond = k.as_strided((2,), (1,), k.storage_offset() + k.numel())
        beyond.fill_(1.0)
        return eager.flash_attn(q, k, *others)

    assert "wrote 4 bytes after input k" in check(function).reasons


def test_writing_before_an_input_is_noticed():
    def function(q, k, v, *others):
        v.as_strided((1,), (1,), v.storage_offset() - 1).fill_(1.0)
        return eager.flash_attn(q, k, v, *others)

    assert "wrote 2 bytes before input v" in check(function).reasons


def test_reading_beyond_an_input_gives_nan():
    def function(q, k, v, *others):
        out, lse = eager.flash_attn(q, k, v, *others)
        out[0, 0, 0, 0] += q.as_strided((1,), (1,), q.storage_offset() + q.numel())[0]
        return out, lse

    assert check(function).reasons[0].startswith("out element (0, 0, 0, 0): got nan")


def test_changing_an_input_is_noticed():
    def function(q, *others):
        result = eager.flash_attn(q, *others)
        q[1, 2, 3, 4] += 1
        return result

    assert check(function).reasons == ("input q changed, or was not changed as it had to be, at element (1, 2, 3, 4)",)


def test_an_append_must_reach_the_cache():
    def function(k_cache, v_cache, k, v, *others):
        v = v.clone()
        v[1, 1, 1, 63] += 1
        eager.append_kv(k_cache, v_cache, k, v, *others)

    with kernel("append_kv", function), kernel_of_attention():
        (found,) = validation.check_case(APPENDING, ["triton"], CPU)
    assert any(reason.startswith("input v_cache changed, or was not") for reason in found.reasons)
    assert validation.check_case(APPENDING, ["eager"], CPU)[0].status == "held"


def kernel_of_attention():
    """flash_attn_kvcache on "triton" by its eager implementation, beside another op of `kernel`."""
    return standing_in(replace(backends._implementations["flash_attn_kvcache", "eager"], backend="triton"))


def test_results_that_differ_from_run_to_run_are_noticed():
    calls = []

    def spoil(out, lse):
        calls.append(None)
        out.view(torch.int16)[0, 4, 0, 0] ^= len(calls) % 4  # within the rule, not the same bits

    found = check(spoiled(spoil))
    assert found.reasons == ("two runs on the same inputs gave different bits",)
    assert found.worst == float("inf")


def test_elements_that_are_never_written_are_noticed():
    def function(q, *others):
        out, lse = eager.flash_attn(q, *others)
        returned = torch.empty_like(out)
        if torch.get_deterministic_debug_mode() == 0:
            returned.copy_(out)  # what the usual run finds there: the result of an earlier call
        else:
            returned[:, 1:] = out[:, 1:]
        return returned, lse

    (reason,) = check(function).reasons
    assert reason.startswith("with its memory poisoned, out element (0, 0, 0, 0): got nan")


def test_an_exception_is_a_failure_with_its_message():
    def function(*arguments):
        raise RuntimeError("out of resource: shared memory")

    found = check(function)
    assert (found.status, found.reasons) == ("failed", ("raised RuntimeError: out of resource: shared memory",))


def test_a_wrong_shape_is_a_failure():
    def function(q, *others):
        out, lse = eager.flash_attn(q, *others)
        return out[:, :-1], lse

    assert check(function).reasons == ("out has shape (2, 4, 4, 64), expected (2, 5, 4, 64)",)


def test_a_backend_that_cannot_is_skipped_with_its_reason():
    found = validation.check_case(SMALL, ["cuda", "eager"], CPU)
    assert [check.status for check in found] == ["skipped", "held"]
    assert found[0].reasons[0].startswith("runs on cuda, not on cpu")


def test_a_backend_that_gives_up_on_the_way_is_skipped():
    def function(*arguments):
        raise BackendError("append_kv: no kernel for pages")

    found = check(function)
    assert (found.status, found.reasons) == ("skipped", ("append_kv: no kernel for pages",))


def test_the_kernel_runs_before_the_reference(monkeypatch):
    order = []
    plain_run, plain_reference = type(SMALL).run, type(SMALL).reference
    monkeypatch.setattr(type(SMALL), "run", lambda *a: order.append("kernel") or plain_run(*a))
    monkeypatch.setattr(type(SMALL), "reference", lambda *a: order.append("reference") or plain_reference(*a))
    validation.check_case(SMALL, ["eager"], CPU)
    assert order == ["kernel", "kernel", "reference"]


def test_a_case_that_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 10_000)
    ((found,),) = validation.check_all([SMALL], ["eager"], CPU)
    assert found.status == "skipped"
    assert found.reasons[0].startswith("needs about 0.0 GB of memory on cpu")


def test_a_cpu_leaves_out_what_takes_it_minutes_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(validation, "CPU_OPERATIONS", 10)
    ((found,),) = validation.check_all([SMALL], ["eager"], CPU)
    assert (found.status, found.reasons) == ("skipped", ("more than 1e+01 operations take a CPU minutes",))
    ((found,),) = validation.check_all([SMALL], ["eager"], CPU, limit_cpu=False)
    assert found.status == "held"


@pytest.mark.parametrize("op", ["flash_attn_func", "k_eq_v_attention"])
def test_an_excerpt_is_what_the_whole_gives_there(op, monkeypatch):
    case = next(case for case in attention_bench_cases() if case.op == op and case.sq == 512)
    case = replace(case, sq=100, sk=120, b=2, hq=4, hkv=min(case.hkv, 2), left=case.left and min(case.left, 40))
    made = case.inputs()
    whole = case.reference(made)
    monkeypatch.setattr("gemma4_kernels.bench.cases.EXCERPT_ABOVE", 0)
    assert len(case.parts()) == 6
    for part, expected in zip(case.reference(made), case.judged(whole), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)
    assert case.judged(whole)[0].shape == (6 * 16, case.d)


def test_guards_do_not_disturb_what_lies_between():
    made = SMALL.inputs()
    guarded = GuardedInputs(made, CPU)
    assert all(same_bits(guarded.arguments[name], made[name]) for name in ("q", "k", "v"))
    assert guarded.damage(made) == []
    assert guarded.arguments["softmax_scale"] == made["softmax_scale"]


def test_poison_leaves_no_trace():
    with poisoned_memory():
        assert torch.empty(5).isnan().all()
    assert torch.get_deterministic_debug_mode() == 0
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_a_lost_device_was_asked_afterwards_is_skipped_and_what_came_before_is_kept(monkeypatch):
    """An illegal access breaks a GPU for the rest of the process: nothing after it means anything."""
    answers = iter([True, False])
    monkeypatch.setattr(machine, "answers", lambda device: next(answers))
    cases = [SMALL, replace(SMALL, sq=4), replace(SMALL, sq=3)]
    found = [checks[0] for checks in validation.check_all(cases, ["eager"], CPU)]
    assert [check.status for check in found] == ["held", "held", "skipped"]
    assert found[2].reasons[0].startswith(f"the device was lost after {cases[1]}")
