"""conv_bn_act against torch's four layers for the same: ``pytest benchmarks/bench_conv_bn_act.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_fast as rf
from benchmarks.cases import DTYPES, check, tensor, time
from resnet_fast.ops import prepared


@dataclass(frozen=True)
class Case:
    """One layer of ResNet-50 at 224 px."""

    c: int
    k: int
    kernel: int
    stride: int
    size: int
    residual: bool


CASES = [
    Case(64, 64, 3, 1, 56, False),
    Case(64, 256, 1, 1, 56, True),
    Case(256, 64, 1, 1, 56, False),
    Case(128, 128, 3, 2, 56, False),
    Case(256, 256, 3, 1, 14, False),
    Case(1024, 256, 1, 1, 14, False),
    Case(512, 2048, 1, 1, 7, True),
]


def name(case: Case) -> str:
    shape = f"{case.kernel}x{case.kernel}s{case.stride}-{case.c}to{case.k}-{case.size}px"
    return f"{shape}-residual" if case.residual else shape


@pytest.mark.parametrize("who", ["plain", "op", "prepared"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_conv_bn_act(benchmark: Any, case: Case, batch: int, dtype: torch.dtype, who: str) -> None:
    benchmark.group = f"conv_bn_act {name(case)} batch {batch} {dtype}"
    x = tensor(batch, case.c, case.size, case.size, seed=0, dtype=dtype)
    weight = tensor(case.k, case.c, case.kernel, case.kernel, seed=1, dtype=dtype) / (case.c * case.kernel**2) ** 0.5
    scale = tensor(case.k, seed=2, dtype=torch.float32).abs() + 0.5
    shift = tensor(case.k, seed=3, dtype=torch.float32)
    geometry = {"stride": (case.stride, case.stride), "padding": (case.kernel // 2, case.kernel // 2)}
    output = (case.size - 1) // case.stride + 1
    residual = tensor(batch, case.k, output, output, seed=4, dtype=dtype) if case.residual else None

    def plain(image: Tensor = x, kernel: Tensor = weight, gain: Tensor = scale, bias: Tensor = shift) -> Tensor:
        zero, one = torch.zeros_like(gain), torch.ones_like(gain)
        result = F.batch_norm(F.conv2d(image, kernel, **geometry), zero, one, gain, bias, eps=0.0)
        if residual is not None:
            result = result + residual.to(result.dtype)
        return F.relu(result, inplace=True)

    fixed = prepared.ConvBNAct(
        weight, scale, shift, **geometry, dilation=(1, 1), groups=1, activation="relu",
        residual_after_activation=False, dtype=dtype, backend="auto",
    )  # fmt: skip
    runs = {
        "plain": plain,
        "op": lambda: rf.ops.conv_bn_act(x, weight, scale, shift, residual, **geometry),
        "prepared": lambda: fixed(x, residual),
    }
    exact = plain(x.double(), weight.double(), scale.double(), shift.double())
    check(runs[who](), plain(), exact, dtype)
    time(benchmark, runs[who], backend="torch" if who == "plain" else fixed.backend)
