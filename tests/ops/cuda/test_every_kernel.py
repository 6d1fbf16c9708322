"""Every compiled convolution kernel on problems that it computes, not only the one that would be chosen.

Small problems make the choice take the smallest tile, so others would first run when somebody tunes. Here each one
gets tails in every direction, both residual orders, NaN and infinities. On a Hopper GPU those made with CUTLASS too.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from resnet_fast.backends import cuda, triton
from resnet_fast.kernels import gpus
from resnet_fast.kernels.problems import ConvBNAct
from tests.cuda_device import (
    DEVICE,
    DTYPES,
    as_multiplied,
    assert_obeys_error_rule,
    doubled,
    installed,
)
from tests.ops.test_conv_bn_act import plain

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("poisoned_memory")]


@dataclass(frozen=True)
class Shape:
    """x [n, c, h, w] and a square window."""

    n: int
    c: int
    h: int
    w: int
    k: int
    window: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1


#: What the kernels written by hand are run on if they are emulated; tests/emulator/ has their cases.
FEW = [Shape(1, 8, 1, 1, 8), Shape(1, 72, 3, 5, 24, window=3, stride=2, padding=1)]

# Pixels: one, an odd number of tiles of 128 with one pixel in the last, a whole number of tiles. Channels: fewer than
# a step of the product, none that fill a tile, and more than one tile of outputs.
MANY = [
    Shape(1, 8, 1, 1, 8),
    Shape(1, 72, 3, 43, 72),
    Shape(1, 8, 1, 257, 136),
    Shape(2, 64, 16, 8, 128),
    Shape(1, 72, 9, 17, 72, window=3, stride=2, padding=1),
    Shape(2, 8, 12, 11, 136, window=3, padding=1),
    Shape(1, 16, 13, 12, 64, window=3, padding=2, dilation=2),
    Shape(1, 16, 15, 14, 24, window=1, stride=2),
]
TRIED = MANY if DEVICE == "cuda" else FEW


def gpu() -> gpus.GPU:
    return triton.gpu_of(torch.device("cuda")) if DEVICE == "cuda" else gpus.known("h100")


def tensors(shape: Shape, dtype: torch.dtype, residual: bool) -> tuple[ConvBNAct, dict[str, Tensor | None]]:
    """The problem and its tensors, all on the CPU."""
    torch.manual_seed(shape.c + shape.k)
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "tf32"}[dtype]
    pairs = [(each, each) for each in (shape.window, shape.stride, shape.padding, shape.dilation)]
    problem = ConvBNAct(shape.n, shape.h, shape.w, shape.c, shape.k, *pairs, 1, precision, residual)
    image = torch.randn(shape.n, shape.c, shape.h, shape.w).to(dtype)
    weight = torch.randn(shape.k, shape.c, shape.window, shape.window) / (shape.c * shape.window**2) ** 0.5
    given: dict[str, Tensor | None] = {
        "x": image, "weight": weight.to(dtype), "scale": torch.rand(shape.k) + 0.5, "shift": torch.randn(shape.k),
        "residual": torch.randn(shape.n, shape.k, *problem.output).to(dtype) if residual else None,
    }  # fmt: skip
    return problem, as_multiplied(given, "x", "weight")


def launch(name: str, problem: ConvBNAct, given: dict[str, Tensor | None], relu: bool, after: bool) -> Tensor:
    there = {
        key: t if t is None else t.to(DEVICE, memory_format=torch.channels_last) if t.dim() == 4 else t.to(DEVICE)
        for key, t in given.items()
    }
    shape = (problem.n, problem.k, *problem.output)
    out = torch.empty(shape, dtype=there["x"].dtype, device=DEVICE, memory_format=torch.channels_last)  # type: ignore[union-attr]
    cuda.conv_bn_act(
        name, *(there[key] for key in ("x", "weight", "scale", "shift", "residual")), out, problem,
        activation="relu" if relu else "none", residual_after_activation=after,
    )  # type: ignore[arg-type]  # fmt: skip
    return out.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", TRIED, ids=str)
def test_every_kernel_obeys_the_error_rule(shape: Shape, dtype: torch.dtype) -> None:
    options = {"stride": shape.stride, "padding": shape.padding, "dilation": shape.dilation}
    with installed():
        for residual, relu, after in (
            (False, True, False),
            (True, True, False),
            (True, True, True),
            (True, False, False),
        ):
            problem, given = tensors(shape, dtype, residual)
            how = {**options, "activation": "relu" if relu else "none", "residual_after_activation": after}
            same_dtype, exact = plain(**given, **how), plain(**doubled(given), **how)
            for kernel in cuda.supporting(problem, gpu())[0]:
                ours = launch(kernel.name, problem, given, relu, after)
                assert_obeys_error_rule(ours, same_dtype, exact, f"{kernel.name} residual {residual} {how}")


# Not an infinite scale: torch's BatchNorm multiplies it with a mean of zero.
@pytest.mark.parametrize(
    ("where", "value"),
    [
        *((where, float("nan")) for where in ("x", "weight", "scale", "shift", "residual")),
        *((where, sign * float("inf")) for where in ("x", "weight", "shift", "residual") for sign in (1, -1)),
    ],
)
@pytest.mark.parametrize("shape", [MANY[1], MANY[4]] if DEVICE == "cuda" else FEW[1:], ids=str)
def test_every_kernel_keeps_nan_and_infinities(shape: Shape, value: float, where: str) -> None:
    options = {"stride": shape.stride, "padding": shape.padding}
    problem, given = tensors(shape, torch.float16, residual=True)
    spoilt = given[where]
    assert spoilt is not None
    spoilt.view(-1)[spoilt.numel() // 2] = value
    with installed():
        for after in (False, True):
            how = {**options, "activation": "relu", "residual_after_activation": after}
            same_dtype, exact = plain(**given, **how), plain(**doubled(given), **how)
            for kernel in cuda.supporting(problem, gpu())[0]:
                ours = launch(kernel.name, problem, given, relu=True, after=after)
                assert_obeys_error_rule(ours, same_dtype, exact, f"{kernel.name} {value} in {where}, after {after}")
