"""Schedules: a network as the launches it is cut into, with what each must move and compute, and their totals.

Arithmetic on shapes alone: no graph is walked here, no kernel is known and nothing is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resnet_fast.kernels.gpus import GPU

from . import cost
from .cost import Work

ITEMSIZE = {"fp16": 2, "bf16": 2, "tf32": 4, "fp32": 4}
"""Bytes of a stored number by precision; tf32 is float32 that the matrix units round."""

LAUNCH = 1e-6
"""Seconds that one launch more costs when schedules are compared. No floor includes it."""

PIXELS = 64
"""Output pixels that a fused block holds at the least: the rows of Hopper's smallest matrix instruction."""

Feasible = Callable[[int, int | None, str], bool]
"""Whether a fused block may be formed, of (its inner channels, the next 1x1's or None, precision)."""


@dataclass(frozen=True)
class Conv:
    """A ``conv_bn_act`` from [n, c, *size] to [n, k, *output], and the names of the kernels whose results it reads."""

    source: str
    residual: str | None
    n: int
    c: int
    size: tuple[int, int]
    k: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    output: tuple[int, int]
    groups: int
    activation: str
    residual_after_activation: bool = False

    def work(self, precision: str) -> Work:
        """Its bytes and flops; the residual is read, the output written once."""
        return cost.conv(
            self.n, self.c, self.size, self.k, self.kernel, self.stride, self.output,
            groups=self.groups, residual=self.residual is not None, itemsize=ITEMSIZE[precision],
        )  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: of the first layer it computes. parts: all the fused ops that went into it, by name.
        op: what it is: a fused op's name, or a plain layer's kind.
        shape: of its (first) output.
        work: what it must move and compute for the whole batch.
        conv: the convolution, where it is a single one.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    work: Work
    conv: Conv | None = None
    parts: tuple[str, ...] = ()

    def bound(self, gpu: GPU, precision: str) -> str:
        """``bytes`` or ``math``: which of the two its floor is."""
        return "bytes" if self.work.bytes / gpu.bandwidth >= self.work.flops / gpu.flops[precision] else "math"


@dataclass(frozen=True)
class Totals:
    """A schedule's sums, each for one image.

    Attributes:
        launches: kernels of one forward.
        bytes, activations: moved in all, and without the weights. flops: computed.
        bytes_seconds: if nothing but the bytes cost time; math_seconds: nothing but the flops.
        floor_seconds: the sum over the kernels of the longer of the two.
        images_per_second: what the floor allows at most.
    """

    launches: int
    bytes: float
    activations: float
    flops: float
    bytes_seconds: float
    math_seconds: float
    floor_seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Schedule:
    """The launches of one forward of ``batch`` images, in order."""

    name: str
    batch: int
    kernels: tuple[Kernel, ...]

    @property
    def work(self) -> Work:
        return sum((kernel.work for kernel in self.kernels), Work(0, 0, 0))

    def totals(self, gpu: GPU, precision: str) -> Totals:
        """The sums for one image on ``gpu``."""
        work, batch = self.work, self.batch
        floor = sum(kernel.work.floor(gpu, precision) for kernel in self.kernels)
        return Totals(
            launches=len(self.kernels),
            bytes=work.bytes / batch,
            activations=work.activations / batch,
            flops=work.flops / batch,
            bytes_seconds=work.bytes / gpu.bandwidth / batch,
            math_seconds=work.flops / gpu.flops[precision] / batch,
            floor_seconds=floor / batch,
            images_per_second=batch / floor,
        )


def fits_on_chip(gpu: GPU) -> Feasible:
    """Blocks whose 3x3 result and next 1x1 result for ``PIXELS`` pixels fit into one thread block's shared memory."""

    def feasible(mid: int, following: int | None, precision: str) -> bool:
        return PIXELS * (mid + (following or 0)) * ITEMSIZE[precision] <= gpu.shared_memory

    return feasible


def rotated(per_conv: Schedule, gpu: GPU, precision: str, feasible: Feasible | None = None) -> Schedule:
    """``per_conv`` with bottlenecks fused from their 3x3 on: expansion, residual or projection, the next block's 1x1.

    Block by block the cheapest of {as it is, fused, fused with the next 1x1} is taken: least sum of floors plus
    ``LAUNCH`` for each kernel.

    Args:
        feasible: which blocks may be fused; None: ``fits_on_chip(gpu)``.
    """
    allowed = fits_on_chip(gpu) if feasible is None else feasible
    made = {kernel.name: kernel for kernel in per_conv.kernels}
    readers: dict[str, list[Kernel]] = {}
    for kernel in per_conv.kernels:
        if kernel.conv is not None:
            for name in {kernel.conv.source, kernel.conv.residual} - {None}:
                readers.setdefault(str(name), []).append(kernel)

    replaced: dict[str, Kernel | None] = {}
    for kernel in per_conv.kernels:
        block = _block(kernel, made, readers)
        if block is None:
            continue
        spatial, projection, following = block
        alone = tuple(part for part in (spatial, projection, kernel) if part is not None)
        candidates: list[tuple[Kernel, ...]] = [alone]
        mid = _conv(spatial).k
        if allowed(mid, None, precision):
            candidates.append((_tail(spatial, projection, kernel, None, precision),))
        if following is not None:
            candidates = [(*candidate, following) for candidate in candidates]
            if allowed(mid, _conv(following).k, precision):
                candidates.append((_tail(spatial, projection, kernel, following, precision),))
        best = min(candidates, key=lambda kernels: _seconds(kernels, gpu, precision))
        if best[0].op != "bottleneck_tail":
            continue
        # In the expansion's place: its residual has been computed by then, and nobody has read its result yet.
        replaced |= dict.fromkeys(best[0].parts)
        replaced[kernel.name] = best[0]
    kept = (replaced.get(kernel.name, kernel) for kernel in per_conv.kernels)
    return Schedule("rotated", per_conv.batch, tuple(kernel for kernel in kept if kernel is not None))


def _conv(kernel: Kernel) -> Conv:
    assert kernel.conv is not None
    return kernel.conv


def _seconds(kernels: Sequence[Kernel], gpu: GPU, precision: str) -> float:
    return sum(kernel.work.floor(gpu, precision) + LAUNCH for kernel in kernels)


def _block(
    expand: Kernel, made: dict[str, Kernel], readers: dict[str, list[Kernel]]
) -> tuple[Kernel, Kernel | None, Kernel | None] | None:
    """The 3x3 before the expansion ``expand``, the projection beside it and the 1x1 behind it; None if it is none."""
    conv = expand.conv
    if conv is None or conv.residual is None or conv.residual_after_activation or not _pointwise(conv, "relu"):
        return None
    if conv.stride != (1, 1):
        return None
    spatial = made.get(conv.source)
    if spatial is None or spatial.conv is None or readers[spatial.name] != [expand] or not _spatial(spatial.conv):
        return None
    shortcut = made.get(conv.residual)
    projection = None
    if shortcut is not None and readers[shortcut.name] == [expand] and _projection(shortcut.conv):
        projection = shortcut
    behind = [
        reader
        for reader in readers.get(expand.name, [])
        if reader.conv is not None
        and reader.conv.source == expand.name
        and reader.conv.residual is None
        and reader.conv.stride == (1, 1)
        and _pointwise(reader.conv, "relu")
    ]
    return spatial, projection, behind[0] if len(behind) == 1 else None


def _pointwise(conv: Conv, activation: str) -> bool:
    plain = conv.kernel == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    return plain and conv.activation == activation


def _projection(conv: Conv | None) -> bool:
    return conv is not None and conv.residual is None and _pointwise(conv, "none")


def _spatial(conv: Conv) -> bool:
    """A plain 3x3 that keeps the number of channels."""
    window = (conv.kernel, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1))
    return window and conv.groups == 1 and conv.c == conv.k and conv.activation == "relu" and conv.residual is None


def _tail(
    spatial: Kernel, projection: Kernel | None, expand: Kernel, following: Kernel | None, precision: str
) -> Kernel:
    first, last = _conv(spatial), _conv(expand)
    shortcut = None
    if projection is not None:
        beside = _conv(projection)
        shortcut = (beside.c, beside.size, beside.stride)
    work = cost.bottleneck_tail(
        first.n, first.k, first.size, last.k, first.stride, first.output, shortcut=shortcut,
        following=None if following is None else _conv(following).k, itemsize=ITEMSIZE[precision],
    )  # fmt: skip
    parts = tuple(kernel.name for kernel in (spatial, projection, expand, following) if kernel is not None)
    return Kernel(spatial.name, "bottleneck_tail", expand.shape, work, parts=parts)
