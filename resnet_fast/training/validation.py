"""Measure how well a network classifies a folder of images: in training after every epoch, and for weights as they are.

Images are read, cropped and normalised as in training's validation, by ``imagefolder``; nothing is printed here.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_fast.inference.classifier import Classifier
from resnet_fast.inference.errors import ClassifierError
from resnet_fast.models.preprocessing import Preprocessing
from resnet_fast.training import distributed, imagefolder
from resnet_fast.training.distributed import Processes

Progress = Callable[[str, float], None]
"""Called with the current stage and the fraction of it that is done, between 0 and 1."""


@dataclass(frozen=True)
class Evaluation:
    """Mean cross entropy and the fractions of images whose class was the first guess, or among the first five."""

    loss: float
    top1: float
    top5: float
    images: int


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Return torch's autocast to a dtype; one that does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


def evaluate(
    model: nn.Module,
    images: imagefolder.ValImages,
    processes: Processes,
    *,
    batch_size: int,
    workers: int,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda what, fraction: None,
) -> Evaluation:
    """Evaluate the model on all images that can be read, each counted once whatever the number of processes.

    Without label smoothing. With fewer than five classes "top 5" means all of them.

    Args:
        dtype: what autocast computes in.

    Raises:
        ValueError: none can be read.
    """
    device = processes.device
    loader = imagefolder.val_loader(
        images, batch=batch_size, rank=processes.rank, world_size=processes.world_size, workers=workers,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    before = model.training
    model.eval()
    with torch.no_grad():
        for number, (pixels, targets) in enumerate(loader, 1):
            progress("validation", number / len(loader))
            if not bool((targets >= 0).all()):
                pixels, targets = pixels[targets >= 0], targets[targets >= 0]
            if not len(targets):
                continue
            x = imagefolder.normalize(pixels.to(device, non_blocking=True), images.preprocessing)
            wanted = targets.to(device, non_blocking=True)
            with autocast(device, dtype):
                scores = model(x)
            scores = scores.float()
            loss += nn.functional.cross_entropy(scores, wanted, reduction="none").double().sum()
            hits = scores.topk(min(5, scores.shape[1])).indices == wanted[:, None]
            counts += torch.stack([hits[:, 0].sum(), hits.sum(), torch.full_like(counts[0], len(wanted))])
    model.train(before)
    counts, loss = distributed.total(counts, processes), distributed.total(loss, processes)
    top1, top5, seen = (int(count) for count in counts)
    if not seen:
        raise ValueError(f"{images.folder.root}: none of its {len(images)} images can be read")
    return Evaluation(float(loss) / seen, top1 / seen, top5 / seen, seen)


@dataclass(frozen=True)
class Validation:
    """What `validate` found.

    Attributes:
        evaluation: loss and accuracies. classes: how many have images. skipped: damaged images, left out.
        images_per_second: over all processes, reading included.
        note: what was assumed about the classes, "" if nothing.
    """

    evaluation: Evaluation
    classes: int
    skipped: int
    images_per_second: float
    note: str


def validate(
    classifier: Classifier,
    data: Path,
    processes: Processes,
    *,
    batch_size: int = 32,
    workers: int = 4,
    on_error: str = "skip",
    progress: Progress = lambda what, fraction: None,
) -> Validation:
    """Evaluate a network, prepared as its weights say, on ``data/<class>/`` with images.

    Args:
        on_error: "skip" leaves damaged images out, "stop" raises their error.

    Raises:
        ValueError: the folder has no such layout, its classes are not the network's, or the answers are not finite.
        ImageError: an image cannot be opened, or is damaged and must not be skipped; in the process that tried.
    """
    if not isinstance(classifier.prepare, Preprocessing):
        raise ClassifierError(f"{classifier.name}: a network with another preprocessing than the ten ResNets'")
    folder = imagefolder.scan(data, fewest=1)
    positions, note = class_positions(folder.classes, classifier.labels, data)
    classes = len(folder.classes)
    mapped = torch.tensor(positions)[torch.from_numpy(folder.targets)].numpy()
    folder = replace(folder, classes=classifier.labels, targets=mapped)
    images = imagefolder.ValImages(folder, classifier.prepare, on_error=on_error)
    began = time.perf_counter()
    found = evaluate(
        classifier.model, images, processes, batch_size=batch_size, workers=workers, progress=progress
    )  # fmt: skip
    seconds = time.perf_counter() - began
    if not found.loss < float("inf"):
        raise ClassifierError(f"the network's answers are not finite; is {classifier.source} damaged?")
    return Validation(found, classes, len(images) - found.images, len(images) / seconds, note)


def class_positions(folders: Sequence[str], labels: Sequence[str], data: Path) -> tuple[list[int], str]:
    """Return the output of each folder's class, and what was assumed, in words.

    Folders are matched with the names of the network's classes. ImageNet's thousand folders, named by WordNet numbers,
    are in the order of the outputs; so are folders for a network whose classes have no names.

    Raises:
        ClassifierError: if a folder is none of the classes, or a name stands for several.
    """
    if set(folders) <= set(labels):
        if doubled := [name for name in folders if labels.count(name) > 1]:
            raise ClassifierError(f"{data}: the network has several classes called {imagefolder.some(doubled)}")
        return [labels.index(name) for name in folders], ""
    if set(folders) <= {"train", "val", "test"}:
        raise ClassifierError(f"{data}: has folders {', '.join(folders)} instead of classes; give {data / folders[-1]}")
    in_order = list(range(len(folders)))
    numbers = [name for name in folders if re.fullmatch(r"n\d{8}", name)]
    if len(numbers) == len(folders) == len(labels) == 1000:
        return in_order, ""
    if len(numbers) == len(folders) and len(labels) == 1000:
        raise ClassifierError(
            f"{data}: has {len(folders)} folders named by WordNet numbers; their classes are known by their order, for "
            "which all 1000 are needed"
        )
    unnamed = all(label == f"class {index}" for index, label in enumerate(labels))
    if unnamed and len(folders) == len(labels):
        return (
            in_order,
            "the weights do not name their classes; they are taken to be in the order of the folders' names",
        )
    if unnamed:
        raise ClassifierError(f"{data}: has {len(folders)} classes, the network {len(labels)} without names")
    extra = [name for name in folders if name not in labels]
    raise ClassifierError(
        f"{data}: {imagefolder.some(extra)} {'is' if len(extra) == 1 else 'are'} none of the network's {len(labels)} "
        f"classes, {imagefolder.some(labels)}"
    )
