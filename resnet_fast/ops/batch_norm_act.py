"""``batch_norm_act``: BatchNorm + residual + ReLU with gradients, from the batch's statistics or from stored ones.

Three torch ops: ``batch_norm_statistics`` (no gradient), ``batch_norm_act`` (normalise, add, activate) and its
backward, ``batch_norm_act_backward``. Statistics go into the second as tensors; its gradient for x follows them back
to x where they are the batch's own. With the name of a process group, sums are taken over all its processes
(SyncBatchNorm).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from resnet_fast.kernels.problems import BatchNormAct as Problem

from .. import backends
from ..backends import cuda, triton, triton_batch_norm_act
from ._common import (
    accumulate_dtype,
    cast,
    channels_last,
    check_activation,
    check_device,
    check_image,
    choose_kernel,
    empty_channels_last,
    kernel_vector,
    kernels_for,
    register,
    relu_gradient,
    result,
    transformed,
)

NAME = "batch_norm_act"

#: Values of a row for torch's CPU statistics, whose sums then fit into a core's cache.
_WIDEST = 32768


# --- checks


def _check(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    other: Tensor | None,
    residual: Tensor | None,
    activation: str = "none",
) -> None:
    """``mean`` and ``other`` (a variance or inverse deviation) are [C], as gamma and beta."""
    check_activation(NAME, activation)
    check_image(NAME, x)
    channels = x.shape[1]
    narrow = (x.dtype, torch.float32) if x.dtype is not torch.float64 else (torch.float64,)
    for name, vector in {"gamma": gamma, "beta": beta, "mean": mean, "variance": other}.items():
        if vector is None:
            continue
        if vector.dim() != 1 or vector.shape[0] != channels:
            raise ValueError(f"{NAME}: {name} has shape {list(vector.shape)}, x has {channels} channels: [{channels}]")
        if vector.dtype not in narrow:
            raise TypeError(
                f"{NAME}: {name} is {vector.dtype}, x is {x.dtype}; it must be {' or '.join(map(str, narrow))}"
            )
    if residual is not None and (residual.shape != x.shape or residual.dtype is not x.dtype):
        raise ValueError(
            f"{NAME}: residual is {residual.dtype} of shape {list(residual.shape)}, x is {x.dtype} of shape "
            f"{list(x.shape)}; they must be the same"
        )
    check_device(NAME, x, gamma=gamma, beta=beta, mean=mean, variance=other, residual=residual)


def _rows(x: Tensor) -> int:
    """How many values a channel has."""
    n, _, h, w = x.shape
    return n * h * w


def _vector(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if vector is None else vector.detach().to(dtype)


def _kernels(x: Tensor, step: str, relu: bool = False, residual: bool = False) -> ModuleType | None:
    """The module whose launches compute a step (of ``Problem``) for ``x``: CUDA's, Triton's, or none."""
    whose = kernels_for(NAME, x)
    if not whose:
        return None
    problem = Problem(_rows(x), x.shape[1], triton.precision(x.dtype), step, relu, residual)
    backend, _ = choose_kernel(NAME, problem, x.device, whose)
    return {"cuda": cuda, "triton": triton_batch_norm_act}.get(backend)


# --- statistics


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, as float64 tensors: plain torch (Welford), any device and dtype."""
    var, mean = torch.var_mean(x.to(accumulate_dtype(x.dtype)), (0, 2, 3), correction=0)
    return mean.double(), var.double()


def _moments_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_moments`, by torch's CPU kernels.

    That for channels_last sums each channel in float32, so it is told of more channels and fewer pixels than there are,
    and these short sums are merged in float64 (Chan, Golub & LeVeque 1983). Where a mean is many deviations from 0,
    whose digits float32 sums would lose, they are taken a second time of the differences from that mean.
    """
    if x.dtype is torch.float64:
        return _moments(x)
    x = channels_last(x)
    mean, var = _merged(x, None)
    if bool((mean.square() > 64 * var).any()):
        far = mean.to(torch.float32)
        difference, var = _merged(x, far)
        mean = far.double() + difference
    return mean, var


def _side_by_side(x: Tensor) -> list[tuple[int, int, int]]:
    """How to cut the pixels of an image stored channels_last: (first, last + 1, how many next to each other).

    Memory that holds [pixels, C] is also [pixels / n, n * C]: torch's float32 sums over its rows are n times shorter.
    """
    rows, channels = _rows(x), x.shape[1]
    most = min(_WIDEST // channels, rows // 32)
    times = 1 << (most.bit_length() - 1) if most else 1
    even = rows - rows % times
    return [(0, even, times)] + ([(even, rows, 1)] if even < rows else [])


def _rows_of(x: Tensor, first: int, end: int, times: int) -> Tensor:
    """Those pixels as an image of ``times * C`` channels, a view of x's memory."""
    matrix = x.permute(0, 2, 3, 1).reshape(_rows(x), x.shape[1])[first:end]
    return matrix.reshape(1, (end - first) // times, 1, times * x.shape[1]).permute(0, 3, 1, 2)


def _merged(x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance in float64 of ``x - shift``, for x stored channels_last."""
    rows, channels = _rows(x), x.shape[1]
    means, variances, counts = [], [], []
    for first, end, times in _side_by_side(x):
        image = _rows_of(x, first, end, times)
        if shift is not None:
            image = image - shift.repeat(times).view(1, -1, 1, 1)
        running = (None, None)
        if x.dtype is not torch.float32:  # running statistics in float32 make it give its results in that too
            running = tuple(torch.zeros(2, times * channels))
        mean, variance = torch.batch_norm_update_stats(image, *running, 0.0)
        means.append(mean.double().view(times, channels))
        variances.append(variance.double().view(times, channels))
        counts += [(end - first) // times] * times
    weights = torch.tensor(counts, dtype=torch.float64).view(-1, 1) / rows
    each = torch.cat(means)
    mean = (each * weights).sum(0)
    return mean, ((torch.cat(variances) + (each - mean).square()) * weights).sum(0)


def _update(running: Tensor | None, batch: Tensor, momentum: float | Tensor) -> None:
    if running is not None:
        running.copy_(running.double() * (1 - momentum) + batch * momentum)


def _all_reduce(sums: Tensor, group: str) -> None:
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    torch.distributed.all_reduce(sums, group=_resolve_process_group(group))  # type: ignore[arg-type]


def _synchronised(mean: Tensor, var: Tensor, rows: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count [1] over all processes, by one all-reduce of counts, sums and sums of squares.

    In float64, where the difference between a mean square and the square of a mean has digits to spare.
    """
    count = torch.full((1,), float(rows), dtype=torch.float64, device=mean.device)
    sums = torch.cat([count, mean * rows, (var + mean.square()) * rows])
    _all_reduce(sums, group)
    count = sums[:1]
    mean, squares = (sums[1:] / count.clamp(min=1)).chunk(2)
    return mean, (squares - mean.square()).clamp(min=0), count  # clamp keeps NaN


def _in_kernel(running: Tensor | None) -> bool:
    """Whether a kernel can update these running statistics."""
    return running is None or (running.dtype is torch.float32 and running.is_contiguous())


def _statistics(
    kernels: ModuleType | None,
    moments: Any,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, None, None, running_mean, running_var, None)
    dtype, rows, channels = accumulate_dtype(x.dtype), _rows(x), x.shape[1]
    if kernels is not None:
        alone = not group and _in_kernel(running_mean) and _in_kernel(running_var)
        running = (running_mean, running_var) if alone else (None, None)
        mean, invstd = (torch.empty(channels, dtype=torch.float32, device=x.device) for _ in range(2))
        kernels.batch_norm_act_statistics(
            channels_last(x), mean, invstd, *running, eps=eps if alone else 0.0, momentum=momentum
        )
        if alone:
            for each in running:
                if each is not None:
                    torch.autograd.graph.increment_version(each)
            return mean, invstd, torch.empty(0, dtype=dtype, device=x.device)
        # Without eps the inverse deviation is the variance in other words; of 0 it is infinite, which this makes 0.
        mean, var = mean.double(), invstd.double().square().reciprocal()
    elif rows and channels:
        mean, var = moments(x)
    else:
        mean, var = (torch.zeros(channels, dtype=torch.float64, device=x.device) for _ in range(2))
    count: Tensor | None = None
    unbiased: Any = rows / (rows - 1) if rows > 1 else torch.nan
    weight: float | Tensor = momentum if rows else 0.0  # a batch without pixels leaves them as they are, as in torch
    if group:
        mean, var, count = _synchronised(mean, var, rows, group)
        unbiased, weight = count / (count - 1), momentum * (count > 0)
    if rows or group:
        _update(running_mean, mean, weight)
        _update(running_var, var * unbiased, weight)
    count = torch.empty(0, dtype=dtype, device=x.device) if count is None else count.to(dtype)
    return mean.to(dtype), (var + eps).rsqrt().to(dtype), count


def _statistics_default(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _statistics(None, _moments, x, *rest)


def _statistics_cuda(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _statistics(_kernels(x, "statistics"), _moments, x, *rest)


def _statistics_cpu(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    moments = _moments_cpu if _by_torch(x) else _moments
    return _statistics(_kernels(x, "statistics"), moments, x, *rest)


def _statistics_fake(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, None, None, running_mean, running_var, None)
    dtype = accumulate_dtype(x.dtype)
    mean, invstd = (torch.empty(x.shape[1], dtype=dtype, device=x.device) for _ in range(2))
    return mean, invstd, torch.empty(1 if group else 0, dtype=dtype, device=x.device)


register(
    "batch_norm_statistics(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, "
    "str group) -> (Tensor, Tensor, Tensor)",
    default=_statistics_default,
    cpu=_statistics_cpu,
    cuda=_statistics_cuda,
    fake=_statistics_fake,
)


# --- statistics of moments that are known already


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, [C] in float32 (float64 for float64), without gradients."""
    mean, invstd, _ = torch.ops.resnet_fast.batch_norm_statistics.default(x.detach(), None, None, 0.0, 0.0, "")
    return mean, invstd.double().square().reciprocal().to(invstd.dtype)


def _from_moments(
    mean: Tensor,
    variance: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    rows: int,
    momentum: float,
    eps: float,
) -> Tensor:
    if rows:
        _update(running_mean, mean.double(), momentum)
        _update(running_var, variance.double() * (rows / (rows - 1) if rows > 1 else torch.nan), momentum)
    return (variance.double() + eps).rsqrt().to(variance.dtype)


def _from_moments_kernel(
    mean: Tensor,
    variance: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    rows: int,
    momentum: float,
    eps: float,
) -> Tensor:
    """By one launch, which Triton has whatever computed the moments."""
    fits = rows and mean.dtype is torch.float32 and _in_kernel(running_mean) and _in_kernel(running_var)
    if not fits or kernels_for(NAME, mean) not in ("triton", "auto"):
        return _from_moments(mean, variance, running_mean, running_var, rows, momentum, eps)
    from resnet_fast.kernels import batch_norm_act as kernel

    mean, variance = kernel_vector(mean), kernel_vector(variance)
    invstd = torch.empty_like(variance)
    with triton.on(mean.device):
        kernel.finish(
            mean, variance, invstd, running_mean, running_var, rows, mean.shape[0], eps=eps, momentum=momentum
        )()
    for each in (running_mean, running_var):
        if each is not None:
            torch.autograd.graph.increment_version(each)
    return invstd


register(
    "batch_norm_from_moments(Tensor mean, Tensor variance, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "SymInt rows, float momentum, float eps) -> Tensor",
    default=_from_moments,
    cpu=_from_moments_kernel,
    cuda=_from_moments_kernel,
    fake=lambda mean, variance, *rest: torch.empty_like(variance),
)


def from_moments(
    mean: Tensor,
    variance: Tensor,
    rows: int,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, None]:
    """What :func:`statistics` gives and updates, of the mean and biased variance [C] of ``rows`` values a channel."""
    with torch.no_grad():
        invstd = torch.ops.resnet_fast.batch_norm_from_moments.default(
            mean, variance, running_mean, running_var, rows, momentum, eps
        )
    return mean, invstd, None


# --- forward


def reference(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """``act((x - mean) * invstd * gamma + beta + residual)`` in plain torch, rounded once; any device and dtype."""
    dtype = accumulate_dtype(x.dtype)

    def per_channel(vector: Tensor) -> Tensor:
        return vector.to(dtype).view(1, -1, 1, 1)

    y = (x.to(dtype) - per_channel(mean)) * per_channel(invstd)
    if gamma is not None:
        y = y * per_channel(gamma)
    if beta is not None:
        y = y + per_channel(beta)
    if residual is not None:
        y = y + residual.to(dtype)
    return result((y.relu() if activation == "relu" else y).to(x.dtype))


def _default(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    residual: Tensor | None,
    activation: str,
    of_batch: bool,
    count: Tensor | None,
    group: str,
) -> Tensor:
    _check(x, gamma, beta, mean, invstd, residual, activation)
    return reference(x, gamma, beta, mean, invstd, residual, activation)


def _kernel(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    residual: Tensor | None,
    activation: str,
    of_batch: bool,
    count: Tensor | None,
    group: str,
) -> Tensor:
    _check(x, gamma, beta, mean, invstd, residual, activation)
    kernels = _kernels(x, "apply", residual=residual is not None)
    if kernels is None:
        layers = _native if x.numel() and _by_torch(x) else reference
        return layers(x, gamma, beta, mean, invstd, residual, activation)
    vectors = [None if vector is None else kernel_vector(vector) for vector in (mean, invstd, gamma, beta)]
    out = empty_channels_last(x, x.shape)
    residual = None if residual is None else channels_last(residual)
    kernels.batch_norm_act_apply(channels_last(x), *vectors, residual, out, activation=activation)
    return out


def _by_torch(x: Tensor) -> bool:
    """Whether torch's own kernels are to compute what ours do not, rather than the reference."""
    return backends.runs("onednn", "cpu") if x.device.type == "cpu" else backends.current() != "reference"


def _native(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """torch's own kernels; the last two work in place, on a CPU on what is still in its cache where x is small."""
    dtype = accumulate_dtype(x.dtype)
    vectors = (_vector(gamma, dtype), _vector(beta, dtype), mean.to(dtype), _variance(invstd, dtype))
    out = torch.native_batch_norm(channels_last(x), *vectors, False, 0.0, 0.0)[0]
    if residual is not None:
        out += residual
    return result(out.relu_() if activation == "relu" else out)


def _variance(invstd: Tensor, dtype: torch.dtype) -> Tensor:
    """What torch's kernels, which take a variance and eps, are to be given with eps = 0."""
    return invstd.double().square().reciprocal().to(dtype)


def _fake(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    residual: Tensor | None,
    activation: str,
    of_batch: bool,
    count: Tensor | None,
    group: str,
) -> Tensor:
    _check(x, gamma, beta, mean, invstd, residual, activation)
    return empty_channels_last(x, x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gamma, beta, mean, invstd, residual, ctx.activation, ctx.of_batch, count, ctx.group = inputs
    ctx.has_residual = residual is not None
    # The output, which the next layer keeps anyway, shows where the ReLU was open.
    ctx.save_for_backward(x, gamma, beta, mean, invstd, count, output if ctx.activation == "relu" else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, gamma, beta, mean, invstd, count, output = ctx.saved_tensors
    need_x, need_gamma, need_beta, *_, need_residual = ctx.needs_input_grad[:6]
    gradients = norm_gradients(
        grad, x, output, gamma, beta, mean, invstd, count, ctx.of_batch, ctx.group,
        (need_x, need_gamma, need_beta, need_residual),
    )  # fmt: skip
    return *gradients[:3], None, None, gradients[3], *([None] * 4)


def norm_gradients(
    grad: Tensor,
    x: Tensor,
    output: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    count: Tensor | None,
    of_batch: bool,
    group: str,
    needed: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``batch_norm_act`` for x, gamma, beta and the residual, None where not ``needed``.

    ``output``: the op's result if it ends with a ReLU. Differentiable themselves where gradients are recorded.
    """
    if torch.is_grad_enabled():
        return _differentiable(grad, x, output, gamma, beta, mean, invstd, of_batch, group, needed)
    need_x, need_gamma, need_beta, need_residual = needed
    masked = output is not None
    made = torch.ops.resnet_fast.batch_norm_act_backward.default(
        grad, x, output, gamma, mean, invstd, of_batch, count, group, need_x, need_gamma or need_beta,
        need_residual and masked,
    )  # fmt: skip
    grad_x, sum_grad, sum_grad_xhat, grad_residual = made
    return (
        grad_x if need_x else None,
        sum_grad_xhat.to(gamma.dtype) if need_gamma and gamma is not None else None,
        sum_grad.to(beta.dtype) if need_beta and beta is not None else None,
        (grad_residual if masked else grad) if need_residual else None,
    )


def _differentiable(
    grad: Tensor,
    x: Tensor,
    output: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    of_batch: bool,
    group: str,
    needed: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The gradients in plain torch, for gradients of gradients."""
    if group:
        raise NotImplementedError(f"{NAME}: statistics over several processes have first derivatives only")
    dtype = accumulate_dtype(x.dtype)
    g = (grad if output is None else relu_gradient(grad, output)).to(dtype)
    wide = x.to(dtype)
    dims, one = (0, 2, 3), (1, -1, 1, 1)
    if of_batch:
        # The statistics as functions of x; what is subtracted is the same numbers without a history.
        centre = wide.mean(dims)
        variance = (wide - centre.view(one)).square().mean(dims)
        known = variance.detach()
        invstd = (variance - known + invstd.detach().to(dtype).square().reciprocal()).rsqrt()
        mean = centre
    xhat = (wide - mean.to(dtype).view(one)) * invstd.to(dtype).view(one)
    sum_grad, sum_grad_xhat = g.sum(dims), (g * xhat).sum(dims)
    factor = invstd.to(dtype) if gamma is None else invstd.to(dtype) * gamma.to(dtype)
    inner = g
    if of_batch:
        inner = g - (sum_grad.view(one) + xhat * sum_grad_xhat.view(one)) / _rows(x)
    return (
        (inner * factor.view(one)).to(x.dtype) if needed[0] else None,
        sum_grad_xhat.to(gamma.dtype) if needed[1] and gamma is not None else None,
        sum_grad.to(beta.dtype) if needed[2] and beta is not None else None,
        g.to(x.dtype) if needed[3] else None,
    )


def _autocast(dtype: torch.dtype, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # As torch's batch norm under autocast: x stays as it comes; the sum has x's type, as for torch's in-place addition.
    x, gamma, beta, mean, invstd, residual, *rest = args
    return (x, gamma, beta, mean, invstd, None if residual is None else cast(residual, x.dtype), *rest)


register(
    "batch_norm_act(Tensor x, Tensor? gamma, Tensor? beta, Tensor mean, Tensor invstd, Tensor? residual, "
    "str activation, bool of_batch, Tensor? count, str group) -> Tensor",
    default=_default,
    cpu=_kernel,
    cuda=_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


# --- backward


def _check_backward(grad: Tensor, x: Tensor, output: Tensor | None) -> None:
    check_image(f"{NAME}_backward", x)
    for name, tensor in {"grad": grad, "output": output}.items():
        if tensor is not None and (tensor.shape != x.shape or tensor.dtype is not x.dtype):
            raise ValueError(
                f"{NAME}_backward: {name} is {tensor.dtype} of shape {list(tensor.shape)}, x is {x.dtype} of shape "
                f"{list(x.shape)}; they must be the same"
            )
    check_device(f"{NAME}_backward", x, grad=grad, output=output)


def _shares(sums: tuple[Tensor, Tensor], rows: int, count: Tensor | None, group: str) -> tuple[Tensor, Tensor]:
    """The sums that x's gradient is made of: those of all processes, times this one's share of the values.

    Kernels divide by their own number of values.
    """
    if not group or count is None:
        return sums
    both = torch.cat(sums)
    _all_reduce(both, group)
    first, second = (both * (rows / count)).to(both.dtype).chunk(2)
    return first.contiguous(), second.contiguous()


def _backward_reference(
    grad: Tensor,
    x: Tensor,
    output: Tensor | None,
    gamma: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    of_batch: bool,
    count: Tensor | None,
    group: str,
    need_x: bool,
    need_sums: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of x, sums of g and of g * xhat over pixels, g; in plain torch, any device and dtype."""
    _check_backward(grad, x, output)
    dtype = accumulate_dtype(x.dtype)
    one = (1, -1, 1, 1)
    g = (grad if output is None else relu_gradient(grad, output)).to(dtype)
    xhat = (x.to(dtype) - mean.to(dtype).view(one)) * invstd.to(dtype).view(one)
    sums = g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))
    factor = invstd.to(dtype) if gamma is None else invstd.to(dtype) * gamma.to(dtype)
    inner = g
    if of_batch and need_x:  # when to communicate is the same for all processes, whatever computes there
        first, second = _shares(sums, _rows(x), count, group)
        inner = g - (first.view(one) + xhat * second.view(one)) / _rows(x)
    grad_x = result((inner * factor.view(one)).to(x.dtype)) if need_x else x.new_empty(0)
    return (
        grad_x,
        sums[0] if need_sums else sums[0].new_empty(0),
        sums[1] if need_sums else sums[1].new_empty(0),
        result(g.to(x.dtype, copy=True)) if need_residual else x.new_empty(0),
    )


def _backward_kernel(
    grad: Tensor,
    x: Tensor,
    output: Tensor | None,
    gamma: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    of_batch: bool,
    count: Tensor | None,
    group: str,
    need_x: bool,
    need_sums: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad, x, output)
    kernels = _kernels(x, "backward", output is not None, need_residual)
    if kernels is None:
        layers = _backward_native if x.numel() and not group and _by_torch(x) else _backward_reference
        return layers(grad, x, output, gamma, mean, invstd, of_batch, count, group, need_x, need_sums, need_residual)
    grad, x, output = channels_last(grad), channels_last(x), None if output is None else channels_last(output)
    mean, invstd, gamma = kernel_vector(mean), kernel_vector(invstd), None if gamma is None else kernel_vector(gamma)
    nothing, vector = x.new_empty(0), torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
    sums = (vector.new_empty(0), vector.new_empty(0))
    shares: tuple[Tensor | None, Tensor | None] = (None, None)
    if need_sums or (need_x and of_batch):
        sums = (vector, torch.empty_like(vector))
        kernels.batch_norm_act_reduce(grad, x, output, mean, invstd, *sums)
        if need_x and of_batch:
            shares = _shares(sums, _rows(x), count, group)
    grad_x = empty_channels_last(x, x.shape) if need_x else None
    grad_residual = empty_channels_last(x, x.shape) if need_residual else None
    if need_x or need_residual:
        kernels.batch_norm_act_backward(grad, x, output, mean, invstd, gamma, *shares, grad_x, grad_residual)
    if not need_sums:
        sums = (vector.new_empty(0), vector.new_empty(0))
    return nothing if grad_x is None else grad_x, *sums, nothing.clone() if grad_residual is None else grad_residual


def _backward_native(
    grad: Tensor,
    x: Tensor,
    output: Tensor | None,
    gamma: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    of_batch: bool,
    count: Tensor | None,
    group: str,
    need_x: bool,
    need_sums: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`_backward_reference` for one process, by torch's own kernels."""
    dtype = accumulate_dtype(x.dtype)
    g = channels_last(grad) if output is None else result(relu_gradient(grad, output))
    mean, invstd = mean.to(dtype), invstd.to(dtype)
    one = torch.ones_like(mean) if gamma is None else gamma.detach().to(dtype)
    nothing, empty = x.new_empty(0), mean.new_empty(0)
    grad_x, sums = nothing, (empty, empty.clone())
    x = channels_last(x)
    if need_x:
        # Statistics of the batch are given as what a forward in train mode saves, constant ones as running statistics.
        saved = (None, None, mean, invstd) if of_batch else (mean, _variance(invstd, dtype), None, None)
        grad_x = torch.ops.aten.native_batch_norm_backward.default(
            g, x, one, *saved, of_batch, 0.0, [True, False, False]
        )[0]
    if need_sums:
        sums = _sums(g, x, mean, invstd)
    return (
        result(grad_x) if need_x else nothing,
        *sums,
        (g.clone() if output is None else g) if need_residual else nothing.clone(),
    )


def _sums(g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over pixels of g and of g * xhat, by torch's CPU kernel for constant statistics, cut as for the statistics.

    Those that the gradient of x takes inside are not cut: divided by the number of pixels their errors are small there.
    """
    if x.device.type != "cpu" or x.dtype is torch.float64:
        pieces = [(0, _rows(x), 1)]
    else:
        pieces = _side_by_side(x)
    var, channels = _variance(invstd, mean.dtype), x.shape[1]
    total = torch.zeros(2, channels, dtype=torch.float64, device=x.device)
    for first, end, times in pieces:
        vectors = (torch.ones_like(mean), mean, var)
        gamma, centre, variance = (vector.repeat(times) for vector in vectors)
        _, sum_grad_xhat, sum_grad = torch.ops.aten.native_batch_norm_backward.default(
            _rows_of(g, first, end, times), _rows_of(x, first, end, times), gamma, centre, variance, None, None, False,
            0.0, [False, True, True],
        )  # fmt: skip
        total += torch.stack([sum_grad, sum_grad_xhat]).double().view(2, times, channels).sum(1)
    both = total.to(mean.dtype)
    return both[0].clone(), both[1].clone()


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    output: Tensor | None,
    gamma: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    of_batch: bool,
    count: Tensor | None,
    group: str,
    need_x: bool,
    need_sums: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad, x, output)

    def image(needed: bool) -> Tensor:
        return empty_channels_last(x, x.shape) if needed else x.new_empty(0)

    def vector() -> Tensor:
        return torch.empty(x.shape[1] if need_sums else 0, dtype=accumulate_dtype(x.dtype), device=x.device)

    return image(need_x), vector(), vector(), image(need_residual)


register(
    "batch_norm_act_backward(Tensor grad, Tensor x, Tensor? output, Tensor? gamma, Tensor mean, Tensor invstd, "
    "bool of_batch, Tensor? count, str group, bool need_x, bool need_sums, bool need_residual) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    default=_backward_reference,
    cpu=_backward_kernel,
    cuda=_backward_kernel,
    fake=_backward_fake,
)


# --- the public function


def statistics(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean and ``1 / sqrt(variance + eps)`` of each channel, [C] in float32 (float64 for float64), without gradients.

    Running statistics are updated in place as ``torch.nn.functional.batch_norm`` does. The third result is None, or
    with a process group (its name) the number of values of a channel in all of its processes, [1].
    """
    with torch.no_grad():
        mean, invstd, count = torch.ops.resnet_fast.batch_norm_statistics.default(
            x.detach(), running_mean, running_var, momentum, eps, group
        )
    return mean, invstd, count if group else None


def constant_statistics(running_mean: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor, None]:
    """Stored statistics as :func:`statistics` gives those of a batch."""
    dtype = accumulate_dtype(running_var.dtype)
    # A copy of the mean: running statistics may be set anew between forward and backward, as DDP does.
    return running_mean.detach().to(dtype, copy=True), (running_var.detach().to(dtype) + eps).rsqrt(), None


def batch_norm_act(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    residual_after_activation: bool = False,
    group: str = "",
) -> Tensor:
    """BatchNorm + residual + activation: ``act((x - mean) / sqrt(var + eps) * gamma + beta + residual)``.

    With ``training`` mean and (biased) variance are those of the batch and gradients flow through them; the running
    statistics, where given, become ``(1 - momentum) * running + momentum * batch`` with the unbiased variance. Without
    it they are the running statistics, as constants. As ``torch.nn.functional.batch_norm``; Ioffe & Szegedy 2015,
    arXiv:1502.03167. Computed in float32 (float64 for float64). NaN passes through the ReLU as in torch.

    Args:
        x: [N, C, H, W], floating point, any strides (channels_last is read without a copy).
        gamma, beta: [C], of x's dtype or float32, or None for 1 and 0.
        running_mean, running_var: [C], of x's dtype or float32; both or neither, needed without ``training``.
        residual: as x, or None.
        momentum: the batch's weight in the running statistics.
        activation: "relu" or "none".
        residual_after_activation: add the residual behind the activation instead of before it.
        group: name of a process group (``ProcessGroup.group_name``) over whose processes statistics and the sums of the
            backward are taken, each by one all-reduce; "" for this process alone.

    Returns:
        [N, C, H, W] in x's dtype, stored channels_last. Differentiable in x, gamma, beta and residual.

    Raises:
        ValueError: shapes, devices or options do not fit, or a batch has one value per channel; TypeError: a dtype
            does not fit.
    """
    _check(x, gamma, beta, running_mean, running_var, residual, activation)
    if (running_mean is None) is not (running_var is None):
        raise ValueError(f"{NAME}: running_mean and running_var must both be given or both be None")
    if not training and running_mean is None:
        raise ValueError(f"{NAME}: without training it needs running_mean and running_var")
    if training and not group and _rows(x) == 1:
        raise ValueError(f"{NAME}: in training a channel must have more than 1 value, got x of shape {list(x.shape)}")
    if transformed():
        if group:
            raise NotImplementedError(f"{NAME}: torch.func and forward mode do not go over several processes")
        return _plain(
            x, gamma, beta, running_mean, running_var, residual, training, momentum, eps, activation,
            residual_after_activation,
        )  # fmt: skip
    if training:
        mean, invstd, count = statistics(x, running_mean, running_var, momentum, eps, group)
    else:
        assert running_mean is not None and running_var is not None
        mean, invstd, count = constant_statistics(running_mean, running_var, eps)
    early, late = (None, residual) if residual_after_activation else (residual, None)
    out: Tensor = torch.ops.resnet_fast.batch_norm_act.default(
        x, gamma, beta, mean, invstd, early, activation, training, count, group if training else ""
    )
    return out if late is None else out + late


def _plain(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    residual_after_activation: bool,
) -> Tensor:
    """torch's layers, which torch.func and forward-mode AD can follow."""
    y = torch.nn.functional.batch_norm(x, running_mean, running_var, gamma, beta, training, momentum, eps)
    if residual is not None and not residual_after_activation:
        y = y + residual
    y = y.relu() if activation == "relu" else y
    return y + residual if residual is not None and residual_after_activation else y
