"""Turn an image into the tensor a model expects: resize, centre crop, scale, normalise.

The numbers are those of torchvision's ImageClassification preset for a Pillow image, without torchvision or numpy.
Weights files keep what they expect in their metadata, by `Preprocessing.to_metadata`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from resnet_fast.models.images import read_image, to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MAX_SIZE", "Preprocessing"]

MAX_SIZE = 4096
"""Files that ask for larger images are refused: a batch of them would take gigabytes before any layer runs."""

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_SUPPORT = 3
"""Reach of the widest filter to each side, in pixels of the image or of the result, whichever are larger."""

_MAX_RESIZED = 2**26
"""Largest resized image, in pixels, that is made whole; of larger ones only the crop is made."""


@dataclass(frozen=True)
class Preprocessing:
    """Turn an image of any size into a float32 tensor [3, crop_size, crop_size].

    A Pillow image is used as it is, as by torchvision's presets; a path, or a binary file, is read by
    `resnet_fast.models.read_image`, which also rotates it as its EXIF tag says.

    Args:
        resize_size: pixels of the shorter side after resizing.
        crop_size: pixels of both sides of the centre crop; smaller images are padded with black.
        mean, std: of each channel, for values from 0 to 1.
        interpolation: name of Pillow's filter; Pillow always antialiases.

    Examples:
        >>> prepare = Preprocessing(resize_size=256, crop_size=224)
        >>> prepare("photo.jpg").shape
        torch.Size([3, 224, 224])
    """

    resize_size: int = 256
    crop_size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name in ("resize_size", "crop_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} must have 3 values, got {getattr(self, name)}")
        if 0 in self.std:
            raise ValueError(f"std must not contain 0, got {self.std}")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(_INTERPOLATIONS)}, got {self.interpolation!r}")

    @classmethod
    def from_transforms(cls, transforms: Any) -> Preprocessing:
        """Convert the result of `weights.transforms()`: a `Preprocessing`, or torchvision's ImageClassification."""
        if isinstance(transforms, cls):
            return transforms
        return cls(
            resize_size=_single(transforms.resize_size),
            crop_size=_single(transforms.crop_size),
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
            interpolation=str(getattr(transforms.interpolation, "value", transforms.interpolation)),
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Preprocessing | None:
        """Return what `to_metadata` wrote; None if the metadata has no `crop_size`.

        Raises:
            ValueError: for a missing or unusable value, with its key.
        """
        if "crop_size" not in metadata:
            return None
        found: dict[str, Any] = {}
        for field in fields(cls):
            text = metadata.get(field.name, "")
            try:
                value = text if field.name == "interpolation" else json.loads(text)
                found[field.name] = value
                sizes = type(value) is int and 1 <= value <= MAX_SIZE
                numbers = isinstance(value, list) and all(type(x) in (int, float) and abs(x) < 1e6 for x in value)
                if not (sizes if field.name.endswith("size") else numbers or field.name == "interpolation"):
                    raise ValueError(f"sizes from 1 to {MAX_SIZE}, and three numbers, were expected")
                cls(**found)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"its metadata's {field.name} is {text[:40]!r}: {str(error)[:200]}") from None
        return cls(**found)

    def to_metadata(self) -> dict[str, str]:
        """Return every argument as text, by name: numbers and lists of numbers as JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}

    def for_size(self, crop_size: int | None = None, resize_size: int | None = None) -> Preprocessing:
        """Return a copy for another crop size; the shorter side changes in proportion unless `resize_size` is given."""
        crop_size = self.crop_size if crop_size is None else crop_size
        if resize_size is None:
            resize_size = max(1, round(crop_size * self.resize_size / self.crop_size))
        return replace(self, crop_size=crop_size, resize_size=resize_size)

    def crop(self, image: Image) -> Image:
        """Return the resized and cropped RGB image, [crop_size x crop_size] pixels: what the model sees.

        If resizing the whole image would make more than 2**26 pixels, only the part inside the crop is resized; the
        results differ by rounding.
        """
        from PIL import Image as pillow

        if not isinstance(image, pillow.Image):
            raise TypeError(f"expected a PIL.Image.Image, got {type(image).__name__}")
        image = to_rgb(image)
        width, height = image.size
        if width < 1 or height < 1:
            raise ValueError(f"expected an image of at least 1x1 pixels, got {width}x{height}")
        short, long = min(width, height), max(width, height)
        longer = int(self.resize_size * long / short)
        size = (self.resize_size, longer) if width <= height else (longer, self.resize_size)
        left, top = (crop_offset(extent, self.crop_size) for extent in size)
        box = (left, top, left + self.crop_size, top + self.crop_size)
        if size[0] * size[1] > _MAX_RESIZED:
            inside = (max(0, left), max(0, top), min(size[0], box[2]), min(size[1], box[3]))
            image = self._resized_part(image, size, inside)
            box = (left - inside[0], top - inside[1], box[2] - inside[0], box[3] - inside[1])
        elif size != image.size:
            image = image.resize(size, pillow.Resampling[self.interpolation.upper()])
        # Pillow fills a crop outside the image with black.
        return image.crop(box)

    def _resized_part(self, image: Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image:
        """Return `image.resize(size).crop(box)` without resizing the rest; `box` lies inside."""
        from PIL import Image as pillow

        kept, within = [0] * 4, [0.0] * 4
        for axis in (0, 1):
            scale = image.size[axis] / size[axis]
            begin, end = box[axis] * scale, box[axis + 2] * scale
            margin = _SUPPORT * max(1.0, scale) + 1
            # Pillow rounds positions to float32, so they are given relative to the part that the filter reaches.
            kept[axis] = max(0, math.floor(begin - margin))
            kept[axis + 2] = min(image.size[axis], math.ceil(end + margin))
            within[axis], within[axis + 2] = begin - kept[axis], min(end, image.size[axis]) - kept[axis]
        return image.crop((kept[0], kept[1], kept[2], kept[3])).resize(
            (box[2] - box[0], box[3] - box[1]),
            pillow.Resampling[self.interpolation.upper()],
            box=(within[0], within[1], within[2], within[3]),
        )

    def __call__(self, image: Image | str | os.PathLike[str] | IO[bytes]) -> Tensor:
        """Return float32 [3, crop_size, crop_size], normalised; `tensor[None]` or `torch.stack` makes a batch.

        Raises:
            TypeError: if `image` is not a Pillow image, a path or a binary file.
            ValueError: if it cannot be read (`ImageError`), has floating point pixels or no pixels.
        """
        if isinstance(image, str | os.PathLike) or hasattr(image, "read"):
            image = read_image(cast("IO[bytes]", image))
        pixels = torch.frombuffer(bytearray(self.crop(image).tobytes()), dtype=torch.uint8)
        scaled = pixels.view(self.crop_size, self.crop_size, 3).permute(2, 0, 1).contiguous().float() / 255
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return (scaled - mean) / std


def _single(size: Any) -> int:
    return int(size[0]) if isinstance(size, list | tuple) else int(size)


def crop_offset(extent: int, crop: int) -> int:
    """Return where the crop starts: as torchvision, rounding half to even, and padding the smaller half first."""
    return round((extent - crop) / 2.0) if extent >= crop else -((crop - extent) // 2)
