"""add_act against torch's addition and ReLU: ``pytest benchmarks/bench_add_act.py``."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import ops
from benchmarks.cases import BATCHES, PRECISIONS, measure


@pytest.mark.parametrize("who", ["plain", "op"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("channels", "size"), [(256, 56), (2048, 7)])
def test_add_act(benchmark: Any, channels: int, size: int, batch: int, precision: str, who: str) -> None:
    measure(benchmark, lambda device: ops.add_act(channels, size, batch, precision, device), who)
