"""Whole networks on a CUDA GPU: the contestants, CUDA graphs, the gate and the interleaved timing of one case.

``compare`` beside this file does the same for CPUs. Nothing is printed or written here, and no GPU setting is changed.
"""

from __future__ import annotations

import copy
import datetime
import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.benchmarking.gate import Verdict, judge
from resnet_fast.benchmarking.network import seeded_batches
from resnet_fast.benchmarking.peers import Contestant, plain
from resnet_fast.benchmarking.timing import Samples, Schedule, flatten, interleave, paired_ratio, summarize
from resnet_fast.roofline.measure import tf32

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
"""How to multiply, and what is stored."""

INPUTS = 4
"""Different batches that the timed calls rotate through; with graphs, each has a graph of its own."""

TURN = 0.02
"""Seconds that a turn of one contestant lasts at least: next to it, the one synchronisation at its end is nothing."""

Captured = tuple[Callable[[], object], Tensor]
"""What replays a recorded graph, and the tensor that each replay fills."""


def capture(run: Callable[[], Tensor]) -> Captured:
    """Records ``run``, which must read static tensors and launch on the current stream, into a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        output = run()
    torch.cuda.synchronize()
    return graph.replay, output


@dataclass(frozen=True)
class Device:
    """Where contestants run, how to wait for them and how to record them. Tests put a CPU here."""

    name: str = "cuda"
    synchronize: Callable[[], object] = torch.cuda.synchronize
    capture: Callable[[Callable[[], Tensor]], Captured] = capture


@dataclass(frozen=True)
class Case:
    """One network at one precision ("fp16", "bf16", "tf32", "fp32") and batch size."""

    arch: str
    precision: str
    batch: int
    image_size: int = 224
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ValueError(f"precision is {self.precision!r}, it must be one of {', '.join(DTYPES)}")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}, it must be at least 1")

    @property
    def name(self) -> str:
        return f"{self.arch}-{self.precision}-b{self.batch}"


@dataclass(frozen=True)
class Task:
    """What every contestant has to do: run ``model`` (float32, eval mode, on the CPU) on batches like ``example``,
    which is on the device, channels_last and in ``dtype``."""

    model: nn.Module
    example: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Peer:
    """One kind of contestant. ``needs``: the modules it imports; ``graphs``: whether it also runs from CUDA graphs."""

    name: str
    label: str
    build: Callable[[Task], Contestant]
    needs: tuple[str, ...] = ()
    graphs: bool = True
    ours: bool = False

    def missing(self) -> str:
        """Why it cannot take part here; empty if it can."""
        absent = [module for module in self.needs if importlib.util.find_spec(module) is None]
        return f"not installed ({', '.join(absent)})" if absent else ""


def _torch(run: Callable[[Tensor], Tensor]) -> Contestant:
    return Contestant(prepare=lambda batch: batch, run=run, result=lambda output: output)


def _moved(model: nn.Module, task: Task) -> nn.Module:
    moved = copy.deepcopy(model).eval().to(task.example.device, task.dtype)
    return moved.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _build_optimize(task: Task, cuda_graphs: bool | str = False) -> Contestant:
    """Without graphs of its own: those are recorded by this harness, the same way for everybody."""
    from resnet_fast.graph import optimize

    model = copy.deepcopy(task.model).eval().to(task.example.device)
    shape = torch.empty(task.example.shape, device="meta")
    return _torch(optimize(model, dtype=task.dtype, example_inputs=shape, cuda_graphs=cuda_graphs))


def _build_recorded(task: Task) -> Contestant:
    """As a user gets it: the module records its graphs itself, and copies each input into their memory."""
    return _build_optimize(task, cuda_graphs="auto")


def _build_live(task: Task) -> Contestant:
    return _torch(_moved(task.model, task))


def _build_eager(task: Task) -> Contestant:
    return _torch(_moved(plain(task.model), task))


def _build_compile(task: Task) -> Contestant:
    torch._dynamo.reset()
    compiled = torch.compile(
        _moved(plain(task.model), task), mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True
    )
    return _torch(compiled)


def _build_jax(task: Task) -> Contestant:
    from resnet_fast.benchmarking.jax_peer import build

    found = str(importlib.import_module("jax").default_backend())
    if task.example.is_cuda and found != "gpu":
        raise RuntimeError(f"jax sees no GPU here, its default backend is {found!r}")
    return build(plain(task.model), task.dtype)


def _build_cudnn(task: Task) -> Contestant:
    from resnet_fast.benchmarking.cudnn_peer import build

    return build(task.model, task.dtype, task.example.device)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("optimize", "resnet_fast.optimize()", _build_optimize, ours=True),
        Peer("recorded", "resnet_fast.optimize(), its own graphs", _build_recorded, graphs=False, ours=True),
        Peer("live", "resnet_fast, live module", _build_live, ours=True),
        Peer("eager", "torch eager, channels_last", _build_eager),
        Peer("compile", "torch.compile, max-autotune", _build_compile),
        Peer("jax", "JAX/XLA, jit", _build_jax, needs=("jax",), graphs=False),
        Peer("cudnn", "cuDNN graph API", _build_cudnn, needs=("cudnn",)),
    )
}
"""Every contestant there is, in the order in which tables list them. max-autotune's own graph recording is off, since
it would copy every input; it gets this harness's graphs instead."""


def compare(
    case: Case,
    model: nn.Module,
    *,
    names: tuple[str, ...] = ("optimize", "eager"),
    device: Device | None = None,
    seconds: float = 2.0,
    peers: Mapping[str, Peer] = PEERS,
) -> dict[str, Any]:
    """Builds, judges and times the contestants ``names`` at ``case`` and returns a result dictionary.

    ``model`` is the network in eval mode, float32, on the CPU. Each contestant is timed as plain calls and, where it
    can be recorded, as replays of CUDA graphs; all in interleaved rounds of one process. One that is missing, fails or
    breaks the error rule, as a call or as a graph, is listed with the reason and not timed that way.

    Raises:
        RuntimeError: "optimize" is not timed at all.
    """
    place = device if device is not None else Device()
    dtype = DTYPES[case.precision]
    shape = (case.batch, 3, case.image_size, case.image_size)
    rows: dict[str, dict[str, Any]] = {}
    with tf32(case.precision == "tf32"), torch.no_grad():
        batches = [
            batch.to(place.name, dtype).contiguous(memory_format=torch.channels_last)
            for batch in seeded_batches(shape, INPUTS, seed=case.seed + 1)
        ]
        allowed = _judge_for(model, batches[0], dtype)
        calls: dict[str, Callable[[int], object]] = {}
        for name in names:
            peer = peers[name]
            rows[name] = {"label": peer.label, "ours": peer.ours}
            reason = peer.missing()
            if not reason:
                try:
                    contestant = peer.build(Task(model, batches[0], dtype))
                    inputs = [contestant.prepare(batch) for batch in batches]
                    rows[name]["call"], found = _judged(_rotating(contestant.run, inputs), contestant, allowed)
                except Exception as error:  # a foreign runtime may fail in any way; the others still run
                    reason = f"failed: {_one_line(error)}"
            if reason:
                rows[name]["call"] = {"status": "excluded", "reason": reason}
                continue
            if found is not None:
                calls[f"{name} call"] = found
                if peer.graphs:
                    rows[name]["graph"], found = _recorded(contestant, inputs, place, allowed)
                    if found is not None:
                        calls[f"{name} graph"] = found
        samples = turns(calls, place, seconds=seconds)
    for key in samples:
        name, mode = key.split()
        taken = summarize(flatten(samples[key]))
        rows[name][mode] |= {"seconds": taken.as_dict(), "images_per_second": case.batch / taken.p50}
    if not any(key.startswith("optimize ") for key in samples):
        reasons = [rows["optimize"][mode]["reason"] for mode in ("call", "graph") if mode in rows["optimize"]]
        raise RuntimeError(f"resnet_fast.optimize() could not be measured at {case.name}: {'; '.join(reasons)}")
    return {
        "setting": asdict(case) | {"name": case.name},
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "contestants": rows,
        "against": against(samples),
    }


def against(samples: Samples) -> dict[str, dict[str, Any]]:
    """How many times faster "optimize" is than every other contestant: call against call, graph against graph, and
    "best", each side's faster way against the other's. Quantiles over the rounds."""
    fastest: dict[str, str] = {}
    for key, rounds in samples.items():
        name = key.split()[0]
        if name not in fastest or _median(rounds) < _median(samples[fastest[name]]):
            fastest[name] = key
    found: dict[str, dict[str, Any]] = {}
    for name, key in fastest.items():
        if name == "optimize" or "optimize" not in fastest:
            continue
        found[name] = {"best": paired_ratio(samples[fastest["optimize"]], samples[key]).as_dict()}
        for mode in ("call", "graph"):
            if f"optimize {mode}" in samples and f"{name} {mode}" in samples:
                ratio = paired_ratio(samples[f"optimize {mode}"], samples[f"{name} {mode}"])
                found[name][mode] = ratio.as_dict()
    return found


def turns(
    calls: Mapping[str, Callable[[int], object]],
    device: Device,
    *,
    seconds: float,
    turn: float = TURN,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Times ``calls`` in interleaved rounds; a sample is the mean of one turn of back-to-back calls.

    A turn has as many calls as fill ``turn`` seconds, and is over when the device is done and, for results that can be
    waited for themselves (JAX's, from streams of its own), the last of them is there.
    """

    def wait(last: object) -> None:
        getattr(last, "block_until_ready", device.synchronize)()
        device.synchronize()

    counts: dict[str, int] = {}
    for name, call in calls.items():
        wait(call(0))
        before = clock()
        for number in range(2):
            call(number)
        wait(call(2))
        counts[name] = max(1, min(2000, math.ceil(turn / max((clock() - before) / 3, 1e-9))))

    def whole(name: str) -> Callable[[int], object]:
        def run(number: int) -> None:
            last = None
            for step in range(counts[name]):
                last = calls[name](number * counts[name] + step)
            wait(last)

        return run

    schedule = Schedule(seconds=seconds, min_rounds=5, calls=1, warmup=0, pause=0.0)
    samples = interleave({name: whole(name) for name in calls}, schedule, clock=clock)
    return {name: [[one / counts[name] for one in turn] for turn in rounds] for name, rounds in samples.items()}


@dataclass(frozen=True)
class _Allowed:
    """What the gate compares with: the exact and the plain answers for the picked images of the first batch."""

    picked: list[int]
    same_dtype: Tensor
    exact: Tensor
    dtype: torch.dtype

    def verdict(self, answer: Tensor) -> Verdict:
        return judge(answer[self.picked].float(), self.same_dtype, self.exact, self.dtype)


def _judge_for(model: nn.Module, batch: Tensor, dtype: torch.dtype) -> _Allowed:
    picked = sorted({0, len(batch) - 1})
    layers = plain(model).to(batch.device)
    exact = copy.deepcopy(layers).double()(batch[picked].double()).cpu()
    same = layers.to(dtype).to(memory_format=torch.channels_last)(batch)[picked].cpu()  # type: ignore[call-overload]
    return _Allowed(picked, same, exact, dtype)


def _rotating(run: Callable[[Any], Any], inputs: list[Any]) -> Callable[[int], Any]:
    return lambda number: run(inputs[number % len(inputs)])


def _judged(
    call: Callable[[int], Any], contestant: Contestant, allowed: _Allowed
) -> tuple[dict[str, Any], Callable[[int], Any] | None]:
    """The verdict on the first batch as a row, and ``call`` again if it may be timed."""
    verdict = allowed.verdict(contestant.result(call(0)))
    row = {"status": "timed" if verdict.passed else "wrong", "reason": verdict.reason, "gate": verdict.as_dict()}
    return row, call if verdict.passed else None


def _recorded(
    contestant: Contestant, inputs: list[Tensor], device: Device, allowed: _Allowed
) -> tuple[dict[str, Any], Callable[[int], Any] | None]:
    """The same from CUDA graphs, one for each input."""

    def record(batch: Tensor) -> Captured:
        return device.capture(lambda: contestant.run(batch))

    try:
        graphs = [record(batch) for batch in inputs]

        def replay(number: int) -> Tensor:
            again, output = graphs[number % len(graphs)]
            again()
            return output

        return _judged(replay, replace(contestant, result=lambda output: output), allowed)
    except Exception as error:
        return {"status": "excluded", "reason": f"no CUDA graph: {_one_line(error)}"}, None


def _median(rounds: list[list[float]]) -> float:
    return summarize(flatten(rounds)).p50


def _one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."
