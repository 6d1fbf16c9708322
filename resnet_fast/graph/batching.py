"""Batches on the CPU, a few images at a time through the whole graph, where every op treats each image by itself.

Two reasons. Tensors above glibc's largest dynamic mmap threshold (32 MiB) are given back to the kernel at every free
and page-faulted in again at the next allocation, which costs more than many a layer; and small tensors stay in cache.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from . import guards, ir, shapes
from .guard import Guard
from .plan import Fused
from .quantize_layers import Quantized

_MMAP_THRESHOLD_MAX = 32 << 20
#: The largest intermediate tensor a piece may have; the rest is room for alignment and malloc's header.
LARGEST_TENSOR = _MMAP_THRESHOLD_MAX - (128 << 10)

_primed = threading.Event()


def prime_allocator() -> None:
    """Allocate and free, once, the largest block that glibc is willing to keep.

    Freeing a mapped block raises the dynamic mmap threshold to its size, so smaller ones are recycled from the heap
    from then on. The block's pages are never touched; with other allocators this does nothing.
    """
    if not _primed.is_set():
        _primed.set()
        torch.empty(_MMAP_THRESHOLD_MAX - (64 << 10), dtype=torch.uint8, device="cpu")  # freed at once


class _Kind(Enum):
    """What a value is, seen from the batch."""

    BATCH = "a tensor with the batch first"
    CONSTANT = "the same for every batch"
    BATCH_SIZE = "the number of images"
    SHAPE = "the shape of a BATCH tensor"


_ELEMENTWISE: set[Any] = {
    torch.relu, F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.leaky_relu, F.elu, F.hardtanh,
    torch.sigmoid, torch.tanh, operator.neg, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d, F.max_pool2d,
    torch.max_pool2d,
}  # fmt: skip
_WITH_CONSTANTS: set[Any] = {torch.conv2d, F.batch_norm, F.linear, F.group_norm, F.layer_norm}
_BINARY: set[Any] = {
    torch.add, torch.sub, torch.mul, torch.div, operator.add, operator.sub, operator.mul, operator.truediv,
    ir.ADD_ACT,
}  # fmt: skip
_METHODS = {"relu", "sigmoid", "tanh", "contiguous", "neg"}
_MODULES = {
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.ELU, nn.Hardtanh, nn.Sigmoid,
    nn.Tanh, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Conv2d, nn.Linear, nn.GroupNorm,
    nn.Identity,
}  # fmt: skip


def why_not_separable(gm: fx.GraphModule) -> str:
    """ "" if running ``gm`` on parts of a batch surely gives the parts of its result, else the reason why not."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if len(shapes.required_inputs(gm)) != 1 or inputs[0] is not shapes.required_inputs(gm)[0]:
        return "the graph has not exactly one required input"
    kinds: dict[fx.Node, _Kind] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            kinds[node] = _Kind.BATCH if node is inputs[0] else _Kind.CONSTANT
        elif node.op == "get_attr":
            kinds[node] = _Kind.CONSTANT
        elif node.op == "output":
            nest, _ = pytree.tree_flatten(node.args[0])
            if not nest or not all(isinstance(leaf, fx.Node) and kinds[leaf] is _Kind.BATCH for leaf in nest):
                return "it returns something that is not a tensor with one entry per image"
        else:
            kind = _kind(gm, node, kinds)
            if kind is None:
                return f"{node.name} is not known to treat each image by itself"
            kinds[node] = kind
    return ""


def _kind(gm: fx.GraphModule, node: fx.Node, kinds: dict[fx.Node, _Kind]) -> _Kind | None:
    """Return what ``node`` gives, None if that is not known."""
    sources = {kinds[source] for source in node.all_input_nodes}
    if sources <= {_Kind.CONSTANT} and node.op == "call_function" and node.target in _BINARY | {operator.getitem}:
        return _Kind.CONSTANT
    if node.target in (guards.compute, guards.expect):
        return _Kind.CONSTANT if sources <= {_Kind.CONSTANT} else None
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return _cat(node, kinds)
    rest = {kinds[source] for source in node.all_input_nodes if source is not first}
    if node.op == "call_function" and node.target is operator.getitem and kinds[first] is _Kind.SHAPE:
        if not isinstance(node.args[1], int):
            return None
        return _Kind.BATCH_SIZE if node.args[1] == 0 else _Kind.CONSTANT
    if kinds[first] is not _Kind.BATCH:
        return None
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        known = isinstance(module, Fused | Guard | Quantized) or type(module) in _MODULES
        known |= type(module) is nn.Softmax and module.dim is not None and module.dim > 0
        return (
            _Kind.BATCH
            if known and rest <= {_Kind.BATCH} and (not rest or isinstance(module, Fused | Quantized))
            else None
        )
    if node.op == "call_method":
        return _method(node, kinds, rest)
    target = node.target
    if target in (torch.softmax, F.softmax) and not rest:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return _Kind.BATCH if _excludes_batch((dim,)) else None
    if target in _ELEMENTWISE and not rest:
        return _Kind.BATCH
    if target in _WITH_CONSTANTS and rest <= {_Kind.CONSTANT}:
        return None if target is F.batch_norm and node.args[5:6] != (False,) else _Kind.BATCH
    if target in _BINARY and not node.kwargs:
        return _Kind.BATCH if _per_image(node, rest) else None
    if target is torch.flatten and node.args[1:2] == (1,) and not rest:
        return _Kind.BATCH
    if target is torch.mean and not rest and len(node.args) > 1 and _excludes_batch(node.args[1]):
        return _Kind.BATCH
    if target is getattr and node.args[1] == "shape":
        return _Kind.SHAPE
    return None


def _cat(node: fx.Node, kinds: dict[fx.Node, _Kind]) -> _Kind | None:
    """torch.cat of batch-first tensors along another dimension."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    is_cat = node.op == "call_function" and node.target in (torch.cat, torch.concat)
    if is_cat and _excludes_batch((dim,)) and all(kinds[source] is _Kind.BATCH for source in node.all_input_nodes):
        return _Kind.BATCH
    return None


def _excludes_batch(dims: Any) -> bool:
    return isinstance(dims, tuple | list) and all(isinstance(dim, int) and dim > 0 for dim in dims)


def _per_image(node: fx.Node, rest: set[_Kind]) -> bool:
    """Whether a binary op pairs each image with itself (or with a number): both operands as deep as each other."""
    if not rest:
        return all(not isinstance(value, fx.Node) or value is node.args[0] for value in node.args[1:])
    depths = {len(shape) if (shape := ir.shape_of(source)) is not None else -1 for source in node.all_input_nodes}
    return rest == {_Kind.BATCH} and len(depths) == 1 and -1 not in depths


def _method(node: fx.Node, kinds: dict[fx.Node, _Kind], rest: set[_Kind]) -> _Kind | None:
    if node.target == "size":
        if len(node.args) == 1:
            return _Kind.SHAPE
        if not isinstance(node.args[1], int) or node.args[1] < 0:
            return None
        return _Kind.BATCH_SIZE if node.args[1] == 0 else _Kind.CONSTANT
    if node.target in _METHODS and not rest:
        return _Kind.BATCH
    if node.target in ("reshape", "view") and len(node.args) > 1:
        size: Any = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
        by_image = isinstance(size[0], fx.Node) and kinds[size[0]] is _Kind.BATCH_SIZE
        others = all(not isinstance(item, fx.Node) or kinds[item] is _Kind.CONSTANT for item in size[1:])
        return _Kind.BATCH if by_image and others else None
    return None


def largest_tensor(gm: fx.GraphModule, x: Tensor) -> int | None:
    """Bytes per image of the largest tensor that ``gm`` makes from images like ``x``; None if that is unknown."""
    result = shapes.run(gm, (x[:1],))
    if result.error:
        return None
    largest = 0
    for node, value in result.values.items():
        if node.op in ("placeholder", "get_attr", "output") or not isinstance(value, Tensor):
            continue
        size = value.numel() * value.element_size()
        if node.op == "call_module" and getattr(gm.get_submodule(str(node.target)), "op", "") == "stem":
            size *= 4  # the convolution's output, before it is pooled
        largest = max(largest, size)
    return largest


def run_pieces(function: Callable[[Tensor], Any], x: Tensor, piece: int) -> Any:
    """``function`` over ``x``, at most ``piece`` images at a time and evenly, results put together along the batch."""
    total = x.shape[0]
    count = -(-total // piece)
    bounds = [total * index // count for index in range(count + 1)]
    outputs: list[Tensor] = []
    structure: Any = None
    for begin, end in itertools.pairwise(bounds):
        leaves, structure = pytree.tree_flatten(function(x[begin:end]))
        if not outputs:
            outputs = [_whole(leaf, total) for leaf in leaves]
        for output, leaf in zip(outputs, leaves, strict=True):
            output[begin:end].copy_(leaf)
    return pytree.tree_unflatten(outputs, structure)


def _whole(part: Tensor, total: int) -> Tensor:
    """Memory for the results of ``total`` images, laid out like the part's."""
    last = part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last) and not part.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty((total, *part.shape[1:]), dtype=part.dtype, device=part.device, memory_format=layout)
