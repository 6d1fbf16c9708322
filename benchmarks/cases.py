"""What the single-op benchmarks share: the precisions and batches of this machine, the gate, and how a case is timed.

Run them with ``pytest benchmarks/bench_<op>.py``; ``--benchmark-json`` writes a file. With a CUDA GPU they run on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.ops import OpCase
from resnet_fast.roofline.measure import tf32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = ("fp16", "bf16", "tf32", "fp32") if DEVICE == "cuda" else ("fp32", "bf16")
BATCHES = (1, 32, 128) if DEVICE == "cuda" else (1, 16)

Make = Callable[[str], OpCase]
"""Makes a case on a device."""


def measure(benchmark: Any, make: Make, who: str) -> None:
    """Judges ``who``, and times it if the error rule holds; on a GPU by replays of a CUDA graph, beside its floor."""
    case = make(DEVICE)
    benchmark.group = case.title
    with torch.no_grad(), tf32(case.precision == "tf32"):
        error, allowed, reason = case.judge(who)
        assert not reason, reason
        benchmark.extra_info.update(error=error, allowed=allowed, torch=torch.__version__)
        benchmark.extra_info["backend"] = (
            "torch" if who == "plain" else getattr(case.contestants[who], "backend", "auto")
        )
        (_on_gpu if DEVICE == "cuda" else _on_cpu)(benchmark, case, who)


def _on_cpu(benchmark: Any, case: OpCase, who: str) -> None:
    run, activations = case.contestants[who], case.data(0)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    run(*activations)
    benchmark(run, *activations)


def _on_gpu(benchmark: Any, case: OpCase, who: str) -> None:
    from resnet_fast.backends import triton
    from resnet_fast.benchmarking.cuda import capture

    gpu = triton.gpu_of(torch.device("cuda"))
    every, count = case.rotation(who, gpu.l2)
    replay, _ = capture(every)

    def replayed() -> None:
        replay()
        torch.cuda.synchronize()

    benchmark.extra_info.update(
        gpu=torch.cuda.get_device_name(),
        calls_in_a_sample=count,
        floor_seconds=case.work.floor(gpu, case.precision),
    )
    benchmark(replayed)
    if benchmark.stats:
        seconds = benchmark.stats.stats.median / count
        benchmark.extra_info["share_of_floor"] = benchmark.extra_info["floor_seconds"] / seconds
