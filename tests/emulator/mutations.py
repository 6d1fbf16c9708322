"""Takes each barrier, wait and bounds check out of the kernels, one at a time, and sees whether a case fails.

``python -m tests.emulator.mutations [op ...] [--write docs/cuda_mutations.md]``
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.emulator import build
from tests.emulator.harness import Site, cases, ops
from tests.emulator.worker import Job, Result, Worker, run

SEEDS = list(range(20))

TABLE = build.ROOT / "docs" / "cuda_mutations.md"
COMMAND = f"python -m tests.emulator.mutations --write docs/{TABLE.name}"
_COLUMNS = ("file", "code", "#", "what", "case", "seed", "how it showed")

_CALL = re.compile(
    r"\b(?P<barrier>__syncthreads(?:_or|_and|_count)?)\s*\(|\b(?P<syncwarp>__syncwarp)\s*\("
    r"|\b(?P<wait>cp_async_wait)\s*<|\b(?P<inside>inside)\s*\("
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True, order=True)
class Place:
    """A call in csrc/kernels/ in words that survive changes elsewhere in its file: ``text`` is the code from the call
    to the end of its line, ``number`` counts the calls of the file with the same text.
    """

    file: str
    text: str
    number: int


@dataclass(frozen=True)
class Mutant:
    """A place taken out of an op's kernels, and how that showed; ``failure`` is '' if it did not."""

    op: str
    place: Place
    kind: str
    case: str
    seed: int
    failure: str


class Places:
    """Every call of a barrier, a wait or ``inside`` in csrc/kernels/, or in other files, by their paths."""

    def __init__(self, sources: dict[str, str] | None = None) -> None:
        if sources is None:
            sources = {path.relative_to(build.ROOT).as_posix(): path.read_text() for path in build.kernel_sources()}
        self._on_line: dict[tuple[str, int], list[tuple[int, Place]]] = {}
        for path, text in sources.items():
            # Without what comments say, in their length.
            text = _COMMENT.sub(lambda comment: re.sub(r"[^\n]", " ", comment[0]), text)
            seen: dict[str, int] = {}
            for call in _CALL.finditer(text):
                words = " ".join(text[call.start() :].split("\n", 1)[0].split())
                seen[words] = seen.get(words, 0) + 1
                line = path, text.count("\n", 0, call.start()) + 1
                column = call.start() - text.rfind("\n", 0, call.start())
                self._on_line.setdefault(line, []).append((column, Place(Path(path).name, words, seen[words])))

    def all(self) -> set[Place]:
        return {place for calls in self._on_line.values() for _, place in calls}

    def of(self, site: Site) -> Place:
        """A removable site's."""
        # GCC's column is that of the parenthesis behind the name.
        calls = [place for column, place in self._on_line.get((site.file, site.line), []) if column < site.column]
        assert calls, f"mutations.py does not see the {site.kind} at {site.file}:{site.line}:{site.column}"
        return calls[-1]


def reach(op: str, workers: list[Worker], seeds: list[int], names: Iterable[str] | None = None) -> dict[str, Result]:
    """Every case's result with nothing taken out."""
    jobs = [Job(op, [name], seeds) for name in (cases(op) if names is None else names)]
    return {job.cases[0]: result for job, result in zip(jobs, run(jobs, workers), strict=True)}


def sweep(op: str, reached: dict[str, Result], workers: list[Worker]) -> Iterator[Mutant]:
    """Every removable place that the cases reached (``reached``: each case's own result), taken out in turn."""
    seconds = {case: result.seconds[case] for case, result in reached.items()}
    reaching: dict[tuple[str, int, int], list[str]] = {}
    sites: dict[tuple[str, int, int], Site] = {}
    for case in sorted(reached, key=lambda case: seconds[case]):
        for site in reached[case].sites[case]:
            if site.removable:
                reaching.setdefault(site.key, []).append(case)
                sites[site.key] = site
    places = Places()
    hints = {mutant.place: mutant.case for mutant in read_table() if mutant.op == op}
    jobs = []
    for key in sorted(sites):
        hint = hints.get(places.of(sites[key]))
        order = sorted(reaching[key], key=lambda case: (case != hint, seconds[case]))
        jobs.append(Job(op, order, SEEDS, key, _time_limit(seconds[case] for case in order)))
    for job, result in zip(jobs, run(jobs, workers), strict=True):
        assert job.disabled is not None
        site = sites[job.disabled]
        yield Mutant(op, places.of(site), site.kind, result.case, result.seed, result.failure)


def replay(mutants: list[Mutant], workers: list[Worker]) -> Iterator[tuple[Mutant, str]]:
    """Every mutant of one op under the case and the seed that showed it, with how it shows now, '' if not at all.

    Raises:
        AssertionError: a case is gone, fails as it is, or does not reach the place.
    """
    places = Places()
    op = mutants[0].op
    names = list(dict.fromkeys(mutant.case for mutant in mutants))
    gone = set(names) - set(cases(op))
    assert not gone, f"{TABLE.name}: {op} has no case called {', '.join(sorted(gone))}; {COMMAND}"
    reached = reach(op, workers, [0], names)
    jobs = []
    for mutant in mutants:
        as_it_is = reached[mutant.case]
        assert not as_it_is.failure, f"{op} {mutant.case}, nothing taken out: {as_it_is.failure}"
        keys = [s.key for s in as_it_is.sites[mutant.case] if s.removable and places.of(s) == mutant.place]
        assert keys, f"{TABLE.name}: {op} {mutant.case} does not get to {mutant.place}; {COMMAND}"
        limit = _time_limit([as_it_is.seconds[mutant.case]])
        # Under the first seed first: what shows may be that the bits differ from those.
        jobs.append(Job(op, [mutant.case], sorted({SEEDS[0], mutant.seed}), keys[0], limit))
    for mutant, result in zip(mutants, run(jobs, workers), strict=True):
        yield mutant, result.failure


def _time_limit(seconds: Iterable[float]) -> float:
    """For a case that may have lost the end of a loop."""
    return 3 + 10 * max(seconds)


# --- the table


def table(mutants: list[Mutant]) -> str:
    """The sweep as Markdown."""
    lines = [
        "# What fails when a kernel loses a barrier, a wait or a bounds check",
        "",
        f"Written by `{COMMAND}`, which takes each of them out of the",
        "CUDA kernels in turn, runs these on the CPU ([testing.md](testing.md)) and notes the first case that fails.",
        "`tests/emulator/test_emulator.py` repeats every row, and demands one for every such call in `csrc/kernels/`.",
        "`code` is from the call to the end of its line; `#` numbers those of a file that read the same.",
        "",
    ]
    for op in sorted({mutant.op for mutant in mutants}):
        lines += [f"## {op}", "", _row(_COLUMNS), _row("---" for _ in _COLUMNS)]
        for mutant in (mutant for mutant in mutants if mutant.op == op):
            place = mutant.place
            failure = mutant.failure.splitlines()[0] if mutant.failure else "**not at all**"
            failure = re.sub(r"(\.cuh?|\.cpp|\.h):\d+", r"\1", failure)  # lines would soon be others
            cells = (place.file, f"`{place.text}`", place.number, mutant.kind, mutant.case, mutant.seed, failure)
            lines.append(_row(str(cell).replace("|", "\\|") for cell in cells))
        lines.append("")
    return "\n".join(lines)


def read_table() -> list[Mutant]:
    """The committed sweep."""
    mutants, op = [], ""
    for line in TABLE.read_text().splitlines() if TABLE.exists() else []:
        if line.startswith("## "):
            op = line.removeprefix("## ")
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == len(_COLUMNS) and cells[2].isdigit():
            file, text, number, kind, case, seed, failure = cells
            mutants.append(Mutant(op, Place(file, text.strip("`"), int(number)), kind, case, int(seed), failure))
    return mutants


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator.mutations", description=__doc__)
    parser.add_argument("op", nargs="*", help="of: " + ", ".join(ops()))
    parser.add_argument("--write", type=Path, help="the file for the table; rows of ops not named here stay")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    workers = [Worker() for _ in range(arguments.workers)]
    chosen = arguments.op or ops()
    mutants: list[Mutant] = []
    for op in chosen:
        reached = reach(op, workers, seeds=[0])
        for case, result in reached.items():
            if result.failure:
                print(f"{op} {case} fails as it is: {result.failure}")
                return 1
        for mutant in sweep(op, reached, workers):
            place = mutant.place
            outcome = f"{mutant.case}, seed {mutant.seed}: {mutant.failure}" if mutant.failure else "NOT CAUGHT"
            print(f"{place.file} #{place.number} {place.text}: {outcome}", flush=True)
            mutants.append(mutant)
    for worker in workers:
        worker.close()
    unreached = set() if arguments.op else Places().all() - {mutant.place for mutant in mutants}
    for place in sorted(unreached):
        print(f"{place.file} #{place.number} {place.text}: no case gets there")
    missed = sum(not mutant.failure for mutant in mutants)
    print(f"{len(mutants) - missed} of {len(mutants)} caught")
    if arguments.write:
        kept = [mutant for mutant in read_table() if mutant.op not in chosen and mutant.op in ops()]
        fresh = arguments.write.with_name(f"{arguments.write.name}.{os.getpid()}")
        fresh.write_text(table(kept + mutants))
        os.replace(fresh, arguments.write)
    return min(missed + len(unreached), 1)


if __name__ == "__main__":
    sys.exit(main())
