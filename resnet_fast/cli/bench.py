"""``resnet-fast bench``: time one network on this machine, fused, against plain torch and other installed runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from resnet_fast.cli.classify import load_network
from resnet_fast.cli.common import (
    Arch,
    Dtype,
    JsonTarget,
    Precision,
    Threads,
    as_user_errors,
    check_arch,
    check_results,
    out_console,
    progress_bar,
    save_plot,
    set_threads,
    warn_if_disturbed,
    write_json,
)


def bench(
    arch: Arch = "resnet50",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="NAME|PATH",
            help="Published weights by name, or a checkpoint file (default: random ones).",
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per batch.")] = 1,
    dtype: Dtype = Precision.float32,
    threads: Threads = None,
    peers: Annotated[
        str,
        typer.Option(
            "--peers",
            metavar="NAMES",
            help="Comma-separated: live, eager, inductor, onnxruntime, openvino, mnn, ncnn; or all. "
            "optimize() is always timed.",
        ),
    ] = "all",
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Time to spend on timed rounds.")] = 20.0,
    runs: Annotated[
        int | None, typer.Option("--runs", min=1, help="Number of rounds, instead of --seconds.", show_default=False)
    ] = None,
    image_size: Annotated[int, typer.Option("--image-size", min=33, help="Height and width of the images.")] = 224,
    json_target: JsonTarget = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", metavar="PATH", help="Draw the result: .png, .svg or .pdf.")
    ] = None,
) -> int:
    """Time one network on this machine against plain torch and every other installed runtime.

    All have the same parameters, inputs and number of threads. A runtime that fails the accuracy check is not timed.
    Rounds are interleaved in changing order; ratios are medians over the rounds.
    """
    check_arch(arch)
    check_results(json_target, plot_path)
    from resnet_fast.benchmarking import plot
    from resnet_fast.benchmarking.compare import Setting, compare, fresh_model
    from resnet_fast.benchmarking.timing import Schedule

    with as_user_errors(ValueError):
        names = () if peers == "all" else tuple(name for name in peers.replace(" ", "").split(",") if name)
        setting = Setting(
            arch=arch,
            weights=weights,
            batch=batch,
            image_size=image_size,
            precision={"float32": "fp32", "bfloat16": "bf16"}[dtype.value],
            peers=names,
            schedule=Schedule(seconds=seconds, rounds=runs, min_rounds=3),
        )
    set_threads(threads)
    with progress_bar() as progress:
        progress(f"making {arch}", 0.0)
        model = fresh_model(arch, image_size=image_size) if weights is None else load_network(arch, weights).model
        with as_user_errors(RuntimeError):
            result = compare(setting, model, progress=progress)

    if json_target is not None:
        write_json(result, json_target)
    if json_target != "-":
        show(result)
    if plot_path is not None:
        save_plot(plot.comparison(result), plot_path)
    wrong = [name for name, row in result["contestants"].items() if row["ours"] and row["status"] != "timed"]
    return 1 if wrong else 0


def show(result: dict[str, Any]) -> None:
    """Print ``result`` as a table, with the machine and setting it belongs to, and what was measured beside others."""
    from resnet_fast.benchmarking.contention import processes
    from resnet_fast.benchmarking.machine import threads_text

    setting, machine = result["setting"], result["machine"]
    console = out_console()
    table = Table(
        title=f"{setting['arch']}, {setting['dtype']}, batch {setting['batch']}, {setting['image_size']} px, "
        f"{threads_text(setting['threads'])}",
        title_justify="left",
        header_style="bold",
    )
    table.add_column("runtime", no_wrap=True)  # in a narrow terminal the figures are wrapped, no name is cut off
    for heading in ("median ms", "p10 - p90", "images/s", "optimize() vs. this", "error, x torch's"):
        table.add_column(heading, justify="right")
    for name, row in result["contestants"].items():
        label = escape(row["label"].replace(", ", ",\n"))
        if row["ours"]:
            label = f"[bold]{label}[/]"
        if row["status"] == "excluded":
            continue
        gate = row["gate"]
        error = f"{gate['error']:.1e}, {gate['times_torch']:.2f}x"
        if row["status"] == "wrong":
            table.add_row(label, "wrong", "", "", "", error)
            continue
        seconds = row["seconds"]
        ratio = result["ratios"]["against"].get(name)
        table.add_row(
            label,
            f"{1e3 * seconds['p50']:.2f}",
            f"{1e3 * seconds['p10']:.2f} - {1e3 * seconds['p90']:.2f}",
            f"{row['images_per_second']:.1f}",
            f"{ratio['p50']:.2f}x ({ratio['p10']:.2f} - {ratio['p90']:.2f})" if ratio else "",
            error,
        )
    console.print(table)
    if "contended" in result:
        contended = result["contended"]
        beside = f"beside {processes(contended['processes'])}"
        table = Table(title=f"The same {beside}", title_justify="left", header_style="bold")
        table.add_column("runtime", no_wrap=True)
        for heading in ("alone, ms", f"{beside}, ms", "times as long"):
            table.add_column(heading, justify="right")
        for name, found in contended["contestants"].items():
            alone = result["contestants"][name]["seconds"]["p50"]
            table.add_row(escape(result["contestants"][name]["label"].replace(", ", ",\n")), f"{1e3 * alone:.2f}",
                          f"{1e3 * found['seconds']['p50']:.2f}", f"{found['slowdown']:.2f}")  # fmt: skip
        console.print(table)
    for row in result["contestants"].values():
        if row["status"] != "timed":
            console.print(f"not timed: {escape(row['label'])}: {escape(row['reason'])}", soft_wrap=True)
        elif row["note"]:
            console.print(f"{escape(row['label'])}: {escape(row['note'])}", soft_wrap=True)
    layers, isa = result["contestants"]["optimize"]["layers_by_backend"], result["resnet_fast"]["engine"].get("isa")
    console.print(f"optimize() ran {', '.join(f'{count} layers by {name}' for name, count in layers.items())}"
                  f"{f'; instruction set of the CPU engine: {isa}' if isa else ''}", soft_wrap=True)  # fmt: skip
    console.print(f"{escape(machine['cpu'])}, {machine['cores']} cores, torch {machine['versions']['torch']}; "
                  f"weights: {escape(setting['parameters'])}", soft_wrap=True)  # fmt: skip
    warn_if_disturbed(console, result["others_busy_cores"])
