"""What `gemma4-kernels info --plan` shows: the memory that a model takes, line by line, and the longest context that fits."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from typing import Any

from gemma4_kernels import memory_plan
from gemma4_kernels.bench import cards
from gemma4_kernels.cli.model_info import plain
from gemma4_kernels.memory_plan import FORMS, GIB, Form, Model, Setting

UNITS = {"GIB": 2**30, "MIB": 2**20, "GB": 10**9, "MB": 10**6}


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory plan")
    group.add_argument(
        "--plan", metavar="MODEL",
        help="what a model takes: a file or folder as for --model, or 12B:Q4_0 or '12B:Q4_0+Q6_K head' for who has none",
    )  # fmt: skip
    group.add_argument("--drafter", metavar="MODEL", help="a drafter beside it, likewise, or 12B-DRAFTER:Q4_0")
    group.add_argument("--context", type=int, help="positions of a request; by default all that the model has")
    group.add_argument("--batch", type=int, default=1, help="requests at a time")
    group.add_argument(
        "--cache", choices=FORMS, help="what full layers keep; by default values alone where that is enough"
    )
    where = group.add_mutually_exclusive_group()
    where.add_argument("--card", metavar="NAME", help="what fits on this card, 'RTX 3060'")
    where.add_argument("--memory", metavar="SIZE", help="what fits into this much, 12GiB")
    group.add_argument(
        "--reserve", metavar="SIZE", default="1GiB", help="for the CUDA context, a display and so on: assumed"
    )
    group.add_argument("--chunk", type=int, default=memory_plan.CHUNK, help="rows of a prompt that one pass takes")


def stray_options(arguments: argparse.Namespace) -> str:
    """An option of a plan, where none was asked for; empty if there is none."""
    names = ("drafter", "context", "cache", "card", "memory")
    return next((f"--{name}" for name in names if getattr(arguments, name) is not None), "")


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it as plain data. Raises ValueError, OSError."""
    model = memory_plan.model_of(arguments.plan)
    drafter = memory_plan.drafter_of(arguments.drafter) if arguments.drafter else None
    setting = Setting(
        context=model.max_context if arguments.context is None else arguments.context, batch=arguments.batch,
        form=arguments.cache or ("bf16" if model.values_suffice else "both"), chunk=arguments.chunk,
        reserve=_bytes_of("--reserve", arguments.reserve),
        multiprocessors=(cards.find(arguments.card).sms if arguments.card else None) or memory_plan.MULTIPROCESSORS,
    )  # fmt: skip
    memory = None
    if arguments.card:
        memory = int(cards.memory_gib(arguments.card) * GIB)
    elif arguments.memory:
        memory = _bytes_of("--memory", arguments.memory)
    items = memory_plan.plan(model, setting, drafter)
    return {
        "model": arguments.plan, "drafter": arguments.drafter, "context": setting.context, "batch": setting.batch,
        "cache": setting.form, "card": arguments.card, "memory": memory, "items": [vars(item) for item in items],
        "bytes": memory_plan.total(items), "forms": _forms(model, setting, memory, drafter), "notes": list(model.notes),
    }  # fmt: skip


def render(found: dict[str, Any]) -> str:
    lines = [f"{found['model']}: {found['context']} positions, {_count(found['batch'], 'request')}", ""]
    part = ""
    for item in found["items"]:
        shown = item["part"] if item["part"] != part else ""
        part = item["part"]
        lines.append(f"  {shown:<10} {item['name']:<22} {_gib(item['nbytes'])}   {item['detail']}".rstrip())
    lines += [f"  {'all':<33} {_gib(found['bytes'])}   {_verdict(found)}".rstrip(), ""]
    width = max(len(form["means"]) for form in found["forms"])
    lines.append(f"     {'full layers keep':<{width + 6}} {'all':>12}   longest context")
    for form in found["forms"]:
        longest = "-" if form["longest"] is None else "does not fit" if form["longest"] == 0 else str(form["longest"])
        mark = "->" if form["form"] == found["cache"] else "  "
        lines.append(f"  {mark} {form['form']:<5} {form['means']:<{width}} {_gib(form['bytes'])}   {longest}")
    lines += [f"  {note}" for note in found["notes"]]
    return "\n".join(map(plain, lines))


def _forms(model: Model, setting: Setting, memory: int | None, drafter: Model | None) -> list[dict[str, Any]]:
    """What each form of the cache comes to; of those that the model can have."""
    forms: tuple[Form, ...] = tuple(FORMS) if model.values_suffice else ("both",)
    rows = []
    for form in forms:
        with_form = replace(setting, form=form)
        longest = None if memory is None else memory_plan.longest_context(model, with_form, memory, drafter)
        nbytes = memory_plan.total(memory_plan.plan(model, with_form, drafter))
        rows.append({"form": form, "means": FORMS[form], "bytes": nbytes, "longest": longest})
    return rows


def _verdict(found: dict[str, Any]) -> str:
    if found["memory"] is None:
        return ""
    left = found["memory"] - found["bytes"]
    where = f"the {found['memory'] / GIB:.2f} GiB" + (f" of {found['card']}" if found["card"] else "")
    if left < 0:
        return f"does not fit into {where}: {-left / GIB:.2f} too much"
    return f"fits into {where}, {left / GIB:.2f} left"


def _bytes_of(option: str, text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip(), re.IGNORECASE)
    if found is None or found[2].upper() not in UNITS or float(found[1]) > 1e6:
        raise ValueError(f"{option} must be a size such as 12GiB, 512MiB or 12GB, got {text[:50]!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _gib(count: int) -> str:
    return f"{count / GIB:>8.3f} GiB"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"
