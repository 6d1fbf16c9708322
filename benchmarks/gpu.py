"""``make gpu``: the one command on a machine with a GPU where nothing can be installed, within a time budget.

    python -m benchmarks.gpu [--budget 540] [--out FOLDER] [--stages smoke,models] [--dry-run]

Standard library only: it lays the package out under build/, starts the stages of benchmarks/gpu_stages.py one after the
other with a time limit each, most important first, and prints a short table last. It measures nothing itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

try:
    from benchmarks import environment
except ImportError:  # pragma: no cover - run as a file instead of with -m
    sys.exit("run this in the checkout as: python -m benchmarks.gpu")

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
COPIED = ("resnet_fast", "kernels", "benchmarks", "tests")
BUDGET = 540.0
CUT_OFF = 3
"""Exit status of a stage that ended by itself with nothing wrong so far and something left out for its time."""
WITHOUT_CUDA = "RESNET_FAST_GPU_WITHOUT_CUDA"
"""The variable that tells a stage why it must not launch the CUDA kernels."""
PRECISIONS = "RESNET_FAST_GPU_PRECISIONS"
"""The variable that tells a timed stage the precisions smoke found right, comma-separated; unset: time them all."""
PACKED_EVERY = 20.0
"""Seconds between archives of the results while a stage runs."""


@dataclass(frozen=True)
class Stage:
    """One step. ``most`` and ``least``: shares of the budget, what it may take and what is kept free for it while
    earlier ones run. ``timed``: it measures time, which makes no sense for wrong answers."""

    name: str
    what: str
    most: float
    least: float
    timed: bool = False


STAGES = (
    Stage("native", "builds resnet_fast._C into this checkout, for this machine's GPUs", 0.30, 0.05),
    Stage("smoke", "every op against float64 at small shapes", 0.16, 0.03),
    Stage("tests", "pytest: the kernels' tests and those marked gpu", 0.16, 0.04),
    Stage("cuda", "the CUDA kernels: ops against float64 at small shapes, then their tests", 0.10, 0.03),
    Stage("accuracy", "whole networks against float64", 0.10, 0.03),
    Stage("models", "ResNet-50 fp16, batches 128 1 32 256 8, against torch eager", 0.15, 0.05, timed=True),
    Stage("compiled", "ResNet-50 fp16 against torch.compile max-autotune", 0.28, 0.06, timed=True),
    Stage("networks", "ResNet-152 and 18, bf16, tf32, fp32, against torch eager", 0.20, 0.03, timed=True),
    Stage("jax", "ResNet-50 fp16 against JAX/XLA", 0.08, 0.02, timed=True),
    Stage("cudnn", "ResNet-50 fp16 against the cuDNN graph API", 0.06, 0.02, timed=True),
    Stage("kernels", "each op at ResNet-50's shapes beside its floor", 0.15, 0.05, timed=True),
    Stage(
        "tune",
        "launch choices for ResNet-50 fp16 and for its training in bf16, Triton's and CUDA's",
        0.30,
        0.03,
        timed=True,
    ),
    Stage("training", "ResNet-50 training steps in bf16 against torch eager and torch.compile", 0.30, 0.05, timed=True),
    Stage("layers", "each layer of ResNet-50: floor, Triton, CUDA, cuDNN", 0.15, 0.03, timed=True),
    Stage("sanitizer", "compute-sanitizer memcheck, racecheck and synccheck on the ops", 0.15, 0.03),
)
WARM = Stage("warm", "compiles the networks' kernels in the background", 0.30, 0.0)
"""Runs beside the stages before the first timed one, and is over before it."""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: "done", "failed", "out of time" or "skipped"; why, its seconds, the end of what it printed,
    and the clocks seen meanwhile."""

    status: str
    reason: str = ""
    seconds: float = 0.0
    tail: str = ""
    clocks: Mapping[str, Any] | None = None


def limit(stage: Stage, later: tuple[Stage, ...], budget: float, left: float) -> float:
    """Seconds that ``stage`` may take with ``left`` seconds to go: what is kept free for ``later`` is not its own."""
    return max(0.0, min(stage.most * budget, left - sum(other.least for other in later) * budget))


def overlay(folder: Path) -> None:
    """Copies the package into ``folder``, with benchmarks and tests beside it. Python started there needs no
    installation."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "results")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)


def surroundings(folder: Path, revision: str, tuned: Path) -> dict[str, str]:
    """The environment of the stages: the overlay first, no interpreter of Triton's, tables of launch choices beside the
    results, the commit that is measured, and where this checkout is."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "RESNET_FAST_COMMIT": revision,
        "RESNET_FAST_TUNED": str(tuned),
        "RESNET_FAST_CHECKOUT": str(ROOT),
    }


class Process:
    """A command in a process group of its own, its output in a file and, line by line, on the terminal."""

    def __init__(self, command: list[str], cwd: Path, env: Mapping[str, str]) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        self._shown = 0
        self._process = subprocess.Popen(
            command, cwd=cwd, env=dict(env), stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self, seconds: float, meanwhile: Callable[[], object] = lambda: None) -> int | None:
        """The exit status; None if the command was still running after ``seconds`` and had to be ended."""
        end, called = time.monotonic() + seconds, time.monotonic()
        try:
            while time.monotonic() < end:
                if time.monotonic() - called >= PACKED_EVERY:
                    meanwhile()
                    called = time.monotonic()
                status = self._process.poll()
                self._show()
                if status is not None:
                    return status
                time.sleep(0.1)
        except BaseException:  # this program is being ended itself: nothing may stay behind on the GPU
            self.end()
            raise
        self.end()
        return None

    def end(self) -> None:
        """Ends the command and whatever it started."""
        for sent, grace in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(self._process.pid, sent)
                self._process.wait(grace)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._process.poll()
        self._show()

    def tail(self, characters: int = 3000) -> str:
        self._output.seek(0)
        return self._output.read().decode(errors="replace")[-characters:]

    def _show(self) -> None:
        self._output.seek(self._shown)
        new = self._output.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._shown += len(whole)
        self._output.seek(0, os.SEEK_END)
        for line in whole.decode(errors="replace").splitlines():
            if line.startswith("  "):  # the stages' own lines; everything else stays in the file
                print(line, flush=True)


def command(stage: str, results: Path, seconds: float) -> list[str]:
    module = ["-m", "benchmarks.gpu_stages", stage, "--results", str(results), "--seconds", f"{seconds:.0f}"]
    return [sys.executable, *module]


class Run:
    """One ``make gpu``: what it found out so far, in ``environment.json`` after every stage."""

    def __init__(self, results: Path, budget: float, found: dict[str, Any]) -> None:
        self.results, self.budget, self.found = results, budget, found
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

    def pack(self) -> None:
        try:
            pack(self.results, table(self.results, self.outcomes))
        except OSError as error:  # such as a full disk: what is measured counts more
            print(f"  no archive: {error}", flush=True)


def archive(results: Path) -> Path:
    return results.with_name(f"{results.name}.tar.gz")


def pack(results: Path, summary: str) -> None:
    """Every result file in one archive beside their folder, a summary first."""
    with _replacing(archive(results)) as file, tarfile.open(fileobj=file, mode="w:gz") as tar:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(f"{results.name}/{name}")
            member.size, member.mtime = len(content), int(time.time())
            tar.addfile(member, io.BytesIO(content))

        add("summary.txt", f"{summary}\n".encode())
        for path in sorted(results.rglob("[!.]*")):
            with suppress(FileNotFoundError):  # a stage may be replacing it
                if path.is_file():
                    add(path.relative_to(results).as_posix(), path.read_bytes())


def write(path: Path, data: Any) -> None:
    """``data`` as JSON, whole or not at all."""
    with _replacing(path) as file:
        file.write(f"{json.dumps(data, indent=1, default=str)}\n".encode())


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def slug(found: dict[str, Any]) -> str:
    """The folder's name for results of this GPU, as kernels/gpus.py writes it; "none" without one."""
    if not found["gpus"]:
        return "none"
    spec = importlib.util.spec_from_file_location("_gpus", ROOT / "kernels" / "gpus.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_gpus"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return str(module.normalise(found["gpus"][0]["name"]))


def perform(run: Run, stages: tuple[Stage, ...], cwd: Path, env: Mapping[str, str]) -> int:
    """The stages in their order within the budget; exit status 1 if an answer was wrong or a stage failed."""
    background: Process | None = None
    right: tuple[str, ...] | None = None
    reason = ""
    for position, stage in enumerate(stages):
        given = {**env, **_without_cuda(run.outcomes)}
        if stage.timed and right is not None:
            given[PRECISIONS] = ",".join(right)
        if stage.timed and right == ():
            run.note(stage.name, Outcome("skipped", reason))
            continue
        if stage.timed and background is not None:
            _finish(run, background)
            background = None
        seconds = limit(stage, stages[position + 1 :], run.budget, run.left)
        if seconds < min(5.0, stage.least * run.budget):
            run.note(stage.name, Outcome("skipped", "no time left"))
            continue
        print(f"== {stage.name}: {stage.what} (at most {seconds:.0f} s, {run.left:.0f} s left)", flush=True)
        began = datetime.now(timezone.utc).isoformat(timespec="seconds")
        outcome = _one(stage, seconds, run, cwd, given)
        run.note(stage.name, replace(outcome, reason=outcome.reason or reason) if stage.timed else outcome)
        if stage.name == "smoke":
            right, reason = _judged(run, began)
            if right != () and any(other.timed for other in stages[position:]):
                told = {} if right is None else {PRECISIONS: ",".join(right)}
                background = Process(command(WARM.name, run.results, WARM.most * run.budget), cwd, {**env, **told})
    if background is not None:
        _finish(run, background)
    return int(any(outcome.status == "failed" for outcome in run.outcomes.values()))


def _judged(run: Run, began: str) -> tuple[tuple[str, ...] | None, str]:
    """The precisions that smoke, begun at that time, found right, and why the others are not timed; None: all of them.

    Right is a precision of which something was judged and nothing is wrong, and of which nothing is missing unless the
    time was too short for it.
    """
    outcome = run.outcomes["smoke"]
    if outcome.status == "done":
        return None, ""
    found = _read(run.results / "correctness.json")
    rows = [row for row in found.get("ops", {}).values() if row["time"] >= began]
    right, without = [], []
    for precision, count in found.get("asked", {}).items():
        passed = [row["passed"] for row in rows if row.get("precision") == precision]
        if passed and all(passed) and (len(passed) == count or outcome.status == "out of time"):
            right.append(precision)
        else:
            without.append(f"{precision} ({sum(passed)} of {count} right)")
    return tuple(right), f"not timed after smoke: {', '.join(without) or 'everything'}"


def _without_cuda(outcomes: Mapping[str, Outcome]) -> dict[str, str]:
    """What to add to a stage's environment where the stage "cuda" has not found the kernels right: one that faults
    would take the GPU from the process that launches it. Where that stage was not asked for there is no verdict."""
    found = outcomes.get("cuda")
    if found is None or found.status == "done":
        return {}
    return {WITHOUT_CUDA: f"the stage cuda: {found.status}{f', {found.reason}' if found.reason else ''}"}


def _one(stage: Stage, seconds: float, run: Run, cwd: Path, env: Mapping[str, str]) -> Outcome:
    before = time.monotonic()
    with environment.Clocks() as clocks:
        process = Process(command(stage.name, run.results, max(1.0, seconds - 3)), cwd, env)
        status = process.wait(seconds, run.pack)
    took = time.monotonic() - before
    if status not in (0, None):
        print(process.tail(1500), flush=True)
    name = {0: "done", None: "out of time", CUT_OFF: "out of time"}.get(status, "failed")
    reason = f"exit status {status}" if name == "failed" else ""
    return Outcome(name, reason, round(took, 1), process.tail(), clocks.seen)


def _finish(run: Run, background: Process) -> None:
    """Waits for the compilations in the background, for as long as that leaves most of the time for measuring."""
    before = time.monotonic()
    status = background.wait(max(0.0, min(0.15 * run.budget, 0.3 * run.left)))
    took = round(time.monotonic() - before, 1)
    run.note(WARM.name, Outcome("done" if status == 0 else "out of time" if status is None else "failed as a whole",
                                f"{took} s waited for", tail=background.tail()))  # fmt: skip


def rehearsal(run: Run, cwd: Path, env: Mapping[str, str]) -> int:
    """Without a GPU: tests are collected, every launch is built, models and plans are made, and the stages listed."""
    failed = 0
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    tests = (cwd / "tests").glob
    files = sorted(
        str(path.relative_to(cwd))
        for path in (*tests("test_triton_*.py"), *tests("test_cuda_*.py"), *tests("test_conv_statistics.py"))
        if path.name != "test_cuda_on_cpu.py"  # which compiles
    )
    for name, arguments, seconds in (
        (
            "import",
            [sys.executable, "-c", "import resnet_fast.kernels; print('  resnet_fast', resnet_fast.__file__)"],
            60.0,
        ),
        ("collect", [*collect, *files], 120.0),
        ("rehearse", command("rehearse", run.results, 60.0), 240.0),
    ):
        print(f"== {name}", flush=True)
        process = Process(arguments, cwd, env)
        before = time.monotonic()
        status = process.wait(seconds)
        outcome = "done" if status == 0 else "failed"
        tail = process.tail(1500)
        run.note(
            name, Outcome(outcome, "" if status == 0 else f"exit status {status}", time.monotonic() - before, tail)
        )
        if status != 0:
            failed += 1
            print(tail, flush=True)
        elif name == "collect":
            print(f"  {tail.strip().splitlines()[-1]}", flush=True)
    print("== would run on a GPU")
    for stage in STAGES:
        print(f"  {stage.name:10s} at most {stage.most * run.budget:4.0f} s  {stage.what}")
    return int(failed > 0)


def table(results: Path, outcomes: Mapping[str, Outcome]) -> str:
    """The short summary printed last, from the result files."""
    lines = ["", f"results in {results}, all of them in {archive(results).name} beside it"]
    lines += [f"  {name:10s} {o.status:12s} {o.seconds:6.1f} s  {o.reason}".rstrip() for name, o in outcomes.items()]
    for name, row in _read(results / "native.json").get("build", {}).items():
        lines.append(f"{name}: {row['line']}")
    found = _read(results / "correctness.json")
    for section in ("ops", "models"):
        rows = found.get(section, {})
        wrong = [name for name, row in rows.items() if not row["passed"]]
        if rows:
            which = f"; WRONG: {', '.join(wrong)}" if wrong else ""
            lines.append(f"{section}: {len(rows) - len(wrong)} of {len(rows)} right{which}")
    for name, row in _read(results / "tests.json").get("pytest", {}).items():
        lines.append(f"tests, {name}: {row['counts']} ({row['ended']})")
    for name, row in _read(results / "tests.json").get("sanitizer", {}).items():
        lines.append(f"{name}: {'clean' if row['clean'] else 'NOT CLEAN'}")
    cases = _read(results / "models.json").get("cases", {})
    for name, row in cases.items():
        if "contestants" in row:
            lines.append(f"{name:22s} {_rates(row)}")
    for name, row in _read(results / "training.json").get("cases", {}).items():
        if "contestants" in row:
            lines.append(f"{name}: {training_line(row)}")
    lines += _layers(_read(results / "layers.json").get("rows", {}))
    rows = [row for row in _read(results / "ops.json").get("rows", {}).values() if "share" in row]
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        shares = sorted(
            (100 * row["share"], f"{row['case']} {row['precision']} batch {row['batch']}") for row in mine
        )  # fmt: skip
        middle, (least, where) = shares[len(shares) // 2][0], shares[0]
        lines.append(
            f"{op}: {middle:.0f} % of the floor's speed (median of {len(mine)}), least {least:.0f} % at {where}"
        )
    return "\n".join(lines)


def _layers(rows: Mapping[str, Any]) -> list[str]:
    """Per batch, how many layers of the network each contestant is fastest at."""
    lines = []
    for batch in dict.fromkeys(row["batch"] for row in rows.values()):
        wins: dict[str, int] = {}
        for row in rows.values():
            times = {name: one["us"] for name, one in row["times"].items() if "us" in one}
            if row["batch"] == batch and times:
                first = min(times, key=times.__getitem__)
                wins[first] = wins.get(first, 0) + 1
        lines.append(f"layers at batch {batch}, fastest: " + ", ".join(f"{name} {n}" for name, n in wins.items()))
    return lines


def _rates(row: dict[str, Any]) -> str:
    parts = []
    for name, found in row["contestants"].items():
        rates = [found[mode].get("images_per_second", 0) for mode in ("call", "graph") if mode in found]
        ratio = row["against"].get(name, {}).get("best", {}).get("p50")
        if rates and max(rates):
            parts.append(f"{name} {max(rates):.0f}" + (f" ({ratio:.2f}x)" if ratio else ""))
    return "img/s: " + ", ".join(parts)


def training_line(row: Mapping[str, Any]) -> str:
    """``eager 1000 img/s 20.0 GiB, ours 1200 img/s 19.0 GiB (1.20x)``: of ours how many times eager's rate."""
    parts = []
    for name, found in row["contestants"].items():
        if "images_per_second" not in found:
            parts.append(f"{name}: {found['status']}, {found['reason']}")
            continue
        memory = f" {found['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in found else ""
        ratio = row["against"].get(name, {}).get("eager", {}).get("p50")
        parts.append(f"{name} {found['images_per_second']:.0f} img/s{memory}" + (f" ({ratio:.2f}x)" if ratio else ""))
    return ", ".join(parts)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for everything (default: {BUDGET:.0f})")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
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
    chosen = tuple(stage for stage in STAGES if not names or stage.name in names)
    found = environment.report()
    if not found["gpus"] and not given.dry_run:
        print(
            "make gpu: nvidia-smi finds no GPU here; --dry-run does everything up to the first launch", file=sys.stderr
        )
        return 1
    out = given.out or (BUILD if given.dry_run else ROOT / "benchmarks" / "results")
    results = out.resolve() / ("gpu-dry-run" if given.dry_run else slug(found))
    run = Run(results, given.budget, found)
    run.save()
    gpu = found["gpus"][0] if found["gpus"] else {"name": "no GPU"}
    print(f"{', '.join(gpu.values())}; python {found['python']}, {found['versions']}, nvcc {found['nvcc'] or 'none'}, "
          f"commit {found['commit'] or 'unknown'}", flush=True)  # fmt: skip
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="overlay-") as name:
        cwd = Path(name)
        overlay(cwd)
        env = surroundings(cwd, found["commit"], results / "tuned")
        status = rehearsal(run, cwd, env) if given.dry_run else perform(run, chosen, cwd, env)
    print(table(results, run.outcomes), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
