"""What ops share: geometry, dtypes, results, a convolution's gradients. No op is known here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.layouts import channels_last, owned

_functorch: Any = torch._C._functorch


def pair(value: int | Sequence[int], name: str) -> list[int]:
    """``value`` as [vertical, horizontal]; ValueError that names the argument if it is not one int or two."""
    if isinstance(value, int):
        return [value, value]
    items = list(value)
    if len(items) != 2:
        raise ValueError(f"{name} must be an int or two ints, got {value!r}")
    return items


def as_pair(value: object) -> tuple[int, int] | None:
    """An int or one or two ints, as torch's layers take them, as (vertical, horizontal); None for anything else."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value  # the usual form, seen at each call of a layer
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value)
    if isinstance(value, tuple | list) and len(value) in (1, 2) and all(isinstance(item, int) for item in value):
        return (int(value[0]), int(value[-1]))
    return None


Pairs: TypeAlias = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def conv_geometry(stride: object, padding: object, dilation: object, window: Sequence[int]) -> Pairs | None:
    """A 2-D convolution's stride, padding and dilation, given as ``torch.nn.functional.conv2d`` takes them, as pairs.

    None for what an op cannot be given: a padding "same" that is not the same on both sides, and what torch refuses.

    Args:
        window: of the weight, [R, S].
    """
    strides, dilations = as_pair(stride), as_pair(dilation)
    if strides is None or dilations is None:
        return None
    paddings = as_pair(padding)
    if padding == "valid":
        paddings = (0, 0)
    elif padding == "same" and strides == (1, 1):
        total = [dilations[i] * (window[i] - 1) for i in (0, 1)]
        paddings = None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    return None if paddings is None else (strides, paddings, dilations)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what an op computes in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def conv_output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """[P, Q] of a convolution over [H, W]."""
    h, w, r, s = *size, *kernel
    p = (h + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
    q = (w + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
    return [p, q]


def result(y: Tensor) -> Tensor:
    """Return ``y``, made by the op itself, as an op returns it: channels_last, and not a view."""
    if _vmapped():  # whose tensors know no memory format
        return y
    return channels_last(y) if transformed() else owned(y)


def transformed() -> bool:
    """Whether torch.func or forward-mode AD watches: the ops have reverse-mode formulas only, plain torch has all."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or _functorch.peek_interpreter_stack() is not None


def _vmapped() -> bool:
    stack = None if torch.compiler.is_compiling() else _functorch.get_interpreter_stack()
    return stack is not None and any(each.key() == _functorch.TransformType.Vmap for each in stack)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast's rule: floating point tensors other than float64 are cast to the autocast dtype."""
    if not x.is_floating_point() or x.dtype is torch.float64:
        return x
    return x.to(dtype)


def autocast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight as an op takes it beside x of ``dtype``: in another half type it goes through float32, which
    holds both."""
    return weight if weight.dtype in (dtype, torch.float32, torch.float64) else weight.float()


def keep(ctx: Any, a: Any, *others: Tensor | None, without: tuple[str, ...] = ()) -> None:
    """Keep an op's arguments for its backward, all but some, and other tensors."""
    a = a._replace(**dict.fromkeys(without))
    ctx.arguments = [None if isinstance(value, Tensor) else value for value in a]
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in a), *others)
    ctx.make = a._make


def kept(ctx: Any) -> tuple[Any, list[Any]]:
    """Return the arguments and the other tensors that :func:`keep` has kept."""
    tensors, count = list(ctx.saved_tensors), len(ctx.arguments)
    pairs = zip(ctx.arguments, tensors[:count], strict=True)
    return ctx.make(value if tensor is None else tensor for value, tensor in pairs), tensors[count:]


def freeze_constants(constants: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a convolution's constants without gradients, the vectors as copies."""
    return {
        name: value if not isinstance(value, Tensor) else value.detach() if value.dim() == 4 else value.detach().clone()
        for name, value in constants.items()
    }
