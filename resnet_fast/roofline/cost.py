"""Bytes and floating point operations of each fused op: the two numbers under every floor.

Each input is read once, each output written once, intermediates of one op move nothing. No GPU, no graph: ``work``
takes what a kernel is asked to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resnet_fast._dtypes import ITEMSIZE
from resnet_fast.kernels import problems
from resnet_fast.kernels.gpus import GPU
from resnet_fast.kernels.problems import Problem

_PASSES = {"statistics": (1, 4), "apply": (2, 5), "reduce": (2, 5), "backward": (3, 6)}
"""Of a step of ``batch_norm_act``: passes over x's memory, and operations for each element."""


@dataclass(frozen=True)
class Work:
    """What an op must move and compute.

    Attributes:
        activations: bytes of inputs read and outputs written.
        weights: bytes of constants read, once per launch whatever the batch.
        flops: floating point operations, a multiply-add counted as two.
    """

    activations: int
    weights: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.activations + self.weights

    def __add__(self, other: Work) -> Work:
        return Work(self.activations + other.activations, self.weights + other.weights, self.flops + other.flops)

    def floor(self, gpu: GPU, precision: str) -> float:
        """Seconds that one launch takes at least: moving the bytes or computing, whichever is longer."""
        return max(self.bytes / gpu.bandwidth, self.flops / gpu.rate(precision))


def work(problem: Problem, itemsize: int | None = None) -> Work:
    """Return what a kernel must move and compute for its problem.

    Args:
        itemsize: bytes of a stored number; None: those of the problem's precision.
    """
    item = ITEMSIZE[problem.precision] if itemsize is None else itemsize
    if isinstance(problem, problems.AddAct):
        return add_act(problem.length, itemsize=item)
    if isinstance(problem, problems.BatchNormAct):
        passes, flops = _PASSES[problem.step]
        elements = problem.rows * problem.c
        return Work((passes + problem.relu + problem.residual) * elements * item, 0, flops * elements)
    n, size = problem.n, (problem.h, problem.w)
    if isinstance(problem, problems.ConvBNAct):
        found = conv(
            n, problem.c, size, problem.k, problem.kernel, problem.stride, problem.output,
            groups=problem.groups, residual=problem.residual, itemsize=item,
        )  # fmt: skip
        if not isinstance(problem, problems.ConvInt8):
            return found
        # Outputs and residuals may be wider than the bytes; each channel has a third number, of 4 bytes.
        wider = (problem.out_itemsize - item) * problem.pixels * problem.k * (2 if problem.residual else 1)
        return Work(found.activations + wider, found.weights + 4 * problem.k, found.flops)
    if isinstance(problem, problems.Stem):
        floats = stem(n, problem.c, size, problem.k, problem.output, itemsize=item)
        saved = n * problem.c * problem.h * problem.w * (item - 1) if problem.uint8 else 0
        return Work(floats.activations - saved, floats.weights, floats.flops)
    if isinstance(problem, problems.Head):
        return head(n, problem.c, size, problem.k, itemsize=item)
    shortcut = None
    if problem.shortcut is not None:
        c, h, w, stride = problem.shortcut
        shortcut = (c, (h, w), (stride, stride))
    return bottleneck_tail(
        n, problem.mid, size, problem.k, (problem.stride,) * 2, problem.output,
        shortcut=shortcut, following=problem.following or None, itemsize=item,
    )  # fmt: skip


def l2_reads(problem: problems.ConvBNAct, block_m: int = 128, block_n: int = 128) -> int:
    """Return the bytes that a convolution's programs read, from the level-2 cache or through it.

    Each reads its pixels at every tap, its channels' weights and its part of the residual. Which tiles a kernel has
    is its own choice; the default is the usual one, which narrow or small problems do not fill.
    """
    columns = problem.k // problem.groups
    tiles = -(-problem.pixels // block_m) * -(-columns // block_n) * problem.groups
    depth = problem.kernel[0] * problem.kernel[1] * problem.c // problem.groups
    residual = problem.pixels * problem.k if problem.residual else 0
    rows = min(block_m, problem.pixels) + min(block_n, columns)
    return (tiles * rows * depth + residual) * ITEMSIZE[problem.precision]


def pixels_read(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], output: Sequence[int]) -> int:
    """Return how many of an image's [H, W] pixels a convolution touches: all of them unless its stride skips some."""
    rows, columns = (
        min(size[i], output[i] * kernel[i] if stride[i] > kernel[i] else size[i]) for i in range(2)
    )  # fmt: skip
    return rows * columns


def conv(
    n: int,
    c: int,
    size: Sequence[int],
    k: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    output: Sequence[int],
    *,
    groups: int = 1,
    residual: bool = False,
    itemsize: int = 2,
) -> Work:
    """``conv_bn_act`` from [N, C, H, W] to [N, K, P, Q]: input, weight, scale and shift, residual, output."""
    out = n * k * output[0] * output[1]
    taps = kernel[0] * kernel[1] * c // groups
    read = n * c * pixels_read(size, kernel, stride, output)
    return Work(
        activations=(read + out * (2 if residual else 1)) * itemsize,
        weights=k * taps * itemsize + 2 * k * 4,
        flops=2 * out * taps,
    )


def stem(n: int, c: int, size: Sequence[int], k: int, output: Sequence[int], *, itemsize: int = 2) -> Work:
    """``stem``: a 7x7 stride 2 convolution whose output, four times the pooled one, is never stored."""
    inner = [(size[i] - 1) // 2 + 1 for i in range(2)]
    work = conv(n, c, size, k, (7, 7), (2, 2), inner, itemsize=itemsize)
    stored = (n * c * size[0] * size[1] + n * k * output[0] * output[1]) * itemsize
    return Work(stored, work.weights, work.flops)


def head(n: int, c: int, size: Sequence[int], k: int, *, itemsize: int = 2) -> Work:
    """``head``: global average pool and a fully connected layer of K outputs."""
    pixels = size[0] * size[1]
    return Work((n * c * pixels + n * k) * itemsize, k * (c + 1) * itemsize, n * c * pixels + 2 * n * c * k)


def add_act(elements: int, *, itemsize: int = 2) -> Work:
    """``add_act`` on that many elements."""
    return Work(3 * elements * itemsize, 0, 2 * elements)


def bottleneck_tail(
    n: int,
    mid: int,
    size: Sequence[int],
    k: int,
    stride: Sequence[int],
    output: Sequence[int],
    *,
    shortcut: tuple[int, Sequence[int], Sequence[int]] | None = None,
    following: int | None = None,
    itemsize: int = 2,
) -> Work:
    """``bottleneck_tail``: 3x3 over [N, mid, H, W], expansion to K channels, residual, and the next block's 1x1.

    Args:
        shortcut: (channels, [H, W], stride) of the projection's input; None for a plain residual.
        following: output channels of the next block's 1x1 convolution; None if it is not part of the op.
    """
    spatial = conv(n, mid, size, mid, (3, 3), stride, output, itemsize=itemsize)
    expand = conv(n, mid, output, k, (1, 1), (1, 1), output, residual=shortcut is None, itemsize=itemsize)
    inside = n * mid * output[0] * output[1] * itemsize  # between the two: written by one, read by the other
    total = spatial + expand
    total = Work(total.activations - 2 * inside, total.weights, total.flops)
    if shortcut is not None:
        channels, source, shortcut_stride = shortcut
        projection = conv(n, channels, source, k, (1, 1), shortcut_stride, output, itemsize=itemsize)
        written = n * k * output[0] * output[1] * itemsize
        total += Work(projection.activations - written, projection.weights, projection.flops)
    if following is not None:
        reduce = conv(n, k, output, following, (1, 1), (1, 1), output, itemsize=itemsize)
        read = n * k * output[0] * output[1] * itemsize
        total += Work(reduce.activations - read, reduce.weights, reduce.flops)
    return total
