"""Finding the fastest algorithm of the CPU engine for each 3x3 convolution of networks, checked for correctness first.

Each is timed as a network would run it: its weights come from memory, its image from the layer before it, which the
same threads have just computed. Nothing is printed: progress goes to a function of the caller.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.backends import cpu, cpu_choices
from resnet_fast.graph.inventory import Layer
from resnet_fast.kernels import _tables
from resnet_fast.kernels.problems import ConvBNAct

from .cuda import error
from .shapes import fused_ops

ROUNDS = 15  # of which the median is taken
_PIECE = 8 << 20  # bytes
_MOST = 512 << 20  # bytes that are read to empty the caches


@dataclass(frozen=True)
class Problem:
    """A 3x3 convolution of stride 1 without groups, of images [c, h, w] to k channels."""

    h: int
    w: int
    c: int
    k: int
    padding: tuple[int, int]

    def key(self, dtype: torch.dtype) -> str:
        """Return the problem as tables name it, here and with torch's number of threads."""
        return cpu.problem(dtype, self.c, self.k, self.padding).key(self.h, self.w)

    def __str__(self) -> str:
        return f"{self.h}x{self.w} c{self.c} k{self.k}"


@dataclass(frozen=True)
class Outcome:
    """What became of one problem.

    Attributes:
        usual: the algorithm without a table. seconds: of one batch by each algorithm that was timed, fewer than all if
            the time was up. refused: (algorithm, reason) for wrong answers, and for errors that may grow too large.
        finished: whether all were timed; if not, nothing was written.
    """

    problem: Problem
    dtype: torch.dtype
    usual: str
    seconds: Mapping[str, float]
    refused: tuple[tuple[str, str], ...]
    finished: bool

    @property
    def algorithm(self) -> str:
        """The fastest; "" if none was timed."""
        return min(self.seconds, key=self.seconds.__getitem__, default="")


def problems(models: Sequence[str], image_size: int = 224) -> tuple[Problem, ...]:
    """Return the 3x3 convolutions of stride 1 of these networks, each once, those with the most products first.

    Raises:
        ValueError: an unknown model, or one that does not take such images.
    """
    found: dict[Problem, None] = {}
    for model in models:
        for layer in fused_ops(model, image_size):
            conv = layer.problem if isinstance(layer, Layer) else None
            if not isinstance(conv, ConvBNAct):
                continue
            if (*conv.kernel, *conv.stride, *conv.dilation, conv.groups) == (3, 3, 1, 1, 1, 1, 1):
                found[Problem(conv.h, conv.w, conv.c, conv.k, conv.padding)] = None
    return tuple(sorted(found, key=lambda each: -each.h * each.w * each.c * each.k))


def versions() -> dict[str, str]:
    """Return what a table is measured with: torch and the engine's compiler."""
    return {"torch": torch.__version__, "compiler": str(cpu.described()["compiler"])}


def sweep(
    wanted: Iterable[tuple[Problem, torch.dtype]],
    path: Path,
    *,
    batch: int = 1,
    seconds: float,
    again: bool = False,
    progress: Callable[[int, int, Problem, float], None] | None = None,
    finished: Callable[[Outcome], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Measure the problems that the table at ``path`` lacks and add them to it, for at most about ``seconds`` seconds.

    The table is written after every problem. A problem that was cut off by the time is not written.

    Args:
        again: measure also what the table has.
        progress: told before each problem how many are done, of how many, the problem and the seconds gone.
        finished: told each outcome, after the table is written.

    Raises:
        ValueError: the file at ``path`` is no table of this machine. OSError: it cannot be read or written.
    """
    began = clock()
    waiting = pending(wanted, path, again)
    whole = {op: dict(found) for op, found in (_tables.read(path) if path.is_file() else {}).items()}
    choices = whole.setdefault(cpu_choices.OP, {})
    emptying = _Emptying()
    outcomes = []
    for done, (problem, dtype) in enumerate(waiting):
        elapsed = clock() - began
        if elapsed >= seconds:
            break
        if progress is not None:
            progress(done, len(waiting), problem, elapsed)
        outcome = _measure(problem, dtype, batch, emptying, began + seconds, clock)
        outcomes.append(outcome)
        if outcome.finished and outcome.algorithm:
            times = {f"{name}_ms": round(1e3 * taken, 6) for name, taken in outcome.seconds.items()}
            choices[problem.key(dtype)] = {"algorithm": outcome.algorithm, "batch": batch, **times}
            _tables.write(path, cpu.machine(), versions(), whole, kind="cpu")
        if finished is not None:
            finished(outcome)
    return outcomes


def pending(
    wanted: Iterable[tuple[Problem, torch.dtype]], path: Path, again: bool = False
) -> list[tuple[Problem, torch.dtype]]:
    """Return what the table at ``path`` lacks, or all of it ``again``. Raises as :func:`sweep`."""
    known = cpu_choices.read(path, cpu.machine()) if path.is_file() else {}
    return [(problem, dtype) for problem, dtype in wanted if again or problem.key(dtype) not in known]


class _Emptying:
    """Reads and writes more than the caches hold, with the engine's own threads: torch's would spin beside them."""

    def __init__(self) -> None:
        caches = cpu.caches()
        least = 2 * max(caches["l3"], torch.get_num_threads() * caches["l2"])
        self._pieces = [torch.zeros(1, 16, 256, _PIECE >> 14) for _ in range(min(least, _MOST) // _PIECE + 1)]
        self._sum = _Sum(16, torch.float32)

    def __call__(self) -> None:
        for piece in self._pieces:
            self._sum(piece, piece)


class _Sum:
    """The sum of two images by the engine."""

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        self._network = cpu.Network()
        a, b = (self._network.input(channels, dtype) for _ in range(2))
        self._network.output(self._network.add(a, b, relu=False), flat=False)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self._network.run([a, b])[0]


def _measure(
    problem: Problem, dtype: torch.dtype, batch: int, empty: Callable[[], None], deadline: float,
    clock: Callable[[], float],
) -> Outcome:  # fmt: skip
    h, w, c, k = problem.h, problem.w, problem.c, problem.k
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(k, c, 3, 3, generator=generator) * (2 / (9 * c)) ** 0.5).to(dtype).float()
    bias = torch.zeros(k)
    x = torch.randn(batch, c, h, w, generator=generator).to(dtype).to(memory_format=torch.channels_last)
    geometry: Any = ((1, 1), problem.padding, (1, 1), 1)
    layers = {name: cpu.Convolution(weight, bias, geometry, dtype, [(h, w, name)]) for name in cpu_choices.ALGORITHMS}
    usual = cpu.Convolution(weight, bias, geometry, dtype, ()).algorithm(h, w)
    precision, exactly = ("fp32", torch.float64) if dtype is torch.float32 else ("bf16", torch.float32)
    exact = F.conv2d(x[:1].to(exactly), weight.to(exactly), None, padding=problem.padding)
    refused = []
    for name, layer in list(layers.items()):
        reason = f"{layer.algorithm(h, w)} runs instead: its rounding errors are too large with these weights"
        if layer.algorithm(h, w) == name:
            reason = error(layer.run(x[:1], None, False, False), exact, precision)
        if reason:
            refused.append((name, reason))
            del layers[name]
    make, zeros = _Sum(c, dtype), torch.zeros_like(x)
    times: dict[str, list[float]] = {name: [] for name in layers}
    names = list(layers)
    for number in range(ROUNDS):
        first = number % max(len(names), 1)
        for name in names[first:] + names[:first]:  # nobody is always the first
            if clock() >= deadline:
                return Outcome(problem, dtype, usual, {}, tuple(refused), finished=False)
            empty()
            made = make(x, zeros)
            began = time.perf_counter()
            layers[name].run(made, None, False, False)
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return Outcome(problem, dtype, usual, medians, tuple(refused), finished=True)
