"""What watches a proof of finite.py at run time: modules that measure a tensor, and the way to do without the proof.

Likewise for uint8, which holds neither NaN nor infinity. The state is the thread's, so that one thread's unusual input
does not slow another down.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resnet_fast.nn.pristine import capturing

#: What a guard lets pass: no activation of a sound network comes near, and 30 powers of ten are left to grow.
PASSED = 2.0**20

_state = threading.local()


class TooLarge(Exception):
    """A guard met a value that its proof does not cover, or uint8 one that it cannot hold."""


class Guard(nn.Module):
    """Raises :class:`TooLarge` unless every element is at most ``PASSED`` in magnitude; NaN is not."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def forward(self, x: Tensor) -> None:
        if capturing() or torch.compiler.is_compiling() or careful() or x.numel() == 0:
            return
        dense = x.permute(0, 2, 3, 1) if x.dim() == 4 and not x.is_contiguous() else x
        low, high = torch.aminmax(dense)
        if not (low.item() >= -PASSED and high.item() <= PASSED):
            raise TooLarge

    def plain(self, state: dict[str, Tensor], x: Tensor) -> None:
        """Nothing: for shapes."""


def careful() -> bool:
    """Return whether this thread is in :func:`with_separate_relus`."""
    return getattr(_state, "careful", False)


@contextmanager
def with_separate_relus() -> Iterator[None]:
    """No proof is relied on, and no guard raises, in this thread."""
    _state.careful = True
    try:
        yield
    finally:
        _state.careful = False


def in_float() -> bool:
    """Return whether this thread is in :func:`without_integers`."""
    return getattr(_state, "in_float", False)


def unread() -> list[Tensor] | None:
    """Return where this thread puts what says whether a value fits in uint8, for a later look; None if it looks now."""
    return getattr(_state, "unread", None)


@contextmanager
def looking_later() -> Iterator[list[Tensor]]:
    """Nothing is read of a GPU in this thread to see whether values fit in uint8; gives bools without shape instead."""
    kept: list[Tensor] = []
    before, _state.unread = unread(), kept
    try:
        yield kept
    finally:
        _state.unread = before


@contextmanager
def without_integers() -> Iterator[None]:
    """What is rounded to uint8 stays float32 in this thread, so that NaN and infinity pass."""
    _state.in_float = True
    try:
        yield
    finally:
        _state.in_float = False
