"""A network as schedules, priced by ``roofline``: as its author wrote it, fused, with blocks fused, and as planned.

Nothing runs here but ``measured``; shapes are found on tensors without data.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from resnet_fast._dtypes import ITEMSIZE
from resnet_fast.kernels import gpus, problems
from resnet_fast.roofline import Kernel, Schedule, Seconds, Work, cost, fits_on_chip
from resnet_fast.roofline.measure import node_seconds, tf32

from . import ir
from .inventory import Feasible, Layer, blocks, layers
from .optimize import optimize
from .report import Report
from .snapshot import OptimizedModule


def schedules(model: nn.Module, image: Tensor, gpu: gpus.GPU, precision: str, stored: str = "") -> tuple[Schedule, ...]:
    """Return the schedules eager, per-conv, rotated and, on a built-in GPU, planned: what ``optimize`` makes for it.

    With ``stored``, "int8" or "fp8", eager, per-conv and that: what ``quantize`` makes.

    Args:
        model: a ResNet. image: a batch of the model's dtype; neither needs data.
        precision: how products are computed, one of ``kernels.gpus.PRECISIONS``.

    Raises:
        ValueError: the network does not take such images, or no floor is known for a part of it.
    """
    options: Any = {"dtype": image.dtype, "example_inputs": image, "backend": "reference"}
    fused = optimize(model, **options)
    per_conv = of_graph("per-conv", fused, image, precision)
    convolutions = layers(fused.graph_module, (image,), precision)
    plain = eager(model, fused.report(), image)
    if stored:
        return plain, per_conv, quantized(per_conv, convolutions, stored)
    found = [plain, per_conv, rotated(per_conv, convolutions, gpu)]
    if gpu in gpus.GPUS:
        with tf32(precision == "tf32"):  # a plan for float32 follows torch's setting
            planned = optimize(model, **options, gpu=gpu.name)
        found.append(of_graph("planned", planned, image, precision))
    return tuple(found)


def eager(model: nn.Module, report: Report, image: Tensor) -> Schedule:
    """Return a kernel for each of the author's layers, in-place ones included; none for layers that move nothing.

    BatchNorm counts as one multiply-add an element, which it is at inference; pooling as one operation an input.
    """
    modules, kernels = dict(model.named_modules()), []
    for row in report.rows:
        if row.shape is None or row.bytes_before is None:
            raise ValueError(f"{row.name}: its shape is unknown, so it has no floor")
        if row.bytes_before == 0:
            continue
        module: Any = modules.get(row.name)  # a ReLU that is called twice has another name there
        tensors = () if module is None else (*module.parameters(), *module.buffers())
        constants = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.dim())
        moved, elements = row.bytes_before - constants, math.prod(row.shape)
        if row.kind in ("Conv2d", "Linear"):
            flops = 2 * elements * module.weight[0].numel()
        elif row.kind == "BatchNorm2d":
            flops = 2 * elements
        elif row.kind == "MaxPool2d":
            flops = elements * module.kernel_size**2
        elif row.kind == "AdaptiveAvgPool2d":
            flops = moved // image.element_size() - elements
        elif row.kind in ("ReLU", "add", "iadd"):
            flops = elements
        else:
            raise ValueError(f"{row.name}: no floor is known for this layer")
        kernels.append(Kernel(row.name, row.kind, row.shape, Work(moved, constants, flops)))
    return Schedule("eager", image.shape[0], tuple(kernels))


def of_graph(title: str, fused: OptimizedModule, image: Tensor, precision: str) -> Schedule:
    """Return a kernel for each fused op of the graph that ``optimize`` made."""
    gm, parts_of = fused.graph_module, parts(fused)
    found = {layer.name: layer for layer in layers(gm, (image,), precision)}
    kernels = []
    for node in gm.graph.nodes:
        if not node.op.startswith("call_") or node.target is operator.getitem:  # one of a tail's two results
            continue
        layer = found.get(node.name)
        if layer is None:
            raise ValueError(f"{node.name}: no floor is known for this part of the fused graph")
        inside = parts_of.get(str(node.target), (node.name,))
        kernels.append(Kernel(inside[0], layer.op, layer.shape, cost.work(layer.problem), inside))
    return Schedule(title, image.shape[0], tuple(kernels))


def quantized(per_conv: Schedule, layers: Sequence[Layer], stored: str) -> Schedule:
    """Return ``per_conv`` with the convolutions that :func:`quantize` makes int8 or float8, and the pass that makes
    bytes of what the first layer gives.

    Args:
        per_conv: a kernel for each of ``layers``. stored: "int8" or "fp8".
    """
    kernels: list[Kernel] = []
    for kernel, layer, problem in zip(per_conv.kernels, layers, quantized_problems(layers, stored), strict=True):
        if problem is None:
            kernels.append(kernel)
            continue
        if not any(each.precision for each in kernels) and kernels:
            elements = problem.n * problem.c * problem.h * problem.w
            moved = Work((ITEMSIZE[layer.problem.precision] + 1) * elements, 0, 0)
            kernels.append(Kernel(f"{kernels[-1].name}, rounded", "quantize", kernels[-1].shape, moved))
        made = cost.work(problem)
        kernels.append(dataclasses.replace(kernel, op=problem.op, work=made, precision=problem.precision))
    return Schedule(stored, per_conv.batch, tuple(kernels))


def quantized_problems(layers: Sequence[Layer], stored: str = "int8") -> list[problems.ConvInt8 | None]:
    """Return what the kernel of int8 or float8 computes of each layer of a network: convolutions of one group between
    bytes.

    None for what stays floating point; the last convolution gives floats, as the rest of the network reads them.
    """
    made_of = problems.ConvFp8 if stored == "fp8" else problems.ConvInt8
    found: list[problems.ConvInt8 | None] = []
    last = next((layer.name for layer in reversed(layers) if layer.op == "conv_bn_act"), "")
    for layer in layers:
        conv = layer.problem
        taken = isinstance(conv, problems.ConvBNAct) and conv.groups == 1 and conv.c > 4
        made = None
        if taken:
            out = conv.precision if layer.name == last else made_of.out
            made = made_of(**{**vars(conv), "precision": stored}, out=out)
        found.append(made)
    return found


def rotated(
    per_conv: Schedule, layers: Sequence[Layer], gpu: gpus.GPU, feasible: Feasible | None = None
) -> Schedule:  # fmt: skip
    """Return ``per_conv`` with bottlenecks fused from their 3x3 on, block by block in the cheapest way.

    Args:
        per_conv: a kernel for each of ``layers``. feasible: which blocks may be fused; None: ``fits_on_chip(gpu)``.
    """
    kernels: dict[str, Kernel | None] = dict(zip((layer.name for layer in layers), per_conv.kernels, strict=True))
    for block in blocks(layers):
        ways = block.ways(gpu, fits_on_chip(gpu) if feasible is None else feasible)
        tail = min(ways, key=lambda way: way.cost).tail
        if tail is None or tail.problem is None:
            continue
        names = [layer.name for layer in tail.layers]
        inside = tuple(kernel.name for name in names if (kernel := kernels[name]) is not None)
        # In the expansion's place: its residual has been computed by then, and nobody has read its result yet.
        kernels |= dict.fromkeys(names)
        kernels[tail.expand.name] = Kernel(
            inside[0], tail.problem.op, tail.expand.shape, cost.work(tail.problem), inside
        )  # fmt: skip
    return Schedule("rotated", per_conv.batch, tuple(kernel for kernel in kernels.values() if kernel is not None))


def parts(fused: OptimizedModule) -> dict[str, tuple[str, ...]]:
    """Return for each module of a fused graph the convolutions in it; if there is none, the layer it is named after."""
    found: dict[str, list[str]] = {}
    for row in fused.report().fused:
        inside = found.setdefault(row.fused.partition(" ")[2], [])
        if row.kind == "Conv2d":
            inside.append(row.name)
    return {ir.identifier(name): tuple(inside) or (name,) for name, inside in found.items()}


def measured(model: nn.Module, image: Tensor, tensor_floats: bool) -> tuple[Seconds, tuple[str, ...]]:
    """Return the seconds of each fused op as ``optimize`` plans it for the model's GPU, and the backends that ran them.

    Args:
        tensor_floats: whether float32 products may round to tf32.
    """
    with tf32(tensor_floats):
        fused = optimize(model, dtype=image.dtype, example_inputs=image)
        nodes = node_seconds(fused.graph_module, image)
    inside = parts(fused)
    seconds = {
        frozenset(inside[str(node.target)]): nodes[node.name]
        for node in fused.graph_module.graph.nodes
        if node.op == "call_module" and str(node.target) in inside
    }
    return seconds, tuple(sorted({row.backend for row in fused.report().fused if row.backend}))
