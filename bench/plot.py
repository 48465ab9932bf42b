"""Pictures of a record: one per family, each case's share of the measured ceiling, backends side by side.

matplotlib is imported here and nowhere else; without it, `draw` raises ImportError with what to install.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Colours that stay apart in the common colour-vision deficiencies (Okabe and Ito), one per implementation.
_COLOURS = {
    "cuda": "#009E73", "triton": "#0072B2", "eager": "#56B4E9", "sdpa": "#E69F00", "transformers": "#999999",
}  # fmt: skip
_INCHES_PER_CASE = 0.5


def draw(record: dict[str, Any], path: str | Path) -> list[Path]:
    """Write one picture per family that has timed rows.

    Args:
        path: its suffix is the format (png, svg, pdf). With several families, their names go in front of the suffix.
    Returns: the files written.
    Raises: ImportError without matplotlib; ValueError where nothing was timed or the format is unknown.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs matplotlib: install gemma4-kernels[plot]") from None
    path = Path(path)
    timed = [row for row in record["rows"] if row["share"] is not None]
    families = list(dict.fromkeys(row["family"] for row in timed))
    if not families:
        raise ValueError("nothing was timed, so there is nothing to draw")
    written = []
    for family in families:
        rows = [row for row in timed if row["family"] == family]
        cases = list(dict.fromkeys(row["case"] for row in rows))
        makers = sorted(
            {row["by"] for row in rows}, key=lambda by: (list(_COLOURS).index(by) if by in _COLOURS else 99, by)
        )
        figure = Figure(figsize=(11, 2 + _INCHES_PER_CASE * len(cases)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        height = 0.8 / len(makers)
        for number, by in enumerate(makers):
            own = {row["case"]: row for row in rows if row["by"] == by}
            places = [cases.index(case) + (number - (len(makers) - 1) / 2) * height for case in own]
            shares = [100 * row["share"] for row in own.values()]
            bars = axes.barh(places, shares, height=0.9 * height, label=by, color=_COLOURS.get(by, "#CC79A7"))
            axes.bar_label(bars, [_time(row["median_us"]) for row in own.values()], padding=3, fontsize=7)
        axes.set_yticks(range(len(cases)), [_plain(case) for case in cases], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(100, color="black", linewidth=0.8)
        axes.set_xlim(0, max(115, 115 * max(row["share"] for row in rows)))
        axes.set_xlabel(
            "% of the nearer ceiling measured in the same run: a large copy or a large matrix product\n"
            "(beside each bar: median time of a call)",
            fontsize=9,
        )
        machine = record["machine"]
        axes.set_title(
            f"{_plain(machine['name'])}: {family}, gemma4-kernels {record['package']}, torch {machine['torch']}"
        )
        # Above the bars: inside, it would cover some.
        figure.legend(loc="outside lower center", ncols=len(makers), frameon=False)
        target = path if len(families) == 1 else path.with_name(f"{path.stem}-{family}{path.suffix}")
        figure.savefig(target, dpi=150)
        written.append(target)
    return written


def _time(microseconds: float) -> str:
    return f"{microseconds / 1e3:.3g} ms" if microseconds >= 1e3 else f"{microseconds:.3g} us"


def _plain(text: str) -> str:
    """matplotlib reads what stands between dollar signs as mathematics."""
    return text.replace("$", "\\$")
