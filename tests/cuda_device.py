"""Where the tests of the CUDA kernels run: on the GPU if ``_C`` runs there, else emulated on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast import backends
from resnet_fast.backends import cuda
from resnet_fast.roofline.measure import tf32
from tests.emulator import build
from tests.emulator.cases._tensors import rounded_to_tf32

DEVICE = "cpu" if cuda.unavailable(initialize=True) else "cuda"

#: Of the first an odd case is tried in tests of geometry; all are in tests of arithmetic.
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def unavailable() -> str:
    """Return why the CUDA kernels run neither on a GPU nor emulated here, "" if they run."""
    return "" if DEVICE == "cuda" else build.unavailable()


@contextmanager
def installed() -> Iterator[None]:
    """The native module can be used; float32 is multiplied as tf32, the only way that all its kernels know."""
    with tf32(True):
        if DEVICE == "cuda":
            yield
        else:
            with cuda.substitute(build.module()):
                yield


@contextmanager
def kernels() -> Iterator[None]:
    """The ops run CUDA kernels."""
    with installed(), backends.use("cuda"):
        yield


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches from now on: names of ops, of convolutions the kernels'."""
    launched: list[str] = []

    def watched(op: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **kwargs: Any) -> Any:
            launched.append(args[0] if op == "conv_bn_act" else op)
            return launch(*args, **kwargs)

        return watching

    for op in ("conv_bn_act", "stem", "head", "add_act", "add_act_backward"):
        monkeypatch.setattr(cuda, op, watched(op, getattr(cuda, op)))
    return launched


def as_multiplied(tensors: dict[str, Any], *names: str) -> dict[str, Any]:
    """The arguments with those of these names as the matrix units read them: float32 rounded to tf32."""
    return {
        name: rounded_to_tf32(tensor) if name in names and tensor.dtype is torch.float32 else tensor
        for name, tensor in tensors.items()
    }


def doubled(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.double() if isinstance(tensor, Tensor) else tensor for name, tensor in tensors.items()}
