"""The table of the compiled products: it covers every size, gives reasons, and cuts K without a look at the rows of x."""

from __future__ import annotations

from dataclasses import fields
from itertools import product

import pytest
import torch
from linear_products import assert_linear, drawn
from linear_weights import random_weight

from gemma4_kernels import backends, explain, quantized_linear, use_backend
from gemma4_kernels.backends import Call
from gemma4_kernels.cuda_common import support
from gemma4_kernels.linear import cuda, cuda_table

emulated = support._load("_C_emulated")
needs_emulator = pytest.mark.skipif(isinstance(emulated, str), reason=str(emulated))


@pytest.fixture
def on_emulator(monkeypatch):
    monkeypatch.setenv("GEMMA4_EMULATE", "1")
    backends._select.cache_clear()
    with use_backend("cuda"):
        yield
    backends._select.cache_clear()
    cuda_table.pieces.cache_clear()


def use_pieces(monkeypatch, number: int) -> None:
    cuda_table.pieces.cache_clear()
    monkeypatch.setattr(cuda_table, "PIECES", (cuda_table.Pieces(pieces=number, reason="for a test"),))


# Data ---------------------------------------------------------------------------------------------------------------


def test_every_size_has_a_choice_and_reasons_are_sentences():
    sizes = product(
        (0, 1, 8, 16, 17, 4096), (1, 512, 262144), (32, 3840, 1 << 20), (1, 28, 132), ("sm_80", "sm_120", "cpu")
    )
    for rows, *place in sizes:
        assert cuda_table.choice(rows, *place).compiled == (rows <= cuda_table.MOST_ROWS)
    for row in (*cuda_table.CHOICES, *cuda_table.PIECES):
        assert len(row.reason.split()) >= 5, row
        for first, last in (row.outputs, row.columns, row.multiprocessors):
            assert 0 <= first <= last, row


def test_figures_in_reasons_are_called_predictions():
    for row in cuda_table.PIECES:
        assert "%" not in row.reason or "(predicted: " in row.reason, row


def test_pieces_know_nothing_of_rows_of_x():
    """Or a row's bits would depend on the number of rows."""
    assert "rows" not in {field.name for field in fields(cuda_table.Pieces)}


def test_the_first_row_that_fits_counts():
    table = (
        cuda_table.Pieces(pieces=3, outputs=(10, 20), multiprocessors=(28, 28), reason=""),
        cuda_table.Pieces(pieces=5, columns=(256, 512), architectures=frozenset({"sm_86"}), reason=""),
    )
    first = cuda_table._first
    assert first(table, 10, 256, 28, "sm_86") is table[0]
    assert first(table, 20, 99, 28, "sm_90") is table[0]
    assert first(table, 20, 256, 29, "sm_86") is table[1]
    assert first(table, 21, 512, 28, "sm_86") is table[1]
    assert first(table, 21, 513, 28, "sm_86") is None
    assert first(table, 9, 512, 28, "sm_89") is None


@pytest.mark.parametrize(
    ("K", "asked", "got"),
    [
        (3840, 1, (1, 15)),
        (3840, 2, (2, 8)),
        (3840, 6, (5, 3)),
        (3840, 15, (15, 1)),
        (3840, 99, (15, 1)),
        (32, 4, (1, 1)),
    ],
)
def test_pieces_are_whole_stages(K, asked, got):
    assert cuda_table.cut(K, asked) == got


@pytest.mark.parametrize(
    ("N", "K", "multiprocessors", "number"),
    [
        (512, 3840, 28, 4),  # 8 tiles: 15 stages, 8, 4, and half of that is too short
        (2048, 3840, 28, 2),  # 32 tiles
        (3840, 15360, 28, 1),  # 60 tiles are more than 56
        (3840, 15360, 84, 4),
        (15360, 3840, 132, 2),
        (1, 32, 132, 1),
    ],
)
def test_the_rule_by_hand(N, K, multiprocessors, number):
    assert cuda_table.halved(N, K, multiprocessors) == number


# What serves calls --------------------------------------------------------------------------------------------------


def workspace_pieces(N: int, K: int, pieces: int) -> int:
    """Pieces that the library makes, of its own by 0: it wants fp32 for each, and none for one."""
    arguments = emulated.LinearArguments(
        x=64, x_stride=K, out=64, out_stride=N, m=1, dtype=0, bias=0, bias_dtype=0, n=N, k=K, group_size=32, codes=64,
        scales=64, scale_dtype=1, zeros=0, offsets=0, group_scales=0, table=0, values=0, scale_kind=0, zero=8, pieces=pieces,
    )  # fmt: skip
    return emulated.linear_workspace(arguments) // (4 * N) or 1


@needs_emulator
def test_the_library_and_its_twin_cut_alike():
    for N, K in product((1, 64, 512, 1000, 2048, 3840, 262144), (32, 1792, 2048, 3840, 4096, 15360)):
        assert workspace_pieces(N, K, 0) == cuda_table.halved(N, K, support.EMULATED_MULTIPROCESSORS), (N, K)
        for asked in (1, 2, 3, 6, 7, 15, 1000, 2**31 - 1):
            assert workspace_pieces(N, K, asked) == cuda_table.cut(K, asked)[0], (N, K, asked)


@needs_emulator
def test_negative_pieces_are_refused():
    with pytest.raises(ValueError, match="pieces must be at least 0, got -1"):
        workspace_pieces(64, 256, -1)


@needs_emulator
@pytest.mark.parametrize("number", [1, 3, 5, 15])
def test_a_row_keeps_its_bits_in_any_number_of_pieces(number, on_emulator, monkeypatch):
    use_pieces(monkeypatch, number)
    weight, x = random_weight("Q4_0", (70, 3840)), drawn(16, 3840)
    assert_linear(x[:3], weight, drawn(70, dtype=torch.float32, seed=2))
    # The second half takes the first away again. What is left are the roundings, and any other order of sums shows.
    weight.codes[:, 240:] = weight.codes[:, :240]
    weight.scales[:, 60:] = weight.scales[:, :60]
    x[:, 1920:] = -x[:, :1920]
    together = quantized_linear(x, weight)
    assert bool(together.count_nonzero() > together.numel() / 2)
    for first, last in ((0, 1), (15, 16), (3, 8), (2, 11)):
        assert torch.equal(quantized_linear(x[first:last], weight), together[first:last])


@needs_emulator
def test_calls_are_cut_as_the_table_says(on_emulator, monkeypatch):
    """28 multiprocessors, as a 3060: its rows are what the emulator runs."""
    asked = []
    whole = emulated.LinearArguments
    monkeypatch.setattr(emulated, "LinearArguments", lambda **fields: asked.append(fields["pieces"]) or whole(**fields))
    row = cuda_table.Pieces(pieces=3, outputs=(70, 70), multiprocessors=(28, 28), reason="for a test")
    cuda_table.pieces.cache_clear()
    monkeypatch.setattr(cuda_table, "PIECES", (row,))
    for N in (70, 33):
        quantized_linear(drawn(2, 1024), random_weight("Q4_0", (N, 1024)))
    assert asked == [3, 0]


@needs_emulator
def test_explain_shows_the_reasons(on_emulator, monkeypatch):
    weight, x = random_weight("Q4_0", (70, 1024)), drawn(17, 1024)
    use_pieces(monkeypatch, 3)
    said = str(explain("quantized_linear", x=x[:2], weight=weight))
    assert cuda_table.CHOICES[0].reason in said
    assert "K in 2 pieces, 4 blocks on 28 multiprocessors: for a test" in said
    monkeypatch.setattr(cuda_table, "PIECES", ())
    assert "K in 1 piece, 2 blocks on 28 multiprocessors: K is halved until" in str(
        explain("quantized_linear", x=x[:2], weight=weight)
    )
    with use_backend(None):
        assert "goes to 16 rows: from there on Triton" in str(explain("quantized_linear", x=x, weight=weight))


def test_a_choice_may_depend_on_sizes_and_device(monkeypatch):
    small = cuda_table.Choice(
        rows=(9, 16), outputs=(0, 512), multiprocessors=(100, 200), architectures=frozenset({"sm_90"}), compiled=False,
        reason="is left to others",
    )  # fmt: skip
    monkeypatch.setattr(cuda_table, "CHOICES", (small, *cuda_table.CHOICES))
    monkeypatch.setattr(support, "refuses", lambda call: None)

    def refusal(**changes):
        settings = {"sizes": (9, 512, 3840), "multiprocessors": 132, "architecture": "sm_90", **changes}
        return cuda.refuses(
            Call("quantized_linear", "cuda", scheme="Q4_0", group_size=32, shape_class="decode", **settings)
        )

    assert refusal() == "is left to others"
    for changes in (
        {"sizes": (8, 512, 3840)},
        {"sizes": (9, 513, 3840)},
        {"multiprocessors": 84},
        {"architecture": "sm_80"},
    ):
        assert refusal(**changes) is None
    assert refusal(sizes=(17, 512, 3840)).startswith("goes to 16 rows")
