"""``resnet-fast roofline``: the least time each layer of a network can take on a GPU, in several schedules.

The shapes come from tracing the network on tensors without data, the arithmetic from ``resnet_fast.roofline``; nothing
is run unless this machine's own GPU is asked about.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resnet_fast.cli.common import (
    JsonTarget,
    UserError,
    as_user_errors,
    check_arch,
    check_results,
    one_line,
    out_console,
    progress_bar,
    save_plot,
    table,
    write_json,
)

if TYPE_CHECKING:
    import torch

    from resnet_fast.kernels.gpus import GPU
    from resnet_fast.roofline import Schedule, Seconds, Work
    from resnet_fast.tuning.estimate import Launch

DEFAULT_GPU = "h100"
WIDEST = 170
"""More columns than any table here needs: a file or a pipe gets each as wide as it is."""


class Arithmetic(str, enum.Enum):
    """How a convolution multiplies; tf32 is float32 in memory, beside int8 and float8 the rest is float16."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    tf32 = "tf32"
    float32 = "float32"
    int8 = "int8"
    float8 = "float8"

    @classmethod
    def _missing_(cls, value: object) -> Arithmetic | None:
        return next((each for each in cls if value in (each.precision, each.quantized)), None)

    @property
    def precision(self) -> str:
        """The short name, which the tables of GPUs and launches have; of int8 and float8 that of what is in neither."""
        names = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
        return "fp16" if self.quantized else names.get(self.value, self.value)

    @property
    def quantized(self) -> str:
        """The short name of what ``quantize`` makes the convolutions, "" if they are not quantized."""
        return {"int8": "int8", "float8": "fp8"}.get(self.value, "")

    @property
    def dtype(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(
            torch, "float16" if self.quantized else {"tf32": "float32"}.get(self.value, self.value)
        )
        return found


NAMES = tuple(each.value for each in Arithmetic)


def arithmetic(name: str) -> Arithmetic:
    """Return the one of that name, torch's or the short one."""
    try:
        return Arithmetic(name)
    except ValueError:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, NAMES))}") from None


@dataclass(frozen=True)
class Subject:
    """What the floors are of."""

    arch: str
    batch: int
    image_size: int
    precision: Arithmetic

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a batch."""
        return self.batch, 3, self.image_size, self.image_size

    def __str__(self) -> str:
        return f"{self.arch}, {self.precision.value}, batch {self.batch}, {self.image_size} px"


def roofline(
    arch: Annotated[str, typer.Option("--arch", "-a", metavar="NAME", help="Model name, e.g. resnet50.")] = "resnet50",
    batch: Annotated[int, typer.Option("--batch-size", "-b", min=1, max=1_000_000, help="Images in a batch.")] = 128,
    precision: Annotated[
        Arithmetic,
        typer.Option(
            "--dtype", parser=arithmetic, metavar="|".join(NAMES), help="How to multiply; tf32 is stored as float32."
        ),
    ] = Arithmetic.float16,
    image_size: Annotated[
        int, typer.Option("--image-size", min=1, max=65_536, help="Height and width of the images.")
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
    estimated: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="For h100, h200: an estimate of the time of each launch, and of an image at several batches.",
        ),
    ] = False,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", metavar="PATH", help="Draw the rooflines: .png, .svg or .pdf.")
    ] = None,
    json_target: JsonTarget = None,
) -> None:
    """Show the least time that each layer can take on a GPU, one kernel per convolution and rotated.

    With a CUDA GPU here and no other one asked for, the measured time stands beside the floor.
    """
    check_arch(arch)
    check_results(json_target, plot_path)
    device = _device_name()
    chosen = _choose(gpu, bandwidth, tflops, capability, device)
    if precision.quantized and tflops is not None:
        rates = dict.fromkeys(chosen.flops, tflops * 1e12 / 2)  # of what is not quantized
        chosen = dataclasses.replace(chosen, flops=rates | {precision.quantized: tflops * 1e12})
    subject = Subject(arch, batch, image_size, precision)
    if plot_path is not None and precision.quantized:
        raise UserError(f"--plot draws one rate of products, and a network in {precision.value} has two; leave it out")
    if estimated:
        _check_estimate(chosen)
    with as_user_errors(ValueError):
        found = schedules(subject, chosen)
    seconds, remark = _measured(subject, chosen, device, gpu)
    estimates = _estimates(subject, chosen, seconds) if estimated else None

    if json_target is not None:
        whole = as_dict(subject, chosen, found, seconds, device, remark)
        write_json(whole if estimates is None else whole | {"estimate": estimates.as_dict()}, json_target)
    if json_target != "-" and estimates is None:
        show(subject, chosen, found, seconds, remark)
    elif json_target != "-" and estimates is not None:
        show_estimates(estimates, remark)
    if plot_path is not None:
        from resnet_fast.roofline import plot as pictures

        save_plot(pictures.figure(f"{subject}; {chosen.name}", found, chosen, precision.precision, seconds), plot_path)


# --- which GPU


def _device_name() -> str | None:
    """Return the name of this machine's current CUDA GPU, as its driver says it; None if there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _choose(
    name: str | None, bandwidth: float | None, tflops: float | None, capability: int | None, device: str | None
) -> GPU:
    """Return the GPU that the options name or describe; without any, ``device`` or the default."""
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
    like = None if name is None or capability is not None else _is_known(name)
    if like is None:
        if capability is None and name is None and device is not None:
            import torch

            major, minor = torch.cuda.get_device_capability()
            capability = 10 * major + minor
        try:
            like = gpus.of_capability(90 if capability is None else capability)
        except ValueError as error:
            raise UserError(f"--{error}") from None
    rates = dict.fromkeys(gpus.PRECISIONS, tflops * 1e12)
    called = name or (gpus.normalise(device) if device else "given")
    return dataclasses.replace(
        like, name=called, bandwidth=bandwidth * 1e12, flops=rates,
        source=f"bandwidth and TFLOP/s as given; on-chip limits of {like.name}",
    )  # fmt: skip


def _is_known(name: str) -> GPU | None:
    from resnet_fast.kernels import gpus

    return {gpu.name: gpu for gpu in gpus.GPUS}.get(gpus.normalise(name))


# --- the schedules, and what was measured


def schedules(subject: Subject, gpu: GPU) -> tuple[Schedule, ...]:
    """Return the schedules of a network: eager, per-conv, rotated and, on a built-in GPU, what ``optimize`` plans.

    Raises:
        ValueError: the network does not take such images.
    """
    import torch

    from resnet_fast import models
    from resnet_fast.graph import schedules

    dtype = subject.precision.dtype
    with torch.device("meta"):
        model = models.get_model(subject.arch).to(dtype).eval()
        image = torch.empty(subject.shape, dtype=dtype)
    return schedules.schedules(model, image, gpu, subject.precision.precision, subject.precision.quantized)


def _measured(subject: Subject, gpu: GPU, device: str | None, asked: str | None) -> tuple[Seconds | None, str]:
    """Seconds of each fused op on this machine's GPU, or None, and a line on what was measured or why nothing was."""
    if device is None:
        return None, "nothing measured: torch sees no CUDA GPU here"
    if subject.precision.quantized:
        return None, "nothing measured: this command runs no quantized network"
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
    """Return the seconds of each fused op of the network as ``optimize`` plans it, and the backends that ran them.

    Raises:
        UserError: the GPU has too little memory.
    """
    import torch

    from resnet_fast import models
    from resnet_fast.graph import schedules

    try:
        model: Any = models.get_model(subject.arch).eval().to(device)
        image = torch.randn(subject.shape, device=device)
        image = image.to(subject.precision.dtype, memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)
        return schedules.measured(model, image, subject.precision is Arithmetic.tf32)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is too small for batch {subject.batch}: {one_line(error, 200)}") from error


# --- estimates

_NOT_RUN = "not run"


@dataclass(frozen=True)
class Sum:
    """A schedule at a batch: its launches, and seconds of an image: the floor, the estimate, and measured or None."""

    batch: int
    schedule: str
    launches: int
    floor: float
    estimate: float
    measured: float | None


@dataclass(frozen=True)
class Estimates:
    """The launches of a network, and sums at several batches. ``measured``: seconds by the layers of a launch."""

    subject: Subject
    gpu: GPU
    launches: tuple[Launch, ...]
    sums: tuple[Sum, ...]
    measured: Seconds | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values; times are seconds, of a launch or for an image."""
        from resnet_fast.roofline.estimate import ASSUMED

        return {
            "what": "an estimate by resnet_fast.roofline.estimate; only what is called measured was measured",
            "assumptions": dataclasses.asdict(ASSUMED) | {"l2_bandwidth": self.gpu.l2_bandwidth},
            "launches": [launch.as_dict(self.measured) for launch in self.launches],
            "per_image": [dataclasses.asdict(each) for each in self.sums],
        }


def _check_estimate(gpu: GPU) -> None:
    from resnet_fast.backends import triton
    from resnet_fast.roofline import estimate

    with as_user_errors(ValueError):
        estimate.require(gpu)

    if missing := triton.missing():
        raise UserError(
            f"--estimate needs the kernels' launch choices, and {missing}: pip install 'resnet_fast[triton]'"
        )
    if triton.interpreted():
        raise UserError("--estimate is of compiled kernels, and TRITON_INTERPRET is set; unset it")


def _estimates(subject: Subject, gpu: GPU, seconds: Seconds | None) -> Estimates:
    """Return the estimates of a network; beside them what result files or this machine's own GPU say."""
    from resnet_fast.tuning import estimate, shapes

    precision = subject.precision.precision
    sums: list[Sum] = []
    shown: tuple[Launch, ...] = ()
    with progress_bar() as show, as_user_errors(ValueError):

        def compiling(done: int, total: int) -> None:
            show(f"compiling kernels that are not in the table: {done}/{total}", done / total)

        for batch in sorted({*shapes.BATCHES, subject.batch}):
            stored = subject.precision.quantized
            taken, image = estimate.measured(f"{subject.arch}-{stored or precision}-b{batch}", gpu)
            for schedule in (stored,) if stored else (estimate.PER_CONV, estimate.PLANNED):
                wanted = estimate.launched(schedule, subject.arch, batch, subject.image_size, precision, gpu)
                found = estimate.estimates(wanted, gpu, compiling)
                floor, whole = (sum(getattr(each.estimate, name) for each in found) for name in ("floor", "seconds"))
                planned = schedule != estimate.PER_CONV
                sums.append(Sum(batch, schedule, len(found), floor / batch, whole / batch, image if planned else None))
                if batch == subject.batch and planned:
                    shown, seconds = found, seconds or taken
    return Estimates(subject, gpu, shown, tuple(sums), seconds)


def show_estimates(found: Estimates, remark: str) -> None:
    """Prints an estimate for each launch of the planned schedule, and for an image at several batches."""
    subject, gpu = found.subject, found.gpu
    console = out_console()
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDEST + 90)
    words = ("layer", "problem")
    numbers = (
        "x",
        "tile",
        "blocks",
        "a SM",
        "waves",
        "regs",
        "chain us",
        "floor us",
        "L2 us",
        "ESTIMATE us",
        "of floor",
    )
    schedule = "per convolution" if subject.precision.quantized else "planned"
    shown = table(f"ESTIMATE, not measured: {schedule}, {subject}, {escape(gpu.name)}", words, numbers)
    shown.add_column("limited by")
    shown.add_column("measured us", justify="right")
    rows: dict[tuple[Any, ...], list[Launch]] = {}
    for launch in found.launches:
        rows.setdefault((launch.case, launch.config), []).append(launch)
    for same in rows.values():
        first, of = same[0], same[0].estimate
        taken = [(found.measured or {}).get(frozenset(launch.parts)) for launch in same]
        known = [seconds for seconds in taken if seconds is not None]
        code, config = first.code, first.config
        cells = [str(len(same)), f"{config.block_m}x{config.block_n}", str(of.programs), str(of.blocks)]
        cells += [f"{of.waves:.2f}", str(code.registers)]
        cells += [f"{1e6 * seconds:.1f}" for seconds in (of.chain, of.floor, of.l2, of.seconds)]
        marks = ["A in registers"] * (code.a == "registers") + ["serialised"] * code.serialised
        measured = f"{1e6 * sum(known) / len(known):.1f}" if known else _NOT_RUN
        name = first.case.problem.key().partition(" ")[2].partition(" p0x0")[0].partition(" d1x1")[0]
        shown.add_row(
            escape(first.parts[0]), name, *cells, f"{of.seconds / of.floor:.2f}x",
            ", ".join([of.binds, *marks]), measured,
        )  # fmt: skip
    console.print(shown)
    console.print()
    columns = ("launches", "floor us", "ESTIMATE us", "ESTIMATE images/s", "ESTIMATE ms a batch", "measured us")
    totals = table(f"ESTIMATE, not measured: an image, {subject.arch}, {subject.precision.value}, {escape(gpu.name)}",
                   ("batch", "schedule"), columns)  # fmt: skip
    for each in found.sums:
        cells = [str(each.launches), f"{1e6 * each.floor:.2f}", f"{1e6 * each.estimate:.2f}"]
        cells += [f"{1 / each.estimate:,.0f}", f"{1e3 * each.batch * each.estimate:.3f}"]
        cells.append(_NOT_RUN if each.measured is None else f"{1e6 * each.measured:.2f}")
        totals.add_row(str(each.batch), each.schedule, *cells)
    console.print(totals)
    console.print(
        f"An estimate from assumed latencies (docs/roofline.md), good to about 30 %; {escape(gpu.name)}: "
        f"{gpu.bandwidth / 1e12:.4g} TB/s, {_rates(subject, gpu)}, "
        f"{(gpu.l2_bandwidth or 0) / 1e12:.4g} TB/s out of L2 (assumed).", soft_wrap=True,
    )  # fmt: skip
    if any(launch.case.op == "conv_bn_act" and not launch.code.a for launch in found.launches):
        console.print(
            "kernels/resources.csv does not say whether products wait for one another: taken as if none did.",
            soft_wrap=True,
        )
    console.print(escape(remark), soft_wrap=True)


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
    precision = subject.precision.precision
    return {
        "schema": 1,
        "kind": "roofline",
        "setting": {
            "arch": subject.arch, "batch": subject.batch, "image_size": subject.image_size,
            "dtype": subject.precision.value
        },
        "gpu": {
            "name": gpu.name, "capability": gpu.capability, "bandwidth": gpu.bandwidth,
            "flops": gpu.flops[precision], "source": gpu.source
        },
        "measured": {"device": device if seconds is not None else None, "remark": remark},
        "schedules": [schedule.as_dict(gpu, precision, seconds) for schedule in found],
    }  # fmt: skip


def show(subject: Subject, gpu: GPU, found: tuple[Schedule, ...], seconds: Seconds | None, remark: str) -> None:
    """Prints the layers of the per-conv and the rotated schedule, of the planned one if it ran, then all totals."""
    console = out_console()
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDEST)
    for schedule in found:
        # An eager network's layers are many and say little; its sums are below.
        if schedule.name in ("per-conv", "rotated", subject.precision.quantized) or (
            schedule.name == "planned" and seconds
        ):
            console.print(_layers(subject, gpu, schedule, seconds))
            console.print()
    console.print(_totals(subject, gpu, found))
    rates = f"{gpu.bandwidth / 1e12:.4g} TB/s, {_rates(subject, gpu)}"
    console.print(f"{escape(gpu.name)}: {rates} ({escape(gpu.source)})", soft_wrap=True)
    console.print(escape(remark), soft_wrap=True)


def _rates(subject: Subject, gpu: GPU) -> str:
    """Return the rates of products that the floors are of."""
    if stored := subject.precision.quantized:
        name, unit = subject.precision.value, "TOP/s" if stored == "int8" else "TFLOP/s"
        return f"{gpu.rate(stored) / 1e12:.4g} {unit} in {name}, {gpu.flops['fp16'] / 1e12:.4g} TFLOP/s in float16"
    rate = gpu.flops[subject.precision.precision]
    return f"{rate / 1e12:.4g} TFLOP/s in {subject.precision.value}"


def _layers(subject: Subject, gpu: GPU, schedule: Schedule, seconds: Seconds | None) -> Table:
    precision = subject.precision.precision
    numbers = ("output", "MB/img", "MFLOP/img", "bytes us", "math us", "floor us")
    shown = table(f"{schedule.name}: {subject}, {escape(gpu.name)}", ("layer", "op"), numbers)
    shown.add_column("bound by")
    for heading in () if seconds is None else ("measured us", "of floor"):
        shown.add_column(heading, justify="right")

    def add(
        name: str, op: str, shape: str, work: Work, math: float, floor: float, bound: str, taken: float | None
    ) -> None:
        cells = [f"{work.bytes / subject.batch / 1e6:.3f}", f"{work.flops / subject.batch / 1e6:.1f}"]
        for time in (work.bytes / gpu.bandwidth, products, floor):
            cells.append(f"{1e6 * time:.2f}")
        beside = ["", ""] if taken is None else [f"{1e6 * taken:.2f}", f"{taken / floor:.2f}x"]
        shown.add_row(name, op, shape, *cells, bound, *([] if seconds is None else beside))

    floors, times = [], []
    for kernel in schedule.kernels:
        floors.append(kernel.floor(gpu, precision))
        times.append(None if seconds is None else seconds.get(frozenset(kernel.parts)))
        parts = kernel.parts or (kernel.name,)
        name = escape(parts[0] if len(parts) == 1 else f"{parts[0]} to {parts[-1]}")
        shape = "x".join(map(str, kernel.shape[1:]))
        products = kernel.math(gpu, precision)
        add(name, kernel.op, shape, kernel.work, products, floors[-1], kernel.bound(gpu, precision), times[-1])
    shown.add_section()
    known = [time for time in times if time is not None]
    whole = sum(known) if len(known) == len(times) else None
    products = sum(kernel.math(gpu, precision) for kernel in schedule.kernels)
    add("[bold]all[/]", f"{len(times)} launches", "", schedule.work, products, sum(floors), "", whole)
    return shown


def _totals(subject: Subject, gpu: GPU, found: tuple[Schedule, ...]) -> Table:
    headings = ("launches", "MB", "without weights", "GFLOP", "bytes us", "math us", "sum of floors us", "images/s <=")
    shown = table(f"An image in all: {subject}, {escape(gpu.name)}", ("schedule",), headings)
    for schedule in found:
        sums = schedule.totals(gpu, subject.precision.precision)
        cells = [str(sums.launches), f"{sums.bytes / 1e6:.2f}", f"{sums.activations / 1e6:.2f}"]
        cells.append(f"{sums.flops / 1e9:.3f}")
        for time in (sums.bytes_seconds, sums.math_seconds, sums.floor_seconds):
            cells.append(f"{1e6 * time:.2f}")
        shown.add_row(schedule.name, *cells, f"{sums.images_per_second:,.0f}")
    return shown
