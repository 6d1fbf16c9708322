"""Run the command line, in this process or in one of its own; no tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

from typer.testing import CliRunner

from resnet_fast.cli import app


class Outcome(NamedTuple):
    """What one run gave, with the assertions that many tests need."""

    code: int
    out: str
    err: str

    def failed(self, *mentions: str, code: int = 1, notes: bool = False) -> None:
        """One line says what is wrong, with all the ``mentions``; notes may stand before it if they are expected."""
        assert self.code == code, self
        lines = [line for line in self.err.strip().splitlines() if not (notes and ": note: " in line)]
        assert len(lines) == 1 and lines[0].startswith("resnet-fast: "), self.err
        assert "Traceback" not in self.err + self.out
        for mention in mentions:
            assert mention in lines[0], (mention, lines[0])

    def passed(self) -> str:
        assert self.code == 0, self
        return self.out

    def json(self) -> Any:
        return json.loads(self.passed())


def run(*arguments: object) -> Outcome:
    """``resnet-fast`` with these arguments."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return Outcome(result.exit_code, result.stdout, result.stderr)


def run_process(*arguments: object, **environment: str) -> Outcome:
    """``python -m resnet_fast.cli`` with these arguments."""
    command = [sys.executable, "-m", "resnet_fast.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
    return Outcome(done.returncode, done.stdout, done.stderr)
