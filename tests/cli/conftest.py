"""Commands are run in the process, so that a test can break a kernel beneath them."""

from __future__ import annotations

import shlex
from typing import NamedTuple

import pytest

from gemma4_kernels.cli.main import main


class Answer(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def command(capsys):
    """Run a command line as a shell would split it."""

    def run(line: str) -> Answer:
        words = shlex.split(line)
        assert words[0] == "gemma4-kernels"
        try:
            status = main(words[1:])
        except SystemExit as stop:
            status = stop.code
        return Answer(status, *capsys.readouterr())

    return run
