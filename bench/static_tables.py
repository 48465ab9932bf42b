"""What `static` read and predicted, as tables: one row for each kernel, and one for each kernel and card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma4_kernels.bench import cards, sass, static, tables

COLUMNS = (
    "family", "kernel", "function", "architecture", "warps", "registers", "stack_bytes", "shared_bytes", "spills",
    "instructions", "fewest_loop_instructions", "loop_instructions", "unrolled", "inner_branches", "inner_loops",
    "loads", "loaded_bytes", "loop_bytes", "loaded_share", "matrix_instructions", "macs", "shared_accesses",
    "transcendentals", "loop_spills",
    "card", "fewest_instructions_per_128", "instructions_per_128", "budget_per_128", "fewest_issue_ns", "issue_ns",
    "tensor_ns", "dram_ns", "fewest_binding", "binding", "fewest_over_dram", "over_dram", "useful_share",
)  # fmt: skip


def rows(collection: static.Collection, names: Sequence[str] = cards.REPRESENTATIVES) -> list[dict[str, Any]]:
    """One row with COLUMNS for each kernel and card of its architecture; one without a card where nothing is predicted.

    Counts of the main loop are a warp's; `loaded_bytes` and `macs` are a block's. `names` are keys of `cards.CARDS`.
    """
    found: list[dict[str, Any]] = []
    for family, reading in collection.readings:
        predictions = {name: static.predict(reading, cards.CARDS[name]) for name in names}
        code = _code(family, reading)
        on_cards = [_on_card(name, each) for name, each in predictions.items() if each is not None]
        found += [dict.fromkeys(COLUMNS) | code | each for each in on_cards or [{}]]
    return found


def _code(family: str, reading: static.Reading) -> dict[str, Any]:
    kernel, loop = reading.kernel, reading.main_loop
    row: dict[str, Any] = {
        "family": family, "kernel": kernel.name, "function": reading.function, "architecture": kernel.architecture,
        "warps": kernel.warps, "registers": reading.registers, "stack_bytes": reading.stack_bytes,
        "shared_bytes": reading.shared_bytes, "spills": reading.spill_instructions,
        "instructions": reading.instructions, "loop_bytes": kernel.loop_bytes, "loaded_share": reading.loaded_share,
    }  # fmt: skip
    if loop is not None:
        warps = kernel.warps
        row |= {
            "loop_instructions": loop.instructions, "fewest_loop_instructions": loop.fewest,
            "unrolled": reading.unrolled, "inner_branches": loop.inner_branches,
            "inner_loops": loop.inner_loops, "loads": widths(loop),
            "loaded_bytes": warps and loop.loaded_bytes * warps, "matrix_instructions": loop.matrix_instructions,
            "macs": warps and sum(loop.macs.values()) * warps, "shared_accesses": loop.shared_accesses,
            "transcendentals": loop.transcendentals, "loop_spills": loop.local_accesses,
        }  # fmt: skip
    return row


def _on_card(name: str, prediction: static.Prediction) -> dict[str, Any]:
    (binding, ns), (fewest_binding, fewest_ns) = prediction.binding, prediction.fewest_binding
    return {
        "card": name, "fewest_instructions_per_128": prediction.fewest_instructions,
        "instructions_per_128": prediction.instructions, "budget_per_128": prediction.budget,
        "fewest_issue_ns": prediction.fewest_issue_ns, "issue_ns": prediction.issue_ns,
        "tensor_ns": prediction.tensor_ns, "dram_ns": prediction.dram_ns,
        "fewest_binding": fewest_binding, "binding": binding,
        "fewest_over_dram": fewest_ns / prediction.dram_ns, "over_dram": ns / prediction.dram_ns,
        "useful_share": prediction.useful_share,
    }  # fmt: skip


def widths(loop: sass.Loop) -> str:
    """ "48 x 16 B async, 2 x 4 B": loads of a warp by bytes per lane; async are copies to shared memory."""
    parts = [f"{number} x {width} B async" for width, number in sorted(loop.copies.items(), reverse=True)]
    parts += [f"{number} x {width} B" for width, number in sorted(loop.loads.items(), reverse=True)]
    return ", ".join(parts + ([f"{loop.bulk_copies} x bulk"] if loop.bulk_copies else [])) or "none"


# Heading -> column.
_CODE_TABLE = {
    "family": "family", "kernel": "kernel", "arch": "architecture", "registers": "registers", "stack": "stack_bytes",
    "shared": "shared_bytes", "spills": "spills", "instr.": "instructions", "main loop": "loop_instructions",
    "unrolled": "unrolled", "branches": "inner_branches", "loops": "inner_loops", "loads per warp": "loads",
    "loaded / pass": "loaded_share",
    "MMA": "matrix_instructions", "LDS, STS": "shared_accesses", "MUFU": "transcendentals",
}  # fmt: skip
_CARD_TABLE = {
    "family": "family", "kernel": "kernel", "card": "card", "instr. per 128 B": "instructions_per_128",
    "card can issue": "budget_per_128", "issue ns": "issue_ns", "tensor ns": "tensor_ns", "DRAM ns": "dram_ns",
    "binds": "binding", "x DRAM": "over_dram", "useful MACs": "useful_share",
}  # fmt: skip
_TEXT = {"family", "kernel", "architecture", "loads", "card", "binding"}


def render(collection: static.Collection, form: str = "md", names: Sequence[str] = cards.REPRESENTATIVES) -> str:
    """One of `tables.FORMATS`; Markdown in two tables, for reading, with what failed below them."""
    found = rows(collection, names)
    if form != "md":
        return tables.encode(found, COLUMNS, form)
    lines = ["Derived from machine code and data sheets; nothing was measured.", ""]
    kernels = list(
        {(row["kernel"], row["function"], row["architecture"], row["family"]): row for row in found}.values()
    )
    lines += [*(_table(_CODE_TABLE, kernels) if kernels else []), f"{len(kernels)} compiled kernels."]
    order = list(dict.fromkeys((row["family"], row["kernel"]) for row in found))
    predicted = sorted(
        (row for row in found if row["card"]),
        key=lambda row: (order.index((row["family"], row["kernel"])), list(names).index(row["card"])),
    )
    if predicted:
        lines += [
            "",
            f"Predicted for {static.LINE} bytes that the main loop takes in, all SMs of the card together:",
            "",
        ]
        lines += _table(_CARD_TABLE, predicted)
    lines += static.summarise(collection, names)
    return "\n".join([*lines, *collection.remarks, *(f"FAILED {failure}" for failure in collection.failures)])


def _table(head: Mapping[str, str], found: Iterable[Mapping[str, Any]]) -> list[str]:
    cells = [[_cell(row, column) for column in head.values()] for row in found]
    numbers = [index for index, column in enumerate(head.values()) if column not in _TEXT]
    return tables.table(list(head), cells, numbers)


def _cell(row: Mapping[str, Any], column: str) -> str:
    """A number; "0.0251 to 0.3140" where it depends on the branches that a pass takes."""
    text = _text(column, row[column])
    if (fewest := row.get(f"fewest_{column}")) is None:
        return text
    least = _text(column, fewest)
    return text if least == text else f"{least} to {text}"


def _text(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column == "useful_share":
        return f"{100 * value:.0f} %"
    if column in ("loaded_share", "over_dram"):
        return f"{value:.2f}"
    if isinstance(value, float):
        return f"{value:.1f}" if column.endswith("_per_128") else f"{value:.4f}"
    return str(value)
