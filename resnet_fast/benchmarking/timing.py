"""Timing several contestants fairly in one process: interleaved rounds, rotated order, quantiles, paired ratios.

It knows nothing of models or of torch; a contestant is a callable that takes the number of the call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

Item = TypeVar("Item")

Samples = dict[str, list[list[float]]]
"""Seconds of every timed call: contestant -> round -> call."""


TURN = 0.02
"""Seconds that a turn of back-to-back calls lasts at least: next to it, one synchronisation at its end is nothing."""


@dataclass(frozen=True)
class Schedule:
    """How long and in what rhythm to measure.

    A round gives every contestant one turn. A turn is a pause, ``warmup`` untimed calls, then ``calls`` timed ones.
    The pause is there because worker threads of several runtimes spin for a while after a call and would otherwise
    slow down whoever comes next (``settle``); the untimed calls bring this contestant's own weights and threads back.
    ``rounds`` fixes the number of rounds; otherwise rounds go on until ``seconds`` have passed, at least
    ``min_rounds`` of them.
    """

    seconds: float = 15.0
    rounds: int | None = None
    min_rounds: int = 5
    calls: int = 4
    warmup: int = 1
    pause: float = 0.08

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"Schedule: rounds is {self.rounds}, it must be at least 1")
        if self.rounds is None and not self.seconds > 0:
            raise ValueError(f"Schedule: seconds is {self.seconds}, it must be positive")
        if self.calls < 1:
            raise ValueError(f"Schedule: calls is {self.calls}, it must be at least 1")
        if self.warmup < 0 or self.pause < 0 or self.min_rounds < 1:
            raise ValueError(
                f"Schedule: warmup={self.warmup}, pause={self.pause}, min_rounds={self.min_rounds}; "
                "warmup and pause must not be negative, min_rounds must be at least 1"
            )


@dataclass(frozen=True)
class Quantiles:
    """Seconds: the tenth, fiftieth and ninetieth percentile, the extremes, and how many samples they come from."""

    p10: float
    p50: float
    p90: float
    min: float
    max: float
    count: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def quantile(values: Sequence[float], fraction: float) -> float:
    """Return the quantile of ``values`` with linear interpolation between neighbours (numpy's and R's default)."""
    if not values:
        raise ValueError("quantile: no values")
    if not 0 <= fraction <= 1:
        raise ValueError(f"quantile: fraction is {fraction}, it must be between 0 and 1")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(values: Sequence[float]) -> Quantiles:
    """Quantiles of ``values``."""
    return Quantiles(
        p10=quantile(values, 0.1),
        p50=quantile(values, 0.5),
        p90=quantile(values, 0.9),
        min=min(values),
        max=max(values),
        count=len(values),
    )


def rotated(names: Sequence[str], round_number: int) -> list[str]:
    """Return the order of a round: each round starts one contestant later and every second one runs backwards, so that
    nobody is always first and nobody always follows the same neighbour."""
    if not names:
        return []
    start = round_number % len(names)
    order = [*names[start:], *names[:start]]
    return order if round_number % 2 == 0 else order[::-1]


RESTING, STEP, PATIENCE = 0.2, 0.01, 0.5
"""This process rests if it uses less than this many cores for a step of so many seconds; how long that is awaited."""


def settle(
    pause: float,
    *,
    sleep: Callable[[float], None] = time.sleep,
    used: Callable[[], float] = time.process_time,
) -> None:
    """Sleep for ``pause`` seconds, and then until no thread of this process spins any more, or ``PATIENCE`` has passed.

    ``used`` tells the processor seconds of this process so far.
    """
    sleep(max(0.0, pause - STEP))
    for _ in range(1 + round(PATIENCE / STEP)):
        before = used()
        sleep(STEP)
        if used() - before < RESTING * STEP:
            return


def interleave(
    contestants: Mapping[str, Callable[[int], object]],
    schedule: Schedule,
    *,
    progress: Callable[[float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Samples:
    """Times ``contestants`` in interleaved rounds and returns every sample.

    A contestant is called with a number that counts its calls, the same sequence for all of them, so that it can
    rotate its inputs. ``progress`` hears the fraction done, between 0 and 1, after every turn.
    """
    samples: Samples = {name: [] for name in contestants}
    names = list(contestants)
    if not names:
        return samples
    started = clock()
    round_number = 0
    while True:
        for position, name in enumerate(rotated(names, round_number)):
            call = contestants[name]
            number = round_number * (schedule.warmup + schedule.calls)
            if schedule.pause:
                settle(schedule.pause, sleep=sleep)
            for _ in range(schedule.warmup):
                call(number)
                number += 1
            turn = []
            for _ in range(schedule.calls):
                before = clock()
                call(number)
                turn.append(clock() - before)
                number += 1
            samples[name].append(turn)
            if progress is not None:
                rounds_done = round_number + (position + 1) / len(names)
                progress(_fraction(schedule, rounds_done, clock() - started))
        round_number += 1
        if schedule.rounds is not None:
            if round_number >= schedule.rounds:
                return samples
        elif round_number >= schedule.min_rounds and clock() - started >= schedule.seconds:
            return samples


def turns(
    calls: Mapping[str, Callable[[int], object]],
    synchronize: Callable[[], object],
    *,
    seconds: float,
    turn: float = TURN,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Time ``calls`` in interleaved rounds; a sample is the mean of one turn of back-to-back calls.

    A turn has as many calls as fill ``turn`` seconds, and is over when the device is done and, for results that can be
    waited for themselves (JAX's, from streams of its own), the last of them is there.
    """

    def wait(last: object) -> None:
        getattr(last, "block_until_ready", synchronize)()
        synchronize()

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


def _fraction(schedule: Schedule, rounds_done: float, elapsed: float) -> float:
    if schedule.rounds is not None:
        return min(1.0, rounds_done / schedule.rounds)
    return min(1.0, elapsed / schedule.seconds, rounds_done / schedule.min_rounds)


def flatten(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Return all samples of one contestant, in the order in which they were taken."""
    return [sample for turn in rounds for sample in turn]


def paired_ratio(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Quantiles:
    """How many times faster ``ours`` is than ``theirs``: quantiles, over the rounds, of the ratio of the two turns'
    medians. Pairing within a round cancels whatever slows the whole machine for a while."""
    if len(ours) != len(theirs):
        raise ValueError(f"paired_ratio: {len(ours)} rounds against {len(theirs)}; both must have the same number")
    return summarize([quantile(b, 0.5) / quantile(a, 0.5) for a, b in zip(ours, theirs, strict=True)])


class Deadline:
    """When something has to be done, and how long its longest item took so far."""

    def __init__(self, seconds: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end, self._longest = clock() + seconds, 0.0

    @property
    def left(self) -> float:
        """Seconds to go."""
        return self._end - self._clock()

    def share(self, fraction: float) -> Deadline:
        """Return the deadline of a part that may take this fraction of what is left."""
        return Deadline(fraction * self.left, self._clock)

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items one after the other, as long as there is time for one as long as the longest."""
        for item in items:
            if self.left <= 1.1 * self._longest:
                print("  the rest: out of time", flush=True)
                return
            before = self._clock()
            yield item
            self._longest = max(self._longest, self._clock() - before)
