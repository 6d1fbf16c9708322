"""Work shared between processes of which one may die: a kernel that faults takes its process's GPU along."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch


def workers_for(items: int) -> int:
    """Return how many processes share that many items: half of the cores, at most 8."""
    return max(1, min(8, (os.cpu_count() or 2) // 2, items))


@contextmanager
def mapped(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int, lost: Callable[[Any, str], Any]
) -> Iterator[Iterator[Any]]:
    """Yield what ``function`` makes of the items, in any order as they are done, by that many processes.

    A process that dies gives ``lost(item, reason)``; it is replaced, as is one that a faulting kernel has cost its GPU.
    """
    if workers == 1:
        yield map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    running: dict[int, Any] = {}
    for item in items:
        waiting.put(item)

    def serve(number: int) -> None:
        usable, connection = False, None
        with suppress(queue.Empty):
            while True:
                item = waiting.get_nowait()
                if not usable:
                    connection, theirs = context.Pipe()
                    running[number] = context.Process(target=_serve, args=(function, theirs), daemon=True)
                    running[number].start()
                    theirs.close()
                assert connection is not None
                try:
                    connection.send(item)
                    result, usable = connection.recv()
                except (EOFError, OSError):
                    running[number].join()
                    usable, status = False, running[number].exitcode
                    result = lost(item, f"its process ended with exit status {status}")
                done.put(result)

    threads = [threading.Thread(target=serve, args=(number,), daemon=True) for number in range(workers)]
    for thread in threads:
        thread.start()
    try:
        yield (done.get() for _ in items)
    finally:
        with suppress(queue.Empty):
            while True:
                waiting.get_nowait()
        for process in list(running.values()):
            process.terminate()


def _serve(function: Callable[[Any], Any], connection: Any) -> None:
    """Items in, results out, and whether this process still has its GPU; until it has not."""
    usable = True
    while usable:
        try:
            item = connection.recv()
        except EOFError:
            return
        result = function(item)
        try:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        except RuntimeError:
            usable = False
        connection.send((result, usable))
