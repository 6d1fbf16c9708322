"""Fixtures and markers for the whole suite: seeds, poisoned memory, the GPU marker, torchvision beside a CPU torch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports a kernel: Triton then interprets them, on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    # A shell's job in the background ignores Ctrl-C, and so would every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

from tests import _torchvision_stub  # noqa: F401 - before any test imports torchvision


def _refusals() -> dict[str, str]:
    """Return, for each marker of a device or kind of kernel, why its tests cannot run here; "" if they can."""
    from resnet_fast.backends import triton

    from . import cuda_device

    return {
        "gpu": "" if torch.cuda.is_available() else "needs a CUDA GPU, and torch sees none here",
        "triton": triton.unavailable(),
        "cuda": cuda_device.unavailable(),
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with a slow test first, or one process may have nothing to do while the other is still at the last of them.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    refusals: dict[str, str] | None = None
    for item in items:
        for name in ("gpu", "triton", "cuda"):
            if item.get_closest_marker(name) is None:  # keywords hold the names of folders too
                continue
            refusals = _refusals() if refusals is None else refusals
            if refusals[name]:
                item.add_marker(pytest.mark.skip(reason=refusals[name]))


_LEFT_OUT = pytest.StashKey[int]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        stash = items[0].config.stash
        stash[_LEFT_OUT] = stash.get(_LEFT_OUT, 0) + len(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # in a process of xdist, which does not report these itself
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get(
        "left_out", 0
    )  # every process selects the same


def pytest_unconfigure(config: pytest.Config) -> None:
    """Say at the very end what `make test` has left out."""
    count = config.stash.get(_LEFT_OUT, 0)
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if count and reporter and config.option.markexpr == "not slow" and not config.option.keyword:
        reporter.write_line(f"tests left out because they are marked slow: {count} (`make test-all` runs all)")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    """On a GPU torch's convolutions round float32 to tf32 unless told otherwise; a test that wants that says so."""
    if not torch.cuda.is_available():
        yield
        return
    from resnet_fast.roofline.measure import tf32

    with tf32(False):
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every ``torch.empty`` is full of NaN, in Python and in C++, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str, str], Path]:
    """What makes a shell script that stands in for a program, in a folder of such programs."""

    def make(name: str, body: str) -> Path:
        folder = tmp_path / "programs"
        folder.mkdir(exist_ok=True)
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small networks are quickest on one thread, and threads that wait for each other suffer from other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
