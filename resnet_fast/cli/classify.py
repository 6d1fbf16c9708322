"""``resnet-fast classify``: classify images by a pretrained, a local or a Caffe network, run fused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from resnet_fast.cli.common import (
    Dtype,
    Precision,
    Threads,
    UserError,
    as_user_errors,
    check_arch,
    one_line,
    out_console,
    printable,
    progress_bar,
    set_threads,
    write_json,
)
from resnet_fast.cli.images import Given, given_images

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from resnet_fast.caffe import Input, Net
    from resnet_fast.models.preprocessing import Preprocessing

BATCH = 8

MAX_LABELS_BYTES = 2**20
"""Larger files of labels are refused. That of ImageNet's thousand classes has 31 KB."""


@dataclass(frozen=True)
class Network:
    """A loaded network and what belongs to its weights: their source, preprocessing and class names."""

    model: nn.Module
    source: str
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    arch: str = ""


@dataclass(frozen=True)
class Classifier:
    """What is needed to classify.

    Attributes:
        model: takes batches [N, 3, size, size].
        name, source: names of the network and of its weights.
        prepare: turns an image into a tensor [3, size, size].
        labels: names of the classes.
        probabilities: whether the model returns probabilities instead of scores.
    """

    model: nn.Module
    name: str
    source: str
    prepare: Callable[[Image], Tensor]
    size: int
    labels: tuple[str, ...]
    probabilities: bool = False


def load_network(arch: str | None, weights: str | None) -> Network:
    """Load a network.

    Args:
        arch: the model's name; None for the one that the weights name, or resnet50.
        weights: a name ("DEFAULT" if None) or a local checkpoint with any number of classes.

    Raises:
        UserError: if the weights cannot be downloaded or read, or do not fit.
    """
    from resnet_fast import models
    from resnet_fast.models import checkpoint
    from resnet_fast.models import weights as registry

    weights = weights or "DEFAULT"
    with as_user_errors(models.WeightsError, OSError, ValueError, TypeError):
        arch_or_default = arch or registry.model_of(weights.partition(".")[0]) or "resnet50"
        resolved = registry.resolve(arch_or_default, weights)
        if not isinstance(resolved, Path):
            if resolved is None:
                raise ValueError(f"{arch_or_default} has no default weights; give a checkpoint with --weights PATH")
            model = models.get_model(arch_or_default, weights=resolved)
            prepare, labels = models.preprocessing(resolved), models.categories(resolved)
            return Network(model.eval(), str(resolved), prepare, labels, arch_or_default)
        state, metadata = checkpoint.read_with_metadata(resolved)
        if metadata.get("unpadded_pool") == "true":
            raise ValueError(
                f"{resolved}: weights of a Caffe ResNet; its strides, pool and preprocessing differ from "
                f"{arch_or_default}'s. Give the network with --prototxt and --caffemodel instead"
            )
        prepare = registry.preprocessing_of(resolved, metadata)
        if arch is None:
            arch_or_default = registry.arch_of(resolved, metadata) or arch_or_default
        elif metadata.get("arch", arch) != arch and metadata["arch"] in models.list_models():
            raise ValueError(
                f"{resolved}: weights of {metadata['arch']} by its metadata, but --arch is {arch}; leave --arch out"
            )
        head = state.get("fc.weight")
        outputs = len(head) if head is not None and head.ndim == 2 and len(head) else 1000
        wiring = {"stride_in_1x1": True} if metadata.get("stride_in_1x1") == "true" else {}
        model = models.get_model(arch_or_default, num_classes=outputs, **wiring)
        checkpoint.load_into(model, state, source=str(resolved), name=arch_or_default)
        return Network(model.eval(), str(resolved), prepare, _labels(outputs, metadata), arch_or_default)


def _labels(outputs: int, metadata: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return the names in the metadata, as ``train imagenet`` writes them, else ImageNet's if 1000, else numbers."""
    from resnet_fast import models
    from resnet_fast.models.weights import named_classes

    found = named_classes(metadata or {})
    if found is not None and len(found) == outputs:
        return found
    names = models.categories()
    return names if outputs == len(names) else tuple(f"class {index}" for index in range(outputs))


def read_labels(path: Path, outputs: int) -> tuple[str, ...]:
    """Return the names in a text file, one per line, without the WordNet numbers of Caffe's synset_words.txt.

    Raises:
        UserError: for anything but ``outputs`` lines of readable text.
    """
    with as_user_errors(OSError):
        if not path.is_file():
            raise UserError(f"{path}: no such file; a text with {outputs} labels, one a line, was expected")
        with path.open("rb") as file:
            content = file.read(MAX_LABELS_BYTES + 1)
    if len(content) > MAX_LABELS_BYTES:
        raise UserError(f"{path}: more than {MAX_LABELS_BYTES:,} bytes, too large for labels")
    try:
        lines = content.decode("utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text, at byte {error.start}; one label a line was expected") from None
    labels = tuple(" ".join(re.sub(r"^\s*n\d{8}(\s|$)", "", line).split()) for line in lines)
    for number, label in enumerate(labels, 1):
        if not label or not label.isprintable():
            raise UserError(f"{path}: line {number} is {'not printable' if label else 'empty'}; a label was expected")
    if len(labels) != outputs:
        raise UserError(f"{path}: {len(labels)} labels, the network has {outputs} classes")
    return labels


# --------------------------------------------------------------------------------------------------------------- Caffe


def _caffe(prototxt: Path, caffemodel: Path, mean: str | None, scale: float | None) -> Classifier:
    """Load the network of a Caffe definition and its weights, with Caffe's preprocessing."""
    from resnet_fast import caffe

    with as_user_errors(ValueError, OSError):
        net = caffe.load(prototxt, caffemodel)
        size = _input_size(net)
        outputs, probabilities = _classes(net, size)
    prepare = _caffe_preprocessing(mean, scale, size, net.definition.inputs[0])
    name = one_line(net.definition.name) if net.definition.name else prototxt.stem
    return Classifier(net, name, str(caffemodel), prepare, size, _labels(outputs), probabilities)


def _input_size(net: Net) -> int:
    """Return height and width, in pixels, of the images that the network takes."""
    source, inputs = net.definition.source, net.definition.inputs
    shown = " and ".join(f"{entry.name!r} {'x'.join(map(str, entry.shape))}" for entry in inputs)
    if len(inputs) != 1:
        raise UserError(f"{source}: has {len(inputs)} inputs, {shown}; one of images, Nx3xHxH, was expected")
    shape = inputs[0].shape
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise UserError(f"{source}: its input is {shown}; square images of three channels, Nx3xHxH, were expected")
    from resnet_fast.models.preprocessing import MAX_SIZE

    if shape[2] > MAX_SIZE:
        raise UserError(f"{source}: its input is {shown}; images of at most {MAX_SIZE}x{MAX_SIZE} are classified")
    return shape[2]


def _classes(net: Net, size: int) -> tuple[int, bool]:
    """Return the number of classes, and whether the network ends with a Softmax and so returns probabilities."""
    from resnet_fast.caffe import definition

    source, outputs = net.definition.source, net.definition.outputs
    if len(outputs) != 1:
        raise UserError(
            f"{source}: has the outputs {', '.join(map(repr, outputs))}; one of scores or probabilities was expected"
        )
    shape = net.shapes((2, 3, size, size))[outputs[0]]  # of two images, to see which axis is theirs
    if len(shape) < 2 or shape[0] != 2 or shape[2:] not in ((), (1, 1)):
        given = "x".join(map(str, ("N" if shape[:1] == (2,) else shape[0], *shape[1:]))) if shape else "of no axes"
        raise UserError(
            f"{source}: its output {outputs[0]!r} is {given}; N x classes, or N x classes x 1 x 1, was expected"
        )
    last = next(layer for layer in reversed(net.definition.layers) if outputs[0] in layer.tops)
    softmax = last.parameters if isinstance(last.parameters, definition.Softmax) else None
    if softmax is not None and softmax.axis % len(shape) != 1:
        raise UserError(f"{source}: {last}: its axis is {softmax.axis}; 1, that of the classes, was expected")
    return shape[1], softmax is not None


def _caffe_preprocessing(mean: str | None, scale: float | None, size: int, entry: Input) -> Callable[[Image], Tensor]:
    """Return the published models' preprocessing: the shorter side 256 for a crop of 224, in proportion for others.

    Mean and scale are the options', or those of the definition's data layer.
    """
    from resnet_fast.caffe.preprocessing import CHANNEL_MEANS, Preprocessing

    resize = 256 if 224 <= size <= 256 else round(size * 256 / 224)  # 227 goes with 256 too
    transform = entry.transform
    if scale is None:
        scale = 1.0 if transform is None else transform.scale
    if mean is None and transform is not None:
        if transform.mean_file:
            raise UserError(
                f"the definition's data layer subtracts the mean image {one_line(transform.mean_file)}; give it with "
                "--mean FILE"
            )
        mean = ",".join(map(str, (transform.mean_value or (0.0,)) * (1 if len(transform.mean_value) > 1 else 3)))
    with as_user_errors(ValueError, OSError):
        if mean is None:
            shown = ", ".join(map(str, CHANNEL_MEANS))
            typer.echo(f"resnet-fast: note: no --mean given; the published ResNets' is used, B, G, R {shown}", err=True)
            return Preprocessing(resize, size, scale=scale)
        try:
            values = [float(part) for part in mean.split(",")]
        except ValueError:
            return Preprocessing.with_mean_file(mean, resize_size=resize, crop_size=size, scale=scale)
        if len(values) != 3:
            raise ValueError(f"--mean {mean}: a .binaryproto file, or three numbers B,G,R, was expected")
        return Preprocessing(resize, size, (values[0], values[1], values[2]), scale=scale)


# ------------------------------------------------------------------------------------------------------------- command


def top(scores: Tensor, labels: tuple[str, ...], count: int, probabilities: bool = False) -> list[dict[str, Any]]:
    """Return the ``count`` most probable classes of one image, the most probable first.

    ``probabilities`` says that ``scores`` are probabilities already.
    """
    found = scores.double() if probabilities else scores.double().softmax(0)
    values, indices = found.topk(min(count, len(labels)))
    return [
        {"index": int(index), "label": labels[int(index)], "probability": float(value)}
        for value, index in zip(values, indices, strict=True)
    ]


def classify(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...", help="Image files, folders of them, pipes; - is standard input.", show_default=False
        ),
    ],
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch", "-a", metavar="NAME", help="Model name (default: the one that the weights name, or resnet50)."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="NAME|PATH",
            help="Published weights by name, or a .pth or .safetensors file (default: the best published ones).",
        ),
    ] = None,
    prototxt: Annotated[
        Path | None, typer.Option("--prototxt", metavar="FILE", help="A Caffe network's deploy definition instead.")
    ] = None,
    caffemodel: Annotated[
        Path | None, typer.Option("--caffemodel", metavar="FILE", help="The weights that belong to --prototxt.")
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            "--mean",
            metavar="FILE|B,G,R",
            help="Mean of a Caffe network's images: a .binaryproto file, or three numbers for blue, green and red "
            "(default: the published ResNets').",
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            "--scale",
            metavar="X",
            help="Factor for a Caffe network's images after subtracting the mean (default: its definition's, or 1).",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="FILE", help="Names of the classes, one per line, as in synset_words.txt."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", min=1, max=4096, help="Height and width to crop to (default: the weights')."),
    ] = None,
    resize_size: Annotated[
        int | None,
        typer.Option("--resize-size", min=1, max=4096, help="Shorter side before cropping (default: the weights')."),
    ] = None,
    topk: Annotated[int, typer.Option("--topk", "-k", min=1, help="Number of classes to show per image.")] = 5,
    dtype: Dtype = Precision.float32,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Classify images: show the most probable classes of each, using the weights' own preprocessing.

    The network is one of the ten ResNets, or a Caffe network with --prototxt and --caffemodel.

    Images that cannot be read are named on stderr; the others are still classified, and the exit status is 1.
    """
    _check_options(arch, weights, prototxt, caffemodel, mean, scale, image_size or resize_size)
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
    network = (
        _classifier(arch, weights, image_size, resize_size)
        if caffemodel is None or prototxt is None
        else _caffe(prototxt, caffemodel, mean, scale)
    )
    if labels is not None:
        network = replace(network, labels=read_labels(labels, len(network.labels)))
    answers = _run(network, readable, topk, dtype)
    if as_json:
        data = {
            "schema": 1,
            "arch": network.name,
            "weights": network.source,
            "dtype": dtype.value,
            "images": [{"path": name, "predictions": rows} for name, rows in answers],
            "errors": [
                {"path": given[position].name, "error": one_line(errors[position])} for position in sorted(errors)
            ],
        }
        write_json(data, "-")
    else:
        _print(answers, f"{network.name}, {network.source}, {dtype.value}")
    return 1 if errors else 0


def _check_options(
    arch: str | None,
    weights: str | None,
    prototxt: Path | None,
    caffemodel: Path | None,
    mean: str | None,
    scale: float | None,
    size: int | None,
) -> None:
    """Raise UserError unless the options name one network."""
    if prototxt is None:
        for option, given in (("--caffemodel", caffemodel), ("--mean", mean), ("--scale", scale)):
            if given is not None:
                raise UserError(f"{option} belongs to a Caffe network; give its definition with --prototxt FILE")
        if arch is not None:
            check_arch(arch)
        if weights is not None and weights.endswith(".caffemodel"):
            raise UserError(f"{weights}: Caffe's weights are given with --caffemodel, their definition with --prototxt")
        return
    for option, given in (("--arch", arch), ("--weights", weights)):
        if given is not None:
            raise UserError(f"{option} names one of the ten ResNets, --prototxt a Caffe network; give one of the two")
    if size is not None:
        raise UserError("--image-size and --resize-size belong to the ten ResNets; a definition has its own size")
    if caffemodel is None:
        raise UserError(f"{prototxt}: a definition has no weights; give them with --caffemodel FILE")


def _classifier(arch: str | None, weights: str | None, image_size: int | None, resize_size: int | None) -> Classifier:
    """Return ``load_network``'s network; sizes given as options override the weights'."""
    network = load_network(arch, weights)
    prepare = network.preprocessing
    if image_size is not None or resize_size is not None:
        prepare = prepare.for_size(image_size, resize_size)
    return Classifier(network.model, network.arch, network.source, prepare, prepare.crop_size, network.labels)


Answers = list[tuple[str, list[dict[str, Any]]]]
"""Each image's name and its rows of ``top``."""


def _run(network: Classifier, images: list[Given], topk: int, dtype: Precision) -> Answers:
    import torch

    from resnet_fast.graph import optimize

    example = torch.empty(1, 3, network.size, network.size, device="meta")
    model = optimize(network.model, dtype=dtype.dtype, example_inputs=example)
    answers: Answers = []
    with progress_bar() as progress, torch.inference_mode():
        for start in range(0, len(images), BATCH):
            chunk = images[start : start + BATCH]
            progress(f"classifying {escape(one_line(chunk[0].name))}", start / len(images))
            batch = torch.stack([network.prepare(image.read()) for image in chunk])
            scores = model(batch.to(dtype.dtype).contiguous(memory_format=torch.channels_last)).float().flatten(1)
            if not bool(torch.isfinite(scores).all()):
                raise UserError(f"the network's answers are not finite; is {network.source} damaged?")
            rows = [top(row, network.labels, topk, network.probabilities) for row in scores]
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
            table.add_row(escape(name), escape(printable(row["label"])), str(row["index"]), f"{row['probability']:.2%}",
                          end_section=position == len(rows) - 1)  # fmt: skip
    out_console().print(table)
