"""Random tensors, laid out as kernels read them, for examples of what ops take; on "meta" they are shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Random:
    """Draws normal numbers on ``device``.

    Args:
        dtype: of images and weights; vectors are float32. generator: None for torch's own.
    """

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator | None = None

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw numbers of mean 0 and variance 1."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randn(shape, dtype=dtype, device=self.device, generator=self.generator)

    def image(self, *shape: int) -> Tensor:
        """Draw [N, C, H, W], channels_last."""
        return self.normal(*shape, dtype=self.dtype).to(memory_format=torch.channels_last)

    def weight(self, *shape: int) -> Tensor:
        """Draw a weight that keeps the variance: a product of unit inputs has about unit size."""
        made = (self.normal(*shape) / max(1, math.prod(shape[1:])) ** 0.5).to(self.dtype)
        return made.to(memory_format=torch.channels_last) if len(shape) == 4 else made

    def scale_and_shift(self, channels: int) -> tuple[Tensor, Tensor]:
        """Draw [C] twice, the first positive and not near 0."""
        return self.normal(channels).abs() + 0.5, self.normal(channels)
