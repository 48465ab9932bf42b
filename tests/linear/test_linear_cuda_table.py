"""The table of the compiled products: it covers every size, gives reasons, and cuts K without a look at the rows of x."""

from __future__ import annotations

from dataclasses import fields
from itertools import product

import pytest
import torch
from linear_products import assert_linear, cancelling, drawn
from linear_weights import random_weight

from gemma4_kernels import backends, explain, quantized_argmax, quantized_geglu, quantized_linear, use_backend
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


def stored(N: int, K: int, bits: int):
    return emulated.Weight(
        n=N, k=K, group_size=32, codes=64, high=0, scales=64, scale_dtype=1, zeros=0, offsets=0, group_scales=0, table=0,
        scale_table=0, scale_scales=0, scale_offset=0, bits=bits, values=0, scale_kind=0, zero=0,
    )  # fmt: skip


def workspace_pieces(N: int, K: int, pieces: int, bits: int = 4) -> int:
    """Pieces that the library makes, of its own by 0: it wants fp32 for each, and none for one."""
    arguments = emulated.LinearArguments(
        weight=stored(N, K, bits), x=64, x_stride=K, m=1, dtype=0, pieces=pieces, out=64, out_stride=N, bias=0, bias_dtype=0,
        residual=0, residual_stride=0,
    )  # fmt: skip
    return emulated.linear_workspace(arguments) // (4 * N) or 1


def workspace_pieces_of_geglu(N: int, K: int, pieces: int) -> int:
    weight = stored(N, K, 4)
    arguments = emulated.LinearGegluArguments(
        gate=weight, up=weight, x=64, x_stride=K, m=1, dtype=0, pieces=pieces, out=64, out_stride=N
    )
    return emulated.linear_geglu_workspace(arguments) // (8 * N) or 1


@needs_emulator
@pytest.mark.parametrize("bits", [4, 8])
def test_the_library_and_its_twin_cut_alike(bits):
    for N, K in product((1, 64, 512, 1000, 2048, 3840, 262144), (32, 928, 1792, 2048, 3840, 4096, 15360)):
        assert workspace_pieces(N, K, 0, bits) == cuda_table.halved(N, K, support.EMULATED_MULTIPROCESSORS, bits), (
            N,
            K,
        )
        for asked in (1, 2, 3, 6, 7, 15, 1000, 2**31 - 1):
            assert workspace_pieces(N, K, asked, bits) == cuda_table.cut(K, asked, bits)[0], (N, K, asked)


@needs_emulator
def test_geglu_is_cut_like_a_product_of_both_weights():
    for N, K in product((1, 32, 33, 256, 500, 1024, 1920), (32, 2048, 3840, 15360)):
        assert workspace_pieces_of_geglu(N, K, 0) == cuda_table.halved(2 * N, K, support.EMULATED_MULTIPROCESSORS), (
            N,
            K,
        )
        assert workspace_pieces_of_geglu(N, K, 3) == cuda_table.cut(K, 3)[0], (N, K)


@needs_emulator
def test_negative_pieces_are_refused():
    with pytest.raises(ValueError, match="pieces must be at least 0, got -1"):
        workspace_pieces(64, 256, -1)
    with pytest.raises(ValueError, match="gemma4_linear_geglu: pieces must be at least 0, got -7"):
        workspace_pieces_of_geglu(64, 256, -7)
    arguments = emulated.LinearArgmaxArguments(
        weight=stored(64, 256, 4), x=64, x_stride=256, m=1, dtype=0, pieces=-1, indices=64
    )
    with pytest.raises(ValueError, match="gemma4_linear_argmax: pieces must be at least 0, got -1"):
        emulated.linear_argmax_workspace(arguments)


@needs_emulator
@pytest.mark.parametrize("number", [1, 3, 5, 15])
def test_a_row_keeps_its_bits_in_any_number_of_pieces(number, on_emulator, monkeypatch):
    use_pieces(monkeypatch, number)
    weight = random_weight("Q4_0", (70, 3840))
    assert_linear(drawn(3, 3840), weight, drawn(70, dtype=torch.float32, seed=2))
    weight, x = cancelling("Q4_0", (70, 3840), 16)
    together = quantized_linear(x, weight)
    assert bool(together.count_nonzero() > together.numel() / 2)
    for first, last in ((0, 1), (15, 16), (3, 8), (2, 11)):
        assert torch.equal(quantized_linear(x[first:last], weight), together[first:last])


@needs_emulator
def test_calls_are_cut_as_the_table_says(on_emulator, monkeypatch):
    """28 multiprocessors, as a 3060: its rows are what the emulator runs."""
    asked = []
    for name in ("LinearArguments", "LinearGegluArguments", "LinearArgmaxArguments"):
        whole = getattr(emulated, name)
        noted = lambda whole=whole, **fields: asked.append(fields["pieces"]) or whole(**fields)  # noqa: E731
        monkeypatch.setattr(emulated, name, noted)
    row = cuda_table.Pieces(pieces=3, outputs=(70, 70), multiprocessors=(28, 28), reason="for a test")
    cuda_table.pieces.cache_clear()
    monkeypatch.setattr(cuda_table, "PIECES", (row,))
    x = drawn(2, 1024)
    for N in (70, 35):
        weight = random_weight("Q4_0", (N, 1024))
        quantized_linear(x, weight)
        quantized_argmax(x, weight)
        quantized_geglu(x, weight, weight)
    # A block of GeGLU owns 32 outputs of each weight: to the card it is a product of both.
    assert asked == [3, 3, 0, 0, 0, 3]


@needs_emulator
@pytest.mark.parametrize("scheme", ["Q4_0", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("number", [2, 3, 5])
def test_an_argmax_has_the_logits_of_the_product_in_any_number_of_pieces(number, scheme, on_emulator, monkeypatch):
    """Sums that cancel are roundings alone, and the largest of those is another one in every other order of sums."""
    weight, x = cancelling(scheme, (70, 1280 if scheme == "Q6_K" else 1344), 9)
    use_pieces(monkeypatch, 1)
    whole = quantized_linear(x, weight)
    use_pieces(monkeypatch, number)
    logits = quantized_linear(x, weight)
    assert not torch.equal(logits.argmax(-1), whole.argmax(-1))
    assert torch.equal(quantized_argmax(x, weight), logits.argmax(-1))


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
    gated = str(explain("quantized_geglu", x=x[:2], gate=weight, up=weight))
    assert "K in 1 piece, 3 blocks on 28 multiprocessors" in gated
    wide = random_weight("Q8_0", (70, 1024))
    assert "K in 2 pieces, 4 blocks" in str(explain("quantized_argmax", x=x[:2], weight=wide))
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
