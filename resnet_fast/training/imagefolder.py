"""Images in folders named after their class, as training and validation data: scanning, cropping, flipping, sharding.

It needs Pillow and numpy, no torchvision; images are read by ``resnet_fast.models``. What it gives are uint8 pixels;
``normalize`` turns batches of them into what a model takes, on the model's device. The layout is that of ImageNet and
of torchvision's ImageFolder: ``DIR/train/<class>/*.jpg`` and ``DIR/val/<class>/*.jpg``.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import signal
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from resnet_fast.models.images import (
    ImageError,
    UnopenedImageError,
    check_image,
    find_images,
    is_folder,
    read_image,
)
from resnet_fast.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

ON_ERROR = ("skip", "stop")
"""Choices for damaged images."""

MAX_NAMES_BYTES = 2**30
"""Longer lists of names are refused. That of ImageNet has 40 MB."""

_WORTH_WORKERS = 1000
"""Fewer images are checked without worker processes, which would take longer to start."""

_CROP_ATTEMPTS = 10
_ASPECT = (3 / 4, 4 / 3)


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
        """Return a hash of the classes' and files' names, not of ``root`` or the pixels, to recognise the same data."""
        text = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        text.update(b"\0\0" + b"\0".join(self.files.tolist()))
        return text.hexdigest()[:16]


def pack_names(folder: ImageFolder) -> Tensor:
    """Return the files' names, compressed, for a checkpoint: uint8 [n]."""
    packed = zlib.compress(b"\0".join(folder.files.tolist()), 1)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def unpack_names(packed: Tensor) -> set[bytes]:
    """Return the names that `pack_names` packed.

    Raises:
        ValueError: if it is nothing of that kind, or longer than MAX_NAMES_BYTES.
    """
    stream = zlib.decompressobj()
    try:
        names = stream.decompress(packed.numpy().tobytes(), MAX_NAMES_BYTES)
    except zlib.error as error:
        raise ValueError(f"not a list of names ({error})") from None
    if not stream.eof:
        raise ValueError("not a list of names, or too long")
    return set(names.split(b"\0"))


def scan(root: Path, classes: Sequence[str] | None = None, *, fewest: int = 2) -> ImageFolder:
    """Find the images of every class, sorted by name; classes in deeper folders belong to the topmost one.

    Args:
        root: the folder that holds one folder for each class.
        classes: what the classes must be; None takes what is there. fewest: how many there must be.

    Raises:
        ValueError: a folder is missing or empty, there are fewer than `fewest` classes, or not those of ``classes``.
    """
    layout = f"expected {root}/<class>/ with images (.jpg, .png, .webp and others that Pillow reads)"
    if not root.is_dir():
        raise ValueError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; {layout}")
    with os.scandir(root) as inside:
        found = tuple(sorted(each.name for each in inside if not each.name.startswith(".") and is_folder(each)))
    if not found:
        raise ValueError(f"{root}: has no folders; {layout}")
    if classes is not None and found != tuple(classes):
        missing, extra = sorted({*classes} - {*found}), sorted({*found} - {*classes})
        parts = [f"{what} {some(names)}" for what, names in (("lacks", missing), ("also has", extra)) if names]
        raise ValueError(
            f"{root}: {' and '.join(parts)}; its classes must be the {len(classes)} of the training images"
        )
    if len(found) < fewest:
        raise ValueError(f"{root}: has one class only, {found[0]!r}; at least two are needed")
    files: list[bytes] = []
    targets: list[int] = []
    for target, name in enumerate(found):
        try:
            images = sorted(os.fsencode(path[len(os.path.join(root, "")) :]) for path in find_images(root / name))
        except OSError as error:
            raise ValueError(f"{error.filename}: cannot be listed ({error.strerror})") from error
        if not images:
            raise ValueError(f"{root / name}: has no images; {layout}")
        files += images
        targets += [target] * len(images)
    return ImageFolder(root, found, np.array(files, dtype=np.bytes_), np.array(targets, dtype=np.int64))


def some(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def reason(error: ImageError) -> str:
    """Return the one line of an ImageError; a DataLoader's worker wraps it in a traceback, as its last line."""
    last = (str(error).strip().splitlines() or [""])[-1]
    return last.partition(f"{type(error).__name__}: ")[2] or last


def crop_box(
    width: int, height: int, random: np.random.Generator, *, min_scale: float = 0.08
) -> tuple[int, int, int, int]:
    """Return the left, upper, right and lower edge of a random part of an image: torchvision's RandomResizedCrop.

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


@dataclass(eq=False)
class TrainImages(Dataset[tuple[Tensor, int, int]]):
    """Randomly cropped and flipped images, uint8 [crop_size, crop_size, 3], with their targets.

    What is drawn for an image depends on ``seed``, ``epoch`` and its index alone, not on who reads it or when.
    Set ``epoch`` before iterating over a loader.

    The third value is 1 if the image is damaged and, with ``on_error`` "skip", the next one that is not stands in for
    it, cropped as was drawn for the damaged one; otherwise 0.
    """

    folder: ImageFolder
    preprocessing: Preprocessing
    _: KW_ONLY
    min_scale: float = 0.08
    seed: int = 0
    on_error: str = "skip"
    epoch: int = field(default=0, init=False)

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        from PIL import Image

        random = np.random.default_rng((self.seed, self.epoch, index))
        image, used = self._read(index)
        image = image.crop(crop_box(*image.size, random, min_scale=self.min_scale))
        size, resampling = self.preprocessing.crop_size, self.preprocessing.interpolation.upper()
        image = image.resize((size, size), Image.Resampling[resampling])
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _pixels(image), int(self.folder.targets[used]), int(used != index)

    def _read(self, index: int) -> tuple[Image, int]:
        """Return image ``index``, or the next one that can be read, and its index."""
        first: ImageError | None = None
        for used in itertools.chain(range(index, len(self)), range(index)):
            try:
                return read_image(self.folder.path(used)), used
            except UnopenedImageError:
                raise
            except ImageError as error:
                if self.on_error == "stop":
                    raise
                first = first or error
        assert first is not None
        raise first


@dataclass(eq=False)
class ValImages(Dataset[tuple[Tensor, int]]):
    """Resized and centre-cropped images, uint8 [crop_size, crop_size, 3], with their targets.

    With ``on_error`` "skip" a damaged image is black, and its target -1.
    """

    folder: ImageFolder
    preprocessing: Preprocessing
    _: KW_ONLY
    on_error: str = "skip"

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image = self.preprocessing.crop(read_image(self.folder.path(index)))
        except UnopenedImageError:
            raise
        except ImageError:
            if self.on_error == "stop":
                raise
            return torch.zeros(self.preprocessing.crop_size, self.preprocessing.crop_size, 3, dtype=torch.uint8), -1
        return _pixels(image), int(self.folder.targets[index])


@dataclass(eq=False)
class _Checked(Dataset[int]):
    """The index of an image that cannot be read, -1 for the others."""

    folder: ImageFolder
    whole: bool

    def error(self, index: int) -> ImageError | None:
        try:
            (read_image if self.whole else check_image)(self.folder.path(index))
        except ImageError as error:
            return error
        return None

    def __getitem__(self, index: int) -> int:
        return -1 if self.error(index) is None else index


def _end_on_sigterm(_worker: int) -> None:
    """End a worker silently on a signal to the whole process group; torch expects one from the parent alone."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def unreadable(
    folder: ImageFolder, *, whole: bool, share: Sequence[int], workers: int = 0
) -> Iterator[tuple[int, list[ImageError]]]:
    """Read the images of ``share``, whole or their headers alone; yield how many are done, and the errors."""
    workers = workers if len(share) >= _WORTH_WORKERS else 0
    images = _Checked(folder, whole)
    loader = DataLoader(images, batch_size=64, sampler=share, num_workers=workers, worker_init_fn=_end_on_sigterm)
    done = 0
    for found in loader:
        done += len(found)
        yield done, [error for index in found[found >= 0].tolist() if (error := images.error(index)) is not None]


def _pixels(image: Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3)


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return float32 [N, 3, H, W], channels_last, from uint8 [N, H, W, 3], with the arithmetic of ``Preprocessing``."""
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
    """Return one process's batches of an epoch, full ones only, in an order drawn from the images' seed and the epoch.

    ``skip`` leaves out the first batches without reading them: the rest is what a loader without it would give.
    """
    images.epoch = epoch
    sampler: DistributedSampler[Any] = DistributedSampler(
        images, num_replicas=world_size, rank=rank, shuffle=True, seed=images.seed, drop_last=True
    )
    sampler.set_epoch(epoch)
    batches = list(BatchSampler(sampler, batch, drop_last=True))[skip:]
    return DataLoader(
        images, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory, worker_init_fn=_end_on_sigterm
    )


def val_loader(
    images: ValImages, *, batch: int, rank: int = 0, world_size: int = 1, workers: int = 0, pin_memory: bool = False
) -> DataLoader[Any]:
    """Return one process's share of the images, each exactly once over all processes.

    Shares may differ by one image: DistributedSampler would repeat images to make them equal, and count these twice.
    """
    share = range(rank, len(images), world_size)
    return DataLoader(
        images,
        batch_size=batch,
        sampler=share,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_end_on_sigterm,
    )
