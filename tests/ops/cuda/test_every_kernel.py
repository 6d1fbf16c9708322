"""Every compiled convolution kernel on problems that it computes, not only the one that would be chosen.

Small problems make the choice take the smallest tile, so others would first run when somebody tunes. Here each one
gets tails in every direction, both residual orders, NaN and infinities. On a Hopper GPU those made with CUTLASS too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fast.backends import cuda, triton
from resnet_fast.kernels import gpus
from resnet_fast.kernels.problems import ConvBNAct
from resnet_fast.ops import ALL
from resnet_fast.ops.conv_bn_act import Arguments
from tests.cuda_device import (
    DEVICE,
    DTYPES,
    as_multiplied,
    doubled,
    installed,
)
from tests.numerics import assert_obeys_error_rule, conv2d_in_order
from tests.ops.test_conv_bn_act import plain

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("poisoned_memory")]


def shape(
    n: int, c: int, h: int, w: int, k: int, window: int = 1, stride: int = 1, padding: int = 0, dilation: int = 1
) -> ConvBNAct:
    """x [n, c, h, w] and a square window."""
    pairs = [(each, each) for each in (window, stride, padding, dilation)]
    return ConvBNAct(n, h, w, c, k, *pairs, 1, "fp16", residual=False)


#: What the kernels written by hand are run on if they are emulated; tests/emulator/ has their cases.
FEW = [shape(1, 8, 1, 1, 8), shape(1, 72, 3, 5, 24, window=3, stride=2, padding=1)]

# Pixels: one, an odd number of tiles of 128 with one pixel in the last, a whole number of tiles. Channels: fewer than
# a step of the product, none that fill a tile, and more than one tile of outputs.
MANY = [
    shape(1, 8, 1, 1, 8),
    shape(1, 72, 3, 43, 72),
    shape(1, 8, 1, 257, 136),
    shape(2, 64, 16, 8, 128),
    shape(1, 72, 9, 17, 72, window=3, stride=2, padding=1),
    shape(2, 8, 12, 11, 136, window=3, padding=1),
    shape(1, 16, 13, 12, 64, window=3, padding=2, dilation=2),
    shape(1, 16, 15, 14, 24, window=1, stride=2),
]
TRIED = MANY if DEVICE == "cuda" else FEW


def gpu() -> gpus.GPU:
    return triton.gpu_of(torch.device("cuda")) if DEVICE == "cuda" else gpus.known("h100")


def example(shape: ConvBNAct, dtype: torch.dtype, residual: bool) -> tuple[ConvBNAct, dict[str, Any]]:
    """The problem and arguments of the op for it, all on the CPU."""
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "tf32"}[dtype]
    problem = replace(shape, precision=precision, residual=residual)
    generator = torch.Generator().manual_seed(shape.c + shape.k)
    given = ALL["conv_bn_act"].example(problem, torch.device("cpu"), generator)
    return problem, as_multiplied(given._asdict(), "x", "weight")


def launch(name: str, problem: ConvBNAct, given: dict[str, Any]) -> Tensor:
    a = Arguments(**{key: t.to(DEVICE) if isinstance(t, Tensor) else t for key, t in given.items()})
    out, form = ALL["conv_bn_act"].empty(a), ("activation", "residual_after_activation")
    cuda.conv_bn_act(name, *a[:5], out, problem, **{key: given[key] for key in form})
    return out.cpu()


def references(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return what torch's layers make of it in the same dtype, and in float64.

    If kernels are emulated, the first takes its convolution from ``conv2d_in_order``, whatever the processor is.
    """
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(F, "conv2d", conv2d_in_order)
        same_dtype = plain(**given)
    return same_dtype, plain(**doubled(given))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", TRIED, ids=str)
def test_every_kernel_obeys_the_error_rule(shape: ConvBNAct, dtype: torch.dtype) -> None:
    with installed():
        for residual, relu, after in (
            (False, True, False),
            (True, True, False),
            (True, True, True),
            (True, False, False),
        ):
            how = {"activation": "relu" if relu else "none", "residual_after_activation": after}
            problem, given = example(shape, dtype, residual)
            same_dtype, exact = references(given | how)
            for kernel in cuda.supporting(problem, gpu())[0]:
                ours = launch(kernel.name, problem, given | how)
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
def test_every_kernel_keeps_nan_and_infinities(shape: ConvBNAct, value: float, where: str) -> None:
    problem, given = example(shape, torch.float16, residual=True)
    spoilt = given[where].contiguous()
    spoilt.view(-1)[spoilt.numel() // 2] = value
    given[where] = spoilt.contiguous(memory_format=torch.channels_last) if spoilt.dim() == 4 else spoilt
    with installed():
        for after in (False, True):
            how = {"residual_after_activation": after}
            same_dtype, exact = references(given | how)
            for kernel in cuda.supporting(problem, gpu())[0]:
                ours = launch(kernel.name, problem, given | how)
                assert_obeys_error_rule(ours, same_dtype, exact, f"{kernel.name} {value} in {where}, after {after}")
