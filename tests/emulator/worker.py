"""A process below AddressSanitizer that runs cases in children of its own, so that a crash is a result like any other.

``python -m tests.emulator.worker`` reads jobs as lines of JSON and answers each with one line. ``Worker`` is the
other end, and ``run`` spreads jobs over several.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

from tests.emulator import build
from tests.emulator.harness import SELFTEST, Bits, Emulator, Site, cases, check


@dataclass(frozen=True)
class Job:
    """Cases of one op, by name, each under all seeds, up to the first failure: seed by seed, not case by case."""

    op: str
    cases: list[str]
    seeds: list[int]
    disabled: tuple[str, int, int] | None = None
    seconds: float = 60.0  # of processor time, for one case under one seed


@dataclass(frozen=True)
class Result:
    """How a job ended; ``failure`` is '' if every case was right, else what went wrong in ``case`` under ``seed``."""

    failure: str
    case: str
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)  # of processor time for each case, the first time
    sites: dict[str, list[Site]] = field(default_factory=dict)  # that each case reached, the first time


class Worker:
    """One process. Not for several threads at once."""

    def __init__(self) -> None:
        environment = os.environ | {
            "LD_PRELOAD": " ".join(map(str, build.sanitizer())),
            # Wide red zones: a kernel's mistake is seldom off by only one element.
            "ASAN_OPTIONS": "detect_leaks=0:redzone=1024:max_redzone=2048:allocator_may_return_null=1"
            ":quarantine_size_mb=4:malloc_context_size=1",  # _crash tells no allocation's stack
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "OMP_NUM_THREADS": "1",
        }
        personality = ctypes.CDLL(None).personality
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name if __name__ == "__main__" else __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=build.ROOT,
            # Not random addresses: sanitizers of GCC 12 and older do not start where the kernel draws 32 bits of them.
            preexec_fn=lambda: personality(0x0040000),
        )

    def run(self, job: Job) -> Result:
        """The job's result.

        Raises:
            RuntimeError: not even the first case was begun.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(_library(job.op == SELFTEST)), asdict(job)]) + "\n")
        self._process.stdin.flush()
        begun = ("", 0)
        seconds: dict[str, float] = {}
        sites: dict[str, list[Site]] = {}
        for line in self._process.stdout:
            event = json.loads(line)
            if "ended" in event:
                if event["ended"] and begun == ("", 0):
                    raise RuntimeError(f"{job.op}: {event['ended']}")
                return Result(event["ended"], *begun, seconds, sites)
            if "begun" in event:
                begun = event["begun"]
            else:
                seconds[begun[0]] = event["seconds"]
                sites[begun[0]] = [Site(**site) for site in event["sites"]]
        raise RuntimeError(f"the worker ended with status {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@functools.cache
def _library(selftest: bool) -> Path:
    """One for this whole process, whatever becomes of the sources meanwhile."""
    return build.build(sanitize=True, selftest=selftest)


def run(jobs: Iterable[Job], workers: list[Worker]) -> Iterator[Result]:
    """The jobs' results in order, as many at once as there are workers. Compiles first what is not compiled yet."""
    jobs = list(jobs)
    for selftest in {job.op == SELFTEST for job in jobs}:
        _library(selftest)
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def on_one(job: Job) -> Result:
        worker = free.get()
        try:
            return worker.run(job)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(len(workers)) as pool:
        yield from pool.map(on_one, jobs)


# --- the process itself

_TOLD = 3  # the exit status of a child that has said itself what failed


def _main() -> None:
    """Leaves the jobs to a child, and to another one when a failure ended that: memory may be broken then."""
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or every child would soon copy all of it
    status = -1
    while status != 0:
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            child = os.fork()
            if child == 0:
                os.dup2(errors.fileno(), 2)
                _serve()
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status == -signal.SIGPROF:
                _tell(ended="did not end in time")
            elif status not in (0, _TOLD):
                errors.seek(0)
                _tell(ended=_crash(errors.read(), status))


def _tell(**event: object) -> None:
    print(json.dumps(event), flush=True)


def _serve() -> NoReturn:
    for line in sys.stdin:  # a job is sent when the one before it has ended, so nothing of the next one is read
        library, job = json.loads(line)
        try:
            _work(library, Job(**job))
        except Exception as error:
            _tell(ended=f"{type(error).__name__}: {error}")
            os._exit(_TOLD)
        _tell(ended="")
    os._exit(0)


@functools.cache
def _loaded(library: str, selftest: bool) -> tuple[Any, Emulator]:
    return (build.selftest if selftest else build.loaded)(Path(library)), Emulator(Path(library))


def _work(library: str, job: Job) -> None:
    native, emulator = _loaded(library, job.op == SELFTEST)
    known = cases(job.op)
    assert known.keys() >= set(job.cases), f"no such case: {', '.join(set(job.cases) - known.keys())}"
    first: dict[str, Bits] = {}
    emulator.disable(job.disabled)
    for seed in job.seeds:
        for name in job.cases:
            _tell(begun=(name, seed))
            emulator.forget_counts()
            began = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, job.seconds)
            bits = check(known[name], native, emulator, seed, first.get(name))
            signal.setitimer(signal.ITIMER_PROF, 0)
            if name not in first:
                first[name] = bits
                _tell(seconds=time.process_time() - began, sites=[asdict(site) for site in emulator.sites()])


def _crash(output: str, status: int) -> str:
    """The sanitizer's report cut down to what went wrong and the first frame in our sources."""
    found = re.search(r"ERROR: AddressSanitizer: (\S+)|runtime error: (.+)", output)
    if found is None:
        return f"ended with status {status}: {output[-2000:]}"
    access = re.search(r"^((?:READ|WRITE) of size \d+)", output, re.MULTILINE)
    frames = re.findall(r"\b((?:csrc/kernels|tests/emulator)/[^\s:]+:\d+)", output)
    kernels = [frame for frame in frames if frame.startswith("csrc/") or "selftest.cu" in frame]
    place = next(iter(kernels or frames), "")
    return " ".join(
        part
        for part in (
            "AddressSanitizer:" if found[1] else "UndefinedBehaviorSanitizer:",
            found[1] or re.sub(r"0x[0-9a-f]+ ?", "", found[2]),
            access[1] if access else "",
            f"at {place}" if place else "",
        )
        if part
    )


if __name__ == "__main__":
    _main()
