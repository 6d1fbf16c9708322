"""Nsight Compute on the launches that lose most to their floors: ``python -m benchmarks.counters``, into counters.json.

Which they are is read from the file of the stage ``layers``; each is launched alone, in a process that ncu watches. No
clock is locked. Without a GPU it says which launches the estimate would have it look at, and runs nothing.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks import summary
from benchmarks.book import Book, Options
from benchmarks.process import Process
from resnet_fast.benchmarking.timing import Deadline
from resnet_fast.kernels import gpus
from resnet_fast.kernels.gpus import GPU
from resnet_fast.tuning import estimate, ops
from resnet_fast.tuning.ops import Case

ARCH, BATCH, PRECISION, COUNT = "resnet50", 128, "fp16", 5
REHEARSED = "h200"
METRICS = (
    "gpu__time_duration.sum",
    "sm__inst_executed_pipe_tensor.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "dram__bytes.sum",
    "lts__t_bytes.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio",
)
"""Time, products, bytes of memory and level-2 cache, occupancy, and what warps wait for."""


def launched(gpu: GPU) -> tuple[tuple[tuple[str, ...], Case], ...]:
    """Return the launches of the network as they are planned for ``gpu``."""
    return estimate.launched(estimate.PLANNED, ARCH, BATCH, 224, PRECISION, gpu)


def measured(folder: Path, gpu: GPU) -> list[int]:
    """Return which launches, by their places, lose most time to their floors, as measured; empty if nothing was."""
    path = folder / f"layers-{ARCH}-{PRECISION}-b{BATCH}.json"
    lost: dict[frozenset[str], float] = {}
    for schedule in summary.read(path).get("schedules", []):
        if schedule["name"] == estimate.PLANNED:
            for row in schedule["rows"]:
                if row["measured_seconds"] is not None:
                    lost[frozenset(row["parts"])] = row["measured_seconds"] - row["floor_seconds"]
    return worst([lost.get(frozenset(parts), 0.0) for parts, _ in launched(gpu)], [case for _, case in launched(gpu)])


def estimated(gpu: GPU) -> list[int]:
    """Return the same as the estimate has it."""
    found = estimate.estimates(launched(gpu), gpu)
    return worst([each.estimate.seconds - each.estimate.floor for each in found], [each.case for each in found])


def worst(lost: list[float], cases: list[Case]) -> list[int]:
    """Return the places of the cases that lose most, each case once."""
    places = sorted(range(len(cases)), key=lambda place: -lost[place])
    seen: dict[Case, int] = {}
    for place in places:
        if lost[place] > 0:
            seen.setdefault(cases[place], place)
    return list(seen.values())[:COUNT]


def run(case: Case, gpu: GPU, device: str) -> None:
    """Launch a case three times; the third is the one that is watched."""
    import torch

    op = ops.get(case.op)
    config = op.kernel.choose(case.problem, gpu)
    launch = op.launch(op.kernel, op.example(case, torch.device(device)), case, config)
    for _ in range(3):
        launch()
    torch.cuda.synchronize()


def watch(program: str, place: int, kernel: str, seconds: float) -> dict[str, Any]:
    """Return the counters of one launch, or why there are none under "none"."""
    command = [
        program, "--set", "basic", "--metrics", ",".join(METRICS), "--clock-control", "none", "--page", "raw", "--csv",
        "--kernel-name", f"regex:^{kernel}$", "--launch-skip", "2", "--launch-count", "1", "--target-processes", "all",
        sys.executable, "-m", "benchmarks.counters", "--device", "cuda", "--launch", str(place),
    ]  # fmt: skip
    process = Process(command, Path.cwd(), os.environ)
    status, output = process.wait(max(1.0, seconds)), process.output()
    if status is None:
        return {"none": "out of time"}
    if found := read(output):
        return {"counters": found}
    said = next((line for line in output.splitlines() if "==ERROR==" in line), "")
    return {"none": said or f"ncu gave no counters, exit status {status}"}


def read(text: str) -> dict[str, float]:
    """Return the metrics of the one kernel in ncu's raw page as CSV: a line of names, one of units, one of values."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.reader(io.StringIO("\n".join(lines))))
    if len(rows) < 3:
        return {}
    found = {}
    for name, unit, value in zip(*rows[:3], strict=False):
        if name in METRICS:
            try:
                found[f"{name} {unit}".strip()] = float(value.replace(",", ""))
            except ValueError:  # "n/a": this GPU has no such counter
                continue
    return found


def main() -> int:
    parser = Options("counters", __doc__)
    parser.add_argument("--launch", type=int, help="only launch this one; what ncu is told to watch")
    given = parser.parse()
    if given.device == "cpu":
        gpu = gpus.known(REHEARSED)
        cases = launched(gpu)
        for place in estimated(gpu):
            print(f"  would watch, by the estimate for {gpu.name}: {cases[place][0][0]}, {cases[place][1]}", flush=True)
        return 0
    import torch

    from resnet_fast.backends import triton

    gpu = triton.gpu_of(torch.device("cuda", torch.cuda.current_device()))
    cases = launched(gpu)
    if given.launch is not None:
        run(cases[given.launch][1], gpu, "cuda")
        return 0
    program, places = shutil.which("ncu"), measured(given.out, gpu)
    if program is None or not places:
        print(f"  not run: {'ncu is not installed' if program is None else 'no launch was measured'}", flush=True)
        return 0
    book, deadline = Book(given.out, "counters", ("launches",)), Deadline(given.seconds)
    for place in deadline.each(places):
        parts, case = cases[place]
        kernel = estimate.kernel_name(case, gpu)
        row = watch(program, place, kernel, deadline.left)
        book.add("launches", parts[0], {"problem": case.problem.key(), "kernel": kernel, **row})
        print(f"  {parts[0]}: {row.get('none') or row['counters']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
