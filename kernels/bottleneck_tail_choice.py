"""bottleneck_tail's launch choice: what its kernel can compute, and with which tile. It imports no triton.

So a plan for a GPU can be made where triton is not installed. The kernel is in bottleneck_tail.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from . import _tables
from ._launch import ITEMSIZE, cdiv, dividing_power_of_two, power_of_two
from .gpus import GPU
from .problems import BottleneckTail as Problem

NAME = "bottleneck_tail"


@dataclass(frozen=True)
class Config:
    """A launch choice: pixels of a tile, slice of output channels, warps, stages of the two loops, and the form."""

    block_m: int
    block_n: int
    block_c: int
    num_warps: int
    stages: int
    slice_stages: int
    boxes: bool

    def shared_memory(self, problem: Problem) -> int:
        """About the bytes of shared memory a program takes: the operands of the stages of its longer loop."""
        item = ITEMSIZE[problem.precision]
        spatial = (self.block_m + problem.mid) * self.block_c * self.stages
        slices = (problem.mid + problem.following) * self.block_n
        if problem.shortcut is None:
            slices += self.block_m * self.block_n
        return max(spatial, slices * self.slice_stages) * item

    def l2_reads(self, problem: Problem) -> int:
        """Bytes that the programs of a launch read, from the level-2 cache or through it.

        Each program reads all the weights, the 3x3's input once for each tap, and the residual, or the projection's
        input once for each slice.
        """
        mid, k, following = problem.mid, problem.k, problem.following
        weights = 9 * mid * mid + mid * k + k * following
        pixel = 9 * mid
        if problem.shortcut is None:
            pixel += k
        else:
            weights += problem.shortcut[0] * k
            pixel += problem.shortcut[0] * cdiv(k, self.block_n)
        programs = cdiv(problem.pixels, self.block_m)
        return (programs * weights + problem.pixels * pixel) * ITEMSIZE[problem.precision]


def supports(problem: Problem, gpu: GPU) -> bool:
    """Return whether the kernel has a launch for the problem, without spills, and nobody measured that it is slower."""
    return choose(problem, gpu) is not None


def supports_boxes(problem: Problem, gpu: GPU, block_n: int) -> bool:
    """Return whether the form ``boxes`` can compute the problem on the GPU, as far as shapes tell."""
    if gpu.capability < 90 or problem.k % block_n:
        return False
    if problem.stride == 2 and (problem.h % 2 or problem.w % 2):
        return False
    if problem.shortcut is not None:
        c, h, w, stride = problem.shortcut
        if c % 16 or (stride == 2 and (h % 2 or w % 2)):
            return False
    return True


def _tile_size(channels: int) -> bool:
    return channels >= 16 and channels & (channels - 1) == 0


def heuristic(problem: Problem, gpu: GPU) -> Config | None:
    """Return a launch choice from the shape alone; None if no tile is known to keep its accumulators in registers.

    Where the limits lie was found by compiling: a tile one step larger spills (docs/kernels/bottleneck_tail.md). A
    program computes all the channels of its pixels, so there are few programs: with less than one for each two
    multiprocessors, which is the case for small batches, the convolutions do better one by one.
    """
    mid, following, precision = problem.mid, problem.following, problem.precision
    if not _tile_size(mid) or (following and not _tile_size(following)):
        return None
    if problem.stride not in (1, 2) or (problem.shortcut is not None and problem.shortcut[3] not in (1, 2)):
        return None
    largest, projected = max(mid, following), problem.shortcut is not None
    few = cdiv(problem.pixels, 128) < gpu.multiprocessors
    boxes = supports_boxes(problem, gpu, 16)
    num_warps = 8
    if precision == "fp32":
        if mid > 64 or following > 128 or (gpu.capability >= 90 and projected and following):
            return None
        tile = (32, 16, 16, 2, 1)
    elif precision == "tf32":
        if mid > 128 or following > 256 or (largest > 128 and not (boxes and gpu.capability == 90)):
            return None
        tile = (64, 16, 32, 2, 2)
        if boxes and gpu.capability in (90, 100):
            if gpu.capability == 100 and projected and not following and mid <= 64:
                return None
            tile = (64, 32, 32, 2, 1) if few or projected else (128, 32, 32, 2, 2)
            if gpu.capability == 90:
                tile = (64, 32, 32, 2, 2)
                if projected and (following or largest > 64):
                    tile = (64, 16, 32, 2, 1 if largest > 64 else 2)
    elif boxes and gpu.capability in (90, 100):
        hopper = gpu.capability == 90
        if largest <= 128:
            tile = (64 if few else 128, 64, 64, 3 if mid <= 64 else 2, 2)
            if hopper and following and not few and (projected if largest <= 64 else not projected):
                # By one warp group, with narrow slices: registers for two programs, which hide each other's copies.
                num_warps = 4
                tile = (128, 32 if mid <= 64 else 16, 64, 3 if mid <= 64 else 2, 3)
        elif largest == 256:
            tile = (64, 64 if hopper and not projected else 32, 64, 2, 2)
        elif hopper and (mid, following) == (256, 512) and not projected:
            tile = (64, 32, 64, 2, 2)
        elif hopper and (mid, following) == (512, 0):
            tile = (64, 32, 64, 2, 1)
        else:
            return None
    else:
        if largest > 256:
            return None
        tile = (64, 32, 32, 3, 2)
    block_m, block_n, block_c, stages, slice_stages = tile
    # A box may not run over the last output channel, whose scales it would read beyond their end.
    block_n = dividing_power_of_two(problem.k, block_n) if boxes else power_of_two(problem.k, 16, block_n)
    config = Config(block_m, block_n, min(block_c, mid), num_warps, stages, slice_stages, boxes)
    fills = 2 * cdiv(problem.pixels, block_m) >= gpu.multiprocessors
    return config if fills and config.shared_memory(problem) <= gpu.shared_memory else None


def candidates(problem: Problem, gpu: GPU) -> Iterator[Config]:
    """Every launch choice worth compiling; whoever measures leaves out those that spill."""
    if heuristic(problem, gpu) is None:
        return
    widest = 128 if problem.precision in ("fp16", "bf16") else 64
    for block_m in (32, 64, 128):
        # An accumulator alone must leave room for the other one and for b.
        if block_m * max(problem.mid, problem.following) > 128 * 256 or block_m > power_of_two(problem.pixels, 32, 128):
            continue
        for block_n in (16, 32, 64, 128):
            if block_n > widest or block_n > problem.k:
                continue
            boxes = supports_boxes(problem, gpu, block_n)
            for num_warps in (4, 8):
                for stages in (2, 3, 4):
                    for slice_stages in (1, 2, 3):
                        block_c = min(problem.mid, 128 // ITEMSIZE[problem.precision])
                        config = Config(block_m, block_n, block_c, num_warps, stages, slice_stages, boxes)
                        if config.shared_memory(problem) <= gpu.shared_memory:
                            yield config


@_tables.remembers
@lru_cache(maxsize=1024)
def choose(problem: Problem, gpu: GPU) -> Config | None:
    """Return the measured choice if there is one, else the heuristic's; None if the kernel does not apply.

    A table may also say ``"separate": true``: measured, the convolutions were faster one by one.
    """
    standard = heuristic(problem, gpu)
    if standard is None:
        return None
    if (_tables.lookup(NAME, problem.key(), gpu.name) or {}).get("separate") is True:
        return None
    config = _tables.measured(NAME, problem.key(), gpu.name, Config)
    if config is None or problem.mid % config.block_c or config.block_n < 16:
        return standard
    if config.shared_memory(problem) > gpu.shared_memory:
        return standard
    return config if not config.boxes or supports_boxes(problem, gpu, config.block_n) else standard
