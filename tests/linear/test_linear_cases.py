"""Every case of the list, on every backend that can serve it here, against the reference and the error rule."""

from __future__ import annotations

import pytest
import torch
from case_lists import assert_cases_are_their_strings

from gemma4_kernels import backends
from gemma4_kernels.bench import linear_baselines, validation
from gemma4_kernels.bench import linear_cases as listed
from gemma4_kernels.bench.cases import parse
from gemma4_kernels.bench.linear_cases import LINEAR_OPS, LinearCase, linear_bench_cases, linear_cases
from gemma4_kernels.bench.linear_inputs import random_weight, weight_bytes
from gemma4_kernels.geometry import GEMMA4_12B
from gemma4_kernels.linear import eager, eager_int4
from gemma4_kernels.linear.schemes import SCHEMES

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", linear_cases(), ids=str)
def test_a_case_keeps_the_error_rule(case):
    (check,) = validation.check_case(case, ["eager"], CPU)
    assert check.status == "held", check.reasons


def test_a_case_is_its_string():
    assert_cases_are_their_strings((*linear_cases(), *linear_bench_cases()))


@pytest.mark.parametrize(
    "text",
    [
        "quantized_linear(m=-1)", "quantized_linear(bias=2)", "quantized_geglu(bias=1)", "quantized_linear(dtype=fp64)",
        "quantized_linear(scheme=Q2_K)", "quantized_linear(scheme=Q4_K,k=416)", "quantized_linear(n=0)",
        "quantized_linear(group=64)", "quantized_linear(scheme=W4A16,group=96)", "quantized_linear(sq=1)",
        "quantized_linear(k=x)",
    ],
)  # fmt: skip
def test_a_string_that_makes_no_case(text):
    with pytest.raises(ValueError, match=r"parse|invalid literal"):
        parse(text)


def test_inputs_of_a_case_are_the_same_every_time():
    case = parse("quantized_geglu(m=3,scheme=Q4_1)")
    first, second = case.inputs(), case.inputs()
    assert first.keys() == second.keys() >= {"x", "gate.codes", "up.offsets"}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["gate.codes"], first["up.codes"])


def test_the_lists_cover_schemes_rows_and_layers():
    for op in LINEAR_OPS:
        assert {case.scheme for case in linear_cases() if case.op == op} == set(SCHEMES)
    for scheme in SCHEMES:
        rows = {case.m for case in linear_cases() if case.op == "quantized_linear" and case.scheme == scheme}
        assert rows >= {1, 5, 16, 17, 300}
    timed = [case for case in linear_bench_cases() if case.op == "quantized_linear"]
    shapes = set(listed.model_shapes().values())
    assert {(15360, 3840), (3840, 15360), (4096, 3840), (512, 3840), (3840, 8192)} <= shapes
    for scheme in ("Q4_0", "W4A16", "Q4_K"):
        found = {(case.m, case.n, case.k) for case in timed if case.scheme == scheme}
        assert found == {(m, *shape) for m in (1, 2, 4, 5, 8, 16, 64, 512, 4096) for shape in shapes}
    assert {case.n for case in timed if case.scheme == "Q6_K"} == {GEMMA4_12B.vocab_size}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_of_a_weight_are_counted_without_making_it(scheme):
    assert weight_bytes(scheme, (8, 512)) == random_weight(scheme, (8, 512)).nbytes


def test_bytes_and_operations_of_a_decode_step():
    case = LinearCase("quantized_linear", m=5, n=64, k=256, scheme="Q4_0")
    weight = 64 * 256 * 4.5 / 8
    assert case.input_bytes() == weight + 5 * 256 * 2
    assert case.bytes_moved() == weight + 5 * 256 * 2 + 5 * 64 * 2
    assert case.operations() == 2 * 5 * 64 * 256
    gated = LinearCase("quantized_geglu", m=5, n=64, k=256, scheme="Q4_0")
    assert gated.bytes_moved() == case.bytes_moved() + weight
    assert gated.operations() == 2 * case.operations()
    assert LinearCase("quantized_argmax", m=5, n=64, k=256).bytes_moved() == weight + 5 * 256 * 2 + 5 * 8
    # Of an embedding, the rows that are asked for.
    assert LinearCase("quantized_embedding", m=5, n=64, k=256).bytes_moved() == 5 * (256 * 4.5 / 8 + 256 * 2)


@pytest.mark.parametrize("case", [
    LinearCase("quantized_linear", m=3, n=500, k=256), LinearCase("quantized_linear", m=3, n=500, k=256, bias=1),
    LinearCase("quantized_geglu", m=3, n=500, k=256),
], ids=str)  # fmt: skip
def test_an_excerpt_is_a_part_of_the_whole(case, monkeypatch):
    made = case.inputs()
    whole, result = case.reference(made)[0], case.run(made)
    monkeypatch.setattr(listed, "EXCERPT_ABOVE", 0)
    part = case.reference(made)[0]
    assert part.shape == (3, 3 * listed.EXCERPT_OUTPUTS)
    # Not to the bit: what a vector of gelu's function gives may differ from what the rest of a row gives.
    torch.testing.assert_close(part, case.judged((whole,))[0], rtol=1e-13, atol=1e-15)
    assert case.judged(result)[0].shape == part.shape
    assert torch.equal(part[:, -1], whole[:, -1])


# A kernel that is wrong is found -------------------------------------------------------------------------------------


def broken(monkeypatch, name, change):
    right = getattr(eager, name)
    monkeypatch.setattr(eager, name, lambda *arguments: change(right(*arguments), arguments))
    for (op, backend), implementation in backends._implementations.items():
        if op == name and backend == "eager":
            monkeypatch.setitem(implementation.__dict__, "function", getattr(eager, name))


def last_output_off(result, arguments):
    result[..., -1] += 0.5
    return result


def reads_the_codes_away(result, arguments):
    arguments[1].codes[0, 0] += 1
    return result


BROKEN = [
    ("quantized_linear", last_output_off, "budget"),
    ("quantized_linear", reads_the_codes_away, "weight.codes changed"),
    ("quantized_geglu", last_output_off, "budget"),
    ("quantized_argmax", lambda result, _: result - 1, "out"),
    ("quantized_embedding", last_output_off, "budget"),
]


@pytest.mark.parametrize(("op", "change", "reason"), BROKEN)
def test_a_wrong_result_does_not_hold(op, change, reason, monkeypatch):
    case = LinearCase(op, m=3, n=96, k=256, scheme="Q8_0")
    assert validation.check_case(case, ["eager"], CPU)[0].status == "held"
    broken(monkeypatch, op, change)
    (check,) = validation.check_case(case, ["eager"], CPU)
    assert check.status == "failed"
    assert reason in " ".join(check.reasons)


# Baselines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "dequantize", "torch_int4"])
def test_a_baseline_computes_the_same(name):
    case = LinearCase("quantized_linear", m=3, n=96, k=256)
    made = case.inputs()
    ready = case.baselines(made)[name]
    (verdict,) = validation._verdicts(case, (ready(),), case.reference(made), case.plain(made), []).values()
    assert verdict.ok, str(verdict)


def test_where_there_is_no_baseline_there_is_a_reason(monkeypatch):
    assert "only quantized_linear" in LinearCase("quantized_argmax", m=1).baselines(
        LinearCase("quantized_argmax", m=1).inputs()
    )["dense"]  # fmt: skip
    case = LinearCase("quantized_linear", m=1, scheme="Q8_0")
    assert "has no values" in case.baselines(case.inputs())["torch_int4"]
    found = case.baselines(case.inputs())
    assert tuple(found) == linear_baselines.NAMES
    assert "CUDA" in found["gemlite"]
    assert "CUDA" in found["bitsandbytes"]
    shuffled = LinearCase("quantized_linear", m=1, scheme="GPTQ", shuffled=1)
    assert "order of columns" in shuffled.baselines(shuffled.inputs())["torch_int4"]
    monkeypatch.setattr("gemma4_kernels.bench.linear_baselines.MAX_DENSE_BYTES", 10)
    assert "larger" in case.baselines(case.inputs())["dense"]


def test_the_packed_copy_is_not_part_of_the_case():
    """Inputs are cloned for cold timings; each clone is packed for itself, and goes with it."""
    case = LinearCase("quantized_linear", m=1, n=96, k=256)
    before = len(eager_int4._packed)
    made = case.inputs()
    case.run(made)
    del made
    assert len(eager_int4._packed) == before


def test_baselines_for_cuda_say_what_they_need():
    """What stands before the first call that only a GPU can make; meta tensors stand for the rest."""
    weight, x = random_weight("Q4_0", (96, 256)), torch.zeros(2, 256, dtype=torch.bfloat16)
    for call, text in [
        (lambda: linear_baselines._torch_int4_on_cuda(x, random_weight("Q4_K", (96, 256)), None), "Q4_K"),
        (lambda: linear_baselines._torch_int4_on_cuda(x.half(), weight, None), "takes bf16"),
        (lambda: linear_baselines._torch_int4_on_cuda(x, random_weight("Q4_0", (96, 160)), None), "128 columns"),
    ]:
        assert text in call()
