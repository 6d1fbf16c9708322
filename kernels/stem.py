"""stem: convolution 7x7/2 with scale and shift, ReLU and max-pool 3x3/2 in one kernel; kernel and launch.

    out[n, p, q, k] = relu(max over the pool's window of (conv(x, weight)[n, ., ., k] * scale[k] + shift[k]))

Floor: x read once, out written once: for 3x224x224 in half precision 0.70 MB an image, a sixth of what it is with the
convolution's output in between. The operations (0.24 GFLOP an image for the convolution, here done 1.6 to 2.25 times)
take a few times as long, and what stands above both is the arithmetic of addresses, as every operand of three
channels is loaded by itself.

Tile picture: a program owns BLOCK_M columns of ROWS pooled pixels, by BLOCK_N channels. It walks down the 2 ROWS + 1
rows of the convolution that they see, computes each row at the three columns of the pool's window, and keeps the
maximum in registers. A row that two pooled rows share is computed once, a column that two pooled pixels share twice:
the convolution is done 1.5 (1 + 1 / (2 ROWS)) times, 2.25 times with ROWS = 1 (for parallelism, in small batches).
The product runs over one row of taps at a time, its (column, channel) positions flattened into BLOCK_K, so that only
the column needs a check per element.

Traps: positions beyond the convolution's output are -inf for the maximum, never 0. Scale, shift and ReLU are monotone,
so they come after the maximum; but scale may be negative, so its sign comes before, on the weights, if it is exact.
Bytes are normalised before the zero padding, so padding is 0 and not a black pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from . import _tables
from ._language import _INTERPRETED, dot, relu, rounded
from ._launch import ITEMSIZE, WIDE_FROM, Launch, cdiv, dot_precision, power_of_two, wide
from .gpus import GPU
from .problems import Stem as Problem

NAME = "stem"

#: A coordinate that is outside every image, from wherever a window begins.
FAR = tl.constexpr(-(2**30))

_SIZES = ["N", "H", "W", "CONV_P", "CONV_Q", "P", "Q", "STRIPS", "ROWS", "R", "POOL", "POOL_PAD", "X_N", "X_H"]


@triton.jit(do_not_specialize=_SIZES)
def _stem(
    x,  # [N, C, H, W] by strides: floating point, or uint8
    weight,  # [K, (R, S, C)] by strides
    scale,  # [K] float32
    shift,  # [K] float32
    normalise,  # [2, C] float32 for uint8: factor and summand
    out,  # [N, P, Q, K]
    N,
    H,
    W,
    K,
    CONV_P,
    CONV_Q,
    P,
    Q,
    STRIPS,  # of ROWS pooled rows
    ROWS,
    R,  # 7 and
    POOL,  # 3, but not constants: unrolled, these loops take all registers and more
    POOL_PAD,
    X_N,
    X_H,
    X_W,
    X_C,
    WEIGHT_K,  # stride of the output channels, and of the flattened (r, s, c)
    WEIGHT_TAP,
    C: tl.constexpr,
    UINT8: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,  # of BLOCK_K in a row of taps
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    tile_m = pid // tiles_n
    if WIDE:
        tile_m = tile_m.to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = m // (STRIPS * Q)
    inside_m = n < N
    q = (m % Q).to(tl.int32)
    top = ((m // Q) % STRIPS).to(tl.int32) * ROWS
    pooled = out + ((n * P + top) * Q + q) * K
    k = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_k = k < K
    factor = tl.load(scale + k, mask=inside_k, other=0.0)
    sign = tl.where(factor > 0.0, 1.0, tl.where(factor < 0.0, -1.0, factor)).to(weight.dtype.element_ty)
    # The first pixel of each column's first window. What a step adds to it is the same for all columns, so a thread
    # keeps little per element; pixels and positions that are none lie far outside the image and need no own check.
    first_p = 2 * top - POOL_PAD
    first_q = 2 * q - POOL_PAD
    first_h = 2 * first_p - 3
    first_w = 2 * first_q - 3
    if WIDE:
        first = n * X_N + first_h.to(tl.int64) * X_H + first_w.to(tl.int64) * X_W
    else:
        first = n * X_N + first_h * X_H + first_w * X_W
    first_h = tl.where(inside_m, first_h, FAR)
    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32)
    for j in range(0, 2 * ROWS + 1):
        inside_p = (first_p + j >= 0) & (first_p + j < CONV_P)
        row = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32)
        for i in range(0, POOL):
            accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for step in range(0, R * BLOCKS):
                r = step // BLOCKS
                position = (step % BLOCKS) * BLOCK_K + tl.arange(0, BLOCK_K)
                inside = position < 7 * C
                s = position // C
                c = position % C
                # Compared as unsigned numbers, what is negative lies beyond the end too.
                h = (first_h + (2 * j + r)).to(tl.uint32, bitcast=True)
                w = (first_w[:, None] + tl.where(inside, s, FAR)[None, :] + 2 * i).to(tl.uint32, bitcast=True)
                mask = (h < H.to(tl.uint32))[:, None] & (w < W.to(tl.uint32))
                if WIDE:
                    corner = x + (2 * j + r).to(tl.int64) * X_H + 2 * i * X_W
                    beside = s.to(tl.int64) * X_W + c.to(tl.int64) * X_C
                else:
                    corner = x + ((2 * j + r) * X_H + 2 * i * X_W)
                    beside = s * X_W + c * X_C
                a = tl.load(corner + (first[:, None] + beside[None, :]), mask=mask, other=0)
                if UINT8:
                    multiply = tl.load(normalise + c)
                    add = tl.load(normalise + C + c)
                    a = tl.where(mask, a.to(tl.float32) * multiply[None, :] + add[None, :], 0.0)
                    a = rounded(a, weight.dtype.element_ty)
                taps = weight + (r * 7 * C + position) * WEIGHT_TAP
                b = tl.load(
                    taps[:, None] + (k * WEIGHT_K)[None, :], mask=inside[:, None] & inside_k[None, :], other=0.0
                )
                if _INTERPRETED and b.dtype == tl.bfloat16:  # which the interpreter cannot multiply
                    b = (b.to(tl.float32) * sign.to(tl.float32)[None, :]).to(tl.bfloat16)
                else:
                    b = b * sign[None, :]
                accumulator = dot(a, b, accumulator, PRECISION)
            valid = inside_p & (first_q + i >= 0) & (first_q + i < CONV_Q)
            row = tl.maximum(
                row, tl.where(valid[:, None], accumulator, float("-inf")), propagate_nan=tl.PropagateNan.ALL
            )
        best = tl.maximum(best, row, propagate_nan=tl.PropagateNan.ALL)
        if j % 2 == 0:
            # Rows 2 p, 2 p + 1 and 2 p + 2 are through (p counts from the top); the last begins the next window.
            p = j // 2 - 1
            mask = (inside_m & (p >= 0) & (top + p < P))[:, None] & inside_k[None, :]
            y = best * tl.abs(tl.load(scale + k, mask=inside_k, other=0.0))[None, :]
            y = relu(y + tl.load(shift + k, mask=inside_k, other=0.0)[None, :])
            tl.store(pooled[:, None] + (p * Q * K + k)[None, :], rounded(y, out.dtype.element_ty), mask=mask)
            best = row


@dataclass(frozen=True)
class Config:
    """A launch choice: columns, channels, positions of a row of taps per step, pooled rows, warps."""

    block_m: int
    block_n: int
    block_k: int
    rows: int
    num_warps: int

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of shared memory a program takes at most: the operands of a step, or the output tile."""
        item = ITEMSIZE[problem.precision]
        operands = (self.block_m + self.block_n) * self.block_k * item
        return max(operands, self.block_m * self.block_n * item)


def _positions(problem: Problem) -> int:
    """Return a step through the product: a whole row of taps if it is short, else a part of it."""
    return power_of_two(7 * problem.c, 16, 32)


def programs(problem: Problem, block_m: int, block_n: int, rows: int) -> int:
    """Return how many programs the launch has."""
    p, q = problem.output
    return cdiv(problem.n * cdiv(p, rows) * q, block_m) * cdiv(problem.k, block_n)


def _fits(config: Config, problem: Problem, gpu: GPU) -> bool:
    # Triton 3.7 has been seen to round float32 operands to tf32 for Blackwell's matrix units though told not to, where
    # a tile is large enough for them (64 rows).
    exact = problem.precision != "fp32" or config.block_m <= 32
    return exact and config.shared_memory(problem) <= gpu.shared_memory


_ROWS = (8, 4, 2, 1)


def heuristic(problem: Problem, gpu: GPU) -> Config:
    """As many pooled rows per program as leave every multiprocessor four programs, fewer in small batches."""
    block_m, block_n = 32, power_of_two(problem.k, 16, 64)
    for rows in _ROWS:
        if programs(problem, block_m, block_n, rows) >= 4 * gpu.multiprocessors:
            break
    return Config(block_m, block_n, _positions(problem), rows, 4)


def candidates(problem: Problem, gpu: GPU) -> Iterator[Config]:
    """Every launch choice worth measuring: programs for half of the multiprocessors, where tiles can be so small."""
    widest = power_of_two(problem.k, 16, 64)
    for block_m in (16, 32, 64):
        for block_n in sorted({widest, min(widest, 32)}):
            for rows in _ROWS:
                scarce = programs(problem, block_m, block_n, rows) < gpu.multiprocessors // 2
                if scarce and not (rows == 1 and block_m <= 32):
                    continue
                for num_warps in (4, 8):
                    # Accumulator, row and maximum: three tiles in registers, beside the addresses.
                    if 2 <= block_m * block_n // (num_warps * 32) <= 16:
                        config = Config(block_m, block_n, _positions(problem), rows, num_warps)
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


def launch(
    x: Any, weight: Any, scale: Any, shift: Any, normalise: Any, out: Any, problem: Problem, config: Config
) -> Launch:
    """Return the launch that fills ``out``.

    Args:
        x: [N, C, H, W], or uint8 [N, H, W, C]; any strides.
        weight: [K, C, 7, 7] in out's dtype, stored as [K, 7, 7, C] (channels_last) or as [7, 7, C, K], which is read
            in wide accesses.
        scale, shift: [K] float32, dense.
        normalise: for uint8 [2, C] float32, dense: a pixel's value is ``pixel * normalise[0] + normalise[1]``.
            None for others.
        out: [N, K, P, Q], dense channels_last; x's dtype unless that is uint8.
    """
    n_stride, *others = x.stride()
    h_stride, w_stride, c_stride = others if problem.uint8 else (others[1], others[2], others[0])
    p, q = problem.output
    strips = cdiv(p, config.rows)
    options = {
        "C": problem.c,
        "UINT8": problem.uint8,
        "PRECISION": dot_precision(problem.precision),
        "WIDE": wide(out) or _span(x) >= WIDE_FROM,
        "BLOCKS": cdiv(7 * problem.c, config.block_k),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": 1,  # what is loaded element by element, the compiler cannot fetch ahead
    }
    args = (
        x, weight, scale, shift, scale if normalise is None else normalise, out,
        problem.n, problem.h, problem.w, problem.k, *problem.convolved, p, q, strips, config.rows, 7, 3,
        0 if problem.ceil_mode else 1, n_stride, h_stride, w_stride, c_stride,
        weight.stride(0), weight.stride(3) // problem.c,
    )  # fmt: skip
    return Launch(_stem, (programs(problem, config.block_m, config.block_n, config.rows),), args, options)
