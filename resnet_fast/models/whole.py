"""A live ResNet as one call of the CPU engine, for as long as it is made of the layers that the call was made of.

A live model must see every change at the next forward, whoever made it. So before each call all modules are looked at,
their hooks, methods and settings, and all bytes of parameters and statistics are hashed; if anything is not as it was,
the call is made anew. What the engine does not compute runs layer by layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import backends
from ..backends import cpu, packing
from ..nn import fused
from ..nn.pristine import why_called
from ..ops._op import unobserved
from ..ops.common import as_pair
from ..ops.conv_bn_act import NAME
from ..ops.head import engine
from ..ops.stem import NAME as STEM


class Kept(NamedTuple):
    """The call for a model as it was, None if the engine cannot make it.

    Attributes:
        settings: what it depends on beside the contents of tensors. digest: of those.
    """

    settings: list[Any]
    digest: bytes
    network: cpu.Network | None


#: Dropped with the model; a copy of a model has none.
_kept: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


class NotWhole(Exception):
    """There is something else among the layers than the engine computes."""


def run(model: Any, x: Tensor, blocks: Mapping[type[nn.Module], int]) -> Tensor | None:
    """Return the scores [N, K] of a ``ResNet`` for images [N, C, H, W], None if it must run layer by layer.

    It must for gradients, in train mode, on other devices, and if anybody would notice that layers are not called.

    Args:
        blocks: how many convolutions each class of blocks has.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor or model.training:
        return None
    if not x.is_cpu:
        _kept.pop(model, None)  # its packed weights take as much memory as the model
        return None
    if x.dim() != 4 or not x.numel() or cpu.unsupported(x.dtype):
        return None
    modules, settings, tensors = _look(model)
    if not unobserved((x, *tensors)) or why_called(*modules):
        return None
    settings += (x.dtype, x.shape[1], backends.selected, torch.backends.mkldnn.enabled)
    kept = _kept.get(model)
    if kept is None or not _same(kept.settings, settings):
        kept = None
    elif kept.network is None:
        return None
    digest = packing.digest(tensors)
    if kept is None or kept.digest != digest:
        try:
            network = _network(model, x, blocks)
        except (NotWhole, RuntimeError, ValueError):  # such as a weight of another dtype: a layer says what is wrong
            network = None
        if packing.digest(tensors) != digest:
            return None  # somebody is writing into them
        _kept[model] = kept = Kept(_held(settings), digest, network)
    if kept.network is None:
        return None
    try:
        (scores,) = kept.network.run([x])
    except ValueError:  # such as an image that is too small, for which layers have words of their own
        return None
    return scores


def _look(model: nn.Module) -> tuple[list[nn.Module], list[Any], list[Tensor]]:
    """Return a model's modules, all that a forward could read of them but the contents of tensors, and the tensors.

    Integers are left out, which are counts of batches: evaluation does not read them.
    """
    modules: list[nn.Module] = [model]
    settings: list[Any] = []
    tensors = []
    for module in modules:  # which grows
        settings.append(module)
        for name, value in module.__dict__.items():
            settings.append(name)
            if name == "_modules":
                for key, child in value.items():
                    settings += (key, child)
                    if child is not None:
                        modules.append(child)
            elif name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    settings += (key, tensor)
                    if tensor is not None and tensor.is_floating_point():
                        settings += (tensor.shape, tensor.stride(), tensor.dtype)
                        tensors.append(tensor)
            elif not isinstance(value, dict):  # hooks, of which there are none
                settings.append(tuple(value) if type(value) is list else value)
    return modules, settings, tensors


#: Settings that are the same if they are equal; others must be the same object.
_COMPARED = frozenset((int, float, bool, str, tuple, torch.Size, torch.dtype, type(None)))


def _held(settings: list[Any]) -> list[Any]:
    """Return settings to be kept: objects are referred to weakly, or the model, which is one of them, would stay."""
    return [value if type(value) in _COMPARED else weakref.ref(value) for value in settings]


def _same(held: list[Any], now: list[Any]) -> bool:
    return len(held) == len(now) and all(
        type(a) is type(b) and a == b if type(b) in _COMPARED else type(a) is weakref.ref and a() is b
        for a, b in zip(held, now, strict=True)
    )


def _network(model: Any, x: Tensor, blocks: Mapping[type[nn.Module], int]) -> cpu.Network:
    """Return a model's layers as one call. Raises NotWhole: the engine does not compute one of them."""
    network = cpu.Network()
    dtype = x.dtype

    def conv(value: int, layer: Any, bn: Any, act: Any, residual: int | None = None, op: str = NAME) -> int:
        pairs = fused._fusable(layer, bn, act)
        if pairs is None or not fused._constant_statistics(bn) or layer.weight.dtype is not dtype:
            raise NotWhole
        scale, shift = fused.scale_and_shift(layer, bn)
        found = packing.packed(op, x, dtype, layer.weight, scale, shift, (*pairs, layer.groups))
        if found is None or not isinstance(found[0], packing.EngineConv):
            raise NotWhole
        return network.convolution(value, found[0].layer(found[1]), residual, relu=act is not None)

    pool, fc = model.maxpool, model.fc
    usual = type(pool) is nn.MaxPool2d and not pool.return_indices
    usual = usual and type(model.avgpool) is nn.AdaptiveAvgPool2d and as_pair(model.avgpool.output_size) == (1, 1)
    if not usual or type(fc) is not nn.Linear or fc.weight.dtype is not dtype:
        raise NotWhole
    value = conv(network.input(x.shape[1], dtype), model.conv1, model.bn1, model.relu, op=STEM)
    kernel, stride, padding, dilation = map(as_pair, (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
    if kernel is None or stride is None or padding is None or dilation is None or type(pool.ceil_mode) is not bool:
        raise NotWhole
    value = network.max_pool(value, kernel, stride, padding, dilation, pool.ceil_mode)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        if type(stage) is not nn.Sequential:
            raise NotWhole
        for block in stage:
            count = blocks.get(type(block))
            if count is None:
                raise NotWhole
            made = value
            for number in range(1, count):
                made = conv(made, getattr(block, f"conv{number}"), getattr(block, f"bn{number}"), block.relu)
            if block.downsample is not None:
                if type(block.downsample) is not nn.Sequential or len(block.downsample) != 2:
                    raise NotWhole
                value = conv(value, block.downsample[0], block.downsample[1], None)
            value = conv(made, getattr(block, f"conv{count}"), getattr(block, f"bn{count}"), block.relu, value)
    layer = engine(fc.weight, fc.bias, dtype)
    network.output(network.convolution(network.average(value), layer, None, relu=False), flat=True)
    return network
