"""conv_statistics: a training convolution with the moments of its output, by the kernels of conv_bn_act; no own kernel.

    y[m, k] = sum over (r, s, c) of a[pixel m at tap (r, s), c] * weight[k, r, s, c],  mean and variance of y over m

a is x, or relu(x * scale + shift) made while x is read. Floor: x read once, y written once, which is what it saves: the
pass over y for its statistics, and a's way through memory. The launches are a convolution and one or two that merge the
moments of its tiles; see conv_bn_act.launch_raw and batch_norm_act.merge_moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from . import _tables, batch_norm_act, conv_bn_act
from ._launch import Launch
from .conv_bn_act import Config
from .gpus import GPU
from .problems import ConvStatistics as Problem

__all__ = ["Config", "Problem", "candidates", "choose", "heuristic", "launches", "workspace_size"]

NAME = "conv_statistics"


def heuristic(problem: Problem, gpu: GPU) -> Config:
    """Return a launch choice from the shape alone: conv_bn_act's with a residual, as moments take registers, too."""
    return conv_bn_act.tiled(replace(problem, residual=True), gpu)


def candidates(problem: Problem, gpu: GPU) -> Iterator[Config]:
    """Every launch choice worth measuring in which a tile is one program's and its only one: moments are of a tile."""
    every = conv_bn_act.candidates(problem, gpu)
    return (config for config in every if not config.persistent and config.shares == 1 and config.block_m == config.box)


@_tables.remembers
@lru_cache(maxsize=4096)
def choose(problem: Problem, gpu: GPU) -> Config:
    """Return the measured choice if there is one that the kernels can take, else the heuristic's."""
    config = _tables.measured(NAME, problem.key(), gpu.name, Config)
    return config if config is not None and conv_bn_act.takes(config, problem, gpu) else heuristic(problem, gpu)


def workspace_size(problem: Problem, config: Config) -> int:
    """Numbers of float32 that the launches need as a workspace; they need no particular contents."""
    return conv_bn_act.workspace_size(problem, config)


def launches(
    x: Any,
    weight: Any,
    scale: Any,
    shift: Any,
    y: Any,
    mean: Any,
    variance: Any,
    workspace: Any,
    problem: Problem,
    config: Config,
) -> tuple[Launch, ...]:
    """Return the launches that fill ``y``, ``mean`` and the biased ``variance``.

    Args:
        x: [N, C, H, W], y: [N, K, P, Q], dense channels_last and of one dtype. weight: [K, C / groups, R, S], alike.
        scale, shift: [C] float32, dense, if the problem is ``normalised``, else None.
        mean, variance: [K] float32. workspace: ``workspace_size`` numbers of float32.
    """
    convolution, tiles = conv_bn_act.launch_raw(
        x, weight, y, problem, config, scale_in=scale, shift_in=shift, workspace=workspace
    )
    merging = batch_norm_act.merge_moments(
        workspace, mean, variance, None, None, problem.pixels, tiles, problem.k, eps=0.0, momentum=0.0, variance=True
    )
    return (convolution, *merging)
