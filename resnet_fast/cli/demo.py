"""``resnet-fast demo``: run two photographs through plain and fused layers; compare answers, error and speed.

A short training follows: `train_residual`'s, on small digits and without files.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from resnet_fast.cli.classify import load_network
from resnet_fast.cli.common import (
    Arch,
    Threads,
    UserError,
    check_arch,
    check_output,
    one_line,
    out_console,
    progress_bar,
    set_threads,
    table,
    warn_if_disturbed,
)
from resnet_fast.cli.images import read_image

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from resnet_fast.benchmarking.gate import Verdict
    from resnet_fast.benchmarking.peers import Task
    from resnet_fast.benchmarking.profile import NodeTime
    from resnet_fast.benchmarking.timing import Samples
    from resnet_fast.inference.classifier import Network

DIGITS_SIDE = 16
"""Height and width of the digits; at the 28 pixels of `train residual` the training would take three times as long."""

PHOTOS = ("china.jpg", "flower.jpg")
PATIENCE = 4.0
"""Seconds to wait for the server of the pretrained weights."""


@dataclass(frozen=True)
class Answers:
    """Scores [photos, classes] of plain and fused layers in float32, those in float64, and a verdict for each photo."""

    plain: Tensor
    fused: Tensor
    exact: Tensor
    verdicts: list[Verdict]


def demo(
    arch: Arch = "resnet50",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="NAME|PATH|random",
            help="Published weights by name, a file, or random (default: the best published ones, or random ones if "
            "those cannot be downloaded).",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--out", "-o", metavar="PATH", help="Plot to write: .png, .svg or .pdf.")
    ] = Path("resnet_fast_demo.png"),
    threads: Threads = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Time to spend on measuring speed.")] = 12.0,
    image_size: Annotated[int, typer.Option("--image-size", min=33, help="Height and width of the images.")] = 224,
    epochs: Annotated[
        int, typer.Option("--epochs", min=0, help="Epochs of the training at the end; 0 leaves it out.")
    ] = 5,
) -> int:
    """Run two photographs through plain torch layers and through the fused network, and compare.

    Shows both top-5, the largest difference, the speed and where the time goes, and draws a plot. Then trains a small
    residual network on handwritten digits and compares its plain and fused predictions.
    The exit status is 1 if any answers differ.
    """
    import torch

    check_arch(arch)
    check_output(output)
    paths = _photographs()
    count = set_threads(threads)
    console = out_console()

    from resnet_fast.benchmarking import machine
    from resnet_fast.benchmarking.peers import Task, name_of

    console.print(f"[bold]{arch}[/] on {escape(machine.describe().summary)}, torch {torch.__version__}")
    network, remark = _network(arch, weights, paths, image_size)
    console.print(remark, soft_wrap=True)
    batch = _batch(network, paths, image_size)

    dtypes = [torch.float32, *([torch.bfloat16] if machine.supports_bfloat16() else [])]
    answers: dict[torch.dtype, Answers] = {}
    with progress_bar() as progress:
        for position, dtype in enumerate(dtypes):
            progress(f"computing answers in {name_of(dtype)}", position / len(dtypes))
            answers[dtype] = _answers(network, batch, dtype)
    console.print()
    agreed = _show_answers(console, answers[torch.float32], paths, network)
    agreed &= _show_differences(console, answers)

    disturbance = machine.Disturbance()
    tasks = {dtype: Task(network.model, batch[:1], dtype, count, Path()) for dtype in dtypes}
    with progress_bar() as progress:
        samples = _measure(tasks, seconds, lambda fraction: progress("measuring speed", fraction))
    busy = disturbance.cores()
    speeds = _show_speed(console, samples, dtypes)
    warn_if_disturbed(console, busy)

    disturbance = machine.Disturbance()
    breakdowns: dict[torch.dtype, tuple[list[NodeTime], list[NodeTime]]] = {}
    with progress_bar() as progress:
        for position, dtype in enumerate(dtypes):
            progress(f"timing each layer in {name_of(dtype)}", position / len(dtypes))
            breakdowns[dtype] = _breakdown(network, batch[:1], dtype, speeds[dtype])
    busy = disturbance.cores()
    _show_breakdown(console, breakdowns)
    warn_if_disturbed(console, busy)
    _show_traffic(console, network)
    faster = f"fused is {' and '.join(f'{speeds[d].ratio:.2f} times as fast in {name_of(d)}' for d in dtypes)}"
    _draw(console, output, f"{arch}, batch 1, {image_size} px, {machine.describe().summary}\n{faster}", breakdowns)
    if agreed:
        console.print(f"[bold green]The answers agree[/]; {faster}.")
    else:
        console.print("[bold red]The answers disagree.[/]")
    if epochs:
        agreed &= _train_on_digits(console, epochs)
    return 0 if agreed else 1


def _train_on_digits(console: Console, epochs: int) -> bool:
    """Train the small residual network; return whether its plain and fused predictions agree."""
    from resnet_fast.cli import train_residual
    from resnet_fast.training import digits
    from resnet_fast.training.residual import Settings

    duration = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    console.print(
        f"\n[bold]The small residual network learns to read[/], {DIGITS_SIDE}x{DIGITS_SIDE} pixels, {duration} "
        "(resnet-fast train residual: larger images, a checkpoint, a plot)",
        soft_wrap=True,
    )
    run = train_residual.train(console, digits.load("digits", side=DIGITS_SIDE), Settings(), epochs)
    return train_residual.show_agreement(console, run)


def _photographs() -> list[Path]:
    """Return the paths of scikit-learn's two photographs, without importing it."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the photographs come with scikit-learn: pip install 'resnet_fast[demo]'")
    folder = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "images"
    paths = [folder / name for name in PHOTOS]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: this scikit-learn has no such photograph; pip install 'resnet_fast[demo]'")
    return paths


def _network(arch: str, weights: str | None, paths: list[Path], image_size: int) -> tuple[Network, str]:
    """Return the network, and a line about its weights."""
    reason = "as asked" if weights == "random" else ""
    if weights is None:
        reason = _out_of_reach(arch)
        if not reason:
            try:
                network = load_network(arch, None)
                return network, f"Pretrained weights: {escape(network.source)}."
            except UserError as error:
                reason = str(error)
    elif not reason:
        network = load_network(arch, weights)
        return network, f"Weights: {escape(network.source)}."
    network = _random_network(arch, paths, image_size)
    return network, (
        f"[yellow]Random weights[/] ({escape(one_line(reason))}): seeded, BatchNorm statistics measured on the "
        "photographs and disturbed. The class names mean nothing here; only whether both sides agree does."
    )


def _out_of_reach(arch: str) -> str:
    """Return why the published weights cannot be downloaded, found out within seconds; "" if they can."""
    import urllib.error
    import urllib.request

    import torch

    from resnet_fast import models
    from resnet_fast.models import weights as registry

    url = registry.url(models.get_model_weights(arch)["DEFAULT"])
    name = url.rsplit("/", 1)[-1]
    folder = Path(torch.hub.get_dir()).expanduser() / "checkpoints"
    if (folder / name).exists():
        return ""
    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "resnet_fast"})
        urllib.request.urlopen(request, timeout=PATIENCE).close()
    except (OSError, ValueError) as error:  # URLError is an OSError
        return f"the pretrained {name} is not in {folder} and cannot be downloaded: {error}"
    return ""


def _random_network(arch: str, paths: list[Path], image_size: int) -> Network:
    import torch

    from resnet_fast import models
    from resnet_fast.benchmarking.network import randomize
    from resnet_fast.inference.classifier import Network

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.get_model(arch)
    labels = tuple(f"class {index}" for index in range(1000))
    network = Network(model.eval(), "random", models.preprocessing(), labels)
    randomize(model, _batch(network, paths, image_size))
    return network


def _batch(network: Network, paths: list[Path], image_size: int) -> Tensor:
    """Return the photographs as float32 [2, 3, image_size, image_size], by the weights' own preprocessing."""
    import torch

    prepare = network.preprocessing.for_size(image_size)
    return torch.stack([prepare(read_image(path)) for path in paths])


def _answers(network: Network, batch: Tensor, dtype: torch.dtype) -> Answers:
    import torch

    from resnet_fast.benchmarking.gate import judge
    from resnet_fast.benchmarking.peers import plain
    from resnet_fast.graph import optimize

    batch = batch.to(dtype)
    with torch.no_grad():
        exact = plain(network.model).double()(batch.double())
        ordinary = plain(network.model).to(dtype)(batch)
        fused = optimize(network.model, dtype=dtype)(batch)
    verdicts = [judge(fused[i], ordinary[i], exact[i], dtype) for i in range(len(batch))]
    return Answers(ordinary.float(), fused.float(), exact, verdicts)


def _measure(tasks: dict[torch.dtype, Task], seconds: float, progress: Callable[[float], None]) -> Samples:
    from resnet_fast.benchmarking.peers import PEERS, name_of
    from resnet_fast.benchmarking.timing import Schedule, interleave

    calls = {}
    for dtype, task in tasks.items():
        for who in ("eager", "optimize"):
            contestant = PEERS[who].build(task)
            calls[f"{who} {name_of(dtype)}"] = _call(contestant.run, contestant.prepare(task.example))
    return interleave(calls, Schedule(seconds=seconds, min_rounds=3), progress=progress)


def _call(run: Callable[[object], object], x: object) -> Callable[[int], object]:
    return lambda number: run(x)


def _breakdown(network: Network, x: Tensor, dtype: torch.dtype, speed: Speed) -> tuple[list[NodeTime], list[NodeTime]]:
    """Return the node times of the plain and of the fused network, in proportion, so that they sum to ``speed``'s.

    One node at a time, they take less or more than within a whole forward.
    """
    import torch

    from resnet_fast.benchmarking.peers import plain
    from resnet_fast.benchmarking.profile import node_times
    from resnet_fast.graph import optimize

    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    ordinary = plain(network.model).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fused = optimize(network.model, dtype=dtype)
    plain_times, fused_times = node_times([ordinary, fused.graph_module], x)
    return _scaled(plain_times, speed.plain), _scaled(fused_times, speed.fused)


def _scaled(times: list[NodeTime], total: float) -> list[NodeTime]:
    factor = total / sum(time.seconds for time in times)
    return [dataclasses.replace(time, seconds=factor * time.seconds) for time in times]


def _show_answers(console: Console, answers: Answers, paths: list[Path], network: Network) -> bool:
    """Show both top-5 of every photograph; return whether they are the same, up to ties within the error rule."""
    from resnet_fast.inference.classifier import top

    shown = table("The same answers (float32)", ("photograph", "plain torch layers", "fused", "same?"), ())
    agreed = True
    for index, path in enumerate(paths):
        ordinary = top(answers.plain[index].double().softmax(0), network.labels, 5)
        fused = top(answers.fused[index].double().softmax(0), network.labels, 5)
        exact, verdict = answers.exact[index], answers.verdicts[index]
        for rank, (left, right) in enumerate(zip(ordinary, fused, strict=True)):
            gap = float((exact[left.index] - exact[right.index]).abs())
            same = left.index == right.index
            tie = gap <= verdict.allowed * float(exact.norm())
            agreed &= same or tie
            shown.add_row(
                path.name if rank == 0 else "",
                f"{escape(left.label)}  {left.probability:.2%}",
                f"{escape(right.label)}  {right.probability:.2%}",
                "yes" if same else "a tie" if tie else "[bold red]NO[/]",
                end_section=rank == len(ordinary) - 1,
            )
    console.print(shown)
    return agreed


def _show_differences(console: Console, answers: dict[torch.dtype, Answers]) -> bool:
    """Show how far the fused answers are from plain ones and from float64; return whether the error rule holds."""
    from resnet_fast.benchmarking.peers import name_of

    numbers = ("plain - fused", "of a score of", "fused - float64", "plain - float64", "allowed")
    shown = table("The largest difference", ("precision",), numbers)
    shown.add_column("error rule")
    agreed = True
    for dtype, found in answers.items():
        plain_error = (found.plain.double() - found.exact).norm(dim=1) / found.exact.norm(dim=1)
        worst = max(range(len(found.verdicts)), key=lambda i: found.verdicts[i].error / found.verdicts[i].allowed)
        verdict = found.verdicts[worst]
        passed = all(one.passed for one in found.verdicts)
        agreed &= passed
        shown.add_row(
            name_of(dtype),
            f"{float((found.plain - found.fused).abs().max()):.1e}",
            f"{float(found.exact.abs().max()):.1f}",
            f"{verdict.error:.1e}",
            f"{float(plain_error[worst]):.1e}",
            f"{verdict.allowed:.1e}",
            "holds" if passed else f"[bold red]BROKEN[/]: {escape(verdict.reason)}",
        )
    console.print(shown)
    console.print(
        "Error rule: at most twice as far from float64 as plain torch at the same precision, plus one rounding.\n"
        "Distances are relative to the norm of all scores.\n"
    )
    return agreed


@dataclass(frozen=True)
class Speed:
    """Median seconds of a forward, plain and fused, and the median of how many times as fast fused is."""

    plain: float
    fused: float
    ratio: float


def _show_speed(console: Console, samples: Samples, dtypes: list[torch.dtype]) -> dict[torch.dtype, Speed]:
    """Show medians and ratios, and return them by precision."""
    from resnet_fast.benchmarking.peers import name_of
    from resnet_fast.benchmarking.timing import flatten, paired_ratio, summarize

    numbers = ("plain torch, ms", "fused, ms", "speed-up of fusing", "samples")
    shown = table("Speed, one image, interleaved", ("precision",), numbers)
    speeds = {}
    for dtype in dtypes:
        ordinary, fused = samples[f"eager {name_of(dtype)}"], samples[f"optimize {name_of(dtype)}"]
        left, right, ratio = summarize(flatten(ordinary)), summarize(flatten(fused)), paired_ratio(fused, ordinary)
        shown.add_row(
            name_of(dtype),
            f"{1e3 * left.p50:.1f} ({1e3 * left.p10:.1f} - {1e3 * left.p90:.1f})",
            f"{1e3 * right.p50:.1f} ({1e3 * right.p10:.1f} - {1e3 * right.p90:.1f})",
            f"{ratio.p50:.2f}x ({ratio.p10:.2f} - {ratio.p90:.2f})",
            str(right.count),
        )
        speeds[dtype] = Speed(left.p50, right.p50, ratio.p50)
    console.print(shown)
    if len(dtypes) == 1:
        console.print("This processor has no bfloat16 instructions, so only float32 was measured.")
    return speeds


def _show_breakdown(console: Console, breakdowns: dict[torch.dtype, tuple[list[NodeTime], list[NodeTime]]]) -> None:
    from resnet_fast.benchmarking.peers import name_of
    from resnet_fast.benchmarking.profile import STAGES, by_part, by_stage

    for dtype, (ordinary, fused) in breakdowns.items():
        shown = table(f"Where the time goes, ms, {name_of(dtype)}", ("by kind of work",), ("plain", "fused"))
        left, right = by_part(ordinary), by_part(fused)
        for part in [*left, *(part for part in right if part not in left)]:
            shown.add_row(part, *(f"{1e3 * side[part]:.2f}" if part in side else "" for side in (left, right)))
        shown.add_section()
        shown.add_row("[bold]by stage of the network[/]")
        stages_left, stages_right = by_stage(ordinary), by_stage(fused)
        for stage in STAGES:
            shown.add_row(stage, f"{1e3 * stages_left[stage]:.2f}", f"{1e3 * stages_right[stage]:.2f}")
        shown.add_section()
        shown.add_row("[bold]whole network[/]", f"{1e3 * sum(left.values()):.2f}", f"{1e3 * sum(right.values()):.2f}")
        console.print(shown)
    console.print("The totals are the medians above, divided in proportion to times measured layer by layer.\n")


def _show_traffic(console: Console, network: Network) -> None:
    """Show the last lines of the optimizer's report: layers fused, bytes moved before and after."""
    from resnet_fast.graph import optimize

    lines = str(optimize(network.model).report()).strip().splitlines()
    console.print("\n".join(escape(line) for line in lines[-2:]))


def _draw(
    console: Console,
    output: Path,
    title: str,
    breakdowns: dict[torch.dtype, tuple[list[NodeTime], list[NodeTime]]],
) -> None:
    from resnet_fast.benchmarking import plot
    from resnet_fast.benchmarking.peers import name_of
    from resnet_fast.benchmarking.profile import by_part

    bars = {}
    for dtype, (ordinary, fused) in breakdowns.items():
        bars[f"plain, {name_of(dtype)}"] = by_part(ordinary)
        bars[f"fused, {name_of(dtype)}"] = by_part(fused)
    try:
        plot.save(plot.breakdown(title, bars), output)
    except (plot.PlotError, ImportError, OSError) as error:
        console.print(f"[yellow]No plot:[/] {escape(one_line(error))}", soft_wrap=True)
    else:
        console.print(f"Plot: {escape(str(output))}", soft_wrap=True)
