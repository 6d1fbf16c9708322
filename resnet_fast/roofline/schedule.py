"""Schedules: a network as the launches it is cut into, with what each must move and compute, and their totals.

Arithmetic on shapes alone: no graph is walked here, no kernel is known and nothing is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from resnet_fast._dtypes import ITEMSIZE
from resnet_fast.kernels.gpus import GPU
from resnet_fast.kernels.problems import BottleneckTail

from .cost import Work

LAUNCH = 1e-6
"""Seconds that one launch more costs when schedules are compared. No floor includes it."""

PIXELS = 64
"""Output pixels that a fused block holds at the least: the rows of Hopper's smallest matrix instruction."""

Seconds = Mapping[frozenset[str], float]
"""Measured seconds of a launch, by the layers in it (``Kernel.parts``)."""


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: of the first layer it computes. parts: all the fused ops that went into it, by name.
        op: what it is: a fused op's name, or a plain layer's kind.
        shape: of its (first) output.
        work: what it must move and compute for the whole batch.
        precision: how it multiplies, if not as the rest of its schedule.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    work: Work
    parts: tuple[str, ...] = ()
    precision: str = ""

    def bound(self, gpu: GPU, precision: str) -> str:
        """``bytes`` or ``math``: which of the two its floor is."""
        return "bytes" if self.work.bytes / gpu.bandwidth >= self.math(gpu, precision) else "math"

    def math(self, gpu: GPU, precision: str) -> float:
        """Seconds that its products take."""
        return self.work.flops / gpu.rate(self.precision or precision)

    def floor(self, gpu: GPU, precision: str) -> float:
        """Seconds that it takes at least, in a schedule of this precision."""
        return self.work.floor(gpu, self.precision or precision)

    def as_dict(self, gpu: GPU, precision: str, measured: Seconds | None) -> dict[str, Any]:
        """Plain values, the times in seconds of a launch."""
        return {
            "layer": self.name,
            "op": self.op,
            "parts": list(self.parts or (self.name,)),
            "shape": list(self.shape),
            **asdict(self.work),
            "bytes_seconds": self.work.bytes / gpu.bandwidth,
            "math_seconds": self.math(gpu, precision),
            "floor_seconds": self.floor(gpu, precision),
            "bound": self.bound(gpu, precision),
            "measured_seconds": None if measured is None else measured.get(frozenset(self.parts)),
        }


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
        """Return the sums for one image on ``gpu``."""
        work, batch = self.work, self.batch
        floor = sum(kernel.floor(gpu, precision) for kernel in self.kernels)
        return Totals(
            launches=len(self.kernels),
            bytes=work.bytes / batch,
            activations=work.activations / batch,
            flops=work.flops / batch,
            bytes_seconds=work.bytes / gpu.bandwidth / batch,
            math_seconds=sum(kernel.math(gpu, precision) for kernel in self.kernels) / batch,
            floor_seconds=floor / batch,
            images_per_second=batch / floor,
        )

    def as_dict(self, gpu: GPU, precision: str, measured: Seconds | None) -> dict[str, Any]:
        """Plain values: the sums for one image, and a row for each launch."""
        return {
            "name": self.name,
            "per_image": asdict(self.totals(gpu, precision)),
            "rows": [kernel.as_dict(gpu, precision, measured) for kernel in self.kernels],
        }


def fits_on_chip(gpu: GPU) -> Callable[[BottleneckTail], bool]:
    """Return whether the 3x3's result and the next 1x1's for ``PIXELS`` pixels fit into a block's shared memory."""

    def feasible(problem: BottleneckTail) -> bool:
        item = ITEMSIZE[problem.precision]
        return PIXELS * (problem.mid + problem.following) * item <= gpu.shared_memory

    return feasible
