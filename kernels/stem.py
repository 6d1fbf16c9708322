"""stem: convolution 7x7/2 with scale and shift, ReLU and max-pool 3x3/2, in two kernels; kernels and launches.

    out[n, p, q, k] = relu(max over the pool's window of (conv(x, weight)[n, ., ., k] * scale[k] + shift[k]))

Floor: x read once, out written once: for 3x224x224 in half precision 0.70 MB an image, a sixth of what it is with the
convolution's output in between. The operations are 0.24 GFLOP an image for the convolution, here done 2.8 times.

``_squares`` writes the image as squares of 2x2 pixels, padding included, with channels up to a power of two: bytes
normalised, 16 numbers a square for three channels. Over squares the 7x7 with stride 2 is a 4x4 with stride 1, and a row
of its taps is one run of 64 numbers: what a product reads are whole 16-byte pieces, at addresses without checks.

Tile picture of ``_stem``: a program owns a box of BOX_S strips of ROWS pooled rows by BOX_Q columns, by BLOCK_N
channels. It walks down the 2 ROWS + 1 rows of the convolution that each strip sees, computes each row at the three
columns of the pool's window, and keeps the maximum in registers. A row that two pooled rows share is computed once, a
column that two pooled pixels share twice: the convolution is done 1.5 (1 + 1 / (2 ROWS)) times, 2.25 times with
ROWS = 1 (for parallelism, in small batches). On Hopper the weights stay in shared memory meanwhile.

Traps: a window of squares covers 8x8 pixels. The first row and column have weights of zero, but zero times NaN is NaN:
what is read there is replaced by 0 (``_cut``). Positions beyond the convolution's output are -inf for the maximum,
never 0. Scale, shift and ReLU are monotone, so they come after the maximum; but scale may be negative, so its sign
comes before, on the weights, where it is exact. Bytes are normalised before the zero padding: padding is not black.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from . import _tables
from ._language import _INTERPRETED, dot, relu, rounded, wait_for_earlier_kernels
from ._launch import ITEMSIZE, WIDE_FROM, Launch, cdiv, dot_precision, image_box, power_of_two, wide
from .gpus import GPU
from .problems import Stem as Problem

NAME = "stem"

#: Pooled rows of a program at most: the squares end with rows for strips of so many that run over the image.
MOST_ROWS = 8

#: Squares of a program of ``_squares``.
_BLOCK_W = 128


@triton.jit(do_not_specialize=["H", "W", "HEIGHT", "WIDTH", "BEFORE", "X_N", "X_H"])
def _squares(
    x,  # [N, C, H, W] by strides: floating point, or uint8
    normalise,  # [2, C] float32 for uint8: factor and summand
    squares,  # [N, HEIGHT, WIDTH, 2, 2, PADDED_C]
    H,
    W,
    HEIGHT,
    WIDTH,
    BEFORE,  # squares before the image's first
    X_N,
    X_H,
    X_W,
    X_C,
    C: tl.constexpr,
    PADDED_C: tl.constexpr,
    UINT8: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    wait_for_earlier_kernels()
    blocks = tl.cdiv(WIDTH, BLOCK_W)
    pid = tl.program_id(0)
    column = (pid % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    line = pid // blocks  # of all images
    n = line // HEIGHT
    if WIDE:
        line = line.to(tl.int64)
        n = n.to(tl.int64)
    pixel = tl.arange(0, 4)  # of a square, row by row
    h = 2 * ((pid // blocks) % HEIGHT - BEFORE) + pixel // 2
    w = 2 * (column - BEFORE)[:, None] + (pixel % 2)[None, :]
    inside = ((h >= 0) & (h < H))[None, :] & (w >= 0) & (w < W)
    if WIDE:
        h = h.to(tl.int64)
        w = w.to(tl.int64)
    at = x + n * X_N + (h * X_H)[None, :] + w * X_W
    to = squares + (line * WIDTH + column)[:, None] * (4 * PADDED_C)
    dtype: tl.constexpr = squares.dtype.element_ty
    for group in tl.static_range(0, PADDED_C, 4):
        a = _channel(at, X_C, normalise, inside, group, C, UINT8, dtype)
        b = _channel(at, X_C, normalise, inside, group + 1, C, UINT8, dtype)
        c = _channel(at, X_C, normalise, inside, group + 2, C, UINT8, dtype)
        d = _channel(at, X_C, normalise, inside, group + 3, C, UINT8, dtype)
        four = tl.join(tl.join(a, c), tl.join(b, d)).reshape(BLOCK_W, 16)
        value = tl.arange(0, 16)
        tl.store(to + (value // 4 * PADDED_C + group + value % 4)[None, :], four, mask=(column < WIDTH)[:, None])


@triton.jit
def _channel(
    at, X_C, normalise, inside, CHANNEL: tl.constexpr, C: tl.constexpr, UINT8: tl.constexpr, dtype: tl.constexpr
):
    """One channel of the pixels at ``at``, in ``dtype``; 0 for one that the image has not, and where not ``inside``."""
    if CHANNEL >= C:
        return tl.zeros(at.shape, dtype=dtype)
    a = tl.load(at + CHANNEL * X_C, mask=inside, other=0)
    if UINT8:
        a = a.to(tl.float32) * tl.load(normalise + CHANNEL) + tl.load(normalise + C + CHANNEL)
        a = rounded(tl.where(inside, a, 0.0), dtype)
    return a


@triton.jit
def _cut(a, position, ROW: tl.constexpr, PADDED_C: tl.constexpr):
    """Squares of a row of taps, from ``position`` of the row on, without the column that only the 8x8 window has.

    ROW: 0 for the first row of squares, whose first row of pixels only that window has.
    """
    keep = (position // (4 * PADDED_C) > 0) | (position // PADDED_C % 2 == 1)
    if ROW == 0:
        keep = keep & (position // (2 * PADDED_C) % 2 == 1)
    return tl.where(keep[None, :], a, 0.0)


@triton.jit
def _taps(weight, position, k, sign, inside_k, PADDED_C: tl.constexpr):
    """[position, k] of the weights, with the scale's sign."""
    at = weight + (k * (64 * PADDED_C))[None, :] + position[:, None]
    b = tl.load(at, mask=inside_k[None, :], other=0.0)
    if _INTERPRETED and b.dtype == tl.bfloat16:  # which the interpreter cannot multiply
        return (b.to(tl.float32) * sign.to(tl.float32)[None, :]).to(tl.bfloat16)
    return b * sign[None, :]


@triton.jit(
    do_not_specialize=["CONV_P", "CONV_Q", "P", "Q", "TILES_S", "TILES_Q", "ROWS", "HEIGHT", "WIDTH", "POOL_PAD"]
)
def _stem(
    squares,  # [N, HEIGHT, WIDTH, 2, 2, PADDED_C]
    weight,  # [K, 4, 4, 2, 2, PADDED_C]
    scale,  # [K] float32
    shift,  # [K] float32
    out,  # [N, P, Q, K]
    K,
    CONV_P,
    CONV_Q,
    P,
    Q,
    TILES_S,  # boxes that an image's strips and columns take
    TILES_Q,
    ROWS,
    HEIGHT,
    WIDTH,
    POOL_PAD,
    PADDED_C: tl.constexpr,
    RESIDENT: tl.constexpr,  # whether the weights stay in shared memory
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BOX_S: tl.constexpr,
    BOX_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_earlier_kernels()
    BLOCK_M: tl.constexpr = BOX_S * BOX_Q
    LINE: tl.constexpr = 16 * PADDED_C  # numbers of a row of taps
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    k = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_k = k < K
    box = pid // tiles_n
    pixel = tl.arange(0, BLOCK_M)
    q = (box % TILES_Q) * BOX_Q + pixel % BOX_Q
    top = ((box // TILES_Q % TILES_S) * BOX_S + pixel // BOX_Q) * ROWS
    n = box // (TILES_Q * TILES_S)
    if WIDE:
        n = n.to(tl.int64)
    inside = (q < Q) & (top < P)
    line = WIDTH * (4 * PADDED_C)
    # What is no pixel reads the image's first window, and nobody what becomes of it.
    first = tl.where(inside, 2 * (top * line + q * (4 * PADDED_C)), 0)
    image = squares + n * HEIGHT * line
    factor = tl.load(scale + k, mask=inside_k, other=0.0)
    sign = tl.where(factor > 0.0, 1.0, tl.where(factor < 0.0, -1.0, factor)).to(weight.dtype.element_ty)
    position = tl.arange(0, BLOCK_K)
    if RESIDENT:
        b0 = _taps(weight, position, k, sign, inside_k, PADDED_C)
        b1 = _taps(weight, position + LINE, k, sign, inside_k, PADDED_C)
        b2 = _taps(weight, position + 2 * LINE, k, sign, inside_k, PADDED_C)
        b3 = _taps(weight, position + 3 * LINE, k, sign, inside_k, PADDED_C)
    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32)
    row = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32)
    for step in range(0, (2 * ROWS + 1) * 3):
        j = step // 3
        i = step % 3
        corner = image + (j * line + i * (4 * PADDED_C))
        y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if RESIDENT:
            taps = corner + (first[:, None] + position[None, :])
            # One after the other: loaded first, all four would take two places in shared memory each.
            y = dot(_cut(tl.load(taps), position, 0, PADDED_C), b0, y, PRECISION)
            y = dot(_cut(tl.load(taps + line), position, 1, PADDED_C), b1, y, PRECISION)
            y = dot(_cut(tl.load(taps + 2 * line), position, 2, PADDED_C), b2, y, PRECISION)
            y = dot(_cut(tl.load(taps + 3 * line), position, 3, PADDED_C), b3, y, PRECISION)
        else:
            for c in range(0, LINE, BLOCK_K):
                taps = corner + (first[:, None] + (c + position)[None, :])
                for r in tl.static_range(0, 4):
                    a = _cut(tl.load(taps + r * line), c + position, r, PADDED_C)
                    b = _taps(weight, r * LINE + c + position, k, sign, inside_k, PADDED_C)
                    y = dot(a, b, y, PRECISION)
        p = 2 * top - POOL_PAD + j
        column = 2 * q - POOL_PAD + i
        valid = (p >= 0) & (p < CONV_P) & (column >= 0) & (column < CONV_Q)
        y = tl.where(valid[:, None], y, float("-inf"))
        row = tl.maximum(row, y, propagate_nan=tl.PropagateNan.ALL)
        if i == 2:
            best = tl.maximum(best, row, propagate_nan=tl.PropagateNan.ALL)
            if j % 2 == 0:
                # Rows 2 p, 2 p + 1 and 2 p + 2 are through (p counts from the top); the last begins the next window.
                at = top + j // 2 - 1
                mask = ((j > 0) & inside & (at < P))[:, None] & inside_k[None, :]
                pooled = best * tl.abs(tl.load(scale + k, mask=inside_k, other=0.0))[None, :]
                pooled = relu(pooled + tl.load(shift + k, mask=inside_k, other=0.0)[None, :])
                to = out + ((n * P + at) * Q + q) * K
                tl.store(to[:, None] + k[None, :], rounded(pooled, out.dtype.element_ty), mask=mask)
                best = row
            row = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32)


@dataclass(frozen=True)
class Config:
    """A launch choice: pooled pixels and channels of a tile, numbers of a step, pooled rows of a strip, warps.

    Attributes:
        num_stages: how many positions of the convolution have their pixels on the way or in use at once.
        resident: whether the weights stay in shared memory: for matrix units that read them there.
    """

    block_m: int
    block_n: int
    block_k: int
    rows: int
    num_warps: int
    num_stages: int
    resident: bool

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of shared memory a program takes at most: weights and pixels, or a step's operands; the output tile."""
        item, lines = ITEMSIZE[problem.precision], 4 if self.resident else 1
        pixels, weights = (lines * block * self.block_k * item for block in (self.block_m, self.block_n))
        staged = self.block_m * self.block_n * item
        return weights + pixels * self.num_stages + staged if self.resident else max(pixels + weights, staged)


def padded_channels(c: int) -> int:
    """Return the channels of a pixel in a square."""
    return power_of_two(c, 4, 2**20)


def squares_shape(problem: Problem) -> tuple[int, int, int, int, int, int]:
    """Return the shape of what ``_squares`` writes and ``_stem`` reads, in the output's dtype."""
    p, q = problem.output
    return problem.n, 2 * (p + MOST_ROWS - 1) + 4, 2 * q + 4, 2, 2, padded_channels(problem.c)


def _box(problem: Problem, block_m: int, rows: int) -> tuple[int, int, int]:
    p, q = problem.output
    return image_box(1, cdiv(p, rows), q, block_m)


def programs(problem: Problem, block_m: int, block_n: int, rows: int) -> int:
    """Return how many programs the launch has."""
    p, q = problem.output
    _, strips, columns = _box(problem, block_m, rows)
    return problem.n * cdiv(cdiv(p, rows), strips) * cdiv(q, columns) * cdiv(problem.k, block_n)


def _takes_resident(problem: Problem, gpu: GPU) -> bool:
    return gpu.capability == 90 and ITEMSIZE[problem.precision] == 2 and padded_channels(problem.c) == 4


def _fits(config: Config, problem: Problem, gpu: GPU) -> bool:
    # Triton 3.7 has been seen to round float32 operands to tf32 for Blackwell's matrix units though told not to, where
    # a tile is large enough for them (64 rows).
    exact = problem.precision != "fp32" or config.block_m <= 32
    line = 16 * padded_channels(problem.c)
    whole = config.block_k == line and _takes_resident(problem, gpu) if config.resident else line % config.block_k == 0
    return exact and whole and config.rows <= MOST_ROWS and config.shared_memory(problem) <= gpu.shared_memory


def _config(problem: Problem, gpu: GPU, block_m: int, block_n: int, rows: int, num_warps: int) -> Config:
    if _takes_resident(problem, gpu) and block_m >= 64:
        return Config(block_m, block_n, 16 * padded_channels(problem.c), rows, num_warps, 2, True)
    return Config(block_m, block_n, 128 // ITEMSIZE[problem.precision], rows, num_warps, 1, False)


#: Programs that a multiprocessor holds at once, and what a program takes besides, in pooled rows.
_AT_ONCE, _BESIDES = 3, 1


def heuristic(problem: Problem, gpu: GPU) -> Config:
    """Return the strips with which the busiest multiprocessor computes the fewest rows."""
    block_m, block_n = 64 if _takes_resident(problem, gpu) else 32, power_of_two(problem.k, 16, 64)

    def rows_in_turn(rows: int) -> tuple[int, int]:
        waves = cdiv(programs(problem, block_m, block_n, rows), _AT_ONCE * gpu.multiprocessors)
        return waves * (2 * rows + 1 + _BESIDES), -rows

    rows = min(range(1, MOST_ROWS + 1), key=rows_in_turn)
    if block_m == 64 and block_n == 64 and programs(problem, block_m, block_n, rows) < gpu.multiprocessors:
        block_n = 32
    return _config(problem, gpu, block_m, block_n, rows, 4)


def candidates(problem: Problem, gpu: GPU) -> Iterator[Config]:
    """Every launch choice worth measuring: programs for half of the multiprocessors, where tiles can be so small."""
    widest = power_of_two(problem.k, 16, 64)
    for block_m in (16, 32, 64, 128):
        for block_n in sorted({widest, min(widest, 32)}):
            for rows in range(1, MOST_ROWS + 1):
                scarce = programs(problem, block_m, block_n, rows) < gpu.multiprocessors // 2
                if scarce and not (rows == 1 and block_m <= 64):
                    continue
                for num_warps in (4, 8):
                    # Accumulator, row and maximum: three tiles in registers, beside the addresses.
                    if 2 <= block_m * block_n // (num_warps * 32) <= 32:
                        config = _config(problem, gpu, block_m, block_n, rows, num_warps)
                        if _fits(config, problem, gpu):
                            yield config


@_tables.remembers
@lru_cache(maxsize=4096)
def choose(problem: Problem, gpu: GPU) -> Config:
    """Return the measured choice if there is one that fits, else the heuristic's."""
    config = _tables.measured(NAME, problem.key(), gpu.name, Config)
    if config is not None and _fits(config, problem, gpu):
        return config
    return heuristic(problem, gpu)


def _span(x: Any) -> int:
    """Return the offset of the last element from the first."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def launch_squares(x: Any, normalise: Any, squares: Any, problem: Problem, config: Config) -> Launch:
    """Return the launch that fills ``squares``, whatever the config.

    Args:
        x: [N, C, H, W], or uint8 [N, H, W, C]; any strides.
        normalise: for uint8 [2, C] float32, dense: a pixel's value is ``pixel * normalise[0] + normalise[1]``.
            None for others.
        squares: of :func:`squares_shape`, dense; x's dtype unless that is uint8.
    """
    n_stride, *others = x.stride()
    h_stride, w_stride, c_stride = others if problem.uint8 else (others[1], others[2], others[0])
    n, height, width, *_, padded = squares.shape
    options = {
        "C": problem.c,
        "PADDED_C": padded,
        "UINT8": problem.uint8,
        "WIDE": wide(squares) or _span(x) >= WIDE_FROM,
        "BLOCK_W": _BLOCK_W,
        "num_warps": 4,
        "num_stages": 1,
    }
    args = (
        x, squares if normalise is None else normalise, squares, problem.h, problem.w, height, width,
        _before(problem), n_stride, h_stride, w_stride, c_stride,
    )  # fmt: skip
    return Launch(_squares, (n * height * cdiv(width, _BLOCK_W),), args, options)


def _before(problem: Problem) -> int:
    """Return how many squares lie before the image's first: a window's two, and one in front of the pool's padding."""
    return 2 if problem.ceil_mode else 3


def launch(squares: Any, weight: Any, scale: Any, shift: Any, out: Any, problem: Problem, config: Config) -> Launch:
    """Return the launch that fills ``out``.

    Args:
        squares: as :func:`launch_squares` leaves it.
        weight: [K, 4, 4, 2, 2, padded channels] in out's dtype, dense: ``layouts.squares_apart``.
        scale, shift: [K] float32, dense.
        out: [N, K, P, Q], dense channels_last.
    """
    p, q = problem.output
    _, box_s, box_q = _box(problem, config.block_m, config.rows)
    options = {
        "PADDED_C": squares.shape[-1],
        "RESIDENT": config.resident,
        "PRECISION": dot_precision(problem.precision),
        "WIDE": wide(out, squares),
        "BOX_S": box_s,
        "BOX_Q": box_q,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.resident:
        options["maxnreg"] = 65536 // (32 * config.num_warps * _AT_ONCE) // 8 * 8
    args = (
        squares, weight, scale, shift, out, problem.k, *problem.convolved, p, q, cdiv(cdiv(p, config.rows), box_s),
        cdiv(q, box_q), config.rows, *squares.shape[1:3], 0 if problem.ceil_mode else 1,
    )  # fmt: skip
    return Launch(_stem, (programs(problem, config.block_m, config.block_n, config.rows),), args, options)
