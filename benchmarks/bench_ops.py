"""The fused ops one by one against plain torch, at ResNet-50's shapes: ``python -m benchmarks.bench_ops [--op NAME]``.

On a GPU each stands beside its floor, from the copy bandwidth and the matrix rates measured here, beside Triton's and
CUDA's kernels and cuDNN's fused convolution, all by replays of CUDA graphs over inputs past the level-2 cache. With
``--check`` every op is judged by the error rule at small shapes, and nothing is timed. Results are written whole after
each measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ops
from benchmarks.book import Book, Options
from benchmarks.workers import mapped, workers_for
from resnet_fast import backends
from resnet_fast._dtypes import DTYPES
from resnet_fast.benchmarking import device as devices
from resnet_fast.benchmarking.device import Device
from resnet_fast.benchmarking.results import one_line
from resnet_fast.benchmarking.timing import Deadline, Samples, flatten, paired_ratio, summarize, turns
from resnet_fast.roofline.measure import tf32

OPS = ("conv_bn_act", "add_act", "batch_norm_act", "stem", "head", "bottleneck_tail")
BACKENDS = ("triton", "cuda")
BESIDE = (*BACKENDS, "cudnn")
"""Whose times stand beside the op's, which runs what is in force."""
PEERS = {"cuda": ("op", "plain", "triton", "cudnn"), "cpu": ("op", "plain", "prepared")}
"""Who is measured by default. CUDA's kernels are not among them: one that faults takes the process's GPU along."""
CUT_OFF = 3
"""Exit status of a check with nothing wrong so far and something left out for its time."""


# --- is it right


def check(
    folder: Path,
    deadline: Deadline,
    *,
    device: str = "cuda",
    workers: int | None = None,
    backend: str = "auto",
    precisions: tuple[str, ...] = tuple(DTYPES),
    chosen: tuple[str, ...] = OPS,
    repeats: int = 1,
) -> int:
    """Judge every op at small shapes and every precision by the error rule, with memory full of NaN before each.

    Each must give the same bits ``repeats`` times: what a missing fence or barrier changes, it changes now and then.

    Most of its time goes to compiling, so ``workers`` processes share it; with 1 it all happens in this one. With a
    ``backend`` of "cuda" only what its kernels compute, and there a fallback is wrong. Returns 1 if something is wrong,
    ``CUT_OFF`` if cases are left over.
    """
    book, wrong = Book(folder, "correctness", ("ops", "models")), 0
    items = [
        (precision, index, device, backend, repeats)
        for precision in precisions
        for index, make in enumerate(ops.small(precision, device))
        if ops.op_of(make) in chosen and (backend == "auto" or _cuda_computes(make, precision))
    ]
    if backend == "auto":
        book.data["asked"] = {precision: sum(item[0] == precision for item in items) for precision in precisions}
        book.save()
    with mapped(_judged, items, workers or workers_for(len(items)), _lost) as rows:
        for done, (title, row) in enumerate(rows, 1):
            wrong += not row["passed"]
            book.add("ops", title, row)
            text = row["reason"] or f"{row['error']:.1e} of {row['allowed']:.1e}"
            print(f"  {'right' if row['passed'] else 'WRONG'} {title}: {text}", flush=True)
            if deadline.left <= 0 and done < len(items):
                print("  the rest: out of time", flush=True)
                return int(wrong > 0) or CUT_OFF
    return int(wrong > 0)


def _cuda_computes(make: Callable[[], ops.OpCase], precision: str) -> bool:
    """Return whether CUDA's kernels compute a case; products of float32 they have only in ``head``."""
    op = ops.op_of(make)
    return op in backends.cuda.OPS and not (precision == "fp32" and op in ("conv_bn_act", "stem"))


Item = tuple[str, int, str, str, int]
"""Precision, case, device, backend, and how often the bits are compared."""


def _judged(item: Item) -> tuple[str, dict[str, Any]]:
    precision, index, device, backend, repeats = item
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings(), torch.no_grad(), tf32(precision == "tf32"), backends.use(backend):
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            case, before = ops.small(precision, device)[index](), backends.fallbacks()
            try:
                error, allowed, reason = case.judge("op")
                reason = reason or case.varies("op", repeats)
                if backend != "auto" and backends.fallbacks() != before:
                    reason = reason or "something slower ran than was asked for"
            except Exception as failure:  # one kernel's failure must not hide the others' results
                error, allowed, reason = float("inf"), 0.0, one_line(failure)
        title = case.title if backend == "auto" else f"{case.title} by {backend}"
        return title, _row(precision, error, allowed, reason)
    finally:
        torch.use_deterministic_algorithms(False)


def _lost(item: Item, reason: str) -> tuple[str, dict[str, Any]]:
    precision, index, *_ = item
    with torch.no_grad():
        title = ops.small(precision, "meta")[index]().title
    return title, _row(precision, float("inf"), 0.0, reason)


def _row(precision: str, error: float, allowed: float, reason: str) -> dict[str, Any]:
    return {"precision": precision, "error": error, "allowed": allowed, "passed": not reason, "reason": reason}


# --- how fast


def measure(
    folder: Path,
    deadline: Deadline,
    place: Device,
    *,
    precisions: tuple[str, ...],
    batches: tuple[int, ...],
    chosen: tuple[str, ...] = OPS,
    peers: tuple[str, ...] = ("op", "plain"),
    seconds: float = 0.3,
) -> int:
    """Judge and time each op at ResNet-50's shapes: the first precision at every batch, the others at the first.

    The most important come first. Returns 1 if an answer is wrong, or a kernel has cost this process its GPU.
    """
    from resnet_fast.backends import triton

    book, wrong, limits = Book(folder, "ops", ("ceilings", "rows")), 0, None
    without = {name: reason for name in BACKENDS if name in peers and (reason := backends.available()[name])}
    for name, reason in without.items():
        print(f"  without {name}: {reason}", flush=True)
    peers = tuple(name for name in peers if name not in without)
    if place.kind == "cuda":
        limits = triton.gpu_of(torch.device(place.name, 0))
        if "op" in peers:
            for name, row in measure_ceilings(place).items():
                book.add("ceilings", name, row)
        ceilings = book.data["ceilings"]
        if {"copy", *DTYPES} <= set(ceilings):
            rates = {precision: ceilings[precision]["per_second"] for precision in DTYPES}
            limits = dataclasses.replace(limits, bandwidth=ceilings["copy"]["per_second"], flops=rates)
    first, *others = precisions
    pairs = [(first, batch) for batch in batches]
    pairs[2:2] = [(precision, batches[0]) for precision in others]
    makes = (
        (make, precision)
        for precision, batch in pairs
        for make in ops.full(precision, batch, place.name)
        if ops.op_of(make) in chosen
    )
    for make, precision in deadline.each(makes if peers else ()):
        with tf32(precision == "tf32"), torch.no_grad():
            wrong += not measure_op(book, make(), limits, place, peers=peers, seconds=seconds)
        try:
            place.synchronize()
        except RuntimeError as failure:
            print(f"  the GPU FAILED: {one_line(failure)}; what was measured before is kept", flush=True)
            return 1
    return int(wrong > 0)


def measure_ceilings(device: Device, size: int = 1 << 28, edge: int = 8192) -> dict[str, dict[str, float]]:
    """Bytes a large copy moves in a second (read and written), and what a large product of random matrices computes."""

    def timed(call: Callable[[int], object]) -> list[list[float]]:
        return turns({"it": call}, device.synchronize, seconds=0.3)["it"]

    source = torch.randn(size, device=device.name)
    found = {"copy": timed(functools.partial(_copy, torch.empty_like(source), source))}
    work = {"copy": 2.0 * source.numel() * source.element_size()}
    del source
    for precision, dtype in DTYPES.items():
        edge_now = edge if precision != "fp32" else edge // 2
        with tf32(precision == "tf32"):
            a, b = (torch.randn(edge_now, edge_now, device=device.name).to(dtype) for _ in range(2))
            found[precision] = timed(functools.partial(_multiply, a, b))
        work[precision] = 2.0 * edge_now**3
    return {
        name: {"per_second": work[name] / summarize(flatten(rounds)).p50, "work": work[name]}
        for name, rounds in found.items()
    }


def _copy(target: Tensor, source: Tensor, number: int) -> None:
    target.copy_(source)


def _multiply(a: Tensor, b: Tensor, number: int) -> Tensor:
    return a @ b


def measure_op(
    book: Book,
    case: ops.OpCase,
    limits: Any,
    device: Device,
    *,
    peers: tuple[str, ...] = ("op", "plain"),
    seconds: float = 0.3,
) -> bool:
    """Judge and time one op case by each of the peers into ``book``. Whether those of ours were right.

    What the row has already stays if "op" takes no part: it is then of the peers that ran before.
    """
    op = case.contestants["op"]
    case = dataclasses.replace(case, contestants={**case.contestants, **{name: _by(name, op) for name in BACKENDS}})
    row: dict[str, Any] = {} if "op" in peers else dict(book.data["rows"].get(case.title, {}))
    times: dict[str, dict[str, Any]] = {**row.get("times", {})}
    row |= {"op": case.op, "case": case.name, "precision": case.precision, "batch": case.batch}
    calls: dict[str, Callable[[int], object]] = {}
    count = 1
    with _trying():
        for name in (name for name in peers if name in case.contestants):
            error, allowed, reason, none, before = float("inf"), 0.0, "", False, backends.fallbacks()
            try:
                error, allowed, reason = case.judge(name)
                if name in BACKENDS and backends.fallbacks() != before:
                    reason, none = f"no {name} kernel computes it here", True
                if not reason:
                    every, count = case.rotation(name, limits.l2 if limits else 0)
                    calls[name] = _replayed(every, device)
            except Exception as failure:  # a torch without cuDNN, or cuDNN without such a kernel, is no wrong answer
                reason, none = one_line(failure), name == "cudnn"
            if name == "op":
                row |= {"error": error, "allowed": allowed, "passed": not reason, "reason": reason}
            elif reason:
                times[name] = {"none" if none else "wrong": reason}
        samples = {
            name: [[one / count for one in turn] for turn in rounds]
            for name, rounds in turns(calls, device.synchronize, seconds=seconds, turn=0.005).items()
        }
    times |= {name: {"us": 1e6 * summarize(flatten(samples[name])).p50} for name in BESIDE if name in samples}
    row |= _compared(case, samples, limits) | {"input_sets": count, "times": times}
    for stamp in ("time", "commit"):
        row.pop(stamp, None)
    book.add("rows", case.title, row)
    print(f"  {case.title}: {_text(row)}", flush=True)
    gc.collect()
    return bool(row.get("passed", True)) and not any("wrong" in times.get(name, {}) for name in BACKENDS)


def _by(backend: str, run: Callable[..., ops.Result]) -> Callable[..., ops.Result]:
    def by(*activations: Tensor) -> ops.Result:
        with backends.use(backend):
            return run(*activations)

    return by


def _replayed(every: Callable[[], Tensor], device: Device) -> Callable[[int], object]:
    """Return a call of all sets of activations, by a graph if the device has them."""
    again: Callable[[], object] = every if device.capture is None else device.capture(every)[0]
    return lambda number: again()


@contextmanager
def _trying() -> Iterator[None]:
    """cuDNN times its algorithms at the first call of a shape, instead of guessing by heuristics."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _compared(case: ops.OpCase, samples: Samples, limits: Any) -> dict[str, Any]:
    """Return the op's seconds beside plain torch's, and its share of the floor if the GPU's limits are known."""
    found: dict[str, Any] = {"bytes": case.work.bytes, "flops": case.work.flops}
    if limits is not None:
        floor = case.work.floor(limits, case.precision)
        bound = "bytes" if case.work.bytes / limits.bandwidth >= floor else "math"
        found |= {"floor_seconds": floor, "bound": bound}
    for name, key in (("op", "seconds"), ("plain", "plain_seconds"), ("prepared", "prepared_seconds")):
        if name in samples:
            found[key] = summarize(flatten(samples[name])).as_dict()
    if "op" in samples:
        if "plain" in samples:
            found["against_plain"] = paired_ratio(samples["op"], samples["plain"]).as_dict()
        if limits is not None:
            found["share"] = found["floor_seconds"] / found["seconds"]["p50"]
    return found


def _text(row: dict[str, Any]) -> str:
    parts = [] if row.get("passed", True) else [f"WRONG: {row['reason']}"]
    if "seconds" in row:
        share = f" ({100 * row['share']:.0f} % of its floor)" if "share" in row else ""
        parts.append(f"{1e6 * row['seconds']['p50']:.1f} us{share}")
    if "against_plain" in row:
        parts.append(f"{row['against_plain']['p50']:.2f}x plain torch's speed")
    for name, one in row["times"].items():
        what = f"{one['us']:.1f} us" if "us" in one else f"WRONG: {one['wrong']}" if "wrong" in one else one["none"]
        parts.append(f"{name} {what}")
    return ", ".join(parts)


def main() -> int:
    parser = Options("bench_ops", __doc__)
    parser.add_argument("--op", choices=OPS, action="append", help="only this op; may be repeated")
    parser.add_argument("--check", action="store_true", help="judge them at small shapes and time nothing")
    parser.add_argument("--backend", choices=("auto", "cuda"), default="auto", help="with --check: whose kernels")
    known = (*PEERS["cpu"], *BESIDE)
    parser.add_argument("--peers", help=f"of {','.join(known)} (default: all that suit the device, but cuda)")
    parser.add_argument("--repeats", type=int, default=1, help="with --check: how often each must give the same bits")
    parser.add_argument("--workers", type=int, help="with --check: processes (default: half of the cores, at most 8)")
    parser.add_argument("--dtype", help=f"of {','.join(DTYPES)}, comma-separated (default: all; fp32,bf16 on a CPU)")
    parser.add_argument(
        "--batch", help="images in a batch, comma-separated (default: 128,1,32 on a GPU, 1,16 on a CPU)"
    )
    parser.add_argument(
        "--case-seconds", type=float, default=0.3, help="time for the rounds of one case (default: 0.3)"
    )
    given = parser.parse()
    device, default = given.device, ",".join(DTYPES) if given.device == "cuda" or given.check else "fp32,bf16"
    precisions = parser.names("--dtype", given.dtype or default, DTYPES)
    deadline, folder, chosen = Deadline(given.seconds), given.out, tuple(given.op or OPS)
    if given.check:
        if given.backend == "cuda" and backends.available()["cuda"]:
            print(f"  not run: {backends.available()['cuda']}", flush=True)
            return 0
        return check(
            folder,
            deadline,
            device=device,
            workers=given.workers,
            backend=given.backend,
            precisions=precisions,
            chosen=chosen,
            repeats=given.repeats,
        )
    batches = given.batch or ("128,1,32" if device == "cuda" else "1,16")
    return measure(
        folder,
        deadline,
        devices.of(device),
        precisions=precisions,
        batches=tuple(map(int, batches.split(","))),
        chosen=chosen,
        peers=parser.names("--peers", given.peers, known) if given.peers else PEERS[device],
        seconds=given.case_seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
