"""Each test of an op that takes ``kind`` runs on Triton's and on CUDA's kernels, under the kind's marker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernel_kinds import KINDS, Kind


@pytest.fixture(params=[pytest.param(name, marks=getattr(pytest.mark, name)) for name in KINDS])
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    """A kind of kernels, which the ops run throughout the test."""
    found = KINDS[request.param]
    with found.kernels():
        yield found


@pytest.fixture
def launched(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches, by the op's name."""
    return kind.watch(monkeypatch)
