"""Records of a benchmark: what is in one, how it is read, and what is never in one. `records/README.md` is the schema in words.

A record comes from strangers. Reading one checks its size, encoding, nesting and every type and number before anything is
used, and refuses it with one sentence. Strings go to terminals and pages later, so control characters are refused too.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

SCHEMA = 1
MAX_BYTES = 8 << 20
MAX_ROWS = 10_000
MAX_TEXT = 2_000
MAX_NUMBER = 1e18

TEXT, NUMBER, WHOLE, FLAG = "text", "number", "whole number", "true or false"

# One row: one case on one kernel or baseline. The columns of the CSV, in order. "?" behind a kind: may be null.
ROW = {
    "case": TEXT, "family": TEXT, "op": TEXT, "dtype": TEXT,
    "by": TEXT,               # triton, cuda, eager, or the name of a baseline
    "kind": TEXT,             # kernel, baseline
    "status": TEXT,           # held, failed, skipped
    "reason": TEXT + "?",     # why it failed or was skipped
    "worst": NUMBER + "?",    # largest error as a share of its budget
    "median_us": NUMBER + "?", "quartile_us": NUMBER + "?", "fastest_us": NUMBER + "?",
    "spread": NUMBER + "?",   # between the quartiles, as a share of the median
    "rounds": WHOLE + "?", "calls": WHOLE + "?", "copies": WHOLE + "?",
    "cold": FLAG + "?",       # the copies exceed the last cache
    "timed_with": TEXT + "?",  # cpu time, clock, events, graph
    "bytes": NUMBER, "operations": NUMBER,
    "gbs": NUMBER + "?", "tflops": NUMBER + "?",
    "copy_gbs": NUMBER + "?", "matmul_tflops": NUMBER + "?",  # the ceilings measured in the same rounds
    "bound": TEXT + "?",      # bytes, operations: the ceiling that is nearer
    "share": NUMBER + "?",    # of that ceiling
    "sheet_share": NUMBER + "?",  # of the data sheet's
}  # fmt: skip

# A row that was timed has all of these.
TIMES = ("median_us", "quartile_us", "fastest_us")
TOGETHER = (*TIMES, "spread", "rounds", "gbs", "tflops", "bound", "share")
SHORTEST_US, LONGEST_US = 1e-6, 1e12

MACHINE = {
    "device": TEXT, "name": TEXT, "architecture": TEXT, "memory_gib": NUMBER + "?", "processor": TEXT,
    "threads": WHOLE, "system": TEXT, "python": TEXT, "torch": TEXT, "torch_cuda": TEXT + "?",
    "triton": TEXT + "?", "transformers": TEXT + "?", "time": TEXT,
    "driver": TEXT + "?", "sm_clock_mhz": NUMBER + "?", "memory_clock_mhz": NUMBER + "?",
    "max_sm_clock_mhz": NUMBER + "?", "power_limit_w": NUMBER + "?", "temperature_c": NUMBER + "?",
    "unknown_because": TEXT + "?",
}  # fmt: skip

RECORD = {
    "schema": WHOLE, "package": TEXT, "commit": TEXT + "?", "dirty": FLAG + "?", "command": TEXT,
    "sheet_source": TEXT, "temperature_after_c": NUMBER + "?",
}  # fmt: skip

CHOICES = {"kind": ("kernel", "baseline"), "status": ("held", "failed", "skipped"), "bound": ("bytes", "operations")}

# A home directory, whose name is a person's: everything up to the end of that name.
_HOME = re.compile(r"(?:/home/|/Users/|[A-Za-z]:[\\/]+Users[\\/]+)[^\s/\\\"':]+|/root(?=[/\s\"':]|$)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class RecordError(ValueError):
    """A file that is no record; the message is one sentence."""


def scrub(value: Any) -> Any:
    """The same data without home directories, and without control characters in its strings."""
    if isinstance(value, str):
        text, home = value, os.path.expanduser("~")
        if len(home) > 3:  # "/" or an unexpanded "~" would match everywhere
            text = re.sub(re.escape(home) + r"(?=[/\\\s\"':]|$)", "~", text)
        text = _HOME.sub("~", text)
        return _CONTROL.sub(" ", text)[:MAX_TEXT]
    if isinstance(value, dict):
        return {scrub(key): scrub(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item) for item in value]
    return value


def save(record: dict[str, Any], path: str | Path) -> None:
    """Write a record, scrubbed. Raises RecordError where it would not be readable, OSError where it cannot be written."""
    cleaned = scrub(record)
    check(cleaned, "the record to be saved")
    Path(path).write_text(json.dumps(cleaned, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load(path: str | Path) -> dict[str, Any]:
    """Read a record. Raises RecordError with one sentence, whatever is wrong with the file."""
    where = _shown(os.path.basename(str(path)) or str(path))
    raw = _read(path, where)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"{where} is not UTF-8 (byte {error.start})") from None
    try:
        record = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise RecordError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise RecordError(f"{where} is not JSON: {_shown(str(error))}") from None
    check(record, where)
    checked: dict[str, Any] = record
    return checked


def check(record: Any, where: str) -> None:
    """Raise RecordError unless `record` has every field of the schema, with the right kinds, and nothing else."""
    if not isinstance(record, dict):
        raise RecordError(f"{where} must hold an object, got {_kind(record)}")
    if type(record.get("schema")) is not int or record["schema"] != SCHEMA:
        raise RecordError(f"{where} has schema {_shown(record.get('schema'))}, this version reads {SCHEMA}")
    _check_fields({key: value for key, value in record.items() if key not in ("machine", "rows")}, RECORD, where)
    _check_fields(record.get("machine"), MACHINE, f"{where}: machine")
    rows = record.get("rows")
    if not isinstance(rows, list):
        raise RecordError(f"{where}: rows must be a list, got {_kind(rows)}")
    if len(rows) > MAX_ROWS:
        raise RecordError(f"{where} has {len(rows)} rows, at most {MAX_ROWS} are read")
    for number, row in enumerate(rows):
        _check_fields(row, ROW, f"{where}: row {number}")
        timed = [name for name in TOGETHER if row[name] is not None]
        if timed and len(timed) < len(TOGETHER):
            missing = next(name for name in TOGETHER if row[name] is None)
            raise RecordError(f"{where}: row {number} has {timed[0]} without {missing}")
        for name in TIMES:
            if row[name] is not None and not SHORTEST_US <= row[name] <= LONGEST_US:
                raise RecordError(
                    f"{where}: row {number}: {name} must be a time in microseconds, got {_shown(row[name])}"
                )
    twice = Counter((row["case"], row["by"]) for row in rows).most_common(1)
    if twice and twice[0][1] > 1:
        raise RecordError(f"{where} has more than one row for {_shown(twice[0][0][0])} by {_shown(twice[0][0][1])}")


def objections(record: dict[str, Any]) -> list[str]:
    """Why a readable record may not stand in `bench/records/` and be quoted; empty if it may."""
    found = []
    if record["commit"] is None or record["dirty"] is None:
        found.append("it does not say which commit it measured: run from a git checkout")
    elif record["dirty"]:
        found.append("the checkout had uncommitted changes")
    kernels = [row for row in record["rows"] if row["kind"] == "kernel"]
    failed = [row for row in kernels if row["status"] == "failed"]
    if failed:
        found.append(f"{len(failed)} kernels failed their validation, {failed[0]['case']} on {failed[0]['by']} first")
    if not any(row["status"] == "held" and row["median_us"] is not None for row in kernels):
        found.append("no kernel was validated and timed")
    if record["machine"]["device"] == "cuda" and record["machine"]["driver"] is None:
        found.append("the driver is unknown")
    private = [text for text in _texts(record) if scrub(text) != text]
    if private:
        found.append(f"a path in it names a home directory: {_shown(private[0])}")
    return found


def _read(path: str | Path, where: str) -> bytes:
    """At most MAX_BYTES of a regular file that is no link: not what a link points to, and nothing that never ends."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    if os.path.islink(path):
        raise RecordError(f"{where} is a symbolic link, and links are not followed")
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise RecordError(f"{where} cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise RecordError(f"{where} is no regular file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > MAX_BYTES:
            raise RecordError(f"{where} has {status.st_size} bytes, at most {MAX_BYTES} are read")
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise RecordError(f"{where} grows while it is read")
    return raw


def _check_fields(found: Any, wanted: dict[str, str], where: str) -> None:
    if not isinstance(found, dict):
        raise RecordError(f"{where} must be an object, got {_kind(found)}")
    if missing := [name for name in wanted if name not in found]:
        raise RecordError(f"{where} lacks {', '.join(missing[:5])}")
    if unknown := [name for name in found if name not in wanted]:
        raise RecordError(f"{where} has a field {_shown(unknown[0])} that the schema does not know")
    for name, kind in wanted.items():
        value = found[name]
        if value is None and kind.endswith("?"):
            continue
        if not _is(value, kind.removesuffix("?")):
            raise RecordError(f"{where}: {name} must be {kind.removesuffix('?')}, got {_shown(value)}")
        if value is not None and name in CHOICES and value not in CHOICES[name]:
            raise RecordError(f"{where}: {name} must be one of {', '.join(CHOICES[name])}, got {_shown(value)}")


def _is(value: Any, kind: str) -> bool:
    if kind == TEXT:
        return isinstance(value, str) and len(value) <= MAX_TEXT and not _CONTROL.search(value)
    if kind == FLAG:
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, int if kind == WHOLE else (int, float)):
        return False
    # No figure of a record is negative; a comparison with NaN is False.
    return 0 <= value <= MAX_NUMBER and math.isfinite(value)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in _texts(item)]


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _shown(value: Any) -> str:
    """A stranger's value in a message: short, and without control characters."""
    if isinstance(value, (dict, list)):
        return _kind(value)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return "a huge number"
    return _CONTROL.sub("?", str(value))[:80]
