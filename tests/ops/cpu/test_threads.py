"""The engine's threads: many callers of one plan, thread counts that change, fork, and memory that does not grow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.cpu.engine import Problem, _cpu, run_plan, same_bits
from tests.ops.cpu.test_plan import Network

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[3]


def _resident() -> int:
    """Return the bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


memory_is_its_own = pytest.mark.skipif(
    not os.path.exists("/proc/self/statm") or bool(_cpu.build_info()["sanitizer"]),
    reason="needs Linux's /proc, and a build without a sanitizer, which keeps what is freed",
)


def _together(count: int, call: Callable[[int], None]) -> None:
    """Run ``call(0)`` to ``call(count - 1)`` on threads that begin at the same time; raises what one of them raises."""
    barrier, errors = threading.Barrier(count), []

    def each(index: int) -> None:
        try:
            barrier.wait()
            call(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=each, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a caller waits for ever"
    if errors:
        raise errors[0]


def _equal(ours: list[Tensor], expected: list[Tensor]) -> bool:
    return all(same_bits(a, b) for a, b in zip(ours, expected, strict=True))


def test_eight_callers_share_a_plan() -> None:
    plan = Network().plan()  # never run: they make its filters and schedules at the same time, too
    images = [torch.randn(1 + i % 2, 3, 24 + i, 30) for i in range(8)]
    expected = [run_plan(Network().plan(), image) for image in images]

    def call(index: int) -> None:
        for turn in range(12):
            at = (index + turn) % len(images)
            assert _equal(run_plan(plan, images[at], threads=1 + (index + turn) % 3), expected[at])

    _together(8, call)


def test_eight_callers_share_a_layer() -> None:
    weight = torch.randn(70, 64, 3, 3) / 24
    images = [Problem(torch.randn(1, 64, 9 + i, 14), weight, torch.randn(70), padding=(1, 1)) for i in range(4)]
    layer = images[0].layer()
    expected = {(i, name): each.run(name, layer=layer) for i, each in enumerate(images) for name in each.algorithms()}
    fresh = images[0].layer()

    def call(index: int) -> None:
        for turn in range(12):
            at = (index + turn) % len(images)
            name = images[at].algorithms()[(index + turn) % 3]
            assert same_bits(images[at].run(name, 1 + turn % 3, fresh), expected[at, name])

    _together(8, call)


def test_thread_counts_that_change() -> None:
    plan, x = Network().plan(), torch.randn(2, 3, 50, 50)
    expected = run_plan(plan, x)
    for threads in (3, 1, 2, 8, 2, 1, 16, 3):
        for _ in range(3):
            assert _equal(run_plan(plan, x, threads=threads), expected)
            time.sleep(0.001)  # long enough for them to fall asleep


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("busy", [False, True])
def test_a_fork_computes_too(busy: bool) -> None:
    """With threads of its own, also if it was made while another thread of the parent was computing."""
    plan, x = Network().plan(), torch.randn(1, 3, 40, 40)
    expected = run_plan(plan, x, threads=3)
    stop = threading.Event()
    other = Network().plan()
    run_plan(other, x)

    def compute() -> None:
        while not stop.is_set():
            run_plan(other, x, threads=3)

    thread = threading.Thread(target=compute)
    if busy:
        thread.start()
    try:
        for _ in range(4):
            child = os.fork()
            if child == 0:
                signal.alarm(120)  # ends a child that waits for ever
                right = False
                try:
                    right = all(_equal(run_plan(plan, x, threads=threads), expected) for threads in (3, 1, 2, 3))
                finally:
                    os._exit(0 if right else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert _equal(run_plan(plan, x, threads=3), expected)
    finally:
        stop.set()
        if busy:
            thread.join()


@memory_is_its_own
def test_the_caller_does_what_threads_that_cannot_be_started_would() -> None:
    """In a process of its own, whose memory has no room for another thread's stack."""
    code = (
        "import resource, torch\n"
        "from tests.ops.cpu.engine import run_plan, same_bits\n"
        "from tests.ops.cpu.test_plan import Network\n"
        "plan, x = Network().plan(), torch.randn(2, 3, 40, 40)\n"
        "expected = run_plan(plan, x)\n"
        "held = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + (4 << 20), -1))\n"
        "ours = run_plan(plan, x, threads=6)\n"
        "assert all(same_bits(a, b) for a, b in zip(ours, expected, strict=True))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


@memory_is_its_own
def test_memory_does_not_grow() -> None:
    plan = Network().plan()
    images = [torch.randn(1 + i % 3, 3, 16 + 2 * i, 60 - i) for i in range(30)]  # more than schedules are kept

    def rounds(count: int) -> int:
        for turn in range(count):
            for image in images:
                run_plan(plan, image, threads=1 + turn % 3)
        return _resident()

    before = rounds(6)
    assert rounds(12) - before < 4 * 2**20
    assert plan.arena_bytes < 64 * 2**20


@memory_is_its_own
def test_layers_and_plans_give_their_memory_back() -> None:
    weight, bias = torch.randn(256, 256, 3, 3) / 48, torch.zeros(256)
    problem = Problem(torch.randn(1, 256, 8, 8), weight, bias, padding=(1, 1))

    def rounds(count: int) -> int:
        for _ in range(count):
            layer = problem.layer()
            assert layer.bytes < 3 * 4 * weight.numel()
            problem.run("winograd2", 2, layer)
            plan = _cpu.Plan()
            plan.output(plan.convolution(plan.input(256), layer, -1, True, False))
            run_plan(plan, problem.x, threads=2)
        return _resident()

    before = rounds(3)
    assert rounds(12) - before < 16 * 2**20  # a layer has 12 MB


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's processor affinity")
def test_threads_may_run_anywhere_when_they_have_begun() -> None:
    """A thread that is sent away from its caller's processor is sent for a moment, and never out of what is allowed."""
    code = """
import os, time, torch
from tests.ops.cpu.test_plan import Network
from tests.ops.cpu.engine import run_plan, same_bits
allowed = os.sched_getaffinity(0)
plan, x = Network().plan(), torch.randn(2, 3, 50, 50)
wanted = run_plan(plan, x)
for _ in range(20):
    time.sleep(0.003)  # until threads sleep
    assert all(map(same_bits, run_plan(plan, x, threads=2), wanted))
threads = [int(task) for task in os.listdir("/proc/self/task")]
until = time.monotonic() + 60  # a thread that was woken may not have run yet
while any(os.sched_getaffinity(thread) != allowed for thread in threads) and time.monotonic() < until:
    time.sleep(0.01)
assert all(os.sched_getaffinity(thread) == allowed for thread in threads), [*map(os.sched_getaffinity, threads)]
one = {min(allowed)}
for thread in threads:
    os.sched_setaffinity(thread, one)
for _ in range(5):
    time.sleep(0.003)
    assert all(map(same_bits, run_plan(plan, x, threads=2), wanted))
assert all(os.sched_getaffinity(thread) == one for thread in threads)
print("anywhere")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "anywhere\n", done.stderr
