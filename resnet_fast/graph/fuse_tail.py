"""Bottleneck blocks from their 3x3 on become ``bottleneck_tail`` where that lowers the floor on the GPU planned for.

A plan, not a measurement: bytes and operations from roofline.cost, what the programs read through the level-2 cache,
limits of a GPU from kernels.gpus. Which kernel then runs is the op's choice, and a plan for one GPU gives the same
answers everywhere.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from resnet_fast.backends import triton
from resnet_fast.kernels import bottleneck_tail_choice, gpus
from resnet_fast.kernels.problems import BottleneckTail, ConvBNAct, Problem
from resnet_fast.roofline import cost

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
        best, other = decide(block, gpu, dtype.itemsize)
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


def decide(block: Block, gpu: gpus.GPU, itemsize: int | None = None) -> tuple[Way, Way | None]:
    """Return how the block is run on ``gpu``, and the best of the other ways; None if there is none.

    Args:
        itemsize: bytes of a stored number; None: those of the block's precision.
    """
    separate, *fused = block.ways(
        gpu, lambda problem: feasible(problem, gpu), itemsize, lambda problem: l2_seconds(problem, gpu)
    )
    cheapest = min(fused, key=lambda way: way.cost, default=None)
    # Where all is bound by arithmetic, fusing saves launches only, and plain convolutions do arithmetic best.
    lower = [way for way in fused if way.floor < (1 - _MARGIN) * separate.floor]
    best = min(lower, key=lambda way: way.cost, default=separate)
    return best, cheapest if best is separate else separate


def l2_seconds(problem: Problem, gpu: gpus.GPU) -> float:
    """Return the seconds in which the level-2 cache gives a launch's programs what they read; 0 if its rate is unknown.

    A floor leaves this out, for another tile would read less. But the fewer pixels a program of a fused block has, the
    more often all its weights are read.
    """
    if gpu.l2_bandwidth is None or problem.precision == "fp32":  # plain multiply-adds are slower than any memory
        return 0.0
    if isinstance(problem, BottleneckTail):
        config = bottleneck_tail_choice.choose(problem, gpu)
        reads = 0 if config is None else config.l2_reads(problem)
    else:
        reads = cost.l2_reads(problem) if isinstance(problem, ConvBNAct) else 0
    return reads / gpu.l2_bandwidth


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
    return f"{who} ({size}): {SEPARATE}, floor {best}; {other.form} would be no faster: {other}"


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
