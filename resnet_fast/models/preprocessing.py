"""From a Pillow image to the tensor a model was trained on: resize, centre crop, scale, normalise.

The same numbers as torchvision's ImageClassification preset gives for a Pillow image, without torchvision or numpy. It
neither reads files nor turns images by their EXIF tag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Preprocessing"]

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """Turns a Pillow image of any size into a float32 tensor [3, crop_size, crop_size].

    Args:
        resize_size: pixels of the shorter side after resizing.
        crop_size: pixels of both sides of the centre crop; what is missing is filled with black.
        mean, std: of each channel, for values in 0..1.
        interpolation: Pillow's filter by name; Pillow always antialiases.
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
        """From what `weights.transforms()` returns: one of these, or torchvision's ImageClassification preset."""
        if isinstance(transforms, cls):
            return transforms
        return cls(
            resize_size=_single(transforms.resize_size),
            crop_size=_single(transforms.crop_size),
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
            interpolation=str(getattr(transforms.interpolation, "value", transforms.interpolation)),
        )

    def crop(self, image: Image) -> Image:
        """The resized and cropped RGB image, [crop_size x crop_size] pixels: what the model gets to see."""
        from PIL import Image as pillow

        if not isinstance(image, pillow.Image):
            raise TypeError(f"expected a PIL.Image.Image, got {type(image).__name__}")
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"expected 8 bits a channel, got an image of mode {image.mode}; scale it to 8 bits first")
        if image.mode != "RGB":
            image = image.convert("RGB")
        width, height = image.size
        if width < 1 or height < 1:
            raise ValueError(f"expected an image of at least 1x1 pixels, got {width}x{height}")
        short, long = min(width, height), max(width, height)
        longer = int(self.resize_size * long / short)
        size = (self.resize_size, longer) if width <= height else (longer, self.resize_size)
        if size != image.size:
            image = image.resize(size, pillow.Resampling[self.interpolation.upper()])
        width, height = image.size
        left, top = (crop_offset(extent, self.crop_size) for extent in (width, height))
        # Outside the image Pillow's crop is black.
        return image.crop((left, top, left + self.crop_size, top + self.crop_size))

    def __call__(self, image: Image) -> Tensor:
        """float32 [3, crop_size, crop_size], normalised. `tensor.unsqueeze(0)` or `torch.stack` makes the batch.

        Raises:
            TypeError: if `image` is not a Pillow image.
            ValueError: if it has more than 8 bits a channel or no pixels.
        """
        pixels = torch.frombuffer(bytearray(self.crop(image).tobytes()), dtype=torch.uint8)
        scaled = pixels.view(self.crop_size, self.crop_size, 3).permute(2, 0, 1).contiguous().float() / 255
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return (scaled - mean) / std


def _single(size: Any) -> int:
    return int(size[0]) if isinstance(size, list | tuple) else int(size)


def crop_offset(extent: int, crop: int) -> int:
    """Where the crop starts: torchvision rounds half to even when cutting and pads the smaller half first."""
    return round((extent - crop) / 2.0) if extent >= crop else -((crop - extent) // 2)
