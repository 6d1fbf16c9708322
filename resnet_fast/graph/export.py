"""``exportable``: a model as torch's own layers, for exporters and runtimes that do not know this package's ops.

Live modules run their plain layers; the packed constants of a snapshot become convolutions with their BatchNorm folded
in. Nothing is captured here, and nothing is fused.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from resnet_fast.backends.packing import fold
from resnet_fast.nn.pristine import Capturing
from resnet_fast.ops.conv_bn_act import Arguments as Convolution

from . import calling, copies
from .guard import Guard
from .ir import free_name
from .plan import Fused
from .quantize_layers import Quantized
from .snapshot import OptimizedModule, PartlyOptimizedModule

__all__ = ["exportable"]


def exportable(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` that is made of torch's own layers, to be exported; ``model`` itself is not changed.

    ``torch.export`` of the copy gives a program of ATen operators alone, which ONNX, OpenVINO, TensorRT and AOTInductor
    read and which loads without this package; so do ``torch.jit.trace`` and ``torch.fx``. The answers are the model's
    up to rounding.

    Args:
        model: a live model (``resnet_fast.resnet50()``, or any model that holds this package's layers), whose copy
            shares its parameters and has its state_dict keys; or a snapshot that `optimize` returned (or a model that
            holds some), whose copy has convolutions with their BatchNorm folded in, in the snapshot's dtype.

    Returns:
        A module that takes the model's arguments, by the same names.

    Raises:
        TypeError: ``model`` is no module, or it cannot be copied.

    Examples:
        >>> import torch
        >>> import resnet_fast as rf
        >>> fast = rf.optimize(rf.resnet18().eval())
        >>> batch = {0: torch.export.Dim("batch")}
        >>> images = torch.rand(2, 3, 224, 224)
        >>> program = torch.export.export(rf.exportable(fast), (images,), dynamic_shapes={"x": batch})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"exportable: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, OptimizedModule):
        return _of_snapshot(model)
    snapshots = {id(each): _of_snapshot(each) for each in model.modules() if isinstance(each, OptimizedModule)}
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        own = copy.deepcopy(model, {**tensors, **snapshots})
    except Exception as error:
        raise TypeError(f"exportable: {type(model).__name__} cannot be copied: {error}") from error
    for module in own.modules():
        if any(kind.__module__.startswith("resnet_fast.") for kind in type(module).__mro__):
            forward = module.__dict__.get("forward", functools.partial(type(module).forward, module))
            module.__dict__["forward"] = _named(_plainly, inspect.signature(module.forward), forward)
    return own


def _named(function: Callable[..., Any], signature: inspect.Signature, *given: Any) -> Callable[..., Any]:
    """Return ``function`` with its first arguments, and a signature for those who ask for the names of the others."""
    bound: Any = functools.partial(function, *given)
    bound.__signature__ = signature
    return bound


class _Plain(Capturing):
    """The mode under which live modules run torch's own layers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _plainly(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Plain():
        return forward(*args, **kwargs)


# ----------------------------------------------------------------------------------------------------------- snapshots


def _of_snapshot(snapshot: OptimizedModule) -> nn.Module:
    if isinstance(snapshot, PartlyOptimizedModule):
        own = copies.shared(snapshot.model)
        for module in own.modules():
            part = module.__dict__.get("forward")
            if isinstance(part, OptimizedModule):
                module.add_module("exportable", plain := _of_snapshot(part))
                module.__dict__["forward"] = plain.forward
        return own
    gm = _unfused(snapshot.graph_module)
    simple = snapshot._arguments.fixed and snapshot._form is None and snapshot.dtype is snapshot.output_dtype
    return gm if simple else _Called(gm, snapshot)


class _Called(nn.Module):
    """A graph behind the form of the original's arguments and in front of that of its result."""

    def __init__(self, graph_module: fx.GraphModule, snapshot: OptimizedModule) -> None:
        super().__init__()
        self.training = False
        self.graph_module = graph_module
        self._arguments, self._form = snapshot._arguments, snapshot._form
        self._dtypes = snapshot.dtype, snapshot.output_dtype
        self.__dict__["forward"] = _named(_call, snapshot._arguments.signature, self)


def _call(module: Any, *args: Any, **kwargs: Any) -> Any:
    dtype, output_dtype = module._dtypes
    given = [_cast(dtype, tensor) for tensor in module._arguments.tensors_of(args, kwargs)]
    result = pytree.tree_map_only(
        Tensor, lambda t: _cast(output_dtype, t) if t.dtype is dtype else t, module.graph_module(*given)
    )
    return result if module._form is None else calling.unflatten(module._form, result)


def _cast(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype is not dtype else tensor


def _unfused(fused: fx.GraphModule) -> fx.GraphModule:
    """Return the graph with torch's layers in the place of fused modules, and without what watches a proof."""
    constants = {id(t): t for module in fused.modules() if isinstance(module, Fused) for t in module.parameters()}
    gm = copy.deepcopy(fused, constants)  # which are read, and not kept
    for node in list(gm.graph.nodes):
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Quantized):
            module.export()
        if isinstance(module, Fused):
            gm.delete_submodule(str(node.target))
            with gm.graph.inserting_before(node):
                result = _layers(gm, str(node.target), module, [fx.Proxy(each) for each in node.args])
            if isinstance(result, tuple):
                for user in list(node.users):  # the items of a pair
                    user.replace_all_uses_with(result[user.args[1]].node)
                    gm.graph.erase_node(user)
            else:
                node.replace_all_uses_with(result.node)
        if isinstance(module, Fused | Guard):
            gm.graph.erase_node(node)
    gm.delete_all_unused_submodules()
    for part in gm.modules():
        part.training = False
    gm.graph.lint()
    gm.recompile()
    return gm


def _layers(gm: fx.GraphModule, name: str, fused: Fused, inputs: list[Any]) -> Any:
    """Return what ``fused`` computes of ``inputs`` by torch's layers, added to the graph at its insertion point."""
    a = fused.arguments()._replace(**dict(zip(fused.declared.data, inputs, strict=False)))
    conv = functools.partial(_convolution, gm, name, fused.dtype)
    if fused.op == "conv_bn_act":
        return conv(a)
    if fused.op == "stem":
        y = conv(Convolution(a.x, a.weight, a.scale, a.shift, stride=(2, 2), padding=(3, 3)))
        return F.max_pool2d(y, 3, 2, 0 if a.ceil_mode else 1, ceil_mode=a.ceil_mode)
    if fused.op == "add_act":
        return torch.relu(a.x + a.y) if a.activation == "relu" else a.x + a.y
    if fused.op == "head":
        size = fused.image_size
        pooled = F.adaptive_avg_pool2d(a.x, (1, 1)) if size is None else F.avg_pool2d(a.x, size, (1, 1))
        k, c = a.weight.shape
        linear = nn.Linear(c, k, a.bias is not None, device="meta", dtype=fused.dtype)
        return _called(gm, name, linear, torch.flatten(pooled, 1), a.weight, a.bias)
    assert fused.op == "bottleneck_tail"
    project = a.project(a.residual)
    y = conv(a.expand(conv(a.spatial()), a.residual if project is None else conv(project)))
    following = a.following(y)
    return y if following is None else (y, conv(following))


def _convolution(gm: fx.GraphModule, name: str, dtype: torch.dtype, a: Convolution) -> Any:
    k, c, *_ = a.weight.shape
    window, stride, padding, dilation = ((pair[0], pair[1]) for pair in (a.weight.shape[2:], *a.geometry[:3]))
    conv = nn.Conv2d(c * a.groups, k, window, stride, padding, dilation, a.groups, device="meta", dtype=dtype)
    y = _called(gm, name, conv, a.x, fold(a.weight, a.scale, dtype), a.shift)
    if a.residual is not None and not a.residual_after_activation:
        y = y + a.residual
    if a.activation == "relu":
        y = torch.relu(y)
    return y + a.residual if a.residual is not None and a.residual_after_activation else y


def _called(gm: fx.GraphModule, name: str, module: Any, x: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """Return the call of a layer with these constants, which becomes a module of the graph's."""
    for key, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(module, key, nn.Parameter(value.detach().to(module.weight.dtype), requires_grad=False))
    path = free_name(gm, name)
    gm.add_submodule(path, module)
    return fx.Proxy(gm.graph.call_module(path, (x.node,)))
