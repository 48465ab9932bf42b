"""The command `gemma4-kernels`: its subcommands, and nothing of what they do."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from gemma4_kernels._version import __version__
from gemma4_kernels.cli import bench, generate, info, validate

SUBCOMMANDS = (info, validate, bench, generate)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gemma4-kernels", description="Kernels for Gemma 4: what is here, whether it holds, how fast it is."
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for subcommand in SUBCOMMANDS:
        subcommand.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit status."""
    parsed = build_parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; leave nothing for Python to flush at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status
