"""``bottleneck_tail``: a bottleneck block from its 3x3 to its output, and the next block's first 1x1, in one op.

Schema, reference, fake, autograd, autocast and the choice of what runs on a CPU or CUDA tensor. No module, no packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import triton
from ._common import (
    accumulate_dtype,
    cast,
    channels_last,
    conv_output_size,
    convolution_gradients,
    empty_channels_last,
    kernel_vector,
    kernel_weight,
    kernels_for,
    pair,
    register,
    relu_gradient,
    transformed,
)
from .conv_bn_act import reference as _conv_bn_act_reference

NAME = "bottleneck_tail"

_ONE, _NONE = [1, 1], [0, 0]


def reference(
    a: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight3: Tensor,
    scale3: Tensor,
    shift3: Tensor,
    residual: Tensor,
    weight_shortcut: Tensor | None = None,
    scale_shortcut: Tensor | None = None,
    shift_shortcut: Tensor | None = None,
    weight1: Tensor | None = None,
    scale1: Tensor | None = None,
    shift1: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    shortcut_stride: Sequence[int] = (1, 1),
) -> tuple[Tensor, Tensor]:
    """The op in plain torch, any device and dtype: float32 (float64 for float64) inside each of its convolutions.

    What a product reads (the 3x3's output and the block's output) is rounded to ``a``'s dtype before it; the
    projection of the shortcut is not.
    """
    b = _conv_bn_act_reference(a, weight2, scale2, shift2, None, stride, _ONE)
    shortcut = residual
    if weight_shortcut is not None:
        assert scale_shortcut is not None and shift_shortcut is not None
        wide = residual.to(accumulate_dtype(a.dtype))
        shortcut = _conv_bn_act_reference(
            wide, weight_shortcut, scale_shortcut, shift_shortcut, None, shortcut_stride, activation="none"
        )
    y = _conv_bn_act_reference(b, weight3, scale3, shift3, shortcut)
    if weight1 is None:
        return y, a.new_empty([0])
    assert scale1 is not None and shift1 is not None
    return y, _conv_bn_act_reference(y, weight1, scale1, shift1)


def _check_conv(
    a: Tensor, suffix: str, channels: int, kernel: int, weight: Tensor, scale: Tensor, shift: Tensor, source: str
) -> None:
    """One convolution's constants: [K, ``channels``, ``kernel``, ``kernel``] and two vectors of K."""
    if weight.dim() != 4 or list(weight.shape[1:]) != [channels, kernel, kernel]:
        raise ValueError(
            f"{NAME}: weight{suffix} has shape {list(weight.shape)}; "
            f"it must be [K, {channels}, {kernel}, {kernel}], since {source} has {channels} channels"
        )
    if weight.dtype is not a.dtype and not (weight.dtype is torch.float32 and a.dtype is not torch.float64):
        wanted = a.dtype if a.dtype in (torch.float32, torch.float64) else f"{a.dtype} or torch.float32"
        raise TypeError(f"{NAME}: weight{suffix} is {weight.dtype}, a is {a.dtype}; weight{suffix} must be {wanted}")
    for name, vector in ((f"scale{suffix}", scale), (f"shift{suffix}", shift)):
        if vector.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{NAME}: {name} is {vector.dtype}; it must be torch.float32 (or float64), never narrower")
        if vector.dim() != 1 or vector.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{NAME}: {name} has shape {list(vector.shape)}, weight{suffix} has {weight.shape[0]} output "
                f"channels; {name} must be [{weight.shape[0]}]"
            )


def _check(
    a: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight3: Tensor,
    scale3: Tensor,
    shift3: Tensor,
    residual: Tensor,
    weight_shortcut: Tensor | None,
    scale_shortcut: Tensor | None,
    shift_shortcut: Tensor | None,
    weight1: Tensor | None,
    scale1: Tensor | None,
    shift1: Tensor | None,
    stride: Sequence[int],
    shortcut_stride: Sequence[int],
) -> tuple[list[int], list[int]]:
    """All argument checks; returns the shapes of both outputs."""
    for name, image in (("a", a), ("residual", residual)):
        if image.dim() != 4:
            raise ValueError(f"{NAME}: {name} must be 4-D [N, C, H, W], got {image.dim()}-D of {list(image.shape)}")
    if not a.is_floating_point():
        raise TypeError(f"{NAME}: a must be a floating point tensor, got {a.dtype}")
    if residual.dtype is not a.dtype:
        raise TypeError(f"{NAME}: residual is {residual.dtype}, a is {a.dtype}; they must be the same")
    others = {
        "weight2": weight2, "scale2": scale2, "shift2": shift2, "weight3": weight3, "scale3": scale3, "shift3": shift3,
        "residual": residual, "weight_shortcut": weight_shortcut, "scale_shortcut": scale_shortcut,
        "shift_shortcut": shift_shortcut, "weight1": weight1, "scale1": scale1, "shift1": shift1,
    }  # fmt: skip
    for name, tensor in others.items():
        if tensor is not None and tensor.device != a.device:
            raise ValueError(f"{NAME}: {name} is on {tensor.device}, a is on {a.device}; they must be on one device")
    for name, values in (("stride", stride), ("shortcut_stride", shortcut_stride)):
        if len(values) != 2 or min(values) < 1:
            raise ValueError(f"{NAME}: {name} must be two ints >= 1, got {list(values)}")

    mid = a.shape[1]
    _check_conv(a, "2", mid, 3, weight2, scale2, shift2, "a")
    if weight2.shape[0] != mid:
        raise ValueError(f"{NAME}: weight2 has {weight2.shape[0]} output channels, it must have a's {mid}")
    _check_conv(a, "3", mid, 1, weight3, scale3, shift3, "weight2's output")
    size = conv_output_size(a.shape[2:], [3, 3], stride, _ONE, _ONE)
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"{NAME}: a is {a.shape[2]}x{a.shape[3]} pixels; it must have at least one row and column")
    k = weight3.shape[0]
    shape = [a.shape[0], k, *size]

    if weight_shortcut is None:
        if scale_shortcut is not None or shift_shortcut is not None:
            raise ValueError(f"{NAME}: scale_shortcut or shift_shortcut is given without weight_shortcut")
        if list(residual.shape) != shape:
            raise ValueError(f"{NAME}: residual is {list(residual.shape)}, the output is {shape}; they must be equal")
    else:
        if scale_shortcut is None or shift_shortcut is None:
            raise ValueError(f"{NAME}: weight_shortcut needs scale_shortcut and shift_shortcut beside it")
        _check_conv(
            a, "_shortcut", residual.shape[1], 1, weight_shortcut, scale_shortcut, shift_shortcut, "residual"
        )  # fmt: skip
        projected = conv_output_size(residual.shape[2:], _ONE, shortcut_stride, _NONE, _ONE)
        found = [residual.shape[0], weight_shortcut.shape[0], *projected]
        if found != shape:
            raise ValueError(
                f"{NAME}: residual {list(residual.shape)} projected with stride {list(shortcut_stride)} is {found}, "
                f"the output is {shape}; they must be equal"
            )

    if weight1 is None:
        if scale1 is not None or shift1 is not None:
            raise ValueError(f"{NAME}: scale1 or shift1 is given without weight1")
        return shape, [0]
    if scale1 is None or shift1 is None:
        raise ValueError(f"{NAME}: weight1 needs scale1 and shift1 beside it")
    _check_conv(a, "1", k, 1, weight1, scale1, shift1, "weight3's output")
    return shape, [a.shape[0], weight1.shape[0], *size]


def _default(*arguments: Any) -> Any:
    _check(*arguments)
    return reference(*arguments)


def kernel_problem(
    a: Tensor,
    weight3: Tensor,
    residual: Tensor,
    weight_shortcut: Tensor | None,
    weight1: Tensor | None,
    stride: Sequence[int],
    shortcut_stride: Sequence[int],
) -> Any:
    """What the Triton kernel has to compute; None where it cannot: uneven strides, or no channels somewhere."""
    from resnet_fast.kernels import bottleneck_tail as kernel

    if stride[0] != stride[1] or shortcut_stride[0] != shortcut_stride[1]:
        return None
    if 0 in (weight3.shape[0], residual.shape[1]) or (weight1 is not None and weight1.shape[0] == 0):
        return None
    n, mid, h, w = a.shape
    shortcut = None if weight_shortcut is None else (*residual.shape[1:], shortcut_stride[0])
    following = 0 if weight1 is None else weight1.shape[0]
    return kernel.Problem(n, h, w, mid, weight3.shape[0], stride[0], shortcut, following, triton.precision(a.dtype))


def run_kernel(
    whose: str,
    a: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight3: Tensor,
    scale3: Tensor,
    shift3: Tensor,
    residual: Tensor,
    weight_shortcut: Tensor | None,
    scale_shortcut: Tensor | None,
    shift_shortcut: Tensor | None,
    weight1: Tensor | None,
    scale1: Tensor | None,
    shift1: Tensor | None,
    stride: Sequence[int],
    shortcut_stride: Sequence[int],
) -> tuple[Tensor, Tensor] | None:
    """The op by its Triton kernel if that may run (``whose``, see :func:`kernels_for`), on checked arguments.

    None where the kernel has no tile for their shapes.
    """
    if whose == "cuda":
        backends.fallback(NAME, "there is no CUDA kernel of it; its convolutions run one after the other instead")
    if whose not in ("triton", "auto"):
        return None
    from resnet_fast.kernels import bottleneck_tail as kernel

    problem = kernel_problem(a, weight3, residual, weight_shortcut, weight1, stride, shortcut_stride)
    config = None if problem is None else kernel.choose(problem, triton.gpu_of(a.device))
    if config is None:
        return None

    def constants(weight: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, ...] | None:
        if weight is None or scale is None or shift is None:
            return None
        return kernel_weight(weight, a.dtype), kernel_vector(scale), kernel_vector(shift)

    p, q = problem.output
    out = empty_channels_last(a, [problem.n, problem.k, p, q])
    following = None
    if problem.following:
        following = empty_channels_last(a, [problem.n, problem.following, p, q])
    spatial, expand = constants(weight2, scale2, shift2), constants(weight3, scale3, shift3)
    assert spatial is not None and expand is not None
    launch = kernel.launch(
        channels_last(a), *spatial, *expand, channels_last(residual),
        constants(weight_shortcut, scale_shortcut, shift_shortcut), out, constants(weight1, scale1, shift1), following,
        problem, config,
    )  # fmt: skip
    with triton.on(a.device):
        launch()
    return out, a.new_empty([0]) if following is None else following


def _cuda(*arguments: Any) -> Any:
    _check(*arguments)
    a = arguments[0]
    whose = kernels_for(NAME, a)
    return (run_kernel(whose, *arguments) or composed(*arguments)) if whose else reference(*arguments)


def composed(
    a: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight3: Tensor,
    scale3: Tensor,
    shift3: Tensor,
    residual: Tensor,
    weight_shortcut: Tensor | None,
    scale_shortcut: Tensor | None,
    shift_shortcut: Tensor | None,
    weight1: Tensor | None,
    scale1: Tensor | None,
    shift1: Tensor | None,
    stride: Sequence[int],
    shortcut_stride: Sequence[int],
) -> Any:
    """Its convolutions one after the other: the op for shapes that the kernel has no tile for, and on the CPU."""
    if weight_shortcut is not None:
        assert scale_shortcut is not None and shift_shortcut is not None
        residual = _conv(
            residual, weight_shortcut, scale_shortcut, shift_shortcut, None, shortcut_stride, _NONE, activation="none"
        )
    y = _conv(_conv(a, weight2, scale2, shift2, None, stride, _ONE), weight3, scale3, shift3, residual)
    if weight1 is None:
        return y, a.new_empty([0])
    assert scale1 is not None and shift1 is not None
    return y, _conv(y, weight1, scale1, shift1)


def _cpu(*arguments: Any) -> Any:
    _check(*arguments)
    return run_kernel(kernels_for(NAME, arguments[0]), *arguments) or composed(*arguments)


def _conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    stride: Sequence[int] = _ONE,
    padding: Sequence[int] = _NONE,
    activation: str = "relu",
) -> Tensor:
    result: Tensor = torch.ops.resnet_fast.conv_bn_act.default(
        x, weight, scale, shift, residual, stride, padding, _ONE, 1, activation, False
    )
    return result


def _fake(*arguments: Any) -> Any:
    a = arguments[0]
    shape, following = _check(*arguments)
    return empty_channels_last(a, shape), (
        a.new_empty([0]) if arguments[11] is None else empty_channels_last(a, following)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.stride, ctx.shortcut_stride = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor | None, grad_following: Tensor | None) -> tuple[Any, ...]:
    """From the back: the next block's 1x1, the ReLU, the shortcut, the expansion, the 3x3 (its output recomputed)."""
    (
        a, weight2, scale2, shift2, weight3, scale3, shift3, residual, weight_shortcut, scale_shortcut, shift_shortcut,
        weight1, scale1, shift1, y, following,
    ) = ctx.saved_tensors  # fmt: skip
    need = ctx.needs_input_grad
    into3, into_shortcut, into1 = need[0:7], need[7:11], need[11:14]
    gradients: list[Tensor | None] = [None] * 16
    need_y = any(into3) or any(into_shortcut)

    if weight1 is not None and grad_following is not None:
        behind = relu_gradient(grad_following, following)
        from_following, *gradients[11:14] = convolution_gradients(
            behind, y, weight1, scale1, shift1, _ONE, _NONE, _ONE, 1, (need_y, *into1)
        )
        if from_following is not None:
            grad = from_following if grad is None else grad + from_following
    if grad is None or not need_y:
        return tuple(gradients)

    grad = relu_gradient(grad, y)
    if weight_shortcut is None:
        gradients[7] = grad if need[7] else None
    elif any(into_shortcut):
        gradients[7:11] = convolution_gradients(
            grad, residual, weight_shortcut, scale_shortcut, shift_shortcut, ctx.shortcut_stride, _NONE, _ONE, 1,
            into_shortcut,
        )  # fmt: skip
    if any(into3):
        b = _conv(a, weight2, scale2, shift2, None, ctx.stride, _ONE)
        grad_b, *gradients[4:7] = convolution_gradients(
            grad, b, weight3, scale3, shift3, _ONE, _NONE, _ONE, 1, (any(into3[:4]), *into3[4:])
        )
        if grad_b is not None:
            gradients[0:4] = convolution_gradients(
                relu_gradient(grad_b, b), a, weight2, scale2, shift2, ctx.stride, _ONE, _ONE, 1, into3[:4]
            )
    return tuple(gradients)


def _autocast(dtype: torch.dtype, args: tuple[Any, ...]) -> tuple[Any, ...]:
    values = list(args)
    values[0], values[7] = cast(values[0], dtype), cast(values[7], dtype)
    for index in (1, 4, 8, 11):
        # A weight in another half type than autocast's goes through float32, which holds both.
        weight = values[index]
        if weight is not None and weight.dtype not in (values[0].dtype, torch.float32, torch.float64):
            values[index] = weight.float()
    return tuple(values)


register(
    "bottleneck_tail(Tensor a, Tensor weight2, Tensor scale2, Tensor shift2, Tensor weight3, Tensor scale3, "
    "Tensor shift3, Tensor residual, Tensor? weight_shortcut, Tensor? scale_shortcut, Tensor? shift_shortcut, "
    "Tensor? weight1, Tensor? scale1, Tensor? shift1, SymInt[] stride, SymInt[] shortcut_stride) -> (Tensor, Tensor)",
    default=_default,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


def bottleneck_tail(
    a: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight3: Tensor,
    scale3: Tensor,
    shift3: Tensor,
    residual: Tensor,
    weight_shortcut: Tensor | None = None,
    scale_shortcut: Tensor | None = None,
    shift_shortcut: Tensor | None = None,
    weight1: Tensor | None = None,
    scale1: Tensor | None = None,
    shift1: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    shortcut_stride: int | Sequence[int] = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """A bottleneck block behind its first convolution, and on request the next block's first convolution::

        b         = relu(conv3x3(a, weight2, stride, padding=1) * scale2 + shift2)
        y         = relu(conv1x1(b, weight3) * scale3 + shift3 + shortcut)
        following = relu(conv1x1(y, weight1) * scale1 + shift1)

    ``shortcut`` is ``residual``, or ``conv1x1(residual, weight_shortcut, shortcut_stride) * scale_shortcut +
    shift_shortcut``. The block is that of He et al. 2015, arXiv:1512.03385, figure 5; scale and shift are BatchNorm's
    in eval mode, as in :func:`conv_bn_act`. Accumulated and finished in float32 (float64 for float64); b and y are
    rounded to a's dtype before the next product. NaN passes through the ReLUs as in torch.

    Args:
        a: [N, mid, H, W], floating point, any strides (channels_last is read without a copy).
        weight2: [mid, mid, 3, 3]; weight3: [K, mid, 1, 1]; both a's dtype or float32, as the other weights.
        scale2, shift2: [mid]; scale3, shift3: [K]; float32 (float64 for float64 inputs), as the other vectors.
        residual: [N, K, P, Q] in a's dtype, or the projection's input [N, C, H', W'].
        weight_shortcut: [K, C, 1, 1], with scale_shortcut and shift_shortcut [K]; or all three None.
        weight1: [mid_next, K, 1, 1], with scale1 and shift1 [mid_next]; or all three None.
        stride, shortcut_stride: an int or (vertical, horizontal), of the 3x3 and of the projection.

    Returns:
        y [N, K, P, Q] in a's dtype, stored channels_last; with ``weight1`` the pair (y, following), following
        [N, mid_next, P, Q]. Differentiable in every tensor.

    Raises:
        ValueError: shapes, devices or options do not fit.
        TypeError: a dtype does not fit, or no tensor is where one must be.

    Example::

        a, x = torch.rand(1, 64, 56, 56), torch.rand(1, 256, 56, 56)
        weight2, weight3 = torch.rand(64, 64, 3, 3), torch.rand(256, 64, 1, 1)
        one, zero = torch.ones(256), torch.zeros(256)
        y = rf.ops.bottleneck_tail(a, weight2, one[:64], zero[:64], weight3, one, zero, residual=x)
    """
    needed = {
        "a": a, "weight2": weight2, "scale2": scale2, "shift2": shift2, "weight3": weight3, "scale3": scale3,
        "shift3": shift3, "residual": residual,
    }  # fmt: skip
    for name, tensor in needed.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{NAME}: {name} must be a tensor, got {type(tensor).__name__}")
    if weight_shortcut is None and max(pair(shortcut_stride, "shortcut_stride")) > 1:
        raise ValueError(f"{NAME}: shortcut_stride is {shortcut_stride!r}, which means nothing without weight_shortcut")
    arguments = (
        a, weight2, scale2, shift2, weight3, scale3, shift3, residual, weight_shortcut, scale_shortcut, shift_shortcut,
        weight1, scale1, shift1, pair(stride, "stride"), pair(shortcut_stride, "shortcut_stride"),
    )  # fmt: skip
    if transformed():
        _check(*arguments)
        y, following = reference(*arguments)
    else:
        y, following = torch.ops.resnet_fast.bottleneck_tail.default(*arguments)
    return y if weight1 is None else (y, following)
