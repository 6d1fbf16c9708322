"""batch_norm_act: training BatchNorm + residual + ReLU, two passes forward and two backward; kernels and launches.

    out = act((x - mean) * invstd * gamma + beta + residual),  mean and invstd over the rows of x [rows, c]

Floor: the bytes of the tensors. statistics reads x; apply reads x (and the residual) and writes out; reduce reads grad,
x and output; backward the same and writes grad_x (and grad_residual). Definition: Ioffe & Szegedy 2015,
arXiv:1502.03167.

Tile picture: the rows are cut into slices of SLICE_ROWS, the channels into columns of BLOCK_C; a program owns one slice
of one column and walks down it by GROUP * LANES rows at a time. A step is a tile [GROUP, LANES, BLOCK_C] whose last two
axes are one 16-byte access for each thread, so that the first axis lies in a thread's registers: GROUP accesses are on
their way at once, sums over it need no other thread, and a thread keeps to its channels.

Sums: of a lane's rows in order, of a program's lanes as Triton reduces, of the slices (their results are the workspace)
in float64 by a second small launch. No atomics: the order depends on the sizes and the launch choice alone.

Variance: the sum of squared deviations from the mean, merged by Chan, Golub and LeVeque's formula (1983), GROUP rows
into a lane's. What is summed is x minus its first row, which need not be near the mean: it only keeps digits where
|mean| >> deviation. One that is NaN or infinite is taken as 0, so that an infinite x makes the mean infinite, not NaN.

Traps: out may be x or the residual, and each tile is loaded before it is stored; a ReLU closed by NaN stays open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from . import _tables
from ._language import relu, rounded, wait_for_earlier_kernels
from ._launch import ITEMSIZE, WIDE_FROM, Launch, cdiv, power_of_two
from .gpus import GPU
from .problems import BatchNormAct as Problem

NAME = "batch_norm_act"

_SIZES = ["ROWS", "SLICE_ROWS"]


@triton.jit
def _slice(ROWS, SLICE_ROWS, C, WIDE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which slice a program has, its first row, how many rows it has, and the program's channels."""
    columns = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    index = pid // columns
    c = (pid % columns) * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        index = index.to(tl.int64)
        c = c.to(tl.int64)
    first = index * SLICE_ROWS
    return index, first, tl.minimum(ROWS - first, SLICE_ROWS), c


@triton.jit
def _tile_rows(GROUP: tl.constexpr, LANES: tl.constexpr):
    """The rows of a tile [GROUP, LANES, 1], counted from its first."""
    return (tl.arange(0, GROUP)[:, None] * LANES + tl.arange(0, LANES)[None, :])[:, :, None]


@triton.jit
def _divisor(count):
    """An integer as a float32 that one can divide by, 1 for 0."""
    return tl.maximum(count, 1).to(tl.float32)


@triton.jit
def _open(grad, output):
    """grad where the ReLU was open; NaN is not <= 0, so its gradient passes, as in torch."""
    return tl.where(output.to(tl.float32) <= 0.0, 0.0, grad)


@triton.jit(do_not_specialize=_SIZES)
def _slice_moments(
    x,  # [ROWS, C]
    workspace,  # float32: [slices, C] sums of x - origin, what these round off, squared deviations; [C] origins
    ROWS,
    SLICE_ROWS,
    C,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wait_for_earlier_kernels()
    TILE: tl.constexpr = GROUP * LANES
    index, first, count, c = _slice(ROWS, SLICE_ROWS, C, WIDE, BLOCK_C)
    inside = c < C
    origin = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
    origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)
    row = _tile_rows(GROUP, LANES)
    here = x + first * C
    offset = row * C + c[None, None, :]
    sums = tl.zeros((LANES, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((LANES, BLOCK_C), dtype=tl.float32)
    steps = count // TILE
    for step in range(0, steps):
        d = tl.load(here + step * TILE * C + offset, mask=inside[None, None, :], other=0.0).to(tl.float32)
        d -= origin[None, None, :]
        total = tl.sum(d, axis=0)
        deviation = d - (total * (1.0 / GROUP))[None, :, :]
        # A lane has step * GROUP rows by now.
        before = tl.cast(step, tl.float32)
        apart = sums * (1.0 / tl.cast(tl.maximum(step, 1), tl.float32)) - total
        squares += tl.sum(deviation * deviation, axis=0)
        squares += (before / (GROUP * (before + 1.0))) * apart * apart
        sums += total
    lane_rows = tl.zeros((LANES, 1), dtype=tl.int32) + GROUP * tl.cast(steps, tl.int32)
    if count % TILE != 0:
        valid = row < count - steps * TILE
        d = tl.load(here + steps * TILE * C + offset, mask=valid & inside[None, None, :], other=0.0).to(tl.float32)
        d = tl.where(valid, d - origin[None, None, :], 0.0)
        more = tl.sum(valid.to(tl.int32), axis=0)
        total = tl.sum(d, axis=0)
        deviation = tl.where(valid, d - (total / _divisor(more))[None, :, :], 0.0)
        apart = sums * (more / _divisor(lane_rows)) - total
        squares += tl.sum(deviation * deviation, axis=0)
        squares += (lane_rows / (_divisor(more) * _divisor(lane_rows + more))) * apart * apart
        sums += total
        lane_rows += more
    # The origin may be far from a mean near 0, whose digits float32 would round off here.
    total = tl.sum(sums.to(tl.float64), axis=0)
    high = total.to(tl.float32)
    mean = high / tl.cast(count, tl.float32)
    apart = tl.where(lane_rows > 0, sums / _divisor(lane_rows) - mean[None, :], 0.0)
    plane = tl.cdiv(ROWS, SLICE_ROWS) * C
    to = workspace + index * C + c
    tl.store(to, high, mask=inside)
    low = tl.where(tl.abs(high) < float("inf"), total - high, 0.0)
    tl.store(to + plane, low.to(tl.float32), mask=inside)
    tl.store(to + 2 * plane, tl.sum(squares + lane_rows * apart * apart, axis=0), mask=inside)
    if index == 0:
        tl.store(workspace + 3 * plane + c, origin, mask=inside)


@triton.jit
def _mean_of_slice(workspace, slice, c, inside, plane, C):
    """The mean of one slice in float64, 0 if it is not finite: an origin as good as a row of x.

    Args:
        workspace: of counted slices: [slices, C] sums of x, what these round off, and squared deviations from the
            slice's mean, as three planes, and [slices] rows of each.
    """
    at = workspace + slice * C + c
    mean = tl.load(at, mask=inside, other=0.0).to(tl.float64) + tl.load(at + plane, mask=inside, other=0.0)
    mean /= tl.load(workspace + 3 * plane + slice).to(tl.float64)
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit(do_not_specialize=["SLICES"])
def _thin_moments(
    workspace,  # counted slices
    thinned,  # the same of fewer: BLOCK_S of them in one
    SLICES,
    C,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wait_for_earlier_kernels()
    columns = tl.cdiv(C, BLOCK_C)
    group = (tl.program_id(0) // columns).to(tl.int64)
    column = tl.program_id(0) % columns
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    plane = SLICES.to(tl.int64) * C
    origin = _mean_of_slice(workspace, group * BLOCK_S, c, inside, plane, C)
    index = group * BLOCK_S + tl.arange(0, BLOCK_S)
    rows = tl.load(workspace + 3 * plane + index, mask=index < SLICES, other=0.0).to(tl.float64)
    at = workspace + index[:, None] * C + c[None, :]
    mask = (index < SLICES)[:, None] & inside[None, :]
    sums = tl.load(at, mask=mask, other=0.0).to(tl.float64) + tl.load(at + plane, mask=mask, other=0.0)
    sums = tl.where(mask, sums - rows[:, None] * origin[None, :], 0.0)
    squares = (
        tl.load(at + 2 * plane, mask=mask, other=0.0) + sums * sums * (1.0 / tl.where(rows > 0.0, rows, 1.0))[:, None]
    )
    n = tl.sum(rows, axis=0)
    distance = tl.sum(sums, axis=0)
    m2 = tl.sum(squares, axis=0) - distance * distance / n
    total = distance + n * origin
    high = total.to(tl.float32)
    low = tl.where(tl.abs(high) < float("inf"), total - high, 0.0)
    groups = tl.cdiv(SLICES, BLOCK_S).to(tl.int64)
    to = thinned + group * C + c
    tl.store(to, high, mask=inside)
    tl.store(to + groups * C, low.to(tl.float32), mask=inside)
    tl.store(to + 2 * groups * C, tl.where(m2 < 0.0, 0.0, m2).to(tl.float32), mask=inside)
    if column == 0:
        tl.store(thinned + 3 * groups * C + group, n.to(tl.float32))


@triton.jit
def _update(running, at, inside, value, MOMENTUM):
    """running = (1 - momentum) * running + momentum * value; ``value`` is float64."""
    before = tl.load(running + at, mask=inside, other=0.0)
    tl.store(running + at, MOMENTUM * value.to(tl.float32) + (1.0 - MOMENTUM) * before, mask=inside)


@triton.jit(do_not_specialize=["ROWS", "SLICES", "SLICE_ROWS"])
def _merge_moments(
    workspace,  # as _slice_moments leaves it; COUNTED: of counted slices
    mean,  # [C] float32
    spread,  # [C] float32: the biased variance, or 1 / sqrt(it + EPS)
    running_mean,  # [C] float32, or None
    running_var,  # [C] float32, or None
    EPS,
    MOMENTUM,
    ROWS,
    SLICES,
    SLICE_ROWS,
    C,
    VARIANCE: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wait_for_earlier_kernels()
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    plane = SLICES.to(tl.int64) * C
    behind = workspace + 3 * plane
    if COUNTED:
        origin = _mean_of_slice(workspace, 0, c, inside, plane, C)
    else:
        origin = tl.load(behind + c, mask=inside, other=0.0).to(tl.float64)
    sums = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float64)  # of d, the distance from the origin
    squares = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float64)  # of d^2: enough digits in float64
    for start in range(0, SLICES, BLOCK_S):
        index = start + tl.arange(0, BLOCK_S)
        if COUNTED:
            rows = tl.load(behind + index, mask=index < SLICES, other=1.0).to(tl.float64)
        else:
            first = index.to(tl.int64) * SLICE_ROWS
            rows = tl.maximum(tl.minimum(ROWS - first, SLICE_ROWS), 1).to(tl.float64)
        at = workspace + index.to(tl.int64)[:, None] * C + c[None, :]
        mask = (index < SLICES)[:, None] & inside[None, :]
        of_slice = tl.load(at, mask=mask, other=0.0).to(tl.float64)
        of_slice += tl.load(at + plane, mask=mask, other=0.0).to(tl.float64)
        if COUNTED:
            of_slice = tl.where(mask, of_slice - rows[:, None] * origin[None, :], 0.0)
        sums += of_slice
        squares += tl.load(at + 2 * plane, mask=mask, other=0.0).to(tl.float64)
        squares += of_slice * of_slice * (1.0 / rows)[:, None]
    n = tl.cast(ROWS, tl.float64)
    total = tl.sum(sums, axis=0)
    distance = total / n
    m2 = tl.sum(squares, axis=0) - total * distance
    m2 = tl.where(m2 < 0.0, 0.0, m2)  # by rounding; NaN stays
    center = origin + distance
    tl.store(mean + c, center.to(tl.float32), mask=inside)
    variance = m2 / n
    if VARIANCE:
        tl.store(spread + c, variance.to(tl.float32), mask=inside)
    else:
        tl.store(spread + c, (1.0 / tl.sqrt(variance + EPS)).to(tl.float32), mask=inside)
    if running_mean is not None:
        _update(running_mean, c, inside, center, MOMENTUM)
    if running_var is not None:
        _update(running_var, c, inside, m2 / (n - 1.0), MOMENTUM)


@triton.jit(do_not_specialize=["ROWS"])
def _finish(
    mean,  # vectors: [C] float32
    variance,
    invstd,
    running_mean,  # or None
    running_var,  # or None
    EPS,
    MOMENTUM,
    ROWS,
    C,
    BLOCK_C: tl.constexpr,
):
    wait_for_earlier_kernels()
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    spread = tl.load(variance + c, mask=inside, other=0.0).to(tl.float64)
    tl.store(invstd + c, (1.0 / tl.sqrt(spread + EPS)).to(tl.float32), mask=inside)
    if running_mean is not None:
        _update(running_mean, c, inside, tl.load(mean + c, mask=inside, other=0.0).to(tl.float64), MOMENTUM)
    if running_var is not None:
        n = tl.cast(ROWS, tl.float64)
        _update(running_var, c, inside, spread * (n / (n - 1.0)), MOMENTUM)


@triton.jit(do_not_specialize=_SIZES)
def _apply(
    x,  # [ROWS, C]
    mean,  # vectors: [C] float32
    invstd,
    gamma,  # or None
    beta,  # or None
    residual,  # [ROWS, C] or None
    out,  # [ROWS, C]
    ROWS,
    SLICE_ROWS,
    C,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wait_for_earlier_kernels()
    _, first, count, c = _slice(ROWS, SLICE_ROWS, C, WIDE, BLOCK_C)
    inside = c < C
    center = tl.load(mean + c, mask=inside, other=0.0)[None, None, :]
    scale = tl.load(invstd + c, mask=inside, other=0.0)
    if gamma is not None:
        scale *= tl.load(gamma + c, mask=inside, other=0.0)
    scale = scale[None, None, :]
    if beta is not None:
        shift = tl.load(beta + c, mask=inside, other=0.0)[None, None, :]
    row = _tile_rows(GROUP, LANES)
    for start in range(0, count, GROUP * LANES):
        mask = (start + row < count) & inside[None, None, :]
        at = (first + start) * C + row * C + c[None, None, :]
        y = (tl.load(x + at, mask=mask).to(tl.float32) - center) * scale
        if beta is not None:
            y += shift
        if residual is not None:
            y += tl.load(residual + at, mask=mask).to(tl.float32)
        if RELU:
            y = relu(y)
        tl.store(out + at, rounded(y, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def _slice_sums(
    grad,  # [ROWS, C]
    x,  # [ROWS, C]
    output,  # [ROWS, C], or None without a ReLU
    mean,  # [C] float32
    workspace,  # float32: [slices, C] sums of g, [slices, C] sums of g * (x - mean)
    ROWS,
    SLICE_ROWS,
    C,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wait_for_earlier_kernels()
    index, first, count, c = _slice(ROWS, SLICE_ROWS, C, WIDE, BLOCK_C)
    inside = c < C
    center = tl.load(mean + c, mask=inside, other=0.0)[None, None, :]
    row = _tile_rows(GROUP, LANES)
    of_g = tl.zeros((LANES, BLOCK_C), dtype=tl.float32)
    of_gx = tl.zeros((LANES, BLOCK_C), dtype=tl.float32)
    for start in range(0, count, GROUP * LANES):
        mask = (start + row < count) & inside[None, None, :]
        at = (first + start) * C + row * C + c[None, None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        if output is not None:
            g = _open(g, tl.load(output + at, mask=mask, other=0.0))
        of_g += tl.sum(g, axis=0)
        of_gx += tl.sum(g * (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - center), axis=0)
    to = workspace + index * C + c
    tl.store(to, tl.sum(of_g, axis=0), mask=inside)
    tl.store(to + tl.cdiv(ROWS, SLICE_ROWS) * C, tl.sum(of_gx, axis=0), mask=inside)


@triton.jit(do_not_specialize=["SLICES"])
def _merge_sums(
    workspace,  # as _slice_sums leaves it
    invstd,  # [C] float32
    sum_grad,  # [C] float32
    sum_grad_xhat,  # [C] float32
    SLICES,
    C,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wait_for_earlier_kernels()
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    plane = SLICES.to(tl.int64) * C
    of_g = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float64)
    of_gx = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float64)
    for start in range(0, SLICES, BLOCK_S):
        index = start + tl.arange(0, BLOCK_S)
        at = workspace + index.to(tl.int64)[:, None] * C + c[None, :]
        mask = (index < SLICES)[:, None] & inside[None, :]
        of_g += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        of_gx += tl.load(at + plane, mask=mask, other=0.0).to(tl.float64)
    tl.store(sum_grad + c, tl.sum(of_g, axis=0).to(tl.float32), mask=inside)
    scale = tl.load(invstd + c, mask=inside, other=0.0).to(tl.float64)
    tl.store(sum_grad_xhat + c, (tl.sum(of_gx, axis=0) * scale).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _backward(
    grad,  # [ROWS, C]
    x,  # [ROWS, C]; not read without the sums
    output,  # [ROWS, C], or None without a ReLU
    mean,  # vectors: [C] float32
    invstd,
    gamma,  # or None
    sum_grad,  # or None: the statistics do not depend on x
    sum_grad_xhat,
    grad_x,  # [ROWS, C] or None
    grad_residual,  # [ROWS, C] or None
    ROWS,
    SLICE_ROWS,
    C,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wait_for_earlier_kernels()
    _, first, count, c = _slice(ROWS, SLICE_ROWS, C, WIDE, BLOCK_C)
    inside = c < C
    if grad_x is not None:
        factor = tl.load(invstd + c, mask=inside, other=0.0)
        scale = factor
        if gamma is not None:
            scale *= tl.load(gamma + c, mask=inside, other=0.0)
        if sum_grad is not None:
            # grad_x = scale * g + shift + (mean - x) * slope
            per_row = scale / tl.cast(ROWS, tl.float32)
            center = tl.load(mean + c, mask=inside, other=0.0)[None, None, :]
            shift = (tl.load(sum_grad + c, mask=inside, other=0.0) * -per_row)[None, None, :]
            slope = (tl.load(sum_grad_xhat + c, mask=inside, other=0.0) * (per_row * factor))[None, None, :]
        scale = scale[None, None, :]
    row = _tile_rows(GROUP, LANES)
    for start in range(0, count, GROUP * LANES):
        mask = (start + row < count) & inside[None, None, :]
        at = (first + start) * C + row * C + c[None, None, :]
        g = tl.load(grad + at, mask=mask).to(tl.float32)
        if output is not None:
            g = _open(g, tl.load(output + at, mask=mask))
        if grad_residual is not None:
            tl.store(grad_residual + at, rounded(g, grad_residual.dtype.element_ty), mask=mask)
        if grad_x is not None:
            y = scale * g
            if sum_grad is not None:
                y += (center - tl.load(x + at, mask=mask).to(tl.float32)) * slope + shift
            tl.store(grad_x + at, rounded(y, grad_x.dtype.element_ty), mask=mask)


# --- choice

#: The merging launches: slices and channels of a step, and warps.
_MERGE = {"BLOCK_S": 128, "BLOCK_C": 8, "num_warps": 4}

#: Tiles whose moments one launch merges: four steps.
_MOST_TILES = 4 * _MERGE["BLOCK_S"]

#: Programs aimed at for each multiprocessor.
_PROGRAMS = 8

#: Rows of a slice at most: what a table may hold.
_MOST_ROWS = 4096


@dataclass(frozen=True)
class Config:
    """A launch choice: channels of a program, accesses a thread has on their way, warps, rows of a slice."""

    block_c: int
    accesses: int
    num_warps: int
    rows: int

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of shared memory at most: what the warps exchange of a program's sums."""
        return 2 * 4 * self.num_warps * self.block_c if problem.step in ("statistics", "reduce") else 0

    def lanes(self, problem: Problem) -> int:
        """Rows that one access of every thread covers."""
        return max(1, 32 * self.num_warps * _vector(problem) // self.block_c)


def _vector(problem: Problem) -> int:
    """Elements in a 16-byte access."""
    return 16 // ITEMSIZE[problem.precision]


def _config(problem: Problem, gpu: GPU, width: int, accesses: int, num_warps: int, programs: int) -> Config:
    """Columns of up to ``width`` bytes; slices of whole tiles, as many as make ``programs`` a multiprocessor."""
    block_c = power_of_two(problem.c, 16, width // ITEMSIZE[problem.precision])
    config = Config(block_c, accesses, num_warps, 1)
    tile = accesses * config.lanes(problem)
    slices = max(1, programs * gpu.multiprocessors // max(1, cdiv(problem.c, block_c)))
    rows = min(_MOST_ROWS, max(1, cdiv(cdiv(problem.rows, slices), tile)) * tile)
    return Config(block_c, accesses, num_warps, rows)


def _accesses(problem: Problem) -> int:
    """As many as leave a thread at 64 to 80 registers: four of one tensor, two of several, one of each in backward."""
    if problem.step == "statistics" or (problem.step == "apply" and not problem.residual):
        return 4
    return 1 if problem.step == "backward" else 2


def heuristic(problem: Problem, gpu: GPU) -> Config:
    """Columns of 256 bytes, four warps, about 64 bytes a thread on their way, eight programs a multiprocessor."""
    return _config(problem, gpu, 256, _accesses(problem), 4, _PROGRAMS)


def candidates(problem: Problem, gpu: GPU) -> Iterator[Config]:
    """Every launch choice worth measuring: columns of 128 to 512 bytes, 4 or 8 warps, other accesses, more slices."""
    usual = _accesses(problem)
    made = (
        _config(problem, gpu, width, accesses, num_warps, programs)
        for width in (128, 256, 512)
        for accesses in (usual, 2 if usual == 4 else 2 * usual)
        for num_warps in (4, 8)
        for programs in (_PROGRAMS, 2 * _PROGRAMS)
    )
    yield from dict.fromkeys(made)


@_tables.remembers
@lru_cache(maxsize=4096)
def choose(problem: Problem, gpu: GPU) -> Config:
    """Return the measured choice if there is one that the kernels can take, else the heuristic's."""
    config = _tables.measured(NAME, problem.key(), gpu.name, Config)
    if config is not None and config.rows % (config.accesses * config.lanes(problem)) == 0:
        return config
    return heuristic(problem, gpu)


# --- launches. Images are [N, C, H, W], dense channels_last and of one dtype; vectors are [C], float32 and dense.


def slices(problem: Problem, config: Config) -> int:
    """Into how many slices the rows are cut."""
    return cdiv(problem.rows, config.rows)


def workspace_size(problem: Problem, config: Config) -> int:
    """Numbers of float32 that statistics and reduce need as a workspace; they need no particular contents."""
    planes = 3 if problem.step == "statistics" else 2
    return (planes * slices(problem, config) + 1) * problem.c


def _counted_size(tiles: int, c: int) -> int:
    return (3 * c + 1) * tiles


def moments_size(tiles: int, c: int) -> int:
    """Numbers of float32 that :func:`merge_moments` needs as a workspace for the moments of that many tiles."""
    return _counted_size(tiles, c) + _counted_size(cdiv(tiles, _MERGE["BLOCK_S"]), c)


def _launch(kernel: Any, tensors: tuple[Any, ...], problem: Problem, config: Config, **flags: Any) -> Launch:
    """Return a launch with a program for each slice of each column."""
    lanes = config.lanes(problem)
    reach = (problem.rows + config.accesses * lanes) * (problem.c + config.block_c)  # of offsets, masked ones included
    options = flags | {
        "WIDE": reach >= WIDE_FROM,
        "GROUP": config.accesses,
        "LANES": lanes,
        "BLOCK_C": config.block_c,
        "num_warps": config.num_warps,
    }
    grid = (slices(problem, config) * cdiv(problem.c, config.block_c),)
    return Launch(kernel, grid, (*tensors, problem.rows, config.rows, problem.c), options)


def statistics(
    x: Any,
    mean: Any,
    invstd: Any,
    running_mean: Any,
    running_var: Any,
    workspace: Any,
    problem: Problem,
    config: Config,
    *,
    eps: float,
    momentum: float,
    variance: bool = False,
) -> tuple[Launch, ...]:
    """The launches that fill ``mean`` and ``invstd = 1 / sqrt(variance + eps)`` and update the running statistics.

    Args:
        running_mean, running_var: ``(1 - momentum) * running + momentum * batch``, with the unbiased variance, which is
            NaN for one row; or None.
        workspace: ``workspace_size`` numbers of float32.
        variance: ``invstd`` becomes the biased variance in its place.
    """
    merge = (
        workspace, mean, invstd, running_mean, running_var, eps, momentum, problem.rows, slices(problem, config),
        config.rows, problem.c,
    )  # fmt: skip
    options = {"VARIANCE": variance, "COUNTED": False, **_MERGE}
    return (
        _launch(_slice_moments, (x, workspace), problem, config),
        Launch(_merge_moments, (cdiv(problem.c, _MERGE["BLOCK_C"]),), merge, options),
    )


def merge_moments(
    workspace: Any,
    mean: Any,
    invstd: Any,
    running_mean: Any,
    running_var: Any,
    rows: int,
    tiles: int,
    c: int,
    *,
    eps: float,
    momentum: float,
    variance: bool = False,
) -> tuple[Launch, ...]:
    """What :func:`statistics` does, of moments that a convolution's tiles left in the workspace: one launch or two.

    Args:
        workspace: ``moments_size`` numbers of float32, the tiles' moments first.
        rows, tiles: how many the convolution's output has, and how many left moments.
    """
    columns = cdiv(c, _MERGE["BLOCK_C"])
    launches = []
    if tiles > _MOST_TILES:  # a program for each column alone would take long
        groups, thinned = cdiv(tiles, _MERGE["BLOCK_S"]), workspace[_counted_size(tiles, c) :]
        launches.append(Launch(_thin_moments, (groups * columns,), (workspace, thinned, tiles, c), dict(_MERGE)))
        workspace, tiles = thinned, groups
    merge = (workspace, mean, invstd, running_mean, running_var, eps, momentum, rows, tiles, 1, c)
    options = {"VARIANCE": variance, "COUNTED": True, **_MERGE}
    return (*launches, Launch(_merge_moments, (columns,), merge, options))


def finish(
    mean: Any,
    variance: Any,
    invstd: Any,
    running_mean: Any,
    running_var: Any,
    rows: int,
    c: int,
    *,
    eps: float,
    momentum: float,
) -> Launch:
    """The launch that fills ``invstd`` and updates the running statistics, of mean and biased variance of ``rows``."""
    block = 256
    tensors = (mean, variance, invstd, running_mean, running_var)
    return Launch(_finish, (cdiv(c, block),), (*tensors, eps, momentum, rows, c), {"BLOCK_C": block, "num_warps": 4})


def apply(
    x: Any,
    mean: Any,
    invstd: Any,
    gamma: Any,
    beta: Any,
    residual: Any,
    out: Any,
    problem: Problem,
    config: Config,
    *,
    activation: str = "relu",
) -> tuple[Launch, ...]:
    """Return the launch that fills ``out`` with ``act((x - mean) * invstd * gamma + beta + residual)``.

    Args:
        gamma, beta, residual: may be None. out: may be x or the residual.
    """
    tensors = (x, mean, invstd, gamma, beta, residual, out)
    return (_launch(_apply, tensors, problem, config, RELU=activation == "relu"),)


def reduce(
    grad: Any,
    x: Any,
    output: Any,
    mean: Any,
    invstd: Any,
    sum_grad: Any,
    sum_grad_xhat: Any,
    workspace: Any,
    problem: Problem,
    config: Config,
) -> tuple[Launch, ...]:
    """Return the launches that fill the sums over rows of ``g`` and of ``g * (x - mean) * invstd``.

    Args:
        output: tells where the ReLU was open, which is where ``g`` is ``grad``; None: everywhere.
        workspace: ``workspace_size`` numbers of float32.
    """
    merge = (workspace, invstd, sum_grad, sum_grad_xhat, slices(problem, config), problem.c)
    return (
        _launch(_slice_sums, (grad, x, output, mean, workspace), problem, config),
        Launch(_merge_sums, (cdiv(problem.c, _MERGE["BLOCK_C"]),), merge, dict(_MERGE)),
    )


def backward(
    grad: Any,
    x: Any,
    output: Any,
    mean: Any,
    invstd: Any,
    gamma: Any,
    sum_grad: Any,
    sum_grad_xhat: Any,
    grad_x: Any,
    grad_residual: Any,
    problem: Problem,
    config: Config,
) -> tuple[Launch, ...]:
    """Return the launch that fills ``grad_x`` and ``grad_residual`` (``g``), if they are not None.

    ``grad_x = gamma * invstd * (g - sum_grad / rows - xhat * sum_grad_xhat / rows)``, without the sums (None) for
    statistics that do not depend on x.
    """
    tensors = (grad, x, output, mean, invstd, gamma, sum_grad, sum_grad_xhat, grad_x, grad_residual)
    return (_launch(_backward, tensors, problem, config),)
