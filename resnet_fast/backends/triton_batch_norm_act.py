"""Triton's launches of training BatchNorm + residual + ReLU, with the arguments of their twins in ``backends.cuda``.

Arguments are checked by the ops, not here. triton is imported by the first launch. All images are [N, C, H, W], dense
channels_last and of one dtype; vectors are [C], float32 and dense. Definitions as torch.nn.functional.batch_norm: Ioffe
& Szegedy 2015, arXiv:1502.03167.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import triton

if TYPE_CHECKING:
    from resnet_fast.kernels.problems import BatchNormAct

_PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def _kernel() -> ModuleType:
    from resnet_fast.kernels import batch_norm_act

    return batch_norm_act


def _problem(x: Tensor, step: str, output: Tensor | None = None, residual: Tensor | None = None) -> BatchNormAct:
    """Return an image's memory as a matrix [pixels, channels]."""
    from resnet_fast.kernels.problems import BatchNormAct

    c = x.shape[1]
    rows = x.numel() // c if c else 0
    return BatchNormAct(rows, c, _PRECISIONS[x.dtype], step, relu=output is not None, residual=residual is not None)


def _workspace(kernel: ModuleType, problem: BatchNormAct, config: Any, device: torch.device) -> Tensor:
    return torch.empty(kernel.workspace_size(problem, config), dtype=torch.float32, device=device)


def batch_norm_act_statistics(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    eps: float,
    momentum: float,
    variance: bool = False,
) -> None:
    """Fill ``mean`` and ``invstd = 1 / sqrt(variance + eps)`` of x's channels, and update the running statistics.

    ``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance; None for no such statistics.

    Args:
        variance: ``invstd`` becomes the biased variance instead, which is what other ranks' statistics merge with.
    """
    kernel, problem = _kernel(), _problem(x, "statistics")
    config = kernel.choose(problem, triton.gpu_of(x.device))
    workspace = _workspace(kernel, problem, config, x.device)
    with triton.on(x.device):
        for launch in kernel.statistics(
            x, mean, invstd, running_mean, running_var, workspace, problem, config, eps=eps, momentum=momentum,
            variance=variance,
        ):  # fmt: skip
            launch()


def batch_norm_act_apply(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    activation: str = "relu",
) -> None:
    """Fill ``out`` with ``act((x - mean) * invstd * gamma + beta + residual)``; it may be x or the residual."""
    kernel, problem = _kernel(), _problem(x, "apply", residual=residual)
    config = kernel.choose(problem, triton.gpu_of(x.device))
    with triton.on(x.device):
        for launch in kernel.apply(
            x, mean, invstd, gamma, beta, residual, out, problem, config, activation=activation
        ):  # fmt: skip
            launch()


def batch_norm_act_reduce(
    grad: Tensor,
    x: Tensor,
    output: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sum_grad: Tensor,
    sum_grad_xhat: Tensor,
) -> None:
    """Fill the sums over pixels of ``g`` (beta's gradient) and of ``g * (x - mean) * invstd`` (gamma's).

    ``g`` is ``grad`` where the ReLU was open, which ``output`` tells; all of it if that is None.
    """
    kernel, problem = _kernel(), _problem(x, "reduce", output)
    config = kernel.choose(problem, triton.gpu_of(x.device))
    workspace = _workspace(kernel, problem, config, x.device)
    with triton.on(x.device):
        for launch in kernel.reduce(
            grad, x, output, mean, invstd, sum_grad, sum_grad_xhat, workspace, problem, config
        ):  # fmt: skip
            launch()


def batch_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    output: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    gamma: Tensor | None,
    sum_grad: Tensor | None,
    sum_grad_xhat: Tensor | None,
    grad_x: Tensor | None,
    grad_residual: Tensor | None,
) -> None:
    """Fill ``grad_x`` and ``grad_residual`` (``g`` itself), if they are not None.

    ``grad_x = gamma * invstd * (g - sum_grad / rows - xhat * sum_grad_xhat / rows)``, without the sums (None) for
    statistics that do not depend on x.
    """
    if grad_x is None and grad_residual is None:
        return
    kernel, problem = _kernel(), _problem(x, "backward", output, grad_residual)
    config = kernel.choose(problem, triton.gpu_of(x.device))
    with triton.on(x.device):
        for launch in kernel.backward(
            grad, x, output, mean, invstd, gamma, sum_grad, sum_grad_xhat, grad_x, grad_residual, problem, config
        ):  # fmt: skip
            launch()
