"""The assertion that the parity tests lean on must itself be able to fail."""

from __future__ import annotations

import pytest
import torch

from tests.numerics import assert_obeys_error_rule, assert_obeys_error_rule_in_the_median, unit_roundoff


def _case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    exact = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return exact.to(dtype), exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding_passes_and_ten_fail(dtype: torch.dtype) -> None:
    rounded, exact = _case(dtype)
    assert_obeys_error_rule(rounded, rounded, exact)
    off = (exact * (1 + 10 * unit_roundoff(dtype))).to(dtype)
    with pytest.raises(AssertionError, match="above the allowed"):
        assert_obeys_error_rule(off, rounded, exact)


def test_a_dropped_nan_or_infinity_fails() -> None:
    rounded, exact = _case(torch.float32)
    for value in (float("nan"), float("inf"), float("-inf")):
        poisoned = rounded.clone()
        poisoned[3] = value
        with pytest.raises(AssertionError, match="differs from torch in 1"):
            assert_obeys_error_rule(rounded, poisoned, exact)
        assert_obeys_error_rule(poisoned, poisoned, exact)


def test_wrong_dtype_and_shape_fail() -> None:
    rounded, exact = _case(torch.float32)
    with pytest.raises(AssertionError):
        assert_obeys_error_rule(rounded.double(), rounded, exact)
    with pytest.raises(AssertionError):
        assert_obeys_error_rule(rounded[None], rounded, exact)


def test_the_median_forgives_one_draw_of_three_and_no_nan() -> None:
    rounded, exact = _case(torch.float32)
    off = (exact * (1 + 10 * unit_roundoff(torch.float32))).float()
    right, wrong = (rounded, rounded, exact), (off, rounded, exact)
    assert_obeys_error_rule_in_the_median([right, wrong, right])
    assert_obeys_error_rule_in_the_median([wrong, (off, off, exact), (off, off, exact)])
    for draws in ([wrong, wrong, right], [wrong, wrong, (off, off, exact)]):
        with pytest.raises(AssertionError, match="above the allowed"):
            assert_obeys_error_rule_in_the_median(draws)
    lost = rounded.clone()
    lost[3] = torch.nan
    with pytest.raises(AssertionError, match="differs from torch in 1"):
        assert_obeys_error_rule_in_the_median([right, right, (lost, rounded, exact)])
