"""Pictures of schedules: each kernel on the roofline, and the floors laid end to end. matplotlib is imported on use.

A picture shows numbers that a schedule already holds; writing it to a file is the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from resnet_fast.kernels.gpus import GPU

from .schedule import Kernel, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, ROOF = "#222222", "#9aa5b1"
BOUND = {"bytes": "#5b8fb9", "math": "#d98a29"}
MARKERS = {"per-conv": ("o", "#5b8fb9"), "rotated": ("s", "#1b7f5c"), "planned": ("D", "#7d5ba6")}


def figure(
    title: str,
    schedules: Sequence[Schedule],
    gpu: GPU,
    precision: str,
    measured: Mapping[frozenset[str], float] | None = None,
) -> Figure:
    """The roofline with a point for each kernel of the per-conv and the rotated schedule, above a bar per schedule.

    Args:
        measured: seconds of a launch by the layers in it; then the planned schedule, which ran, has points too, and a
            second, hollow one at what each kernel reached.
    """
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 7.5))
    roof, bars = drawn.subplots(2, 1, height_ratios=(3, 0.4 + 0.5 * len(schedules)))
    drawn.subplots_adjust(hspace=0.35)
    names = set(MARKERS) if measured else set(MARKERS) - {"planned"}
    _roofline(roof, [schedule for schedule in schedules if schedule.name in names], gpu, precision, measured or {})
    roof.set_title(title, fontsize=10, loc="left")
    _floors(bars, schedules, gpu, precision)
    return drawn


def _roofline(
    axes: Any, schedules: Sequence[Schedule], gpu: GPU, precision: str, measured: Mapping[frozenset[str], float]
) -> None:
    from matplotlib.ticker import LogLocator

    peak = gpu.flops[precision]
    ridge = peak / gpu.bandwidth
    points = [kernel.work.flops / kernel.work.bytes for schedule in schedules for kernel in schedule.kernels]
    left, right = min(*points, ridge) / 2, max(*points, ridge) * 2
    axes.plot([left, ridge, right], [left * gpu.bandwidth / 1e12, peak / 1e12, peak / 1e12], color=ROOF, zorder=1)
    for schedule in schedules:
        marker, color = MARKERS[schedule.name]
        whole = schedule.totals(gpu, precision).floor_seconds * schedule.batch
        for index, kernel in enumerate(schedule.kernels):
            intensity, floor = kernel.work.flops / kernel.work.bytes, kernel.work.floor(gpu, precision)
            # The area is the kernel's part of the whole, so that what matters is what is seen.
            style = {"s": 12 + 1500 * floor / whole, "marker": marker, "linewidths": 0.8, "zorder": 2}
            label = schedule.name if index == 0 else None
            axes.scatter(intensity, kernel.work.flops / floor / 1e12, color=color, alpha=0.45, label=label, **style)
            seconds = measured.get(frozenset(kernel.parts))
            if seconds and schedule is schedules[-1]:  # what ran is the planned schedule, if there is one
                axes.scatter(
                    intensity, kernel.work.flops / seconds / 1e12, facecolors="none", edgecolors=color, **style
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("intensity, flops per byte of device memory")
    axes.set_ylabel("attainable TFLOP/s" + (" (hollow: measured)" if measured else ""))
    axes.annotate(
        f"{gpu.bandwidth / 1e12:.3g} TB/s, {peak / 1e12:.4g} TFLOP/s: {ridge:.0f} flops per byte",
        (ridge, peak / 1e12), xytext=(4, -22), textcoords="offset points", fontsize=8, color=INK,
    )  # fmt: skip
    legend = axes.legend(loc="lower right", frameon=False, fontsize=9, title="area: part of the schedule's floor")
    legend.get_title().set_fontsize(8)
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    _plain_frame(axes)


def _floors(axes: Any, schedules: Sequence[Schedule], gpu: GPU, precision: str) -> None:
    """One bar per schedule: its kernels' floors per image in order, coloured by what bounds them."""
    longest = 0.0
    for position, schedule in enumerate(schedules):
        left = 0.0
        for kernel in schedule.kernels:
            width = 1e6 * kernel.work.floor(gpu, precision) / schedule.batch
            color = BOUND[kernel.bound(gpu, precision)]
            axes.barh(position, width, left=left, color=color, height=0.6, edgecolor="white", linewidth=0.3)
            left += width
        longest = max(longest, left)
        axes.text(left, position, f"  {left:.4g} µs, {1e6 / left:,.0f} images/s", va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(schedules)), [schedule.name for schedule in schedules])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * longest)
    axes.set_xlabel("floor per image, µs, kernel by kernel")
    shown: list[Kernel] = [kernel for schedule in schedules for kernel in schedule.kernels]
    used = [bound for bound in BOUND if any(kernel.bound(gpu, precision) == bound for kernel in shown)]
    handles = [axes.barh(0, 0, color=BOUND[bound]) for bound in used]
    axes.legend(handles, [f"bound by {bound}" for bound in used], frameon=False, fontsize=8, loc="lower right")
    _plain_frame(axes)


def _plain_frame(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
