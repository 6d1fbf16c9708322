"""add_act against torch's addition and ReLU: ``pytest benchmarks/bench_add_act.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import resnet_fast as rf
from benchmarks.cases import DTYPES, check, tensor, time


@pytest.mark.parametrize("who", ["plain", "op"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize(("channels", "size"), [(256, 56), (2048, 7)])
def test_add_act(benchmark: Any, channels: int, size: int, batch: int, dtype: torch.dtype, who: str) -> None:
    benchmark.group = f"add_act {channels} channels {size} px batch {batch} {dtype}"
    x = tensor(batch, channels, size, size, seed=0, dtype=dtype)
    y = tensor(batch, channels, size, size, seed=1, dtype=dtype)
    runs = {"plain": lambda: torch.relu_(x + y), "op": lambda: rf.ops.add_act(x, y)}
    check(runs[who](), runs["plain"](), torch.relu(x.double() + y.double()), dtype)
    time(benchmark, runs[who])
