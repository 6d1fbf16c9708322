"""The figures of a training run: a CSV file with one row an epoch that survives interruptions, and its plot.

It keeps what a loop gives it and computes nothing. matplotlib is imported on use.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_fast.benchmarking import plot
from resnet_fast.models.checkpoint import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Metrics", "draw", "read"]

MAX_BYTES = 64 * 2**20
"""Larger files are refused before they are read."""

Row = dict[str, float]


class Metrics:
    """Rows by epoch in a CSV file, which is written anew, whole, with every row.

    Args:
        path: of the file; its folder is made if needed.
        columns: the names behind ``epoch``, which is the first column.
        resume_after: the last epoch to keep of the file that is there; later rows belong to the interrupted part of a
            run and are dropped. None starts a new file with the first row.

    Raises:
        ValueError: if the file to be continued has other columns or is no such file.
    """

    def __init__(self, path: str | os.PathLike[str], columns: Sequence[str], resume_after: int | None = None) -> None:
        self.path = Path(path)
        self.columns = ("epoch", *columns)
        self.rows: list[Row] = []
        if resume_after is not None and self.path.exists():
            found = read(self.path)
            if found and tuple(found[0]) != self.columns:
                raise ValueError(
                    f"{self.path}: has the columns {', '.join(found[0])}; this run writes {', '.join(self.columns)}"
                )
            self.rows = [row for row in found if row["epoch"] <= resume_after]

    def append(self, epoch: int, **values: float) -> None:
        """Adds a row and writes the file, atomically. Floats are written so that reading gives the same bits.

        Raises:
            ValueError: for other names than the columns, or an epoch that is not behind the last.
            OSError: if the file cannot be written.
        """
        if set(values) != set(self.columns[1:]):
            raise ValueError(f"metrics: got {', '.join(values)}; the columns are {', '.join(self.columns[1:])}")
        if self.rows and epoch <= self.rows[-1]["epoch"]:
            raise ValueError(f"metrics: epoch {epoch} comes behind epoch {self.rows[-1]['epoch']}")
        self.rows.append({"epoch": epoch, **{name: values[name] for name in self.columns[1:]}})
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([[repr(row[name]) for name in self.columns] for row in self.rows])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, lambda name: Path(name).write_bytes(text.getvalue().encode()))


def read(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a metrics file, whole numbers as int.

    Raises:
        ValueError: if it is too large, has no column ``epoch``, or a row is not made of as many numbers as there are
            columns.
    """
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes, a metrics file has at most {MAX_BYTES:,}")
    try:
        header, *lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8")), strict=True)) or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no metrics file: {error}") from None
    if header[:1] != ["epoch"] or len(set(header)) != len(header):
        raise ValueError(f"{path}: no metrics file: its first line must be column names, the first of them epoch")
    rows: list[Row] = []
    for number, line in enumerate(lines, 2):
        try:
            rows.append({name: _number(text) for name, text in zip(header, line, strict=True)})
        except ValueError:
            raise ValueError(f"{path}: line {number} does not hold {len(header)} numbers") from None
    return rows


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def draw(rows: Sequence[Mapping[str, float]], path: str | os.PathLike[str], title: str) -> Path:
    """Plots losses (columns ending in ``loss``) above accuracies (``accuracy``, as fractions) over the epochs.

    Raises:
        plot.PlotError: in one line, if matplotlib is missing or the file's ending is not .png, .svg or .pdf.
        ValueError: if there are no rows.
    """
    plot.check(path)
    return plot.save(_figure(rows, title), path)


def _figure(rows: Sequence[Mapping[str, float]], title: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not rows:
        raise ValueError("metrics: there are no rows to draw")
    figure = Figure(figsize=(7, 6))
    upper, lower = figure.subplots(2, 1, sharex=True)
    epochs = [row["epoch"] for row in rows]
    for axes, ending, scale, label in (
        (upper, "loss", 1.0, "loss per image"),
        (lower, "accuracy", 100.0, "correct, %"),
    ):
        names = [name for name in rows[0] if name.endswith(ending)]
        for name in names:
            _line(axes, epochs, [scale * row[name] for row in rows], name)
        axes.set_ylabel(label)
        if names:
            axes.legend(frameon=False, fontsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    if all(row[name] > 0 for row in rows for name in row if name.endswith("loss")):
        upper.set_yscale("log")
    lower.set_xlabel("epoch")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    upper.set_title(title, fontsize=10, loc="left")
    return figure


def _line(axes: Any, epochs: list[float], values: list[float], name: str) -> None:
    color = plot.THEIRS if name.startswith("train") else plot.OURS
    shown = [value if math.isfinite(value) else math.nan for value in values]
    axes.plot(epochs, shown, color=color, marker="o", markersize=3, label=name.replace("_", " "))
