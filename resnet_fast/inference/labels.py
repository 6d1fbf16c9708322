"""Names of classes: from a file of weights, from a text file, or ImageNet's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from resnet_fast import models
from resnet_fast.inference.errors import ClassifierError
from resnet_fast.models.checkpoint import readable
from resnet_fast.models.weights import named_classes

MAX_LABELS_BYTES = 2**20
"""Larger files of labels are refused. That of ImageNet's thousand classes has 31 KB."""


def labels_for(outputs: int, metadata: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return the names in the metadata, as ``train imagenet`` writes them, else ImageNet's if 1000, else numbers."""
    found = named_classes(metadata or {})
    if found is not None and len(found) == outputs:
        return found
    names = models.categories()
    return names if outputs == len(names) else tuple(f"class {index}" for index in range(outputs))


def read_labels(path: Path, outputs: int) -> tuple[str, ...]:
    """Return the names in a text file, one per line, without the WordNet numbers of Caffe's synset_words.txt.

    Raises:
        ClassifierError: for anything but ``outputs`` lines of readable text.
    """
    try:
        if not path.is_file():
            raise ClassifierError(f"{path}: no such file; a text with {outputs} labels, one a line, was expected")
        with path.open("rb") as file:
            content = file.read(MAX_LABELS_BYTES + 1)
    except OSError as error:
        raise ClassifierError(readable(error, 600)) from error
    if len(content) > MAX_LABELS_BYTES:
        raise ClassifierError(f"{path}: more than {MAX_LABELS_BYTES:,} bytes, too large for labels")
    try:
        lines = content.decode("utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise ClassifierError(f"{path}: not UTF-8 text, at byte {error.start}; one label a line was expected") from None
    labels = tuple(" ".join(re.sub(r"^\s*n\d{8}(\s|$)", "", line).split()) for line in lines)
    for number, label in enumerate(labels, 1):
        if not label or not label.isprintable():
            what = "not printable" if label else "empty"
            raise ClassifierError(f"{path}: line {number} is {what}; a label was expected")
    if len(labels) != outputs:
        raise ClassifierError(f"{path}: {len(labels)} labels, the network has {outputs} classes")
    return labels
