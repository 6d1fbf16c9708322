"""Takes each barrier, wait and bounds check out of the kernels, one at a time, and sees whether a case fails.

``python -m tests.cuda_on_cpu.mutations [op ...] [--write docs/cuda_mutations.md]``
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import build
from .harness import Site, cases, ops
from .worker import Job, Result, Worker, run

SEEDS = list(range(20))

_CALL = re.compile(
    r"\b(?P<barrier>__syncthreads(?:_or|_and|_count)?)\s*\(|\b(?P<syncwarp>__syncwarp)\s*\("
    r"|\b(?P<wait>cp_async_wait)\s*<|\b(?P<inside>inside)\s*\("
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True)
class Mutant:
    """A place taken out of an op's kernels, and how that showed; ``failure`` is '' if it did not."""

    op: str
    site: Site
    failure: str
    case: str
    seed: int


def places_in_sources() -> dict[tuple[str, int], int]:
    """How many calls of barriers, waits and ``inside`` each line of csrc/kernels/ has, by (file, line)."""
    found: dict[tuple[str, int], int] = {}
    for path in build.kernel_sources():
        text = _COMMENT.sub(lambda comment: re.sub(r"[^\n]", " ", comment[0]), path.read_text())
        for call in _CALL.finditer(text):
            place = path.relative_to(build.ROOT).as_posix(), text.count("\n", 0, call.start()) + 1
            found[place] = found.get(place, 0) + 1
    return found


def sweep(op: str, reached: dict[str, Result], workers: list[Worker]) -> Iterator[Mutant]:
    """Every removable place that the cases reached (``reached``: each case's own result), taken out in turn."""
    seconds = {case: result.seconds[case] for case, result in reached.items()}
    by_site: dict[tuple[str, int, int], list[str]] = {}
    sites: dict[tuple[str, int, int], Site] = {}
    for case in sorted(reached, key=lambda case: seconds[case]):
        for site in reached[case].sites[case]:
            if site.removable:
                by_site.setdefault(site.key, []).append(case)
                sites[site.key] = site
    caught = _caught_before()
    jobs = []
    for key, reaching in sorted(by_site.items()):
        hint = caught.get(_text(key))
        order = sorted(reaching, key=lambda case: (case != hint, seconds[case]))
        # A loop that has lost its end runs for ever.
        jobs.append(Job(op, order, SEEDS, key, seconds=5 + 10 * max(seconds[case] for case in reaching)))
    for job, result in zip(jobs, run(jobs, workers), strict=True):
        assert job.disabled is not None
        if result.failure:
            caught[_text(job.disabled)] = result.case
        yield Mutant(op, sites[job.disabled], result.failure, result.case, result.seed)
    _remember(caught)


def reach(op: str, workers: list[Worker], seeds: list[int] | None = None) -> dict[str, Result]:
    """Every case's result with nothing taken out."""
    jobs = [Job(op, [name], SEEDS if seeds is None else seeds) for name in cases(op)]
    return {job.cases[0]: result for job, result in zip(jobs, run(jobs, workers), strict=True)}


def table(mutants: list[Mutant]) -> str:
    """The sweep as Markdown."""
    lines = [
        "# What fails when a kernel loses a barrier, a wait or a bounds check",
        "",
        "Written by `python -m tests.cuda_on_cpu.mutations --write docs/cuda_mutations.md`, which takes each of them",
        "out of the CUDA kernels, runs them on the CPU (docs/testing.md) and stops at the first case that fails.",
        "",
    ]
    for op in dict.fromkeys(mutant.op for mutant in mutants):
        lines += [f"## {op}", "", "| place | what | case | seed | how it showed |", "|---|---|---|---|---|"]
        for mutant in (mutant for mutant in mutants if mutant.op == op):
            site = mutant.site
            name = site.file.removeprefix("csrc/kernels/")
            failure = mutant.failure.splitlines()[0].replace("|", "\\|") if mutant.failure else "**not at all**"
            lines.append(
                f"| {name}:{site.line}:{site.column} | {site.kind} | {mutant.case} | {mutant.seed} | {failure} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_on_cpu.mutations", description=__doc__)
    parser.add_argument("op", nargs="*", help="of: " + ", ".join(ops()))
    parser.add_argument("--write", type=Path, help="a file for the table")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    build.build(sanitize=True)
    workers = [Worker() for _ in range(arguments.workers)]
    mutants: list[Mutant] = []
    reached_places: set[tuple[str, int]] = set()
    for op in arguments.op or ops():
        reached = reach(op, workers, seeds=[0])
        for case, result in reached.items():
            if result.failure:
                print(f"{op} {case} fails as it is: {result.failure}")
                return 1
            reached_places |= {(site.file, site.line) for site in result.sites[case] if site.removable}
        for mutant in sweep(op, reached, workers):
            site = mutant.site
            outcome = f"{mutant.case}, seed {mutant.seed}: {mutant.failure}" if mutant.failure else "NOT CAUGHT"
            print(f"{site.file}:{site.line}:{site.column} {site.kind}: {outcome}", flush=True)
            mutants.append(mutant)
    for worker in workers:
        worker.close()
    unreached = sorted(set(places_in_sources()) - reached_places) if not arguments.op else []
    for file, line in unreached:
        print(f"{file}:{line}: no case gets there")
    missed = sum(not mutant.failure for mutant in mutants)
    print(f"{len(mutants) - missed} of {len(mutants)} caught")
    if arguments.write:
        arguments.write.write_text(table(mutants))
    return min(missed + len(unreached), 1)


def _text(key: tuple[str, int, int]) -> str:
    return ":".join(map(str, key))


def _memory() -> Path:
    return build.cache() / "caught.json"


def _caught_before() -> dict[str, str]:
    """Which case caught what last time: only a hint where to begin."""
    return json.loads(_memory().read_text()) if _memory().exists() else {}


def _remember(caught: dict[str, str]) -> None:
    _memory().write_text(json.dumps(caught, indent=1))


if __name__ == "__main__":
    sys.exit(main())
