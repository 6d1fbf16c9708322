"""conv_bn_act against torch's four layers for the same: ``pytest benchmarks/bench_conv_bn_act.py``."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import ops
from benchmarks.cases import BATCHES, PRECISIONS, measure

#: Layers of ResNet-50 at 224 px, one of each kind.
SHAPES = (
    ops.ConvShape(64, 64, 3, 1, 56),
    ops.ConvShape(64, 256, 1, 1, 56, residual=True),
    ops.ConvShape(256, 64, 1, 1, 56),
    ops.ConvShape(128, 128, 3, 2, 56),
    ops.ConvShape(256, 256, 3, 1, 14),
    ops.ConvShape(1024, 256, 1, 1, 14),
    ops.ConvShape(512, 2048, 1, 1, 7, residual=True),
)


@pytest.mark.parametrize("who", ["plain", "op", "prepared"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_conv_bn_act(benchmark: Any, shape: ops.ConvShape, batch: int, precision: str, who: str) -> None:
    measure(benchmark, lambda device: ops.conv_bn_act(shape, batch, precision, device), who)
