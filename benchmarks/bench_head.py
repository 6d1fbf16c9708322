"""head against the average pool and linear layer of torch: ``pytest benchmarks/bench_head.py``."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import ops
from benchmarks.cases import BATCHES, PRECISIONS, measure


@pytest.mark.parametrize("who", ["plain", "op", "prepared"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", BATCHES)
def test_head(benchmark: Any, batch: int, precision: str, who: str) -> None:
    measure(benchmark, lambda device: ops.head(2048, 7, batch, precision, device), who)
