"""Classify many images in order with bounded memory: threads read and prepare while the network computes."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from resnet_fast.inference.classifier import Classifier
from resnet_fast.models.checkpoint import readable
from resnet_fast.models.images import ImageError, check_image, read_image

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH_SIZE = 32
WORKERS = min(4, os.cpu_count() or 1)

_LARGE = 24_000_000
"""Images of more pixels are decoded one at a time: each may take a gigabyte until it is cropped."""

_large = threading.Lock()

T = TypeVar("T")


def read_bounded(source: str | os.PathLike[str] | IO[bytes]) -> Image:
    """Call `read_image`, with one large image at a time in this process.

    Raises:
        ImageError: as `read_image`.
    """
    width, height = check_image(source)
    with _large if width * height > _LARGE else contextlib.nullcontext():
        return read_image(source)


def stream(
    items: Iterable[T],
    classifier: Classifier,
    read: Callable[[T], Image],
    *,
    batch_size: int = BATCH_SIZE,
    workers: int = WORKERS,
) -> Iterator[tuple[T, Tensor | ImageError]]:
    """Yield each item with its probabilities, float64 [classes], or its error, in the order of the items.

    At most two batches of prepared images are in memory, and `workers` images that are being read.

    Args:
        items: anything; advanced in the caller's thread, at most two batches ahead.
        read: returns an item's image, or raises ImageError; called in threads.
        batch_size: images that the network takes at once. workers: threads that read.

    Raises:
        ClassifierError: if the network's answers are not finite.
    """
    source = iter(items)
    pending: deque[tuple[T, Future[Tensor | ImageError]]] = deque()
    with ThreadPoolExecutor(workers, "read-images") as pool:

        def fill() -> None:
            for item in itertools.islice(source, 2 * batch_size - len(pending)):
                pending.append((item, pool.submit(_prepared, item, classifier, read)))

        try:
            fill()
            while pending:
                batch = [pending.popleft() for _ in range(min(batch_size, len(pending)))]
                outcomes = [(item, future.result()) for item, future in batch]
                fill()  # read on while the network computes
                prepared = [each for _, each in outcomes if isinstance(each, Tensor)]
                rows = iter(classifier.predict(torch.stack(prepared)) if prepared else ())
                for item, outcome in outcomes:
                    yield item, next(rows) if isinstance(outcome, Tensor) else outcome
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _prepared(item: T, classifier: Classifier, read: Callable[[T], Image]) -> Tensor | ImageError:
    try:
        image = read(item)
    except ImageError as error:
        return error
    try:
        return classifier.prepare(image)
    except ValueError as error:  # no pixels, or floating point ones
        return ImageError(readable(error))
