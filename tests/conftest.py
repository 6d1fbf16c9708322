"""Fixtures and markers for the whole suite: seeds, poisoned memory, the GPU marker, torchvision beside a CPU torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports a kernel: Triton then interprets them, on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

from . import _torchvision_stub  # noqa: F401 - before any test imports torchvision


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none here")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords would hold the names of folders too
            item.add_marker(skip)


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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small networks are quickest on one thread, and threads that wait for each other suffer from other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
