"""``resnet-fast validate``: the top-1 and top-5 accuracy of weights on a folder of images, alone or under torchrun."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from resnet_fast.cli.common import (
    AnyArch,
    Device,
    DeviceName,
    Dtype,
    ImageSize,
    JsonTarget,
    Labels,
    OnError,
    Precision,
    ResizeSize,
    Threads,
    UserError,
    Weights,
    as_user_errors,
    check_results,
    one_line,
    out_console,
    printable,
    progress_bar,
    set_threads,
    write_json,
)


def validate(
    data: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with <class>/ and images in each.", show_default=False)
    ],
    arch: AnyArch = None,
    weights: Weights = None,
    labels: Labels = None,
    image_size: ImageSize = None,
    resize_size: ResizeSize = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per forward.")] = 32,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Data-loading workers per process.")] = 4,
    on_error: Annotated[
        OnError,
        typer.Option("--on-error", help="skip: leave damaged images out and count them; stop: end at the first one."),
    ] = OnError.skip,
    dtype: Dtype = Precision.float32,
    device: DeviceName = Device.auto,
    threads: Threads = None,
    json_target: JsonTarget = None,
) -> None:
    """Measure top-1 and top-5 accuracy on a folder of images, with the weights' own classes and preprocessing.

    The folders are matched with the names of the network's classes, which the files of `train imagenet` have;
    ImageNet's own thousand folders belong to published weights.
    """
    check_results(json_target, None)
    set_threads(threads)

    from resnet_fast import inference
    from resnet_fast.models import ImageError
    from resnet_fast.training import distributed, imagefolder
    from resnet_fast.training.validation import validate as run

    with as_user_errors(OSError), distributed.start(device.value) as processes:
        try:
            with distributed.agreed(processes):
                imagefolder.scan(data, fewest=1)  # before anything is downloaded
                network = inference.load(
                    arch, weights, labels=labels, image_size=image_size, resize_size=resize_size, dtype=dtype.dtype,
                    device=processes.device,
                )  # fmt: skip
            bar = progress_bar() if processes.first else contextlib.nullcontext(lambda what, fraction: None)
            with bar as show:
                found = run(
                    network, data, processes, batch_size=batch_size, workers=workers, on_error=on_error.value,
                    progress=show,
                )  # fmt: skip
        except distributed.AgreedError as error:
            if not processes.first:
                raise typer.Exit(1) from error
            raise UserError(one_line(error)) from error
        except ImageError as error:
            raise UserError(imagefolder.reason(error)) from error
        except ValueError as error:
            raise UserError(one_line(error)) from error
    if not processes.first:
        return
    result = found.evaluation
    if found.note:
        typer.echo(f"resnet-fast: note: {found.note}", err=True)
    if json_target is not None:
        data_and_counts = {
            "schema": 1, "arch": network.name, "weights": network.source, "dtype": dtype.value, "data": str(data),
            "images": result.images, "skipped_images": found.skipped, "classes": found.classes, "top1": result.top1,
            "top5": result.top5, "loss": result.loss, "images_per_second": found.images_per_second,
        }  # fmt: skip
        write_json(data_and_counts, json_target)
    if json_target != "-":
        skipped = f", {found.skipped:,} damaged ones left out" if found.skipped else ""
        line = (
            f"{network.name}, {network.source}, {dtype.value}: {result.images:,} images of {found.classes:,} classes"
            f"{skipped}: top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, loss {result.loss:.4f}, "
            f"{found.images_per_second:.4g} images/s"
        )
        out_console().print(escape(printable(line)), soft_wrap=True)
