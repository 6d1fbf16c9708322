"""The kinds of kernels that tests of ops run on: Triton's and CUDA's, each on the GPU or executed on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast import backends
from resnet_fast.backends import triton
from tests import cuda_device, triton_device

DTYPES = cuda_device.DTYPES

#: Ways to store the same [N, C, H, W].
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
    "every other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "odd address": lambda t: (
        torch.cat([t.flatten()[:1], t.permute(0, 2, 3, 1).flatten()])[1:]
        .view(t.shape[0], *t.shape[2:], t.shape[1])
        .permute(0, 3, 1, 2)
    ),
}


@dataclass(frozen=True)
class Kind:
    """A kind of kernels.

    Attributes:
        name: the backend's. device: where its kernels run. kernels: inside of it the ops run them.
        watch: returns a list of the launches from now on, by the op's name, of convolutions the kernel's.
    """

    name: str
    device: str
    kernels: Callable[[], AbstractContextManager[object]]
    watch: Callable[[pytest.MonkeyPatch], list[str]]

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw numbers on the CPU, the same for every kind, and put them where the kernels run."""
        return torch.randn(shape).to(dtype).to(self.device)

    def put(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments where the kernels run."""
        return {name: t.to(self.device) if isinstance(t, Tensor) else t for name, t in tensors.items()}

    def as_multiplied(self, tensors: dict[str, Any], *names: str) -> dict[str, Any]:
        """Return the arguments with those of these names as products read them: float32 as tf32 by CUDA's kernels."""
        return cuda_device.as_multiplied(tensors, *names) if self.name == "cuda" else tensors


def _watch_triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    launched: list[str] = []
    launch = triton.launch

    def watching(op: str, *arguments: Any, function: str = "launch", **form: Any) -> None:
        launched.append(op + function.removeprefix("launch"))
        launch(op, *arguments, function=function, **form)

    monkeypatch.setattr(triton, "launch", watching)
    return launched


KINDS = {
    kind.name: kind
    for kind in (
        Kind("triton", triton_device.DEVICE, lambda: backends.use("triton"), _watch_triton),
        Kind("cuda", cuda_device.DEVICE, cuda_device.kernels, cuda_device.watch),
    )
}
