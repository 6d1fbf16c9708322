"""conv_bn_act: implicit-GEMM convolution with scale, shift, residual and ReLU in its epilogue; kernels and launch.

    out[m, k] = act(sum over (r, s, c) of x[pixel m at tap (r, s), c] * weight[k, r, s, c] * scale[k] + shift[k]
                    + residual[m, k])

Floor: x read once, out written once, residual read once; 2 * N * P * Q * K * R * S * C / groups operations. One program
computes a tile of BLOCK_M pixels by BLOCK_N channels; neighbouring programs share the pixels, so that x comes from
memory once and then from the level-2 cache, where all the weights stay too.

Three forms:
    boxes   for GPUs with a copy engine (capability 9.0 and up), one group, no dilation, strides 1 and 2: the pixels
            of a tile are a box [images, rows, columns] of the output, and each tap is one copy of that box, moved by
            (r, s). What lies outside the image the copy engine fills with zeros, and that is the padding: no masks.
            The product is transposed, weights times pixels, which lets both come from shared memory on Hopper. Programs
        may be fewer than tiles and take them in turn; the first copies of the next tile are then on their way while
        one is finished. Or a tile is three boxes, which all meet the weights of a step: 384 pixels.
    resident    for such a plain product with a residual and few channels: a program keeps the weights of its output
        channels in shared memory and takes tiles of pixels in turn. A tile is one step, all of it copied ahead, the
        residual too: in a loop of steps Triton would wait for that at the end of each tile.
    gather  for everything else, with masked loads from computed addresses: any stride, dilation, groups, channel count.

Where few programs would each walk over many steps, several ``shares`` of them divide the steps of a tile in the form
boxes. Each leaves its sums in float32, and a second launch adds them up in order and finishes them: no atomics, so the
same bits at each run and at any place of a batch.

In training (``launch_raw``) the output is the convolution alone, to be normalised later. Two options save passes over
memory then, each of one read of a tensor: the epilogue can leave the moments of its tile's rounded outputs, for
batch_norm_act to merge; the form ``gather`` can normalise x on its way in, which was never written normalised.

Traps: with stride 2 the box is taken from x seen as [N, H/2, 2, W/2, 2 C], which needs an even H and W; a box may not
run over the last channel of a tap, since the next tap's weights would meet it: BLOCK_K divides C. ptxas lets Hopper's
products overlap only if it can see that they will; ``make kernels`` looks whether it did.
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

from . import _tables
from ._language import dot, relu, rounded, wait_for_earlier_kernels
from ._launch import (
    ITEMSIZE,
    WIDE_FROM,
    Launch,
    aligned,
    cdiv,
    dividing_power_of_two,
    dot_precision,
    image_box,
    power_of_two,
    wide,
)
from .batch_norm_act import moments_size
from .gpus import GPU
from .problems import ConvBNAct as Problem

NAME = "conv_bn_act"

_SIZES = ["N", "H", "W", "P", "Q", "STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W", "DILATION_H", "DILATION_W"]


@triton.jit
def _normalised(a, valid, scale, shift, channel, inside):
    """relu(a * scale + shift) in a's dtype; what is not valid is padding, which stays 0 behind the activation."""
    y = a.to(tl.float32) * tl.load(scale + channel, mask=inside, other=0.0)[None, :]
    y = relu(y + tl.load(shift + channel, mask=inside, other=0.0)[None, :])
    return rounded(tl.where(valid, y, 0.0), a.dtype)


@triton.jit
def _finish(
    y, scale, shift, channel, inside, residual, dtype: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr
):
    """A tile of the output from its sums, rounded to ``dtype``.

    Args:
        y: [BLOCK_M, BLOCK_N] float32. scale, shift: None, or [K] float32 at the tile's channels, ``inside`` K.
        residual: [BLOCK_M, BLOCK_N], or None. RESIDUAL: 0 none, 1 before the activation, 2 after it.
    """
    if scale is not None:
        y = y * tl.load(scale + channel, mask=inside, other=0.0)[None, :]
        y += tl.load(shift + channel, mask=inside, other=0.0)[None, :]
    return _activated(y, residual, dtype, RELU, RESIDUAL)


@triton.jit
def _activated(y, residual, dtype: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr):
    """What _finish does behind scale and shift."""
    if RESIDUAL == 1:
        y += residual.to(tl.float32)
    if RELU:
        y = relu(y)
    if RESIDUAL == 2:
        y += residual.to(tl.float32)
    return rounded(y, dtype)


@triton.jit
def _leave_moments(y, valid, workspace, index, slices, channel, inside, K, counts):
    """Leave the moments of a tile's rows for _merge_moments of batch_norm_act: sums, squared deviations, counts.

    Args:
        y: [BLOCK_M, BLOCK_N], rounded as it is stored. valid: [BLOCK_M], the rows that there are.
        workspace: float32: three planes [slices, K], and [slices] counts.
        counts: whether this program, of those of its rows, writes the count.
    """
    count = tl.sum(valid.to(tl.float32), axis=0)
    y = y.to(tl.float32)
    mean = tl.sum(tl.where(valid[:, None], y, 0.0), axis=0) / count
    deviation = tl.where(valid[:, None], y - mean[None, :], 0.0)
    rest = tl.sum(deviation, axis=0)  # what the mean was rounded by
    squares = tl.sum(deviation * deviation, axis=0) - rest * rest / count
    rest = tl.where(tl.abs(mean) < float("inf"), rest, 0.0)
    total = mean.to(tl.float64) * count.to(tl.float64) + rest.to(tl.float64)
    high = total.to(tl.float32)
    low = tl.where(tl.abs(high) < float("inf"), total - high, 0.0)
    to = workspace + index * K + channel
    tl.store(to, high, mask=inside)
    tl.store(to + slices * K, low.to(tl.float32), mask=inside)
    tl.store(to + 2 * slices * K, squares, mask=inside)
    if counts:
        tl.store(workspace + 3 * slices * K + index, count)


@triton.jit(do_not_specialize=_SIZES)
def _gather(
    x,  # [N, H, W, C]
    weight,  # [K, R, S, C / groups]
    scale,  # [K] float32
    shift,  # [K] float32
    residual,  # [N, P, Q, K]
    out,  # [N, P, Q, K]
    N,
    H,
    W,
    C,
    K,
    P,
    Q,
    GROUP_C,  # C / groups
    GROUP_K,  # K / groups
    STRIDE_H,
    STRIDE_W,
    PAD_H,
    PAD_W,
    DILATION_H,
    DILATION_W,
    R: tl.constexpr,
    S: tl.constexpr,
    PADDED: tl.constexpr,  # whether a tap may lie outside the image
    FLAT: tl.constexpr,  # whether one block of the product runs over several taps: for few channels
    RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,  # 0 none, 1 before the activation, 2 after it
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    scale_in=None,  # [C] float32: x is relu(x * scale_in + shift_in) in x's place
    shift_in=None,  # [C] float32
    workspace=None,  # for the moments of out's tiles
):
    wait_for_earlier_kernels()
    tiles_n = tl.cdiv(GROUP_K, BLOCK_N)
    pixels = N * P * Q
    if WIDE:
        pixels = N.to(tl.int64) * P * Q
    tiles_m = tl.cdiv(pixels, BLOCK_M)
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    tile_m = (pid // tiles_n) % tiles_m
    group = pid // (tiles_n * tiles_m)
    if WIDE:
        tile_m = tile_m.to(tl.int64)
        group = group.to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_m = m < pixels
    n = m // (P * Q)
    row = (m // Q) % P * STRIDE_H - PAD_H
    column = m % Q * STRIDE_W - PAD_W
    base = ((n * H + row) * W + column) * C + group * GROUP_C
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_k = k < GROUP_K
    channel = group * GROUP_K + k
    taps = weight + channel * (R * S * GROUP_C)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if FLAT:
        for start in range(0, R * S * GROUP_C, BLOCK_K):
            position = start + tl.arange(0, BLOCK_K)
            inside = position < R * S * GROUP_C
            tap = position // GROUP_C
            h = tap // S * DILATION_H
            w = tap % S * DILATION_W
            mask = inside_m[:, None] & inside[None, :]
            if PADDED:
                at_h = row[:, None] + h[None, :]
                at_w = column[:, None] + w[None, :]
                mask = mask & (at_h >= 0) & (at_h < H) & (at_w >= 0) & (at_w < W)
            offset = (h * W + w) * C + position % GROUP_C
            a = tl.load(x + base[:, None] + offset[None, :], mask=mask, other=0.0)
            if scale_in is not None:
                a = _normalised(a, mask, scale_in, shift_in, group * GROUP_C + position % GROUP_C, inside)
            b = tl.load(taps[None, :] + position[:, None], mask=inside[:, None] & inside_k[None, :], other=0.0)
            accumulator = dot(a, b, accumulator, PRECISION)
    else:
        blocks_c = tl.cdiv(GROUP_C, BLOCK_K)
        for step in range(0, R * S * blocks_c):
            tap = step // blocks_c
            h = tap // S * DILATION_H
            w = tap % S * DILATION_W
            c = (step % blocks_c) * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = c < GROUP_C
            valid = inside_m
            if PADDED:
                at_h = row + h
                at_w = column + w
                valid = valid & (at_h >= 0) & (at_h < H) & (at_w >= 0) & (at_w < W)
            a = tl.load(
                x + (base + (h * W + w) * C)[:, None] + c[None, :], mask=valid[:, None] & inside[None, :], other=0.0
            )
            if scale_in is not None:
                mask = valid[:, None] & inside[None, :]
                a = _normalised(a, mask, scale_in, shift_in, group * GROUP_C + c, inside)
            b = tl.load(
                taps[None, :] + (tap * GROUP_C + c)[:, None], mask=inside[:, None] & inside_k[None, :], other=0.0
            )
            accumulator = dot(a, b, accumulator, PRECISION)
    offset = m[:, None] * K + channel[None, :]
    mask = inside_m[:, None] & inside_k[None, :]
    added = None
    if RESIDUAL:
        added = tl.load(residual + offset, mask=mask, other=0.0)
    y = _finish(accumulator, scale, shift, channel, inside_k, added, out.dtype.element_ty, RELU, RESIDUAL)
    tl.store(out + offset, y, mask=mask)
    if workspace is not None:
        counts = (tile_n == 0) & (group == 0)
        _leave_moments(y, inside_m, workspace, tile_m, tiles_m, channel, inside_k, K, counts)


@triton.jit
def _box(
    tile, x, weight, scale, shift, residual, out, K, TILES_P, TILES_Q, PAD_H, PAD_W, C: tl.constexpr, R: tl.constexpr,
    S: tl.constexpr, STRIDED: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BOX_N: tl.constexpr, BOX_P: tl.constexpr, BOX_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    N, P, Q, workspace, SHARES: tl.constexpr,
):  # fmt: skip
    """One tile of _boxes, whose arguments these are: the ``tile % tiles_n``-th channels of the next box of pixels.

    With several shares ``tile`` counts the shares of each tile, one behind the other.
    """
    BLOCK_M: tl.constexpr = BOX_N * BOX_P * BOX_Q
    STEPS: tl.constexpr = R * S * C // BLOCK_K // SHARES
    share = 0
    if SHARES > 1:
        share = tile % SHARES
        tile = tile // SHARES
    tiles_n = tl.cdiv(K, BLOCK_N)
    k = (tile % tiles_n) * BLOCK_N
    box = tile // tiles_n
    q = (box % TILES_Q) * BOX_Q
    p = (box // TILES_Q % TILES_P) * BOX_P
    n = (box // (TILES_Q * TILES_P)) * BOX_N
    # Transposed, [channels, pixels]: the weights, which come as they are stored, are the first operand, which is read
    # from shared memory only if nothing stands between its load and the product; the second always is.
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step_of_share in range(0, STEPS):
        step = share * STEPS + step_of_share
        tap = step // (C // BLOCK_K)
        c = step % (C // BLOCK_K) * BLOCK_K
        h = tap // S - PAD_H
        w = tap % S - PAD_W
        if STRIDED:
            # Row 2 p + h lies in row pair p + floor(h / 2), at its parity; columns alike.
            pixels = x.load([n, p + (h >> 1), h & 1, q + (w >> 1), (w & 1) * C + c])
        else:
            pixels = x.load([n, p + h, q + w, c])
        pixels = pixels.reshape(BLOCK_M, BLOCK_K)
        accumulator = dot(weight.load([k, step * BLOCK_K]), pixels.T, accumulator, PRECISION)
    channel = k + tl.arange(0, BLOCK_N)
    inside = channel < K
    added = None
    if RESIDUAL:
        added = residual.load([n, p, q, k]).reshape(BLOCK_M, BLOCK_N)
    y = _finish(accumulator.T, scale, shift, channel, inside, added, out.dtype, RELU, RESIDUAL)
    out.store([n, p, q, share * K + k], y.reshape(BOX_N, BOX_P, BOX_Q, BLOCK_N))
    if workspace is not None:
        pixel = tl.arange(0, BLOCK_M)
        valid = (n + pixel // (BOX_P * BOX_Q) < N) & (p + pixel // BOX_Q % BOX_P < P) & (q + pixel % BOX_Q < Q)
        slices = tl.cdiv(N, BOX_N) * TILES_P * TILES_Q
        _leave_moments(y, valid, workspace, box, slices, channel, inside, K, k == 0)


@triton.jit(do_not_specialize=["TILES_P", "TILES_Q", "PAD_H", "PAD_W", "TILES", "N", "P", "Q"])
def _boxes(
    x,  # descriptor of [N, H, W, C], with stride 2 of [N, H/2, 2, W/2, 2 C]
    weight,  # descriptor of [K, R * S * C]
    scale,  # [K] float32
    shift,  # [K] float32
    residual,  # descriptor of [N, P, Q, K]
    out,  # descriptor of [N, P, Q, K], with several shares of [N, P, Q, SHARES * K] in float32
    K,
    TILES_P,
    TILES_Q,
    PAD_H,
    PAD_W,
    TILES,  # how many there are
    C: tl.constexpr,  # with a length that ptxas does not know, it lets no product of the loop overlap another
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDED: tl.constexpr,  # whether the stride is 2
    RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_P: tl.constexpr,
    BOX_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PERSISTENT: tl.constexpr = False,  # whether the programs take the tiles in turn; else each has one
    N=None,  # out's sizes, which only the moments need
    P=None,
    Q=None,
    workspace=None,  # for the moments of out's boxes
    SHARES: tl.constexpr = 1,  # programs that divide the steps of a tile
):
    wait_for_earlier_kernels()
    if not PERSISTENT:
        _box(
            tl.program_id(0), x, weight, scale, shift, residual, out, K, TILES_P, TILES_Q, PAD_H, PAD_W, C, R, S,
            STRIDED, RELU, RESIDUAL, PRECISION, BOX_N, BOX_P, BOX_Q, BLOCK_N, BLOCK_K, N, P, Q, workspace, SHARES,
        )  # fmt: skip
    else:
        # Made one loop with that of the steps, so that a tile's last copies and products stand beside the next's first.
        for tile in tl.range(tl.program_id(0), TILES, tl.num_programs(0), flatten=True):
            _box(
                tile, x, weight, scale, shift, residual, out, K, TILES_P, TILES_Q, PAD_H, PAD_W, C, R, S,
                STRIDED, RELU, RESIDUAL, PRECISION, BOX_N, BOX_P, BOX_Q, BLOCK_N, BLOCK_K, N, P, Q, workspace, SHARES,
            )  # fmt: skip


@triton.jit
def _origin(box, TILES_P, TILES_Q, BOX_N: tl.constexpr, BOX_P: tl.constexpr, BOX_Q: tl.constexpr):
    """Where a box begins: image, row and column of the output. Not of _box, whose registers it would change."""
    q = (box % TILES_Q) * BOX_Q
    p = (box // TILES_Q % TILES_P) * BOX_P
    return (box // (TILES_Q * TILES_P)) * BOX_N, p, q


@triton.jit
def _pixels(x, n, p, q, h, w, c, C: tl.constexpr, STRIDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The box of x behind the one of the output at (n, p, q), for the tap (h, w), from channel c on: as in _box."""
    if STRIDED:
        pixels = x.load([n, p + (h >> 1), h & 1, q + (w >> 1), (w & 1) * C + c])
    else:
        pixels = x.load([n, p + h, q + w, c])
    return pixels.reshape(BLOCK_M, BLOCK_K).T


@triton.jit(do_not_specialize=["TILES_P", "TILES_Q", "PAD_H", "PAD_W"])
def _three_boxes(
    x, weight, scale, shift, residual, out, K, TILES_P, TILES_Q, PAD_H, PAD_W, C: tl.constexpr, R: tl.constexpr,
    S: tl.constexpr, STRIDED: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BOX_N: tl.constexpr, BOX_P: tl.constexpr, BOX_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As _boxes for each tile, which is three boxes, without a residual: a step's weights are read once for them."""
    wait_for_earlier_kernels()
    BLOCK_M: tl.constexpr = BOX_N * BOX_P * BOX_Q
    tiles_n = tl.cdiv(K, BLOCK_N)
    k = (tl.program_id(0) % tiles_n) * BLOCK_N
    box = tl.program_id(0) // tiles_n * 3
    n0, p0, q0 = _origin(box, TILES_P, TILES_Q, BOX_N, BOX_P, BOX_Q)
    n1, p1, q1 = _origin(box + 1, TILES_P, TILES_Q, BOX_N, BOX_P, BOX_Q)
    n2, p2, q2 = _origin(box + 2, TILES_P, TILES_Q, BOX_N, BOX_P, BOX_Q)
    sums0 = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    sums1 = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    sums2 = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(0, R * S * C // BLOCK_K):
        tap = step // (C // BLOCK_K)
        c = step % (C // BLOCK_K) * BLOCK_K
        h = tap // S - PAD_H
        w = tap % S - PAD_W
        weights = weight.load([k, step * BLOCK_K])
        sums0 = dot(weights, _pixels(x, n0, p0, q0, h, w, c, C, STRIDED, BLOCK_M, BLOCK_K), sums0, PRECISION)
        sums1 = dot(weights, _pixels(x, n1, p1, q1, h, w, c, C, STRIDED, BLOCK_M, BLOCK_K), sums1, PRECISION)
        sums2 = dot(weights, _pixels(x, n2, p2, q2, h, w, c, C, STRIDED, BLOCK_M, BLOCK_K), sums2, PRECISION)
    channel = k + tl.arange(0, BLOCK_N)
    inside = channel < K
    y = _finish(sums0.T, scale, shift, channel, inside, None, out.dtype, RELU, RESIDUAL)
    out.store([n0, p0, q0, k], y.reshape(BOX_N, BOX_P, BOX_Q, BLOCK_N))
    y = _finish(sums1.T, scale, shift, channel, inside, None, out.dtype, RELU, RESIDUAL)
    out.store([n1, p1, q1, k], y.reshape(BOX_N, BOX_P, BOX_Q, BLOCK_N))
    y = _finish(sums2.T, scale, shift, channel, inside, None, out.dtype, RELU, RESIDUAL)
    out.store([n2, p2, q2, k], y.reshape(BOX_N, BOX_P, BOX_Q, BLOCK_N))


@triton.jit(do_not_specialize=["PIXELS"])
def _resident(
    x,  # descriptor of [PIXELS, C]
    weight,  # descriptor of [K, C]
    scale,  # [K] float32
    shift,  # [K] float32
    residual,  # descriptor of [PIXELS, K]
    out,  # descriptor of [PIXELS, K]
    K,
    PIXELS,
    RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    wait_for_earlier_kernels()
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    k = (pid % tiles_n) * BLOCK_N
    channel = k + tl.arange(0, BLOCK_N)
    inside = channel < K
    # Outside of the loop, or they would be copied into shared memory again for each tile.
    factor = tl.load(scale + channel, mask=inside, other=0.0)[None, :]
    offset = tl.load(shift + channel, mask=inside, other=0.0)[None, :]
    weights = weight.load([k, 0])
    every = tl.num_programs(0) // tiles_n * BLOCK_M
    # Stages that are given here, not as an option, count for the residual too, which no product takes.
    for m in tl.range(pid // tiles_n * BLOCK_M, PIXELS, every, num_stages=STAGES):
        pixels = x.load([m, 0])
        added = None
        if RESIDUAL:
            added = residual.load([m, k])
        y = dot(weights, pixels.T, tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32), PRECISION).T
        out.store([m, k], _activated(y * factor + offset, added, out.dtype, RELU, RESIDUAL))


@triton.jit(do_not_specialize=["PIXELS"])
def _sum(
    sums,  # [PIXELS, SHARES, K] float32
    scale,  # [K] float32
    shift,  # [K] float32
    residual,  # [PIXELS, K]
    out,  # [PIXELS, K]
    PIXELS,
    K,  # a multiple of BLOCK_N
    SHARES: tl.constexpr,
    RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What the shares of _boxes left, added up from the first to the last and finished."""
    wait_for_earlier_kernels()
    tiles_n = K // BLOCK_N
    pid = tl.program_id(0)
    m = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m < PIXELS)[:, None] & (channel < K)[None, :]
    offset = m[:, None] * K + channel[None, :]
    added = None
    if RESIDUAL:
        added = tl.load(residual + offset, mask=mask, other=0.0)
    first = sums + m[:, None] * (SHARES * K) + channel[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for share in tl.static_range(SHARES):
        total += tl.load(first + share * K, mask=mask, other=0.0)
    y = _finish(total, scale, shift, channel, channel < K, added, out.dtype.element_ty, RELU, RESIDUAL)
    tl.store(out + offset, y, mask=mask)


#: The tile and the warps of _sum: a sum for each thread, so that the registers that ptxas gives it hold all that it
#: loads, and it waits once; with four sums it would ask for some of the shares when others have come.
_SUM = {"BLOCK_M": 4, "BLOCK_N": 64, "num_warps": 8}
_MOST_SHARES = 16


#: Bytes of a sum of a share.
_SUMS_ITEM = 4


@dataclass(frozen=True)
class Config:
    """A launch choice: tile sizes, warps, pipeline stages, and whether the copy engine fetches the pixels in boxes.

    Attributes:
        persistent: how many programs take all the tiles in turn, in the form boxes; 0: a program for each tile.
        shares: how many programs divide the steps of a tile, in the form boxes, each the same number; their sums are
            added up by a second launch. 1: a tile is one program's.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    boxes: bool
    persistent: int = 0
    shares: int = 1

    @property
    def box(self) -> int:
        """Pixels of a box. A tile is one, or three of a power of two."""
        return self.block_m & -self.block_m

    def resident(self, problem: Problem) -> bool:
        """Return whether the form is ``resident``: persistent, with all of a plain product's depth in one step."""
        return self.persistent > 0 and self.block_k == problem.c and _plain(problem)

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of shared memory a program takes at most: the operands of every stage, or the output tile.

        A persistent program has both at once.
        """
        item = ITEMSIZE[problem.precision]
        tile = self.block_m * self.block_n * (item if self.shares == 1 else _SUMS_ITEM)
        if self.resident(problem):
            residuals = (self.num_stages - 1) * tile if problem.residual else 0
            return (self.block_m * self.num_stages + self.block_n) * self.block_k * item + residuals + tile
        operands = (self.block_m + self.block_n) * self.block_k * item * self.num_stages
        if self.persistent:
            return operands + tile * (2 if problem.residual else 1)
        return max(operands, tile if self.boxes else 0)

    @property
    def most_programs(self) -> int:
        """How many programs at once a multiprocessor should have registers for: two hide each other's epilogues.

        One, if the sums of a large tile fill them, or stand beside the addresses of what is gathered.
        """
        area = self.block_m * self.block_n
        return 1 if area > 128 * 128 or (not self.boxes and area == 128 * 128) else 2

    def programs(self, problem: Problem, gpu: GPU) -> int:
        """Return how many programs the choice means a multiprocessor to hold at once, at most two."""
        room = gpu.shared_memory_per_multiprocessor // (self.shared_memory(problem) + 1024)
        return min(self.most_programs, room)

    def gathered(self) -> Config:
        """Return the choice for the form ``gather`` if an address keeps the copy engine from this one's tensors."""
        steps = min(self.block_k, 64), min(self.num_stages, 4)
        return Config(min(self.block_m, 128), min(self.block_n, 128), steps[0], self.num_warps, steps[1], False)


def supports_boxes(problem: Problem, gpu: GPU) -> bool:
    """Return whether the form ``boxes`` can compute the problem on the GPU, as far as shapes tell."""
    vector = 16 // ITEMSIZE[problem.precision]
    plain = problem.groups == 1 and problem.dilation == (1, 1) and problem.c % 16 == 0 and problem.k % vector == 0
    even = problem.h % 2 == 0 and problem.w % 2 == 0
    strides = problem.stride == (1, 1) or (problem.stride == (2, 2) and even)
    return gpu.capability >= 90 and plain and strides and not problem.normalised


def _plain(problem: Problem) -> bool:
    """Return whether the convolution is a plain product of pixels and weights, with nothing around the pixels."""
    ones = problem.kernel == problem.stride == (1, 1)
    return ones and problem.padding == (0, 0) and problem.groups == 1


def _widest_k(problem: Problem, boxes: bool) -> int:
    """Return the longest sensible step through the product: 128 bytes, or all of a short one."""
    item = ITEMSIZE[problem.precision]
    most = 16 if problem.precision == "fp32" else 128 // item
    if boxes:
        return dividing_power_of_two(problem.c, most)
    per_group = problem.c // problem.groups
    short = _flat(problem)
    taps = problem.kernel[0] * problem.kernel[1]
    return power_of_two(per_group * taps if short else per_group, 16, most)


def _flat(problem: Problem) -> bool:
    """Few channels: one step through the product covers several taps."""
    return problem.c // problem.groups < 16 and problem.kernel != (1, 1)


def _fits(config: Config, problem: Problem, gpu: GPU) -> bool:
    return config.shared_memory(problem) <= gpu.shared_memory


def heuristic(problem: Problem, gpu: GPU) -> Config:
    """Return a launch choice from the shape alone."""
    return (
        _keeping_weights(problem, gpu)
        or _three(problem, gpu)
        or _wide(problem, gpu)
        or _few(problem, gpu)
        or tiled(problem, gpu)
    )


def _hopper(problem: Problem, gpu: GPU) -> bool:
    """Return whether the forms and tiles made for Hopper's warp groups can compute the problem."""
    return gpu.capability == 90 and problem.precision in ("fp16", "bf16") and supports_boxes(problem, gpu)


def _keeping_weights(problem: Problem, gpu: GPU) -> Config | None:
    """Return the form ``resident`` for a product with a residual of which every program has at least four tiles."""
    if not _hopper(problem, gpu) or not problem.residual or not takes_resident(problem):
        return None
    config = Config(64, power_of_two(problem.k, 64, 128), problem.c, 8, 3, True, 1)
    if not _fits(config, problem, gpu):
        return None
    config = replace(config, persistent=gpu.multiprocessors * config.programs(problem, gpu))
    programs = blocks(problem, config)
    columns = cdiv(problem.k, config.block_n)
    return config if programs and cdiv(problem.pixels, config.block_m) * columns >= 4 * programs else None


def takes_resident(problem: Problem) -> bool:
    """Return whether a step can be the whole depth of the problem: a power of two of channels, at most 256."""
    return _plain(problem) and problem.c & (problem.c - 1) == 0 and problem.c <= 256


#: Tiles, pixels by channels, of as many sums as two warp groups hold in registers. Tiles of 128 x 128 read a third more
#: through the level-2 cache than 256 x 128, 128 x 64 two thirds more than 512 x 64, and that is what limits them.
_WIDE = {64: 512, 128: 256}


#: Of three boxes: 192 sums for each thread of two warp groups. A tile reads a ninth less through the level-2 cache for
#: an output than 256 x 128, and 14 x 14 pixels of 128 images with 256 channels are 132 tiles, one for each of Hopper's
#: multiprocessors, where others leave it idle for a third of the time.
_THREE = 3 * 128, 128


def _three(problem: Problem, gpu: GPU) -> Config | None:
    """Return a tile of three boxes for a window, if at most three tenths of the GPU are idle then."""
    if not _hopper(problem, gpu) or problem.kernel == (1, 1) or problem.residual or problem.k % 128:
        return None
    config = Config(*_THREE, _widest_k(problem, True), 8, 3, True)
    useful = problem.pixels / config.block_m * (problem.k / config.block_n)
    rounds = cdiv(blocks(problem, config), gpu.multiprocessors)
    enough = _steps(problem, config.block_k) >= config.num_stages and _fits(config, problem, gpu)
    return config if enough and useful >= 0.7 * rounds * gpu.multiprocessors else None


def _wide(problem: Problem, gpu: GPU) -> Config | None:
    """Return a tile of twice the usual size for a deep product, if at most a quarter of the GPU is idle then."""
    block_n = power_of_two(problem.k, 64, 128)
    window = problem.kernel != (1, 1)
    if not _hopper(problem, gpu) or (not window and (block_n == 64 or problem.residual)):
        return None
    block_k = _widest_k(problem, True)
    config = Config(_WIDE[block_n], block_n, block_k, 8, _most_stages(problem, block_k, True), True)
    count = blocks(problem, config)
    # In one round the tiles count as they are, those beyond the image too; in several, what they compute does.
    useful = problem.pixels / config.block_m * cdiv(problem.k, block_n) if count > gpu.multiprocessors else count
    if config.num_stages < 4 or useful < 0.75 * cdiv(count, gpu.multiprocessors) * gpu.multiprocessors:
        return None
    # A program of several tiles would wait for a residual at the end of each, as programs of one do.
    if count > gpu.multiprocessors and not problem.residual:
        persistent = replace(config, num_stages=3, persistent=gpu.multiprocessors)
        if _fits(persistent, problem, gpu):
            return persistent
    while not _fits(config, problem, gpu):
        config = replace(config, num_stages=config.num_stages - 1)
    return config


#: Of Hopper, and of its launches of few programs, as ``resnet_fast.roofline.estimate`` assumes them, which says more:
#: bytes a second that a multiprocessor takes from the level-2 cache at most; seconds from the request of a copy to its
#: arrival, of what a step has besides its product, of the end of 128 x 128 sums, and of a second launch.
_PORT = 64 * 1.755e9
_ARRIVAL = 0.55e-6
_STEP = 100 / 1.755e9
_END = 0.9e-6
_SECOND = 2.45e-6
#: Tiles, pixels by channels, that few programs may have.
_FEW = ((16, 64), (32, 64), (64, 64), (64, 128), (128, 64), (128, 128))


def _few(problem: Problem, gpu: GPU) -> Config | None:
    """Return the tile and the number of its shares that take the least time, if the usual tiles are few.

    Small tiles are many programs, but read more through the level-2 cache. Shares of large tiles read less and are
    many, too, but take a second launch.
    """
    usual = tiled(problem, gpu)
    if not _hopper(problem, gpu) or blocks(problem, usual) > 2 * gpu.multiprocessors:
        return None
    block_k = _widest_k(problem, True)
    steps, found = _steps(problem, block_k), [usual]
    for block_m, block_n in _FEW:
        one = Config(block_m, block_n, block_k, _warps(problem, block_m, block_n, True), 1, True)
        most = gpu.multiprocessors // blocks(problem, one) if block_n <= max(64, problem.k) else 0
        for shares in (shares for shares in range(1, min(most, _MOST_SHARES) + 1) if steps % shares == 0):
            config = replace(one, shares=shares, num_warps=one.num_warps if shares == 1 else 4)
            if takes(config, problem, gpu):
                found.append(_staged(config, problem, gpu))
    # As an estimate is no measurement, a second launch must save a tenth.
    return min(found, key=lambda config: _seconds(config, problem, gpu) * (1.0 if config.shares == 1 else 1.1))


def _seconds(config: Config, problem: Problem, gpu: GPU) -> float:
    """Return an estimate of what launches by boxes take besides what all do, if all programs run at once."""
    m, n, k, item = config.block_m, config.block_n, config.block_k, ITEMSIZE[problem.precision]
    programs, cache = blocks(problem, config), gpu.l2_bandwidth or math.inf
    beside = cdiv(programs, gpu.multiprocessors)
    rate = min(_PORT, cache / min(programs, gpu.multiprocessors))
    product = 2 * m * n * k * gpu.multiprocessors / gpu.rate(problem.precision)
    steps = _steps(problem, k) // config.shares
    arrival = _ARRIVAL / max(1, config.num_stages - 1) if steps > 1 else 0.0
    step = max(beside * (m + n) * k * item / rate, beside * product, product + _STEP, arrival)
    seconds = steps * step + _END * max(0.25, m * n / 128**2)
    if config.shares == 1:
        return seconds + (_ARRIVAL if problem.residual else 0.0)
    return seconds + _SECOND + _SUMS_ITEM * math.prod(sums_shape(problem, config)) / cache


def tiled(problem: Problem, gpu: GPU) -> Config:
    """Return the usual choice: the largest tile, up to 128 x 128, that still gives every multiprocessor work."""
    boxes = supports_boxes(problem, gpu)
    block_k = _widest_k(problem, boxes)
    per_group = problem.k // problem.groups
    if problem.precision == "fp32":  # plain multiply-adds: the tile is bound by registers, not by shared memory
        return Config(64, power_of_two(per_group, 16, 64), block_k, 8, 2, boxes)
    if _flat(problem):  # an address for every element: small tiles, or the addresses alone fill the registers
        return Config(64, power_of_two(per_group, 16, 64), min(block_k, 32), 4, 2, False)
    widest = 128 if problem.precision in ("fp16", "bf16") or gpu.capability >= 90 else 64
    # A warp group multiplies 64 rows, which are pixels in the form gather, channels in the form boxes.
    least_m, least_n = (32, 64) if boxes else (64, 32)
    block_n = power_of_two(per_group, least_n if boxes else 16, widest)
    block_m = 128
    while cdiv(problem.pixels, block_m) * cdiv(per_group, block_n) * problem.groups < gpu.multiprocessors:
        if block_m > 64 and block_m >= block_n:
            block_m //= 2
        elif block_n > least_n:
            block_n //= 2
        elif block_m > least_m:
            block_m //= 2
        else:
            break
    return _staged(Config(block_m, block_n, block_k, _warps(problem, block_m, block_n, boxes), 1, boxes), problem, gpu)


def _warps(problem: Problem, block_m: int, block_n: int, boxes: bool) -> int:
    """Return the warps of a tile of up to 128 x 128.

    One warp group has registers for the sums of 128 x 128, and two programs of one group each wait less than one of two
    groups. With a residual on top of the sums it has none left, and two programs of two groups fit as well.
    """
    return 8 if block_m * block_n >= 128 * 128 and (problem.residual or not boxes) else 4


def _staged(config: Config, problem: Problem, gpu: GPU) -> Config:
    """Return the choice with as many stages as there can be and leave room for as many programs as are meant."""
    config = replace(config, num_stages=_most_stages(problem, config.block_k, config.boxes, config.shares))
    while config.num_stages > 2 and config.programs(problem, gpu) < config.most_programs:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def _steps(problem: Problem, block_k: int) -> int:
    """Return how many steps the product of a tile has in the form boxes."""
    return math.prod(problem.kernel) * problem.c // block_k


def _most_stages(problem: Problem, block_k: int, boxes: bool, shares: int = 1) -> int:
    """Return how many steps of the product may be on their way at once: no more than there are.

    Copies into shared memory take no registers, so boxes may be many: a small tile's step has few bytes.
    """
    return min(8, _steps(problem, block_k) // shares) if boxes else 4


def candidates(problem: Problem, gpu: GPU) -> Iterator[Config]:
    """Every launch choice worth measuring: within the GPU's shared memory, tiles no wider than the problem."""
    yield from _large(problem, gpu)
    yield from _divided(problem, gpu)
    per_group = problem.k // problem.groups
    forms = (True, False) if supports_boxes(problem, gpu) else (False,)
    tiles = (
        (16, 64),
        (32, 64),
        (64, 32),
        (64, 64),
        (64, 128),
        (128, 32),
        (128, 64),
        (128, 128),
        (128, 256),
        (256, 64),
        (256, 128),
    )
    if problem.precision == "fp32":
        tiles = ((32, 32), (32, 64), (64, 32), (64, 64))
    seen = set()
    for boxes in forms:
        block_k = _widest_k(problem, boxes)
        least_n = 64 if boxes and problem.precision != "fp32" else 16
        most = _most_stages(problem, block_k, boxes)
        for block_m, wanted_n in tiles:
            block_n = max(least_n, min(wanted_n, power_of_two(per_group, 16, 256)))
            if block_m > power_of_two(problem.pixels, 64, 256) or (block_m < 32 and not boxes):
                continue
            area = block_m * block_n
            for num_warps in (4, 8):
                # Accumulators alone would take more than half of the registers, or leave a warp next to nothing.
                if area // (num_warps * 32) > 128 or area // (num_warps * 32) < 8:
                    continue
                for num_stages in sorted({min(stages, most) for stages in ((2, 3, 4, 8) if boxes else (2, 3, 4))}):
                    config = Config(block_m, block_n, block_k, num_warps, num_stages, boxes)
                    if config not in seen and _fits(config, problem, gpu):
                        seen.add(config)
                        yield config


def _divided(problem: Problem, gpu: GPU) -> Iterator[Config]:
    """The tiles worth measuring whose steps several programs share: at most a program for each multiprocessor."""
    if not _hopper(problem, gpu):
        return
    for block_m, block_n in _FEW:
        one = Config(block_m, block_n, _widest_k(problem, True), 4, 1, True)
        for shares in range(2, min(gpu.multiprocessors // blocks(problem, one), _MOST_SHARES) + 1):
            if takes(config := replace(one, shares=shares), problem, gpu):
                yield _staged(config, problem, gpu)


def _large(problem: Problem, gpu: GPU) -> Iterator[Config]:
    """The forms and tiles for many pixels that are worth measuring: persistent ones, and the largest tile."""
    if not _hopper(problem, gpu):
        return
    block_k = _widest_k(problem, True)
    per_program = [(64, 64, problem.c), (64, 128, problem.c), (128, 64, problem.c)] if takes_resident(problem) else []
    steps = _most_stages(problem, block_k, True)
    if problem.kernel != (1, 1) and problem.k <= 64 and problem.pixels >= 512:
        yield from (c for c in (Config(512, 64, block_k, 8, 3, True),) if steps >= 3 and _fits(c, problem, gpu))
    if not problem.residual and problem.kernel != (1, 1) and problem.k >= 128 and steps >= 3:
        yield from (c for c in (Config(*_THREE, block_k, 8, 3, True),) if _fits(c, problem, gpu))
    if not problem.residual:  # it would be waited for at the end of each tile
        per_program += [(m, n, block_k) for m, n in ((128, 128), (256, 64), (256, 128)) if block_k < problem.c]
        per_program += [(m, n, block_k) for m, n in ((256, 64), (256, 128)) if problem.kernel != (1, 1)]
    for block_m, block_n, step in dict.fromkeys(per_program):
        for num_stages in (3, 4):
            config = Config(block_m, block_n, step, 8, num_stages, True, 1)
            if block_n > max(64, problem.k) or not _fits(config, problem, gpu):
                continue
            config = replace(config, persistent=gpu.multiprocessors * config.programs(problem, gpu))
            if blocks(problem, config) < blocks(problem, replace(config, persistent=0)):
                yield config


@_tables.remembers
@lru_cache(maxsize=4096)
def choose(problem: Problem, gpu: GPU) -> Config:
    """Return the measured choice if there is one that fits, else the heuristic's."""
    config = _tables.measured(NAME, problem.key(), gpu.name, Config)
    return config if config is not None and takes(config, problem, gpu) else heuristic(problem, gpu)


def takes(config: Config, problem: Problem, gpu: GPU) -> bool:
    """Return whether the kernel computes the problem with this choice on ``gpu``."""
    boxes = supports_boxes(problem, gpu) and problem.c % config.block_k == 0
    if config.resident(problem) and not (takes_resident(problem) and blocks(problem, config)):
        return False
    if config.persistent and not config.boxes:
        return False
    if config.block_m != config.box:
        alone = not problem.residual and config.persistent == 0 and config.shares == 1
        if config.block_m != 3 * config.box or not config.boxes or not alone:
            return False
    if config.shares > 1:
        # A tile may not run over the last channel of its share: there the next share's sums begin.
        whole = config.boxes and not config.persistent and problem.k % config.block_n == 0 and config.block_n % 64 == 0
        if not whole or config.shares > _MOST_SHARES or _steps(problem, config.block_k) % config.shares:
            return False
        if math.prod(sums_shape(problem, config)) >= WIDE_FROM // 2:
            return False
    return _fits(config, problem, gpu) and (boxes or not config.boxes)


def launch(
    x: Any,
    weight: Any,
    scale: Any,
    shift: Any,
    residual: Any,
    out: Any,
    problem: Problem,
    config: Config,
    *,
    activation: str = "relu",
    residual_after_activation: bool = False,
) -> Launch:
    """Return the launch that fills ``out``.

    Args:
        x: [N, C, H, W], residual and out: [N, K, P, Q], all dense channels_last and of one dtype.
        weight: [K, C / groups, R, S], dense channels_last, of that dtype.
        scale, shift: [K] float32, dense.
        config: for the form ``boxes`` every tensor must begin at a multiple of 16 bytes; where one does not, the same
            tile is fetched by the form ``gather``. Its ``shares`` do not count here: see :func:`launch_shares`.
    """
    config = replace(config, shares=1)
    tensors = (x, weight, scale, shift, residual, out)
    flags = _flags(residual, activation, residual_after_activation)
    if config.boxes and aligned(x, weight, residual, out):
        make = _launch_resident if config.resident(problem) else _launch_boxes
        return make(tensors, problem, config, flags)
    return _launch_gather(tensors, problem, config.gathered() if config.boxes else config, flags)


def sums_shape(problem: Problem, config: Config) -> tuple[int, ...]:
    """Return the shape of the sums that the shares of a choice leave: [N, P, Q, shares, K]."""
    return (problem.n, *problem.output, config.shares, problem.k)


def takes_shares(x: Any, weight: Any, config: Config) -> bool:
    """Return whether the tiles of these tensors have several shares: the copy engine must be able to address them."""
    return config.shares > 1 and aligned(x, weight)


def launch_shares(x: Any, weight: Any, sums: Any, problem: Problem, config: Config) -> Launch:
    """Return the first of two launches: it fills ``sums``, for :func:`launch_sum`.

    Args:
        x, weight: as for :func:`launch`, both beginning at a multiple of 16 bytes. sums: ``sums_shape`` in float32,
            dense.
    """
    flags = {"RELU": False, "RESIDUAL": 0, "SHARES": config.shares}
    return _launch_boxes((x, weight, None, None, None, sums), problem, config, flags)


def launch_sum(
    sums: Any,
    scale: Any,
    shift: Any,
    residual: Any,
    out: Any,
    problem: Problem,
    config: Config,
    *,
    activation: str = "relu",
    residual_after_activation: bool = False,
) -> Launch:
    """Return the second launch, which fills ``out`` from what the first left; arguments as for :func:`launch`."""
    args = (sums, scale, shift, out if residual is None else residual, out, problem.pixels, problem.k)
    options = {"SHARES": config.shares, **_flags(residual, activation, residual_after_activation), **_SUM}
    programs = cdiv(problem.pixels, _SUM["BLOCK_M"]) * (problem.k // _SUM["BLOCK_N"])
    return Launch(_sum, (programs,), args, options)


def _flags(residual: Any, activation: str, residual_after_activation: bool) -> dict[str, Any]:
    """Return what the end of a kernel is told."""
    where = 0 if residual is None else 2 if residual_after_activation else 1
    return {"RELU": activation == "relu", "RESIDUAL": where}


def launch_raw(
    x: Any,
    weight: Any,
    out: Any,
    problem: Problem,
    config: Config,
    *,
    scale_in: Any = None,
    shift_in: Any = None,
    workspace: Any = None,
) -> tuple[Launch, int]:
    """The launch that fills ``out`` with the convolution alone, and how many tiles leave moments in ``workspace``.

    Args:
        x, weight, out: as for :func:`launch`.
        scale_in, shift_in: [C] float32, dense: the convolution is of ``relu(x * scale_in + shift_in)``, rounded to x's
            dtype, and padded with zeros behind the activation; or None. By the form ``gather``, whatever the config.
        workspace: ``workspace_size`` numbers of float32 for ``batch_norm_act.merge``, or None.
    """
    config = replace(config, block_m=config.box, persistent=0, shares=1)  # moments are of a box, and take registers
    tensors = (x, weight, None, None, None, out)
    flags: dict[str, Any] = {"RELU": False, "RESIDUAL": 0}
    if workspace is not None:
        flags["workspace"] = workspace
    boxes = config.boxes and scale_in is None and aligned(x, weight, out)
    if boxes:
        return _launch_boxes(tensors, problem, config, flags), tiles(problem, config, True)
    if scale_in is not None:
        flags |= {"scale_in": scale_in, "shift_in": shift_in}
    config = config.gathered() if config.boxes else config
    return _launch_gather(tensors, problem, config, flags), tiles(problem, config, False)


def tiles(problem: Problem, config: Config, boxes: bool) -> int:
    """Return how many tiles of pixels cover the output."""
    if not boxes:
        return cdiv(problem.pixels, (config.gathered() if config.boxes else config).block_m)
    (n, _, _), (_, p, q) = _box_sizes(problem)
    boxes_of_all = math.prod(map(cdiv, (n, p, q), image_box(n, p, q, config.box)))
    return cdiv(boxes_of_all, config.block_m // config.box)


def blocks(problem: Problem, config: Config) -> int:
    """Return how many programs a launch has: one for each tile or share of one, or as many as take tiles in turn.

    In the form ``resident`` all columns of tiles have equally many; 0 if there are not that many programs.
    """
    columns = cdiv(problem.k // problem.groups, config.block_n) * problem.groups
    rows = tiles(problem, config, config.boxes)
    if config.resident(problem):
        return min(config.persistent // columns, rows) * columns
    return min(config.persistent or rows * columns, rows * columns) * config.shares


def workspace_size(problem: Problem, config: Config) -> int:
    """Numbers of float32 that the moments of ``out`` and merging them take at most, in either form."""
    config = replace(config, block_m=config.box)
    most = max(tiles(problem, config, boxes) for boxes in (False, config.boxes))
    return moments_size(most, problem.k)


def _box_sizes(problem: Problem) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """N, H, W and N, P, Q as boxes see them: a plain product is one long row of pixels."""
    p, q = problem.output
    if _plain(problem):
        return (1, 1, problem.n * problem.h * problem.w), (1, 1, problem.pixels)
    return (problem.n, problem.h, problem.w), (problem.n, p, q)


def _options(problem: Problem, config: Config) -> dict[str, Any]:
    return {
        "PRECISION": dot_precision(problem.precision),
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def boxed(
    x: Any,
    weight: Any,
    vectors: tuple[Any, ...],
    residual: Any,
    out: Any,
    problem: Any,
    config: Any,
    given: dict[str, Any],
    shares: int = 1,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what launches by boxes have in common: arguments up to the padding, and options.

    Args:
        vectors: arguments between the weight and the residual. given: options between the sizes and those of the box.
        shares: that ``out`` has beside each other at each pixel.
    """
    c, k, (kernel_r, kernel_s) = problem.c, problem.k, problem.kernel
    (n, h, w), (_, p, q) = _box_sizes(problem)
    strided = problem.stride == (2, 2)
    box = image_box(n, p, q, config.block_m)
    if strided:
        shape, strides = [n, h // 2, 2, w // 2, 2 * c], [h * w * c, 2 * w * c, w * c, 2 * c, 1]
        x_box = [box[0], box[1], 1, box[2], config.block_k]
    else:
        shape, strides = [n, h, w, c], [h * w * c, w * c, c, 1]
        x_box = [*box, config.block_k]
    depth = kernel_r * kernel_s * c
    width = shares * k
    outputs = [n, p, q, width], [p * q * width, q * width, width, 1], [*box, config.block_n]
    written = TensorDescriptor(out, *outputs)
    args = (
        TensorDescriptor(x, shape, strides, x_box),
        TensorDescriptor(weight, [k, depth], [depth, 1], [config.block_n, config.block_k]),
        *vectors,
        written if residual is None else TensorDescriptor(residual, *outputs),
        written,
        k,
        cdiv(p, box[1]),
        cdiv(q, box[2]),
        *problem.padding,
    )
    options = {"C": c, "R": kernel_r, "S": kernel_s, **given}
    return args, options | {"STRIDED": strided, "BOX_N": box[0], "BOX_P": box[1], "BOX_Q": box[2]}


def _launch_boxes(tensors: tuple[Any, ...], problem: Problem, config: Config, flags: dict[str, Any]) -> Launch:
    x, weight, scale, shift, residual, out = tensors
    given = {**flags, **_options(problem, config)}
    one = replace(config, block_m=config.box)
    args, options = boxed(x, weight, (scale, shift), residual, out, problem, one, given, config.shares)
    if "workspace" in flags:
        _, (n, p, q) = _box_sizes(problem)
        options |= {"N": n, "P": p, "Q": q}
    if config.persistent:
        options["PERSISTENT"] = True
    programs = blocks(problem, config)
    if config.block_m != config.box:
        return Launch(_three_boxes, (programs,), args, options)
    tiles_of_all = blocks(problem, replace(config, persistent=0, shares=1))
    return Launch(_boxes, (programs,), (*args, tiles_of_all), options)


def _launch_resident(tensors: tuple[Any, ...], problem: Problem, config: Config, flags: dict[str, Any]) -> Launch:
    x, weight, scale, shift, residual, out = tensors
    c, k, pixels = problem.c, problem.k, problem.pixels
    outputs = [pixels, k], [k, 1], [config.block_m, config.block_n]
    written = TensorDescriptor(out, *outputs)
    args = (
        TensorDescriptor(x, [pixels, c], [c, 1], [config.block_m, c]),
        TensorDescriptor(weight, [k, c], [c, 1], [config.block_n, c]),
        scale,
        shift,
        written if residual is None else TensorDescriptor(residual, *outputs),
        written,
        k,
        pixels,
    )
    options = {**flags, "PRECISION": dot_precision(problem.precision), "BLOCK_M": config.block_m}
    options |= {"BLOCK_N": config.block_n, "STAGES": config.num_stages, "num_warps": config.num_warps}
    return Launch(_resident, (blocks(problem, config),), args, options)


def _launch_gather(tensors: tuple[Any, ...], problem: Problem, config: Config, flags: dict[str, Any]) -> Launch:
    x, weight, scale, shift, residual, out = tensors
    kernel_r, kernel_s = problem.kernel
    per_group = problem.c // problem.groups, problem.k // problem.groups
    args = (
        x, weight, scale, shift, out if residual is None else residual, out,
        problem.n, problem.h, problem.w, problem.c, problem.k, *problem.output, *per_group, *problem.stride,
        *problem.padding, *problem.dilation,
    )  # fmt: skip
    options = {"R": kernel_r, "S": kernel_s, **flags, **_options(problem, config)}
    options |= {
        "PADDED": problem.padding != (0, 0),
        "FLAT": _flat(problem),
        "WIDE": wide(x, out, weight),
        "BLOCK_M": config.block_m,
    }
    grid = (blocks(problem, config),)
    return Launch(_gather, grid, args, options)
