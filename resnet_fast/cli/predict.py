"""``resnet-fast predict``: classify any number of images into a CSV, Parquet or JSON-lines file, resumable.

This file has the options, the progress bar and the display of errors; ``resnet_fast.inference`` does the work.
"""

from __future__ import annotations

import enum
import os
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from resnet_fast.cli.common import (
    AnyArch,
    Caffemodel,
    Device,
    DeviceName,
    Dtype,
    ImageSize,
    Labels,
    Mean,
    Precision,
    Prototxt,
    ResizeSize,
    Scale,
    Threads,
    TopK,
    UserError,
    Weights,
    as_user_errors,
    if_stopped,
    out_console,
    printable,
    progress_bar,
    set_threads,
)

if TYPE_CHECKING:
    from resnet_fast.inference.bulk import Bulk, Engine


class EngineName(str, enum.Enum):
    """What runs the network."""

    local = "local"
    ray = "ray"


def predict(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Image files, folders, patterns; lists of paths (.txt, - for stdin); tables (.csv, .parquet).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Table to write: .csv, .parquet or .jsonl.", show_default=False
        ),
    ],
    column: Annotated[
        str, typer.Option("--column", metavar="NAME", help="Column of the paths in a CSV or Parquet source.")
    ] = "path",
    root: Annotated[
        str,
        typer.Option(
            "--root",
            metavar="DIR",
            help="Folder from which relative paths in lists and tables start (default: this one).",
        ),
    ] = "",
    arch: AnyArch = None,
    weights: Weights = None,
    prototxt: Prototxt = None,
    caffemodel: Caffemodel = None,
    mean: Mean = None,
    scale: Scale = None,
    labels: Labels = None,
    image_size: ImageSize = None,
    resize_size: ResizeSize = None,
    topk: TopK = 5,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per forward.")] = 32,
    dtype: Dtype = Precision.float32,
    device: DeviceName = Device.auto,
    engine: Annotated[
        EngineName, typer.Option("--engine", help="ray: workers of Ray Data, on this machine or a cluster.")
    ] = EngineName.local,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            max=4096,
            help="Threads that read images (default: 4, or the cores if fewer); with Ray, networks.",
        ),
    ] = None,
    threads: Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it exists.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew instead of continuing an interrupted prediction.")
    ] = False,
) -> int:
    """Classify any number of images into a table with one row per image.

    Each image has its row once, in the order of the sources: path, label, index and probability of the most probable
    classes, and an error if it cannot be read. The exit status is 1 if a row has one.

    An interrupted prediction keeps its answers in FILE.partial, and the same command continues it. FILE is
    written at the end.
    """
    from resnet_fast import inference
    from resnet_fast.inference import bulk, tables
    from resnet_fast.inference.classifier import check_choice
    from resnet_fast.inference.sources import collect
    from resnet_fast.inference.stream import WORKERS

    with as_user_errors(inference.ClassifierError, OSError):
        tables.check_output(out)
        journal = bulk.journal_of(out)
        if out.exists() and not overwrite and not journal.exists():
            raise UserError(f"{out}: exists; --overwrite replaces it")
        for source in sources:
            if out.exists() and os.path.exists(source) and os.path.samefile(out, source):
                raise UserError(f"{out}: is a source; give another name for the output")
        check_choice(arch, weights, prototxt, caffemodel, mean, scale, image_size or resize_size)
        found = collect(sources, column=column, root=root, stdin=_stdin())
        set_threads(threads)
        local = engine is EngineName.local
        arguments: dict[str, Any] = {
            "arch": arch, "weights": weights, "prototxt": prototxt, "caffemodel": caffemodel, "mean": mean,
            "scale": scale, "labels": labels, "image_size": image_size, "resize_size": resize_size,
            "dtype": dtype.dtype,
        }  # fmt: skip
        where = device.found if local or device is Device.auto else device.value
        if local:
            classifier = inference.load(**arguments, device=where)
        else:  # for its labels, and to compare with what the workers load
            classifier = inference.load(**arguments, optimize=False)
        for note in classifier.notes:
            typer.echo(f"resnet-fast: note: {note}", err=True)
        topk = min(topk, len(classifier.labels))
        if local:
            run = bulk.here(classifier, topk, batch_size=batch_size, workers=workers or WORKERS)
        else:
            from resnet_fast.inference.on_ray import ray_engine

            given = {**arguments, "device": where}
            run = ray_engine(classifier, given, topk, batch_size=batch_size, workers=workers)
        return 1 if _run(bulk.Bulk(found, out, classifier, topk, restart=restart), run) else 0


def _run(work: Bulk, engine: Engine) -> int:
    """Run the prediction, with a progress bar, and print what became of it; return the number of errors."""
    total, began = len(work.sources.paths), time.monotonic()
    console = out_console()

    def say(line: str) -> None:
        console.print(escape(printable(line)), soft_wrap=True)

    if work.sources.repeated:
        say(f"{work.sources.repeated:,} paths came again and count once")
    if work.resumed:
        say(f"{work.resumed:,} of {total:,} images were done before; continuing from {work.journal.path}")
    if_stopped(
        lambda: f"stopped after {work.done:,} of {total:,} images; the same command continues from {work.journal.path}"
    )

    def speed() -> str:
        seconds = time.monotonic() - began
        return f"{(work.done - work.resumed) / seconds:.4g} images/s" if seconds and work.done > work.resumed else ""

    with progress_bar(lines=console) as show:
        to_do = max(1, total - work.resumed)  # what was done before says nothing about the time that is left
        show("loading", 0.0)
        failed = work.run(
            engine, lambda done: show(f"{done:,} of {total:,} images {speed()}".rstrip(), (done - work.resumed) / to_do)
        )  # fmt: skip
    errors = f", {failed:,} of them with an error" if failed else ""
    say(f"{work.out}: {total:,} images{errors}" + (f", {speed()}" if speed() else ""))
    return failed


def _stdin() -> IO[bytes] | None:
    """Return standard input, None if it is a terminal or closed."""
    return None if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer
