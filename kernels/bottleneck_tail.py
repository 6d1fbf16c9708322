"""bottleneck_tail: a bottleneck from its 3x3 on, with the next block's first 1x1, in one kernel; kernels and launch.

    b         = relu(conv3x3(a) * scale2 + shift2)                       stays on chip, [pixels, MID]
    out       = relu(conv1x1(b) * scale3 + shift3 + shortcut)            written slice by slice of channels
    following = relu(conv1x1(out) * scale1 + shift1)                     accumulated over the slices, written at the end

Starting at the 3x3 means no halo: it is the only convolution that looks at neighbours, and it reads memory. Per pixel
the op reads MID and K values and writes K and NEXT, where one kernel per convolution moves 16 MID in all (K = 4 MID).
With ``shortcut`` a projection, conv1x1(x) * scale + shift is added up in a second accumulator of the same slice, so the
projected tensor is neither written nor read, and no scale has to be folded into a rounded weight.

One program owns a tile of output pixels and all channels of it, so each program reads all the weights, from the level-2
cache: 9 MID^2 + MID K + K NEXT values for BLOCK_M pixels. That, not device memory, bounds large MID; the registers
bound BLOCK_M: accumulators of BLOCK_M x max(MID, NEXT) float32, and b.

Forms ``boxes`` and ``gather`` as in conv_bn_act. MID and NEXT are powers of two (they are tile sizes).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._language import dot, relu, rounded, wait_for_earlier_kernels
from ._launch import Launch, aligned, cdiv, dividing_power_of_two, dot_precision, image_box, wide
from .bottleneck_tail_choice import NAME, Config, Problem, candidates, choose, heuristic, supports

__all__ = ["NAME", "Config", "Problem", "candidates", "choose", "heuristic", "launch", "supports"]


@triton.jit(do_not_specialize=["TILES_P", "TILES_Q"])
def _boxes(
    a,  # descriptor of [N, H, W, MID], with stride 2 of [N, H/2, 2, W/2, 2 MID]
    weight2,  # descriptor of [MID, 9 * MID]
    scale2,  # [MID] float32, as the other scales and shifts
    shift2,
    weight3,  # descriptor of [K, MID]
    scale3,
    shift3,
    shortcut,  # descriptor of the residual [N, P, Q, K], or of the projection's input, strided like a
    weight_shortcut,  # descriptor of [K, C], unless PROJECTED is 0
    scale_shortcut,
    shift_shortcut,
    out,  # descriptor of [N, P, Q, K]
    weight1,  # descriptor of [NEXT, K], unless NEXT is 0
    scale1,
    shift1,
    following,  # descriptor of [N, P, Q, NEXT], unless NEXT is 0
    TILES_P,
    TILES_Q,
    K: tl.constexpr,  # as in conv_bn_act, products overlap only in loops whose length ptxas knows
    C: tl.constexpr,
    MID: tl.constexpr,
    NEXT: tl.constexpr,
    STRIDED: tl.constexpr,  # whether the 3x3 has stride 2
    PROJECTED: tl.constexpr,  # 0 for a residual, else the projection's stride
    PRECISION: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_P: tl.constexpr,
    BOX_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,  # step through MID in the 3x3
    BLOCK_S: tl.constexpr,  # step through C in the projection
    BLOCK_N: tl.constexpr,  # slice of K
    STAGES: tl.constexpr,
    SLICE_STAGES: tl.constexpr,
):
    wait_for_earlier_kernels()
    BLOCK_M: tl.constexpr = BOX_N * BOX_P * BOX_Q
    BLOCKS_C: tl.constexpr = MID // BLOCK_C
    pid = tl.program_id(0)
    q = (pid % TILES_Q) * BOX_Q
    p = (pid // TILES_Q % TILES_P) * BOX_P
    n = (pid // (TILES_Q * TILES_P)) * BOX_N
    accumulator = tl.zeros((BLOCK_M, MID), dtype=tl.float32)
    for step in tl.range(0, 9 * BLOCKS_C, num_stages=STAGES):
        tap = step // BLOCKS_C
        c = (step % BLOCKS_C) * BLOCK_C
        h = tap // 3 - 1
        w = tap % 3 - 1
        if STRIDED:
            pixels = a.load([n, p + (h >> 1), h & 1, q + (w >> 1), (w & 1) * MID + c])
        else:
            pixels = a.load([n, p + h, q + w, c])
        taps = weight2.load([0, step * BLOCK_C]).T
        accumulator = dot(pixels.reshape(BLOCK_M, BLOCK_C), taps, accumulator, PRECISION)
    middle = tl.arange(0, MID)
    b = accumulator * tl.load(scale2 + middle)[None, :] + tl.load(shift2 + middle)[None, :]
    b = rounded(relu(b), out.dtype)
    if NEXT > 0:
        gathered = tl.zeros((BLOCK_M, NEXT), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_N, num_stages=SLICE_STAGES):
        channel = k + tl.arange(0, BLOCK_N)
        y = dot(b, weight3.load([k, 0]).T, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), PRECISION)
        y = y * tl.load(scale3 + channel)[None, :] + tl.load(shift3 + channel)[None, :]
        if PROJECTED == 0:
            y += shortcut.load([n, p, q, k]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
        else:
            projected = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for c in tl.range(0, C, BLOCK_S, num_stages=SLICE_STAGES):
                if PROJECTED == 2:
                    x = shortcut.load([n, p, 0, q, c])
                else:
                    x = shortcut.load([n, p, q, c])
                projected = dot(x.reshape(BLOCK_M, BLOCK_S), weight_shortcut.load([k, c]).T, projected, PRECISION)
            y += projected * tl.load(scale_shortcut + channel)[None, :] + tl.load(shift_shortcut + channel)[None, :]
        y = rounded(relu(y), out.dtype)
        out.store([n, p, q, k], y.reshape(BOX_N, BOX_P, BOX_Q, BLOCK_N))
        if NEXT > 0:
            gathered = dot(y, weight1.load([0, k]).T, gathered, PRECISION)
    if NEXT > 0:
        last = tl.arange(0, NEXT)
        z = relu(gathered * tl.load(scale1 + last)[None, :] + tl.load(shift1 + last)[None, :])
        following.store([n, p, q, 0], rounded(z, out.dtype).reshape(BOX_N, BOX_P, BOX_Q, NEXT))


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "SHORTCUT_H", "SHORTCUT_W", "STRIDE", "SHORTCUT_STRIDE"])
def _gather(
    a,  # [N, H, W, MID]
    weight2,  # [MID, 9, MID]
    scale2,  # [MID] float32, as the other scales and shifts
    shift2,
    weight3,  # [K, MID]
    scale3,
    shift3,
    shortcut,  # [N, P, Q, K], or the projection's input [N, SHORTCUT_H, SHORTCUT_W, C]
    weight_shortcut,  # [K, C]
    scale_shortcut,
    shift_shortcut,
    out,  # [N, P, Q, K]
    weight1,  # [NEXT, K]
    scale1,
    shift1,
    following,  # [N, P, Q, NEXT]
    N,
    H,
    W,
    P,
    Q,
    K,
    C,
    SHORTCUT_H,
    SHORTCUT_W,
    STRIDE,
    SHORTCUT_STRIDE,
    MID: tl.constexpr,
    NEXT: tl.constexpr,
    PROJECTED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SLICE_STAGES: tl.constexpr,
):
    wait_for_earlier_kernels()
    BLOCKS_C: tl.constexpr = MID // BLOCK_C
    tile = tl.program_id(0)
    pixels = N * P * Q
    if WIDE:
        tile = tile.to(tl.int64)
        pixels = N.to(tl.int64) * P * Q
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < pixels
    n = m // (P * Q)
    p = (m // Q) % P
    q = m % Q
    row = p * STRIDE - 1
    column = q * STRIDE - 1
    base = ((n * H + row) * W + column) * MID
    middle = tl.arange(0, MID)
    accumulator = tl.zeros((BLOCK_M, MID), dtype=tl.float32)
    for step in tl.range(0, 9 * BLOCKS_C, num_stages=STAGES):
        tap = step // BLOCKS_C
        c = (step % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C)
        at_h = row + tap // 3
        at_w = column + tap % 3
        valid = inside & (at_h >= 0) & (at_h < H) & (at_w >= 0) & (at_w < W)
        offset = base + (tap // 3 * W + tap % 3) * MID
        seen = tl.load(a + offset[:, None] + c[None, :], mask=valid[:, None], other=0.0)
        taps = tl.load(weight2 + (middle * (9 * MID))[None, :] + (tap * MID + c)[:, None])
        accumulator = dot(seen, taps, accumulator, PRECISION)
    b = accumulator * tl.load(scale2 + middle)[None, :] + tl.load(shift2 + middle)[None, :]
    b = rounded(relu(b), out.dtype.element_ty)
    source = ((n * SHORTCUT_H + p * SHORTCUT_STRIDE) * SHORTCUT_W + q * SHORTCUT_STRIDE) * C
    if NEXT > 0:
        last = tl.arange(0, NEXT)
        gathered = tl.zeros((BLOCK_M, NEXT), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_N, num_stages=SLICE_STAGES):
        channel = k + tl.arange(0, BLOCK_N)
        there = channel < K
        expand = tl.load(weight3 + (channel * MID)[None, :] + middle[:, None], mask=there[None, :], other=0.0)
        y = dot(b, expand, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), PRECISION)
        y = y * tl.load(scale3 + channel, mask=there, other=0.0)[None, :]
        y += tl.load(shift3 + channel, mask=there, other=0.0)[None, :]
        position = m[:, None] * K + channel[None, :]
        mask = inside[:, None] & there[None, :]
        if PROJECTED:
            projected = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for start in tl.range(0, C, BLOCK_S, num_stages=SLICE_STAGES):
                c = start + tl.arange(0, BLOCK_S)
                x = tl.load(shortcut + source[:, None] + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
                project = tl.load(
                    weight_shortcut + (channel * C)[None, :] + c[:, None],
                    mask=there[None, :] & (c < C)[:, None],
                    other=0.0,
                )
                projected = dot(x, project, projected, PRECISION)
            y += projected * tl.load(scale_shortcut + channel, mask=there, other=0.0)[None, :]
            y += tl.load(shift_shortcut + channel, mask=there, other=0.0)[None, :]
        else:
            y += tl.load(shortcut + position, mask=mask, other=0.0).to(tl.float32)
        y = rounded(relu(y), out.dtype.element_ty)
        tl.store(out + position, y, mask=mask)
        if NEXT > 0:
            # Channels that are none may hold infinity times 0 by now, and no weight of 0 makes NaN harmless.
            y = tl.where(there[None, :], y, tl.zeros((BLOCK_M, BLOCK_N), dtype=y.dtype))
            reduce = tl.load(weight1 + (last * K)[None, :] + channel[:, None], mask=there[:, None], other=0.0)
            gathered = dot(y, reduce, gathered, PRECISION)
    if NEXT > 0:
        z = relu(gathered * tl.load(scale1 + last)[None, :] + tl.load(shift1 + last)[None, :])
        tl.store(following + m[:, None] * NEXT + last[None, :], rounded(z, out.dtype.element_ty), mask=inside[:, None])


def launch(
    a: Any,
    weight2: Any,
    scale2: Any,
    shift2: Any,
    weight3: Any,
    scale3: Any,
    shift3: Any,
    shortcut: Any,
    projection: tuple[Any, Any, Any] | None,
    out: Any,
    reduction: tuple[Any, Any, Any] | None,
    following: Any,
    problem: Problem,
    config: Config,
) -> Launch:
    """Return the launch that fills ``out`` and ``following``.

    Args:
        a: [N, MID, H, W]; shortcut: the residual [N, K, P, Q] or the projection's input; out: [N, K, P, Q];
            following: [N, NEXT, P, Q] or None. All dense channels_last and of one dtype.
        weight2: [MID, MID, 3, 3]; weight3: [K, MID, 1, 1]; dense channels_last, of that dtype.
        projection: (weight [K, C, 1, 1], scale [K], shift [K]) if the problem has a ``shortcut``, else None.
        reduction: (weight [NEXT, K, 1, 1], scale [NEXT], shift [NEXT]) if it has a ``following``, else None.
        config: as in conv_bn_act, a tensor at an odd address makes the form ``gather`` fetch the tiles.
    """
    n, h, w, mid, k = problem.n, problem.h, problem.w, problem.mid, problem.k
    p, q = problem.output
    c, short_h, short_w, short_stride = problem.shortcut or (k, p, q, 1)
    weight_shortcut, scale_shortcut, shift_shortcut = projection or (weight3, scale3, shift3)
    weight1, scale1, shift1 = reduction or (weight3, scale3, shift3)
    flags = {
        "MID": mid,
        "NEXT": problem.following,
        "PROJECTED": 0 if problem.shortcut is None else short_stride,
        "PRECISION": dot_precision(problem.precision),
        "BLOCK_C": config.block_c,
        "BLOCK_S": dividing_power_of_two(c, config.block_c) if config.boxes else config.block_c,
        "BLOCK_N": config.block_n,
        "STAGES": config.stages,
        "SLICE_STAGES": config.slice_stages,
        "num_warps": config.num_warps,
        "num_stages": config.stages,
    }
    tensors = (a, weight2, weight3, shortcut, weight_shortcut, out, weight1, following)
    if config.boxes and aligned(*tensors):
        box = image_box(n, p, q, config.block_m)

        def image(tensor: Any, height: int, width: int, channels: int, stride: int, block: int) -> TensorDescriptor:
            if stride == 1:
                strides = [height * width * channels, width * channels, channels, 1]
                return TensorDescriptor(tensor, [n, height, width, channels], strides, [*box, block])
            strides = [height * width * channels, 2 * width * channels, width * channels, 2 * channels, 1]
            shape = [n, height // 2, 2, width // 2, 2 * channels]
            return TensorDescriptor(tensor, shape, strides, [box[0], box[1], 1, box[2], block])

        def matrix(tensor: Any, rows: int, columns: int, block: tuple[int, int]) -> TensorDescriptor:
            return TensorDescriptor(tensor, [rows, columns], [columns, 1], list(block))

        expand = matrix(weight3, k, mid, (config.block_n, mid))
        written = image(out, p, q, k, 1, config.block_n)
        shortcut_block = config.block_n if problem.shortcut is None else flags["BLOCK_S"]
        args: tuple[Any, ...] = (
            image(a, h, w, mid, problem.stride, config.block_c),
            matrix(weight2, mid, 9 * mid, (mid, config.block_c)),
            scale2, shift2, expand, scale3, shift3,
            image(shortcut, short_h, short_w, c, short_stride, shortcut_block),
            matrix(weight_shortcut, k, c, (config.block_n, flags["BLOCK_S"])) if projection else expand,
            scale_shortcut, shift_shortcut, written,
            matrix(weight1, problem.following, k, (problem.following, config.block_n)) if reduction else expand,
            scale1, shift1,
            image(following, p, q, problem.following, 1, problem.following) if reduction else written,
            cdiv(p, box[1]), cdiv(q, box[2]),
        )  # fmt: skip
        flags |= {"K": k, "C": c, "STRIDED": problem.stride == 2, "BOX_N": box[0], "BOX_P": box[1], "BOX_Q": box[2]}
        return Launch(_boxes, (cdiv(n, box[0]) * cdiv(p, box[1]) * cdiv(q, box[2]),), args, flags)
    args = (
        a, weight2, scale2, shift2, weight3, scale3, shift3, shortcut, weight_shortcut, scale_shortcut, shift_shortcut,
        out, weight1, scale1, shift1, out if following is None else following,
        n, h, w, p, q, k, c, short_h, short_w, problem.stride, short_stride,
    )  # fmt: skip
    flags |= {"WIDE": wide(a, shortcut, out, weight2, weight3, weight_shortcut, weight1), "BLOCK_M": config.block_m}
    return Launch(_gather, (cdiv(problem.pixels, config.block_m),), args, flags)
