"""The stages of a live ResNet as one call of the CPU engine, if everything in them is what the engine computes.

Layer by layer each op runs Python's code while the weights of the layer before have pushed it out of the caches. Here
all layers are looked at first, as the ops look at them, and all weights are hashed; then the engine runs them all. The
convolutions are those that the ops have packed (`backends.packing`): the first forward after a change runs layer by
layer, and what an op would refuse, or compute otherwise, always does.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..backends import cpu, packing
from ..backends.layouts import suggests_channels_last
from ..nn import fused, pristine
from ..ops._op import unobserved


class Layer(NamedTuple):
    """A packed convolution, and whether a ReLU follows."""

    conv: cpu.Convolution
    relu: bool


class Block(NamedTuple):
    """Convolutions in order, the last of which adds the shortcut: a convolution of the block's input, or that input."""

    layers: tuple[Layer, ...]
    shortcut: Layer | None


#: How many convolutions a block of this class has: `conv1`..., each with its `bn1`..., and the one `relu`.
_convolutions: dict[type[nn.Module], int] = {}


class _LayerByLayer(Exception):
    """There is something else among the layers than the engine computes, or nobody has packed it yet."""


def know(kind: type[nn.Module], convolutions: int, functions: Sequence[tuple[Any, str]]) -> None:
    """Make ``kind`` a block that can be part of one call as long as it is what it is now.

    Args:
        convolutions: how many it has beside its shortcut's. functions: what its ``forward`` calls, as (owner, name).
    """
    pristine.know(kind, functions=tuple(functions))
    _convolutions[kind] = convolutions


def run(net: Any, names: Sequence[str], x: Tensor) -> Tensor | None:
    """Return what the last of a network's stages makes of x [N, C, H, W], channels_last; None if they must be called.

    They must for gradients, with the batch's statistics, on other devices, and if anybody would notice that stages,
    blocks and layers are not called.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or not unobserved((x,)):
        return None
    usual = x.is_cpu and x.dim() == 4 and x.numel() and backends.selected == "auto" and suggests_channels_last(x)
    if not usual or cpu.unsupported(x.dtype):
        return None
    found: list[packing.Found] = []
    try:
        blocks = _look([getattr(net, name) for name in names], x.dtype, found)
    except Exception:  # whatever is wrong with a layer, that layer says
        return None
    if not found or not packing.unchanged(found):
        return None
    kept = found[0].conv.network
    try:
        if kept is None or kept.layers != blocks:
            kept = _keep(found, blocks, _network(x, blocks))
        (y,) = kept.network.run([x])
    except ValueError:  # layers do not fit each other or the image, for which they have words of their own
        return None
    return y


def _keep(found: Sequence[packing.Found], blocks: tuple[Block, ...], network: cpu.Network) -> packing.Kept:
    """Keep a call with its first convolution until one of them is packed no more."""
    first = weakref.ref(found[0].conv)

    def drop(_: Any) -> None:
        if (conv := first()) is not None:
            conv.network = None

    kept = packing.Kept(blocks, network, [weakref.ref(each.conv, drop) for each in found[1:]])
    found[0].conv.network = kept
    return kept


def _look(stages: Sequence[Any], dtype: torch.dtype, found: list[packing.Found]) -> tuple[Block, ...]:
    """Return the blocks of these stages, and add what was packed of them for images of ``dtype`` to ``found``.

    Raises:
        _LayerByLayer: as its name says.
    """

    called: list[nn.Module | None] = []  # by the stages

    def layer(conv: Any, bn: Any, act: Any) -> Layer:
        given = fused.constants(conv, bn, act, dtype)
        packed = None if given is None else packing.find(dtype, *given)
        if packed is None:
            raise _LayerByLayer
        found.append(packed)
        called.extend((conv, bn, act))
        return Layer(packed.made, act is not None)

    if any(type(stage) is not nn.Sequential for stage in stages) or pristine.why_called(*stages):
        raise _LayerByLayer
    blocks = []
    for block in (block for stage in stages for block in stage):
        numbers = range(1, _convolutions.get(type(block), 0) + 1)
        layers = [layer(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"), block.relu) for i in numbers]
        downsample, shortcut = block.downsample, None
        if not layers or not (downsample is None or type(downsample) is nn.Sequential):
            raise _LayerByLayer
        if downsample is not None:
            first, second = downsample
            shortcut = layer(first, second, None)
        called += (block, downsample)
        blocks.append(Block(tuple(layers), shortcut))
    if pristine.why_called(*called):
        raise _LayerByLayer
    return tuple(blocks)


def _network(x: Tensor, blocks: Sequence[Block]) -> cpu.Network:
    """Return the blocks as one call.

    Raises:
        ValueError: they do not fit each other.
    """
    network = cpu.Network()

    def convolution(value: int, layer: Layer, residual: int | None = None) -> int:
        return network.convolution(value, layer.conv, residual, layer.relu)

    value = network.input(x.shape[1], x.dtype)
    for block in blocks:
        made = value
        for layer in block.layers[:-1]:
            made = convolution(made, layer)
        residual = value if block.shortcut is None else convolution(value, block.shortcut)
        value = convolution(made, block.layers[-1], residual)
    network.output(value, flat=False)
    return network
