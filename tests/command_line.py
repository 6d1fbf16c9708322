"""The command line run in this process, and what tests say of the outcome. No tests here."""

from __future__ import annotations

from typing import NamedTuple

from typer.testing import CliRunner

from resnet_fast.cli import app


class Outcome(NamedTuple):
    """What one run gave, with the two assertions that many tests need."""

    code: int
    out: str
    err: str

    def failed(self, *mentions: str, code: int = 1, notes: bool = False) -> None:
        """One line says what is wrong, with all the ``mentions``; notes may stand before it if they are expected."""
        assert self.code == code, self
        lines = [line for line in self.err.strip().splitlines() if not (notes and ": note: " in line)]
        assert len(lines) == 1 and lines[0].startswith("resnet-fast: "), self.err
        for mention in mentions:
            assert mention in lines[0], (mention, lines[0])

    def passed(self) -> str:
        assert self.code == 0, self
        return self.out


def run(*arguments: object) -> Outcome:
    """``resnet-fast`` with these arguments."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    return Outcome(result.exit_code, result.stdout, result.stderr)
