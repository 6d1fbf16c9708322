"""The error rule of the project, as an assertion with tests of its own (test_numerics.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
