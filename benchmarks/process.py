"""A command that is given a time limit, and ended with all that it started. Standard library only."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

EVERY = 20.0
"""Seconds between two calls of what is done while a command runs."""


class Process:
    """A command in a process group of its own, its output in a file and, line by line, on the terminal."""

    def __init__(self, command: list[str], cwd: Path, env: Mapping[str, str]) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        self._shown = 0
        self._process = subprocess.Popen(
            command, cwd=cwd, env=dict(env), stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self, seconds: float, meanwhile: Callable[[], object] = lambda: None) -> int | None:
        """Return the exit status; None if the command was still running after ``seconds`` and had to be ended."""
        end, called = time.monotonic() + seconds, time.monotonic()
        try:
            while time.monotonic() < end:
                if time.monotonic() - called >= EVERY:
                    meanwhile()
                    called = time.monotonic()
                status = self._process.poll()
                self._show()
                if status is not None:
                    return status
                time.sleep(0.1)
        except BaseException:  # this program is being ended itself: nothing may stay behind on the GPU
            self.end()
            raise
        self.end()
        return None

    def end(self) -> None:
        """Ends the command and whatever it started."""
        for sent, grace in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(self._process.pid, sent)
                self._process.wait(grace)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._process.poll()
        self._show()

    def output(self) -> str:
        """Everything that it has printed so far."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def _show(self) -> None:
        self._output.seek(self._shown)
        new = self._output.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._shown += len(whole)
        self._output.seek(0, os.SEEK_END)
        for line in whole.decode(errors="replace").splitlines():
            if line.startswith("  "):  # the commands' own lines; everything else stays in the file
                print(line, flush=True)
