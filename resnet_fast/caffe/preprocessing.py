"""From a Pillow image to the tensor that a Caffe model was trained on: blue first, 0 to 255, minus the mean.

Resizing and cropping are those of `resnet_fast.models.preprocessing`; no file but a mean image is read here.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_fast.models.preprocessing import Preprocessing as ResizeAndCrop
from resnet_fast.models.preprocessing import crop_offset

if TYPE_CHECKING:
    from PIL.Image import Image

CHANNEL_MEANS = (103.063, 115.903, 123.152)
"""Blue, green and red of ``ResNet_mean.binaryproto`` (KaimingHe/deep-residual-networks), averaged over the image."""


@dataclass(frozen=True, eq=False)
class Preprocessing:
    """Turns a Pillow image of any size into a float32 tensor [3, crop_size, crop_size]: (B, G, R in 0..255, minus mean)
    times scale.

    The published ResNets were trained so, with a mean image (:meth:`with_mean_file`); its channel means, the default
    here, come close to it. 103.939, 116.779 and 123.68 are VGG's, not ResNet's.

    Args:
        resize_size: pixels of the shorter side after resizing.
        crop_size: pixels of both sides of the centre crop; what is missing is filled with black.
        mean: three values (blue, green, red), or a mean image: a tensor [3, H, W] in the same order, of the crop's
            size, or larger, of which the centre is cropped as that of the image is.
        interpolation: Pillow's filter by name; Pillow always antialiases, Caffe's own tools do not.
        scale: what the differences are multiplied by, as ``transform_param.scale`` and ``set_input_scale`` in Caffe.

    Raises:
        ValueError: for a size below 1, an unknown filter, a mean that is neither, not finite, or too small, or a scale
            that is 0 or not finite.
    """

    resize_size: int = 256
    crop_size: int = 224
    mean: tuple[float, float, float] | Tensor = CHANNEL_MEANS
    interpolation: str = "bilinear"
    scale: float = 1.0

    def __post_init__(self) -> None:
        self._geometry()  # checks sizes and filter
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"scale is {self.scale:g}; a finite number other than 0 was expected")
        if isinstance(self.mean, Tensor):
            mean = self.mean.detach().to("cpu", torch.float32).clone()
            if mean.dim() == 4 and mean.shape[0] == 1:
                mean = mean[0]
            if mean.shape == (3,):
                mean = mean.view(3, 1, 1).expand(3, self.crop_size, self.crop_size)
            if mean.dim() != 3 or mean.shape[0] != 3:
                raise ValueError(f"mean must have 3 values or be an image [3, H, W], got {list(self.mean.shape)}")
            height, width = mean.shape[1:]
            if min(height, width) < self.crop_size:
                raise ValueError(
                    f"mean is {height}x{width}, the crop {self.crop_size}x{self.crop_size}; the mean must be as large "
                    "as the crop, or larger, of which the centre is used"
                )
            object.__setattr__(self, "mean", mean)
        else:
            if isinstance(self.mean, str | os.PathLike):
                raise TypeError(f"mean is {str(self.mean)!r}; Preprocessing.with_mean_file reads a mean image's file")
            if getattr(self.mean, "ndim", 1) != 1:
                raise TypeError(
                    f"mean is a {type(self.mean).__name__}; a mean image must be a tensor (torch.from_numpy)"
                )
            values = tuple(float(value) for value in self.mean)
            if len(values) != 3:
                raise ValueError(f"mean must have 3 values or be an image [3, H, W], got {values}")
            mean = torch.tensor(values)
            object.__setattr__(self, "mean", values)
        if not mean.isfinite().all():
            raise ValueError("mean must be finite, it has NaN or infinities")

    @classmethod
    def with_mean_file(cls, path: str | os.PathLike[str], **options: Any) -> Preprocessing:
        """With the mean image of a ``.binaryproto``; ``options`` are the other arguments.

        Raises:
            FileNotFoundError: if there is no such file.
            CaffeError: if it is no mean image.
            ValueError: if the mean is smaller than the crop, or not of three channels.
        """
        from .caffemodel import read_mean

        return cls(mean=read_mean(path), **options)

    def as_channel_means(self) -> Preprocessing:
        """The same with the means of the three channels in place of a mean image: of the whole image, not the crop."""
        if not isinstance(self.mean, Tensor):
            return self
        blue, green, red = self.mean.double().mean((1, 2)).tolist()
        return replace(self, mean=(blue, green, red))

    def _geometry(self) -> ResizeAndCrop:
        return ResizeAndCrop(self.resize_size, self.crop_size, interpolation=self.interpolation)

    def crop(self, image: Image) -> Image:
        """Return the resized and cropped RGB image, [crop_size x crop_size] pixels: what the model gets to see."""
        return self._geometry().crop(image)

    def __call__(self, image: Image) -> Tensor:
        """float32 [3, crop_size, crop_size]. `tensor.unsqueeze(0)` or `torch.stack` makes the batch.

        Raises:
            TypeError: if `image` is not a Pillow image.
            ValueError: if it has more than 8 bits a channel or no pixels.
        """
        pixels = torch.frombuffer(bytearray(self.crop(image).tobytes()), dtype=torch.uint8)
        blue_first = pixels.view(self.crop_size, self.crop_size, 3).flip(2).permute(2, 0, 1).contiguous().float()
        difference = blue_first - self._mean_of_crop()
        return difference if self.scale == 1 else difference * self.scale

    def _mean_of_crop(self) -> Tensor:
        if not isinstance(self.mean, Tensor):
            return torch.tensor(self.mean).view(3, 1, 1)
        top, left = (crop_offset(extent, self.crop_size) for extent in self.mean.shape[1:])
        return self.mean[:, top : top + self.crop_size, left : left + self.crop_size]
