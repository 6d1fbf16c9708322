"""bottleneck_tail against torch's layers for the same: ``pytest benchmarks/bench_bottleneck_tail.py``."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import ops
from benchmarks.cases import BATCHES, PRECISIONS, measure


@pytest.mark.parametrize("who", ["plain", "op", "prepared"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", ops.TAILS, ids=lambda shape: shape.name)
def test_bottleneck_tail(benchmark: Any, shape: ops.TailShape, batch: int, precision: str, who: str) -> None:
    measure(benchmark, lambda device: ops.bottleneck_tail(shape, batch, precision, device), who)
