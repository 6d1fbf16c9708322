"""Where the time of one forward goes: every node of an fx graph timed by itself, grouped by kind and by stage.

Meant for CPUs, where a node is done when it returns. The sum is a little more than an undisturbed forward takes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from resnet_fast.benchmarking.timing import quantile
from resnet_fast.graph.guard import Guard

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")
_FUSED = {
    "stem": "fused stem",
    "conv_bn_act": "fused conv + BN + add + ReLU",
    "add_act": "fused add + ReLU",
    "head": "fused head",
}
_PLAIN: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Conv2d, "convolution"),
    (nn.BatchNorm2d, "batch norm"),
    (nn.ReLU, "relu"),
    (nn.MaxPool2d, "pooling"),
    (nn.AdaptiveAvgPool2d, "pooling"),
    (nn.Linear, "linear"),
    (Guard, "overflow guards"),
)


@dataclass(frozen=True)
class NodeTime:
    """One node: its name in the graph, what kind of work it is, the stage it belongs to, median seconds."""

    name: str
    part: str
    stage: str
    seconds: float


class _Timed(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[str, list[float]] = {}

    def run_node(self, node: fx.Node) -> Any:
        before = time.perf_counter()
        result = super().run_node(node)
        self.seconds.setdefault(node.name, []).append(time.perf_counter() - before)
        return result


def node_times(graph_modules: Sequence[fx.GraphModule], x: Tensor, *, runs: int = 7) -> list[list[NodeTime]]:
    """For every graph the median seconds of each node that computes, over ``runs`` forwards of ``x`` after one to warm
    up; the graphs take turns."""
    interpreters = [_Timed(graph_module) for graph_module in graph_modules]
    with torch.no_grad():
        for run in range(runs + 1):
            for timed in interpreters:
                timed.run(x)
                if run == 0:
                    timed.seconds.clear()
    return [_collect(graph, timed.seconds) for graph, timed in zip(graph_modules, interpreters, strict=True)]


def _collect(graph_module: fx.GraphModule, seconds: dict[str, list[float]]) -> list[NodeTime]:
    times, stage = [], STAGES[0]
    for node in graph_module.graph.nodes:
        if not node.op.startswith("call_"):
            continue
        stage = _stage(str(node.target) if node.op == "call_module" else node.name, stage)
        times.append(NodeTime(node.name, _part(graph_module, node), stage, quantile(seconds[node.name], 0.5)))
    return times


def by_part(times: list[NodeTime]) -> dict[str, float]:
    """Seconds by kind of work, the largest first."""
    return _grouped([(time.part, time.seconds) for time in times])


def by_stage(times: list[NodeTime]) -> dict[str, float]:
    """Seconds by stage of the network, in its order."""
    sums = _grouped([(time.stage, time.seconds) for time in times])
    return {stage: sums.get(stage, 0.0) for stage in STAGES}


def _grouped(pairs: list[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for key, seconds in pairs:
        sums[key] = sums.get(key, 0.0) + seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _stage(name: str, current: str) -> str:
    """Return the stage that ``name`` says it belongs to, otherwise the one that the nodes before it belong to."""
    match = re.match(r"(layer[1-4])(?=[._])", name)
    if match:
        return match.group(1)
    return "head" if re.match(r"(avgpool|flatten|fc)(?=$|[._])", name) else current


def _part(graph_module: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        op = getattr(module, "op", None)
        if op in _FUSED:
            return _FUSED[op]
        return next((part for kind, part in _PLAIN if isinstance(module, kind)), "other")
    target = str(getattr(node.target, "__name__", node.target))
    if "add_act" in target:
        return _FUSED["add_act"]
    return "add" if target.strip("_") in ("add", "iadd") else "other"
