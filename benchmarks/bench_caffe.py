"""The Caffe ResNets on the CPU against OpenCV's own runtime, from the same files: ``python -m benchmarks.bench_caffe``.

It reads no published weights: the files are made here, with random ones. Other runtimes are for bench_models.

Ours are held to the error rule before they are timed. OpenCV's default computes 3x3 convolutions by Winograd's method
on 6x6 tiles, which is faster and loses about a digit; it takes part with and without, each within 1e-5.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fast as rf
from benchmarks.book import Options
from resnet_fast import caffe
from resnet_fast.benchmarking import machine, results
from resnet_fast.benchmarking.gate import Verdict, judge
from resnet_fast.benchmarking.network import randomize, seeded_batches
from resnet_fast.benchmarking.peers import Contestant
from resnet_fast.benchmarking.timing import Deadline, Schedule, flatten, interleave, paired_ratio, summarize

DEPTHS = (50, 101, 152)
STANDARD = (50, 152)
INPUTS = 4
"""Different images that the timed calls rotate through."""

LABELS = {
    "optimize": "resnet_fast.optimize()",
    "net": "loaded, layer by layer",
    "opencv": "OpenCV, as it comes",
    "opencv_direct": "OpenCV without Winograd",
}
OURS = ("optimize", "net")
LIMIT = 1e-5
"""What OpenCV's answers may be off by: of their norm, and of the largest one."""


def write_files(folder: Path, depth: int) -> tuple[str, str]:
    """Prototxt and caffemodel of a ResNet with random weights: BatchNorm's sums over a factor of 999.98, and biases."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = rf.models.get_model(f"resnet{depth}", stride_in_1x1=True, unpadded_pool=True)
    net = caffe.from_state_dict(randomize(model, seeded_batches((4, 3, 128, 128), 1)[0]).state_dict(), depth)
    for name, buffer in net.named_buffers():
        assert name.rpartition(".")[2] in ("mean", "variance", "factor")
        buffer.mul_(999.98)
    first = net.layer("conv1")
    if isinstance(first.bias, Tensor):
        nn.init.uniform_(first.bias, -0.1, 0.1, generator=torch.Generator().manual_seed(0))
    files = str(folder / "deploy.prototxt"), str(folder / "weights.caffemodel")
    caffe.save(net, *files)
    return files


def contestants(files: tuple[str, str], threads: int) -> dict[str, Contestant]:
    """Everybody from the same files, with NCHW images as Caffe has them."""
    import cv2

    net = caffe.load(*files)
    cv2.setNumThreads(threads)

    def theirs(winograd: bool) -> Contestant:
        loaded = cv2.dnn.readNetFromCaffe(*files)
        loaded.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
        loaded.setPreferableTarget(cv2.dnn.DNN_TARGET_CPU)
        loaded.enableWinograd(winograd)

        def run(image: Any) -> Any:
            loaded.setInput(image)
            return loaded.forward()

        return Contestant(Tensor.numpy, run, lambda output: torch.from_numpy(output.copy()))

    def ours(module: nn.Module) -> Contestant:
        def run(image: Tensor) -> Tensor:
            with torch.no_grad():
                found: Tensor = module(image)
            return found

        return Contestant(Tensor.contiguous, run, lambda output: output)

    return {
        "optimize": ours(rf.optimize(net)),
        "net": ours(net),
        "opencv": theirs(winograd=True),
        "opencv_direct": theirs(winograd=False),
    }


def measure(depth: int, schedule: Schedule, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Makes, judges and times everybody. Who breaks the error rule against float64 is not timed."""
    import cv2

    described, threads = machine.describe().as_dict(), torch.get_num_threads()
    described["versions"]["opencv"] = cv2.__version__
    images = seeded_batches((1, 3, 224, 224), INPUTS, seed=1)
    with tempfile.TemporaryDirectory(prefix="resnet_fast_bench_") as folder:
        progress(f"ResNet-{depth}: making the files", 0.0)
        files = write_files(Path(folder), depth)
        progress(f"ResNet-{depth}: loading them", 0.0)
        built = contestants(files, threads)
        progress(f"ResNet-{depth}: checking the answers", 0.0)
        with torch.no_grad():
            exact = caffe.load(*files).double()(images[0].double())
    plain = built["net"](images[0])
    verdicts = {name: _judged(name, contestant(images[0]), plain, exact) for name, contestant in built.items()}
    calls: dict[str, Callable[[int], object]] = {}
    for name, contestant in built.items():
        if verdicts[name].passed:
            calls[name] = _rotating(contestant.run, [contestant.prepare(image) for image in images])
    disturbance = machine.Disturbance()
    interleave(calls, Schedule(rounds=1, calls=1, pause=schedule.pause))
    samples = interleave(calls, schedule, progress=lambda fraction: progress(f"ResNet-{depth}: measuring", fraction))
    disturbed = disturbance.cores()
    rows: dict[str, Any] = {}
    for name, verdict in verdicts.items():
        status = "timed" if verdict.passed else "wrong"
        rows[name] = {"label": LABELS[name], "ours": name in OURS, "status": status, "reason": verdict.reason}
        rows[name]["gate"] = verdict.as_dict()
        if name in samples:
            seconds = summarize(flatten(samples[name]))
            rows[name] |= {"seconds": seconds.as_dict(), "images_per_second": 1 / seconds.p50}
    others = [name for name in samples if name != "optimize" and "optimize" in samples]
    return {
        "schema": results.SCHEMA,
        "kind": "caffe",
        "setting": {
            "arch": f"Caffe ResNet-{depth}", "batch": 1, "image_size": 224, "dtype": "float32", "threads": threads,
            "schedule": asdict(schedule), "parameters": "random, BatchNorm statistics randomised, seed 0",
        },
        "machine": described,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "contestants": rows,
        "ratios": {"against": {name: paired_ratio(samples["optimize"], samples[name]).as_dict() for name in others}},
        "others_busy_cores": disturbed,
        "samples": samples,
    }  # fmt: skip


def _judged(name: str, answer: Tensor, plain: Tensor, exact: Tensor) -> Verdict:
    verdict = judge(answer, plain, exact, torch.float32)
    if name in OURS:
        return verdict
    within = verdict.error <= LIMIT and verdict.largest <= LIMIT * exact.abs().max().item()
    reason = "" if within else f"error {verdict.error:.3g}, or its largest difference, is beyond the allowed {LIMIT:g}"
    return replace(verdict, allowed=LIMIT, reason=reason)


def _rotating(run: Callable[[Any], Any], inputs: list[Any]) -> Callable[[int], object]:
    return lambda number: run(inputs[number % len(inputs)])


def main() -> int:
    parser = Options("bench_caffe", __doc__, ("cpu",))
    parser.add_argument("--depth", type=int, choices=DEPTHS, help="only this ResNet (default: 50 and 152)")
    parser.add_argument("--case-seconds", type=float, default=40.0, help="for the rounds of one network (default: 40)")
    parser.add_argument("--threads", type=int, default=2, help="threads for everybody (default: 2)")
    parser.add_argument("--quick", action="store_true", help="three short rounds, and no file unless --out is given")
    given = parser.parse()
    if given.threads < 1 or not given.case_seconds > 0:
        parser.error("--threads must be at least 1 and --case-seconds positive")
    try:
        import cv2  # noqa: F401
    except ImportError:
        parser.error("OpenCV is not installed: pip install 'opencv-python-headless>=4.10,<5'")
    from resnet_fast.cli.bench import show
    from resnet_fast.cli.common import progress_bar

    schedule = Schedule(rounds=3, calls=2) if given.quick else Schedule(seconds=given.case_seconds, min_rounds=7)
    wrong = False
    for depth in Deadline(given.seconds).each([given.depth] if given.depth else STANDARD):
        with progress_bar() as progress:
            result = measure(depth, schedule, progress)
        show(result)
        wrong |= any(row["status"] != "timed" for row in result["contestants"].values())
        if given.out is not None:
            path = given.out / f"caffe-resnet{depth}-float32-b1.json"
            print(f"written: {results.write(path, result)}", file=sys.stderr)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
