"""Whole networks against every installed runtime, into result files: ``python -m benchmarks.bench_models``.

With a CUDA GPU on that, into ``models.json``, else on the CPU, each case into a file of its own. ``--busy`` measures
once more beside busy processes. ``--check`` judges the networks against float64 and times nothing, ``--warm`` only
compiles what they run. It draws and compares nothing across files; that is benchmarks/report.py.
"""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.book import Book, Options
from benchmarks.summary import rates
from benchmarks.workers import mapped, workers_for
from resnet_fast._dtypes import DTYPES
from resnet_fast.benchmarking import device as devices
from resnet_fast.benchmarking import results
from resnet_fast.benchmarking.compare import Setting, compare, fresh_model
from resnet_fast.benchmarking.device import CPU, CUDA, Device
from resnet_fast.benchmarking.gate import judge
from resnet_fast.benchmarking.network import seeded_batches
from resnet_fast.benchmarking.peers import PEERS, Task, plain, serving
from resnet_fast.benchmarking.results import one_line
from resnet_fast.benchmarking.timing import Deadline, Schedule
from resnet_fast.models import list_models
from resnet_fast.roofline.measure import tf32

Case = tuple[str, str, int]
"""Network, precision, batch."""

ON_CPU: tuple[Case, ...] = (
    *itertools.product(("resnet50",), ("fp32", "bf16"), (1, 16)),
    *itertools.product(("resnet18", "resnet152"), ("fp32", "bf16"), (1, 16)),
)
"""What the README's table is made of, the most important first."""
IN_INT8: tuple[Case, ...] = tuple(itertools.product(("resnet50", "resnet18", "resnet152"), ("int8",), (1, 16)))
"""What ``--dtype int8`` measures."""
SHARED: Case = ("resnet50", "fp32", 1)
"""What is measured beside a busy process too, and by one thread."""

FIRST: tuple[Case, ...] = tuple(("resnet50", "fp16", batch) for batch in (128, 1, 32, 256, 8))
_HALF, _OTHER = ("resnet152", "resnet18"), ("bf16", "tf32", "fp32")
OTHERS: tuple[Case, ...] = tuple(
    (arch, precision, batch)
    for archs, precisions, batches in (
        (_HALF, ("fp16",), (128, 1)),
        (("resnet50",), _OTHER, (128, 1)),
        (_HALF, ("fp16",), (32, 256, 8)),
        (("resnet50",), _OTHER, (32, 256, 8)),
        (_HALF, _OTHER, (128, 1, 32, 256, 8)),
    )
    for batch in batches
    for arch in archs
    for precision in precisions
)
FINE, ROUNDS = (128, 1), 30
"""On a GPU: batches that have at least so many rounds, so that the tenth and ninetieth percentiles are no extremes."""
SETS = {"first": FIRST, "others": OTHERS, "all": (*FIRST, *OTHERS)}
"""What is measured on a GPU, the most important first."""

JUDGED = tuple(itertools.product(("resnet50", "resnet18", "resnet152"), DTYPES))
"""Networks and precisions whose answers are judged."""


# --- one case


def measure_on_cpu(setting: Setting, folder: Path) -> Path:
    """Measure one case on the CPU, show it, and write its file."""
    from resnet_fast.cli.bench import show
    from resnet_fast.cli.common import progress_bar

    with progress_bar() as progress:
        progress(f"{setting.name}: making the network", 0.0)
        model = _model(setting.arch, setting.image_size)
        result = compare(
            setting, model, progress=lambda stage, fraction: progress(f"{setting.name}: {stage}", fraction)
        )
    show(result)
    return results.write(folder / f"{setting.name}.json", result)


def measure(folder: Path, setting: Setting) -> bool:
    """Measure one case into ``models.json``, print a line, and say whether our own answer was right.

    What is in the file already about contestants that take no part this time stays, marked by its own time.
    """
    book = Book(folder, "models", ("cases",))
    try:
        row = compare(setting, _model(setting.arch, setting.image_size))
    except Exception as error:
        book.add("cases", setting.name, {"setting": setting.as_dict(), "failed": one_line(error)})
        print(f"  {setting.name}: FAILED {one_line(error)}", flush=True)
        return False
    finally:
        _free()
    for name in ("schema", "kind", "machine", "resnet_fast", "samples"):
        del row[name]
    print(f"  {setting.name}: img/s: {rates(row)}", flush=True)
    book.merge(setting.name, row)
    return True


_models: dict[tuple[str, int], nn.Module] = {}


def _model(arch: str, image_size: int = 224) -> nn.Module:
    """Return a seeded network, made once in a process."""
    key = (arch, image_size)
    if key not in _models:
        _models[key] = fresh_model(arch, image_size=image_size)
    return _models[key]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- is it right


def check(
    folder: Path,
    deadline: Deadline,
    cases: Sequence[tuple[str, str]] = JUDGED,
    *,
    device: str = "cuda",
    image_size: int = 224,
    batch: int = 128,
) -> int:
    """Write the relative error of whole networks, ours and plain torch's at the same precision, against float64: of the
    first and last two images of a batch of the size that is timed. Returns 1 if one is wrong."""
    book, wrong = Book(folder, "correctness", ("ops", "models")), 0
    picked = sorted({0, min(1, batch - 1), max(0, batch - 2), batch - 1})
    for arch, precision in deadline.each(cases):
        model, dtype = _model(arch, image_size), DTYPES[precision]
        images = seeded_batches((batch, 3, image_size, image_size), 1, seed=7)[0].to(device, dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), tf32(precision == "tf32"):
            exact = plain(model).to(device).double()(images[picked].double()).cpu()
            same = plain(model).to(device, dtype).to(memory_format=torch.channels_last)(images)[picked].cpu()
            try:
                answer = PEERS["optimize"].build(_task(model, images, dtype))(images)[picked]
                row = judge(answer.float(), same, exact, dtype).as_dict()
            except Exception as failure:
                row = {"passed": False, "reason": one_line(failure), "error": None, "allowed": None}
        row["torch"] = float((same.double() - exact).norm() / exact.norm())
        wrong += not row["passed"]
        book.add("models", f"{arch} {precision}", {"image_size": image_size, "batch": batch, **row})
        print(f"  {arch} {precision}: ours {row['error']}, torch {row['torch']:.2e} {row['reason']}", flush=True)
        gc.collect()
    return int(wrong > 0)


def _task(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Task:
    return Task(model, images, dtype, torch.get_num_threads(), Path())


# --- only compiled


def warm(cases: Sequence[Case]) -> int:
    """Compile in parallel what the networks run, by running each once; nothing is kept but caches."""
    with mapped(_warmed, cases, workers_for(len(cases)), lambda case, reason: (case, reason)) as done:
        for case, reason in done:
            print(f"  {' '.join(map(str, case))} {reason or 'compiled'}", flush=True)
    return 0


def _warmed(case: Case) -> tuple[Case, str]:
    arch, precision, size = case
    try:
        dtype = DTYPES[precision]
        with torch.no_grad(), tf32(precision == "tf32"):
            batch = torch.zeros(size, 3, 224, 224, device="cuda", dtype=dtype)
            batch = batch.contiguous(memory_format=torch.channels_last)
            PEERS["optimize"].build(_task(_model(arch), batch, dtype))(batch)
            torch.cuda.synchronize()
        return case, ""
    except Exception as error:
        return case, one_line(error)
    finally:
        _free()


# --- the command


def main() -> int:
    parser = Options("bench_models", __doc__)
    parser.add_argument("--arch", choices=list_models(), help="only this network, at --dtype and --batch")
    parser.add_argument("--dtype", help=f"of {','.join(DTYPES)} and int8 (CPU), comma-separated; with --arch the first")
    parser.add_argument("--batch", type=int, help="images in a batch, with --arch (default: 1) or --check")
    parser.add_argument("--cases", choices=tuple(SETS), default="all", help="on a GPU: ResNet-50 in fp16, the others")
    parser.add_argument("--peers", help="comma-separated contestants (default: all)")
    parser.add_argument("--check", action="store_true", help="judge the answers and time nothing")
    parser.add_argument("--warm", action="store_true", help="on a GPU: compile what will run and time nothing")
    parser.add_argument("--case-seconds", type=float, help="time for the rounds of one case (default: 20; on a GPU 3)")
    parser.add_argument("--image-size", type=int, default=224, help="height and width (default: 224)")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: torch's choice)")
    busy = "on a CPU: measure once more beside so many busy processes (default: 1 for ResNet-50, float32, batch 1)"
    parser.add_argument("--busy", type=int, metavar="N", help=busy)
    given = parser.parse()
    place = devices.of(given.device)
    usual = tuple(DTYPES) if place is CUDA or given.check else ("fp32", "bf16")
    known = usual if place is CUDA or given.check else (*usual, "int8")
    precisions = parser.names("--dtype", given.dtype or ",".join(usual), known)
    peers = parser.names("--peers", given.peers or "", serving(place.kind))
    if given.warm and place is CPU:
        parser.error("--warm is for a GPU, and torch sees none here")
    deadline, folder = Deadline(given.seconds), given.out
    if given.check:
        judged = [(arch, name) for arch, name in JUDGED if name in precisions and arch == (given.arch or arch)]
        options = {"device": place.name, "image_size": given.image_size, "batch": given.batch or 128}
        return check(folder, deadline, judged, **options)
    if given.warm:
        compiled = [*FIRST, *((*each, 128) for each in JUDGED if (*each, 128) not in FIRST)]
        return warm([case for case in compiled if case[1] in precisions])
    cases = [case for case in ((*ON_CPU, *IN_INT8) if place is CPU else SETS[given.cases]) if case[1] in precisions]
    if given.arch:
        cases = [(given.arch, precisions[0], given.batch or 1)]
    missing = [PEERS[name].missing(torch.float32) for name in peers if PEERS[name].missing(torch.float32)]
    if place is CUDA and missing:
        print(f"  nothing to compare with: {'; '.join(missing)}", flush=True)
        return 0
    try:
        settings = settings_of(cases, place, peers, given)
    except ValueError as error:
        parser.error(str(error))
    return _all(settings, deadline, folder)


def settings_of(cases: Sequence[Case], place: Device, peers: tuple[str, ...], given: Any) -> list[Setting]:
    """Return the settings of the cases; on a CPU ``SHARED`` is followed by the same with one thread.

    A call of a large batch takes so long that whatever ran before it does not matter: one a turn, and none untimed.
    """
    seconds, found = given.case_seconds or (3.0 if place is CUDA else 20.0), []
    for case in cases:
        arch, precision, batch = case
        large = place is CPU and batch >= 8
        rhythm = {"min_rounds": 5, "calls": 1, "warmup": 0} if large else {"min_rounds": 7, "calls": 4}
        if place is CUDA and batch in FINE:
            rhythm["min_rounds"] = ROUNDS
        schedule = Schedule(seconds=seconds, **rhythm)
        setting = Setting(arch, None, batch, given.image_size, precision, peers, schedule=schedule, device=place)
        if place is CPU:
            shared = int(case == SHARED) if given.busy is None else given.busy
            setting = replace(setting, threads=given.threads, busy=shared)
        found.append(setting)
        if place is CPU and case == SHARED and not given.arch and given.threads is None:
            found.append(replace(setting, threads=1, busy=0))
    return found


def _all(settings: Sequence[Setting], deadline: Deadline, folder: Path) -> int:
    """Measure the cases as far as the time goes; exit status 1 if one of them failed."""
    wrong = 0
    for setting in deadline.each(settings):
        if setting.device is CUDA:
            wrong += not measure(folder, setting)
            continue
        try:
            print(f"written: {measure_on_cpu(setting, folder)}", file=sys.stderr)
        except RuntimeError as error:  # our own answer is wrong; the other cases still count
            print(f"  {setting.name}: FAILED {error}", file=sys.stderr, flush=True)
            wrong += 1
        _free()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
