"""``python -m tests.emulator add_act [-k part of a name] [--seeds 20]``: runs an op's cases and says what failed."""

from __future__ import annotations

import argparse
import sys

from tests.emulator.harness import SELFTEST, Site, cases, ops
from tests.emulator.worker import Job, Worker, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__)
    parser.add_argument("op", nargs="*", help="of: " + ", ".join([*ops(), SELFTEST]))
    parser.add_argument("-k", default="", help="only cases with this in their name")
    parser.add_argument("--seeds", type=int, default=20, help="how many, from 0")
    parser.add_argument("--seed", type=int, help="only 0, whose bits others must have, and this one")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sites", action="store_true", help="list the places reached, and bank conflicts of ldmatrix")
    arguments = parser.parse_args()
    if unknown := set(arguments.op) - {*ops(), SELFTEST}:
        parser.error(f"no cases of {', '.join(sorted(unknown))}; there are some of {', '.join(ops())}")

    workers = [Worker() for _ in range(arguments.workers)]
    jobs = [
        Job(op, [name], list(range(arguments.seeds)) if arguments.seed is None else sorted({0, arguments.seed}))
        for op in arguments.op or ops()
        for name in cases(op)
        if arguments.k in name
    ]
    failed, sites = 0, dict[tuple[str, int, int], Site]()
    for job, result in zip(jobs, run(jobs, workers), strict=True):
        seconds = result.seconds.get(job.cases[0], 0.0)
        outcome = f"FAILED under seed {result.seed}: {result.failure}" if result.failure else f"{seconds:.2f} s a seed"
        print(f"{job.op} {job.cases[0]}: {outcome}", flush=True)
        failed += bool(result.failure)
        for site in result.sites.get(job.cases[0], []):
            before = sites.get(site.key, site)
            sites[site.key] = site if before is site else _sum(before, site)
    for worker in workers:
        worker.close()
    if arguments.sites:
        for key in sorted(sites):
            site = sites[key]
            conflicts = f", {site.conflicts / site.phases:.2f} conflicts a read" if site.phases else ""
            print(f"{site.file}:{site.line}:{site.column} {site.kind}, {site.count} times{conflicts}")
    print(f"{len(jobs) - failed} of {len(jobs)} cases passed")
    return min(failed, 1)


def _sum(a: Site, b: Site) -> Site:
    return Site(*(a.kind, *a.key), a.count + b.count, a.phases + b.phases, a.conflicts + b.conflicts)


if __name__ == "__main__":
    sys.exit(main())
