"""conv_fp8: convolution of float8 (e4m3) with a float8 weight, its residual, ReLU and one rounding: launch choices.

    sum[m, k] = sum over (r, s, c) of x[pixel m at tap (r, s), c] * weight[k, r, s, c]                      in float32
    y[m, k] = act(sum[m, k] * scale[k] + shift[k] + residual[m, k] * residual_scale)                        in float32
    out[m, k] = y clamped to +-448 and rounded half to even to float8; or y as floating point numbers

The kernels are conv_int8's, in which the type of x decides how is multiplied and what is stored.

Hopper's matrix units add products of float8 with 13 bits of fraction beside the largest of them and the sum so far. A
sum of 4608 products in one piece loses more by that than its rounding to half precision would. So at most 128 products,
four instructions, are added there, and these sums in float32. That takes registers for both, so tiles are smaller than
conv_int8's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from . import _tables, conv_int8
from ._launch import Launch
from .conv_int8 import Config, blocks, heuristic, supports_boxes, takes, tiles
from .gpus import FLOAT8_CAPABILITIES as CAPABILITIES
from .gpus import GPU
from .problems import ConvFp8 as Problem

NAME = "conv_fp8"

__all__ = ["Config", "Problem", "blocks", "candidates", "choose", "heuristic", "launch", "supports", "supports_boxes",
           "takes", "tiles"]  # fmt: skip


def supports(problem: Problem, gpu: GPU) -> bool:
    """Return whether the kernel computes the problem: one group, on Ada or Hopper."""
    return problem.groups == 1 and gpu.capability in CAPABILITIES


def candidates(problem: Problem, gpu: GPU) -> Iterator[Config]:
    """Every launch choice worth measuring: those of conv_int8 with registers for sums twice."""
    for config in conv_int8.candidates(problem, gpu):
        if config.block_m * config.block_n // (config.num_warps * 32) <= 64:
            yield config


@_tables.remembers
@lru_cache(maxsize=4096)
def choose(problem: Problem, gpu: GPU) -> Config:
    """Return the measured choice if there is one that fits, else the heuristic's."""
    config = _tables.measured(NAME, problem.key(), gpu.name, Config)
    return config if config is not None and takes(config, problem, gpu) else heuristic(problem, gpu)


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
    residual_scale: float = 1.0,
    activation: str = "relu",
    residual_after_activation: bool = False,
) -> Launch:
    """Return the launch that fills ``out``.

    Args:
        x: [N, C, H, W] float8, residual and out: [N, K, P, Q] of one dtype, all dense channels_last.
        weight: [K, C, R, S] float8, dense channels_last. scale, shift: [K] float32.
        config: as for conv_int8. residual_scale: of the residual, in steps of ``out`` if that is float8.
    """
    return conv_int8.launch(
        x, weight, scale, shift, None, residual, out, problem, config, residual_scale=residual_scale,
        activation=activation, residual_after_activation=residual_after_activation, zero_point=0.0,
    )  # fmt: skip
