"""``resnet-fast classify``: what is on these pictures, by a pretrained or a local network, run fused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from resnet_fast.cli.common import (
    Arch,
    Dtype,
    Precision,
    Threads,
    UserError,
    as_user_errors,
    check_arch,
    one_line,
    out_console,
    progress_bar,
    set_threads,
    write_json,
)
from resnet_fast.cli.images import read_image

if TYPE_CHECKING:
    from torch import Tensor, nn

    from resnet_fast.models.preprocessing import Preprocessing

BATCH = 8


@dataclass(frozen=True)
class Network:
    """A loaded network with what belongs to its weights: where they are from, how to prepare images, class names."""

    model: nn.Module
    source: str
    preprocessing: Preprocessing
    labels: tuple[str, ...]


def load_network(arch: str, weights: str | None) -> Network:
    """The network ``arch`` with ``weights``: a name ("DEFAULT" if None) or a local checkpoint of any number of classes.

    Raises UserError where they cannot be had or do not fit.
    """
    from resnet_fast import models
    from resnet_fast.models import checkpoint
    from resnet_fast.models import weights as registry

    with as_user_errors(models.WeightsError, OSError, ValueError, TypeError):
        resolved = registry.resolve(arch, weights or "DEFAULT")
        if not isinstance(resolved, Path):
            if resolved is None:
                raise ValueError(f"{arch} has no default weights; give a checkpoint with --weights PATH")
            model = models.get_model(arch, weights=resolved)
            return Network(model.eval(), str(resolved), models.preprocessing(resolved), models.categories())
        state = checkpoint.read_checkpoint(resolved)
        head = state.get("fc.weight")
        outputs = len(head) if head is not None and head.ndim == 2 and len(head) else 1000
        model = models.get_model(arch, num_classes=outputs)
        checkpoint.load_into(model, state, source=str(resolved), name=arch)
        return Network(model.eval(), str(resolved), _preprocessing_of(arch, resolved), _labels(outputs, resolved))


def _preprocessing_of(arch: str, path: Path) -> Preprocessing:
    """That of the published file of the same name, otherwise the usual ImageNet evaluation."""
    from resnet_fast import models
    from resnet_fast.models import weights as registry

    for member in models.get_model_weights(arch):
        if Path(registry.url(member)).name == path.name:
            return models.preprocessing(member)
    return models.preprocessing()


def _labels(outputs: int, path: Path | None = None) -> tuple[str, ...]:
    """The names that ``train imagenet`` wrote into the file, else ImageNet's for a thousand, else numbers."""
    from safetensors import SafetensorError, safe_open

    from resnet_fast import models

    if path is not None and path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                found = json.loads((file.metadata() or {}).get("classes", "null"))
        except (SafetensorError, OSError, ValueError, RecursionError):
            found = None
        if isinstance(found, list) and len(found) == outputs and all(isinstance(name, str) for name in found):
            return tuple(found)
    names = models.categories()
    return names if outputs == len(names) else tuple(f"class {index}" for index in range(outputs))


def top(scores: Tensor, labels: tuple[str, ...], count: int) -> list[dict[str, Any]]:
    """The ``count`` most probable classes of one image, most probable first."""
    probabilities = scores.double().softmax(0)
    values, indices = probabilities.topk(min(count, len(labels)))
    return [
        {"index": int(index), "label": labels[int(index)], "probability": float(value)}
        for value, index in zip(values, indices, strict=True)
    ]


def classify(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="JPEG or PNG files.", show_default=False)],
    arch: Arch = "resnet50",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="NAME|PATH",
            help="Published weights by name, or a .pth or .safetensors file; by default the best published ones.",
        ),
    ] = None,
    topk: Annotated[int, typer.Option("--topk", "-k", min=1, help="Classes to show for every image.")] = 5,
    dtype: Dtype = Precision.float32,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Say what is on each IMAGE: the most probable classes, with the weights' own preprocessing.

    Images that cannot be read are named on stderr; the others are still classified, and the exit status is 1.
    """
    check_arch(arch)
    errors: dict[Path, str] = {}
    readable: list[Path] = []
    for path in images:  # bad files are found before anything is downloaded or built
        try:
            read_image(path)
            readable.append(path)
        except UserError as error:
            errors[path] = str(error)
    if not readable:
        raise UserError("; ".join(errors.values()))
    for message in errors.values():
        typer.echo(f"resnet-fast: {one_line(message)}", err=True)

    set_threads(threads)
    network = load_network(arch, weights)
    answers = _run(network, readable, topk, dtype)
    if as_json:
        data = {
            "schema": 1,
            "arch": arch,
            "weights": network.source,
            "dtype": dtype.value,
            "images": [{"path": str(path), "predictions": rows} for path, rows in answers.items()],
            "errors": [{"path": str(path), "error": message} for path, message in errors.items()],
        }
        write_json(data, "-")
    else:
        _print(answers, f"{arch}, {network.source}, {dtype.value}")
    return 1 if errors else 0


def _run(network: Network, paths: list[Path], topk: int, dtype: Precision) -> dict[Path, list[dict[str, Any]]]:
    import torch

    from resnet_fast.graph import optimize

    model = optimize(network.model, dtype=dtype.dtype)
    answers: dict[Path, list[dict[str, Any]]] = {}
    with progress_bar() as progress, torch.inference_mode():
        for start in range(0, len(paths), BATCH):
            chunk = paths[start : start + BATCH]
            progress(f"classifying {escape(chunk[0].name)}", start / len(paths))
            batch = torch.stack([network.preprocessing(read_image(path)) for path in chunk])
            scores = model(batch.to(dtype.dtype).contiguous(memory_format=torch.channels_last)).float()
            if not bool(torch.isfinite(scores).all()):
                raise UserError(f"the network's answers are not finite; is {network.source} damaged?")
            answers |= {path: top(row, network.labels, topk) for path, row in zip(chunk, scores, strict=True)}
    return answers


def _print(answers: dict[Path, list[dict[str, Any]]], title: str) -> None:
    table = Table(title=escape(title), title_justify="left", header_style="bold")
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("index", justify="right")
    table.add_column("probability", justify="right")
    for path, rows in answers.items():
        for position, row in enumerate(rows):
            name = str(path) if position == 0 else ""
            table.add_row(escape(name), escape(row["label"]), str(row["index"]), f"{row['probability']:.2%}",
                          end_section=position == len(rows) - 1)  # fmt: skip
    out_console().print(table)
