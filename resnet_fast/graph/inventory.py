"""What a fused graph is made of: its fused ops as problems of their kernels, and its bottleneck blocks.

The only place that recognises either. ``fuse_tail`` applies a plan for the blocks, ``schedules`` prices one, and the
tuner collects the same problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from resnet_fast.kernels import problems
from resnet_fast.kernels.gpus import GPU
from resnet_fast.kernels.problems import Problem
from resnet_fast.ops.bottleneck_tail import kernel_problem
from resnet_fast.roofline import LAUNCH, cost

from . import ir, plan, shapes

SEPARATE = "one kernel per convolution"
TAIL = "bottleneck_tail"
ROTATED = "bottleneck_tail with the next 1x1"

Feasible = Callable[[problems.BottleneckTail], bool]
"""Whether one kernel may compute the problem."""


@dataclass(frozen=True)
class Layer:
    """A fused op of a graph, at the graph's example inputs.

    Attributes:
        name: of its node. sources: names of the nodes that it reads, the residual last.
        readers: names of the nodes that read its result, fused or not.
        shape: of its (first) result.
        activation: of a conv_bn_act, "relu" or "none". late: whether its residual is added after the activation.
    """

    name: str
    sources: tuple[str, ...]
    readers: tuple[str, ...]
    shape: tuple[int, ...]
    problem: Problem
    activation: str = "relu"
    late: bool = False

    @property
    def op(self) -> str:
        """The fused op's name."""
        return self.problem.op

    def at(self, batch: int, precision: str) -> Layer:
        """Return the layer for another batch and precision."""
        added = isinstance(self.problem, problems.AddAct)
        size = {"length": math.prod(self.shape[1:]) * batch} if added else {"n": batch}
        problem = replace(self.problem, precision=precision, **size)
        return replace(self, shape=(batch, *self.shape[1:]), problem=problem)


@dataclass(frozen=True)
class Way:
    """One way to run a block: the least time that its kernels take, in seconds, and how many they are.

    Attributes:
        tail: the convolutions that one kernel computes; None if each has its own.
    """

    form: str
    floor: float
    launches: int
    tail: Block | None = None

    @property
    def cost(self) -> float:
        """The floor and what the launches take."""
        return self.floor + self.launches * LAUNCH

    def __add__(self, other: Way) -> Way:
        return replace(self, floor=self.floor + other.floor, launches=self.launches + other.launches)

    def __str__(self) -> str:
        return f"{self.floor * 1e6:.1f} us in {self.launches} kernel{'s' if self.launches != 1 else ''}"


@dataclass(frozen=True)
class Block:
    """A bottleneck block from its 3x3 on: what one ``bottleneck_tail`` may compute.

    Attributes:
        spatial: the 3x3. expand: the 1x1 with the residual.
        project: the 1x1 that makes the residual, None if the residual is added as it is.
        following: the next block's first 1x1, None if no such convolution comes next.
    """

    spatial: Layer
    expand: Layer
    project: Layer | None
    following: Layer | None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The convolutions in the order of execution; all but ``following`` come before ``expand`` or are it."""
        layers = (self.spatial, self.project, self.expand, self.following)
        return tuple(layer for layer in layers if layer is not None)

    @property
    def problem(self) -> problems.BottleneckTail | None:
        """The whole block as a problem of one kernel; None if a stride is uneven, which no kernel computes."""
        spatial: Any = self.spatial.problem
        project: Any = None if self.project is None else self.project.problem
        if any(len({*conv.stride}) > 1 for conv in (spatial, project) if conv is not None):
            return None
        return problems.BottleneckTail(
            n=spatial.n, h=spatial.h, w=spatial.w, mid=spatial.k, k=self.expand.shape[1], stride=spatial.stride[0],
            shortcut=None if project is None else (project.c, project.h, project.w, project.stride[0]),
            following=0 if self.following is None else self.following.shape[1], precision=spatial.precision,
        )  # fmt: skip

    def at(self, batch: int, precision: str) -> Block:
        """Return the block for another batch and precision."""
        return Block(**{name: layer and layer.at(batch, precision) for name, layer in vars(self).items()})

    def ways(
        self,
        gpu: GPU,
        feasible: Feasible,
        itemsize: int | None = None,
        least: Callable[[Problem], float] = lambda problem: 0.0,
    ) -> list[Way]:
        """Return the ways to run the block, the separate kernels first. All include the next block's 1x1.

        Args:
            feasible: which problems may be one kernel. itemsize: bytes of a number; None: the precision's.
            least: seconds that a launch takes at least for other reasons than its floor.
        """

        def floor(problem: Problem) -> float:
            return max(cost.work(problem, itemsize).floor(gpu, problem.precision), least(problem))

        floors = {layer.name: floor(layer.problem) for layer in self.layers}
        ways = [Way(SEPARATE, sum(floors.values()), len(floors))]
        alone = replace(self, following=None)
        for form, whole in ((TAIL, alone), *(() if self.following is None else ((ROTATED, self),))):
            for block in (whole, *(() if self.project is None else (replace(whole, project=None),))):
                problem, inside = block.problem, {layer.name for layer in block.layers}
                if problem is not None and feasible(problem):
                    rest = [seconds for name, seconds in floors.items() if name not in inside]
                    ways.append(Way(form, floor(problem) + sum(rest), 1 + len(rest), block))
        return ways


def layers(gm: fx.GraphModule, inputs: Sequence[Any] | None = None, precision: str = "fp32") -> tuple[Layer, ...]:
    """Return the fused ops of a graph in order, of one in normal form or of one with fused modules.

    An op is left out if the shape of something that it reads or gives is unknown.

    Args:
        inputs: what the graph is run on to find shapes; None: its nodes carry their values.
        precision: how products are computed, one of ``kernels.gpus.PRECISIONS``.
    """
    if inputs is None:
        values = {node: node.meta.get("value") for node in gm.graph.nodes}
    else:
        values = shapes.run(gm, inputs).values
    found = (_layer(gm, node, values, precision) for node in gm.graph.nodes)
    return tuple(layer for layer in found if layer is not None)


def _layer(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], precision: str) -> Layer | None:
    op, a = ir.op_of(node), cast(Any, None)
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, plan.Fused):
        op = module.declared
        a = module.arguments()._replace(**dict(zip(op.data, node.args, strict=False)))
    elif op is not None:
        a = ir.arguments_of(node)
    if op is None:
        return None
    sources = [source for name in op.data if isinstance(source := getattr(a, name), fx.Node)]
    result: Any = values.get(node)
    result = result[0] if isinstance(result, tuple) else result
    if not all(isinstance(value, Tensor) for value in (result, *(values.get(source) for source in sources))):
        return None
    a = op.arguments(*(values.get(value) if isinstance(value, fx.Node) else value for value in a))
    x = op.data[0]  # its dtype would say the precision, which some dtypes lack
    a = a._replace(**{x: torch.empty(getattr(a, x).shape, dtype=torch.float16, device="meta")})
    problem = (op.problem or kernel_problem)(a)
    if problem is None:
        return None
    return Layer(
        name=node.name,
        sources=tuple(source.name for source in sources),
        readers=tuple(reader.name for reader in node.users),
        shape=tuple(result.shape),
        problem=replace(problem, precision=precision),
        activation=getattr(a, "activation", "relu"),
        late=getattr(a, "residual_after_activation", False),
    )


_ONE = (1, 1)
_POINTWISE: dict[str, Any] = {"kernel": _ONE, "padding": (0, 0), "groups": 1}
_SPATIAL: dict[str, Any] = {"kernel": (3, 3), "padding": _ONE, "dilation": _ONE, "groups": 1}


def blocks(layers: Iterable[Layer]) -> tuple[Block, ...]:
    """Return the bottleneck blocks among ``layers``, in the order of their expansions.

    A block is a plain 3x3 that keeps the number of channels and that nothing reads but a 1x1 with a residual and a ReLU
    after it.
    """
    named = {layer.name: layer for layer in layers}
    found = []
    for expand in named.values():
        if expand.late or not _is_conv(expand, "relu", residual=True, stride=_ONE, **_POINTWISE):
            continue
        spatial, project = (named.get(name) for name in expand.sources)
        if spatial is None or spatial is project or spatial.readers != (expand.name,):
            continue
        if not _is_conv(spatial, "relu", k=getattr(spatial.problem, "c", 0), **_SPATIAL):
            continue
        if project is not None and (project.readers != (expand.name,) or not _is_conv(project, "none", **_POINTWISE)):
            project = None
        after = (named[name] for name in expand.readers if name in named)
        first = (layer for layer in after if _is_conv(layer, "relu", stride=_ONE, **_POINTWISE))
        found.append(Block(spatial, expand, project, next(first, None)))
    return tuple(found)


def _is_conv(layer: Layer, activation: str, residual: bool = False, **fields: Any) -> bool:
    """Return whether it is a convolution with this activation, with or without a residual, and these fields."""
    conv = layer.problem
    if not isinstance(conv, problems.ConvBNAct) or (layer.activation, conv.residual) != (activation, residual):
        return False
    return all(getattr(conv, name) == value for name, value in fields.items())
