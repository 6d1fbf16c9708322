"""The whole comparison: one network, one machine, every contestant that can take part, as one result dictionary.

On a CPU every call is timed by itself. On a GPU a sample is the mean of back-to-back calls, and each contestant runs as
plain calls and, if it can be recorded, as replays of CUDA graphs. Nothing is printed or written here.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast._dtypes import DTYPES
from resnet_fast.benchmarking import contention, machine, results
from resnet_fast.benchmarking.device import CPU, Device
from resnet_fast.benchmarking.gate import Verdict, judge
from resnet_fast.benchmarking.int8_peers import INT8_PEERS, simulated
from resnet_fast.benchmarking.network import randomize, seeded_batches
from resnet_fast.benchmarking.peers import PEERS, Contestant, Peer, Task, name_of, plain, serving
from resnet_fast.benchmarking.timing import (
    Samples,
    Schedule,
    flatten,
    interleave,
    paired_ratio,
    quantile,
    summarize,
    turns,
)
from resnet_fast.roofline.measure import tf32

Progress = Callable[[str, float], None]
"""Hears what is being done and the fraction of it that is done, between 0 and 1."""

Call = Callable[[int], Any]

INPUTS = 4
"""Different batches that the timed calls rotate through; with graphs, each has a graph of its own."""


@dataclass(frozen=True)
class Setting:
    """What to compare. ``weights`` only says what the network holds (None: random). ``peers`` are names of
    ``peers.PEERS``, by default all that run on the device; "optimize" is always among the contestants. On a GPU the
    ``schedule`` gives no more than its seconds. ``threads``: how many to compute with (None: as torch is set).
    ``busy``: how many busy processes to measure beside, after the measurement without them."""

    arch: str = "resnet50"
    weights: str | None = None
    batch: int = 1
    image_size: int = 224
    precision: str = "fp32"
    peers: tuple[str, ...] = ()
    seed: int = 0
    schedule: Schedule = field(default_factory=Schedule)
    device: Device = CPU
    threads: int | None = None
    busy: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}, it must be at least 1")
        if self.image_size < 33:
            raise ValueError(f"image size is {self.image_size}, it must be at least 33 pixels to leave something to do")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}, it must be at least 1")
        if self.busy < 0 or (self.busy and self.device.kind != "cpu"):
            raise ValueError(f"busy is {self.busy}, it must be at least 0, and 0 on a GPU")
        known = ("fp32", "bf16", "int8") if self.device.kind == "cpu" else tuple(DTYPES)
        if self.precision not in known:
            raise ValueError(f"precision is {self.precision!r}, it must be one of {', '.join(known)}")
        those = self._serving
        unknown = [name for name in self.peers if name not in those]
        if unknown:
            raise ValueError(f"unknown peer {unknown[0]!r}; there are {', '.join(those)}")

    @property
    def _serving(self) -> tuple[str, ...]:
        return tuple(INT8_PEERS) if self.precision == "int8" else serving(self.device.kind)

    @property
    def dtype(self) -> torch.dtype:
        """What values are stored in."""
        return torch.int8 if self.precision == "int8" else DTYPES[self.precision]

    @property
    def name(self) -> str:
        """As "resnet50-float32-b1" on a CPU, "-t1" behind it if threads are given, "resnet50-fp16-b128" on a GPU."""
        kind = name_of(self.dtype) if self.device.kind == "cpu" else self.precision
        return f"{self.arch}-{kind}-b{self.batch}" + (f"-t{self.threads}" if self.threads else "")

    @property
    def contestants(self) -> tuple[str, ...]:
        """The names asked for, in the order of ``PEERS``, with "optimize"."""
        those = self._serving
        return tuple(name for name in those if name == "optimize" or name in (self.peers or those))

    def as_dict(self) -> dict[str, Any]:
        """Return the setting as a result file has it."""
        names = ("arch", "weights", "batch", "image_size", "precision", "seed", "busy")
        own = {name: getattr(self, name) for name in names}
        return own | {
            "name": self.name,
            "dtype": name_of(self.dtype),
            "peers": self.contestants,
            "schedule": asdict(self.schedule),
            "threads": self.threads or torch.get_num_threads(),
            "parameters": self.weights or f"random, BatchNorm statistics randomised, seed {self.seed}",
        }


def compare(
    setting: Setting,
    model: nn.Module,
    *,
    progress: Progress = lambda stage, fraction: None,
    peers: Mapping[str, Peer] | None = None,
) -> dict[str, Any]:
    """Build, judge and time every contestant and return the result dictionary (``results.SCHEMA``).

    ``model`` is the network in eval mode, float32, on the CPU. A contestant that is missing, fails to build or breaks
    the error rule, as a call or as a graph, is listed with the reason and not timed that way.

    Raises:
        RuntimeError: "optimize" itself is not timed.
    """
    from resnet_fast import info

    peers = peers or (INT8_PEERS if setting.precision == "int8" else PEERS)
    place, names = setting.device, setting.contestants
    shape = (setting.batch, 3, setting.image_size, setting.image_size)
    ways: dict[str, dict[str, dict[str, Any]]] = {}
    calls: dict[str, Call] = {}
    with (
        _threads(setting.threads),
        tempfile.TemporaryDirectory(prefix="resnet_fast_bench_") as folder,
        tf32(setting.precision == "tf32"),
        torch.no_grad(),
    ):
        description, about = machine.describe(), info().as_dict()
        batches = [_input(batch, setting) for batch in seeded_batches(shape, INPUTS, seed=setting.seed + 1)]
        task = Task(model, batches[0], setting.dtype, torch.get_num_threads(), Path(folder))
        progress("computing the float64 reference", 0.0)
        verdict = _judge(model, batches[0], setting.dtype)
        for position, name in enumerate(names):
            progress(f"preparing {peers[name].label}", position / len(names))
            ways[name], ready = _prepared(peers[name], task, batches, place, verdict)
            calls |= {f"{name} {mode}": call for mode, call in ready.items()}
        progress("checked", 1.0)
        disturbance = machine.Disturbance()
        samples = _time(calls, setting, progress)
        disturbed = disturbance.cores()
        contended: Samples = {}
        if setting.busy:
            with contention.busy(setting.busy):
                contended = _time(calls, setting, progress, f"measuring beside {contention.processes(setting.busy)}")
    for key, rounds in samples.items():
        name, mode = key.split()
        seconds = summarize(flatten(rounds))
        ways[name][mode] |= {"seconds": seconds.as_dict(), "images_per_second": setting.batch / seconds.p50}
    if not any(key.startswith("optimize ") for key in samples):
        reasons = "; ".join(way["reason"] for way in ways["optimize"].values())
        raise RuntimeError(f"resnet_fast.optimize() could not be measured: {reasons}")
    ours = tuple(name for name in names if peers[name].ours)
    return {
        "schema": results.SCHEMA,
        "kind": "model",
        "setting": setting.as_dict(),
        "machine": description.as_dict(),
        "resnet_fast": about,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "contestants": {
            name: {
                "label": peers[name].label,
                "ours": peers[name].ours,
                "note": peers[name].note,
                **found[max(found, key=lambda mode: found[mode].get("images_per_second", 0.0))],
                **(found if place.capture else {}),
            }
            for name, found in ways.items()
        },
        "ratios": ratios(samples, ours),
        "others_busy_cores": disturbed,
        "samples": _named(samples),
        **({"contended": _contended(setting.busy, samples, contended, ours)} if contended else {}),
    }


def _contended(count: int, quiet: Samples, samples: Samples, ours: tuple[str, ...]) -> dict[str, Any]:
    """What was measured beside ``count`` busy processes. ``slowdown``: how many times as long the median is."""
    return {
        "processes": count,
        "contestants": {
            name: {
                "seconds": summarize(flatten(rounds)).as_dict(),
                "slowdown": _median(rounds) / _median(_named(quiet)[name]),
            }
            for name, rounds in _named(samples).items()
        },
        "ratios": ratios(samples, ours),
        "samples": _named(samples),
    }


def _named(samples: Samples) -> Samples:
    """The samples as result files have them: the name alone for a plain call."""
    return {key.removesuffix(" call"): rounds for key, rounds in samples.items()}


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with that many threads inside; None leaves torch as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ratios(samples: Samples, ours: tuple[str, ...]) -> dict[str, Any]:
    """How many times faster "optimize" is than every other contestant, and which of the foreign ones is the best.

    The keys of ``samples`` are "name call" and "name graph". ``against`` compares each side's faster way; where there
    are graphs, ``call`` and ``graph`` compare like with like. Quantiles over the rounds.
    """
    fastest: dict[str, str] = {}
    for key, rounds in samples.items():
        name = key.split()[0]
        if name not in fastest or _median(rounds) < _median(samples[fastest[name]]):
            fastest[name] = key
    others = [name for name in fastest if name != "optimize" and "optimize" in fastest]

    def faster(name: str, own: str, theirs: str) -> dict[str, float]:
        return paired_ratio(samples[own], samples[theirs]).as_dict()

    against = {name: faster(name, fastest["optimize"], fastest[name]) for name in others}
    foreign = {name: ratio for name, ratio in against.items() if name not in ours}
    found: dict[str, Any] = {
        "against": against,
        "best_peer": min(foreign, key=lambda name: foreign[name]["p50"]) if foreign else None,
    }
    if any(key.endswith(" graph") for key in samples):
        for mode in ("call", "graph"):
            own, there = f"optimize {mode}", [name for name in others if f"{name} {mode}" in samples]
            found[mode] = {name: faster(name, own, f"{name} {mode}") for name in there if own in samples}
    return found


def fresh_model(arch: str, *, image_size: int = 224, seed: int = 0) -> nn.Module:
    """Return the network of ``arch`` in eval mode, with seeded random weights.

    They include BatchNorm statistics, measured on a seeded batch and then disturbed (``network.randomize``).
    """
    from resnet_fast import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.get_model(arch)
    size = min(image_size, 128)
    return randomize(model, seeded_batches((4, 3, size, size), 1, seed=seed)[0], seed=seed)


def _input(batch: Tensor, setting: Setting) -> Tensor:
    """A batch as contestants get it, holding only values that the dtype can represent, so that all start from equal
    inputs: float32 on a CPU, whose runtimes want that, and what is stored on a GPU."""
    rounded = batch.to(setting.device.name, setting.dtype) if setting.dtype.is_floating_point else batch
    if setting.device.kind == "cpu":
        return rounded.float()
    return rounded.contiguous(memory_format=torch.channels_last)


def _judge(model: nn.Module, batch: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Verdict]:
    """Return what judges an answer to ``batch``, by its first and its last image."""
    picked = sorted({0, len(batch) - 1})
    layers = plain(model).to(batch.device)
    exact = copy.deepcopy(layers).double()(batch[picked].double()).cpu()
    if dtype is torch.int8:
        same = simulated(model, batch[picked])
        return lambda answer: judge(answer[picked].float(), same, exact, torch.float32)
    same = layers.to(dtype).to(memory_format=torch.channels_last)(batch.to(dtype))[picked].cpu()  # type: ignore[call-overload]
    return lambda answer: judge(answer[picked].float(), same, exact, dtype)


def _prepared(
    peer: Peer, task: Task, batches: list[Tensor], place: Device, verdict: Callable[[Tensor], Verdict]
) -> tuple[dict[str, dict[str, Any]], dict[str, Call]]:
    """The ways of a contestant, "call" and "graph", as rows with their verdicts, and the calls of those to be timed."""
    rows: dict[str, dict[str, Any]] = {"call": {"status": "excluded", "reason": peer.missing(task.dtype)}}
    ready: dict[str, Call] = {}

    def judged(mode: str, call: Call, result: Callable[[Any], Tensor]) -> None:
        found = verdict(result(call(0)))
        status = "timed" if found.passed else "wrong"
        rows[mode] = {"status": status, "reason": found.reason, "gate": found.as_dict(), **contestant.details}
        if found.passed:
            ready[mode] = call

    if rows["call"]["reason"]:
        return rows, ready
    try:
        contestant = peer.build(task)
        inputs = [contestant.prepare(batch) for batch in batches]
        judged("call", _rotating(contestant.run, inputs), contestant.result)
    except Exception as error:  # a foreign runtime may fail in any way; the others still run
        return {"call": {"status": "excluded", "reason": f"failed: {results.one_line(error)}"}}, {}
    if ready and place.capture and peer.graphs:
        try:
            judged("graph", _recorded(contestant, inputs, place.capture), lambda output: output)
        except Exception as error:
            rows["graph"] = {"status": "excluded", "reason": f"no CUDA graph: {results.one_line(error)}"}
    return rows, ready


def _rotating(run: Callable[[Any], Any], inputs: list[Any]) -> Call:
    return lambda number: run(inputs[number % len(inputs)])


def _recorded(contestant: Contestant, inputs: list[Any], capture: Callable[[Callable[[], Tensor]], Any]) -> Call:
    """Return the contestant by replays of graphs, one for each input."""

    def record(batch: Any) -> Any:
        return capture(lambda: contestant.run(batch))

    graphs = [record(batch) for batch in inputs]

    def replay(number: int) -> Tensor:
        again, output = graphs[number % len(graphs)]
        again()
        return output

    return replay


def _time(calls: Mapping[str, Call], setting: Setting, progress: Progress, stage: str = "measuring") -> Samples:
    schedule, place = setting.schedule, setting.device
    if place.capture is not None:
        return turns(calls, place.synchronize, seconds=schedule.seconds)
    interleave(calls, Schedule(rounds=1, calls=1, pause=schedule.pause))
    return interleave(calls, schedule, progress=lambda fraction: progress(stage, fraction))


def _median(rounds: list[list[float]]) -> float:
    return quantile(flatten(rounds), 0.5)
