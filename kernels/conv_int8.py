"""conv_int8: convolution of bytes with an int8 weight, its residual, ReLU and one rounding; kernels and launch.

    sum[m, k] = offset[k] + sum over (r, s, c) of (x[pixel m at tap (r, s), c] - 128) * weight[k, r, s, c]    in int32
    y[m, k] = act(sum[m, k] * scale[k] + shift[k] + residual[m, k] * residual_scale)                        in float32
    out[m, k] = clamp(round half to even(y), low, high) + zero                 as uint8; or y as floating point numbers

Floor: as conv_bn_act's, with a byte for each element and the double rate of products. Forms and tiles are those of
conv_bn_act, too; here are the differences.

Matrix units multiply int8 by int8 in Triton, and x is stored as uint8, since that is what the CPU's instructions take
and zero, which the copy engine fills in around the image, then is the zero point behind a ReLU. So the highest bit of
each byte is turned over in registers, which takes 128 off, and ``offset`` puts 128 times the sum of a channel's weights
back on. That makes x the first operand: registers can be that only.

Sums are exact, and nothing after them depends on a compiler: products and sums of float32 are not contracted
(``enable_fp_fusion``), so that the interpreter, a GPU and plain torch give the same bits.

Traps: padding is the byte 0 in the form ``boxes``, so that needs x's zero point 0 or no padding. Steps of the product
are 32 bytes at least.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _tables, conv_bn_act
from ._language import dot_float8, real, relu, rounded, wait_for_earlier_kernels
from ._launch import Launch, aligned, cdiv, dividing_power_of_two, image_box, power_of_two, wide
from .gpus import GPU
from .problems import ConvInt8 as Problem

NAME = "conv_int8"

_SCALARS = ["ZERO", "LOW", "HIGH", "PADDING"]

#: 1.5 * 2 ** 23: float32 has no fraction from here on, so adding it rounds half to even, and the last bits of the sum
#: are the integer. Kernels may read it as a constant only.
_ROUNDS = tl.constexpr(12582912.0)
_ROUNDS_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _signed(x):
    """uint8 less 128, as int8; float8 as it is."""
    if x.dtype == tl.uint8:
        return x.to(tl.int8, bitcast=True) ^ -128
    else:
        return x


@triton.jit
def _zeros(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums of no product yet, of what x describes or points to: int32, of float8 float32."""
    if x.dtype == tl.uint8 or x.dtype == tl.pointer_type(tl.uint8):
        return tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    else:
        return tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)


@triton.jit
def _add_products(pixels, weights, sums):
    """sums + pixels @ weights, both of int8 or of float8."""
    if pixels.dtype == tl.int8:
        return tl.dot(pixels, weights, sums, out_dtype=tl.int32)
    else:
        return dot_float8(pixels, weights, sums)


@triton.jit
def _row(vector, channel, inside):
    """A vector at a tile's channels, ``inside`` K, as a row [1, BLOCK_N]; the row itself, if those are None."""
    if channel is not None:
        vector = tl.load(vector + channel, mask=inside, other=0)[None, :]
    return vector


@triton.jit
def _finish(
    sums, scale, shift, offset, channel, inside, residual, residual_scale, ZERO, LOW, HIGH,
    dtype: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """A tile of the output from its sums, in ``dtype``, which is uint8 if it is stored in steps.

    Args:
        sums: [BLOCK_M, BLOCK_N] int32. scale, shift, offset: as for ``_row``.
        residual: [BLOCK_M, BLOCK_N], or None. RESIDUAL: 0 none, 1 before the activation, 2 after it.
        LOW, HIGH: of the output in steps from its zero point ZERO; that is None for 0.
    """
    y = sums
    if offset is not None:
        y = (sums + _row(offset, channel, inside)).to(tl.float32)
    y = y * _row(scale, channel, inside)
    y = y + _row(shift, channel, inside)
    if RESIDUAL == 1:
        y = y + real(residual) * residual_scale
    if RELU:
        y = relu(y)
    if RESIDUAL == 2:
        y = y + real(residual) * residual_scale
    if dtype == tl.uint8:
        if not RELU or RESIDUAL == 2:  # LOW is 0 at most
            y = tl.maximum(y, LOW.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
        y = tl.minimum(y, HIGH.to(tl.float32))
        steps = (y + _ROUNDS).to(tl.int32, bitcast=True) - _ROUNDS_BITS
        if ZERO is not None:
            steps += ZERO
        return steps.to(tl.uint8)
    return rounded(y, dtype)


@triton.jit
def _box(
    tile, x, weight, scale, shift, offset, residual, out, K, TILES_P, TILES_Q, PAD_H, PAD_W, residual_scale, ZERO, LOW,
    HIGH, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDED: tl.constexpr, RELU: tl.constexpr,
    RESIDUAL: tl.constexpr, BOX_N: tl.constexpr, BOX_P: tl.constexpr, BOX_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of _boxes, whose arguments these are: the ``tile % tiles_n``-th channels of the next box of pixels."""
    BLOCK_M: tl.constexpr = BOX_N * BOX_P * BOX_Q
    tiles_n = tl.cdiv(K, BLOCK_N)
    k = (tile % tiles_n) * BLOCK_N
    box = tile // tiles_n
    q = (box % TILES_Q) * BOX_Q
    p = (box // TILES_Q % TILES_P) * BOX_P
    n = (box // (TILES_Q * TILES_P)) * BOX_N
    sums = _zeros(x, BLOCK_M, BLOCK_N)
    for step in range(0, R * S * C // BLOCK_K):
        tap = step // (C // BLOCK_K)
        c = step % (C // BLOCK_K) * BLOCK_K
        h = tap // S - PAD_H
        w = tap % S - PAD_W
        if STRIDED:
            # Row 2 p + h lies in row pair p + floor(h / 2), at its parity; columns alike.
            pixels = x.load([n, p + (h >> 1), h & 1, q + (w >> 1), (w & 1) * C + c])
        else:
            pixels = x.load([n, p + h, q + w, c])
        pixels = _signed(pixels.reshape(BLOCK_M, BLOCK_K))
        sums = _add_products(pixels, weight.load([k, step * BLOCK_K]).T, sums)
    channel = k + tl.arange(0, BLOCK_N)
    inside = channel < K
    added = None
    if RESIDUAL:
        added = residual.load([n, p, q, k]).reshape(BLOCK_M, BLOCK_N)
    y = _finish(
        sums, scale, shift, offset, channel, inside, added, residual_scale, ZERO, LOW, HIGH, out.dtype, RELU, RESIDUAL
    )  # fmt: skip
    out.store([n, p, q, k], y.reshape(BOX_N, BOX_P, BOX_Q, BLOCK_N))


@triton.jit(do_not_specialize=["TILES_P", "TILES_Q", "PAD_H", "PAD_W", *_SCALARS[:3], "TILES"])
def _boxes(
    x,  # descriptor of [N, H, W, C], with stride 2 of [N, H/2, 2, W/2, 2 C]
    weight,  # descriptor of [K, R * S * C]
    scale,  # [K] float32
    shift,  # [K] float32
    offset,  # [K] int32
    residual,  # descriptor of [N, P, Q, K]
    out,  # descriptor of [N, P, Q, K]
    K,
    TILES_P,
    TILES_Q,
    PAD_H,
    PAD_W,
    residual_scale,
    ZERO,
    LOW,
    HIGH,
    TILES,  # how many there are
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDED: tl.constexpr,  # whether the stride is 2
    RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_P: tl.constexpr,
    BOX_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PERSISTENT: tl.constexpr = False,  # whether the programs take the tiles in turn; else each has one
):
    wait_for_earlier_kernels()
    if not PERSISTENT:
        _box(
            tl.program_id(0), x, weight, scale, shift, offset, residual, out, K, TILES_P, TILES_Q, PAD_H, PAD_W,
            residual_scale, ZERO, LOW, HIGH, C, R, S, STRIDED, RELU, RESIDUAL, BOX_N, BOX_P, BOX_Q, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        # Made one loop with that of the steps, so that a tile's last copies and products stand beside the next's first.
        for tile in tl.range(tl.program_id(0), TILES, tl.num_programs(0), flatten=True):
            _box(
                tile, x, weight, scale, shift, offset, residual, out, K, TILES_P, TILES_Q, PAD_H, PAD_W,
                residual_scale, ZERO, LOW, HIGH, C, R, S, STRIDED, RELU, RESIDUAL, BOX_N, BOX_P, BOX_Q, BLOCK_N,
                BLOCK_K,
            )  # fmt: skip


@triton.jit(do_not_specialize=["PIXELS", *_SCALARS[:3]])
def _resident(
    x,  # descriptor of [PIXELS, C]
    weight,  # descriptor of [K, C]
    scale,  # [K] float32
    shift,  # [K] float32
    offset,  # [K] int32
    residual,  # descriptor of [PIXELS, K]
    out,  # descriptor of [PIXELS, K]
    K,
    PIXELS,
    residual_scale,
    ZERO,
    LOW,
    HIGH,
    RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    wait_for_earlier_kernels()
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    k = (pid % tiles_n) * BLOCK_N
    channel = k + tl.arange(0, BLOCK_N)
    # Outside of the loop, or they would be copied into shared memory again for each tile.
    inside = channel < K
    scale, shift = _row(scale, channel, inside), _row(shift, channel, inside)
    if offset is not None:
        offset = _row(offset, channel, inside)
    weights = weight.load([k, 0])
    every = tl.num_programs(0) // tiles_n * BLOCK_M
    # Stages that are given here, not as an option, count for the residual too, which no product takes.
    for m in tl.range(pid // tiles_n * BLOCK_M, PIXELS, every, num_stages=STAGES):
        pixels = _signed(x.load([m, 0]))
        added = None
        if RESIDUAL:
            added = residual.load([m, k])
        sums = _add_products(pixels, weights.T, _zeros(x, BLOCK_M, BLOCK_N))
        y = _finish(
            sums, scale, shift, offset, None, None, added, residual_scale, ZERO, LOW, HIGH, out.dtype, RELU, RESIDUAL
        )
        out.store([m, k], y)


@triton.jit(do_not_specialize=[*conv_bn_act._SIZES, *_SCALARS])
def _gather(
    x,  # [N, H, W, C]
    weight,  # [K, R, S, C]
    scale,  # [K] float32
    shift,  # [K] float32
    offset,  # [K] int32
    residual,  # [N, P, Q, K]
    out,  # [N, P, Q, K]
    N,
    H,
    W,
    C,
    K,
    P,
    Q,
    STRIDE_H,
    STRIDE_W,
    PAD_H,
    PAD_W,
    DILATION_H,
    DILATION_W,
    residual_scale,
    ZERO,
    LOW,
    HIGH,
    PADDING,  # what lies around the image: x's zero point
    R: tl.constexpr,
    S: tl.constexpr,
    RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_earlier_kernels()
    tiles_n = tl.cdiv(K, BLOCK_N)
    pixels = N * P * Q
    if WIDE:
        pixels = N.to(tl.int64) * P * Q
    pid = tl.program_id(0)
    tile_m = pid // tiles_n
    if WIDE:
        tile_m = tile_m.to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_m = m < pixels
    n = m // (P * Q)
    row = (m // Q) % P * STRIDE_H - PAD_H
    column = m % Q * STRIDE_W - PAD_W
    base = ((n * H + row) * W + column) * C
    channel = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_k = channel < K
    taps = weight + channel * (R * S * C)
    # Of float8, which no integer becomes.
    NOTHING: tl.constexpr = 0.0 if weight.dtype.element_ty == tl.float8e4nv else 0
    NO_RESIDUAL: tl.constexpr = 0.0 if residual.dtype.element_ty == tl.float8e4nv else 0
    sums = _zeros(x, BLOCK_M, BLOCK_N)
    blocks_c = tl.cdiv(C, BLOCK_K)
    for step in range(0, R * S * blocks_c):
        tap = step // blocks_c
        h = tap // S * DILATION_H
        w = tap % S * DILATION_W
        c = (step % blocks_c) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = c < C
        valid = inside_m & (row + h >= 0) & (row + h < H) & (column + w >= 0) & (column + w < W)
        # What lies behind the last channel meets weights of 0.
        a = tl.load(
            x + (base + (h * W + w) * C)[:, None] + c[None, :], mask=valid[:, None] & inside[None, :], other=PADDING
        )
        b = tl.load(taps[None, :] + (tap * C + c)[:, None], mask=inside[:, None] & inside_k[None, :], other=NOTHING)
        sums = _add_products(_signed(a), b, sums)
    to = m[:, None] * K + channel[None, :]
    mask = inside_m[:, None] & inside_k[None, :]
    added = None
    if RESIDUAL:
        added = tl.load(residual + to, mask=mask, other=NO_RESIDUAL)
    y = _finish(
        sums, scale, shift, offset, channel, inside_k, added, residual_scale, ZERO, LOW, HIGH, out.dtype.element_ty,
        RELU, RESIDUAL,
    )  # fmt: skip
    tl.store(out + to, y, mask=mask)


@dataclass(frozen=True)
class Config:
    """A launch choice: tile sizes, warps, pipeline stages, and whether the copy engine fetches the pixels in boxes.

    Attributes:
        persistent: how many programs take all the tiles in turn, in the form boxes; 0: a program for each tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    boxes: bool
    persistent: int = 0

    def resident(self, problem: Problem) -> bool:
        """Return whether the form is ``resident``: persistent, with all of a plain product's depth in one step."""
        return self.persistent > 0 and self.block_k == problem.c and conv_bn_act._plain(problem)

    def programs(self, problem: Problem, gpu: GPU) -> int:
        """Return how many programs the choice means a multiprocessor to hold at once: two hide each other's ends.

        In the form ``resident`` as many as there are registers for: its programs are nearly all end.
        """
        twice = _sums_twice(problem)
        most = 1 if self.block_m * self.block_n * (1 + twice) > 128 * 128 else 2
        if self.resident(problem) and self.block_m * self.block_n == 64 * 64:
            most = (3 if problem.residual or problem.c > 256 else 4) - (twice and problem.c > 128)
        return min(most, gpu.shared_memory_per_multiprocessor // (self.shared_memory(problem) + 1024))

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of shared memory a program takes at most: the operands of every stage, or the output tile.

        A persistent program has both at once. Pixels that are in registers leave their stage to the next ones.
        """
        tile = self.block_m * self.block_n * problem.out_itemsize
        if self.resident(problem):
            ahead = self.block_m * self.block_k + (tile if problem.residual else 0)
            return self.block_n * self.block_k + (self.num_stages - 1) * ahead + tile
        operands = (self.block_m + self.block_n) * self.block_k * self.num_stages
        if self.persistent:
            return operands + tile * (2 if problem.residual else 1)
        return max(operands, tile if self.boxes else 0)

    def gathered(self) -> Config:
        """Return the choice for the form ``gather`` if an address keeps the copy engine from this one's tensors."""
        steps = min(self.block_k, 128), min(self.num_stages, 4)
        return Config(min(self.block_m, 128), min(self.block_n, 128), steps[0], self.num_warps, steps[1], False)


def _sums_twice(problem: Problem) -> bool:
    """Return whether sums of some products stand beside the whole ones in registers, as those of float8 do."""
    return problem.precision == "fp8"


def supports(problem: Problem, gpu: GPU) -> bool:
    """Return whether the kernel computes the problem: one group, since others leave the matrix units idle."""
    return problem.groups == 1


def supports_boxes(problem: Problem, gpu: GPU) -> bool:
    """Return whether the form ``boxes`` can compute the problem on the GPU, as far as shapes tell."""
    plain = problem.groups == 1 and problem.dilation == (1, 1) and problem.c % 32 == 0 and problem.k % 16 == 0
    even = problem.h % 2 == 0 and problem.w % 2 == 0
    strides = problem.stride == (1, 1) or (problem.stride == (2, 2) and even)
    zeros = not problem.shifted or problem.padding == (0, 0)
    return gpu.capability >= 90 and plain and strides and zeros


def _widest_k(problem: Problem, boxes: bool) -> int:
    """Return the longest sensible step through the product: 128 bytes, or all of a short one."""
    return dividing_power_of_two(problem.c, 128) if boxes else power_of_two(problem.c, 32, 128)


def _most_stages(problem: Problem, block_k: int, boxes: bool) -> int:
    return min(8, math.prod(problem.kernel) * problem.c // block_k) if boxes else 4


def _fits(config: Config, problem: Problem, gpu: GPU) -> bool:
    return config.shared_memory(problem) <= gpu.shared_memory


def heuristic(problem: Problem, gpu: GPU) -> Config:
    """Return a launch choice from the shape alone."""
    return _keeping_weights(problem, gpu) or _wide(problem, gpu) or _tiled(problem, gpu)


def _hopper(problem: Problem, gpu: GPU) -> bool:
    """Return whether the forms and tiles made for Hopper's warp groups can compute the problem."""
    return gpu.capability == 90 and supports_boxes(problem, gpu)


def _takes_resident(problem: Problem) -> bool:
    """Return whether a step can be the whole depth of the problem: a power of two of channels, at most 512.

    Of float8 256: more partial sums wait for each other.
    """
    most = 256 if _sums_twice(problem) else 512
    return conv_bn_act._plain(problem) and problem.c & (problem.c - 1) == 0 and problem.c <= most


def _in_turn(config: Config, problem: Problem, gpu: GPU) -> Config | None:
    """Return the choice with as many programs as the GPU holds at once; None if that many have no tiles to share."""
    if not _fits(config, problem, gpu):
        return None
    config = replace(config, persistent=gpu.multiprocessors * config.programs(problem, gpu))
    return config if 0 < blocks(problem, config) < blocks(problem, replace(config, persistent=0)) else None


def _keeping_weights(problem: Problem, gpu: GPU) -> Config | None:
    """Return the form ``resident`` for a plain product of which every program has at least four tiles."""
    if not _hopper(problem, gpu) or not _takes_resident(problem):
        return None
    config = Config(64, 64, problem.c, 4, 3, True, 1)
    if config.programs(problem, gpu) < 2:  # nothing would hide a tile's end
        return None
    config = _in_turn(config, problem, gpu)
    if config is None or blocks(problem, replace(config, persistent=0)) < 4 * blocks(problem, config):
        return None
    return config


#: Tiles, pixels by channels, of as many sums as two warp groups hold in registers. Tiles of 128 x 128 read a third more
#: through the level-2 cache. Of two alike that with fewer pixels: those pass through registers.
_WIDE = {64: 512, 128: 256, 256: 128}


def _wide(problem: Problem, gpu: GPU) -> Config | None:
    """Return a tile of twice the usual size for a deep product, if at most a quarter of the GPU is idle then."""
    # Beside the sums of 256 channels a residual has no registers left.
    twice = _sums_twice(problem)
    block_n = power_of_two(problem.k, 64, 128 if problem.residual or twice else 256)
    window = problem.kernel != (1, 1)
    if not _hopper(problem, gpu) or (not window and (block_n == 64 or problem.residual)):
        return None
    block_k = _widest_k(problem, True)
    steps = math.prod(problem.kernel) * problem.c // block_k
    config = Config(_WIDE[block_n] // (1 + twice), block_n, block_k, 8, min(steps, 6), True)
    count = blocks(problem, config)
    # In one round the tiles count as they are, those beyond the image too; in several, what they compute does.
    useful = problem.pixels / config.block_m * cdiv(problem.k, block_n) if count > gpu.multiprocessors else count
    if useful < 0.75 * cdiv(count, gpu.multiprocessors) * gpu.multiprocessors:
        return None
    # A program of several tiles would wait for a residual at the end of each, as programs of one do.
    in_turn = None if problem.residual else _in_turn(replace(config, num_stages=3, persistent=1), problem, gpu)
    if in_turn is not None or steps < 4:
        return in_turn
    while not _fits(config, problem, gpu):
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def _tiled(problem: Problem, gpu: GPU) -> Config:
    """Return the usual choice: the largest tile, up to 128 x 128, that still gives every multiprocessor work."""
    boxes = supports_boxes(problem, gpu)
    block_k = _widest_k(problem, boxes)
    # Warp products take more registers beside the sums, and so does a residual if the product is one step.
    one_step = problem.residual and math.prod(problem.kernel) * problem.c == block_k
    whole = boxes and gpu.capability == 90 and not one_step
    block_m = 64 if _sums_twice(problem) else 128
    block_n = power_of_two(problem.k, 32, 128 if whole else 64)
    while cdiv(problem.pixels, block_m) * cdiv(problem.k, block_n) < gpu.multiprocessors:
        if block_m > 64 and block_m >= block_n:
            block_m //= 2
        elif block_n > 32:
            block_n //= 2
        else:
            break
    # One warp group has registers for the sums of 128 x 128 and x's part of a step, but for no residual besides.
    warps = 8 if block_m * block_n >= 128 * 128 and problem.residual else 4
    config = Config(block_m, block_n, block_k, warps, _most_stages(problem, block_k, boxes), boxes)
    while config.num_stages > 2 and config.programs(problem, gpu) < 2:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


_TILES = ((64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128), (128, 256), (256, 128))


def candidates(problem: Problem, gpu: GPU) -> Iterator[Config]:
    """Every launch choice worth measuring: within the GPU's shared memory, tiles no wider than the problem."""
    yield from _large(problem, gpu)
    for boxes in (True, False) if supports_boxes(problem, gpu) else (False,):
        block_k = _widest_k(problem, boxes)
        most = _most_stages(problem, block_k, boxes)
        for block_m, block_n in _TILES:
            if block_n > power_of_two(problem.k, 32, 256) or block_m > power_of_two(problem.pixels, 64, 256):
                continue
            for num_warps in (4, 8):
                if not 8 <= block_m * block_n // (num_warps * 32) <= 128:
                    continue
                for num_stages in sorted({min(stages, most) for stages in ((2, 3, 4, 8) if boxes else (2, 3, 4))}):
                    config = Config(block_m, block_n, block_k, num_warps, num_stages, boxes)
                    if _fits(config, problem, gpu):
                        yield config


def _large(problem: Problem, gpu: GPU) -> Iterator[Config]:
    """The forms and tiles for many pixels that are worth measuring: those of programs that take several tiles."""
    if not _hopper(problem, gpu):
        return
    block_k = _widest_k(problem, True)
    shapes = [(64, 64, problem.c, 4), (64, 128, problem.c, 4)] if _takes_resident(problem) and problem.c <= 256 else []
    if _takes_resident(problem) and problem.c > 256:
        shapes = [(64, 64, problem.c, 4), (64, 128, problem.c, 8)]
    if not problem.residual:  # it would be waited for at the end of each tile
        shapes += [(m, n, block_k, 8) for n, m in _WIDE.items()]
        shapes += [(256, 64, block_k, 4), (128, 128, block_k, 4)]
    for block_m, block_n, step, num_warps in shapes:
        if block_n > power_of_two(problem.k, 64, 256):
            continue
        for num_stages in (3, 4):
            config = _in_turn(Config(block_m, block_n, step, num_warps, num_stages, True, 1), problem, gpu)
            if config is not None:
                yield config
    if problem.kernel != (1, 1) and problem.k <= 64 and problem.pixels >= 512:
        config = Config(512, 64, block_k, 8, min(4, _most_stages(problem, block_k, True)), True)
        yield from (each for each in (config,) if _fits(each, problem, gpu))


@_tables.remembers
@lru_cache(maxsize=4096)
def choose(problem: Problem, gpu: GPU) -> Config:
    """Return the measured choice if there is one that fits, else the heuristic's."""
    config = _tables.measured(NAME, problem.key(), gpu.name, Config)
    return config if config is not None and takes(config, problem, gpu) else heuristic(problem, gpu)


def takes(config: Config, problem: Problem, gpu: GPU) -> bool:
    """Return whether the kernel computes the problem with this choice on ``gpu``."""
    boxes = supports_boxes(problem, gpu) and problem.c % config.block_k == 0
    if config.resident(problem) and not (_takes_resident(problem) and blocks(problem, config)):
        return False
    if config.persistent and not config.boxes:
        return False
    return _fits(config, problem, gpu) and config.block_k >= 32 and (boxes or not config.boxes)


def tiles(problem: Problem, config: Config, boxes: bool) -> int:
    """Return how many tiles of pixels cover the output."""
    if not boxes:
        return cdiv(problem.pixels, config.block_m)
    (n, _, _), (_, p, q) = conv_bn_act._box_sizes(problem)
    return math.prod(map(cdiv, (n, p, q), image_box(n, p, q, config.block_m)))


def blocks(problem: Problem, config: Config) -> int:
    """Return how many programs a launch has: one for each tile, or as many as take them in turn.

    In the form ``resident`` all columns of tiles have equally many; 0 if there are not that many programs.
    """
    columns, rows = cdiv(problem.k, config.block_n), tiles(problem, config, config.boxes)
    if config.resident(problem):
        return min(config.persistent // columns, rows) * columns
    return min(config.persistent or rows * columns, rows * columns)


def launch(
    x: Any,
    weight: Any,
    scale: Any,
    shift: Any,
    offset: Any,
    residual: Any,
    out: Any,
    problem: Problem,
    config: Config,
    *,
    residual_scale: float = 1.0,
    activation: str = "relu",
    residual_after_activation: bool = False,
    zero_point: float = 0,
    out_zero_point: int = 0,
    largest: int = 255,
) -> Launch:
    """Return the launch that fills ``out``.

    Args:
        x: [N, C, H, W] uint8, residual and out: [N, K, P, Q] of one dtype, all dense channels_last.
        weight: [K, C, R, S] int8, dense channels_last.
        scale, shift: [K] float32. offset: [K] int32, ``(128 - zero_point)`` times the sum of the channel's weights.
        config: for the form ``boxes`` every tensor must begin at a multiple of 16 bytes; where one does not, the same
            tile is fetched by the form ``gather``.
        residual_scale: of the residual, in steps of ``out`` if that is uint8.
        zero_point, out_zero_point: of x and out, 0.0 of float8. largest: what out is clipped to. All of uint8.
    """
    where = 0 if residual is None else 2 if residual_after_activation else 1
    tensors = (x, weight, scale, shift, offset, residual, out)
    relu = activation == "relu"
    # Behind a ReLU networks have the zero point 0, and what would add that is left out of its kernels.
    zero = None if relu and out_zero_point == 0 else out_zero_point
    scalars = (float(residual_scale), zero, -out_zero_point, largest - out_zero_point)
    flags = {"RELU": relu, "RESIDUAL": where}
    if config.boxes and aligned(x, weight, residual, out):
        make = _launch_resident if config.resident(problem) else _launch_boxes
        return make(tensors, scalars, problem, config, flags)
    plain = config.gathered() if config.boxes else config
    return _launch_gather(tensors, (*scalars, zero_point), problem, plain, flags)


def _options(config: Config) -> dict[str, Any]:
    return {
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": False,
    }


def _launch_boxes(
    tensors: tuple[Any, ...], scalars: tuple[Any, ...], problem: Problem, config: Config, flags: dict[str, Any]
) -> Launch:
    x, weight, *vectors, residual, out = tensors
    given = {**flags, **_options(config)}
    args, options = conv_bn_act.boxed(x, weight, tuple(vectors), residual, out, problem, config, given)
    if config.persistent:
        options["PERSISTENT"] = True
    every = blocks(problem, replace(config, persistent=0))
    return Launch(_boxes, (blocks(problem, config),), (*args, *scalars, every), options)


def _launch_resident(
    tensors: tuple[Any, ...], scalars: tuple[Any, ...], problem: Problem, config: Config, flags: dict[str, Any]
) -> Launch:
    x, weight, *vectors, residual, out = tensors
    c, k, pixels = problem.c, problem.k, problem.pixels
    outputs = [pixels, k], [k, 1], [config.block_m, config.block_n]
    written = TensorDescriptor(out, *outputs)
    args = (
        TensorDescriptor(x, [pixels, c], [c, 1], [config.block_m, c]),
        TensorDescriptor(weight, [k, c], [c, 1], [config.block_n, c]),
        *vectors,
        written if residual is None else TensorDescriptor(residual, *outputs),
        written,
        k,
        pixels,
        *scalars,
    )
    options = {**flags, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "STAGES": config.num_stages}
    options |= {"num_warps": config.num_warps, "enable_fp_fusion": False}
    return Launch(_resident, (blocks(problem, config),), args, options)


def _launch_gather(
    tensors: tuple[Any, ...], scalars: tuple[Any, ...], problem: Problem, config: Config, flags: dict[str, Any]
) -> Launch:
    x, weight, scale, shift, offset, residual, out = tensors
    kernel_r, kernel_s = problem.kernel
    args = (
        x, weight, scale, shift, offset, out if residual is None else residual, out,
        problem.n, problem.h, problem.w, problem.c, problem.k, *problem.output, *problem.stride, *problem.padding,
        *problem.dilation, *scalars,
    )  # fmt: skip
    options = {"R": kernel_r, "S": kernel_s, **flags, **_options(config)}
    options |= {"WIDE": wide(x, out, weight), "BLOCK_M": config.block_m}
    return Launch(_gather, (blocks(problem, config),), args, options)
