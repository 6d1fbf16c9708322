"""Finding the fastest launch of each problem: candidates are compiled, checked for correctness, then timed.

What compiles, checks and times is a ``Runner`` (``cuda.py`` has the real one), so that everything else here runs, and
is tested, without a GPU. Nothing is printed: progress goes to a function of the caller.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from . import estimate, ops
from .ops import Case

if TYPE_CHECKING:
    from resnet_fast.kernels.gpus import GPU

#: A launch within this factor of the floor is not searched any further.
NEAR = 1.05

#: Of the seconds, what Triton's cases may take where CUDA's wait behind them.
TRITONS_SHARE = 0.75


class Runner(Protocol):
    """What a sweep needs of the machine. ``batch``: how many configs are worth compiling at once."""

    batch: int

    def load(self, case: Case) -> None:
        """Make the case's tensors and its right answer; the other methods are about the case loaded last."""

    def unusable(self, configs: Sequence[Any]) -> Mapping[Any, str]:
        """Compile the configs; those that must not run, with the reason."""

    def wrong(self, config: Any) -> str:
        """Run it once; what is wrong with its answer, "" if nothing is."""

    def seconds(self, config: Any) -> float:
        """Seconds of one launch."""

    def separately(self) -> float:
        """Seconds of doing the same by the kernels of its parts, infinity if it has none."""


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        config: the fastest correct choice, None if there is none or the time was up.
        seconds: of one launch with it. floor: the least that the GPU allows. tried: how many configs were timed.
        refused: (config, reason) for those that did not compile well or gave a wrong answer.
        finished: whether the search ended by itself, not because the time was up.
        separately: seconds that the kernels of its parts take; infinity if it has no parts.
    """

    case: Case
    config: Any
    seconds: float
    floor: float
    tried: int
    refused: tuple[tuple[Any, str], ...]
    finished: bool
    separately: float = math.inf


@dataclass(frozen=True)
class Progress:
    """Where a sweep is: ``done`` of ``total`` cases, working on ``case``, ``elapsed`` seconds after it began."""

    done: int
    total: int
    case: Case
    elapsed: float


def pending(
    cases: Iterable[Case], gpu: GPU, choices: Mapping[str, Mapping[str, Any]], again: bool = False
) -> tuple[Case, ...]:
    """The cases to measure, one for each op and problem key: Triton's, then CUDA's, those with the highest floor first.

    A CUDA kernel that faults takes the process's GPU context with it. By then Triton's times are in the table.

    Args:
        choices: a table's; its problems are left out unless ``again``.
    """
    found: dict[tuple[str, str], Case] = {}
    for case in cases:
        name = case.op, case.problem.key()
        if again or name[1] not in choices.get(case.op, {}):
            found.setdefault(name, case)
    return tuple(sorted(found.values(), key=lambda case: (ops.is_cuda(case), -floor(case, gpu))))


def floor(case: Case, gpu: GPU) -> float:
    """Seconds that a launch takes at least on ``gpu``."""
    return ops.get(case.op).work(case.problem).floor(gpu, case.problem.precision)


def configs(case: Case, gpu: GPU, most: int = 0) -> tuple[Any, ...]:
    """Return what is tried for a case: the heuristic's choice, then every candidate, each once.

    Args:
        most: how many at most, the best by ``estimate.ranked``, if there is an estimate for this GPU; 0: all.
    """
    kernel = ops.get(case.op).kernel
    first = kernel.heuristic(case.problem, gpu)  # None if no launch is known to fit
    every = tuple(dict.fromkeys([*([] if first is None else [first]), *kernel.candidates(case.problem, gpu)]))
    if not most or len(every) <= most or not estimate.known(case, gpu):
        return every
    best = estimate.ranked(case, every[first is not None :], gpu)
    return (*every[: first is not None], *best)[:most]


def sweep(
    cases: Iterable[Case],
    gpu: GPU,
    runner: Runner,
    path: Path,
    *,
    measured_with: Mapping[str, str],
    seconds: float,
    again: bool = False,
    most: int = 0,
    progress: Callable[[Progress], None] | None = None,
    finished: Callable[[Outcome], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Measure the cases that the table at ``path`` lacks and add them to it, for at most about ``seconds`` seconds.

    The table is written after every problem, so an interruption loses one problem's measurements at most. A problem
    whose search was cut off by the time is not written. Where there are CUDA's cases besides Triton's a quarter of the
    time is kept for them.

    Args:
        measured_with: versions and names to put into the table.
        again: measure also what the table has. most: of how many choices a problem, as for ``configs``.
        progress: told before each case. finished: told each outcome, after the table is written.

    Raises:
        ValueError: the file at ``path`` is no table of launch choices.
    """
    from resnet_fast.kernels import _tables

    began = clock()
    choices = {op: dict(problems) for op, problems in (_tables.read(path) if path.is_file() else {}).items()}
    wanted = pending(cases, gpu, choices, again)
    outcomes: list[Outcome] = []
    share = TRITONS_SHARE if wanted and ops.is_cuda(wanted[-1]) else 1.0
    for done, case in enumerate(wanted):
        elapsed = clock() - began
        limit = seconds if ops.is_cuda(case) else share * seconds
        if elapsed >= limit:
            continue
        if progress is not None:
            progress(Progress(done, len(wanted), case, elapsed))
        outcome = _search(case, configs(case, gpu, most), gpu, runner, began + limit, clock)
        outcomes.append(outcome)
        if outcome.config is not None and outcome.finished:
            op = ops.get(case.op)
            fields = asdict(outcome.config)
            times = {"ms": round(1e3 * outcome.seconds, 6), "floor_ms": round(1e3 * outcome.floor, 6)}
            if outcome.separately < math.inf and op.plain:
                times["plain_ms"] = round(1e3 * outcome.separately, 6)
            elif outcome.separately < math.inf:
                fields["separate"] = outcome.separately < outcome.seconds
                times["separate_ms"] = round(1e3 * outcome.separately, 6)
            choices.setdefault(case.op, {})[case.problem.key()] = fields | times
            _tables.write(path, gpu.name, measured_with, choices)
        if finished is not None:
            finished(outcome)
    return outcomes


def _search(
    case: Case, tried_in: Sequence[Any], gpu: GPU, runner: Runner, deadline: float, clock: Callable[[], float]
) -> Outcome:
    least = floor(case, gpu)
    best: tuple[float, Any] | None = None
    tried = 0
    refused: list[tuple[Any, str]] = []
    finished = True
    rest = list(tried_in)
    runner.load(case)
    while rest and finished and (best is None or best[0] > NEAR * least):
        some, rest = rest[: runner.batch], rest[runner.batch :]
        unusable = runner.unusable(some)
        for config in some:
            if clock() >= deadline:
                finished = False
                break
            reason = unusable.get(config, "") or runner.wrong(config)
            if reason:
                refused.append((config, reason))
                continue
            taken = runner.seconds(config)
            tried += 1
            if best is None or taken < best[0]:
                best = taken, config
            if best[0] <= NEAR * least:
                break
    found, config = best if best is not None else (float("nan"), None)
    separately = runner.separately() if best is not None and finished else math.inf
    return Outcome(case, config, found, least, tried, tuple(refused), finished, separately)
