"""Which compiled CUDA kernel computes a problem, and whether it was measured to be faster than Triton's.

Pure functions of the problem, the GPU and the list of kernels; the kernels themselves are in csrc/, and what each one
cannot compute only the compiled module knows (``resnet_fast.backends.cuda`` asks it). No import of triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import _tables
from ._launch import cdiv
from .gpus import GPU
from .problems import ConvBNAct

#: What an output tile costs beside its multiply-adds, in elements for each of its rows and columns: the operands come
#: from the level-2 cache once for each tile, so that of equally many elements the squarest tile has the least of it.
_EDGE = 32


@dataclass(frozen=True)
class Kernel:
    """One compiled convolution kernel, as the module lists it.

    Attributes:
        name: unique in the module. algorithm: "implicit_gemm", "cutlass_conv" or "cutlass_gemm".
        least_capability, most_capability: GPUs it runs on, as 80 and 90.
        precision: as in ``gpus.PRECISIONS``.
        block_m, block_n, block_k: pixels, output channels, and values of a step through the product.
        stages, threads, shared_bytes: of its pipeline, of a block.
    """

    name: str
    algorithm: str
    least_capability: int
    most_capability: int
    precision: str
    block_m: int
    block_n: int
    block_k: int
    stages: int
    threads: int
    shared_bytes: int

    @property
    def masked(self) -> bool:
        """Whether it loads elements one by one, so that it takes any channel count: right, and slow."""
        return "masked" in self.name


@dataclass(frozen=True)
class Config:
    """A launch choice of ``conv_bn_act``: the kernel's name. The other ops have one kernel each."""

    kernel: str


@dataclass(frozen=True)
class Only:
    """The launch choice of an op with one CUDA kernel: there is none to make, only its time to measure."""


def table(op: str) -> str:
    """Return the section of a table that holds the measured CUDA choices of ``op``."""
    return f"{op}.cuda"


def suits(kernel: Kernel, problem: ConvBNAct, gpu: GPU) -> bool:
    """Whether the kernel multiplies as asked and the GPU can run it; shapes and addresses are the module's to judge."""
    runs = kernel.least_capability <= gpu.capability <= kernel.most_capability
    return runs and kernel.precision == problem.precision and kernel.shared_bytes <= gpu.shared_memory


def heuristic(problem: ConvBNAct, gpu: GPU, kernels: Sequence[Kernel]) -> Kernel | None:
    """Return the choice from the shape alone among ``kernels``, which all compute the problem; None if there are none.

    Kernels made for Hopper first (the plain product for 1x1, the convolution for the rest), then those that load
    vectors, then those that load elements. Among equals the tile whose whole launch is estimated to take least: the
    largest that keeps all multiprocessors busy.
    """
    pointwise = problem.kernel == (1, 1) and problem.stride == (1, 1) and problem.padding == (0, 0)
    order = ("cutlass_gemm", "cutlass_conv") if pointwise else ("cutlass_conv", "cutlass_gemm")

    def rank(kernel: Kernel) -> tuple[int, int, int, str]:
        kind = order.index(kernel.algorithm) if kernel.algorithm in order else len(order) + kernel.masked
        return kind, _estimate(kernel, problem, gpu), -kernel.block_m * kernel.block_n * kernel.stages, kernel.name

    return min(kernels, key=rank, default=None)


def _estimate(kernel: Kernel, problem: ConvBNAct, gpu: GPU) -> int:
    """Time in arbitrary units: how many tiles the busiest multiprocessor computes, times what a tile costs."""
    tiles = cdiv(problem.pixels, kernel.block_m) * cdiv(problem.k // problem.groups, kernel.block_n) * problem.groups
    tile = kernel.block_m * kernel.block_n + _EDGE * (kernel.block_m + kernel.block_n)
    return cdiv(tiles, gpu.multiprocessors) * tile


def measured(op: str, problem: Any, gpu: GPU) -> str:
    """The kernel that was measured fastest among the CUDA ones, the op's name if it has only one; "" if none was."""
    if op == "conv_bn_act":
        choice = _tables.measured(table(op), problem.key(), gpu.name, Config)
        return "" if choice is None else choice.kernel
    return "" if _tables.lookup(table(op), problem.key(), gpu.name) is None else op


def faster(op: str, problem: Any, gpu: GPU) -> bool:
    """Whether a table says that the CUDA kernel takes less time than Triton's; False where one of them is not known."""
    ours = _tables.milliseconds(table(op), problem.key(), gpu.name)
    tritons = _tables.milliseconds(op, problem.key(), gpu.name)
    return ours is not None and tritons is not None and ours < tritons


def candidates(problem: ConvBNAct, gpu: GPU, kernels: Sequence[Kernel]) -> Iterator[Config]:
    """Every choice worth measuring among ``kernels``, which all compute the problem; elements only if nothing else.

    The likely ones first, so that little is lost where time runs out.
    """
    vectors = [kernel for kernel in kernels if not kernel.masked] or list(kernels)
    while vectors:
        first = heuristic(problem, gpu, vectors)
        assert first is not None
        vectors.remove(first)
        yield Config(first.name)
