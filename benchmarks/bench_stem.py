"""stem against the convolution, batch norm, ReLU and max-pool of torch: ``pytest benchmarks/bench_stem.py``."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import ops
from benchmarks.cases import BATCHES, PRECISIONS, measure


@pytest.mark.parametrize("who", ["plain", "op", "prepared"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", BATCHES)
def test_stem(benchmark: Any, batch: int, precision: str, who: str) -> None:
    measure(benchmark, lambda device: ops.stem(224, batch, precision, device), who)
