"""head: global average pool and fully connected layer in one launch, without atomics; kernel and launch.

    out[n, k] = sum over c of mean over pixels of x[n, pixel, c] * weight[k, c] + bias[k]

Floor: x and the weights read once from memory; the arithmetic is nothing.

Tile picture: a program owns BLOCK_M images and BLOCK_N outputs and walks over the channels. For BLOCK_C of them it
sums its images' pixels in float32, rounds the means as any product's operand, and multiplies; the next steps are copied
to shared memory meanwhile, if a step has all pixels. So each image's pixels are read once per block of outputs, and
each weight once per block of images, from the level-2 cache after the first time. What a multiprocessor can fetch from
that cache is what bounds the kernel: see ``traffic``.

Trap: programs of the same images must run at the same time, or their pixels come from memory again; hence the outputs
vary fastest in the order of programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from . import _tables
from ._language import dot, rounded, wait_for_earlier_kernels
from ._launch import ITEMSIZE, Launch, cdiv, dot_precision, power_of_two, wide
from .gpus import GPU
from .problems import Head as Problem

NAME = "head"


@triton.jit
def _sum(images, first, c, inside, PIXELS, C, BLOCK_P: tl.constexpr):
    """[images, channels] float32: the sum of BLOCK_P pixels from ``first`` on."""
    # Pixels outermost: warps and registers then divide pixels, and most of the sum stays within a thread.
    pixel = first + tl.arange(0, BLOCK_P)
    pixels = tl.load(
        images[None, :, None] + pixel[:, None, None] * C + c[None, None, :],
        mask=(pixel < PIXELS)[:, None, None] & inside[None, :, :],
        other=0.0,
    )
    return tl.sum(pixels.to(tl.float32), axis=0)


@triton.jit(do_not_specialize=["N", "PIXELS"])
def _head(
    x,  # [N, PIXELS, C]
    weight,  # [K, C]
    bias,  # [K], any floating point type
    out,  # [N, K]
    N,
    PIXELS,
    C,
    K,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ONCE: tl.constexpr,  # whether BLOCK_P are all pixels: a loop of one round would keep the copies from running ahead
):
    wait_for_earlier_kernels()
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    m = (pid // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    if WIDE:
        m = m.to(tl.int64)
    inside_m = m < N
    inside_k = k < K
    images = x + m * (PIXELS * C)
    rows = weight + k * C
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside_c = c < C
        w = tl.load(rows[:, None] + c[None, :], mask=inside_k[:, None] & inside_c[None, :], other=0.0)
        total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        inside = inside_m[:, None] & inside_c[None, :]
        if ONCE:
            total += _sum(images, 0, c, inside, PIXELS, C, BLOCK_P)
        else:
            for first in range(0, PIXELS, BLOCK_P):
                total += _sum(images, first, c, inside, PIXELS, C, BLOCK_P)
        mean = rounded(total / PIXELS, weight.dtype.element_ty)
        accumulator = dot(w, tl.trans(mean), accumulator, PRECISION)
    y = accumulator
    if BIAS:
        y += tl.load(bias + k, mask=inside_k, other=0.0).to(tl.float32)[:, None]
    mask = inside_k[:, None] & inside_m[None, :]
    tl.store(out + (m * K)[None, :] + k[:, None], rounded(y, out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    """A launch choice: images, outputs, channels and pixels per step, warps, and steps on their way at once."""

    block_m: int
    block_n: int
    block_c: int
    block_p: int
    num_warps: int
    num_stages: int

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of shared memory a program takes at most: steps on their way, operands, sums, the output."""
        item = ITEMSIZE[problem.precision]
        operands = (max(self.block_m, 8) + self.block_n) * self.block_c * item
        sums = self.block_m * self.block_c * 4 * self.num_warps
        ahead = (self.num_stages - 1) * (self.block_m * self.block_p + self.block_n) * self.block_c * item
        return ahead + operands + max(sums, self.block_m * self.block_n * 4)


#: Steps on their way at once, where a step has all pixels.
_MOST_STAGES = 4


def _config(problem: Problem, block_m: int, block_n: int, num_warps: int, gpu: GPU) -> Config:
    """Steps that keep every thread at up to 128 bytes of pixels on their way, in pieces of at least 64 channels."""
    item = ITEMSIZE[problem.precision]
    elements = num_warps * 32 * 128 // item
    pixels = power_of_two(problem.h * problem.w, 1, 64)
    # Four-byte weights: with longer pieces ptxas spills for 64 x 128 of them on sm_90.
    longest = 256 if item == 2 or block_n < 64 else 64
    channels = power_of_two(problem.c, 16, max(64, min(longest, elements // (block_m * pixels))))
    at_once = max(1, min(pixels, elements // (block_m * channels)))
    config = Config(block_m, block_n, channels, at_once, num_warps, 1)
    if at_once < problem.h * problem.w:
        return config
    stages = range(min(_MOST_STAGES, cdiv(problem.c, channels)), 1, -1)
    deeper = (replace(config, num_stages=count) for count in stages)
    return next((each for each in deeper if _fits(each, problem, gpu)), config)


def traffic(problem: Problem, config: Config, gpu: GPU) -> int:
    """Bytes that the busiest multiprocessor fetches from the level-2 cache: what the kernel's time should follow."""
    programs = cdiv(problem.n, config.block_m) * cdiv(problem.k, config.block_n)
    rows = config.block_m * problem.h * problem.w + config.block_n
    return cdiv(programs, gpu.multiprocessors) * rows * problem.c * ITEMSIZE[problem.precision]


def _fits(config: Config, problem: Problem, gpu: GPU) -> bool:
    return config.shared_memory(problem) <= gpu.shared_memory


def _tiles(problem: Problem) -> Iterator[tuple[int, int]]:
    """Images by outputs: accumulators of at most 32 registers for a thread of eight warps."""
    for block_m in (1, 2, 4, 8, 16, 32, 64):
        for block_n in (16, 32, 64, 128, 256):
            sensible = block_m <= power_of_two(problem.n, 1, 64) and block_n <= power_of_two(problem.k, 16, 256)
            if sensible and block_m * block_n <= 8192:
                yield block_m, block_n


def heuristic(problem: Problem, gpu: GPU) -> Config:
    """The tile with the least traffic: few images by few outputs for small batches, some by many for large ones."""
    configs = [_config(problem, *tile, 8, gpu) for tile in _tiles(problem)]
    return min((c for c in configs if _fits(c, problem, gpu)), key=lambda c: (traffic(problem, c, gpu), -c.block_n))


def candidates(problem: Problem, gpu: GPU) -> Iterator[Config]:
    """Every launch choice worth measuring: tiles within three times the least traffic, four to sixteen warps."""
    configs = [_config(problem, *tile, warps, gpu) for tile in _tiles(problem) for warps in (4, 8, 16)]
    least = traffic(problem, heuristic(problem, gpu), gpu)
    for config in configs:
        if _fits(config, problem, gpu) and traffic(problem, config, gpu) <= 3 * least:
            yield config


@_tables.remembers
@lru_cache(maxsize=4096)
def choose(problem: Problem, gpu: GPU) -> Config:
    """Return the measured choice if there is one that fits, else the heuristic's."""
    config = _tables.measured(NAME, problem.key(), gpu.name, Config)
    if config is not None and _fits(config, problem, gpu):
        return config
    return heuristic(problem, gpu)


def launch(x: Any, weight: Any, bias: Any, out: Any, problem: Problem, config: Config) -> Launch:
    """Return the launch that fills ``out``.

    Args:
        x: [N, C, H, W], dense channels_last.
        weight: [K, C] of x's dtype, dense.
        bias: [K], dense, of any floating point dtype, or None.
        out: [N, K] of x's dtype, dense.
    """
    options = {
        "BIAS": bias is not None,
        "PRECISION": dot_precision(problem.precision),
        "WIDE": wide(x, out),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_C": config.block_c,
        "BLOCK_P": config.block_p,
        "ONCE": config.block_p >= problem.h * problem.w,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    args = (x, weight, out if bias is None else bias, out, problem.n, problem.h * problem.w, problem.c, problem.k)
    grid = (cdiv(problem.n, config.block_m) * cdiv(problem.k, config.block_n),)
    return Launch(_head, grid, args, options)
