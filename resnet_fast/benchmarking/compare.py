"""The whole comparison: one network, one machine, every contestant that can take part, as one result dictionary.

It prints nothing and writes nothing; the command line and the scripts in benchmarks/ do that.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.benchmarking import machine, results
from resnet_fast.benchmarking.gate import Verdict, judge
from resnet_fast.benchmarking.network import randomize, seeded_batches
from resnet_fast.benchmarking.peers import OURS, PEERS, Contestant, Peer, Task, name_of, plain
from resnet_fast.benchmarking.timing import Samples, Schedule, flatten, interleave, paired_ratio, summarize

Progress = Callable[[str, float], None]
"""Hears what is being done and the fraction of it that is done, between 0 and 1."""

INPUTS = 4
"""Different batches that the timed calls rotate through."""


@dataclass(frozen=True)
class Setting:
    """What to compare. ``weights`` only says what the network holds (None: random); ``peers`` are names of
    ``peers.PEERS``, and "optimize" is always among the contestants."""

    arch: str = "resnet50"
    weights: str | None = None
    batch: int = 1
    image_size: int = 224
    dtype: torch.dtype = torch.float32
    peers: tuple[str, ...] = tuple(PEERS)
    seed: int = 0
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}, it must be at least 1")
        if self.image_size < 33:
            raise ValueError(f"image size is {self.image_size}, it must be at least 33 pixels to leave something to do")
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {self.dtype}, it must be float32 or bfloat16")
        unknown = [name for name in self.peers if name not in PEERS]
        if unknown:
            raise ValueError(f"unknown peer {unknown[0]!r}; there are {', '.join(PEERS)}")

    @property
    def contestants(self) -> tuple[str, ...]:
        """The names asked for, in the order of ``PEERS``, with "optimize"."""
        return tuple(name for name in PEERS if name == "optimize" or name in self.peers)


def compare(
    setting: Setting,
    model: nn.Module,
    *,
    progress: Progress = lambda stage, fraction: None,
    peers: dict[str, Peer] = PEERS,
) -> dict[str, Any]:
    """Builds, judges and times every contestant and returns the result dictionary (``results.SCHEMA``).

    ``model`` is the network in eval mode, float32, on the CPU. A contestant that is missing, fails to build or breaks
    the error rule is listed with the reason and not timed. Raises RuntimeError if "optimize" itself is not timed.
    """
    shape = (setting.batch, 3, setting.image_size, setting.image_size)
    batches = [_rounded(batch, setting.dtype) for batch in seeded_batches(shape, INPUTS, seed=setting.seed + 1)]
    description = machine.describe()
    with tempfile.TemporaryDirectory(prefix="resnet_fast_bench_") as folder:
        task = Task(model, batches[0], setting.dtype, torch.get_num_threads(), Path(folder))
        built, excluded = _build(setting.contestants, peers, task, progress)
        verdicts = _judge(built, model, batches[0], setting.dtype, progress)
        ready = {name: contestant for name, contestant in built.items() if verdicts[name].passed}
        disturbance = machine.Disturbance()
        samples = _time(ready, batches, setting.schedule, progress)
        disturbed = disturbance.cores()
    if "optimize" not in samples:
        reason = excluded.get("optimize") or verdicts["optimize"].reason
        raise RuntimeError(f"resnet_fast.optimize() could not be measured: {reason}")
    rows = {}
    for name in setting.contestants:
        row: dict[str, Any] = {"label": peers[name].label, "ours": name in OURS}
        if name in excluded:
            row |= {"status": "excluded", "reason": excluded[name]}
        else:
            verdict = verdicts[name]
            row |= {"status": "timed" if verdict.passed else "wrong", "reason": verdict.reason}
            row["gate"] = verdict.as_dict()
        if name in samples:
            seconds = summarize(flatten(samples[name]))
            row["seconds"] = seconds.as_dict()
            row["images_per_second"] = setting.batch / seconds.p50
        rows[name] = row
    return {
        "schema": results.SCHEMA,
        "kind": "model",
        "setting": _setting_dict(setting),
        "machine": description.as_dict(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "contestants": rows,
        "ratios": ratios(samples),
        "others_busy_cores": disturbed,
        "samples": samples,
    }


def ratios(samples: Samples) -> dict[str, Any]:
    """How many times faster "optimize" is than every other contestant, and which of the foreign ones is the best."""
    ours = samples["optimize"]
    against = {name: paired_ratio(ours, rounds).as_dict() for name, rounds in samples.items() if name != "optimize"}
    foreign = {name: ratio for name, ratio in against.items() if name not in OURS}
    best = min(foreign, key=lambda name: foreign[name]["p50"]) if foreign else None
    return {"against": against, "best_peer": best}


def fresh_model(arch: str, *, image_size: int = 224, seed: int = 0) -> nn.Module:
    """The network of ``arch`` in eval mode, with seeded random weights.

    They include BatchNorm statistics, measured on a seeded batch and then disturbed (``network.randomize``).
    """
    from resnet_fast import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.get_model(arch)
    size = min(image_size, 128)
    return randomize(model, seeded_batches((4, 3, size, size), 1, seed=seed)[0], seed=seed)


def _build(
    names: Sequence[str], peers: dict[str, Peer], task: Task, progress: Progress
) -> tuple[dict[str, Contestant], dict[str, str]]:
    built: dict[str, Contestant] = {}
    excluded: dict[str, str] = {}
    for position, name in enumerate(names):
        peer = peers[name]
        progress(f"preparing {peer.label}", position / len(names))
        reason = peer.missing(task.dtype)
        if not reason:
            try:
                built[name] = peer.build(task)
                built[name](task.example)
            except Exception as error:  # a foreign runtime may fail in any way; the others still run
                built.pop(name, None)
                reason = f"failed: {_one_line(error)}"
        if reason:
            excluded[name] = reason
    progress("prepared", 1.0)
    return built, excluded


def _judge(
    built: dict[str, Contestant], model: nn.Module, batch: Tensor, dtype: torch.dtype, progress: Progress
) -> dict[str, Verdict]:
    """Judges everybody on the first and the last image of a full batch."""
    progress("computing the float64 reference", 0.0)
    picked = sorted({0, len(batch) - 1})
    layers = plain(model)
    with torch.no_grad():
        same_dtype = layers.to(dtype)(batch.to(dtype))[picked]
        exact = plain(model).double()(batch[picked].double())
    verdicts = {}
    for position, (name, contestant) in enumerate(built.items()):
        progress(f"checking {name}", (position + 1) / (len(built) + 1))
        verdicts[name] = judge(contestant(batch)[picked], same_dtype, exact, dtype)
    progress("checked", 1.0)
    return verdicts


def _time(ready: dict[str, Contestant], batches: list[Tensor], schedule: Schedule, progress: Progress) -> Samples:
    calls: dict[str, Callable[[int], object]] = {}
    for name, contestant in ready.items():
        inputs = [contestant.prepare(batch) for batch in batches]
        calls[name] = _call(contestant.run, inputs)
    interleave(calls, Schedule(rounds=1, calls=1, pause=schedule.pause))
    return interleave(calls, schedule, progress=lambda fraction: progress("measuring", fraction))


def _call(run: Callable[[Any], Any], inputs: list[Any]) -> Callable[[int], object]:
    return lambda number: run(inputs[number % len(inputs)])


def _rounded(batch: Tensor, dtype: torch.dtype) -> Tensor:
    """``batch`` in float32 holding only values that ``dtype`` can represent, so that all start from equal inputs."""
    return batch.to(dtype).float()


def _setting_dict(setting: Setting) -> dict[str, Any]:
    data = asdict(setting)
    data["dtype"] = name_of(setting.dtype)
    data["threads"] = torch.get_num_threads()
    data["parameters"] = setting.weights or f"random, BatchNorm statistics randomised, seed {setting.seed}"
    return data


def _one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."
