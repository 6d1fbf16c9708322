"""``batch_norm_act``: BatchNorm + residual + ReLU with gradients, from the batch's statistics or from stored ones.

Four torch ops: ``batch_norm_statistics`` and ``batch_norm_from_moments`` (no gradient), ``batch_norm_act`` (normalise,
add, activate) and its backward, ``batch_norm_act_backward``. Statistics go into ``batch_norm_act`` as tensors; its
gradient for x follows them back to x if they are the batch's own. With the name of a process group, sums are taken over
all its processes (SyncBatchNorm).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fast.kernels.problems import BatchNormAct as Problem

from .. import backends
from .._random import Random
from ..backends import Backend, cuda, triton, triton_batch_norm_act
from ..backends.layouts import channels_last, empty_channels_last, kernel_vector
from ..backends.torch_batch_norm import moments as welford
from ..backends.torch_batch_norm import moments_cpu, row_count, sums_of, variance_of
from . import checks
from ._op import Bound, Op
from .common import accumulate_dtype, cast, keep, kept, result, transformed
from .gradients import relu_gradient

NAME = "batch_norm_act"


class Norm(NamedTuple):
    """A BatchNorm with the statistics it uses.

    Attributes:
        gamma, beta: [C] or None. mean, invstd: [C], as :func:`statistics` gives them.
        of_batch: whether they are functions of the input. total, group: of synchronised statistics, else None and "".
    """

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    invstd: Tensor
    of_batch: bool
    total: Tensor | None
    group: str


# --- checks


def check_all(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    other: Tensor | None,
    residual: Tensor | None,
    activation: str = "none",
) -> None:
    """``mean`` and ``other`` (a variance or inverse deviation) are [C], as gamma and beta."""
    checks.activation(NAME, activation)
    checks.image(NAME, x)
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
    checks.like(NAME, x, residual=residual)
    checks.device(NAME, x, gamma=gamma, beta=beta, mean=mean, variance=other, residual=residual)


def _vector(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if vector is None else vector.detach().to(dtype)


def _kernels(
    among: tuple[Backend, ...], x: Tensor, step: str, relu: bool = False, residual: bool = False
) -> ModuleType | None:
    """Return the module whose launches compute a step (of ``Problem``) for ``x``, None if there is none."""
    problem = Problem(row_count(x), x.shape[1], triton.precision(x.dtype), step, relu, residual)
    choice = backends.choose(NAME, among, problem, x.device)
    return {"cuda": cuda, "triton": triton_batch_norm_act}.get(choice.name)


# --- statistics


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
    """Return whether a kernel can update these running statistics."""
    return running is None or (running.dtype is torch.float32 and running.is_contiguous())


class Statistics(NamedTuple):
    x: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    eps: float
    group: str


def sample(asked: Problem, random: Random) -> Any:
    """Draw arguments of the op that has the problem's step; images have one pixel, and x has these statistics."""
    (deviation, mean), (gamma, beta) = random.scale_and_shift(asked.c), random.scale_and_shift(asked.c)
    x = random.normal(asked.rows, asked.c).mul_(deviation).add_(mean).to(random.dtype)[:, :, None, None]
    if asked.step == "statistics":
        return Statistics(x, beta, gamma, 0.1, 1e-5, "")
    invstd, other = 1 / deviation, random.image(*x.shape) if asked.relu or asked.residual else None
    if asked.step == "apply":
        return Arguments(x, gamma, beta, mean, invstd, other, "relu", True, None, "")
    grad, reduces = random.image(*x.shape), asked.step == "reduce"
    output = other if asked.relu else None
    return Backward(grad, x, output, gamma, mean, invstd, True, None, "", not reduces, reduces, asked.residual)


def _statistics_kernel(
    among: tuple[Backend, ...], a: Statistics, bound: Bound[Statistics] | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    kernels = _kernels(among, a.x, "statistics")
    if kernels is None:
        return None
    running = a.running_mean, a.running_var
    alone = not a.group and all(map(_in_kernel, running))
    mean, invstd = (torch.empty(a.x.shape[1], dtype=torch.float32, device=a.x.device) for _ in range(2))
    kernels.batch_norm_act_statistics(
        channels_last(a.x), mean, invstd, *(running if alone else (None, None)), eps=a.eps if alone else 0.0,
        momentum=a.momentum,
    )  # fmt: skip
    if alone:
        _increment_versions(*running)
        return mean, invstd, invstd.new_empty(0)
    # Without eps the inverse deviation is the variance in other words; of 0 it is infinite, which this makes 0.
    return _finished(a, mean.double(), invstd.double().square().reciprocal())


def _increment_versions(*running: Tensor | None) -> None:
    for each in running:
        if each is not None:
            torch.autograd.graph.increment_version(each)


def _statistics(a: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    if not a.x.numel():
        return _finished(a, *(torch.zeros(a.x.shape[1], dtype=torch.float64, device=a.x.device) for _ in range(2)))
    return _finished(a, *(moments_cpu if a.x.device.type == "cpu" and _by_torch(a.x) else welford)(a.x))


def _finished(a: Statistics, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge this process's statistics with the others', and bring the running statistics up to date."""
    dtype, rows = accumulate_dtype(a.x.dtype), row_count(a.x)
    count: Tensor | None = None
    unbiased: Any = rows / (rows - 1) if rows > 1 else torch.nan
    weight: float | Tensor = a.momentum if rows else 0.0  # a batch without pixels leaves them as they are, as in torch
    if a.group:
        mean, var, count = _synchronised(mean, var, rows, a.group)
        unbiased, weight = count / (count - 1), a.momentum * (count > 0)
    if rows or a.group:
        _update(a.running_mean, mean, weight)
        _update(a.running_var, var * unbiased, weight)
    count = torch.empty(0, dtype=dtype, device=a.x.device) if count is None else count.to(dtype)
    return mean.to(dtype), (var + a.eps).rsqrt().to(dtype), count


def _statistics_empty(a: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(a.x.dtype)
    mean, invstd = (torch.empty(a.x.shape[1], dtype=dtype, device=a.x.device) for _ in range(2))
    return mean, invstd, torch.empty(1 if a.group else 0, dtype=dtype, device=a.x.device)


STATISTICS = Op(
    "batch_norm_statistics", Statistics, lambda a: check_all(a.x, None, None, a.running_mean, a.running_var, None),
    _statistics_empty, _statistics, _statistics_kernel, sample=sample, kind=NAME,
    schema="batch_norm_statistics(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, "
    "float eps, str group) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip


# --- statistics of moments that are known already


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel, [C] in float32 (float64 for float64), without gradients."""
    mean, invstd, _ = STATISTICS.overload(x.detach(), None, None, 0.0, 0.0, "")
    return mean, invstd.double().square().reciprocal().to(invstd.dtype)


class Moments(NamedTuple):
    mean: Tensor
    variance: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    rows: int
    momentum: float
    eps: float


def _from_moments(a: Moments) -> Tensor:
    if a.rows:
        _update(a.running_mean, a.mean.double(), a.momentum)
        _update(a.running_var, a.variance.double() * (a.rows / (a.rows - 1) if a.rows > 1 else torch.nan), a.momentum)
    return (a.variance.double() + a.eps).rsqrt().to(a.variance.dtype)


def _from_moments_kernel(among: tuple[Backend, ...], a: Moments, bound: Bound[Moments] | None) -> Tensor | None:
    """Compute it by one launch, which Triton has whatever computed the moments."""
    running = a.running_mean, a.running_var
    if not a.rows or a.mean.dtype is not torch.float32 or not all(map(_in_kernel, running)) or triton not in among:
        return None
    from resnet_fast.kernels import batch_norm_act as kernels

    mean, variance = kernel_vector(a.mean), kernel_vector(a.variance)
    invstd = torch.empty_like(variance)
    launch = kernels.finish(mean, variance, invstd, *running, a.rows, len(mean), eps=a.eps, momentum=a.momentum)
    triton.run(NAME, f"{len(mean)} moments of {a.rows} rows", mean.device, launch)
    _increment_versions(*running)
    return invstd


FROM_MOMENTS = Op(
    "batch_norm_from_moments", Moments, lambda a: None, lambda a: torch.empty_like(a.variance), _from_moments,
    _from_moments_kernel, kind=NAME,
    schema="batch_norm_from_moments(Tensor mean, Tensor variance, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "SymInt rows, float momentum, float eps) -> Tensor",
)  # fmt: skip


def from_moments(
    mean: Tensor,
    variance: Tensor,
    rows: int,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, None]:
    """Do as :func:`statistics` for known moments: mean and biased variance [C] of ``rows`` values a channel."""
    with torch.no_grad():
        invstd = FROM_MOMENTS.overload(mean, variance, running_mean, running_var, rows, momentum, eps)
    return mean, invstd, None


# --- forward


class Arguments(NamedTuple):
    x: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    invstd: Tensor
    residual: Tensor | None
    activation: str
    of_batch: bool
    count: Tensor | None  # type: ignore[assignment]  # a tuple has such a method
    group: str

    @property
    def norm(self) -> Norm:
        return Norm(*self[1:5], self.of_batch, self.count, self.group)


def reference(a: Arguments) -> Tensor:
    """Compute ``act((x - mean) * invstd * gamma + beta + residual)`` in float32 (float64 for float64), rounded once."""
    dtype = accumulate_dtype(a.x.dtype)

    def per_channel(vector: Tensor) -> Tensor:
        return vector.to(dtype).view(1, -1, 1, 1)

    y = (a.x.to(dtype) - per_channel(a.mean)) * per_channel(a.invstd)
    if a.gamma is not None:
        y = y * per_channel(a.gamma)
    if a.beta is not None:
        y = y + per_channel(a.beta)
    if a.residual is not None:
        y = y + a.residual.to(dtype)
    return result((y.relu() if a.activation == "relu" else y).to(a.x.dtype))


def kernel(among: tuple[Backend, ...], a: Arguments, bound: Bound[Arguments] | None) -> Tensor | None:
    kernels = _kernels(among, a.x, "apply", residual=a.residual is not None)
    if kernels is None:
        return None
    vectors = [None if vector is None else kernel_vector(vector) for vector in (a.mean, a.invstd, a.gamma, a.beta)]
    out = empty_channels_last(a.x, a.x.shape)
    residual = None if a.residual is None else channels_last(a.residual)
    kernels.batch_norm_act_apply(channels_last(a.x), *vectors, residual, out, activation=a.activation)
    return out


def _by_torch(x: Tensor) -> bool:
    """Return whether torch's own kernels are to compute what ours do not, rather than the reference."""
    return backends.runs("onednn", "cpu") if x.device.type == "cpu" else backends.current() != "reference"


def native(a: Arguments, bound: Bound[Arguments] | None = None) -> Tensor | None:
    """Compute the op by torch's kernels; the last two work in place, on a CPU on what is still in its cache if x is
    small."""
    if not a.x.numel() or not _by_torch(a.x):
        return None
    dtype = accumulate_dtype(a.x.dtype)
    vectors = (_vector(a.gamma, dtype), _vector(a.beta, dtype), a.mean.to(dtype), variance_of(a.invstd, dtype))
    out = torch.native_batch_norm(channels_last(a.x), *vectors, False, 0.0, 0.0)[0]
    if a.residual is not None:
        out += a.residual
    return result(out.relu_() if a.activation == "relu" else out)


def context(ctx: Any, a: Arguments, output: Tensor) -> None:
    # The output, which the next layer keeps anyway, shows where the ReLU was open.
    keep(ctx, a, output if a.activation == "relu" else None, without=("residual",))


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    a, (output,) = kept(ctx)
    need_x, need_gamma, need_beta, *_, need_residual = ctx.needs_input_grad[:6]
    gradients = norm_gradients(grad, a.x, output, a.norm, (need_x, need_gamma, need_beta, need_residual))
    return *gradients[:3], None, None, gradients[3], *([None] * 4)


def norm_gradients(
    grad: Tensor, x: Tensor, output: Tensor | None, norm: Norm, needed: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``batch_norm_act`` for x, gamma, beta and the residual, None if not ``needed``.

    ``output``: the op's result if it ends with a ReLU. Differentiable themselves if gradients are recorded.
    """
    gamma, beta, mean, invstd, of_batch, count, group = norm
    need_x, need_gamma, need_beta, need_residual = needed
    masked = output is not None
    a = Backward(
        grad, x, output, gamma, mean, invstd, of_batch, count, group, need_x, need_gamma or need_beta,
        need_residual and masked,
    )  # fmt: skip
    if torch.is_grad_enabled():
        grad_x, sum_grad, sum_grad_xhat, g = _plain_gradients(_differentiable(a))
        grad_x, grad_residual = grad_x.to(x.dtype), g.to(x.dtype)
    else:
        grad_x, sum_grad, sum_grad_xhat, grad_residual = BACKWARD.overload(*a)
    return (
        grad_x if need_x else None,
        sum_grad_xhat.to(gamma.dtype) if need_gamma and gamma is not None else None,
        sum_grad.to(beta.dtype) if need_beta and beta is not None else None,
        (grad_residual if masked else grad) if need_residual else None,
    )


def _differentiable(a: Backward) -> Backward:
    """Return the arguments with statistics of the batch as functions of x, for gradients of gradients."""
    if a.group:
        raise NotImplementedError(f"{NAME}: statistics over several processes have first derivatives only")
    if not a.of_batch:
        return a
    wide = a.x.to(accumulate_dtype(a.x.dtype))
    mean = wide.mean((0, 2, 3))
    variance = (wide - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
    # What is subtracted is the same numbers without a history.
    invstd = (variance - variance.detach() + a.invstd.detach().to(wide.dtype).square().reciprocal()).rsqrt()
    return a._replace(x=wide, mean=mean, invstd=invstd)


def autocast(dtype: torch.dtype, a: Arguments) -> Arguments:
    # As torch's batch norm under autocast: x stays as it comes; the sum has x's type, as for torch's in-place addition.
    return a._replace(residual=None if a.residual is None else cast(a.residual, a.x.dtype))


OP = Op(
    NAME, Arguments, lambda a: check_all(*a[:7]), lambda a: empty_channels_last(a.x, a.x.shape), reference, kernel,
    native, context, backward, autocast, sample=sample,
)  # fmt: skip


# --- backward


class Backward(NamedTuple):
    grad: Tensor
    x: Tensor
    output: Tensor | None
    gamma: Tensor | None
    mean: Tensor
    invstd: Tensor
    of_batch: bool
    count: Tensor | None  # type: ignore[assignment]  # a tuple has such a method
    group: str
    need_x: bool
    need_sums: bool
    need_residual: bool


_Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _check_backward(a: Backward) -> None:
    checks.image(f"{NAME}_backward", a.x)
    checks.like(f"{NAME}_backward", a.x, grad=a.grad, output=a.output)
    checks.device(f"{NAME}_backward", a.x, grad=a.grad, output=a.output)


def _shares(sums: tuple[Tensor, Tensor], rows: int, count: Tensor | None, group: str) -> tuple[Tensor, Tensor]:
    """Return the sums that x's gradient is made of: those of all processes, times this one's share of the values.

    Kernels divide by their own number of values.
    """
    if not group or count is None:
        return sums
    both = torch.cat(sums)
    _all_reduce(both, group)
    first, second = (both * (rows / count)).to(both.dtype).chunk(2)
    return first.contiguous(), second.contiguous()


def _plain_gradients(a: Backward) -> _Gradients:
    """Return the gradient of x, the sums of g and of g * xhat over pixels, and g, in the type they are computed in.

    In plain torch, differentiable. The first is that of x only if it is needed.
    """
    dtype, one = accumulate_dtype(a.x.dtype), (1, -1, 1, 1)
    invstd = a.invstd.to(dtype)
    g = (a.grad if a.output is None else relu_gradient(a.grad, a.output)).to(dtype)
    xhat = (a.x.to(dtype) - a.mean.to(dtype).view(one)) * invstd.view(one)
    sums = g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))
    factor = invstd if a.gamma is None else invstd * a.gamma.to(dtype)
    inner = g
    if a.of_batch and a.need_x:  # when to communicate is the same for all processes, whatever computes there
        first, second = _shares(sums, row_count(a.x), a.count, a.group)
        inner = g - (first.view(one) + xhat * second.view(one)) / row_count(a.x)
    return inner * factor.view(one), *sums, g


def _backward_reference(a: Backward) -> _Gradients:
    grad_x, sum_grad, sum_grad_xhat, g = _plain_gradients(a)
    return (
        result(grad_x.to(a.x.dtype)) if a.need_x else a.x.new_empty(0),
        sum_grad if a.need_sums else sum_grad.new_empty(0),
        sum_grad_xhat if a.need_sums else sum_grad_xhat.new_empty(0),
        result(g.to(a.x.dtype, copy=True)) if a.need_residual else a.x.new_empty(0),
    )


def _backward_kernel(among: tuple[Backend, ...], a: Backward, bound: Bound[Backward] | None) -> _Gradients | None:
    kernels = _kernels(among, a.x, "backward", a.output is not None, a.need_residual)
    if kernels is None:
        return None
    grad, x, output = channels_last(a.grad), channels_last(a.x), None if a.output is None else channels_last(a.output)
    mean, invstd, gamma = (None if each is None else kernel_vector(each) for each in (a.mean, a.invstd, a.gamma))
    nothing, vector = x.new_empty(0), torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
    sums = (vector.new_empty(0), vector.new_empty(0))
    shares: tuple[Tensor | None, Tensor | None] = (None, None)
    need_shares = a.need_x and a.of_batch
    if a.need_sums or need_shares:
        sums = (vector, torch.empty_like(vector))
        kernels.batch_norm_act_reduce(grad, x, output, mean, invstd, *sums)
        if need_shares:
            shares = _shares(sums, row_count(x), a.count, a.group)
    grad_x = empty_channels_last(x, x.shape) if a.need_x else None
    grad_residual = empty_channels_last(x, x.shape) if a.need_residual else None
    if a.need_x or a.need_residual:
        kernels.batch_norm_act_backward(grad, x, output, mean, invstd, gamma, *shares, grad_x, grad_residual)
    if not a.need_sums:
        sums = (vector.new_empty(0), vector.new_empty(0))
    return nothing if grad_x is None else grad_x, *sums, nothing.clone() if grad_residual is None else grad_residual


def _backward_native(a: Backward, bound: Bound[Backward] | None = None) -> _Gradients | None:
    """Compute the gradients of one process by torch's own kernels."""
    if not a.x.numel() or a.group or not _by_torch(a.x):
        return None
    dtype = accumulate_dtype(a.x.dtype)
    g = channels_last(a.grad) if a.output is None else result(relu_gradient(a.grad, a.output))
    mean, invstd = a.mean.to(dtype), a.invstd.to(dtype)
    one = torch.ones_like(mean) if a.gamma is None else a.gamma.detach().to(dtype)
    nothing, empty = a.x.new_empty(0), mean.new_empty(0)
    grad_x, sums = nothing, (empty, empty.clone())
    x = channels_last(a.x)
    if a.need_x:
        # Statistics of the batch are given as what a forward in train mode saves, constant ones as running statistics.
        saved = (None, None, mean, invstd) if a.of_batch else (mean, variance_of(invstd, dtype), None, None)
        grad_x = torch.ops.aten.native_batch_norm_backward.default(
            g, x, one, *saved, a.of_batch, 0.0, [True, False, False]
        )[0]
    if a.need_sums:
        sums = sums_of(g, x, mean, invstd)
    return (
        result(grad_x) if a.need_x else nothing,
        *sums,
        (g.clone() if a.output is None else g) if a.need_residual else nothing.clone(),
    )


def _backward_empty(a: Backward) -> _Gradients:
    def image(needed: bool) -> Tensor:
        return empty_channels_last(a.x, a.x.shape) if needed else a.x.new_empty(0)

    def vector() -> Tensor:
        return torch.empty(a.x.shape[1] if a.need_sums else 0, dtype=accumulate_dtype(a.x.dtype), device=a.x.device)

    return image(a.need_x), vector(), vector(), image(a.need_residual)


BACKWARD = Op(
    f"{NAME}_backward", Backward, _check_backward, _backward_empty, _backward_reference, _backward_kernel,
    _backward_native, sample=sample, returns=_Gradients, kind=NAME,
)  # fmt: skip


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
        mean, invstd, count = STATISTICS.overload(x.detach(), running_mean, running_var, momentum, eps, group)
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
    statistics, if given, become ``(1 - momentum) * running + momentum * batch`` with the unbiased variance. Without
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
    check_all(x, gamma, beta, running_mean, running_var, residual, activation)
    if (running_mean is None) is not (running_var is None):
        raise ValueError(f"{NAME}: running_mean and running_var must both be given or both be None")
    if not training and running_mean is None:
        raise ValueError(f"{NAME}: without training it needs running_mean and running_var")
    if training and not group and row_count(x) == 1:
        raise ValueError(f"{NAME}: in training a channel must have more than 1 value, got x of shape {list(x.shape)}")
    if transformed():
        if group:
            raise NotImplementedError(f"{NAME}: torch.func and forward mode do not go over several processes")
        # torch's layers, which all of its transforms can follow.
        y = torch.nn.functional.batch_norm(x, running_mean, running_var, gamma, beta, training, momentum, eps)
        if residual is not None and not residual_after_activation:
            y = y + residual
        y = y.relu() if activation == "relu" else y
        return y + residual if residual is not None and residual_after_activation else y
    if training:
        mean, invstd, count = statistics(x, running_mean, running_var, momentum, eps, group)
    else:
        assert running_mean is not None and running_var is not None
        mean, invstd, count = constant_statistics(running_mean, running_var, eps)
    early, late = (None, residual) if residual_after_activation else (residual, None)
    out: Tensor = OP.overload(
        x, gamma, beta, mean, invstd, early, activation, training, count, group if training else ""
    )
    return out if late is None else out + late
