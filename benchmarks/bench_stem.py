"""stem against the convolution, batch norm, ReLU and max-pool of torch: ``pytest benchmarks/bench_stem.py``."""

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
def test_stem(benchmark: Any, batch: int, dtype: torch.dtype, who: str) -> None:
    benchmark.group = f"stem 224 px batch {batch} {dtype}"
    x = tensor(batch, 3, 224, 224, seed=0, dtype=dtype)
    weight = tensor(64, 3, 7, 7, seed=1, dtype=dtype) / 12
    scale = tensor(64, seed=2, dtype=torch.float32).abs() + 0.5
    shift = tensor(64, seed=3, dtype=torch.float32)

    def plain(image: Tensor = x, kernel: Tensor = weight, gain: Tensor = scale, bias: Tensor = shift) -> Tensor:
        zero, one = torch.zeros_like(gain), torch.ones_like(gain)
        result = F.batch_norm(F.conv2d(image, kernel, stride=2, padding=3), zero, one, gain, bias, eps=0.0)
        return F.max_pool2d(F.relu(result, inplace=True), 3, 2, 1)

    fixed = prepared.Stem(weight, scale, shift, ceil_mode=False, dtype=dtype, backend="auto")
    runs = {"plain": plain, "op": lambda: rf.ops.stem(x, weight, scale, shift), "prepared": lambda: fixed(x)}
    exact = plain(x.double(), weight.double(), scale.double(), shift.double())
    check(runs[who](), plain(), exact, dtype)
    time(benchmark, runs[who], backend="torch" if who == "plain" else fixed.backend)
