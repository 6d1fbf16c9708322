"""Load a network with its preprocessing and the names of its classes, and classify images with it.

Published weights, local checkpoints and Caffe networks become one type, `Classifier`. Files are read elsewhere:
`resnet_fast.models.read_image` reads images, `resnet_fast.models.checkpoint` weights.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resnet_fast import models
from resnet_fast.graph.optimize import optimize as optimized
from resnet_fast.graph.snapshot import OptimizedModule
from resnet_fast.inference.errors import ClassifierError
from resnet_fast.inference.labels import labels_for, read_labels
from resnet_fast.models import checkpoint
from resnet_fast.models import weights as registry
from resnet_fast.models.checkpoint import readable
from resnet_fast.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Classifier", "ClassifierError", "Label", "Network", "check_choice", "from_module", "load", "load_network"]


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


@dataclass(frozen=True, repr=False)
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
        digest: a hash of parameters, preprocessing and labels, which tells whether two classifiers are the same.

    Examples:
        >>> import resnet_fast as rf
        >>> model = rf.resnet18(num_classes=2).eval()  # rf.inference.load("resnet50") for published weights
        >>> classifier = rf.inference.from_module(model, rf.models.preprocessing(), labels=["cat", "dog"])
        >>> classifier
        Classifier(ResNet, ResNet: 2 classes, 224x224, float32 on cpu)
        >>> [row] = classifier.top(classifier([rf.models.read_image("photo.jpg")]), topk=5)
        >>> sorted(each.label for each in row)
        ['cat', 'dog']
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
    digest: str = ""

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

    def __repr__(self) -> str:
        where = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        return f"Classifier({self.name}, {self.source}: {len(self.labels)} classes, {self.size}x{self.size}, {where})"

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
    weights: str | os.PathLike[str] | Enum | None = None,
    *,
    prototxt: Path | None = None,
    caffemodel: Path | None = None,
    mean: str | None = None,
    scale: float | None = None,
    labels: Path | Sequence[str] | None = None,
    preprocessing: Callable[[Image], Tensor] | None = None,
    image_size: int | None = None,
    resize_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    optimize: bool = True,
) -> Classifier:
    """Load a network with everything that belongs to it.

    Args:
        arch: name of one of the ten ResNets; None: the one that the weights name, or resnet50.
        weights: published weights, by name or as a member of the enum (None: the best), or a local checkpoint with any
            number of classes.
        prototxt, caffemodel: a Caffe network's definition and weights instead.
        mean, scale: of the Caffe network's images, as `load_caffe`.
        labels: names of the classes, or a text file with one a line; None: those of the weights.
        preprocessing: turns a Pillow image into a tensor [3, S, S]; None: the weights' own.
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
    if preprocessing is not None:
        classifier = replace(classifier, prepare=preprocessing, size=_prepared_size(preprocessing))
    if labels is not None:
        outputs = len(classifier.labels)
        names = read_labels(labels, outputs) if isinstance(labels, Path) else _checked(labels, outputs)
        classifier = replace(classifier, labels=names)
    return _ready(classifier, dtype, torch.device(device), optimize)


def from_module(
    model: nn.Module,
    preprocessing: Callable[[Image], Tensor],
    *,
    labels: Sequence[str] | None = None,
    probabilities: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    optimize: bool = True,
) -> Classifier:
    """Make a classifier of any module, which is run once on a black image to see its classes; it is not changed.

    Args:
        model: in eval mode; takes [N, 3, S, S], and returns scores [N, classes].
        preprocessing: turns a Pillow image of any size into a tensor [3, S, S].
        labels: names of the classes; None: ImageNet's for 1000 outputs, else "class 0" and so on.
        probabilities: whether the model returns probabilities instead of scores.
        dtype: what to compute in; None: the dtype of its parameters.
        device: where to compute; None: where its parameters are.
        optimize: run the network fused, as by `resnet_fast.optimize`, whose result is taken as it is.

    Raises:
        ClassifierError: if it is in training mode or does not take such images or return such scores, or there are
            other labels than classes.
    """
    if model.training:
        raise ClassifierError(f"model is a {type(model).__name__} in training mode; call model.eval() first")
    first = next((each for each in model.parameters() if each.is_floating_point()), torch.empty(0))
    dtype, device = dtype or first.dtype, torch.device(device or first.device)
    size = _prepared_size(preprocessing)
    example = torch.zeros(2, 3, size, size, dtype=first.dtype, device=first.device)
    try:
        with torch.inference_mode():
            scores = model(example)
    except Exception as error:
        raise ClassifierError(
            f"model is a {type(model).__name__}, which does not run on images [N, 3, {size}, {size}]: {readable(error)}"
        ) from error
    if not isinstance(scores, Tensor) or scores.shape[:1] != (2,) or scores.flatten(1).shape != scores.shape[:2]:
        found = list(scores.shape) if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise ClassifierError(
            f"model is a {type(model).__name__}, which returns {found} for two images; scores [N, classes] were "
            "expected"
        )
    outputs = scores.shape[1]
    optimize = optimize and not isinstance(model, OptimizedModule)
    names = labels_for(outputs) if labels is None else _checked(labels, outputs)
    name = type(model).__name__
    classifier = Classifier(model, name, name, preprocessing, size, names, probabilities)
    if device != first.device or (dtype != first.dtype and not optimize):
        classifier = replace(classifier, model=copy.deepcopy(model))
    return _ready(classifier, dtype, device, optimize)


def _ready(classifier: Classifier, dtype: torch.dtype, device: torch.device, optimize: bool) -> Classifier:
    """Return the classifier on the device, fused if asked."""
    digest = _digest(classifier)
    model = classifier.model.to(device)
    if optimize:
        example = torch.empty(1, 3, classifier.size, classifier.size, device="meta")
        model = optimized(model, dtype=dtype, example_inputs=example)
    elif dtype != torch.float32 or next(model.parameters(), torch.empty(0)).dtype != dtype:
        model = model.to(dtype)
    return replace(classifier, model=model, dtype=dtype, device=device, digest=digest)


def _digest(classifier: Classifier) -> str:
    """Return a hash of everything that decides an answer but arithmetic."""
    import xxhash

    found = xxhash.xxh3_128()
    tensors = {**classifier.model.state_dict(), "mean": getattr(classifier.prepare, "mean", None)}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.numel():
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    found.update(json.dumps([repr(classifier.prepare), classifier.labels, classifier.probabilities]).encode())
    return found.hexdigest()


def _prepared_size(preprocessing: Callable[[Image], Tensor]) -> int:
    """Return the height and width that the preprocessing gives a black image."""
    from PIL import Image

    try:
        found = preprocessing(Image.new("RGB", (64, 64)))
    except Exception as error:
        raise ClassifierError(
            f"preprocessing fails on a black Pillow image of 64x64 pixels, as {type(error).__name__}: {readable(error)}"
        ) from error
    if not isinstance(found, Tensor) or found.dim() != 3 or found.shape[0] != 3 or found.shape[1] != found.shape[2]:
        shown = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ClassifierError(f"preprocessing returns {shown}; a tensor [3, S, S] was expected")
    return found.shape[1]


def _checked(labels: Sequence[str], outputs: int) -> tuple[str, ...]:
    if isinstance(labels, str) or not all(isinstance(each, str) for each in labels):
        raise ClassifierError("labels must be a sequence of strings")
    if len(labels) != outputs:
        raise ClassifierError(f"labels has {len(labels)} names, the network has {outputs} classes")
    return tuple(labels)


def check_choice(
    arch: str | None = None,
    weights: str | os.PathLike[str] | Enum | None = None,
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
        if weights is not None and str(weights).endswith(".caffemodel"):
            raise ClassifierError(
                f"{weights}: Caffe's weights are given with --caffemodel, their definition with --prototxt"
            )
        return
    for option, named in (("--arch", arch), ("--weights", weights)):
        if named is not None:
            raise ClassifierError(
                f"{option} names one of the ten ResNets, --prototxt a Caffe network; give one of the two"
            )
    if size is not None:
        raise ClassifierError("--image-size and --resize-size belong to the ten ResNets; a definition has its own size")
    if caffemodel is None:
        raise ClassifierError(f"{prototxt}: a definition has no weights; give them with --caffemodel FILE")


def load_network(arch: str | None, weights: str | os.PathLike[str] | Enum | None) -> Network:
    """Load one of the ten ResNets, in eval mode, not optimized.

    Args:
        arch: the model's name; None for the one that the weights name, or resnet50.
        weights: a name ("DEFAULT" if None), a member of an enum, or a local checkpoint with any number of classes.

    Raises:
        ClassifierError: if the weights cannot be downloaded or read, or do not fit.
    """
    weights = weights or "DEFAULT"
    with _as_classifier_errors():
        enum = type(weights).__name__ if isinstance(weights, Enum) else str(weights).partition(".")[0]
        arch_or_default = arch or registry.model_of(enum) or "resnet50"
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
