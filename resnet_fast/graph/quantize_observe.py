"""What calibration sees of a value, and the range that is made of it: the one with the least squared error.

A range that holds everything wastes steps on a few outliers, one that clips too much distorts them. Between the two the
sum of both squared errors has a minimum, which is searched over a histogram (R. Krishnamoorthi 2018, arXiv:1806.08342,
and M. Nagel et al. 2021, arXiv:2106.08295, section 3.1, compare such searches with min-max and with percentiles). The
squared error is also what the report's signal-to-noise ratios measure.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from resnet_fast._dtypes import FLOAT8
from resnet_fast.backends.onednn_int8 import Affine
from resnet_fast.nn.pristine import capturing

from .quantize_layers import affine_of, storage

#: Bins of a histogram on each side of 0. Its ends are a power of two at most twice as far out as the data.
_BINS = 2048
#: How many ends of a range are tried on each side: each of these fractions of the largest value.
_FRACTIONS = torch.linspace(0.05, 1.0, 96, dtype=torch.float64)


class Observer(nn.Module):
    """Reads a value of a graph while calibration images run: a histogram, and one image of it as a sample.

    Attributes:
        counts: int64 [2 * _BINS] over -limit to limit. low, high: the extremes. finite: False once a value was not.
        sample: of the first image; None before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.training = False
        self.counts = torch.zeros(2 * _BINS, dtype=torch.int64)
        self.limit = 0.0
        self.low, self.high, self.finite = 0.0, 0.0, True
        self.sample: Tensor | None = None

    def forward(self, x: Tensor) -> None:
        if capturing() or x.is_meta or not x.numel():
            return
        low, high = (float(each) for each in torch.aminmax(x.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            self.finite = False
            return
        if self.sample is None:
            self.sample = x[:1].clone()
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(-low, high))
        if self.limit:
            self.counts += torch.histc(x.float(), 2 * _BINS, -self.limit, self.limit).cpu().to(torch.int64)

    def _widen(self, largest: float) -> None:
        """Let the histogram reach to ``largest``: two bins become one as often as needed."""
        if largest <= self.limit:
            return
        new = 2.0 ** math.ceil(math.log2(largest))
        new = new if new >= largest else 2 * new
        if not self.limit:
            self.limit = new
        while self.limit < new:
            inner = self.counts.view(_BINS, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[_BINS // 2 : _BINS + _BINS // 2] = inner
            self.limit *= 2

    def plain(self, state: dict[str, Tensor], x: Tensor) -> None:
        """Nothing: for shapes."""

    @property
    def seen(self) -> bool:
        return self.sample is not None

    def merged(self, other: Observer) -> Observer:
        """Return what one observer of both values would have seen."""
        found = Observer()
        found.limit = self.limit
        found.counts = self.counts.clone()
        found._widen(other.limit)
        copy = Observer()
        copy.limit, copy.counts = other.limit, other.counts.clone()
        copy._widen(found.limit)
        found.counts += copy.counts
        found.low, found.high = min(self.low, other.low), max(self.high, other.high)
        found.finite = self.finite and other.finite
        found.sample = self.sample
        return found

    def affine(self, largest: int) -> Affine:
        """Return how to store such values in 0 to ``largest``; in float8 by the largest magnitude."""
        low, high = self.low, self.high
        if storage(largest) is FLOAT8:
            return affine_of(low, high if low or high else 1.0, largest)
        if low == high == 0 or not self.limit:
            return affine_of(low, high or 1.0, largest)  # nothing but 0, for which any scale will do
        width = self.limit / _BINS
        centers = (torch.arange(2 * _BINS, dtype=torch.float64) - _BINS + 0.5) * width
        counts = self.counts.double()
        for _ in range(2 if low < 0 < high else 1):  # each end with the other as it is, then both once more
            if high > 0:
                high = _best(self.high * _FRACTIONS, low, counts, centers, largest)
            if low < 0:
                low = -_best(-self.low * _FRACTIONS, -high, counts.flip(0), centers, largest)
        return affine_of(low, high, largest)


def _best(ends: Tensor, other: float, counts: Tensor, centers: Tensor, largest: int) -> float:
    """Return the upper end of the range from ``other`` that has the least squared error."""
    ends, step = ends.view(-1, 1), (ends.view(-1, 1) - min(other, 0.0)) / largest
    clipped = (centers - ends).clamp_min(0).square_()
    rounded = torch.where(centers.abs() < step / 2, centers.square(), step.square() / 12)  # to 0 below half a step
    return float(ends[int(torch.argmin(torch.where(centers > ends, clipped, rounded) @ counts))])
