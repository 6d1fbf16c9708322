"""``resnet-fast classify``: classify images by a pretrained, a local or a Caffe network, run fused."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from resnet_fast.cli.common import (
    AnyArch,
    Caffemodel,
    Device,
    DeviceName,
    Dtype,
    ImageSize,
    JsonTarget,
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
    check_results,
    one_line,
    out_console,
    printable,
    progress_bar,
    set_threads,
    write_json,
)
from resnet_fast.cli.images import Given, given_images

if TYPE_CHECKING:
    from resnet_fast.inference.classifier import Classifier, Label, Network

BATCH = 8


def load_network(arch: str | None, weights: str | None) -> Network:
    """Call ``resnet_fast.inference``'s function of that name, with its errors as UserError."""
    from resnet_fast.inference import classifier

    with as_user_errors(classifier.ClassifierError):
        return classifier.load_network(arch, weights)


def classify(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...", help="Image files, folders of them, pipes; - is standard input.", show_default=False
        ),
    ],
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
    dtype: Dtype = Precision.float32,
    device: DeviceName = Device.auto,
    threads: Threads = None,
    json_target: JsonTarget = None,
) -> int:
    """Classify images: show the most probable classes of each, using the weights' own preprocessing.

    The network is one of the ten ResNets, or a Caffe network with --prototxt and --caffemodel.

    Images that cannot be read are named on stderr; the others are still classified, and the exit status is 1.
    """
    check_results(json_target, None)
    from resnet_fast import inference
    from resnet_fast.inference.classifier import check_choice

    with as_user_errors(inference.ClassifierError):
        check_choice(arch, weights, prototxt, caffemodel, mean, scale, image_size or resize_size)
    given, errors = given_images(images)
    for position, image in enumerate(given):  # find bad files before anything is downloaded or built
        if position not in errors:
            try:
                image.read()
            except UserError as error:
                errors[position] = error
    readable = [image for position, image in enumerate(given) if position not in errors]
    if not readable:
        raise UserError("; ".join(map(str, errors.values())))
    for position in sorted(errors):
        typer.echo(f"resnet-fast: {one_line(errors[position])}", err=True)

    set_threads(threads)
    with as_user_errors(inference.ClassifierError):
        network = inference.load(
            arch, weights, prototxt=prototxt, caffemodel=caffemodel, mean=mean, scale=scale, labels=labels,
            image_size=image_size, resize_size=resize_size, dtype=dtype.dtype, device=device.found,
        )  # fmt: skip
        for note in network.notes:
            typer.echo(f"resnet-fast: note: {note}", err=True)
        answers = _run(network, readable, topk)
    if json_target is not None:
        data = {
            "schema": 1,
            "arch": network.name,
            "weights": network.source,
            "dtype": dtype.value,
            "images": [{"path": name, "predictions": [asdict(row) for row in rows]} for name, rows in answers],
            "errors": [
                {"path": given[position].name, "error": one_line(errors[position])} for position in sorted(errors)
            ],
        }
        write_json(data, json_target)
    if json_target != "-":
        _print(answers, f"{network.name}, {network.source}, {dtype.value}")
    return 1 if errors else 0


Answers = list[tuple[str, "list[Label]"]]
"""Each image's name and its most probable classes."""


def _run(network: Classifier, images: list[Given], topk: int) -> Answers:
    answers: Answers = []
    with progress_bar() as progress:
        for start in range(0, len(images), BATCH):
            chunk = images[start : start + BATCH]
            progress(f"classifying {escape(one_line(chunk[0].name))}", start / len(images))
            rows = network.top(network([image.read() for image in chunk]), topk)
            answers += zip([image.name for image in chunk], rows, strict=True)
    return answers


def _print(answers: Answers, title: str) -> None:
    table = Table(title=escape(printable(title)), title_justify="left", header_style="bold")
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("index", justify="right")
    table.add_column("probability", justify="right")
    for image, rows in answers:
        for position, row in enumerate(rows):
            name = printable(image) if position == 0 else ""
            table.add_row(escape(name), escape(printable(row.label)), str(row.index), f"{row.probability:.2%}",
                          end_section=position == len(rows) - 1)  # fmt: skip
    out_console().print(table)
