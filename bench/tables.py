"""The rows of a benchmark as Markdown, CSV, JSON or JSON lines.

Markdown is for reading and shows the columns that a reader compares; the other formats hold every field of `records.ROW`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from gemma4_kernels.bench.records import ROW

FORMATS = ("md", "csv", "json", "jsonl")
_HEAD = (
    "case",
    "by",
    "median us",
    "spread",
    "GB/s",
    "TFLOP/s",
    "of ceiling",
    "bound by",
    "of data sheet",
    "error / budget",
)


def render(rows: Sequence[dict[str, Any]], form: str) -> str:
    """One of FORMATS, without a newline at the end."""
    return markdown(rows) if form == "md" else encode(rows, list(ROW), form)


def encode(rows: Sequence[dict[str, Any]], columns: Sequence[str], form: str) -> str:
    """ "csv", "json" or "jsonl" of rows that all have these columns."""
    if form == "csv":
        sheet = io.StringIO()
        writer = csv.DictWriter(sheet, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        return sheet.getvalue().rstrip("\n")
    if form == "json":
        return json.dumps(list(rows), indent=1, allow_nan=False)
    return "\n".join(json.dumps(row, allow_nan=False) for row in rows)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of what was timed; below it, once per reason, what failed or was skipped."""
    timed = [row for row in rows if row["median_us"] is not None]
    lines = table(_HEAD, [_markdown_row(row) for row in timed], numbers=range(2, len(_HEAD)))
    for status in ("failed", "skipped"):
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            if row["status"] == status or (
                status == "skipped" and row["status"] == "held" and row["median_us"] is None
            ):
                reasons.setdefault((row["by"], row["reason"] or "not timed"), []).append(row["case"])
        if reasons:
            lines += ["", f"{status.capitalize()}:"]
        for (by, reason), cases in reasons.items():
            example = f"`{cases[0]}`" if len(cases) == 1 else f"{len(cases)} cases"
            lines.append(f"* {by}, {example}: {escape(reason)}")
    return "\n".join(lines)


def table(head: Sequence[str], cells: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> list[str]:
    """A Markdown table, padded so that it reads in a terminal too; columns in `numbers` are right-aligned."""
    body = [list(row) for row in cells]
    right = set(numbers)
    widths = [max(len(row[column]) for row in [list(head), *body]) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 1) + ":" if i in right else "-" * (w + 2) for i, w in enumerate(widths))
    return [line(head), f"|{rule}|", *map(line, body)]


def escape(text: str) -> str:
    """A stranger's text in Markdown: no cell ends early, no tag and no link begins."""
    for character in "\\|<>[]`*_":
        text = text.replace(
            character, f"\\{character}" if character not in "<>" else {"<": "&lt;", ">": "&gt;"}[character]
        )
    return text


def _markdown_row(row: dict[str, Any]) -> list[str]:
    warm = "" if row["cold"] else " (warm)"
    return [
        f"`{row['case'].replace('|', '').replace('`', '')}`",
        escape(row["by"]) + warm,
        _number(row["median_us"]),
        _percent(row["spread"]),
        _number(row["gbs"]),
        _number(row["tflops"]),
        _percent(row["share"]),
        row["bound"] or "-",
        _percent(row["sheet_share"]) if row["sheet_share"] is not None else "unknown",
        _number(row["worst"]),
    ]


def _number(value: float | None) -> str:
    """Three digits or more, and never an exponent."""
    if value is None:
        return "-"
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 1
        else f"{value:.3f}"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _cell(value: Any) -> Any:
    """A spreadsheet takes a text that starts with one of these for a formula."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value
