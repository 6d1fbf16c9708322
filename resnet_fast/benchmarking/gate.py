"""The correctness gate: a contestant whose answers break the error rule is reported, and never timed.

The rule, for every dtype: ``|answer - exact| <= 2 * |plain torch at the same dtype - exact| + one rounding``, in the
Euclidean norm, where ``exact`` comes from float64. It is not a tolerance that somebody chose.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """What the gate found. ``error``, ``allowed`` and ``torch``, plain torch's own error, are relative to the norm of
    the exact answer; ``reason`` is empty when the contestant passed."""

    error: float
    allowed: float
    largest: float
    reason: str = ""
    torch: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.reason

    @property
    def times_torch(self) -> float:
        """The error as a multiple of plain torch's own; infinite if torch's answer is exact and this one is not."""
        if self.torch == 0:
            return float("inf") if self.error else 1.0
        return self.error / self.torch

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "times_torch": self.times_torch}


def judge(answer: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> Verdict:
    """Judges ``answer`` by the error rule.

    ``plain`` is what plain torch layers answer at ``dtype``, ``exact`` the float64 answer; all three have the same
    shape. Raises ValueError where ``exact`` is unfit to judge by: empty, not finite, or the same in every element.
    """
    if exact.dtype != torch.float64:
        raise ValueError(f"judge: exact is {exact.dtype}, it must be torch.float64")
    if exact.numel() == 0 or not bool(torch.isfinite(exact).all()):
        raise ValueError("judge: the exact answer is empty or not finite, nothing can be judged by it")
    if exact.numel() > 1 and float(exact.std()) <= 1e-6 * float(exact.abs().max()):
        raise ValueError("judge: the exact answer is the same in every element, nothing can be judged by it")
    infinite = float("inf")
    if answer.shape != exact.shape:
        return Verdict(infinite, 0.0, infinite, f"answer has shape {tuple(answer.shape)}, not {tuple(exact.shape)}")
    if not bool(torch.isfinite(answer).all()):
        return Verdict(infinite, 0.0, infinite, "answer is not finite")
    norm = float(exact.norm())
    difference = answer.detach().to("cpu", torch.float64) - exact
    error = float(difference.norm()) / norm
    plain_error = float((plain.detach().to("cpu", torch.float64) - exact).norm()) / norm
    allowed = 2 * plain_error + torch.finfo(dtype).eps / 2
    reason = "" if error <= allowed else f"error {error:.3g} is beyond the allowed {allowed:.3g}"
    return Verdict(error, allowed, float(difference.abs().max()), reason, plain_error)
