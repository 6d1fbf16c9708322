"""Whole networks against every installed runtime, into result files: ``python -m benchmarks.bench_models``.

With a CUDA GPU on that, else on the CPU. It draws and compares nothing across files; that is benchmarks/report.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from resnet_fast.benchmarking import cuda, machine, results
from resnet_fast.benchmarking.compare import Setting, compare, fresh_model
from resnet_fast.benchmarking.peers import PEERS, name_of
from resnet_fast.benchmarking.timing import Schedule
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
    """Measures one case on the CPU, shows it, and writes its file."""
    from resnet_fast.cli.bench import show
    from resnet_fast.cli.common import progress_bar

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


def measure_on_gpu(cases: Sequence[cuda.Case], *, names: tuple[str, ...], seconds: float, output: Path) -> int:
    """Measures ``cases`` on the CUDA GPU into its ``models.json``; exit status 1 if one of them failed."""
    from benchmarks import environment, gpu, gpu_stages

    folder = output / gpu.slug(environment.report())
    right = [gpu_stages.measure_case(folder, case, names, seconds=seconds) for case in cases]
    print(f"written: {folder / 'models.json'}", file=sys.stderr)
    return int(not all(right))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_models", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where torch sees a GPU")
    parser.add_argument("--arch", choices=list_models(), help="only this network, together with --dtype and --batch")
    parser.add_argument("--dtype", help=f"with --arch: {', '.join(DTYPES)}; on a GPU {', '.join(cuda.DTYPES)}")
    parser.add_argument("--batch", type=int, default=1, help="images in a batch, with --arch")
    parser.add_argument("--peers", help="comma-separated contestants (default: all)")
    parser.add_argument("--seconds", type=float, help="time for the rounds of one case (default: 40; on a GPU 3)")
    parser.add_argument("--image-size", type=int, default=224, help="height and width (default: 224)")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: torch's choice)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"folder of the results (default: {RESULTS})")
    given = parser.parse_args()
    on_gpu = (given.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    known = list(cuda.PEERS if on_gpu else PEERS)
    dtypes = list(cuda.DTYPES if on_gpu else DTYPES)
    dtype = given.dtype or ("fp16" if on_gpu else "float32")
    peers = tuple(given.peers.split(",")) if given.peers else tuple(known)
    if dtype not in dtypes:
        parser.error(f"--dtype is {dtype!r}, it must be one of {', '.join(dtypes)}")
    unknown = [name for name in peers if name not in known]
    if unknown:
        parser.error(f"--peers: {unknown[0]!r} is none of {', '.join(known)}")
    if on_gpu:
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no CUDA GPU here")
        cases = [cuda.Case(given.arch, dtype, given.batch, given.image_size)] if given.arch else list(standard_on_gpu())
        names = tuple(name for name in known if name == "optimize" or name in peers)
        return measure_on_gpu(cases, names=names, seconds=given.seconds or 3.0, output=given.output)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    folder = given.output / machine.describe().slug
    for case in [Case(given.arch, DTYPES[dtype], given.batch)] if given.arch else STANDARD:
        path = measure(
            case, peers=peers, seconds=given.seconds or 40.0, image_size=given.image_size, folder=folder
        )  # fmt: skip
        print(f"written: {path}", file=sys.stderr)
    return 0


def standard_on_gpu() -> tuple[cuda.Case, ...]:
    """ResNet-18, 50 and 152 at every precision and batch size, the most important first."""
    from benchmarks import gpu_stages

    return (*gpu_stages.FIRST, *gpu_stages.OTHERS)


if __name__ == "__main__":
    sys.exit(main())
