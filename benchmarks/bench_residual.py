"""The small residual network on digits, fused and from plain torch layers: ``python -m benchmarks.bench_residual``.

For each seed both are trained from the same values in the same order; the result file has every epoch of every run. It
says what accuracy the training reaches and that fusing changes nothing about it; speed is for the other benchmarks.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch

from benchmarks.book import Options
from resnet_fast.benchmarking import machine, results
from resnet_fast.benchmarking.timing import Deadline
from resnet_fast.cli.train_residual import EPOCHS
from resnet_fast.training import digits
from resnet_fast.training.residual import Run, Settings, agreement

KINDS = {"fused": False, "plain torch layers": True}
"""What is trained, and whether it is the copy from plain layers."""


def train(data: digits.Digits, settings: Settings, epochs: int, plain_layers: bool, title: str) -> dict[str, Any]:
    """One run from the start: its epochs, the last validation accuracy, and how the three kinds of answers compare."""
    from resnet_fast.cli.common import progress_bar

    start = time.perf_counter()
    run, rows = Run(data, settings, plain_layers=plain_layers), []
    for number in range(epochs):
        with progress_bar() as progress:
            found = run.epoch(lambda fraction, n=number: progress(f"{title}, epoch {n}", fraction))
        rows.append(found.as_dict())
        print(f"{title}, epoch {number}: train {found.train_accuracy:.4f}, valid {found.valid_accuracy:.4f}, "
              f"{found.seconds:.1f} s", file=sys.stderr, flush=True)  # fmt: skip
    compared = agreement(run.model, data.held_out)
    return {
        "valid_accuracy": rows[-1]["valid_accuracy"],
        "agreement": {**asdict(compared), "agrees": compared.agrees},
        "seconds": time.perf_counter() - start,
        "epochs": rows,
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and most of the last validation accuracy for each kind, over the seeds that are done."""
    found = {}
    for kind in KINDS:
        accuracies = [run[kind]["valid_accuracy"] for run in runs if kind in run]
        if accuracies:
            found[kind] = {
                "runs": len(accuracies),
                "mean": statistics.fmean(accuracies),
                "min": min(accuracies),
                "max": max(accuracies),
            }
    return found


def main() -> int:
    parser = Options("bench_residual", __doc__, ("cpu",))
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 (default: 5)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"default: {EPOCHS}")
    parser.add_argument("--batch-size", type=int, default=50, help="default: 50")
    parser.add_argument("--lr", type=float, default=1e-3, help="default: 0.001")
    parser.add_argument("--only", choices=tuple(KINDS), help="train this kind alone")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: torch's choice)")
    given = parser.parse()
    if given.seeds < 1 or given.epochs < 1:
        parser.error("--seeds and --epochs must be at least 1")
    described = machine.describe()
    path = given.out / "residual-digits.json"
    disturbance = machine.Disturbance()
    runs: list[dict[str, Any]] = []
    for seed in Deadline(given.seconds).each(range(given.seeds)):
        data, settings = digits.load("digits", seed), Settings(given.batch_size, given.lr, seed)
        run: dict[str, Any] = {"seed": seed}
        runs.append(run)
        for kind in [given.only] if given.only else KINDS:
            run[kind] = train(data, settings, given.epochs, KINDS[kind], f"seed {seed}, {kind}")
            results.write(path, {
                "schema": results.SCHEMA,
                "kind": "residual",
                "setting": {
                    "data": data.name, "train": len(data.train), "validation": len(data.validation),
                    "epochs": given.epochs, "batch_size": given.batch_size, "lr": given.lr,
                    "threads": torch.get_num_threads(),
                },
                "machine": described.as_dict(),
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "others_busy_cores": disturbance.cores(),
                "summary": summary(runs),
                "runs": runs,
            })  # fmt: skip
    for kind, found in summary(runs).items():
        print(f"{kind}: validation accuracy {found['mean']:.2%} (least {found['min']:.2%}, most {found['max']:.2%}, "
              f"{found['runs']} seeds)")  # fmt: skip
    print(f"written: {path}", file=sys.stderr)
    return int(not all(run[kind]["agreement"]["agrees"] for run in runs for kind in KINDS if kind in run))


if __name__ == "__main__":
    sys.exit(main())
