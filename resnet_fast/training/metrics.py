"""Keep the figures of a training run: a CSV file with one row per epoch that survives interruptions, and its plot.

Nothing is computed here. matplotlib is imported on use.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_fast._files import write_whole
from resnet_fast.benchmarking import plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BYTES = 64 * 2**20
"""Larger files are refused unread."""

EMA = "#3b6fb6"
"""The colour of the moving average's curves."""

Row = dict[str, float]


class Metrics:
    """One row per epoch in a CSV file. Each new row rewrites the whole file.

    Args:
        path: of the file; its folder is created if needed.
        columns: the names after ``epoch``, which is the first column.
        resume_after: the last epoch to keep of an existing file; later rows belong to the interrupted part of a run
            and are dropped. None starts a new file with the first row.

    Raises:
        ValueError: if the file to be continued has other columns or is not a metrics file.

    Examples:
        >>> metrics = Metrics("metrics.csv", ["train_loss", "val_accuracy"])
        >>> metrics.append(1, train_loss=6.5, val_accuracy=0.01)
        >>> read("metrics.csv")
        [{'epoch': 1, 'train_loss': 6.5, 'val_accuracy': 0.01}]
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
        """Add a row and write the file atomically. Floats are written so that reading them gives the same bits.

        Raises:
            ValueError: for names other than the columns, or an epoch that does not follow the last one.
            OSError: if the file cannot be written.
        """
        if set(values) != set(self.columns[1:]):
            raise ValueError(f"metrics: got {', '.join(values)}; the columns are {', '.join(self.columns[1:])}")
        if self.rows and epoch <= self.rows[-1]["epoch"]:
            raise ValueError(f"metrics: epoch {epoch} comes after epoch {self.rows[-1]['epoch']}")
        self.rows.append({"epoch": epoch, **{name: values[name] for name in self.columns[1:]}})
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)  # floats by repr
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, lambda name: Path(name).write_bytes(text.getvalue().encode()))


def read(path: str | os.PathLike[str]) -> list[Row]:
    """Return the rows of a metrics file, whole numbers as int.

    Raises:
        ValueError: if it is too large, has no column ``epoch``, or a row does not have one number per column.
    """
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes, a metrics file has at most {MAX_BYTES:,}")
    try:
        header, *lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8")), strict=True)) or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a metrics file: {error}") from None
    if header[:1] != ["epoch"] or len(set(header)) != len(header):
        raise ValueError(f"{path}: not a metrics file: its first line must be column names, the first of them epoch")
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
    """Plot losses (columns ending in ``loss``) above accuracies (``accuracy``, as fractions) over the epochs.

    A column's first word decides its curve's colour (train, val or valid, ema); top-5 accuracies are dashed.

    Raises:
        plot.PlotError: in one line, if matplotlib is missing or the file's ending is not .png, .svg or .pdf.
        ValueError: if there are no rows.
    """
    plot.check(path)
    return plot.save(_figure(rows, title), path)


def try_to_draw(rows: Sequence[Mapping[str, float]], path: str | os.PathLike[str], title: str) -> Exception | None:
    """Plot as :func:`draw` does; return the error if matplotlib is missing or the file cannot be written."""
    try:
        draw(rows, path, title)
    except (plot.PlotError, ImportError, OSError) as error:
        return error
    return None


def _figure(rows: Sequence[Mapping[str, float]], title: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    if not rows:
        raise ValueError("metrics: there are no rows to draw")
    figure = Figure(figsize=(8, 6))
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
        if names:  # beside the axes: inside it would hide curves
            axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    losses = [row[name] for row in rows for name in row if name.endswith("loss") and math.isfinite(row[name])]
    if losses and min(losses) > 0:
        upper.set_yscale("log")
        decades = max(losses) / min(losses) >= 10
        upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if decades else MaxNLocator(6))
        upper.yaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
        upper.yaxis.set_minor_formatter(NullFormatter())
    lower.set_xlabel("epoch")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    upper.set_title(title, fontsize=10, loc="left")
    return figure


def _line(axes: Any, epochs: list[float], values: list[float], name: str) -> None:
    color = {"train": plot.THEIRS, "ema": EMA}.get(name.partition("_")[0], plot.OURS)
    style = "--" if "top5" in name else "-"
    shown = [value if math.isfinite(value) else math.nan for value in values]
    label = name.replace("_", " ").replace("top5", "top-5").replace("ema", "EMA")
    axes.plot(epochs, shown, style, color=color, marker="o", markersize=3, label=label)
