"""From a module to an ``fx.GraphModule`` of its own: copied, without hooks, parametrisations written into the weights.

The model that was given is never touched. No layer is understood here; that is normalize.py.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from resnet_fast.nn.pristine import is_frozen_batch_norm

from .normalize import is_layer
from .shapes import first_line

_IN_PLACE_KINDS = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class _Proxy(fx.Proxy):
    """Records ``x += y`` and ``x[i] = y`` as the writes they are; fx's own proxy makes ``x = x + y`` of the former."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _Tracer(fx.Tracer):
    """torch.nn modules, frozen batch norms and registered layers are leaves, everything else is traced through."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_frozen_batch_norm(m) or is_layer(m) or super().is_leaf_module(m, module_qualified_name)


def check(model: nn.Module) -> None:
    """Refuse what cannot become a frozen inference graph.

    Raises:
        TypeError: not a module that can be traced.
        ValueError: in training mode, as a whole or in one of its batch norms.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("optimize: model is a TorchScript module; pass the module it was scripted from")
    if hasattr(model, "_orig_mod"):
        raise TypeError("optimize: model was wrapped by torch.compile; pass the module inside, model._orig_mod")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(f"optimize: model is wrapped in {type(model).__name__}; pass the module inside, model.module")
    training = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]
    if model.training or training:
        where = ", ".join(training[:3]) + (f" and {len(training) - 3} more" if len(training) > 3 else "")
        what = "the model is in training mode" if model.training else "parts of the model are in training mode"
        which = f" (its batch norms {where} would use and change batch statistics)" if training else ""
        raise ValueError(f"optimize: {what}{which}; a frozen snapshot needs inference mode: call model.eval() first")


def _hooks(module: nn.Module) -> list[Any]:
    return [hook for kind in _HOOKS for hook in getattr(module, kind).values()]


def hooked(model: nn.Module) -> dict[str, int]:
    """How many forward hooks each module has, without the legacy weight and spectral norms (they go into weights)."""
    counts = {
        name or "(the model itself)": sum(not isinstance(hook, WeightNorm | SpectralNorm) for hook in _hooks(module))
        for name, module in model.named_modules()
    }
    return {name: count for name, count in counts.items() if count}


def _bake(model: nn.Module) -> None:
    """Write parametrised weights as plain ones and drop every hook."""
    for module in list(model.modules()):
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
        if parametrize.is_parametrized(module):
            # torch's own remove_parametrizations edits the class, which the original module shares.
            values = {name: getattr(module, name).detach() for name in cast(nn.ModuleDict, module.parametrizations)}
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for module in model.modules():
        for kind in _HOOKS:
            getattr(module, kind).clear()


def trace(model: nn.Module) -> fx.GraphModule:
    """Return the graph of a copy of ``model``, torch.nn modules as leaves; a ``GraphModule`` is copied as it is.

    Raises:
        TypeError: in one line, why the model cannot be copied or traced.
    """
    kind = type(model).__name__
    try:
        with torch.no_grad():
            own = copy.deepcopy(model)
            _bake(own)
    except Exception as error:
        raise TypeError(f"optimize: {kind} cannot be copied: {first_line(error)}") from error
    if isinstance(own, fx.GraphModule):
        return _rebuilt(own, own.graph, kind)
    tracer = _Tracer()
    try:
        graph = tracer.trace(own)
    except Exception as error:
        raise TypeError(f"optimize: {kind} cannot be traced by torch.fx: {first_line(error)}") from error
    return _rebuilt(tracer.root, graph, kind)


def _rebuilt(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """Return a plain GraphModule, whatever subclass ``root`` is, with only what ``graph`` uses."""
    gm = fx.GraphModule(root, copy.deepcopy(graph), class_name=name)
    gm.training = False
    for node in gm.graph.nodes:
        node.meta = {}
        node.type = None  # the author's annotation; one given as a string makes the graph impossible to pickle
    return gm


def rebuilt(gm: fx.GraphModule, added: Mapping[str, nn.Module] | None = None) -> fx.GraphModule:
    """``gm`` with the modules ``added``, and of its own modules and tensors only those that its graph uses."""
    root: dict[str, Any] = dict(added or {})
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_module") and node.target not in root:
            value: Any = gm
            for part in str(node.target).split("."):
                value = getattr(value, part)
            root[str(node.target)] = value
    result = fx.GraphModule(root, gm.graph, class_name=type(gm).__name__)
    result.graph.lint()
    for module in result.modules():
        if type(module) is nn.Module or module is result:  # the containers just made
            module.training = False
    return result


def layer_kind(gm: fx.GraphModule, node: fx.Node) -> tuple[str, str]:
    """Name and kind of the layer that a node of a freshly traced graph is."""
    target: Any = node.target
    if node.op == "call_module":
        return str(target), type(gm.get_submodule(str(target))).__name__
    if node.op == "call_method":
        return node.name, str(target).rstrip("_")
    name = getattr(target, "__name__", str(target)).rstrip("_")
    return node.name, _IN_PLACE_KINDS.get(name, name)
