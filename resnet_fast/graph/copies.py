"""Copies of a model that belong to a snapshot: parametrisations written into the weights. The model stays untouched."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .shapes import first_line

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


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
    training = [name for name, module in model.named_modules() if module.training and _minds_mode(module)]
    own = model.training and not isinstance(model, fx.GraphModule)  # whose graph is what it is in either mode
    if own or training:
        where = ", ".join(training[:3]) + (f" and {len(training) - 3} more" if len(training) > 3 else "")
        what = "the model is in training mode" if own else "parts of the model are in training mode"
        which = f" ({where}, where training does something else)" if training else ""
        raise ValueError(f"optimize: {what}{which}; a frozen snapshot needs inference mode: call model.eval() first")


def _minds_mode(module: nn.Module) -> bool:
    """Return whether a module may compute something else in training mode: torch's own mostly do not."""
    if type(module).__module__.startswith("torch."):
        random = isinstance(module, _DropoutNd | nn.RReLU) or getattr(module, "dropout", 0.0) != 0.0
        return random or isinstance(module, _BatchNorm | nn.modules.instancenorm._InstanceNorm)
    return next(module.children(), None) is None


def _hooks(module: nn.Module) -> list[Any]:
    return [hook for kind in _HOOKS for hook in getattr(module, kind).values()]


def hooked(model: nn.Module) -> dict[str, int]:
    """How many forward hooks each module has, without torch's own that only make a weight or check inputs."""
    counts = {
        name or "(the model itself)": sum(
            not isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod)
            and getattr(hook, "__module__", "") != "torch.export._unlift"  # of exported programs, to check inputs
            for hook in _hooks(module)
        )
        for name, module in model.named_modules()
    }
    return {name: count for name, count in counts.items() if count}


def _bake(model: nn.Module) -> None:
    """Write parametrised weights as plain ones."""
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


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with tensors of its own.

    Raises:
        TypeError: in one line, why it cannot be copied.
    """
    # What was computed from parameters with gradients and kept in an attribute cannot be copied by deepcopy.
    kept = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        with torch.no_grad():
            own = _with_modes(copy.deepcopy(model, kept), model)
            _bake(own)
    except Exception as error:
        raise TypeError(f"optimize: {type(model).__name__} cannot be copied: {first_line(error)}") from error
    return own


def shared(own: nn.Module) -> nn.Module:
    """Return a copy that holds the same tensors: for running code that keeps what it computes in attributes."""
    tensors = {id(tensor): tensor for tensor in (*own.parameters(), *own.buffers())}
    return _with_modes(copy.deepcopy(own, tensors), own)


def _with_modes(copied: nn.Module, model: nn.Module) -> nn.Module:
    """Give each module the mode of the one that it is a copy of, which a graph module's copy forgets."""
    if copied.training != model.training:
        copied.train(model.training)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in copied.named_modules():
        module.training = modes.get(name, module.training)
    return copied


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
