"""Draw results as horizontal bars, with one colour for resnet_fast and one for the others. Imports matplotlib on use.

A picture repeats numbers from a result; nothing is computed here.
"""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_fast._files import write_bytes
from resnet_fast.benchmarking.machine import threads_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
OURS, THEIRS, INK = "#1b7f5c", "#9aa5b1", "#222222"
PARTS = {
    "convolution": "#5b8fb9",
    "batch norm": "#d98a29",
    "relu": "#c1503f",
    "add": "#7d5ba6",
    "pooling": "#b5a642",
    "linear": "#8a8f98",
    "fused stem": "#0f4c3a",
    "fused conv + BN + add + ReLU": "#1b7f5c",
    "fused add + ReLU": "#58b38f",
    "fused head": "#8fd0b4",
    "overflow guards": "#8fb8a8",
    "other": "#c9ced6",
}
"""Kinds of work that a breakdown shows, and the colour of each."""


class PlotError(RuntimeError):
    """Raised for a plot that cannot be made: matplotlib is missing, or the file name has an unknown ending."""


def check(path: str | os.PathLike[str]) -> None:
    """Raise PlotError now if a plot could not be written to ``path`` later."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError("plots need matplotlib: pip install 'resnet_fast[plot]'")
    if Path(path).suffix.lower() not in FORMATS:
        raise PlotError(f"{path}: a plot's file name must end in {', '.join(FORMATS)}")


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write ``figure`` to ``path`` atomically; the same data gives the same SVG."""
    check(path)
    import matplotlib

    target, buffer = Path(path), io.BytesIO()
    kind = target.suffix.lower().removeprefix(".")
    with matplotlib.rc_context({"svg.hashsalt": "resnet_fast", "svg.fonttype": "none"}):
        metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
        figure.savefig(buffer, format=kind, dpi=150, bbox_inches="tight", metadata=metadata)
    return write_bytes(target, buffer.getvalue())


def comparison(result: dict[str, Any]) -> Figure:
    """Return bars of the median time per batch of every timed runtime, with the 10th and 90th percentile."""
    setting, cpu, version = result["setting"], result["machine"]["cpu"], result["machine"]["versions"]["torch"]
    rows = [row for row in result["contestants"].values() if row["status"] == "timed"]
    rows.sort(key=lambda row: row["seconds"]["p50"])
    title = (
        f"{setting['arch']}, {setting['dtype']}, batch {setting['batch']}, {setting['image_size']} px\n"
        f"{cpu}, {threads_text(setting['threads'])}, torch {version}"
    )
    label = "ms per batch, lower is better (median; whiskers: 10th and 90th percentile)"
    figure, axes = _bars(title, label, (8, 0.9 + 0.45 * len(rows)))
    for position, row in enumerate(rows):
        seconds = row["seconds"]
        middle = 1e3 * seconds["p50"]
        whiskers = [[middle - 1e3 * seconds["p10"]], [1e3 * seconds["p90"] - middle]]
        axes.barh(position, middle, color=OURS if row["ours"] else THEIRS, height=0.7,
                  xerr=whiskers, error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2})  # fmt: skip
        _label(axes, 1e3 * seconds["p90"], position, f"{middle:.4g} ms")
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_xlim(0, 1.2e3 * max(row["seconds"]["p90"] for row in rows))
    return figure


def breakdown(title: str, bars: dict[str, dict[str, float]]) -> Figure:
    """Return stacked bars: bar label -> part (a key of ``PARTS``) -> seconds."""
    figure, axes = _bars(title, "ms per image, lower is better", (8.5, 1.4 + 0.55 * len(bars)))
    for position, parts in enumerate(bars.values()):
        left = 0.0
        for part, color in PARTS.items():
            width = 1e3 * parts.get(part, 0.0)
            axes.barh(position, width, left=left, color=color, height=0.65)
            left += width
        _label(axes, left, position, f"{left:.1f} ms")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_xlim(0, 1.15e3 * max(sum(parts.values()) for parts in bars.values()))
    used = [part for part in PARTS if any(parts.get(part, 0.0) > 0 for parts in bars.values())]
    handles = [axes.barh(0, 0, color=PARTS[part]) for part in used]
    axes.legend(handles, used, ncols=5, fontsize=8, frameon=False, loc="upper left",
                bbox_to_anchor=(0, -0.08 - 0.45 / len(bars)))  # fmt: skip
    return figure


def throughput(title: str, groups: dict[str, dict[str, float]], ours: set[str]) -> Figure:
    """Return grouped bars: case -> runtime -> images per second; those in ``ours`` have resnet_fast's colour."""
    bars = [(group, name, rate) for group, found in groups.items() for name, rate in found.items()]
    figure, axes = _bars(title, "images per second", (8.5, 1.2 + 0.24 * len(bars) + 0.2 * len(groups)))
    position, ticks = 0.0, []
    for group, found in groups.items():
        ticks.append((position + (len(found) - 1) / 2, group))
        for name, rate in found.items():
            axes.barh(position, rate, color=OURS if name in ours else THEIRS, height=0.85)
            _label(axes, rate, position, f"{name} {rate:,.0f}", fontsize=8)
            position += 1
        position += 0.8
    axes.set_yticks([tick for tick, _ in ticks], [group for _, group in ticks])
    axes.set_xlim(0, 1.35 * max(rate for _, _, rate in bars))
    return figure


def shares(title: str, rows: dict[str, float]) -> Figure:
    """Return bars of the share of its floor's speed, between 0 and about 1, that each kernel reaches."""
    figure, axes = _bars(title, "floor / measured time, in percent", (8.5, 1.1 + 0.27 * len(rows)))
    for position, share in enumerate(rows.values()):
        axes.barh(position, 100 * share, color=OURS, height=0.75)
        _label(axes, 100 * share, position, f"{100 * share:.0f} %", fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_xlim(0, 115 * max(1.0, *rows.values()))
    axes.axvline(100, color=INK, linewidth=0.8)
    return figure


def _bars(title: str, label: str, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Return a figure of this size in inches and its axes for horizontal bars, the first one on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    axes = figure.add_subplot()
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=10, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _label(axes: Any, x: float, y: float, text: str, fontsize: int = 9) -> None:
    """Write ``text`` to the right of (x, y). The gap is in points: SVG drops leading blanks."""
    axes.annotate(text, (x, y), xytext=(6, 0), textcoords="offset points", va="center", color=INK, fontsize=fontsize)
