"""GeGLU, argmax and embedding from quantised weights in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_weights import random_weight
from torch.nn.functional import gelu
from torch.nn.functional import linear as dense_linear

from gemma4_kernels import environment
from gemma4_kernels.bench.errors import judge
from gemma4_kernels.bench.guards import GuardedInputs, same_bits
from gemma4_kernels.linear.schemes import SCHEMES

pytest.importorskip("triton")
if not environment.triton_interprets():
    pytest.skip("needs TRITON_INTERPRET=1; `make test` runs it in a second process", allow_module_level=True)

from gemma4_kernels.linear.triton import argmax, backend, embedding, geglu, linear, tables

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# One dtype for each scheme and number of rows, in turn: every kind of value meets every dtype.
ROTATED = [(scheme, DTYPES[index % 3]) for index, scheme in enumerate(SCHEMES)]
# More outputs than a card of 28 multiprocessors needs for two programs each, so that K stays whole; few columns.
WIDE = (64 * 56 - 3, 32)


def drawn(rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(scheme: str, *shape_and_group):
    """Gate and up: different codes, scales of their own."""
    return random_weight(scheme, *shape_and_group), random_weight(scheme, *shape_and_group, seed=7)


def guarded(weight):
    """The same weight, each tensor between guards that turn results into NaN."""
    inputs = GuardedInputs(weight.tensors(), torch.device("cpu"))
    return replace(weight, **inputs.arguments), inputs


def hidden(rows: int, gate, dtype: torch.dtype) -> torch.Tensor:
    """x whose products with the gate are of a few units, where GeLU bends, and do not overflow fp16 when multiplied."""
    x = drawn(rows, gate.shape[1], torch.float32)
    return (x * (2 / dense_linear(x, gate.dequantize()).std())).to(dtype)


def assert_geglu(got, x, gate, up):
    exact = [dense_linear(x.double(), weight.dequantize(torch.float32).double()) for weight in (gate, up)]
    plain = [dense_linear(x, weight.dequantize(x.dtype)) for weight in (gate, up)]
    exact, plain = (gelu(a, approximate="tanh") * b for a, b in (exact, plain))
    assert got.dtype == x.dtype
    assert (verdict := judge(got, exact, plain)).ok, str(verdict)


# GeGLU ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "dtype"), ROTATED, ids=str)
def test_geglu_of_every_scheme_keeps_the_error_rule(scheme, dtype):
    """The launches are judged together: the error of plain PyTorch in 70 numbers is too much a matter of luck in fp32."""
    gate, up = pair(scheme)
    x = hidden(1 + 5 + 17, gate, dtype)
    out = torch.full((x.shape[0], gate.shape[0]), float("nan"), dtype=dtype)
    for part, result in zip(x.split((1, 5, 17)), out.split((1, 5, 17)), strict=True):
        (launch,) = geglu.plan(part, gate, up, result, 1)
        launch.run()
    assert_geglu(out, x, gate, up)


def test_gelu_keeps_its_digits_where_tanh_is_near_minus_one():
    """Against float64, over the whole range: a form that subtracts from one loses everything below -4."""
    gate = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([-3e38, 3e38, -0.0, float("inf"), float("nan")])))
    got = torch.empty_like(gate)
    geglu.plan_combine(gate, torch.ones_like(gate), got).run()
    x = gate.double()
    u = 0.7978845608028654 * (x + 0.044715 * x**3)
    exact = x * torch.sigmoid(2 * u)
    assert torch.allclose(
        got.double(), exact, rtol=2e-5, atol=1e-38, equal_nan=True
    )  # exp's argument has 24 bits itself


def test_a_geglu_row_keeps_its_bits_among_others():
    gate, up = pair("Q4_K", (70, 512))
    x = hidden(16, gate, torch.bfloat16)

    def run(rows):
        out = torch.full((rows.shape[0], 70), float("nan"), dtype=x.dtype)
        (launch,) = geglu.plan(rows, gate, up, out, 1)
        launch.run()
        return out, (launch.constants, launch.num_warps)

    together, binary = run(x)
    for row in (0, 7, 15):
        alone, same = run(x[row : row + 1])
        assert same == binary
        assert torch.equal(alone[0], together[row])


def test_geglu_adds_in_the_order_of_the_product():
    """In fp32, where nothing is rounded away: the sums are those of `quantized_linear`, bit for bit."""
    gate, up = pair("W4A16", (40, 320), 32)
    x = hidden(3, gate, torch.bfloat16)
    out = torch.empty(3, 40)
    (launch,) = geglu.plan(x, gate, up, out, 1)
    launch.run()
    products = [torch.empty(3, 40), torch.empty(3, 40)]
    for weight, product in zip((gate, up), products, strict=True):
        (launch,) = linear.plan(x, weight, None, product, 1)
        launch.run()
    combined = torch.empty(3, 40)
    geglu.plan_combine(*products, combined).run()
    assert torch.equal(out, combined)


def test_geglu_in_two_products_where_k_is_cut():
    """As one pass it would be another order of sums than `quantized_linear` has; a row keeps its bits here too."""
    gate, up = pair("Q4_0", (40, 128 * 35 + 32))
    x = hidden(4, gate, torch.bfloat16)
    assert geglu.plan(x, gate, up, x.new_empty(4, 40), 28) is None
    together = backend.quantized_geglu(x, gate, up)
    assert_geglu(together, x, gate, up)
    assert torch.equal(backend.quantized_geglu(x[2:3], gate, up)[0], together[2])


def test_geglu_of_weights_that_are_not_alike():
    order = torch.randperm(160, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    gate, up = pair("GPTQ")
    cases = [
        (random_weight("Q4_0"), random_weight("Q4_1")),
        (random_weight("W4A16", (70, 160), 32), random_weight("W4A16", (70, 160), 160)),
        (gate, replace(up, columns=order)),
        (replace(gate, columns=order), replace(up, columns=order.flip(0).contiguous())),
        (gate, replace(up, scales=up.scales.float())),
    ]
    x = hidden(3, gate, torch.float16)
    for first, second in cases:
        assert geglu.plan(x, first, second, x.new_empty(3, 70), 1) is None
        assert_geglu(backend.quantized_geglu(x, first, second), x, first, second)


def test_geglu_with_columns_in_another_order(monkeypatch):
    monkeypatch.setattr(tables, "splits", lambda *arguments: 1)
    order = torch.randperm(160, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    gate, up = (replace(weight, columns=order) for weight in pair("GPTQ"))
    assert gate.is_stored_like(up)
    x = hidden(3, gate, torch.float16)
    assert_geglu(backend.quantized_geglu(x, gate, up), x, gate, up)


def test_geglu_of_many_rows_takes_the_weights_written_out(monkeypatch):
    monkeypatch.setattr(tables, "dequantize_from_rows", lambda *arguments: 20)
    ran = []
    monkeypatch.setattr(linear, "plan", lambda *arguments: ran.append("tiles"))
    monkeypatch.setattr(geglu, "plan", lambda *arguments: ran.append("tiles"))
    gate, up = pair("Q6_K")
    x = hidden(20, gate, torch.bfloat16)
    assert_geglu(backend.quantized_geglu(x, gate, up), x, gate, up)
    assert not ran


def test_geglu_touches_nothing_but_its_result():
    gate, up = pair("Q5_1")
    x = hidden(3, gate, torch.bfloat16)
    expected, got = torch.empty(3, 70, dtype=x.dtype), torch.full((3, 70), 7.0, dtype=x.dtype)
    (launch,) = geglu.plan(x, gate, up, expected, 1)
    launch.run()
    (safe_gate, inputs), (safe_up, more) = guarded(gate), guarded(up)
    place = GuardedInputs({"out": got}, torch.device("cpu"))
    (launch,) = geglu.plan(x, safe_gate, safe_up, place.arguments["out"], 1)
    launch.run()
    assert not place.damage({"out": expected}) + inputs.damage(gate.tensors()) + more.damage(up.tensors())


# Argmax ---------------------------------------------------------------------------------------------------------------


def planned_argmax(x, weight, multiprocessors=1):
    """(indices of the fused kernels, indices of the logits of the same tiles)."""
    out = torch.full((x.shape[0],), -7, dtype=torch.int64)
    for launch in argmax.plan(x, weight, out, multiprocessors):
        launch.run()
    logits = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    for launch in linear.plan(x, weight, None, logits, multiprocessors):
        launch.run()
    return out, logits.argmax(-1)


@pytest.mark.parametrize(("scheme", "dtype"), ROTATED, ids=str)
def test_argmax_of_every_scheme_is_that_of_the_product(scheme, dtype):
    weight = random_weight(scheme)
    for rows in (1, 5, 17):
        got, expected = planned_argmax(drawn(rows, weight.shape[1], dtype), weight)
        assert torch.equal(got, expected)


def test_argmax_as_it_is_called_for_a_vocabulary():
    weight = random_weight("Q8_0", WIDE)
    for rows in (1, 16, 17):
        x = drawn(rows, WIDE[1], torch.bfloat16)
        assert argmax.plan(x, weight, torch.empty(rows, dtype=torch.int64), 28) is not None
        assert torch.equal(backend.quantized_argmax(x, weight), backend.quantized_linear(x, weight, None).argmax(-1))


def one_hot_head(values: dict[int, float], outputs: int, others: float = 0.0):
    """A weight whose logits are chosen: with x = (1, 0, ...), logit n is values[n]."""
    weight = random_weight("Q8_0", (outputs, 32))
    scales = torch.full((outputs, 1), others, dtype=torch.float16)
    for n, value in values.items():
        scales[n] = value
    return replace(weight, codes=torch.ones_like(weight.codes), scales=scales)


def first_only(rows: int = 1, dtype=torch.bfloat16):
    x = torch.zeros(rows, 32, dtype=dtype)
    x[:, 0] = 1
    return x


@pytest.mark.parametrize(
    ("values", "others", "expected"),
    [
        ({3: 2.0, 63: 2.0, 64: 2.0, 199: 2.0}, 0.0, 3),  # ties within a tile and between tiles
        ({64: 2.0, 130: 2.0, 199: 2.0}, 0.0, 64),
        ({199: 2.0}, 0.0, 199),  # the last of a tile that is not full
        ({}, 0.0, 0),  # all equal
        ({}, -1.0, 0),  # all negative: what does not exist is not a zero
        ({150: 0.0}, -0.0, 0),  # zeros of either sign are equal
        ({5: float("inf"), 100: float("inf")}, 0.0, 5),
    ],
)
def test_ties_go_to_the_lowest_index(values, others, expected, monkeypatch):
    monkeypatch.setattr(tables, "splits", lambda *arguments: 1)
    weight = one_hot_head(values, 200, others)
    # Zero times infinity is NaN: where a scale is infinite x has one column of ones and codes of the others are zero.
    if any(value == float("inf") for value in values.values()):
        x = torch.ones(2, 32, dtype=torch.bfloat16)
        assert planned_argmax(x, weight)[0].tolist() == [expected] * 2
    else:
        got, product = planned_argmax(first_only(2), weight)
        assert got.tolist() == product.tolist() == [expected] * 2


def test_sums_that_round_to_one_logit_are_a_tie():
    weight = one_hot_head({70: 1.0, 140: 1.0}, 200)
    weight.codes[70, 1] = 0
    x = first_only()
    x[:, 1] = 2**-9  # 1 + 2**-9, in bf16 1
    got, product = planned_argmax(x, weight)
    assert got.tolist() == product.tolist() == [70]


def test_a_row_with_a_nan_gives_minus_one_and_others_their_index():
    weight = random_weight("Q4_0", (200, 64))
    x = drawn(4, 64, torch.float16)
    expected = planned_argmax(x, weight)[1]
    x[1, 5] = float("nan")
    expected[1] = -1
    assert torch.equal(planned_argmax(x, weight)[0], expected)
    for place in (0, 100, 199):  # of one logit alone, in each tile
        got, _ = planned_argmax(first_only(), one_hot_head({place: float("nan"), 150: 3.0}, 200))
        assert got.tolist() == [-1]


def test_a_row_of_minus_infinity_gives_zero():
    weight = one_hot_head({}, 200, float("-inf"))
    assert planned_argmax(torch.ones(2, 32, dtype=torch.bfloat16), weight)[0].tolist() == [0, 0]


def test_tiles_beyond_one_pass_of_the_second_kernel(monkeypatch):
    monkeypatch.setattr(tables, "ARGMAX_TILES", 2)
    for n in (10, 130, 260, 390, 520):  # five tiles of a pass of two, with a tie in the last
        got, _ = planned_argmax(first_only(3), one_hot_head({n: 1.0, 570: 1.0}, 571))
        assert got.tolist() == [n] * 3
    got, _ = planned_argmax(first_only(), one_hot_head({n: float("nan")}, 571))
    assert got.tolist() == [-1]


def test_argmax_where_k_is_cut():
    weight = random_weight("Q4_0", (40, 128 * 35 + 32))
    x = drawn(3, weight.shape[1], torch.bfloat16)
    assert argmax.plan(x, weight, torch.empty(3, dtype=torch.int64), 28) is None
    expected = backend.quantized_linear(x, weight, None).argmax(-1)
    assert torch.equal(backend.quantized_argmax(x, weight), expected)
    x[1, 0] = float("nan")
    expected[1] = -1
    assert torch.equal(backend.quantized_argmax(x, weight), expected)


def test_argmax_takes_many_rows_in_parts(monkeypatch):
    monkeypatch.setattr(tables, "ARGMAX_ROWS", 24)
    monkeypatch.setattr(tables, "splits", lambda *arguments: 1)
    order = torch.randperm(160, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    weight = replace(random_weight("GPTQ"), columns=order)
    x = drawn(60, 160, torch.float16)
    assert torch.equal(backend.quantized_argmax(x, weight), backend.quantized_linear(x, weight, None).argmax(-1))


def test_argmax_touches_nothing_but_its_result():
    weight = random_weight("Q5_1")
    x = drawn(3, 160, torch.bfloat16)
    _, expected = planned_argmax(x, weight)
    safe, inputs = guarded(weight)
    place = GuardedInputs({"out": torch.full((3,), -7)}, torch.device("cpu"))
    for launch in argmax.plan(x, safe, place.arguments["out"], 1):
        for name in ("largest_ptr", "indices_ptr"):  # between guards too, with what they hold
            if launch.kernel is argmax.argmax_kernel:
                inner = GuardedInputs({name: launch.arguments[name]}, torch.device("cpu"))
                replace(launch, arguments={**launch.arguments, name: inner.arguments[name]}).run()
                launch.run()
                assert not inner.damage({name: launch.arguments[name]})
        launch.run()
    assert not place.damage({"out": expected}) + inputs.damage(weight.tensors())


# Embedding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_embedding_rows_are_those_of_the_weight_bit_for_bit(scheme):
    weight = random_weight(scheme)
    last = weight.shape[0] - 1
    ids = torch.tensor([5, 0, last, 5, 17, last, 33, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13])
    for dtype in DTYPES:
        got = backend.quantized_embedding(ids.to(torch.int32 if dtype == torch.float16 else torch.int64), weight, dtype)
        assert same_bits(got, weight.dequantize(dtype)[ids])


@pytest.mark.parametrize("scheme", ["GPTQ", "W4A16"])
def test_embedding_puts_columns_back(scheme):
    order = torch.randperm(160, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    weight = replace(random_weight(scheme), columns=order)
    ids = torch.tensor([3, 69, 0])
    assert same_bits(backend.quantized_embedding(ids, weight, torch.bfloat16), weight.dequantize(torch.bfloat16)[ids])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_id_that_is_no_row_gives_nan_and_nothing_is_read_for_it(scheme):
    """Read with ids so far outside that the process would not survive it."""
    weight = random_weight(scheme)
    for integer in (torch.int32, torch.int64):
        far = torch.iinfo(integer)
        ids = torch.tensor([1, -1, weight.shape[0], 2, far.min, far.max], dtype=integer)
        got = backend.quantized_embedding(ids, weight, torch.bfloat16)
        assert same_bits(got[[0, 3]], weight.dequantize(torch.bfloat16)[[1, 2]])
        assert got[[1, 2, 4, 5]].isnan().all()


def test_embedding_of_ids_that_are_not_neighbours_in_memory():
    weight = random_weight("Q6_K")
    ids = torch.arange(20)[::3]
    assert same_bits(backend.quantized_embedding(ids, weight, torch.float32), weight.dequantize()[ids])


def test_embedding_touches_nothing_but_its_result():
    weight = random_weight("Q5_1")
    ids = torch.tensor([69, 70, 0])
    expected = backend.quantized_embedding(ids, weight, torch.bfloat16)
    safe, inputs = guarded(weight)
    made = GuardedInputs({"out": torch.zeros_like(expected), "ids": ids}, torch.device("cpu"))
    embedding.plan(made.arguments["ids"], safe, made.arguments["out"]).run()
    assert not made.damage({"out": expected, "ids": ids}) + inputs.damage(weight.tensors())


# All of them ----------------------------------------------------------------------------------------------------------


def test_no_rows_at_all():
    gate = random_weight("Q4_0")
    for wide in (gate, random_weight("Q8_0", WIDE), random_weight("Q4_0", (40, 128 * 36))):
        x = torch.empty(0, wide.shape[1], dtype=torch.bfloat16)
        assert backend.quantized_linear(x, wide, None).shape == (0, wide.shape[0])
        assert backend.quantized_geglu(x, wide, wide).shape == (0, wide.shape[0])
        indices = backend.quantized_argmax(x, wide)
        assert (indices.shape, indices.dtype) == ((0,), torch.int64)
    rows = backend.quantized_embedding(torch.empty(0, dtype=torch.int32), gate, torch.float16)
    assert (rows.shape, rows.dtype) == ((0, 160), torch.float16)


@pytest.mark.parametrize(("multiprocessors", "rows"), [(28, 1024), (48, 1024), (82, 512), (108, 256), (170, 256)])
def test_larger_cards_write_a_weight_out_from_fewer_rows_on(multiprocessors, rows):
    assert tables.dequantize_from_rows(15360, 3840, multiprocessors) == rows
    assert tables.dequantize_from_rows(1024, 3840, multiprocessors) == 2048
    assert max(rows, 2048) <= tables.ARGMAX_ROWS  # so a part of an argmax has the tiles of the whole product
