"""The CUDA kernels on the CPU, under many schedules and with parts taken out, and the emulator that runs them.

docs/testing.md says how it works, and how one case is run by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.emulator import build, mutations
from tests.emulator.cases import _selftest
from tests.emulator.harness import SELFTEST, cases, ops
from tests.emulator.mutations import COMMAND, SEEDS
from tests.emulator.worker import Job, Worker, run


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    if build.unavailable(sanitize=True):
        pytest.skip(build.unavailable(sanitize=True))
    started = [Worker(), Worker()]
    yield started
    for worker in started:
        worker.close()


# --- the kernels


@pytest.mark.slow
@pytest.mark.parametrize("op", ops())
def test_every_case_is_right_under_every_seed(op: str, workers: list[Worker]) -> None:
    jobs = [Job(op, [name], SEEDS) for name in cases(op)]
    results = list(run(jobs, workers))
    seconds = {result.case: result.seconds.get(result.case, 0.0) for result in results}
    dearest = sorted(seconds, key=lambda case: -seconds[case])[:5]
    print(
        f"{op}: {sum(seconds.values()):.1f} s a seed, most for " + ", ".join(f"{c} {seconds[c]:.2f}" for c in dearest)
    )
    failures = [f"{op} {result.case}, seed {result.seed}: {result.failure}" for result in results if result.failure]
    assert not failures, "\n".join(["", *failures])


@pytest.mark.slow
@pytest.mark.parametrize("op", ops())
def test_nothing_can_be_taken_out_of_a_kernel_unnoticed(op: str, workers: list[Worker]) -> None:
    mutants = [mutant for mutant in mutations.read_table() if mutant.op == op]
    assert mutants, f"docs/{mutations.TABLE.name} has no rows of {op}; {COMMAND}"
    unnoticed = [
        f"{op} {mutant.case}, seed {mutant.seed}: passes without {mutant.place}"
        for mutant, failure in mutations.replay(mutants, workers)
        if not failure
    ]
    assert not unnoticed, "\n".join(["", *unnoticed])


def test_the_table_has_every_barrier_wait_and_bounds_check() -> None:
    listed = {mutant.place for mutant in mutations.read_table()}
    there = mutations.Places().all()
    assert not there - listed, f"new: {sorted(there - listed)}; {COMMAND}"
    assert not listed - there, f"gone: {sorted(listed - there)}; {COMMAND}"
    assert all(mutant.failure != "**not at all**" for mutant in mutations.read_table())


def test_places_survive_other_changes_but_not_a_new_barrier() -> None:
    def places(text: str) -> set[mutations.Place]:
        return mutations.Places({"csrc/kernels/a.cu": text}).all()

    before = places("f();\n__syncthreads();\nif (inside(i, n) && inside(j, m)) g();\n__syncthreads();")
    assert len(before) == 4
    changed = "// __syncthreads();\nh();\n  __syncthreads();  // why\nif (ptx::inside(i, n)  && inside(j, m)) g();\n"
    assert places(changed + "/* inside(k,\n l) */ __syncthreads();") == before
    assert len(places(changed + "__syncthreads(); __syncwarp(); ptx::cp_async_wait<0>();") - before) == 3


# --- the emulator


def _run(workers: list[Worker], name: str, seeds: list[int] = SEEDS) -> str:
    return workers[0].run(Job(SELFTEST, [name], seeds)).failure


@pytest.mark.parametrize("name", _selftest.RIGHT)
def test_right_kernels_are_right(name: str, workers: list[Worker]) -> None:
    assert _run(workers, name) == ""


@pytest.mark.parametrize("name", _selftest.WRONG)
def test_every_mistake_is_found_and_named(name: str, workers: list[Worker]) -> None:
    failure = _run(workers, name)
    assert re.search(_selftest.WRONG[name].words, failure), failure
    if _selftest.WRONG[name].seeds:
        assert _run(workers, f"{_selftest.OFTEN} {name}", [0]) == ""


@pytest.mark.parametrize(
    ("name", "kind"),
    [("reverse", "barrier"), ("neighbour lane", "syncwarp"), ("copies", "wait"), ("masked copies of 8", "inside")],
)
def test_what_is_taken_out_is_missed(name: str, kind: str, workers: list[Worker]) -> None:
    (sites,) = workers[0].run(Job(SELFTEST, [name], [0])).sites.values()
    removable = [site for site in sites if site.removable]
    assert kind in {site.kind for site in removable}
    for site in removable:
        assert workers[0].run(Job(SELFTEST, [name], SEEDS, site.key)).failure, site
    assert _run(workers, name) == "", "it is back"


def test_a_result_that_depends_on_the_order_of_blocks_shows(workers: list[Worker]) -> None:
    assert "other bits than under the first seed" in _run(workers, _selftest.FIRST_BLOCK_WINS)


def test_a_kernel_without_end_is_ended(workers: list[Worker]) -> None:
    assert workers[0].run(Job(SELFTEST, [_selftest.ENDLESS], [0], seconds=0.5)).failure == "did not end in time"
    assert _run(workers, "reverse") == "", "the worker goes on"


def test_a_seed_is_the_same_schedule_in_every_process(workers: list[Worker]) -> None:
    told = [worker.run(Job(SELFTEST, [_selftest.TELL_SCHEDULES], [seed])) for seed, worker in enumerate(workers)]
    assert re.fullmatch("AssertionError: [0-9a-f]{64}", told[0].failure), told[0].failure
    assert told[0].failure == told[1].failure


def test_a_job_that_cannot_begin_is_no_failure_of_a_case(workers: list[Worker]) -> None:
    with pytest.raises(RuntimeError, match="no such case: spin"):
        _run(workers, "spin")
    assert _run(workers, "reverse") == "", "the worker goes on"
