"""The error rule of the project, as an assertion with tests of its own (test_numerics.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number of ``dtype``: the relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def assert_obeys_error_rule(ours: Tensor, same_dtype: Tensor, exact: Tensor, what: str = "result") -> None:
    """``|ours - exact| <= 2 |same_dtype - exact| + one rounding of ours' dtype``, in the 2-norm over all elements.

    Args:
        ours: the tested result. same_dtype: plain torch's in the same dtype. exact: a float64 reference.

    Shape and dtype must be those of ``same_dtype``; NaN and infinities must stand exactly if it has them.
    """
    assert_obeys_error_rule_in_the_median([(ours, same_dtype, exact)], what)


def assert_obeys_error_rule_in_the_median(draws: Sequence[tuple[Tensor, Tensor, Tensor]], what: str = "result") -> None:
    """The error rule by the median of error / allowed error over an odd number of independent draws.

    Each draw is ours, same_dtype and exact, as above. For what many layers make of a rounding error: a choice of a
    maximum that falls the other way in one of the networks, or same_dtype's errors that happen to cancel, decide the
    one ratio; what is wrong is wrong in every draw.
    """
    assert len(draws) % 2 == 1
    pairs = sorted((_errors(*draw, what) for draw in draws), key=lambda pair: pair[0] / max(pair[1], 1e-300))
    error, allowed = pairs[len(pairs) // 2]
    assert error <= allowed, f"{what}: error {error:.3e} is above the allowed {allowed:.3e}"


def _errors(ours: Tensor, same_dtype: Tensor, exact: Tensor, what: str) -> tuple[float, float]:
    """The error and the allowed error, after checking shape, dtype and all that is no finite number."""
    assert ours.shape == same_dtype.shape == exact.shape, (what, ours.shape, same_dtype.shape, exact.shape)
    assert ours.dtype is same_dtype.dtype, (what, ours.dtype, same_dtype.dtype)
    assert exact.dtype is torch.float64
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = (test(ours) != test(same_dtype)).sum().item()
        assert differs == 0, f"{what}: {name} differs from torch in {differs} of {ours.numel()} places"
    finite = torch.isfinite(same_dtype) & torch.isfinite(exact)
    a, b, e = ours[finite].double(), same_dtype[finite].double(), exact[finite]
    return (a - e).norm().item(), 2 * (b - e).norm().item() + unit_roundoff(ours.dtype) * e.norm().item()


def conv2d_in_order(
    x: Tensor,
    weight: Tensor,
    bias: None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Compute conv2d as a GPU does: one float32 sum for each output, product after product, rounded once to x's dtype.

    A reference for emulated kernels, because torch's convolution on a CPU depends on the processor: some sum in as many
    parts as a vector has places, leave out products of NaN with padding, or, in bfloat16 on AMX, multiply memory that
    nobody wrote by zeros (images one pixel wide become NaN).
    """
    if groups > 1:
        parts = zip(x.chunk(groups, 1), weight.chunk(groups), strict=True)
        return torch.cat([conv2d_in_order(*part, bias, stride, padding, dilation) for part in parts], 1)
    columns = F.unfold(x.float(), weight.shape[2:], dilation, padding, stride)
    total = torch.zeros(x.shape[0], weight.shape[0], columns.shape[2])
    for i, factors in enumerate(weight.float().flatten(1).unbind(1)):
        total = total + factors[:, None] * columns[:, None, i]
    p, q = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return total.unflatten(2, (p, q)).to(x.dtype).contiguous(memory_format=torch.channels_last)
