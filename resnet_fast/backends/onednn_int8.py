"""oneDNN's int8 convolutions through torch: the one file that touches torch's private ``torch.ops.onednn`` functions.

An activation is uint8 with one scale and zero point, ``real = scale * (stored - zero_point)``; a weight is int8,
symmetric, with a scale for each output channel. Sums are int32; bias, residual and ReLU are float32, in front of the
one rounding (half to even) to the output's uint8. As in ``onednn.py`` everything is detected at run time: torch has
moved these functions between releases.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .onednn import Window

NAME = "onednn int8"


class Affine(NamedTuple):
    """How uint8 stands for real numbers: ``real = scale * (stored - zero_point)``."""

    scale: float
    zero_point: int = 0


class Constants(NamedTuple):
    """What belongs to a convolution beside its packed weight; made by :func:`constants`."""

    scale: Tensor
    zero: Tensor
    bias: Tensor | None
    x: Affine
    window: Window


@functools.cache
def _functions() -> dict[str, Any]:
    """Return the private functions by our own names; raises AttributeError or RuntimeError if torch has none."""
    ops = torch.ops.onednn
    return {
        "pack": ops.qconv_prepack.default,
        "conv": ops.qconv2d_pointwise.default,
        "conv_sum": ops.qconv2d_pointwise.binary,
    }


def unavailable() -> str:
    """Return why oneDNN's int8 convolutions cannot be used in this process, ``""`` if they can."""
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    return _probe()


@functools.cache
def _probe() -> str:
    if not torch.backends.mkldnn.is_available():
        return "this torch build has no oneDNN"
    try:
        with _disable_current_modes(), torch.autocast("cpu", enabled=False), torch.no_grad():
            _verify()
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        first_line = str(error).partition("\n")[0]
        return f"torch {torch.__version__} does not offer oneDNN's int8 convolutions as expected ({first_line})"
    return ""


def _verify() -> None:
    """Raises if a function is missing or gives other numbers than its definition says."""
    generator = torch.Generator("cpu").manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": "cpu"}
    x, residual = (_last(torch.randint(0, 128, (2, 16, 5, 5), dtype=torch.uint8, **options)) for _ in range(2))
    weight = torch.randint(-127, 128, (16, 16, 3, 3), dtype=torch.int8, **options)
    scale = torch.rand(16, **options) + 0.5
    bias = torch.randn(16, **options)
    own, other, out = Affine(0.25, 3), Affine(16.0, 5), Affine(512.0, 60)
    window: Window = ([1, 1], [1, 1], [1, 1], 1)
    real = F.conv2d((x.double() - 3) * 0.25, weight.double() * scale.double().view(-1, 1, 1, 1), bias.double(), 1, 1)
    total = (real + 16.0 * (residual.double() - 5)).relu()
    of = constants(scale, bias, own, window)
    packed = pack(weight, of, x.shape)
    found = {
        "convolution": (conv(x, packed, of, out, relu=False), (real / 512.0).round() + 60),
        "convolution in float": (conv(x, packed, of, None, relu=True), real.relu()),
        "sum": (conv_sum_(residual.clone(), other, x, packed, of, out, relu=True), (total / 512.0).round() + 60),
        "sum in float": (conv_sum_(residual.float(), None, x, packed, of, None, relu=False), real + residual.double()),
    }
    for name, (actual, wanted) in found.items():
        exact = wanted.clamp(0, 255) if actual.dtype is torch.uint8 else wanted
        if actual.shape != exact.shape or not torch.allclose(actual.double(), exact, rtol=1e-4, atol=1e-2):
            raise RuntimeError(f"the {name} gives wrong numbers")


@functools.cache
def saturates() -> bool:
    """Return whether sums of two products of uint8 and int8 are clipped to int16 here.

    Without VNNI instructions x86 adds such pairs in 16 bits (``vpmaddubsw``), and 2 * 255 * 127 does not fit, with
    activations up to 127 it does. It is tried rather than read from the processor's flags: ``ONEDNN_MAX_CPU_ISA``
    hides instructions, and other processors have others.
    """
    with _disable_current_modes(), torch.autocast("cpu", enabled=False), torch.no_grad():
        for kernel in (1, 3):
            x = _last(torch.full((1, 64, 8, 8), 255, dtype=torch.uint8, device="cpu"))
            weight = torch.full((64, 64, kernel, kernel), 127, dtype=torch.int8, device="cpu")
            window: Window = ([0, 0], [1, 1], [1, 1], 1)
            of = constants(torch.ones(64, device="cpu"), None, Affine(1.0), window)
            packed = pack(weight, of, x.shape)
            exact = 255.0 * 127.0 * 64 * kernel**2
            if not torch.allclose(conv(x, packed, of, None, relu=False), torch.tensor(exact, device="cpu"), rtol=1e-5):
                return True
    return False


def constants(scale: Tensor, bias: Tensor | None, x: Affine, window: Window) -> Constants:
    """Return a convolution's constants.

    Args:
        scale: of the weight, float32 [K]. bias: float32 [K] or None.
        x: how the input is stored. window: padding, stride, dilation, groups.
    """
    return Constants(scale, torch.zeros(len(scale), dtype=torch.int64, device="cpu"), bias, x, window)


def pack(weight: Tensor, of: Constants, input_size: Sequence[int]) -> Tensor:
    """Return ``weight``, int8 [K, C/groups, R, S], in the blocked layout that oneDNN prefers for inputs of this size.

    For others it gives the same numbers, up to 20 times as slowly: oneDNN then packs it again at each call.
    """
    padding, stride, dilation, groups = of.window
    packed: Tensor = _functions()["pack"](weight, of.scale, *of.x, stride, padding, dilation, groups, list(input_size))
    return packed


def conv(x: Tensor, packed: Tensor, of: Constants, out: Affine | None, *, relu: bool) -> Tensor:
    """``conv(x, w) + bias``, with ReLU if ``relu``: uint8 stored as ``out`` says, float32 if that is None.

    ``x`` is uint8, channels_last, and so is the result.
    """
    padding, stride, dilation, groups = of.window
    scale, zero, dtype = (1.0, 0, torch.float32) if out is None else (*out, torch.uint8)
    y: Tensor = _functions()["conv"](
        x, *of.x, packed, of.scale, of.zero, of.bias, stride, padding, dilation, groups,
        scale, zero, dtype, "relu" if relu else "none", [], "",
    )  # fmt: skip
    return y


def conv_sum_(
    residual: Tensor, stored: Affine | None, x: Tensor, packed: Tensor, of: Constants, out: Affine | None, *, relu: bool
) -> Tensor:
    """``conv(x, w) + bias + residual``, then ReLU if ``relu``; the residual's memory is written over.

    ``residual`` has the result's shape and dtype: uint8 as ``stored`` says, float32 if ``stored`` and ``out`` are None.
    """
    padding, stride, dilation, groups = of.window
    scale, zero, dtype = (1.0, 0, torch.float32) if out is None else (*out, torch.uint8)
    y: Tensor = _functions()["conv_sum"](
        x, *of.x, packed, of.scale, of.zero, residual, of.bias, stride, padding, dilation,
        groups, scale, zero, dtype, *(stored or (1.0, 0)), "sum", 1.0, "relu" if relu else None, [], "",
    )  # fmt: skip
    return y


@functools.cache
def _pools() -> bool:
    """Return whether torch has a max-pool for plain uint8 tensors, and it is right."""
    x = _last(torch.arange(2 * 16 * 9 * 9, device="cpu").mul(7919).remainder(256).to(torch.uint8).view(2, 16, 9, 9))
    try:
        with _disable_current_modes(), torch.no_grad():
            found = torch.ops.quantized.max_pool2d(x, [3, 3], [2, 2], [1, 1], [1, 1], False)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    return found.dtype is torch.uint8 and torch.equal(found.float(), F.max_pool2d(x.float(), 3, 2, 1))


def max_pool(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil: bool,
) -> Tensor:
    """``torch.max_pool2d`` of uint8, for which torch's own (whose indices are uint8 too) takes small images only."""
    if x.is_cpu and x.numel() and _pools():
        y: Tensor = torch.ops.quantized.max_pool2d(x, kernel, stride, padding, dilation, ceil)
        return y
    return torch.max_pool2d(x.float(), kernel, stride, padding, dilation, ceil).to(torch.uint8)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
