"""The linear layers of the 12B on the compiled kernels, card by card, on paper: blocks, bytes under way, time.

`occupancy` has the formula. What enters it from the kernels is here: the schedule of csrc/linear (docs/cuda.md) and, read from
machine code, registers and instructions. PAPER stands for the latter where there is no machine code: the most that tests allow.

x is not counted: it comes from L2, 16 bytes for 16 bytes of codes at up to 8 rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from gemma4_kernels.bench import cards, occupancy, static, tables
from gemma4_kernels.bench.linear_cases import model_shapes
from gemma4_kernels.geometry import GEMMA4_12B
from gemma4_kernels.linear import cuda_table

# The schedule of csrc/linear/stage.cuh, whose names these are.
WARPS = 4
TILE_ROWS = 8
STAGE_CODE_BYTES = cuda_table.OUTPUTS * cuda_table.COLUMNS // 2
_SLOTS = cuda_table.COLUMNS // 32

ROWS = (1, 8, 16)
BITS = 4.5  # of a weight of Q4_0, and of W4A16 in groups of 32, with the scales
_PARTIAL_BYTES = 8  # of a row's output and piece: written and read in fp32


def tile_rows(m: int) -> int:
    """Rows of x that the kernel for m rows multiplies."""
    return -(-m // TILE_ROWS) * TILE_ROWS


def ring_stages(rows: int) -> int:
    return 3 if rows <= TILE_ROWS else 2


def shared_bytes(values: str, rows: int) -> int:
    """Dynamic shared memory of a block, for up to 8 or up to 16 rows of x."""
    rows = tile_rows(rows)
    numbers = cuda_table.OUTPUTS * _SLOTS * 4  # of one kind, in fp32: scales, and zero points or offsets
    stage = STAGE_CODE_BYTES + rows * cuda_table.COLUMNS * 2 + numbers * (2 if values in ("zeros", "offsets") else 1)
    sums_of_x = _SLOTS * rows * 4 if values == "offsets" else 0
    return ring_stages(rows) * stage + sums_of_x


class Code(NamedTuple):
    """What the machine code of a kernel adds to its schedule."""

    instructions: float
    """Warp instructions for 128 bytes of codes."""
    registers: int


# Of Q4_0 and W4A16, by rows of x: what tests/linear/test_linear_cuda_budgets.py holds the machine code to.
PAPER = {8: Code(20.0, 128), 16: Code(26.0, 168)}


def layers() -> dict[str, tuple[int, int]]:
    """(N, K) of the 12B's linear layers, each shape once: "sliding q", ..., "head"."""
    names: dict[tuple[int, int], list[str]] = {}
    for name, shape in model_shapes().items():
        names.setdefault(shape, []).append(name)
    found = {", ".join(each): shape for shape, each in names.items()}
    return found | {"head": (GEMMA4_12B.vocab_size, GEMMA4_12B.hidden_size)}


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
    card: cards.Card, m: int, n: int, k: int, *, pieces: int = 0, codes: Mapping[int, Code] = PAPER,
    latency: float = occupancy.DRAM_LATENCY_NS, kernel_ns: float = occupancy.KERNEL_NS,
) -> Prediction:  # fmt: skip
    """`pieces` of K; 0 for those of the table, or of the library's rule."""
    assert card.bandwidth is not None
    assert card.sms is not None
    assert card.architecture is not None
    asked = pieces or cuda_table.pieces(n, k, card.sms, card.architecture) or cuda_table.halved(n, k, card.sms)
    number, longest = cuda_table.cut(k, asked)
    rows = tile_rows(m)
    code = codes[rows]
    resident = occupancy.resident_blocks(card.architecture, code.registers, shared_bytes("centred", rows), WARPS)
    # Of the stages in the ring one is being multiplied.
    in_flight = (ring_stages(rows) - 1) * STAGE_CODE_BYTES
    weights = longest * cuda_table.COLUMNS * cuda_table.OUTPUTS
    kernel = occupancy.Kernel(
        blocks=-(-n // cuda_table.OUTPUTS) * number, resident=resident, dram_bytes=n * k * BITS / 8,
        longest_bytes=longest * STAGE_CODE_BYTES, in_flight=in_flight,
        instructions=code.instructions * longest * STAGE_CODE_BYTES / static.LINE, macs={"bf16": weights * rows},
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


def gain(card: cards.Card, n: int, k: int, pieces: int) -> Gain:
    assert card.sms is not None
    rule = cuda_table.halved(n, k, card.sms)

    def saved(m: int, latency: float, kernel_ns: float) -> float:
        first, second = (
            predict(card, m, n, k, pieces=each, latency=latency, kernel_ns=kernel_ns).ns for each in (rule, pieces)
        )
        return 1 - second / first

    mean = sum(saved(m, occupancy.DRAM_LATENCY_NS, occupancy.KERNEL_NS) for m in ROWS) / len(ROWS)
    return Gain(pieces, mean, min(saved(*each) for each in product(ROWS, LATENCIES, KERNELS_NS)))


def gains(card: cards.Card, n: int, k: int) -> Iterator[Gain]:
    """All ways to cut K, but those that leave multiprocessors idle where the rule does not."""
    assert card.sms is not None
    tiles = -(-n // cuda_table.OUTPUTS)
    rule = cuda_table.halved(n, k, card.sms)
    for number in dict.fromkeys(cuda_table.cut(k, each)[0] for each in range(1, cuda_table.stages(k) + 1)):
        if number != rule and tiles * number >= min(card.sms, tiles * rule):
            yield gain(card, n, k, number)


# What `bench --static` prints ----------------------------------------------------------------------------------------


def codes_of(readings: Sequence[static.Reading]) -> dict[str, dict[int, Code]]:
    """{architecture: {rows: Code}} of the kernels that multiply bf16 rows with Q4_0 and W4A16."""
    found: dict[str, dict[int, Code]] = {}
    for reading in readings:
        kernel, loop = reading.kernel, reading.main_loop
        for rows in PAPER:
            of_rows = f"Fp16 scales, Bf16 x, up to {rows} rows"
            wanted = kernel.name.startswith("linear centred") and of_rows in kernel.name
            if wanted and loop is not None and kernel.warps and kernel.loop_bytes:
                instructions = loop.instructions * kernel.warps * static.LINE / kernel.loop_bytes
                found.setdefault(kernel.architecture, {})[rows] = Code(instructions, reading.registers)
    return {architecture: codes for architecture, codes in found.items() if codes.keys() == PAPER.keys()}


_HEAD = (
    "card", "layer", "N x K", "rows", "pieces", "blocks", "waves", "blocks of an SM", "KB under way", "KB wanted",
    "us", "of DRAM", "memory", "latency", "issue", "tensor",
)  # fmt: skip


def summary(readings: Sequence[static.Reading], names: Sequence[str]) -> list[str]:
    """For `bench --static`: every layer of the 12B on the cards that there is machine code for."""
    codes = codes_of(readings)
    # Without a choice of cards, those that this package is made for.
    chosen = names if tuple(names) != cards.REPRESENTATIVES else names[:2]
    rows = []
    for name in chosen:
        card = cards.CARDS[name]
        if card.architecture not in codes:
            continue
        for (layer, (n, k)), m in product(layers().items(), ROWS):
            found = predict(card, m, n, k, codes=codes[card.architecture])
            times = [f"{ns / 1e3:.1f}" for ns in found.times]
            rows.append(
                [
                    name, layer, f"{n} x {k}", str(m), str(found.pieces), str(found.blocks), f"{found.waves:.2f}",
                    str(found.resident), f"{found.in_flight / 1024:.1f}", f"{found.wanted / 1024:.1f}",
                    f"{found.ns / 1e3:.1f}", f"{100 * found.dram_share:.0f} %", *times,
                ]
            )  # fmt: skip
    if not rows:
        return []
    return [
        "",
        "Predicted, not measured: products with the 12B's weights in Q4_0 by the compiled kernels (formula: docs/cuda.md).",
        f"Assumed: {occupancy.DRAM_LATENCY_NS:.0f} ns until memory answers under load, {occupancy.KERNEL_NS:.0f} ns for the "
        "kernel that adds the pieces.",
        "",
        *tables.table(list(_HEAD), rows, list(range(3, len(_HEAD)))),
    ]
