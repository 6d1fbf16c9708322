"""`resnet_fast.predict`: from images of any kind to labels, in one call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from resnet_fast import models
from resnet_fast.inference.classifier import Classifier, Label, from_module, load, top
from resnet_fast.inference.errors import ClassifierError
from resnet_fast.inference.sources import expanded, read_up_to, why_empty
from resnet_fast.inference.stream import BATCH_SIZE, WORKERS, read_bounded, stream
from resnet_fast.models.checkpoint import readable
from resnet_fast.models.images import ImageError, NamedBytes, to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ON_ERROR", "Prediction", "predict"]

ON_ERROR = ("raise", "return")
"""Choices for an image that cannot be read."""

MAX_BYTES = 2**28
"""Binary files that give more are refused, since their content is held in memory."""

OneImage: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image | np.ndarray[Any, Any] | Tensor"
)
"""What stands for an image, or for several: a folder, a pattern, an array or a tensor with a leading axis."""


@dataclass(frozen=True, repr=False)
class Prediction:
    """The answer to one image.

    Attributes:
        source: its path, or "images[3]" for the fourth one that was given as pixels or bytes.
        labels: the most probable classes, the most probable first; empty if the image cannot be read.
        error: why it cannot be read; None if it can.

    Examples:
        >>> Prediction("cat.jpg", (Label(281, "tabby", 0.612), Label(282, "tiger cat", 0.23)))
        Prediction('cat.jpg': tabby 61.2 %, tiger cat 23.0 %)
    """

    source: str
    labels: tuple[Label, ...]
    error: ImageError | None = None

    @property
    def label(self) -> str | None:
        """The name of the most probable class; None if there is an error."""
        return self.labels[0].label if self.labels else None

    @property
    def probability(self) -> float | None:
        """The probability of the most probable class, from 0 to 1; None if there is an error."""
        return self.labels[0].probability if self.labels else None

    def __repr__(self) -> str:
        shown = ", ".join(f"{readable(each.label, 60)} {each.probability * 100:.1f} %" for each in self.labels)
        return f"Prediction({self.source!r}: {shown if self.error is None else f'error: {self.error}'})"


def predict(
    images: OneImage | Iterable[OneImage],
    model: str | os.PathLike[str] | Enum | Classifier | nn.Module | None = None,
    *,
    preprocessing: Callable[[Image], Tensor] | None = None,
    labels: Sequence[str] | None = None,
    topk: int = 5,
    batch_size: int = BATCH_SIZE,
    workers: int = WORKERS,
    on_error: str = "raise",
    device: str | torch.device | None = None,
) -> list[Prediction]:
    """Return the most probable classes of images, prepared as the network's weights expect.

    Every image is turned upright as its EXIF tag says, and becomes RGB with 8 bits as by `rf.models.read_image`; of an
    animation the first frame is taken. Reading goes on in threads while the network computes; of an iterator at most
    two batches are taken ahead.

    Args:
        images: one of these, or an iterable of them:
            the path of a file, of a folder (all images below it, by name), or a pattern such as "photos/**/*.jpg", if
            no file of that name exists;
            the bytes of an image file, or a binary file, read from where it stands;
            a Pillow image;
            a NumPy array uint8 [H, W, 3] (RGB; OpenCV's BGR needs `[..., ::-1]`), [H, W, 4] (RGBA), [H, W] or
            [H, W, 1] (grey), or several as [N, H, W, C];
            a tensor uint8 [3, H, W], [1, H, W] or [4, H, W], or several as [N, C, H, W].
        model: the name of one of the ten ResNets, published weights ("ResNet50_Weights.IMAGENET1K_V2", or a member of
            the enum), a checkpoint's path; or a `Classifier`, which saves loading in further calls; or a module in eval
            mode that takes [N, 3, H, W] and returns scores [N, classes]. None is resnet50 with its best weights.
        preprocessing: turns a Pillow image into a tensor [3, H, W]: `rf.models.Preprocessing`, or torchvision's or your
            own; needed for a module, and replaces that of a network loaded by name.
        labels: names of the classes, in the order of the outputs; None: those of the weights; for a module ImageNet's
            if it has 1000 outputs, else "class 0" and so on.
        topk: number of classes for each image; all if there are fewer.
        batch_size: images that the network takes at once. workers: threads that read images.
        on_error: "raise" ends at the first image that cannot be read; "return" gives it a Prediction with its `error`.
        device: where to compute; None: where the module is, else the CPU.

    Returns:
        one Prediction per image, in their order.

    Raises:
        ImageError: an image cannot be read, with `on_error` "raise".
        ClassifierError: the model cannot be loaded, or does not classify.
        TypeError: an image or the model is of another type.
        ValueError: an option out of range, an array of another shape or dtype, or a folder without images.

    Examples:
        >>> import resnet_fast as rf
        >>> model = rf.resnet18(num_classes=2).eval()  # or "resnet50" for published weights
        >>> prepare = rf.models.Preprocessing(resize_size=256, crop_size=224)
        >>> [found] = rf.predict("photo.jpg", model, preprocessing=prepare, labels=["cat", "dog"])
        >>> found.source, found.error, len(found.labels)
        ('photo.jpg', None, 2)
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error is {on_error!r}, it must be one of {', '.join(ON_ERROR)}")
    for name, value in (("topk", topk), ("batch_size", batch_size), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} is {value}, it must be at least 1")
    classifier = _classifier(model, preprocessing, labels, device)
    found: list[Prediction] = []
    for item, outcome in stream(_items(images), classifier, _read, batch_size=batch_size, workers=workers):
        if isinstance(outcome, Tensor):
            found.append(Prediction(item.name, tuple(top(outcome, classifier.labels, topk))))
        elif on_error == "raise":
            raise outcome
        else:
            found.append(Prediction(item.name, (), outcome))
    return found


def _classifier(
    model: Any,
    preprocessing: Callable[[Image], Tensor] | None,
    labels: Sequence[str] | None,
    device: str | torch.device | None,
) -> Classifier:
    if isinstance(model, nn.Module):
        if preprocessing is None:
            raise ClassifierError(
                f"model is a {type(model).__name__}, which does not say how its images are prepared; give "
                "preprocessing=, such as rf.models.preprocessing(weights) or rf.models.Preprocessing(256, 224)"
            )
        return from_module(model, preprocessing, labels=labels, device=device)
    if isinstance(model, Classifier):
        for name, value in (("preprocessing", preprocessing), ("labels", labels), ("device", device)):
            if value is not None:
                raise ClassifierError(f"{name} is part of the Classifier that was given; leave one of the two out")
        return model
    if model is not None and not isinstance(model, str | os.PathLike | Enum):
        raise TypeError(f"model is a {type(model).__name__}; a name, weights, a Classifier or a module was expected")
    is_arch = isinstance(model, str) and model in models.list_models()
    arch, weights = (str(model), None) if is_arch else (None, model)
    return load(arch, weights, preprocessing=preprocessing, labels=labels, device="cpu" if device is None else device)


# -------------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True, eq=False)
class _Item:
    """One image: its name in the answer; its path, encoded bytes, the image, or why there is none."""

    name: str
    content: str | bytes | Image | ImageError


def _read(item: _Item) -> Image:
    if isinstance(item.content, ImageError):
        raise item.content
    if isinstance(item.content, str):
        return read_bounded(item.content)
    if isinstance(item.content, bytes):
        return read_bounded(NamedBytes(item.content, item.name))
    return item.content


def _items(images: Any) -> Iterator[_Item]:
    """Yield the images in the caller's thread: what is not a path is copied, since its owner may reuse its memory."""
    several = not _is_one(images)
    if several and (not isinstance(images, Iterable) or isinstance(images, Mapping)):
        raise TypeError(f"images is a {type(images).__name__}; {_RIGHT}")
    for position, each in enumerate(images if several else (images,)):
        yield from _of(each, f"images[{position}]")


_RIGHT = "a path, bytes, a binary file, a Pillow image, an array, a tensor, or an iterable of these was expected"


def _is_one(value: Any) -> bool:
    from PIL import Image

    kinds = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray, Tensor, Image.Image)
    return isinstance(value, kinds) or hasattr(value, "read")


def _of(value: Any, name: str) -> Iterator[_Item]:
    from PIL import Image

    if isinstance(value, str | os.PathLike):
        for each in _expand(str(os.fsdecode(value))):  # of NumPy's strings too
            yield _Item(each, each)
    elif isinstance(value, bytes | bytearray | memoryview):
        yield _Item(name, bytes(value))
    elif isinstance(value, Image.Image):
        yield _Item(name, _upright(value, name))
    elif isinstance(value, Tensor | np.ndarray):
        yield from _arrays(value, name)
    elif hasattr(value, "read"):
        try:
            content = read_up_to(value, MAX_BYTES)
        except TypeError:
            raise TypeError(f"{name}: a file that does not give bytes; open it in binary mode") from None
        if len(content) > MAX_BYTES:
            raise ValueError(f"{name}: gives more than the limit of {MAX_BYTES:,} bytes")
        path = getattr(value, "name", name)
        yield _Item(path if isinstance(path, str) else name, content)
    else:
        raise TypeError(f"{name} is a {type(value).__name__}; {_RIGHT}")


def _expand(path: str) -> list[str]:
    """Return the files that a path stands for: itself, the images below a folder, or what matches a pattern.

    Raises:
        ValueError: if there are none.
    """
    images = expanded(path)
    try:
        found = [path] if images is None else list(images)
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be listed ({error.strerror})") from error
    if not found:
        raise ValueError(f"{path}: {why_empty(path)}")
    return found


def _upright(image: Image, name: str) -> Image | ImageError:
    """Return a copy as `read_image` would give it of the image's file."""
    from PIL import ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged EXIF tags
        try:
            image.load()
        except Exception as error:  # decoders have no common error
            return ImageError(f"{name}: damaged or unreadable image: {readable(error)}")
        try:
            turned = ImageOps.exif_transpose(image)
        except Exception:  # what a damaged tag says of the pixels is advice
            turned = image.copy()
    try:
        return to_rgb(turned)
    except ValueError as error:
        return ImageError(f"{name}: {readable(error)}")


def _arrays(value: Tensor | np.ndarray[Any, Any], name: str) -> Iterator[_Item]:
    """Yield the images of an array [H, W], [H, W, C] or [N, H, W, C], or of a tensor [C, H, W] or [N, C, H, W]."""
    from PIL import Image

    right = (
        "uint8 [C, H, W] or [N, C, H, W]" if isinstance(value, Tensor) else "uint8 [H, W, C], [H, W] or [N, H, W, C]"
    )
    pixels = value.detach().cpu().numpy() if isinstance(value, Tensor) and value.dtype == torch.uint8 else value
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        raise ValueError(
            f"{name}: pixels of dtype {value.dtype}, whose range is not known; {right} from 0 to 255 was expected"
        )
    if isinstance(value, Tensor):
        pixels = np.moveaxis(pixels, -3, -1) if pixels.ndim in (3, 4) else pixels[..., None, None, None]
    elif pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim not in (3, 4) or pixels.shape[-1] not in (1, 3, 4):
        raise ValueError(f"{name}: an array of shape {list(value.shape)}; {right}, C of 1, 3 or 4, was expected")
    several = pixels.ndim == 4
    for number, each in enumerate(pixels if several else (pixels,)):
        shown = f"{name}[{number}]" if several else name
        if 0 in each.shape:
            yield _Item(shown, ImageError(f"{shown}: has no pixels"))
            continue
        one = np.ascontiguousarray(each[..., 0] if each.shape[-1] == 1 else each)
        yield _Item(shown, to_rgb(Image.fromarray(one)))  # one of the two copies, whatever the number of channels
