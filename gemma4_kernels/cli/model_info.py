"""What `gemma4-kernels info --model` shows: what is in a file or folder of weights, without reading any of them."""

from __future__ import annotations

import math
from typing import Any

from gemma4_kernels.linear.files import TensorInfo, WeightFiles, open_weights


def collect(name: str) -> dict[str, Any]:
    """All of it as plain data. Raises what `open_weights` raises."""
    files = open_weights(name)
    return {
        "model": name,
        "path": str(files.path),
        "format": files.format,
        "metadata": {key: _json(value) for key, value in files.metadata.items() if not key.startswith("tokenizer.")},
        "bytes": files.nbytes,
        "parameters": sum(info.parameters for info in files.tensors.values()),
        "schemes": _schemes(files),
        "tensors": [
            {**vars(info), "shape": list(info.shape), "parameters": info.parameters} for info in files.tensors.values()
        ],
    }


def render(found: dict[str, Any]) -> str:
    metadata = found["metadata"]
    known = [str(metadata[key]) for key in ("general.name", "general.architecture", "model_type") if key in metadata]
    lines = [f"{found['model']}: {', '.join([*known, found['format']])}"]
    if found["path"] != found["model"]:
        lines.append(f"  {found['path']}")
    lines += ["", f"  {'scheme':<20} {'tensors':>7} {'parameters':>12} {'bytes':>10} {'bits/weight':>11}  largest"]
    for row in found["schemes"]:
        largest = f"{row['largest']} {' x '.join(map(str, row['largest_shape']))}"
        lines.append(
            f"  {row['scheme']:<20} {row['tensors']:>7} {_short(row['parameters']):>12} {_bytes(row['bytes']):>10} "
            f"{_bits(row):>11}  {largest}"
        )
    total = {**found, "tensors": len(found["tensors"])}
    lines.append(
        f"  {'all':<20} {total['tensors']:>7} {_short(total['parameters']):>12} {_bytes(total['bytes']):>10} {_bits(total):>11}"
    )
    lines += [f"  not read: {row['scheme']}: {row['refusal']}" for row in found["schemes"] if row["refusal"]]
    return "\n".join(map(plain, lines))


def plain(line: str) -> str:
    """Names come from the file: what would move a terminal's cursor, or cannot be encoded, becomes a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _json(value: str | int | float | bool) -> str | int | float | bool:
    """JSON has neither NaN nor infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _schemes(files: WeightFiles) -> list[dict[str, Any]]:
    """One row for each scheme, the one with most bytes first."""
    by_scheme: dict[tuple[str, str], list[TensorInfo]] = {}
    for info in files.tensors.values():
        by_scheme.setdefault((info.scheme, info.refusal), []).append(info)
    rows = []
    for (scheme, refusal), infos in by_scheme.items():
        largest = max(infos, key=lambda info: info.nbytes)
        rows.append({
            "scheme": scheme, "tensors": len(infos), "parameters": sum(info.parameters for info in infos),
            "bytes": sum(info.nbytes for info in infos), "largest": largest.name,
            "largest_shape": list(largest.shape), "refusal": refusal,
        })  # fmt: skip
    return sorted(rows, key=lambda row: -int(row["bytes"]))


def _bits(row: dict[str, Any]) -> str:
    return f"{8 * row['bytes'] / row['parameters']:.3f}" if row["parameters"] else "-"


def _short(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 10_000 else str(count)


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**17 else f"{count} B"
