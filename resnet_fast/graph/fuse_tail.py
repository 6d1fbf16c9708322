"""Bottleneck blocks from their 3x3 on become ``bottleneck_tail`` where that lowers the floor on the GPU planned for.

A plan, not a measurement: bytes and operations from roofline.cost, limits of a GPU from kernels.gpus. Which kernel
then runs is the op's choice, and a plan for one GPU gives the same answers everywhere.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from resnet_fast.backends import triton
from resnet_fast.kernels import bottleneck_tail_choice, gpus
from resnet_fast.kernels.problems import BottleneckTail

from . import ir, memory
from .inventory import SEPARATE, TAIL, Block, Way, blocks, layers

#: By what part of the separate kernels' floor the fused one must be lower: rounding is no gain.
_MARGIN = 1e-6

_ONE = (1, 1)


def fuse_tail(gm: fx.GraphModule, gpu: gpus.GPU, dtype: torch.dtype, notes: ir.Notes) -> None:
    """Form ``bottleneck_tail`` nodes where the floor on ``gpu``, at the example inputs' sizes, becomes lower.

    The convolutions that one tail takes belong to no other, so each block is decided by itself.
    """
    if any(memory.written(gm, node) for node in gm.graph.nodes):
        return notes.add(f"{gpu.name}: no {TAIL}, the graph writes in place")
    nodes = {node.name: node for node in gm.graph.nodes}
    precision = triton.precision(dtype) if dtype is not torch.float64 else "fp32"
    groups: dict[tuple[int, int, int, str, bool], list[tuple[Block, Way, Way | None]]] = {}
    for block in blocks(layers(gm, precision=precision)):
        separate, *fused = block.ways(gpu, lambda problem: feasible(problem, gpu), dtype.itemsize)
        cheapest = min(fused, key=lambda way: way.cost, default=None)
        # Where all is bound by arithmetic, fusing saves launches only, and plain convolutions do arithmetic best.
        lower = [way for way in fused if way.floor < (1 - _MARGIN) * separate.floor]
        best = min(lower, key=lambda way: way.cost, default=separate)
        other = cheapest if best is separate else separate
        _, mid, p, q = block.spatial.shape
        groups.setdefault((mid, p, q, best.form, other is None), []).append((block, best, other))
    if not groups:
        return notes.add(f"{gpu.name}: no bottleneck block (a 3x3, then a 1x1 with a residual) to plan for")
    for (mid, p, q, _, _), members in groups.items():
        names = [ir.name_of(nodes[block.spatial.name]) for block, _, _ in members]
        notes.add(f"{gpu.name}: {_described(members, names, f'mid {mid}, {p}x{q}', dtype)}")
    for members in groups.values():
        for _, best, _ in members:
            if best.tail is not None:
                _build(gm, best.tail, nodes)
    return None


def feasible(problem: BottleneckTail, gpu: gpus.GPU) -> bool:
    """Return whether the kernel has a tile for the problem on the GPU planned for."""
    # Without matrix units multiply-adds stay far from their floor, on the small tiles that fit.
    return problem.precision != "fp32" and bottleneck_tail_choice.supports(problem, gpu)


def _described(members: list[tuple[Block, Way, Way | None]], names: list[str], size: str, dtype: torch.dtype) -> str:
    """One line on blocks of one size that got one form: what they became, and the floor of the other way."""
    who = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}, {len(names)} blocks"
    _, best, other = members[0]
    for _, more, alternative in members[1:]:
        best = best + more
        other = None if other is None or alternative is None else other + alternative
    if best.form != SEPARATE:
        return f"{who} ({size}): {best.form}, floor {best} instead of {other}"
    if other is None:
        return f"{who} ({size}): {SEPARATE}, floor {best}; {TAIL} is not planned for this size in {dtype}"
    return f"{who} ({size}): {SEPARATE}, floor {best}; bound by arithmetic, {other.form} would be {other}"


def _build(gm: fx.GraphModule, block: Block, nodes: dict[str, fx.Node]) -> None:
    """Replace the block's nodes by one ``bottleneck_tail`` in the place of its expansion."""
    last, replaced = nodes[block.expand.name], [nodes[layer.name] for layer in block.layers]
    spatial, expand = ir.arguments_of(nodes[block.spatial.name]), ir.arguments_of(last)
    residual, shortcut_stride = expand.residual, _ONE
    projection: tuple[fx.Node | None, ...] = (None, None, None)
    if block.project is not None:
        project = ir.arguments_of(nodes[block.project.name])
        residual, shortcut_stride = project.x, project.stride
        projection = (project.weight, project.scale, project.shift)
    read_later = [last] if block.following is None else [last, replaced[-1]]
    with gm.graph.inserting_before(last):
        first: tuple[fx.Node | None, ...] = (None, None, None)
        if block.following is not None:
            # Its constants' own nodes may come later in the graph.
            first = tuple(gm.graph.node_copy(node) for node in ir.arguments_of(replaced[-1])[1:4])
        arguments = (*spatial[:4], *expand[1:4], residual, *projection, *first, spatial.stride, shortcut_stride)
        tail = ir.call(gm, ir.BOTTLENECK_TAIL, arguments)
        outputs = [gm.graph.call_function(operator.getitem, (tail, index)) for index in range(len(read_later))]
    values: list[Tensor | None] = [node.meta.get("value") for node in read_later]
    tail.meta["value"] = tuple(values)
    tail.meta["layers"] = [layer for node in replaced for layer in ir.layers_of(node)]
    for layer in ir.layers_of(tail):
        layer.reason = ""
    for old, new, value in zip(read_later, outputs, values, strict=True):
        new.meta["value"] = value
        old.replace_all_uses_with(new)
    for node in reversed(replaced):
        gm.graph.erase_node(node)
