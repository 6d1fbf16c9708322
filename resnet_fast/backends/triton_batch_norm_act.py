"""Triton's launches of training BatchNorm + residual + ReLU: the twins of those in ``backends.cuda``, which describes
their tensors.

Arguments are checked by the ops, not here. triton is imported by the first launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import triton


def _launch(
    step: str, tensors: tuple[Tensor | None, ...], x: Tensor, output: Any = None, residual: Any = None, **options: Any
) -> None:
    """Launch a step of the kernel on its tensors, with workspace if it sums over rows.

    Args:
        x: one of the tensors, whose memory is a matrix [rows, channels]; output, residual: others, or None.
    """
    from resnet_fast.kernels import batch_norm_act as kernel

    c = x.shape[1]
    rows = x.numel() // c if c else 0
    precision = triton.PRECISIONS[x.dtype]
    problem = kernel.Problem(rows, c, precision, step, relu=output is not None, residual=residual is not None)
    config = kernel.choose(problem, triton.gpu_of(x.device))
    if step in ("statistics", "reduce"):
        size = kernel.workspace_size(problem, config)
        tensors = (*tensors, torch.empty(size, dtype=torch.float32, device=x.device))

    def launches() -> None:
        for launch in getattr(kernel, step)(*tensors, problem, config, **options):
            launch()

    triton.run("batch_norm_act", problem, x.device, launches)


def batch_norm_act_statistics(x: Tensor, *vectors: Tensor | None, **options: Any) -> None:
    """Launch the twin of :func:`cuda.batch_norm_act_statistics`.

    Args:
        variance: if True, ``invstd`` becomes the biased variance instead, which is what other ranks' statistics merge
            with.
    """
    _launch("statistics", (x, *vectors), x, **options)


def batch_norm_act_apply(x: Tensor, *others: Tensor | None, activation: str = "relu") -> None:
    """Launch the twin of :func:`cuda.batch_norm_act_apply`."""
    residual, _out = others[-2:]
    _launch("apply", (x, *others), x, residual=residual, activation=activation)


def batch_norm_act_reduce(grad: Tensor, x: Tensor, output: Tensor | None, *vectors: Tensor) -> None:
    """Launch the twin of :func:`cuda.batch_norm_act_reduce`."""
    _launch("reduce", (grad, x, output, *vectors), x, output)


def batch_norm_act_backward(grad: Tensor, x: Tensor, output: Tensor | None, *others: Tensor | None) -> None:
    """Launch the twin of :func:`cuda.batch_norm_act_backward`."""
    grad_x, grad_residual = others[-2:]
    if grad_x is not None or grad_residual is not None:
        _launch("backward", (grad, x, output, *others), x, output, grad_residual)
