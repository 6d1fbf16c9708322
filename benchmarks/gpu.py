"""``make gpu``: the one command on a machine with a GPU if nothing can be installed, within a time budget.

    python -m benchmarks.gpu [--second | --stages smoke,models] [--budget 510] [--out FOLDER] [--archive FOLDER]
    python -m benchmarks.gpu --dry-run

Standard library only: it lays the package out under build/, runs the commands of ``STAGES`` one after the other with a
time limit each, most important first, and prints a short table last. It measures nothing itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

try:
    from benchmarks import environment, summary
    from benchmarks.process import Process
    from benchmarks.stages import ALL, REHEARSED, STAGES, WARM, Command, Stage, limit, pytest_command
except ImportError:  # pragma: no cover - run as a file instead of with -m
    sys.exit("run this in the checkout as: python -m benchmarks.gpu")

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
COPIED = ("resnet_fast", "kernels", "benchmarks", "tests")
FILES = environment.module_at("resnet_fast/_files.py")
BUDGET = 510.0
CACHE = BUILD / "triton-cache"
"""Kernels compiled elsewhere by the same Triton (``python -m benchmarks.prepare``), carried here with the checkout."""
CUT_OFF = 3
"""Exit status of a command that ended by itself with nothing wrong so far and something left out for its time."""
NO_TIME = "no time left"
LEAST = 5.0
"""Seconds in which nothing is begun."""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: "done", "failed", "out of time" or "skipped"; why, its seconds, the end of what it printed,
    and the clocks seen meanwhile."""

    status: str
    reason: str = ""
    seconds: float = 0.0
    tail: str = ""
    clocks: Mapping[str, Any] | None = None


def overlay(folder: Path) -> None:
    """Copies the package into ``folder``, with benchmarks and tests beside it. Python started there needs no
    installation."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "results")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)


def surroundings(folder: Path, revision: str, tuned: Path) -> dict[str, str]:
    """The environment of the stages: the overlay first, no interpreter of Triton's, tables of launch choices beside the
    results, and the commit that is measured."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    if CACHE.is_dir():
        kept.setdefault("TRITON_CACHE_DIR", str(CACHE))
    return kept | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "RESNET_FAST_COMMIT": revision,
        "RESNET_FAST_TUNED": str(tuned),
    }


class Run:
    """One ``make gpu``: where it runs, and what it found out so far, in ``environment.json`` after every stage."""

    def __init__(
        self,
        results: Path,
        budget: float,
        found: dict[str, Any],
        cwd: Path | None = None,
        env: Any = None,
        into: Path | None = None,
    ) -> None:
        self.results, self.budget, self.found = results, budget, found
        self.archive = archive(results) if into is None else into / archive(results).name
        self.cwd, self.env = cwd or results, dict(os.environ if env is None else env)
        self.outcomes: dict[str, Outcome] = {}
        self._began = time.monotonic()

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self._began)

    def note(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        self.save()

    def save(self) -> None:
        stages = {name: vars(outcome) for name, outcome in self.outcomes.items()}
        write(self.results / "environment.json", {
            "schema": 1, "kind": "gpu-environment", "environment": self.found, "budget": self.budget,
            "seconds": self.budget - self.left, "stages": stages,
        })  # fmt: skip
        self.pack()

    def add(self, file: str, section: str, name: str, row: dict[str, Any] | None) -> None:
        """Put a row into a section of a result file, beside those of earlier runs; None takes it out."""
        path = self.results / f"{file}.json"
        data = {"schema": 1, "kind": f"gpu-{file}", "machine": environment.summary(self.found)}
        data = summary.read(path) | data
        rows = data.setdefault(section, {})
        rows.pop(name, None)
        if row is not None:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            rows[name] = {"time": now, "commit": self.found["commit"], **row}
        write(path, data)

    def pack(self) -> None:
        try:
            pack(self.results, table(self.results, self.outcomes, self.archive), self.archive)
        except OSError as error:  # such as a full disk: what is measured counts more
            print(f"  no archive: {error}", flush=True)


def archive(results: Path) -> Path:
    return results.with_name(f"{results.name}.tar.gz")


def pack(results: Path, text: str, to: Path) -> None:
    """Every result file in one archive, a summary first."""

    def write_to(name: str) -> None:
        with tarfile.open(name, mode="w:gz") as tar:
            _member(tar, f"{results.name}/summary.txt", f"{text}\n".encode())
            for path in sorted(results.rglob("[!.]*")):
                with suppress(FileNotFoundError):  # a stage may be replacing it
                    if path.is_file():
                        _member(tar, f"{results.name}/{path.relative_to(results).as_posix()}", path.read_bytes())

    FILES.write_whole(to, write_to, make_folder=True)


def _member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(content), int(time.time())
    tar.addfile(member, io.BytesIO(content))


def write(path: Path, data: Any) -> None:
    """``data`` as JSON, whole or not at all."""
    FILES.write_text(path, f"{json.dumps(data, indent=1, default=str)}\n")


def perform(run: Run, stages: tuple[Stage, ...]) -> int:
    """Run the stages in their order within the budget; return 1 if an answer was wrong or a stage failed."""
    background: Process | None = None
    # What a stage still has to judge is not right yet.
    right = tuple(each for each in ALL if not any(each in stage.judges for stage in stages))
    reasons: list[str] = []
    for position, stage in enumerate(stages):
        reason = "; ".join(reasons)
        if stage.timed and not any(set(command.precisions) & set(right) for command in stage.commands):
            run.note(stage.name, Outcome("skipped", reason or "nothing that it times has been found right"))
            continue
        if stage.timed and background is not None:
            _finish(run, background)
            background = None
        seconds = limit(stage, stages[position + 1 :], run.budget, run.left)
        if seconds < min(LEAST, stage.least * run.budget):
            run.note(stage.name, Outcome("skipped", NO_TIME))
            continue
        print(f"== {stage.name}: {stage.what} (at most {seconds:.0f} s, {run.left:.0f} s left)", flush=True)
        began = datetime.now(timezone.utc).isoformat(timespec="seconds")
        _withhold(run, "" if stage.name == "sanitizer" else _without_cuda(run.outcomes))
        outcome = _one(stage, seconds, run, right if stage.timed else ALL)
        run.note(stage.name, replace(outcome, reason=outcome.reason or reason) if stage.timed else outcome)
        if stage.judges:
            found, why = _judged(run, began, stage)
            right = tuple(each for each in ALL if each in right or each in found)
            reasons += [why] if why else []
        if stage.name == "smoke" and right and any(other.timed for other in stages[position:]):
            most = WARM.most * run.budget
            background = Process(arguments(WARM.commands[0], run, most, right), run.cwd, run.env)
    if background is not None:
        _finish(run, background)
    return int(any(outcome.status == "failed" for outcome in run.outcomes.values()))


def _judged(run: Run, began: str, stage: Stage) -> tuple[tuple[str, ...], str]:
    """Return the precisions that a stage, begun at that time, found right, and why the others are not timed.

    Right is a precision of which something was judged and nothing is wrong, and of which nothing is missing unless the
    time was too short for it.
    """
    outcome = run.outcomes[stage.name]
    if outcome.status == "done":
        return stage.judges, ""
    found = summary.read(run.results / "correctness.json")
    rows = [row for row in found.get("ops", {}).values() if row["time"] >= began]
    right, without = [], []
    for precision, count in found.get("asked", {}).items():
        if precision not in stage.judges:
            continue
        passed = [row["passed"] for row in rows if row.get("precision") == precision]
        if passed and all(passed) and (len(passed) == count or outcome.status == "out of time"):
            right.append(precision)
        else:
            without.append(f"{precision} ({sum(passed)} of {count} right)")
    if right and not without:
        return tuple(right), ""
    return tuple(right), f"not timed after {stage.name}: {', '.join(without) or 'everything'}"


def _without_cuda(outcomes: Mapping[str, Outcome]) -> str:
    """Why later stages get no CUDA kernels: the stage "cuda" has not found them right, and one that faults would take
    the GPU from the process that launches it. If that stage was not asked for there is no verdict, and no reason."""
    found = outcomes.get("cuda")
    if found is None or found.status == "done":
        return ""
    return f"the stage cuda: {found.status}{f', {found.reason}' if found.reason else ''}"


def _withhold(run: Run, reason: str) -> None:
    """Move the native module out of the overlay, with the reason in its record, or, without a reason, back in."""
    package = run.cwd / "resnet_fast"
    pattern, add, remove = ("_C*.so", ".withheld", "") if reason else ("_C*.so.withheld", "", ".withheld")
    for path in package.glob(pattern):
        path.rename(path.with_name(path.name.removesuffix(remove) + add))
    record = package / "_build_record.json"
    found = summary.read(record)
    if reason:
        write(record, {**found, "built": False, "reason": reason, "withheld": found.get("withheld", found)})
    elif "withheld" in found:
        write(record, found["withheld"])


def arguments(command: Command, run: Run, seconds: float, right: Iterable[str]) -> list[str]:
    """Return the command line of a command that has this time and may time the precisions ``right``."""
    to = f"--device cuda --out {shlex.quote(str(run.results))} --seconds {seconds:.0f}"
    dtypes = ",".join(name for name in command.precisions if name in right)
    text = command.text.format(to=to, out=shlex.quote(str(run.results)), seconds=f"{seconds:.0f}", dtypes=dtypes)
    jobs = []
    if command.text.startswith("-m pytest") and importlib.util.find_spec("xdist"):
        jobs = ["-n", str(min(8, max(1, (os.cpu_count() or 2) // 2)))]
    return [sys.executable, *shlex.split(text), *jobs]


def _one(stage: Stage, seconds: float, run: Run, right: tuple[str, ...]) -> Outcome:
    """Run the commands of a stage one after the other; the worst of their ends is the stage's."""
    before, ends, output = time.monotonic(), [], ""
    reason = ""
    with environment.Clocks() as clocks:
        if stage.name == "native":
            end, reason, output = native(run, seconds)
            ends.append(end)
        for command in sanitizer(run) if stage.name == "sanitizer" else stage.commands:
            if not set(command.precisions) & set(right):
                continue
            if lacking := command.lacking():
                print(f"  not run: {lacking}", flush=True)
                continue
            left = seconds - (time.monotonic() - before)
            if left < min(LEAST, 0.5 * seconds):
                ends.append("out of time")
                break
            most = command.share * left
            env = run.env | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if stage.name == "sanitizer" else {})
            process = Process(arguments(command, run, max(1.0, most - 3), right), run.cwd, env)
            status = process.wait(most, run.pack)
            output = process.output()
            end, why = _end(stage, command, status, output, run)
            ends.append(end)
            reason = reason or why
            if end == "failed":
                print(output[-1500:], flush=True)
    worst = next((name for name in ("failed", "out of time") if name in ends), "done")
    took = round(time.monotonic() - before, 1)
    return Outcome(worst, reason if worst == "failed" else "", took, output[-3000:], clocks.seen)


def _end(stage: Stage, command: Command, status: int | None, output: str, run: Run) -> tuple[str, str]:
    """Return how a command ended and why, after what it says of tests is in ``tests.json``."""
    if stage.name == "sanitizer":
        return _sanitized(command, status, output, run)
    if command.row:
        counts = summary.outcomes(output)
        ended = "out of time" if status is None else f"exit status {status}"
        run.add("tests", "pytest", command.row, {"counts": counts, "ended": ended, "tail": output[-4000:]})
        print(f"  {command.row}: {counts} ({ended})", flush=True)
        if counts.get("FAILED") or counts.get("ERROR"):
            return "failed", ended
        if status in (None, 5):  # what was cut off counts as far as it went; 5: there are no such tests
            return "done", ""
    name = {0: "done", None: "out of time", CUT_OFF: "out of time"}.get(status, "failed")
    return name, f"exit status {status}" if name == "failed" else ""


def _finish(run: Run, background: Process) -> None:
    """Wait for the compilations in the background, for as long as that leaves most of the time for measuring."""
    before = time.monotonic()
    status = background.wait(max(0.0, min(0.1 * run.budget, 0.3 * run.left)))
    took = round(time.monotonic() - before, 1)
    run.note(WARM.name, Outcome("done" if status == 0 else "out of time" if status is None else "failed as a whole",
                                f"{took} s waited for", tail=background.output()[-3000:]))  # fmt: skip


# --- what is more than a command


def native(run: Run, seconds: float) -> tuple[str, str, str]:
    """Build ``_C`` into the checkout, for this machine's GPUs, and copy it into the overlay; return how that ended,
    why, and what was printed.

    All cores compile. What CMake and ninja made stays in build/native, so that a later call compiles what has changed.
    Where a tool is missing nothing is built, and that is no failure.
    """
    build, package, source = (
        environment.module_at("csrc/native_build.py"),
        run.cwd / "resnet_fast",
        ROOT / "resnet_fast",
    )
    run.add("native", "build", "resnet_fast._C", None)  # an earlier run's
    build.remove_module(package)  # a copy of an earlier build must not be taken for this one
    found = {"nvcc": build.find_nvcc(), "cmake": build.find_tool("cmake"), "ninja": build.find_tool("ninja")}
    found["pybind11"] = importlib.util.find_spec("pybind11")
    missing = [name for name, path in found.items() if path is None]
    if missing:
        return _built(run, {"built": False, "line": f"not built: there is no {' and no '.join(missing)} here"}, "done")
    script = [sys.executable, "csrc/native_build.py", "--out", "resnet_fast", "--build-dir", "build/native"]
    process = Process(script, ROOT, run.env)
    status = process.wait(seconds, run.pack)
    if status is None:  # what the compilers have made is kept for the next call
        return "out of time", "", process.output()
    row = {"built": False, "reason": "the build left no record", **summary.read(source / build.RECORD)}
    row.pop("cpu", None)  # what became of the CPU engine, at another time
    row |= {"status": status, "tail": process.output()[-4000:]}
    if row["built"]:
        for path in (*source.glob("_C.*.so"), source / build.RECORD):
            shutil.copy2(path, package)
        code = "from resnet_fast.backends import cuda; print(cuda.unavailable(initialize=True))"
        loaded = subprocess.run([sys.executable, "-c", code], cwd=run.cwd, env=run.env, capture_output=True, text=True)
        row["reason"] = (loaded.stdout if loaded.returncode == 0 else loaded.stderr).strip()
    if row["reason"]:
        return _built(run, row | {"built": False, "line": f"FAILED: {row['reason'].splitlines()[0]}"}, "failed")
    cutlass = {"all": "", "none": ", without CUTLASS's kernels"}
    parts = cutlass.get(row["sm90"], f", of CUTLASS's kernels {row['sm90']}")
    line = f"built with CUDA {row['cuda']} for {', '.join(row['archs'])} in {row['seconds']} s{parts}"
    return _built(run, row | {"line": line}, "done")


def carried(run: Run) -> str:
    """Return what came with the checkout instead of being made here: the native module, compiled kernels."""
    modules = [path.name for path in (run.cwd / "resnet_fast").glob("_C.*.so")]
    text = "carried: " + (", ".join(modules) or "no resnet_fast._C (--stages native,... builds it here)")
    kernels = sum(1 for _ in CACHE.rglob("*.cubin")) if CACHE.is_dir() else 0
    return f"{text}; {kernels or 'no'} compiled kernels"


def _built(run: Run, row: dict[str, Any], end: str) -> tuple[str, str, str]:
    run.add("native", "build", "resnet_fast._C", row)
    print(f"  {row['line']}", flush=True)
    return end, row["line"] if end == "failed" else "", str(row.get("tail", ""))


def sanitizer(run: Run) -> list[Command]:
    """Return compute-sanitizer's commands: memcheck and racecheck on the ops at small shapes, for the CUDA kernels,
    which come first, synccheck too; then memcheck on the kernels' tests, file by file."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print("  compute-sanitizer is not installed", flush=True)
        return []
    built = any((run.cwd / "resnet_fast").glob("_C*.so"))
    check = f"-m benchmarks.bench_ops --check --workers 1 --device cuda --out {shlex.quote(str(run.cwd / 'sanitizer'))}"
    runs = []
    if built:
        tools = ("memcheck", "racecheck", "synccheck")
        runs += [(tool, "CUDA ops at small shapes", f"{check} --backend cuda") for tool in tools]
    runs += [(tool, "ops at small shapes", check) for tool in ("memcheck", "racecheck")]
    for marks in ("cuda", "triton") if built else ("triton",):
        runs += [
            ("memcheck", path, f"-m pytest -q -p no:cacheprovider -m {marks} {shlex.quote(path)}")
            for path in files_with(marks, run.cwd, run.env)
        ]
    # The first word is for Python, whose arguments these are: it becomes the program that is watched.
    start = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
    watch = f"--target-processes all --error-exitcode 9 {shlex.quote(sys.executable)}"
    return [
        Command(f"-c {shlex.quote(start)} {shlex.quote(program)} --tool {tool} {watch} {text}", row=f"{tool} {what}")
        for tool, what, text in runs
    ]


def files_with(marks: str, cwd: Path, env: Mapping[str, str]) -> list[str]:
    """Return the files in which pytest finds tests with these marks."""
    text = pytest_command("", marks).text.replace(" -v ", " --collect-only -q ")
    listed = subprocess.run(
        [sys.executable, *shlex.split(text)], cwd=cwd, env=dict(env), capture_output=True, text=True
    ).stdout
    return list(dict.fromkeys(line.partition("::")[0] for line in listed.splitlines() if "::" in line))


def _sanitized(command: Command, status: int | None, output: str, run: Run) -> tuple[str, str]:
    """Errors fail the stage; a tool that says nothing of errors does not, and is not clean."""
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", output)
    errors = sum(int(a or b) for a, b in found) if found else None
    ended = "out of time" if status is None else str(status)
    clean = errors == 0 and status == 0
    row = {"errors": errors, "status": ended, "clean": clean, "tail": output[-3000:]}
    run.add("tests", "sanitizer", command.row, row)
    print(f"  {command.row}: {'clean' if clean else f'errors {errors}, status {ended}'}", flush=True)
    return ("failed", f"{command.row}: {errors} errors") if errors else ("done", "")


# --- without a GPU


def rehearsal(run: Run) -> int:
    """Run the same entry points without a GPU; return 1 if one of them failed."""
    build = environment.module_at("csrc/native_build.py")
    print(f"  to build _C: nvcc {build.find_nvcc()}, CUTLASS {build.find_cutlass()}", flush=True)
    for command in REHEARSED:
        print(f"== {command.row}", flush=True)
        if lacking := command.lacking():
            run.note(command.row, Outcome("skipped", lacking))
            continue
        before = time.monotonic()
        arguments = shlex.split(command.text.format(out=shlex.quote(str(run.results))))
        process = Process([sys.executable, *arguments], run.cwd, run.env)
        status = process.wait(240.0)
        tail = process.output()[-1500:]
        end = "done" if status == 0 else "failed"
        reason = "" if status == 0 else f"exit status {status}"
        run.note(command.row, Outcome(end, reason, round(time.monotonic() - before, 1), tail))
        if end == "failed":
            print(tail, flush=True)
        elif tail.strip() and not tail.strip().splitlines()[-1].startswith("  "):
            print(f"  {tail.strip().splitlines()[-1]}", flush=True)
    for title, when in (("would run on a GPU", "first"), ("with --second", "second"), ("if asked for", "asked")):
        print(f"== {title}")
        for stage in (each for each in STAGES if each.when == when):
            print(f"  {stage.name:13s} at most {stage.most * run.budget:4.0f} s  {stage.what}")
    return int(any(outcome.status == "failed" for outcome in run.outcomes.values()))


def table(results: Path, outcomes: Mapping[str, Outcome], packed: Path | None = None) -> str:
    """Return the short summary printed last, from the result files."""
    lines = ["", f"results in {results}, all of them in {packed or archive(results)}"]
    lines += [f"  {name:10s} {o.status:12s} {o.seconds:6.1f} s  {o.reason}".rstrip() for name, o in outcomes.items()]
    if late := [name for name, o in outcomes.items() if o.reason == NO_TIME]:
        lines.append(f"not run for lack of time: {', '.join(late)}")
    if cut := [name for name, o in outcomes.items() if o.status == "out of time"]:
        lines.append(f"cut off by the clock: {', '.join(cut)}")
    return "\n".join(lines + summary.lines(results))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for everything (default: {BUDGET:.0f})")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--archive", type=Path, help="folder of the one file with all results (default: beside them)")
    parser.add_argument("--second", action="store_true", help="what is worth a second command, the sanitizer first")
    parser.add_argument("--stages", default="", help="only these, comma-separated, in their usual order")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: everything up to the first launch")
    given = parser.parse_args()
    names = [name for name in given.stages.split(",") if name]
    unknown = [name for name in names if name not in {stage.name for stage in STAGES}]
    if unknown:
        parser.error(f"--stages: {unknown[0]!r} is none of {', '.join(stage.name for stage in STAGES)}")
    if given.budget <= 0:
        parser.error(f"--budget is {given.budget:g}; it must be a positive number of seconds")
    missing = [name for name in ("torch", "triton", "pytest") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(
            f"{sys.executable} has no {' and no '.join(missing)}; another Python: make gpu PY=/path/to/python3"
        )
    if names and given.second:
        parser.error("--second and --stages each choose the stages; give one of them")
    when = "second" if given.second else "first"
    chosen = tuple(stage for stage in STAGES if (stage.name in names if names else stage.when == when))
    found = environment.report()
    if not found["gpus"] and not given.dry_run:
        print(
            "make gpu: nvidia-smi finds no GPU here; --dry-run does everything up to the first launch", file=sys.stderr
        )
        return 1
    out = given.out or (BUILD if given.dry_run else ROOT / "benchmarks" / "results")
    results = out.resolve() / ("gpu-dry-run" if given.dry_run else environment.slug(found))
    gpu = found["gpus"][0] if found["gpus"] else {"name": "no GPU"}
    print(f"{', '.join(gpu.values())}; python {found['python']}, {found['versions']}, nvcc {found['nvcc'] or 'none'}, "
          f"commit {found['commit'] or 'unknown'}", flush=True)  # fmt: skip
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="overlay-") as name:
        cwd = Path(name)
        overlay(cwd)
        run = Run(results, given.budget, found, cwd, surroundings(cwd, found["commit"], results / "tuned"),
                  None if given.archive is None else given.archive.resolve())  # fmt: skip
        print(f"  {carried(run)}", flush=True)
        run.save()
        status = rehearsal(run) if given.dry_run else perform(run, chosen)
    print(table(results, run.outcomes, run.archive), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
