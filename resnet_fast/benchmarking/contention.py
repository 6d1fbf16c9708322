"""Processes that keep cores busy, to measure beside: on a shared machine threads wait for the slowest of them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

# A process whose parent was killed would run forever: it looks for its parent now and then.
_SPIN = """
import os
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


def processes(count: int) -> str:
    """``1 busy process`` or ``2 busy processes``."""
    return f"{count} busy process{'' if count == 1 else 'es'}"


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Run ``count`` processes of one thread each that compute without a pause; all of them run when this begins."""
    running = [
        subprocess.Popen([sys.executable, "-c", _SPIN], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(count)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError(f"a busy process ended at once, with exit status {process.wait()}")
        yield
    finally:
        for process in running:
            process.kill()
            process.communicate()
