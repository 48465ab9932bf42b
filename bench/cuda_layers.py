"""The linear layers of the 12B on the compiled kernels, card by card, on paper: blocks, bytes under way, time.

`occupancy` has the formula. What enters it from the kernels is the schedule of csrc/linear (`cuda_kernels.Stage`) and, read
from machine code, registers and instructions. `Scheme.paper` stands for the latter where there is no machine code: the most
that tests allow.

x is not counted: it comes from L2, 16 bytes for 16 bytes of codes at up to 8 rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from gemma4_kernels.bench import cards, cuda_kernels, occupancy, static, tables
from gemma4_kernels.bench.linear_cases import model_shapes
from gemma4_kernels.geometry import GEMMA4_12B
from gemma4_kernels.linear import cuda_table

ROWS = (1, 8, 16)
_PARTIAL_BYTES = 8  # of a row's output and piece: written and read in fp32


class Code(NamedTuple):
    """What the machine code of a kernel adds to its schedule."""

    instructions: float
    """Warp instructions for 128 bytes of codes."""
    registers: int


class Scheme(NamedTuple):
    """Of a weight, as far as time goes. Of the 12B's files these are the layers', and those of heads."""

    bits: int
    stored: float
    """Bits of a weight with its scales."""
    scales: str
    """As the name of a function has them."""
    paper: Mapping[int, Code]
    """By rows of x: what tests/linear/test_linear_cuda_budgets.py holds the machine code to, where there is none to be read."""


SCHEMES = {
    "Q4_0": Scheme(4, 4.5, "Fp16", {8: Code(19.0, 128), 16: Code(24.0, 168)}),
    "Q6_K": Scheme(6, 6.5625, "Int8", {8: Code(23.0, 255), 16: Code(27.0, 255)}),
    "Q8_0": Scheme(8, 8.5, "Fp16", {8: Code(15.0, 128), 16: Code(17.5, 168)}),
}
VALUES = "centred"  # of all of them

# The 12B -------------------------------------------------------------------------------------------------------------


def layers() -> dict[str, tuple[int, int]]:
    """(N, K) of the 12B's linear layers, each shape once: "sliding q", ..., "head"."""
    names: dict[tuple[int, int], list[str]] = {}
    for name, shape in model_shapes().items():
        names.setdefault(shape, []).append(name)
    found = {", ".join(each): shape for shape, each in names.items()}
    wide, hidden = model_shapes()["gate or up"]
    # To the card GeGLU is a product of both weights: its blocks own 32 outputs of each.
    return found | {"gate and up": (2 * wide, hidden), "head": (GEMMA4_12B.vocab_size, hidden)}


class Prediction(NamedTuple):
    """Of one product."""

    pieces: int
    blocks: int
    resident: int
    """Blocks of a multiprocessor at a time, by registers, shared memory and threads."""
    waves: float
    in_flight: float
    """Bytes of codes under way on a multiprocessor, with as many blocks as it holds and there are."""
    wanted: float
    """The same for full bandwidth: `occupancy.wanted_in_flight`."""
    times: occupancy.Times
    """Of all blocks as one wave: what binds."""
    ns: float
    dram_share: float
    """Bytes of the weight over what the card's memory could deliver in this time."""


def predict(
    card: cards.Card, m: int, n: int, k: int, *, scheme: str = "Q4_0", pieces: int = 0,
    codes: Mapping[int, Code] | None = None, latency: float = occupancy.DRAM_LATENCY_NS,
    kernel_ns: float = occupancy.KERNEL_NS,
) -> Prediction:  # fmt: skip
    """`pieces` of K; 0 for those of the table, or of the library's rule. `codes` of the scheme, else those on paper."""
    assert card.bandwidth is not None
    assert card.sms is not None
    assert card.architecture is not None
    bits, stored, _, paper = SCHEMES[scheme]
    number, longest = cuda_table.cut(k, pieces or pieces_of(card, n, k, bits), bits)
    stage = cuda_kernels.Stage(VALUES, bits, -(-m // cuda_kernels.TILE_ROWS))
    code = (codes or paper)[stage.rows]
    resident = occupancy.resident_blocks(card.architecture, code.registers, stage.shared_bytes, cuda_kernels.WARPS)
    # Of the stages in the ring one is being multiplied.
    in_flight = (stage.ring_stages - 1) * stage.code_bytes
    weights = longest * stage.columns * cuda_table.OUTPUTS
    kernel = occupancy.Kernel(
        blocks=-(-n // cuda_table.OUTPUTS) * number, resident=resident, dram_bytes=n * k * stored / 8,
        longest_bytes=longest * stage.code_bytes, in_flight=in_flight,
        instructions=code.instructions * longest * stage.code_bytes / static.LINE, macs={"bf16": weights * stage.rows},
    )  # fmt: skip
    ns = occupancy.kernel_ns(card, kernel, latency)
    if number > 1:
        ns += kernel_ns + number * m * n * _PARTIAL_BYTES / card.bandwidth
    return Prediction(
        number, kernel.blocks, resident, kernel.blocks / (card.sms * resident),
        in_flight * min(resident, kernel.blocks / card.sms), occupancy.wanted_in_flight(card, latency),
        occupancy.wave(card, kernel, kernel.blocks, latency), ns, kernel.dram_bytes / card.bandwidth / ns,
    )  # fmt: skip


# Cutting K -----------------------------------------------------------------------------------------------------------

# Under which pieces are compared: the assumed figures, and both of them as much smaller and larger as they may well be.
LATENCIES = (400.0, occupancy.DRAM_LATENCY_NS, 900.0)
KERNELS_NS = (1000.0, occupancy.KERNEL_NS, 2500.0)


class Gain(NamedTuple):
    """Time saved against the library's rule, as a share of it."""

    pieces: int
    mean: float
    """Over ROWS, under the assumed figures."""
    worst: float
    """Over ROWS and all of LATENCIES and KERNELS_NS."""


def pieces_of(card: cards.Card, n: int, k: int, bits: int = 4) -> int:
    """Of the table, or of the library's rule."""
    assert card.sms is not None
    assert card.architecture is not None
    return cuda_table.pieces(n, k, card.sms, card.architecture) or cuda_table.halved(n, k, card.sms, bits)


def gain(card: cards.Card, n: int, k: int, pieces: int, scheme: str = "Q4_0") -> Gain:
    assert card.sms is not None
    rule = cuda_table.halved(n, k, card.sms, SCHEMES[scheme].bits)

    def saved(m: int, latency: float, kernel_ns: float) -> float:
        first, second = (
            predict(card, m, n, k, scheme=scheme, pieces=each, latency=latency, kernel_ns=kernel_ns).ns
            for each in (rule, pieces)
        )
        return 1 - second / first

    mean = sum(saved(m, occupancy.DRAM_LATENCY_NS, occupancy.KERNEL_NS) for m in ROWS) / len(ROWS)
    return Gain(pieces, mean, min(saved(*each) for each in product(ROWS, LATENCIES, KERNELS_NS)))


def gains(card: cards.Card, n: int, k: int) -> Iterator[Gain]:
    """All ways to cut K of 4-bit codes, but those that leave multiprocessors idle where the rule does not."""
    assert card.sms is not None
    tiles = -(-n // cuda_table.OUTPUTS)
    rule = cuda_table.halved(n, k, card.sms)
    for number in dict.fromkeys(cuda_table.cut(k, each)[0] for each in range(1, cuda_table.stages(k) + 1)):
        if number != rule and tiles * number >= min(card.sms, tiles * rule):
            yield gain(card, n, k, number)


# What `bench --static` prints ----------------------------------------------------------------------------------------


def codes_of(readings: Sequence[static.Reading], scheme: str) -> dict[str, dict[int, Code]]:
    """{architecture: {rows: Code}} of the kernels that multiply bf16 rows with weights of a scheme."""
    found: dict[str, dict[int, Code]] = {}
    bits, _, scales, paper = SCHEMES[scheme]
    for reading in readings:
        match, loop, loop_bytes = (
            cuda_kernels.LINEAR.search(reading.function),
            reading.main_loop,
            reading.kernel.loop_bytes,
        )
        if match is None or loop is None or not loop_bytes:
            continue
        stage = cuda_kernels.stage_of(match)
        if stage[:2] == (VALUES, bits) and match["scales"] == scales and match["x"] == "Bf16":
            instructions = loop.instructions * cuda_kernels.WARPS * static.LINE / loop_bytes
            found.setdefault(reading.kernel.architecture, {})[stage.rows] = Code(instructions, reading.registers)
    return {architecture: codes for architecture, codes in found.items() if codes.keys() == paper.keys()}


_HEAD = (
    "card", "layer", "N x K", "weights", "rows", "pieces", "blocks", "waves", "blocks of an SM", "KB under way", "KB wanted",
    "us", "of DRAM", "memory", "latency", "issue", "tensor",
)  # fmt: skip


def summary(readings: Sequence[static.Reading], names: Sequence[str]) -> list[str]:
    """For `bench --static`: every layer of the 12B on the cards that there is machine code for."""
    codes = {scheme: codes_of(readings, scheme) for scheme in SCHEMES}
    # Without a choice of cards, those that this package is made for.
    chosen = names if tuple(names) != cards.REPRESENTATIVES else names[:2]
    rows = []
    for name, scheme in product(chosen, SCHEMES):
        card = cards.CARDS[name]
        assert card.architecture is not None
        if card.architecture not in codes[scheme]:
            continue
        for (layer, (n, k)), m in product(layers().items(), ROWS):
            if scheme != "Q4_0" and layer != "head":
                continue
            found = predict(card, m, n, k, scheme=scheme, codes=codes[scheme][card.architecture])
            times = [f"{ns / 1e3:.1f}" for ns in found.times]
            rows.append(
                [
                    name, layer, f"{n} x {k}", scheme, str(m), str(found.pieces), str(found.blocks), f"{found.waves:.2f}",
                    str(found.resident), f"{found.in_flight / 1024:.1f}", f"{found.wanted / 1024:.1f}",
                    f"{found.ns / 1e3:.1f}", f"{100 * found.dram_share:.0f} %", *times,
                ]
            )  # fmt: skip
    if not rows:
        return []
    return [
        "",
        "Predicted, not measured: products with the 12B's weights by the compiled kernels (formula: docs/cuda.md).",
        f"Assumed: {occupancy.DRAM_LATENCY_NS:.0f} ns until memory answers under load, {occupancy.KERNEL_NS:.0f} ns for the "
        "kernel that adds the pieces.",
        "",
        *tables.table(list(_HEAD), rows, list(range(4, len(_HEAD)))),
    ]
