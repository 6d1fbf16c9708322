"""Images in folders named after their class, as training and validation data: scanning, cropping, flipping, sharding.

It needs Pillow and numpy, no torchvision. What it gives are uint8 pixels; ``normalize`` turns batches of them into what
a model takes, on the model's device. The layout is that of ImageNet and of torchvision's ImageFolder:
``DIR/train/<class>/*.jpg`` and ``DIR/val/<class>/*.jpg``.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from resnet_fast.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "SUFFIXES",
    "ImageError",
    "ImageFolder",
    "TrainImages",
    "ValImages",
    "crop_box",
    "normalize",
    "read_image",
    "reason",
    "scan",
    "train_loader",
    "val_loader",
]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
"""Files that end otherwise are no images; upper case counts too."""

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
MAX_PIXELS = 150_000_000
"""Larger images are refused before they are decoded: a small file can unfold to gigabytes."""

_CROP_ATTEMPTS = 10
_ASPECT = (3 / 4, 4 / 3)


class ImageError(ValueError):
    """An image file that cannot be read; the message is one line and begins with its path."""


@dataclass(frozen=True)
class ImageFolder:
    """The images below one folder.

    Args:
        root: the folder, with one folder for each class in it.
        classes: names of the classes, sorted; an image's target is a position in them.
        files: [N], paths relative to ``root`` as bytes. An array rather than a list: worker processes share its memory.
        targets: [N] int64.
    """

    root: Path
    classes: tuple[str, ...]
    files: np.ndarray[Any, np.dtype[np.bytes_]]
    targets: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self.files[index]))

    def digest(self) -> str:
        """A hash of the classes' and files' names, not of ``root`` or the pixels: the same data has the same one."""
        text = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        text.update(b"\0\0" + b"\0".join(self.files.tolist()))
        return text.hexdigest()[:16]


def scan(root: Path, classes: Sequence[str] | None = None) -> ImageFolder:
    """Finds the images of every class, sorted by name; classes in deeper folders belong to the topmost one.

    Args:
        root: the folder that holds one folder for each class.
        classes: what the classes must be; None takes what is there.

    Raises:
        ValueError: a folder is missing or empty, there are fewer than two classes, or not those of ``classes``.
    """
    layout = f"expected {root}/<class>/ with images ({', '.join(SUFFIXES)})"
    if not root.is_dir():
        raise ValueError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; {layout}")
    found = tuple(sorted(each.name for each in os.scandir(root) if each.is_dir() and not each.name.startswith(".")))
    if not found:
        raise ValueError(f"{root}: has no folders; {layout}")
    if classes is not None and found != tuple(classes):
        missing, extra = sorted({*classes} - {*found}), sorted({*found} - {*classes})
        parts = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("also has", extra)) if names]
        raise ValueError(
            f"{root}: {' and '.join(parts)}; its classes must be the {len(classes)} of the training images"
        )
    if len(found) < 2:
        raise ValueError(f"{root}: has one class only, {found[0]!r}; at least two are needed")
    files: list[bytes] = []
    targets: list[int] = []
    for target, name in enumerate(found):
        inside = sorted(_images(root, name))
        if not inside:
            raise ValueError(f"{root / name}: has no images; {layout}")
        files += inside
        targets += [target] * len(inside)
    return ImageFolder(root, found, np.array(files, dtype=np.bytes_), np.array(targets, dtype=np.int64))


def _images(root: Path, name: str) -> Iterator[bytes]:
    for folder, inner, names in os.walk(root / name, followlinks=True):
        inner[:] = [each for each in inner if not each.startswith(".")]
        for each in names:
            if each.lower().endswith(SUFFIXES) and not each.startswith("."):
                yield os.fsencode(os.path.relpath(os.path.join(folder, each), root))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def read_image(path: Path) -> Image:
    """The image in ``path`` in RGB, 8 bits a channel. As torchvision's ImageFolder it is not turned by its EXIF tag.

    Raises:
        ImageError: for anything but a whole image of at most ``MAX_PIXELS`` pixels in one of ``FORMATS``.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged EXIF tags and palettes; Pillow's own limit only warns
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(f"{path}: refused: {width} x {height} pixels, the limit is {MAX_PIXELS:,} pixels")
                if image.mode.startswith(("I", "F")):
                    raise ImageError(
                        f"{path}: has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits"
                    )
                return image.convert("RGB")
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{path}: not an image ({', '.join(FORMATS)})") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ImageError(f"{path}: damaged or unreadable image: {' '.join(str(error).split())}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: refused: {error}") from None


def reason(error: ImageError) -> str:
    """The one line of an ImageError: a DataLoader's worker wraps it in its traceback, whose last line it then is."""
    last = (str(error).strip().splitlines() or [""])[-1]
    return last.partition(f"{ImageError.__name__}: ")[2] or last


def crop_box(
    width: int, height: int, random: np.random.Generator, *, min_scale: float = 0.08
) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge of a random part of an image: torchvision's RandomResizedCrop.

    Its area is ``min_scale`` to 1 of the image's, evenly distributed, its aspect 3/4 to 4/3, evenly in the logarithm
    (Szegedy et al. 2014, arXiv:1409.4842, section 6). Where ten attempts do not fit, the largest centre crop that does.
    """
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * random.uniform(min_scale, 1.0)
        aspect = math.exp(random.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < _ASPECT[0]:
        h = max(1, round(w / _ASPECT[0]))
    elif width / height > _ASPECT[1]:
        w = max(1, round(h * _ASPECT[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class TrainImages(Dataset[tuple[Tensor, int]]):
    """Randomly cropped and flipped images, uint8 [image_size, image_size, 3], with their targets.

    What is drawn for an image depends on ``seed``, ``epoch`` and its index alone, not on who reads it or when.
    Set ``epoch`` before iterating over a loader.
    """

    def __init__(self, folder: ImageFolder, *, image_size: int = 224, min_scale: float = 0.08, seed: int = 0) -> None:
        self.folder = folder
        self.image_size = image_size
        self.min_scale = min_scale
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        random = np.random.default_rng((self.seed, self.epoch, index))
        image = read_image(self.folder.path(index))
        image = image.crop(crop_box(*image.size, random, min_scale=self.min_scale))
        image = image.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _pixels(image), int(self.folder.targets[index])


class ValImages(Dataset[tuple[Tensor, int]]):
    """Resized and centre-cropped images, uint8 [crop_size, crop_size, 3], with their targets."""

    def __init__(self, folder: ImageFolder, preprocessing: Preprocessing) -> None:
        self.folder = folder
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.preprocessing.crop(read_image(self.folder.path(index)))
        return _pixels(image), int(self.folder.targets[index])


def _pixels(image: Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3)


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """float32 [N, 3, H, W], channels_last, from uint8 [N, H, W, 3]: the arithmetic of ``Preprocessing``."""
    mean = torch.tensor(preprocessing.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(preprocessing.std, device=images.device).view(3, 1, 1)
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def train_loader(
    images: TrainImages,
    epoch: int,
    *,
    batch: int,
    skip: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Batches of one process in one epoch, full ones only, in an order drawn from the images' seed and the epoch.

    ``skip`` leaves out the first batches without reading them: the rest is what a loader without it would give.
    """
    images.epoch = epoch
    sampler: DistributedSampler[Any] = DistributedSampler(
        images, num_replicas=world_size, rank=rank, shuffle=True, seed=images.seed, drop_last=True
    )
    sampler.set_epoch(epoch)
    batches = list(BatchSampler(sampler, batch, drop_last=True))[skip:]
    return DataLoader(images, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory)


def val_loader(
    images: ValImages, *, batch: int, rank: int = 0, world_size: int = 1, workers: int = 0, pin_memory: bool = False
) -> DataLoader[Any]:
    """One process's share of the images, each exactly once over all processes.

    Shares may differ by one image: DistributedSampler would repeat images to make them equal, and count these twice.
    """
    share = range(rank, len(images), world_size)
    return DataLoader(images, batch_size=batch, sampler=share, num_workers=workers, pin_memory=pin_memory)
