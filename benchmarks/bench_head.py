"""head against the average pool and linear layer of torch: ``pytest benchmarks/bench_head.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_fast as rf
from benchmarks.cases import DTYPES, check, tensor, time
from resnet_fast.ops import prepared


@pytest.mark.parametrize("who", ["plain", "op", "prepared"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 16])
def test_head(benchmark: Any, batch: int, dtype: torch.dtype, who: str) -> None:
    benchmark.group = f"head 2048 channels batch {batch} {dtype}"
    x = tensor(batch, 2048, 7, 7, seed=0, dtype=dtype)
    weight = tensor(1000, 2048, seed=1, dtype=dtype) / 45
    bias = tensor(1000, seed=2, dtype=dtype)

    def plain(image: Tensor = x, matrix: Tensor = weight, offset: Tensor = bias) -> Tensor:
        return F.linear(F.adaptive_avg_pool2d(image, 1).flatten(1), matrix, offset)

    fixed = prepared.Head(weight, bias, dtype=dtype, backend="auto")
    runs = {"plain": plain, "op": lambda: rf.ops.head(x, weight, bias), "prepared": lambda: fixed(x)}
    check(runs[who](), plain(), plain(x.double(), weight.double(), bias.double()), dtype)
    time(benchmark, runs[who], backend="torch" if who == "plain" else fixed.backend)
