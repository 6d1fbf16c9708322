"""Whole networks against every installed runtime, into result files: ``python -m benchmarks.bench_models``.

It draws and compares nothing across files; that is benchmarks/report.py.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from resnet_fast.benchmarking import machine, results
from resnet_fast.benchmarking.compare import Setting, compare, fresh_model
from resnet_fast.benchmarking.peers import PEERS, name_of
from resnet_fast.benchmarking.timing import Schedule
from resnet_fast.cli.bench import show
from resnet_fast.cli.common import progress_bar
from resnet_fast.models import list_models

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One result file."""

    arch: str
    dtype: torch.dtype
    batch: int

    @property
    def name(self) -> str:
        return f"{self.arch}-{name_of(self.dtype)}-b{self.batch}"


STANDARD = (
    Case("resnet50", torch.float32, 1),
    Case("resnet50", torch.bfloat16, 1),
    Case("resnet50", torch.float32, 16),
    Case("resnet50", torch.bfloat16, 16),
    Case("resnet152", torch.float32, 1),
    Case("resnet152", torch.bfloat16, 1),
)
"""What the README's table is made of."""


def measure(case: Case, *, peers: tuple[str, ...], seconds: float, image_size: int, folder: Path) -> Path:
    """Measures one case, shows it, and writes its file."""
    calls = 4 if case.batch < 8 else 2
    setting = Setting(
        arch=case.arch,
        batch=case.batch,
        image_size=image_size,
        dtype=case.dtype,
        peers=peers,
        schedule=Schedule(seconds=seconds, min_rounds=7, calls=calls),
    )
    with progress_bar() as progress:
        model = fresh_model(case.arch, image_size=image_size)
        result = compare(setting, model, progress=lambda stage, fraction: progress(f"{case.name}: {stage}", fraction))
    show(result)
    return results.write(folder / f"{case.name}.json", result)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_models", description=__doc__)
    parser.add_argument("--arch", choices=list_models(), help="only this network, together with --dtype and --batch")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="number format, with --arch")
    parser.add_argument("--batch", type=int, default=1, help="images in a batch, with --arch")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated contestants (default: all)")
    parser.add_argument("--seconds", type=float, default=40.0, help="time for the rounds of one case (default: 40)")
    parser.add_argument("--image-size", type=int, default=224, help="height and width (default: 224)")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: torch's choice)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"folder of the results (default: {RESULTS})")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    cases = [Case(given.arch, DTYPES[given.dtype], given.batch)] if given.arch else list(STANDARD)
    folder = given.output / machine.describe().slug
    for case in cases:
        path = measure(
            case,
            peers=tuple(given.peers.split(",")),
            seconds=given.seconds,
            image_size=given.image_size,
            folder=folder,
        )
        print(f"written: {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
