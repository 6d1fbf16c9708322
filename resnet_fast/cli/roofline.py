"""``resnet-fast roofline``: the least time each layer of a network can take on a GPU, in several schedules.

The shapes come from tracing the network on tensors without data, the arithmetic from ``resnet_fast.roofline``; nothing
is run unless this machine's own GPU is asked about.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resnet_fast.cli.common import (
    UserError,
    as_user_errors,
    check_arch,
    check_output,
    err_console,
    one_line,
    out_console,
    write_json,
)

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

    from resnet_fast.graph import OptimizedModule
    from resnet_fast.kernels.gpus import GPU
    from resnet_fast.roofline import Conv, Kernel, Schedule, Work

DEFAULT_GPU = "h100"
WIDEST = 170
"""More columns than any table here needs: a file or a pipe gets each as wide as it is."""

SAME_LIMITS = {86: 89, 87: 80, 103: 100, 121: 120}
"""Compute capabilities whose thread blocks have as much shared memory as a built-in GPU's of another capability."""

Seconds = Mapping[frozenset[str], float]
"""Measured seconds of a launch, by the layers in it (``Kernel.parts``)."""


class Arithmetic(str, enum.Enum):
    """How a convolution multiplies; tf32 is float32 in memory."""

    fp16 = "fp16"
    bf16 = "bf16"
    tf32 = "tf32"
    fp32 = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.value, torch.float32)


@dataclass(frozen=True)
class Subject:
    """What the floors are of."""

    arch: str
    batch: int
    image_size: int
    precision: Arithmetic

    def __str__(self) -> str:
        return f"{self.arch}, {self.precision.value}, batch {self.batch}, {self.image_size} px"


def roofline(
    arch: Annotated[
        str, typer.Option("--model", "--arch", "-a", metavar="NAME", help="One of the ten ResNets, as resnet50.")
    ] = "resnet50",
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, max=1_000_000, help="Images in a batch.")] = 128,
    precision: Annotated[
        Arithmetic, typer.Option("--dtype", help="How to multiply; tf32 and fp32 are both stored as float32.")
    ] = Arithmetic.fp16,
    image_size: Annotated[
        int, typer.Option("--size", "--image-size", min=1, max=65_536, help="Height and width of the images.")
    ] = 224,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help=f"h100, h200, a100, b200, l4, rtx4090, rtx5090; by default this machine's own, else {DEFAULT_GPU}. "
            "With --bandwidth and --tflops, what to call that GPU.",
            show_default=False,
        ),
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option("--bandwidth", metavar="TB/s", help="Of device memory, for a GPU by numbers.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option("--tflops", metavar="TFLOP/s", help="At --dtype, for a GPU by numbers.")
    ] = None,
    capability: Annotated[
        int | None,
        typer.Option(
            "--capability",
            metavar="MAJOR*10+MINOR",
            help="Compute capability of a GPU by numbers (89, 90, ...), for what fits on chip; by default 90.",
            show_default=False,
        ),
    ] = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", metavar="PATH", help="Draw the rooflines: .png, .svg or .pdf.")
    ] = None,
    json_target: Annotated[
        str | None, typer.Option("--json", metavar="PATH|-", help="Write the result as JSON; - prints it instead.")
    ] = None,
) -> None:
    """Show the least time that each layer can take on a GPU, one kernel per convolution and rotated.

    With a CUDA GPU here and no other one asked for, the measured time stands beside the floor.
    """
    check_arch(arch)
    if json_target not in (None, "-"):
        check_output(Path(str(json_target)))
    check_output(plot_path)
    from resnet_fast.benchmarking import plot

    if plot_path is not None:
        with as_user_errors(plot.PlotError):
            plot.check(plot_path)
    device = _device_name()
    chosen = _choose(gpu, bandwidth, tflops, capability, device)
    subject = Subject(arch, batch, image_size, precision)
    with as_user_errors(ValueError):
        found = schedules(subject, chosen)
    seconds, remark = _measured(subject, chosen, device, gpu)

    if json_target is not None:
        write_json(as_dict(subject, chosen, found, seconds, device, remark), json_target)
    if json_target != "-":
        show(subject, chosen, found, seconds, remark)
    if plot_path is not None:
        from resnet_fast.roofline import plot as pictures

        with as_user_errors(plot.PlotError, OSError):
            plot.save(pictures.figure(f"{subject}; {chosen.name}", found, chosen, precision.value, seconds), plot_path)
        err_console().print(f"plot written to {escape(str(plot_path))}")


# --- which GPU


def _device_name() -> str | None:
    """The name of this machine's current CUDA GPU, as its driver says it; None if there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _choose(
    name: str | None, bandwidth: float | None, tflops: float | None, capability: int | None, device: str | None
) -> GPU:
    """The GPU that the options name or describe; without any, ``device`` or the default."""
    from resnet_fast.kernels import gpus

    if bandwidth is None and tflops is None:
        if capability is not None:
            raise UserError("--capability describes a GPU by numbers; give --bandwidth and --tflops too")
        with as_user_errors(ValueError):
            if name is None and device is not None and _is_known(device) is None:
                raise ValueError(
                    f"this machine's GPU, {device}, is not built in; describe it by --bandwidth and --tflops, "
                    f"or ask about another one by --gpu ({', '.join(gpu.name for gpu in gpus.GPUS)})"
                )
            return gpus.known(name if name is not None else device or DEFAULT_GPU)
    for option, value in (("--bandwidth", bandwidth), ("--tflops", tflops)):
        if value is None:
            raise UserError(f"{option} is missing; a GPU by numbers needs --bandwidth and --tflops")
        if not (0 < value < math.inf):
            raise UserError(f"{option} is {value}; it must be a positive number")
    assert bandwidth is not None and tflops is not None
    named = None if name is None else _is_known(name)
    like = named if named and capability is None else _like(capability, name is None and device is not None)
    rates = dict.fromkeys(gpus.PRECISIONS, tflops * 1e12)
    called = name or (gpus.normalise(device) if device else "given")
    return dataclasses.replace(
        like, name=called, bandwidth=bandwidth * 1e12, flops=rates,
        source=f"bandwidth and TFLOP/s as given; on-chip limits of {like.name}",
    )  # fmt: skip


def _like(capability: int | None, this_device: bool) -> GPU:
    """A built-in GPU with the on-chip limits of ``capability``; by default this device's, else 90."""
    from resnet_fast.kernels import gpus

    if capability is None:
        capability = 90
        if this_device:
            import torch

            major, minor = torch.cuda.get_device_capability()
            capability = 10 * major + minor
    wanted = SAME_LIMITS.get(capability, capability)
    for gpu in gpus.GPUS:
        if gpu.capability == wanted:
            return dataclasses.replace(gpu, capability=capability)
    known = sorted({*(gpu.capability for gpu in gpus.GPUS), *SAME_LIMITS})
    raise UserError(f"--capability is {capability}; known are {', '.join(map(str, known))}")


def _is_known(name: str) -> GPU | None:
    from resnet_fast.kernels import gpus

    try:
        return gpus.known(name)
    except ValueError:
        return None


# --- the schedules


def schedules(subject: Subject, gpu: GPU) -> tuple[Schedule, ...]:
    """The schedules of a network: eager, per-conv, rotated and, on a built-in GPU, what ``optimize`` plans for it.

    Raises:
        ValueError: the network does not take such images.
    """
    import torch

    from resnet_fast import models
    from resnet_fast.graph import optimize
    from resnet_fast.roofline import rotated
    from resnet_fast.roofline.measure import tf32

    dtype = subject.precision.dtype
    with torch.device("meta"):
        model = models.get_model(subject.arch).to(dtype).eval()
        image = torch.empty(subject.batch, 3, subject.image_size, subject.image_size, dtype=dtype)
    fused = optimize(model, dtype=dtype, example_inputs=image, backend="reference")
    per_conv = _fused("per-conv", fused, image, subject.precision.value)
    found = [_eager(model, image), per_conv, rotated(per_conv, gpu, subject.precision.value)]
    if _is_known(gpu.name) == gpu:
        with tf32(subject.precision is Arithmetic.tf32):  # a plan for float32 follows torch's setting
            planned = optimize(model, dtype=dtype, example_inputs=image, backend="reference", gpu=gpu.name)
        found.append(_fused("planned", planned, image, subject.precision.value))
    return tuple(found)


def _eager(model: nn.Module, image: torch.Tensor) -> Schedule:
    """A kernel for each of the author's layers, in-place ones included; layers that move nothing take none."""
    from torch import Tensor

    from resnet_fast.graph import shapes
    from resnet_fast.graph.trace import layer_kind, trace
    from resnet_fast.roofline import Kernel, Schedule

    gm = trace(model)
    values = shapes.run(gm, (image,)).values
    kernels = []
    for node in gm.graph.nodes:
        if not node.op.startswith("call_"):
            continue
        reads = [values[source] for source in node.all_input_nodes]
        out = values[node]
        if not isinstance(out, Tensor) or not all(isinstance(read, Tensor) for read in reads):
            raise ValueError(f"{node.name}: its shape is unknown, so it has no floor")
        work = _plain_work(gm, node, reads, out)
        if work is not None:
            name, kind = layer_kind(gm, node)
            kernels.append(Kernel(name, kind, tuple(out.shape), work))
    return Schedule("eager", image.shape[0], tuple(kernels))


def _plain_work(gm: fx.GraphModule, node: fx.Node, reads: list[torch.Tensor], out: torch.Tensor) -> Work | None:
    """What one layer moves and computes by itself; None for a view.

    BatchNorm counts as one multiply-add an element, which it is at inference; pooling as one operation an input.
    """
    import torch
    from torch import nn

    from resnet_fast.roofline import Work, cost

    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    moved = sum(tensor.numel() for tensor in (*reads, out)) * out.element_size()
    constants = 0
    if module is not None:
        tensors = [*module.parameters(), *module.buffers()]
        constants = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.dim())
    if isinstance(module, nn.Conv2d):
        n, c, *size = reads[0].shape
        kernel, stride = _pair(module.kernel_size), _pair(module.stride)
        work = cost.conv(
            n, c, size, module.out_channels, kernel, stride, out.shape[2:],
            groups=module.groups, itemsize=out.element_size(),
        )  # fmt: skip
        return Work(work.activations, constants, work.flops)
    if isinstance(module, nn.BatchNorm2d):
        return Work(moved, constants, 2 * out.numel())
    if isinstance(module, nn.ReLU) or node.target in (operator.add, operator.iadd, torch.add):
        return Work(moved, 0, out.numel())
    if isinstance(module, nn.MaxPool2d):
        side = module.kernel_size
        assert isinstance(side, int)
        return Work(moved, 0, out.numel() * side * side)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return Work(moved, 0, reads[0].numel())
    if isinstance(module, nn.Linear):
        return Work(moved, constants, 2 * out.numel() * module.in_features)
    if node.target is torch.flatten:
        return None
    raise ValueError(f"{node.name}: no floor is known for this layer")


def _fused(title: str, fused: OptimizedModule, image: torch.Tensor, precision: str) -> Schedule:
    """A kernel for each fused op of the graph that ``optimize`` made."""
    from resnet_fast.graph import ir, shapes
    from resnet_fast.roofline import Kernel, Schedule, cost
    from resnet_fast.roofline.schedule import ITEMSIZE

    gm = fused.graph_module
    itemsize = ITEMSIZE[precision]
    values = shapes.run(gm, (image,)).values
    parts_of = parts(fused)
    kernels = []
    for node in gm.graph.nodes:
        if not node.op.startswith("call_") or node.target is operator.getitem:  # one of a tail's two results
            continue
        module: Any = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        op, result = getattr(module, "op", None), values[node]
        shape = tuple((result[0] if isinstance(result, tuple) else result).shape)
        inside = parts_of.get(str(node.target), (node.name,))
        n, c, *size = values[node.args[0]].shape
        conv = None
        if op == "conv_bn_act":
            conv = _conv(node, module, parts_of, (n, c, size), shape)
            work = conv.work(precision)
        elif op == "bottleneck_tail":
            shortcut = None
            if module.weight_shortcut is not None:
                _, channels, *source = values[node.args[1]].shape
                shortcut = (channels, source, module.shortcut_stride)
            following = None if module.weight1 is None else module.weight1.shape[0]
            work = cost.bottleneck_tail(
                n, c, size, shape[1], module.stride, shape[2:],
                shortcut=shortcut, following=following, itemsize=itemsize,
            )  # fmt: skip
        elif op == "stem":
            work = cost.stem(n, c, size, shape[1], shape[2:], itemsize=itemsize)
        elif op == "head":
            work = cost.head(n, c, size, shape[1], itemsize=itemsize)
        elif ir.calls(node, ir.ADD_ACT):
            op, work = "add_act", cost.add_act(math.prod(shape), itemsize=itemsize)
        else:
            raise ValueError(f"{node.name}: no floor is known for this part of the fused graph")
        kernels.append(Kernel(inside[0], op, shape, work, conv, inside))
    return Schedule(title, image.shape[0], tuple(kernels))


def _conv(
    node: fx.Node, module: Any, parts_of: Mapping[str, tuple[str, ...]], source: Any, shape: tuple[int, ...]
) -> Conv:
    from resnet_fast.roofline import Conv

    def maker(argument: Any) -> str:
        if argument.target is operator.getitem:
            argument = argument.args[0]
        return parts_of.get(str(argument.target), (argument.name,))[0]

    n, c, size = source
    residual = node.args[1] if len(node.args) > 1 else None
    return Conv(
        source=maker(node.args[0]),
        residual=None if residual is None else maker(residual),
        n=n,
        c=c,
        size=_pair(size),
        k=shape[1],
        kernel=_pair(module.weight.shape[2:]),
        stride=_pair(module.stride),
        padding=_pair(module.padding),
        dilation=_pair(module.dilation),
        output=_pair(shape[2:]),
        groups=module.groups,
        activation=module.activation,
        residual_after_activation=module.late,
    )


def parts(fused: OptimizedModule) -> dict[str, tuple[str, ...]]:
    """For each module of a fused graph the convolutions in it; where there is none, the layer it is named after."""
    from resnet_fast.graph import ir

    found: dict[str, list[str]] = {}
    for row in fused.report().fused:
        inside = found.setdefault(row.fused.partition(" ")[2], [])
        if row.kind == "Conv2d":
            inside.append(row.name)
    return {ir.identifier(name): tuple(inside) or (name,) for name, inside in found.items()}


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    return int(first), int(second)


# --- measured


def _measured(subject: Subject, gpu: GPU, device: str | None, asked: str | None) -> tuple[Seconds | None, str]:
    """Seconds of each fused op on this machine's GPU, or None, and a line on what was measured or why nothing was."""
    if device is None:
        return None, "nothing measured: torch sees no CUDA GPU here"
    from resnet_fast.kernels import gpus

    if asked is not None and gpus.normalise(device) != gpu.name:
        return None, f"nothing measured: this machine's GPU is {device}, the floors are {gpu.name}'s"
    seconds, backends = measure(subject, "cuda")
    total = sum(seconds.values())
    return seconds, (
        f"measured on {device}, random weights, {', '.join(backends)}: optimize()'s {len(seconds)} fused ops take "
        f"{1e6 * total / subject.batch:.2f} us an image in all ({subject.batch / total:,.0f} images/s)"
    )


def measure(subject: Subject, device: str) -> tuple[Seconds, tuple[str, ...]]:
    """Seconds of each fused op of the network's graph, as ``optimize`` plans it, and the backends that ran them.

    Raises:
        UserError: the GPU has too little memory.
    """
    import torch

    from resnet_fast import models
    from resnet_fast.graph import optimize
    from resnet_fast.roofline.measure import node_seconds, tf32

    dtype = subject.precision.dtype
    try:
        with tf32(subject.precision is Arithmetic.tf32):
            model: Any = models.get_model(subject.arch).eval().to(device)
            shape = (subject.batch, 3, subject.image_size, subject.image_size)
            image = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
            fused = optimize(model.to(memory_format=torch.channels_last), dtype=dtype, example_inputs=image)
            nodes = node_seconds(fused.graph_module, image)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is too small for batch {subject.batch}: {one_line(error, 200)}") from error
    inside = parts(fused)
    seconds = {
        frozenset(inside[str(node.target)]): nodes[node.name]
        for node in fused.graph_module.graph.nodes
        if node.op == "call_module" and str(node.target) in inside
    }
    return seconds, tuple(sorted({row.backend for row in fused.report().fused if row.backend}))


# --- what is shown


def as_dict(
    subject: Subject,
    gpu: GPU,
    found: tuple[Schedule, ...],
    seconds: Seconds | None,
    device: str | None,
    remark: str,
) -> dict[str, Any]:
    """The whole result as plain dicts, lists, strings and numbers; times are seconds, of a launch or for an image."""
    precision = subject.precision.value

    def row(kernel: Kernel) -> dict[str, Any]:
        work = kernel.work
        return {
            "layer": kernel.name,
            "op": kernel.op,
            "parts": list(kernel.parts or (kernel.name,)),
            "shape": list(kernel.shape),
            "activations": work.activations,
            "weights": work.weights,
            "flops": work.flops,
            "bytes_seconds": work.bytes / gpu.bandwidth,
            "math_seconds": work.flops / gpu.flops[precision],
            "floor_seconds": work.floor(gpu, precision),
            "bound": kernel.bound(gpu, precision),
            "measured_seconds": None if seconds is None else seconds.get(frozenset(kernel.parts)),
        }

    return {
        "schema": 1,
        "kind": "roofline",
        "setting": {
            "arch": subject.arch,
            "batch": subject.batch,
            "image_size": subject.image_size,
            "dtype": precision,
        },
        "gpu": {
            "name": gpu.name,
            "capability": gpu.capability,
            "bandwidth": gpu.bandwidth,
            "flops": gpu.flops[precision],
            "source": gpu.source,
        },
        "measured": {"device": device if seconds is not None else None, "remark": remark},
        "schedules": [
            {
                "name": schedule.name,
                "per_image": dataclasses.asdict(schedule.totals(gpu, precision)),
                "rows": [row(kernel) for kernel in schedule.kernels],
            }
            for schedule in found
        ],
    }


def show(subject: Subject, gpu: GPU, found: tuple[Schedule, ...], seconds: Seconds | None, remark: str) -> None:
    """Prints the layers of the per-conv and the rotated schedule, of the planned one if it ran, then all totals."""
    precision = subject.precision.value
    console = out_console()
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDEST)
    for schedule in found:
        # An eager network's layers are many and say little; its sums are below.
        if schedule.name in ("per-conv", "rotated") or (schedule.name == "planned" and seconds):
            console.print(_layers(subject, gpu, schedule, seconds))
            console.print()
    console.print(_totals(subject, gpu, found))
    peak = gpu.flops[precision]
    console.print(
        f"{escape(gpu.name)}: {gpu.bandwidth / 1e12:.4g} TB/s, {peak / 1e12:.4g} TFLOP/s in {precision} "
        f"({escape(gpu.source)})",
        soft_wrap=True,
    )
    console.print(escape(remark), soft_wrap=True)


def _layers(subject: Subject, gpu: GPU, schedule: Schedule, seconds: Seconds | None) -> Table:
    precision = subject.precision.value
    table = Table(title=f"{schedule.name}: {subject}, {escape(gpu.name)}", title_justify="left", header_style="bold")
    table.add_column("layer")
    table.add_column("op")
    for heading in ("output", "MB/img", "MFLOP/img", "bytes us", "math us", "floor us"):
        table.add_column(heading, justify="right")
    table.add_column("bound by")
    taken = [None if seconds is None else seconds.get(frozenset(kernel.parts)) for kernel in schedule.kernels]
    if seconds is not None:
        table.add_column("measured us", justify="right")
        table.add_column("of floor", justify="right")

    def beside(time: float | None, floor: float) -> list[str]:
        if seconds is None:
            return []
        return ["", ""] if time is None else [f"{1e6 * time:.2f}", f"{time / floor:.2f}x"]

    def cells(work: Work, floor: float) -> list[str]:
        return [
            f"{work.bytes / subject.batch / 1e6:.3f}",
            f"{work.flops / subject.batch / 1e6:.1f}",
            f"{1e6 * work.bytes / gpu.bandwidth:.2f}",
            f"{1e6 * work.flops / gpu.flops[precision]:.2f}",
            f"{1e6 * floor:.2f}",
        ]

    for kernel, time in zip(schedule.kernels, taken, strict=True):
        floor = kernel.work.floor(gpu, precision)
        row = [escape(_label(kernel)), kernel.op, "x".join(map(str, kernel.shape[1:])), *cells(kernel.work, floor)]
        table.add_row(*row, kernel.bound(gpu, precision), *beside(time, floor))
    table.add_section()
    whole = sum(kernel.work.floor(gpu, precision) for kernel in schedule.kernels)
    known = [time for time in taken if time is not None]
    row = ["[bold]all[/]", f"{len(schedule.kernels)} launches", "", *cells(schedule.work, whole), ""]
    table.add_row(*row, *beside(sum(known) if len(known) == len(taken) else None, whole))
    return table


def _label(kernel: Kernel) -> str:
    """The first and the last of the layers that a kernel computes."""
    parts = kernel.parts or (kernel.name,)
    return parts[0] if len(parts) == 1 else f"{parts[0]} to {parts[-1]}"


def _totals(subject: Subject, gpu: GPU, found: tuple[Schedule, ...]) -> Table:
    table = Table(title=f"An image in all: {subject}, {escape(gpu.name)}", title_justify="left", header_style="bold")
    table.add_column("schedule")
    headings = ("launches", "MB", "without weights", "GFLOP", "bytes us", "math us", "sum of floors us", "images/s <=")
    for heading in headings:
        table.add_column(heading, justify="right")
    for schedule in found:
        sums = schedule.totals(gpu, subject.precision.value)
        table.add_row(
            schedule.name,
            str(sums.launches),
            f"{sums.bytes / 1e6:.2f}",
            f"{sums.activations / 1e6:.2f}",
            f"{sums.flops / 1e9:.3f}",
            f"{1e6 * sums.bytes_seconds:.2f}",
            f"{1e6 * sums.math_seconds:.2f}",
            f"{1e6 * sums.floor_seconds:.2f}",
            f"{sums.images_per_second:,.0f}",
        )
    return table
