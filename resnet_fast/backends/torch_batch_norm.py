"""torch's own BatchNorm kernels, told what they need to be as exact as ours: statistics and sums over pixels.

Those for channels_last on a CPU sum each channel in float32, so they are told of more channels and fewer pixels than
there are, and these short sums are merged in float64 (Chan, Golub & LeVeque 1983).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layouts import channels_last

#: Values of a row for torch's CPU statistics, whose sums then fit into a core's cache.
_WIDEST = 32768


def row_count(x: Tensor) -> int:
    """Return how many values a channel has."""
    n, _, h, w = x.shape
    return n * h * w


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, as float64 tensors: plain torch (Welford), any device and dtype."""
    var, mean = torch.var_mean(
        x.to(torch.float64 if x.dtype is torch.float64 else torch.float32), (0, 2, 3), correction=0
    )
    return mean.double(), var.double()


def moments_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`moments`, by torch's CPU kernels.

    That for channels_last sums each channel in float32, so it is told of more channels and fewer pixels than there are,
    and these short sums are merged in float64 (Chan, Golub & LeVeque 1983). Where a mean is many deviations from 0,
    whose digits float32 sums would lose, they are taken a second time of the differences from that mean.
    """
    if x.dtype is torch.float64:
        return moments(x)
    x = channels_last(x)
    mean, var = _merged(x, None)
    if bool((mean.square() > 64 * var).any()):
        far = mean.to(torch.float32)
        difference, var = _merged(x, far)
        mean = far.double() + difference
    return mean, var


def _side_by_side(x: Tensor) -> list[tuple[int, int, int]]:
    """Return how to cut the pixels of an image stored channels_last: (first, last + 1, how many next to each other).

    Memory that holds [pixels, C] is also [pixels / n, n * C]: torch's float32 sums over its rows are n times shorter.
    """
    rows, channels = row_count(x), x.shape[1]
    most = min(_WIDEST // channels, rows // 32)
    times = 1 << (most.bit_length() - 1) if most else 1
    even = rows - rows % times
    return [(0, even, times)] + ([(even, rows, 1)] if even < rows else [])


def _rows_of(x: Tensor, first: int, end: int, times: int) -> Tensor:
    """Those pixels as an image of ``times * C`` channels, a view of x's memory."""
    matrix = x.permute(0, 2, 3, 1).reshape(row_count(x), x.shape[1])[first:end]
    return matrix.reshape(1, (end - first) // times, 1, times * x.shape[1]).permute(0, 3, 1, 2)


def _merged(x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance in float64 of ``x - shift``, for x stored channels_last."""
    rows, channels = row_count(x), x.shape[1]
    means, variances, counts = [], [], []
    for first, end, times in _side_by_side(x):
        image = _rows_of(x, first, end, times)
        if shift is not None:
            image = image - shift.repeat(times).view(1, -1, 1, 1)
        running = (None, None)
        if x.dtype is not torch.float32:  # running statistics in float32 make it give its results in that too
            running = tuple(torch.zeros(2, times * channels))
        mean, variance = torch.batch_norm_update_stats(image, *running, 0.0)
        means.append(mean.double().view(times, channels))
        variances.append(variance.double().view(times, channels))
        counts += [(end - first) // times] * times
    weights = torch.tensor(counts, dtype=torch.float64).view(-1, 1) / rows
    each = torch.cat(means)
    mean = (each * weights).sum(0)
    return mean, ((torch.cat(variances) + (each - mean).square()) * weights).sum(0)


def variance_of(invstd: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what torch's kernels, which take a variance and eps, are to be given with eps = 0."""
    return invstd.double().square().reciprocal().to(dtype)


def sums_of(g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over pixels of g and of g * xhat, by torch's CPU kernel for constant statistics, cut as for the statistics.

    Those that the gradient of x takes inside are not cut: divided by the number of pixels their errors are small there.
    """
    if x.device.type != "cpu" or x.dtype is torch.float64:
        pieces = [(0, row_count(x), 1)]
    else:
        pieces = _side_by_side(x)
    var, channels = variance_of(invstd, mean.dtype), x.shape[1]
    total = torch.zeros(2, channels, dtype=torch.float64, device=x.device)
    for first, end, times in pieces:
        vectors = (torch.ones_like(mean), mean, var)
        gamma, centre, variance = (vector.repeat(times) for vector in vectors)
        _, sum_grad_xhat, sum_grad = torch.ops.aten.native_batch_norm_backward.default(
            _rows_of(g, first, end, times), _rows_of(x, first, end, times), gamma, centre, variance, None, None, False,
            0.0, [False, True, True],
        )  # fmt: skip
        total += torch.stack([sum_grad, sum_grad_xhat]).double().view(2, times, channels).sum(1)
    both = total.to(mean.dtype)
    return both[0].clone(), both[1].clone()
