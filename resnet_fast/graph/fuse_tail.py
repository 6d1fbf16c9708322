"""Bottleneck blocks from their 3x3 on become ``bottleneck_tail`` where that lowers the floor on the GPU planned for.

A plan, not a measurement: bytes and operations from roofline.cost, limits of a GPU from kernels.gpus. Which kernel
then runs is the op's choice, and a plan for one GPU gives the same answers everywhere.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from resnet_fast.backends import triton
from resnet_fast.kernels import bottleneck_tail_choice, gpus
from resnet_fast.roofline import cost
from resnet_fast.roofline.schedule import LAUNCH

from . import ir, memory

#: By what part of the separate kernels' floor the fused one must be lower: rounding is no gain.
_MARGIN = 1e-6

_ONE, _NONE = (1, 1), (0, 0)


@dataclass(frozen=True)
class Block:
    """The conv_bn_act nodes of a block behind its first: 3x3, expansion, projected shortcut, and the next block's 1x1.

    ``project`` is None where the residual is added as it is; ``following`` where no such convolution comes next.
    """

    spatial: fx.Node
    expand: fx.Node
    project: fx.Node | None
    following: fx.Node | None

    @property
    def nodes(self) -> list[fx.Node]:
        """In the order of execution, the one that all others but the last come before being ``expand``."""
        nodes = (self.spatial, self.project, self.expand, self.following)
        return [node for node in nodes if node is not None]


@dataclass(frozen=True)
class Schedule:
    """One way to run a block: the least time its kernels take, in seconds, and how many they are."""

    form: str
    floor: float
    launches: int

    @property
    def cost(self) -> float:
        return self.floor + self.launches * LAUNCH

    def __add__(self, other: Schedule) -> Schedule:
        return replace(self, floor=self.floor + other.floor, launches=self.launches + other.launches)

    def __str__(self) -> str:
        return f"{self.floor * 1e6:.1f} us in {self.launches} kernel{'s' if self.launches != 1 else ''}"


SEPARATE = "one kernel per convolution"
TAIL = "bottleneck_tail"
ROTATED = "bottleneck_tail with the next 1x1"


def fuse_tail(gm: fx.GraphModule, gpu: gpus.GPU, dtype: torch.dtype, notes: ir.Notes) -> None:
    """Form ``bottleneck_tail`` nodes where the floor on ``gpu``, at the example inputs' sizes, becomes lower.

    The convolutions that one tail takes belong to no other, so each block is decided by itself.
    """
    if any(memory.written(gm, node) for node in gm.graph.nodes):
        return notes.add(f"{gpu.name}: no {TAIL}, the graph writes in place")
    blocks = [block for node in gm.graph.nodes if (block := _block(gm, node)) is not None]
    if not blocks:
        return notes.add(f"{gpu.name}: no bottleneck block (a 3x3, then a 1x1 with a residual) to plan for")
    groups: dict[tuple[int, int, int, str, bool], list[tuple[Block, Schedule, Schedule | None]]] = {}
    unknown = 0
    for block in blocks:
        schedules = _schedules(gm, block, gpu, dtype)
        if not schedules:
            unknown += 1
            continue
        separate, *fused = schedules
        cheapest = min(fused, key=lambda schedule: schedule.cost, default=None)
        # Where all is bound by arithmetic, fusing saves launches only, and plain convolutions do arithmetic best.
        lower = [schedule for schedule in fused if schedule.floor < (1 - _MARGIN) * separate.floor]
        best = min(lower, key=lambda schedule: schedule.cost, default=separate)
        other = cheapest if best is separate else separate
        _, mid, p, q = _shape(block.spatial)
        groups.setdefault((mid, p, q, best.form, other is None), []).append((block, best, other))
    if unknown:
        notes.add(f"{gpu.name}: {unknown} blocks are not planned, their shapes are unknown")
    for (mid, p, q, _, _), members in groups.items():
        notes.add(f"{gpu.name}: {_described(members, f'mid {mid}, {p}x{q}', dtype)}")
    for members in groups.values():
        for block, best, _ in members:
            if best.form != SEPARATE:
                _build(gm, block if best.form == ROTATED else replace(block, following=None))
    return None


def _described(members: list[tuple[Block, Schedule, Schedule | None]], size: str, dtype: torch.dtype) -> str:
    """One line on blocks of one size that got one form: what they became, and the floor of the other way."""
    first, last = (ir.name_of(members[index][0].spatial) for index in (0, -1))
    who = first if len(members) == 1 else f"{first} to {last}, {len(members)} blocks"
    best, other = members[0][1], members[0][2]
    for _, more, alternative in members[1:]:
        best = best + more
        other = None if other is None or alternative is None else other + alternative
    if best.form != SEPARATE:
        return f"{who} ({size}): {best.form}, floor {best} instead of {other}"
    if other is None:
        return f"{who} ({size}): {SEPARATE}, floor {best}; {TAIL} is not planned for this size in {dtype}"
    return f"{who} ({size}): {SEPARATE}, floor {best}; bound by arithmetic, {other.form} would be {other}"


def _block(gm: fx.GraphModule, expand: fx.Node) -> Block | None:
    """The block whose last convolution is ``expand``, None if there is none."""
    if not _pointwise(gm, expand):
        return None
    last = ir.Conv.of(expand)
    if last.activation != "relu" or last.residual is None or last.residual_after_activation or last.stride != _ONE:
        return None
    spatial = last.x
    if spatial is last.residual or not ir.plain_conv(spatial, "relu"):
        return None
    conv, weight = ir.Conv.of(spatial), ir.tensor_of(gm, ir.Conv.of(spatial).weight)
    if weight is None or tuple(weight.shape) != (weight.shape[0], weight.shape[0], 3, 3):
        return None
    if (conv.padding, conv.dilation, conv.groups) != (_ONE, _ONE, 1):
        return None
    project = last.residual if ir.plain_conv(last.residual) and _pointwise(gm, last.residual) else None
    return Block(spatial, expand, project, next((user for user in expand.users if _is_first(gm, user, expand)), None))


def _pointwise(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` is a 1x1 conv_bn_act of any stride, without padding and groups."""
    if not ir.is_call(node, ir.CONV_BN_ACT):
        return False
    conv = ir.Conv.of(node)
    weight = ir.tensor_of(gm, conv.weight)
    return weight is not None and tuple(weight.shape[2:]) == _ONE and (conv.padding, conv.groups) == (_NONE, 1)


def _is_first(gm: fx.GraphModule, node: fx.Node, x: fx.Node) -> bool:
    """Whether ``node`` is what a bottleneck block begins with: 1x1, stride 1, ReLU, on ``x``."""
    if not _pointwise(gm, node):
        return False
    conv = ir.Conv.of(node)
    return (conv.x, conv.residual, conv.activation, conv.stride) == (x, None, "relu", _ONE)


def _schedules(gm: fx.GraphModule, block: Block, gpu: gpus.GPU, dtype: torch.dtype) -> list[Schedule]:
    """The ways to run the block that there are kernels for, separate ones first; empty where a shape is unknown.

    All of them include the next block's 1x1, in a kernel of its own or not.
    """
    singles = [_conv_work(gm, node, dtype) for node in block.nodes]
    if any(single is None for single in singles):
        return []
    precision = triton.precision(dtype) if dtype is not torch.float64 else "fp32"
    floors = [single.floor(gpu, precision) for single in singles if single is not None]
    schedules = [Schedule(SEPARATE, sum(floors), len(floors))]
    alone = replace(block, following=None)
    if feasible(alone, gpu, dtype):
        floor = _tail_work(alone, dtype).floor(gpu, precision)
        rest = floors[-1:] if block.following is not None else []
        schedules.append(Schedule(TAIL, floor + sum(rest), 1 + len(rest)))
    if block.following is not None and feasible(block, gpu, dtype):
        schedules.append(Schedule(ROTATED, _tail_work(block, dtype).floor(gpu, precision), 1))
    return schedules


def feasible(block: Block, gpu: gpus.GPU, dtype: torch.dtype) -> bool:
    """Whether the kernel has a tile for the block, at its shapes and on the GPU planned for."""
    spatial = ir.Conv.of(block.spatial)
    strides, shortcut = {*spatial.stride}, None
    n, mid, h, w = _shape(spatial.x)
    if block.project is not None:
        projection = ir.Conv.of(block.project)
        _, c, *size = _shape(projection.x)
        shortcut = (c, size[0], size[1], projection.stride[0])
        uneven = len({*projection.stride}) > 1
    else:
        uneven = False
    if uneven or len(strides) > 1 or dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    precision = triton.precision(dtype)
    if precision == "fp32":  # no matrix units: on the small tiles that fit, multiply-adds stay far from their floor
        return False
    following = 0 if block.following is None else _shape(block.following)[1]
    k, stride = _shape(block.expand)[1], spatial.stride[0]
    problem = bottleneck_tail_choice.Problem(n, h, w, mid, k, stride, shortcut, following, precision)
    return bottleneck_tail_choice.supports(problem, gpu)


def _shape(node: fx.Node) -> tuple[int, ...]:
    shape = ir.shape_of(node)
    assert shape is not None  # _conv_work found it
    return shape


def _conv_work(gm: fx.GraphModule, node: fx.Node, dtype: torch.dtype) -> cost.Work | None:
    """Bytes and operations of a conv_bn_act node, None where a shape is unknown."""
    conv = ir.Conv.of(node)
    source, shape, weight = ir.shape_of(conv.x), ir.shape_of(node), ir.tensor_of(gm, conv.weight)
    if source is None or shape is None or weight is None:
        return None
    return cost.conv(
        shape[0], source[1], source[2:], shape[1], tuple(weight.shape[2:]), conv.stride, shape[2:],
        groups=conv.groups, residual=conv.residual is not None, itemsize=dtype.itemsize,
    )  # fmt: skip


def _tail_work(block: Block, dtype: torch.dtype) -> cost.Work:
    spatial = ir.Conv.of(block.spatial)
    n, mid, *size = _shape(spatial.x)
    _, k, *output = _shape(block.expand)
    shortcut = None
    if block.project is not None:
        projection = ir.Conv.of(block.project)
        _, channels, *source = _shape(projection.x)
        shortcut = (channels, source, projection.stride)
    following = None if block.following is None else _shape(block.following)[1]
    return cost.bottleneck_tail(
        n, mid, size, k, spatial.stride, output, shortcut=shortcut, following=following, itemsize=dtype.itemsize
    )


def _build(gm: fx.GraphModule, block: Block) -> None:
    """Replace the block's nodes by one ``bottleneck_tail`` in the place of its expansion."""
    spatial, expand = ir.Conv.of(block.spatial), ir.Conv.of(block.expand)
    residual, shortcut_stride = expand.residual, _ONE
    projection: tuple[fx.Node | None, ...] = (None, None, None)
    if block.project is not None:
        project = ir.Conv.of(block.project)
        residual, shortcut_stride = project.x, project.stride
        projection = (project.weight, project.scale, project.shift)
    values: list[Tensor | None] = [block.expand.meta.get("value")]
    with gm.graph.inserting_before(block.expand):
        first: tuple[fx.Node | None, ...] = (None, None, None)
        if block.following is not None:
            # Its constants' own nodes may come later in the graph.
            first = tuple(gm.graph.node_copy(node) for node in ir.Conv.of(block.following)[1:4])
            values.append(block.following.meta.get("value"))
        arguments = (*spatial[:4], *expand[1:4], residual, *projection, *first, spatial.stride, shortcut_stride)
        tail = ir.call(gm, ir.BOTTLENECK_TAIL, arguments)
        outputs = [gm.graph.call_function(operator.getitem, (tail, index)) for index in range(len(values))]
    tail.meta["value"] = tuple(values)
    tail.meta["layers"] = [layer for node in block.nodes for layer in ir.layers_of(node)]
    for layer in ir.layers_of(tail):
        layer.reason = ""
    pairs = [(block.expand, outputs[0])] + ([] if block.following is None else [(block.following, outputs[1])])
    for (old, new), value in zip(pairs, values, strict=True):
        new.meta["value"] = value
        old.replace_all_uses_with(new)
    for node in reversed(block.nodes):
        gm.graph.erase_node(node)
