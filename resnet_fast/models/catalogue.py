"""List the models with what is published of them: parameters, operations and accuracy of each set of weights.

The figures are torchvision's (`weights.json`), not measured here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from resnet_fast.models.weights import _table

__all__ = ["ModelList", "PublishedWeights", "list_models"]


@dataclass(frozen=True)
class PublishedWeights:
    """One model with one set of published weights.

    Attributes:
        model, weights: for `rf.models.get_model(model, weights=weights)`.
        parameters: their number.
        gmacs: billions of multiply-accumulates for one image of `image_size`; twice as many floating point operations.
            torchvision's documentation has the same figures under the name GFLOPS.
        top1, top5: per cent of ImageNet-1K's validation images with the right class first, or among the first five.
        image_size: pixels of both sides of the images that these figures are for.
        mebibytes: of the file.
        default: whether `weights="DEFAULT"` means these.
    """

    model: str
    weights: str
    parameters: int
    gmacs: float
    top1: float
    top5: float
    image_size: int
    mebibytes: float
    default: bool


class ModelList(list[str]):
    """Names of models; printed, or as `table`, with what is published of them."""

    @property
    def table(self) -> tuple[PublishedWeights, ...]:
        """One row for each model of the list and each of its weights, in the list's order."""
        return tuple(row for name in self for row in _rows(name))

    def __str__(self) -> str:
        cells = [("model", "weights", "parameters", "GMACs", "top-1 %", "top-5 %", "pixels", "MiB")]
        for row in self.table:
            figures = (f"{row.parameters / 1e6:.1f} M", f"{row.gmacs:.2f}", f"{row.top1:.2f}", f"{row.top5:.2f}")
            weights = row.weights + " *" * row.default
            cells.append((row.model, weights, *figures, str(row.image_size), f"{row.mebibytes:.0f}"))
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines = ["  ".join(_padded(line, widths)).rstrip() for line in cells]
        return "\n".join(
            [*lines, "* weights=DEFAULT. Accuracy on ImageNet-1K and operations as torchvision publishes them."]
        )


def _padded(line: Iterable[str], widths: list[int]) -> list[str]:
    return [
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


def _rows(model: str) -> list[PublishedWeights]:
    entry: dict[str, Any] = _table()[model]
    return [
        PublishedWeights(
            model=model,
            weights=name,
            parameters=of["num_params"],
            gmacs=of["gmacs"],
            top1=of["acc@1"],
            top5=of["acc@5"],
            image_size=of["preprocessing"]["crop_size"],
            mebibytes=of["file_size_mib"],
            default=name == entry["default"],
        )
        for name, of in entry["weights"].items()
    ]


def list_models() -> ModelList:
    """Return the names of the ten models; printed, a table of their published weights.

    Examples:
        >>> import resnet_fast as rf
        >>> rf.list_models()[:3]
        ['resnet18', 'resnet34', 'resnet50']
        >>> best = max(rf.list_models().table, key=lambda row: row.top1)
        >>> best.model, best.weights, best.gmacs
        ('resnext101_64x4d', 'IMAGENET1K_V1', 15.46)
    """
    return ModelList(_table())
