"""Load a network with its preprocessing and the names of its classes, and classify images with it.

Published weights, local checkpoints and Caffe networks become one type, `Classifier`. Files are read elsewhere:
`resnet_fast.models.read_image` reads images, `resnet_fast.models.checkpoint` weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resnet_fast import models
from resnet_fast.graph.optimize import optimize as optimized
from resnet_fast.inference.errors import ClassifierError
from resnet_fast.inference.labels import labels_for, read_labels
from resnet_fast.models import checkpoint
from resnet_fast.models import weights as registry
from resnet_fast.models.checkpoint import readable
from resnet_fast.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Classifier", "ClassifierError", "Label", "Network", "check_choice", "load", "load_network"]


@dataclass(frozen=True)
class Label:
    """One class of an answer: its position among the outputs, its name, and its probability from 0 to 1."""

    index: int
    label: str
    probability: float


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
    """A network ready to classify: call it with images, and `top` names the most probable classes.

    Attributes:
        model: takes batches [N, 3, size, size] of `dtype` on `device`; returns [N, classes] or [N, classes, 1, 1].
        name, source: names of the network and of its weights.
        prepare: turns an image into a float32 tensor [3, size, size]; it can be sent to other processes.
        size: height and width, in pixels, of the prepared images.
        labels: names of the classes.
        probabilities: whether the model returns probabilities instead of scores.
        notes: what was assumed, in lines for the user.

    Examples:
        >>> from resnet_fast.inference import load
        >>> classifier = load("resnet50")
        >>> rows = classifier.top(classifier([rf.models.read_image("photo.jpg")]), 5)
        >>> rows[0][0].label
        'tabby'
    """

    model: nn.Module
    name: str
    source: str
    prepare: Callable[[Image], Tensor]
    size: int
    labels: tuple[str, ...]
    probabilities: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    notes: tuple[str, ...] = ()

    def __call__(self, images: Sequence[Image]) -> Tensor:
        """Return the probabilities of the classes, float64 [N, classes] on the CPU, of Pillow images of any size.

        Raises:
            TypeError: if one is not a Pillow image.
            ValueError: if one has floating point pixels or none.
            ClassifierError: if the network's answers are not finite.
        """
        if not images:
            return torch.empty(0, len(self.labels), dtype=torch.float64)
        return self.predict(torch.stack([self.prepare(image) for image in images]))

    def predict(self, batch: Tensor) -> Tensor:
        """Return the probabilities of the classes, float64 [N, classes], of prepared images [N, 3, size, size].

        Raises:
            ClassifierError: if the network's answers are not finite.
        """
        with torch.inference_mode():
            batch = batch.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
            # float64 keeps the order of classes whose float32 probabilities would both be 0.
            scores = self.model(batch).float().flatten(1).cpu().double()
            if not bool(torch.isfinite(scores).all()):
                raise ClassifierError(f"the network's answers are not finite; is {self.source} damaged?")
            return scores if self.probabilities else scores.softmax(1)

    def top(self, probabilities: Tensor, topk: int = 5) -> list[list[Label]]:
        """Return the `topk` most probable classes of each image, the most probable first; all if there are fewer.

        Args:
            probabilities: [N, classes].
        """
        return [top(row, self.labels, topk) for row in probabilities]


def top(probabilities: Tensor, labels: Sequence[str], topk: int) -> list[Label]:
    """Return the `topk` most probable classes of one image, [classes], the most probable first."""
    values, indices = probabilities.topk(min(topk, len(labels)))
    return [Label(i, labels[i], value) for value, i in zip(values.tolist(), indices.tolist(), strict=True)]


def load(
    arch: str | None = None,
    weights: str | None = None,
    *,
    prototxt: Path | None = None,
    caffemodel: Path | None = None,
    mean: str | None = None,
    scale: float | None = None,
    labels: Path | None = None,
    image_size: int | None = None,
    resize_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    optimize: bool = True,
) -> Classifier:
    """Load a network with everything that belongs to it.

    Args:
        arch: name of one of the ten ResNets; None: the one that the weights name, or resnet50.
        weights: published weights by name (None: the best) or a local checkpoint with any number of classes.
        prototxt, caffemodel: a Caffe network's definition and weights instead.
        mean, scale: of the Caffe network's images, as `load_caffe`.
        labels: a text file with the names of the classes, one a line; None: those of the weights.
        image_size, resize_size: crop, and shorter side before it, in pixels; None: the weights'.
        dtype: what to compute in.
        device: where to compute.
        optimize: run the network fused, as by `resnet_fast.optimize`.

    Raises:
        ClassifierError: if the arguments name no network or two, or a file cannot be downloaded, read, or used.
    """
    check_choice(arch, weights, prototxt, caffemodel, mean, scale, image_size or resize_size)
    if prototxt is not None and caffemodel is not None:
        from resnet_fast.inference.caffe_network import load_caffe

        found = load_caffe(prototxt, caffemodel, mean, scale)
        classifier = Classifier(
            found.model, found.name, str(caffemodel), found.prepare, found.size, labels_for(found.outputs),
            found.probabilities, notes=found.notes,
        )  # fmt: skip
    else:
        network = load_network(arch, weights)
        prepare = network.preprocessing
        if image_size is not None or resize_size is not None:
            prepare = prepare.for_size(image_size, resize_size)
        classifier = Classifier(network.model, network.arch, network.source, prepare, prepare.crop_size, network.labels)
    if labels is not None:
        classifier = replace(classifier, labels=read_labels(labels, len(classifier.labels)))
    model = classifier.model.to(device)
    if optimize:
        example = torch.empty(1, 3, classifier.size, classifier.size, device="meta")
        model = optimized(model, dtype=dtype, example_inputs=example)
    else:
        model = model.to(dtype)
    return replace(classifier, model=model, dtype=dtype, device=torch.device(device))


def check_choice(
    arch: str | None = None,
    weights: str | None = None,
    prototxt: Path | None = None,
    caffemodel: Path | None = None,
    mean: str | None = None,
    scale: float | None = None,
    size: int | None = None,
) -> None:
    """Raise ClassifierError unless the arguments of `load` name one network; no file is touched."""
    if prototxt is None:
        for option, given in (("--caffemodel", caffemodel), ("--mean", mean), ("--scale", scale)):
            if given is not None:
                raise ClassifierError(f"{option} belongs to a Caffe network; give its definition with --prototxt FILE")
        if arch is not None and arch not in models.list_models():
            raise ClassifierError(f"unknown arch {arch!r}; there are {', '.join(models.list_models())}")
        if weights is not None and weights.endswith(".caffemodel"):
            raise ClassifierError(
                f"{weights}: Caffe's weights are given with --caffemodel, their definition with --prototxt"
            )
        return
    for option, given in (("--arch", arch), ("--weights", weights)):
        if given is not None:
            raise ClassifierError(
                f"{option} names one of the ten ResNets, --prototxt a Caffe network; give one of the two"
            )
    if size is not None:
        raise ClassifierError("--image-size and --resize-size belong to the ten ResNets; a definition has its own size")
    if caffemodel is None:
        raise ClassifierError(f"{prototxt}: a definition has no weights; give them with --caffemodel FILE")


def load_network(arch: str | None, weights: str | None) -> Network:
    """Load one of the ten ResNets, in eval mode, not optimized.

    Args:
        arch: the model's name; None for the one that the weights name, or resnet50.
        weights: a name ("DEFAULT" if None) or a local checkpoint with any number of classes.

    Raises:
        ClassifierError: if the weights cannot be downloaded or read, or do not fit.
    """
    weights = weights or "DEFAULT"
    with _as_classifier_errors():
        arch_or_default = arch or registry.model_of(weights.partition(".")[0]) or "resnet50"
        resolved = registry.resolve(arch_or_default, weights)
        if not isinstance(resolved, Path):
            if resolved is None:
                raise ValueError(f"{arch_or_default} has no default weights; give a checkpoint with --weights PATH")
            model = models.get_model(arch_or_default, weights=resolved)
            prepare, names = models.preprocessing(resolved), models.categories(resolved)
            return Network(model.eval(), str(resolved), prepare, names, arch_or_default)
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
        wiring: dict[str, Any] = {"stride_in_1x1": True} if metadata.get("stride_in_1x1") == "true" else {}
        model = models.get_model(arch_or_default, num_classes=outputs, **wiring)
        checkpoint.load_into(model, state, source=str(resolved), name=arch_or_default)
        return Network(model.eval(), str(resolved), prepare, labels_for(outputs, metadata), arch_or_default)


@contextlib.contextmanager
def _as_classifier_errors() -> Iterator[None]:
    try:
        yield
    except (models.WeightsError, OSError, ValueError, TypeError) as error:
        raise ClassifierError(readable(error, 600)) from error
