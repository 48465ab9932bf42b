"""Records: what is written can be read, what strangers send is checked, and nobody's name is ever in one."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
from bench_helpers import record, row

from gemma4_kernels.bench import machine, records
from gemma4_kernels.bench.records import RecordError

RECORDS = Path(__file__).parents[2] / "bench" / "records"


def written(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_a_record_survives_its_file(tmp_path):
    records.save(record(), tmp_path / "a.json")
    assert records.load(tmp_path / "a.json") == record()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\x00" * 100, "is not JSON"),
        (b"\xff\xfe{}", "is not UTF-8"),
        (b"[]", "must hold an object, got list"),
        (b"null", "must hold an object, got nothing"),
        (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply|is not JSON"),
        (b'{"schema": ' + b"9" * 10_000 + b"}", "is not JSON|huge number"),
        (b'{"schema": ' + b"9" * 1_000 + b"}", "has schema a huge number"),
        (b'{"schema": 2}', "has schema 2, this version reads 1"),
        (b'{"schema": true}', "has schema True"),
        (b'{"schema": 1}', "lacks package, commit, dirty"),
        (b'{"schema": NaN}', "NaN is no number"),
        (b'{"schema": Infinity}', "Infinity is no number"),
        (b" " * (records.MAX_BYTES + 1), "at most"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_a_damaged_file_gives_one_sentence(tmp_path, content, message):
    with pytest.raises(RecordError, match=message) as caught:
        records.load(written(tmp_path, content))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [None, True, "12", -1, 1e300, [], {}, float("nan")], ids=repr)
def test_a_wrong_number_is_refused(tmp_path, value):
    spoilt = record([row(bytes=value)])
    with pytest.raises(RecordError, match=r"row 0: bytes must be number|NaN is no number"):
        records.load(written(tmp_path, spoilt))


@pytest.mark.parametrize("value", [None, 5, "a\x1b[2Jb", "a\nb", "\u202egpj", "x" * 3000], ids=lambda v: repr(v)[:12])
def test_a_wrong_text_is_refused_without_being_repeated(tmp_path, value):
    with pytest.raises(RecordError, match="row 0: case must be text") as caught:
        records.load(written(tmp_path, record([row(case=value)])))
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("part", ["record", "machine", "row"])
def test_a_missing_and_an_unknown_field_are_refused(tmp_path, part):
    wanted = {"record": records.RECORD, "machine": records.MACHINE, "row": records.ROW}[part]
    for name in wanted:
        if name == "schema":
            continue
        spoilt = copy.deepcopy(record())
        target = {"record": spoilt, "machine": spoilt["machine"], "row": spoilt["rows"][0]}[part]
        del target[name]
        with pytest.raises(RecordError, match=f"lacks {name}"):
            records.check(spoilt, "it")
        target[name] = None
        target["surprise"] = 1
        with pytest.raises(RecordError, match="has a field surprise"):
            records.check(spoilt, "it")


@pytest.mark.parametrize("rows", [None, {}, "rows", [1], [None]], ids=repr)
def test_rows_that_are_no_rows_are_refused(tmp_path, rows):
    with pytest.raises(RecordError, match=r"rows must be a list|must be an object"):
        records.load(written(tmp_path, {**record(), "rows": rows}))


def test_too_many_rows_are_refused():
    with pytest.raises(RecordError, match="10001 rows, at most 10000"):
        records.check(record([row()] * 10_001), "it")


@pytest.mark.parametrize(("name", "value"), [("kind", "magic"), ("status", "passed"), ("bound", "faith")])
def test_a_word_out_of_its_list_is_refused(name, value):
    with pytest.raises(RecordError, match=f"{name} must be one of"):
        records.check(record([row(**{name: value})]), "it")


def test_a_link_a_folder_a_pipe_and_nothing_are_refused(tmp_path):
    target = written(tmp_path, record())
    (tmp_path / "link.json").symlink_to(target)
    os.mkfifo(tmp_path / "pipe.json")
    for name, message in (
        ("link.json", "symbolic link"),
        ("pipe.json", "no regular file"),
        ("nothing.json", "cannot be opened: No such file"),
        ("", "no regular file"),
        ("a\0b", "cannot be opened|null byte"),
    ):
        with pytest.raises((RecordError, ValueError), match=message):
            records.load(f"{tmp_path}/{name}")


# What may be quoted -----------------------------------------------------------------------------------------------------


def test_nothing_speaks_against_a_clean_record():
    assert records.objections(record()) == []


@pytest.mark.parametrize(
    ("change", "objection"),
    [
        ({"dirty": True}, "uncommitted changes"),
        ({"dirty": None}, "which commit"),
        ({"commit": None}, "which commit"),
        ({"rows": [row(), row(status="failed", median_us=None)]}, "1 kernels failed their validation"),
        ({"rows": []}, "no kernel was validated and timed"),
        ({"rows": [row(kind="baseline")]}, "no kernel was validated and timed"),
        ({"command": "gemma4-kernels bench --save /home/alice/a.json"}, "names a home directory"),
        ({"command": r"bench C:\\Users\\alice\\a.json"}, "names a home directory"),
        ({"machine": {**record()["machine"], "driver": None}}, "the driver is unknown"),
    ],
)
def test_what_may_not_be_quoted(change, objection):
    assert any(objection in found for found in records.objections({**record(), **change}))


def test_a_baseline_outside_the_rule_speaks_against_nobody_here():
    assert records.objections(record([row(), row(kind="baseline", by="sdpa", status="failed")])) == []


def test_every_record_of_this_repository_may_be_quoted():
    for path in sorted(RECORDS.glob("*.json")):
        assert records.objections(records.load(path)) == [], path.name


# Privacy ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("cannot load /home/alice/.triton/cache/k.so", "cannot load ~/.triton/cache/k.so"),
        ("/Users/alice/x and /Users/bob.b/y", "~/x and ~/y"),
        (r"C:\Users\alice\x", r"~\x"),
        ("/".join(("", "root", "x")), "~/x"),
        ("in '/home/alice'", "in '~'"),
        ("/opt/homeless/x /rooted", "/opt/homeless/x /rooted"),
        ("red\x1b[31m\nline", "red [31m line"),
    ],
)
def test_home_directories_and_control_characters_are_scrubbed(text, scrubbed):
    assert records.scrub({"a": [text]}) == {"a": [scrubbed]}


def test_a_home_elsewhere_is_scrubbed_too(monkeypatch):
    monkeypatch.setenv("HOME", "/data/people/alice")
    assert records.scrub("at /data/people/alice/x") == "at ~/x"


def test_saving_scrubs(tmp_path):
    records.save(record([row(reason="raised OSError: /home/alice/x")]), tmp_path / "a.json")
    assert "alice" not in (tmp_path / "a.json").read_text()


def test_a_description_of_this_machine_fits_the_schema_and_names_nobody(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("USER", "alice-the-user")
    described = machine.describe(machine.torch.device("cpu"))
    described.pop("package")
    records.check({**record(), "machine": described}, "this machine")
    assert described["unknown_because"] == "cpu has no nvidia-smi"
    assert "alice" not in json.dumps(described)
    assert os.uname().nodename not in json.dumps(described)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(median_us=None)], "row 0 has quartile_us without median_us"),
        ([row(share=None)], "row 0 has median_us without share"),
        ([row(fastest_us=5e-324)], "fastest_us must be a time in microseconds"),
        ([row(quartile_us=1e17)], "quartile_us must be a time in microseconds"),
        ([row(reason="\ud800")], "reason must be text"),
        ([row(), row()], "has more than one row for flash_attn_func"),
    ],
)
def test_rows_that_would_crash_a_table_or_a_comparison_are_refused(tmp_path, rows, message):
    with pytest.raises(RecordError, match=message):
        records.load(written(tmp_path, record(rows)))
