"""oneDNN's fused convolutions through torch: the one file that touches torch's private ``torch.ops.mkldnn`` functions.

Everything here is detected at run time and checked once against plain torch on a tiny problem; when a torch release
moves one of these functions, :func:`unavailable` says so and the ops run their reference. No caching, no BN arithmetic.

oneDNN's own ReLU post-op turns NaN into 0 and torch's does not, so ReLU is either torch's in-place ``relu_`` on the
still cached output (``relu=False`` here) or, if the caller has proved that no NaN can appear, the post-op.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

#: Padding, stride, dilation and groups of a convolution, in the order of torch's functions.
Window: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[int], int]


@functools.cache
def _functions() -> dict[str, Any]:
    """Return the private functions by our own names; raises AttributeError or RuntimeError where torch has none."""
    mkldnn = torch.ops.mkldnn
    return {
        "conv": mkldnn._convolution_pointwise.default,
        "conv_sum": mkldnn._convolution_pointwise.binary,
        "conv_sum_": mkldnn._convolution_pointwise_.binary,
        "pack_conv": mkldnn._reorder_convolution_weight.default,
    }


def _probe() -> str:
    """Run each function once on a tiny problem and compare with plain torch: "" if all is well, else what is wrong."""
    if not torch.backends.mkldnn.is_available():
        return "this torch build has no oneDNN"
    try:
        _verify()
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        first_line = str(error).partition("\n")[0]
        return f"torch {torch.__version__} does not offer oneDNN's fused functions as expected ({first_line})"
    return ""


@functools.cache
def _verify() -> None:
    """Raises where a function is missing or wrong; passed once, passed for good. The caller's modes play no part."""
    with _disable_current_modes(), torch.autocast("cpu", enabled=False), torch.no_grad():
        generator = torch.Generator("cpu").manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        x = torch.randn(2, 16, 5, 5, **options).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(16, 16, 1, 1, **options)
        bias = torch.randn(16, **options)
        expected = torch.conv2d(x, weight, bias)
        window: Window = ([0, 0], [1, 1], [1, 1], 1)
        packed = pack_conv(weight, window, list(x.shape))
        results = {
            "convolution": (conv(x, packed, bias, window, relu=False), expected),
            "convolution + ReLU": (conv(x, packed, bias, window, relu=True), expected.relu()),
            "convolution + sum": (conv_sum(x, x, packed, bias, window, relu=False), expected + x),
            "in-place sum": (conv_sum_(x.clone(), x, packed, bias, window, relu=True), (expected + x).relu()),
        }
        for name, (actual, wanted) in results.items():
            if not torch.allclose(actual, wanted, rtol=1e-4, atol=1e-4):
                raise RuntimeError(f"{name} gives wrong numbers")


@functools.cache
def _has_bfloat16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def unavailable() -> str:
    """Return why oneDNN's fused functions cannot be used in this process, or ``""`` if they can."""
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    return _probe()


def unsupported(dtype: torch.dtype) -> str:
    """Return why tensors of this dtype cannot be computed here, or ``""`` if they can. Includes :func:`unavailable`."""
    if dtype is torch.bfloat16 and not _has_bfloat16():
        return "this CPU has no AVX-512, which oneDNN needs for bfloat16"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN's fused convolutions take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return unavailable()


def pack_conv(weight: Tensor, window: Window, input_size: Sequence[int]) -> Tensor:
    """``weight`` [K, C/groups, R, S] in the blocked layout that oneDNN prefers for inputs of ``input_size`` (NCHW)."""
    packed: Tensor = _functions()["pack_conv"](weight, *window, input_size)
    return packed


def conv(x: Tensor, packed: Tensor, bias: Tensor, window: Window, *, relu: bool) -> Tensor:
    """``conv(x, w) + bias``, with oneDNN's NaN-dropping ReLU if ``relu``; ``x`` channels_last."""
    y: Tensor = _functions()["conv"](x, packed, bias, *window, "relu" if relu else "none", [], "")
    return y


def conv_sum(x: Tensor, residual: Tensor, packed: Tensor, bias: Tensor, window: Window, *, relu: bool) -> Tensor:
    """``conv(x, w) + bias + residual`` in a new tensor; ``relu`` as in :func:`conv`."""
    if residual.shape[2] == residual.shape[3] == 1:  # torch 2.11: "could not create a memory"
        return conv_sum_(residual.clone(), x, packed, bias, window, relu=relu)
    act = "relu" if relu else None
    y: Tensor = _functions()["conv_sum"](x, residual, packed, bias, *window, "add", 1.0, act, [], None)
    return y


def conv_sum_(residual: Tensor, x: Tensor, packed: Tensor, bias: Tensor, window: Window, *, relu: bool) -> Tensor:
    """``residual += conv(x, w) + bias`` in place, in one pass; returns it. ``relu`` as in :func:`conv`."""
    act = "relu" if relu else None
    y: Tensor = _functions()["conv_sum_"](residual, x, packed, bias, *window, "add", 1.0, act, [], None)
    return y


#: 32-bit words of oneDNN's memory descriptor that fill up 64 bits behind an int: nobody sets them.
_PADDING = (1, 27, 79, 105)


def layout(packed: Tensor) -> bytes:
    """Return the blocked layout of a packed weight as bytes: equal for weights that are packed alike.

    A wrong word in _PADDING could only cost time: a packed weight carries its layout, and oneDNN obeys that.
    """
    words = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().view("int32").copy()
    words[list(_PADDING)] = 0
    return bytes(words)
