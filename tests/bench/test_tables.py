"""Rows as Markdown, CSV, JSON and JSON lines, and the pages that are made of them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from bench_helpers import record, row

from gemma4_kernels.bench import records, report, tables

ROWS = [
    row(),
    row(by="sdpa", kind="baseline", median_us=220.0),
    row(by="cuda", status="skipped", reason="no kernel", median_us=None, share=None, cold=None),
    row(by="eager", status="failed", reason="out element (0,)", median_us=None, share=None, cold=None),
]


def test_machine_readable_forms_hold_every_field():
    lines = list(csv.DictReader(io.StringIO(tables.render(ROWS, "csv"))))
    assert list(lines[0]) == list(records.ROW)
    assert (lines[0]["median_us"], lines[2]["median_us"], len(lines)) == ("110.0", "", 4)
    assert json.loads(tables.render(ROWS, "json")) == ROWS
    assert [json.loads(line) for line in tables.render(ROWS, "jsonl").splitlines()] == ROWS


def test_markdown_shows_what_was_timed_and_says_what_was_not():
    text = tables.render(ROWS, "md")
    body = text.splitlines()
    assert body[0].startswith("| case ")
    assert len({len(line) for line in body[:4]}) == 1
    assert " 110 " in body[2]
    assert " 30 % " in body[2]
    assert "Failed:\n* eager, `flash_attn_func(sq=5,sk=33)`: out element (0,)" in text
    assert "Skipped:\n* cuda, `flash_attn_func(sq=5,sk=33)`: no kernel" in text


def test_warm_caches_and_unlisted_cards_are_marked():
    line = tables.render([row(cold=False, sheet_share=None)], "md").splitlines()[2]
    assert "triton (warm)" in line
    assert "unknown" in line


def test_a_strangers_text_does_not_leave_its_cell():
    hostile = row(case="a|b`c", by="<script>|x", reason=None)
    line = tables.render([hostile], "md").splitlines()[2]
    assert "<script>" not in line
    assert line.replace("\\|", "").count("|") == tables.render([row()], "md").splitlines()[2].count("|")
    assert tables.render([row(case="=cmd()")], "csv").splitlines()[1].startswith("'=cmd()")


# Pages ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "bench" / "records").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return tmp_path


def test_pages_are_written_from_records_and_then_up_to_date(checkout, capsys):
    records.save(record(ROWS[:2]), checkout / "bench" / "records" / "card.json")
    assert report.main(["--root", str(checkout), "--check"]) == 1
    assert report.main(["--root", str(checkout)]) == 0
    assert report.main(["--root", str(checkout), "--check"]) == 0
    readme, page = (checkout / "README.md").read_text(), (checkout / "docs" / "gpus.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("\nafter\n")
    assert "old" not in readme
    assert "| NVIDIA Test Card | `flash_attn_func(sq=5,sk=33)` | triton " in readme
    assert " 2.00 " in readme
    assert "## NVIDIA Test Card" in page
    assert "* driver: 580.1" in page


def test_without_records_the_pages_say_so(checkout):
    assert report.main(["--root", str(checkout)]) == 0
    for page in ("README.md", "docs/gpus.md"):
        assert "No card has been measured yet" in (checkout / page).read_text()


@pytest.mark.parametrize("change", [{"dirty": True}, {"rows": []}, {"rows": [row(status="failed")]}])
def test_a_record_that_may_not_be_quoted_is_not(checkout, change, capsys):
    records.save({**record(), **change}, checkout / "bench" / "records" / "card.json")
    assert report.main(["--root", str(checkout)]) == 2
    assert "card.json cannot be quoted" in capsys.readouterr().err
    assert "old" in (checkout / "README.md").read_text()


def test_a_readme_without_markers_is_left_alone(checkout, capsys):
    (checkout / "README.md").write_text("nothing")
    assert report.main(["--root", str(checkout)]) == 2
    assert "README.md needs the lines" in capsys.readouterr().err


def test_the_pages_of_this_repository_are_up_to_date():
    root = Path(__file__).parents[2]
    found = report.load_all(root / "bench" / "records")
    assert (root / "docs" / "gpus.md").read_text() == report.gpus_page(found)
    readme = (root / "README.md").read_text()
    if report.BEGIN in readme:
        assert readme == report.between_markers(readme, report.summary(found))


def test_a_picture_per_family(tmp_path):
    pytest.importorskip("matplotlib")
    from gemma4_kernels.bench import plot

    assert plot.draw(record(ROWS), tmp_path / "a.svg") == [tmp_path / "a.svg"]
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
    two = plot.draw(record([*ROWS, row(family="linear")]), tmp_path / "b.png")
    assert two == [tmp_path / "b-attention.png", tmp_path / "b-linear.png"]
    with pytest.raises(ValueError, match="nothing was timed"):
        plot.draw(record([ROWS[2]]), tmp_path / "c.png")


def test_without_matplotlib_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    import sys

    from gemma4_kernels.bench import plot

    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"install gemma4-kernels\[plot\]"):
        plot.draw(record(ROWS), tmp_path / "a.png")
