"""The stages of ``make gpu``, each a process of its own that benchmarks/gpu.py starts with a time limit.

    python -m benchmarks.gpu_stages STAGE --results FOLDER --seconds LIMIT

A stage writes its result file anew after every measurement, whole, and begins nothing that its time is too short for.
Exit status 1 says that an answer was wrong or a test failed. Which stages there are and when is not decided here.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bench_training, environment, gpu_layers, ops
from benchmarks.gpu import CUT_OFF, WITHOUT_CUDA, training_line
from benchmarks.gpu import PRECISIONS as PERMITTED
from resnet_fast import backends
from resnet_fast.benchmarking import cuda, results
from resnet_fast.benchmarking.compare import fresh_model
from resnet_fast.benchmarking.cuda import DTYPES, Case, Device
from resnet_fast.benchmarking.gate import judge
from resnet_fast.benchmarking.network import seeded_batches
from resnet_fast.benchmarking.peers import plain
from resnet_fast.benchmarking.timing import flatten, paired_ratio, summarize
from resnet_fast.roofline.measure import tf32

PRECISIONS = ("fp16", "bf16", "tf32", "fp32")
FIRST = tuple(Case("resnet50", "fp16", batch) for batch in (128, 1, 32, 256, 8))
OTHERS = (
    *(Case(arch, "fp16", batch) for arch in ("resnet152", "resnet18") for batch in (128, 1)),
    *(Case("resnet50", precision, batch) for batch in (128, 1) for precision in ("bf16", "tf32", "fp32")),
    *(Case(arch, "fp16", batch) for batch in (32, 256, 8) for arch in ("resnet152", "resnet18")),
    *(Case("resnet50", precision, batch) for batch in (32, 256, 8) for precision in ("bf16", "tf32", "fp32")),
    *(
        Case(arch, precision, batch)
        for batch in (128, 1, 32, 256, 8)
        for arch in ("resnet152", "resnet18")
        for precision in ("bf16", "tf32", "fp32")
    ),
)
TRAININGS_SHARE = 1 / 3
"""Of the time for launch choices what those that only training runs have."""
TRAINED = tuple(bench_training.Case("resnet50", "bf16", batch) for batch in (128, 256))
ACCURACY = tuple((arch, precision) for arch in ("resnet50", "resnet18", "resnet152") for precision in PRECISIONS)


class Book:
    """A result file of sections of named rows, whole on disk after every addition. Rows of earlier runs stay until
    they are measured again; each says of which commit it is."""

    def __init__(self, folder: Path, name: str, sections: tuple[str, ...]) -> None:
        self.path = folder / f"{name}.json"
        kind = f"gpu-{name}"
        try:
            self.data = results.read(self.path)
        except (OSError, ValueError):
            self.data = {}
        if self.data.get("kind") != kind:
            self.data = {}
        self.data |= {"schema": results.SCHEMA, "kind": kind, "machine": environment.summary(environment.report())}
        for section in sections:
            self.data.setdefault(section, {})
        self.save()

    def add(self, section: str, name: str, row: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.data[section][name] = {"time": now, "commit": self.data["machine"]["commit"], **row}
        self.save()

    def save(self) -> None:
        results.write(self.path, self.data)


class Deadline:
    """When a stage has to be done, and how long its longest item took so far."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end, self._longest = clock() + seconds, 0.0

    @property
    def left(self) -> float:
        return self._end - self._clock()

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items one after the other, as long as there is time for one as long as the longest."""
        for item in items:
            if self.left <= 1.1 * self._longest:
                print("  the rest: out of time", flush=True)
                return
            before = self._clock()
            yield item
            self._longest = max(self._longest, self._clock() - before)


# --- the native module


def native(folder: Path, deadline: Deadline) -> int:
    """Builds ``_C`` into the checkout, on all cores and for this machine's GPUs, and copies it into the overlay.

    What CMake and ninja made stays in build/native, so that a later call compiles what has changed. Where a tool is
    missing nothing is built, and that is no failure.
    """
    import resnet_fast

    book, checkout = Book(folder, "native", ("build",)), Path(os.environ["RESNET_FAST_CHECKOUT"])
    book.data["build"].clear()  # of an earlier run; if this one's time is too short there is none
    book.save()
    build, package, source = _native_build(checkout), Path(resnet_fast.__file__).parent, checkout / "resnet_fast"
    build.remove_module(package)  # a copy of an earlier build must not be taken for this one
    found = {"nvcc": build.find_nvcc(), "cmake": build.find_tool("cmake"), "ninja": build.find_tool("ninja")}
    found["pybind11"] = importlib.util.find_spec("pybind11")
    missing = [name for name, path in found.items() if path is None]
    if missing:
        return _built(book, {"built": False, "line": f"not built: there is no {' and no '.join(missing)} here"}, 0)
    script = [sys.executable, "csrc/native_build.py", "--out", "resnet_fast", "--build-dir", "build/native"]
    # Whoever ends this stage for its time ends the compilers too; what they have made is kept for the next call.
    done = subprocess.run(script, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    row, record = {"built": False, "reason": "the build left no record"}, source / build.RECORD
    if record.is_file():
        row = json.loads(record.read_text(encoding="utf-8"))
    row |= {"status": done.returncode, "tail": done.stdout[-4000:]}
    if package != source and row["built"]:
        for path in (*source.glob("_C.*.so"), record):
            shutil.copy2(path, package)
    reason = row["reason"]
    if row["built"]:  # in a process that has not looked for the module yet
        code = "from resnet_fast.backends import cuda; print(cuda.unavailable(initialize=True))"
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        reason = (loaded.stdout if loaded.returncode == 0 else loaded.stderr).strip()
    if reason:
        return _built(book, row | {"built": False, "reason": reason, "line": f"FAILED: {reason.splitlines()[0]}"}, 1)
    cutlass = {"all": "", "none": ", without CUTLASS's kernels"}.get(
        row["sm90"], f", of CUTLASS's kernels {row['sm90']}"
    )
    line = f"built with CUDA {row['cuda']} for {', '.join(row['archs'])} in {row['seconds']} s{cutlass}"
    return _built(book, row | {"line": line}, 0)


def _built(book: Book, row: dict[str, Any], status: int) -> int:
    book.add("build", "resnet_fast._C", row)
    print(f"  {row['line']}", flush=True)
    return status


def _native_build(checkout: Path) -> Any:
    """csrc/native_build.py as a module."""
    spec = importlib.util.spec_from_file_location("native_build", checkout / "csrc" / "native_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# --- is it right


def smoke(
    folder: Path, deadline: Deadline, device: str = "cuda", workers: int | None = None, backend: str = "auto"
) -> int:
    """Every op at small shapes and every precision by the error rule, with memory full of NaN before each.

    Most of its time goes to compiling, so ``workers`` processes share it; with 1 it all happens in this one. With a
    ``backend`` of "cuda" only what its kernels compute, and there a fallback is wrong. ``CUT_OFF`` is returned where
    cases are left over.
    """
    book, wrong = Book(folder, "correctness", ("ops", "models")), 0
    items = [
        (precision, index, device, backend)
        for precision in PRECISIONS
        for index, make in enumerate(ops.small(precision, device))
        if backend == "auto" or _cuda_computes(make.func, precision)  # type: ignore[attr-defined]
    ]
    if backend == "auto":
        book.data["asked"] = {precision: sum(item[0] == precision for item in items) for precision in PRECISIONS}
        book.save()
    with _mapped(_smoke_one, items, workers or _workers(len(items)), _smoke_lost) as rows:
        for done, (title, row) in enumerate(rows, 1):
            wrong += not row["passed"]
            book.add("ops", title, row)
            text = row["reason"] or f"{row['error']:.1e} of {row['allowed']:.1e}"
            print(f"  {'right' if row['passed'] else 'WRONG'} {title}: {text}", flush=True)
            if deadline.left <= 0 and done < len(items):
                print("  the rest: out of time", flush=True)
                return int(wrong > 0) or CUT_OFF
    return int(wrong > 0)


def _cuda_computes(op: Callable[..., Any], precision: str) -> bool:
    """Whether CUDA's kernels compute what ``ops`` makes by this function; products of float32 only in ``head``."""
    without = (ops.conv_bn_act, ops.stem) if precision == "fp32" else ()
    return op.__name__ in backends.cuda.OPS and op not in without


def smoke_alone(folder: Path, deadline: Deadline) -> int:
    """The same in one process, for a tool that watches it."""
    return smoke(folder, deadline, workers=1)


def cuda_alone(folder: Path, deadline: Deadline) -> int:
    """The same by the CUDA kernels."""
    reason = backends.available()["cuda"]
    if reason:
        print(f"  not run: {reason}", flush=True)
        return 0
    return smoke(folder, deadline, workers=1, backend="cuda")


def _smoke_one(item: tuple[str, int, str, str]) -> tuple[str, dict[str, Any]]:
    precision, index, device, backend = item
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings(), torch.no_grad(), tf32(precision == "tf32"), backends.use(backend):
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            case, before = ops.small(precision, device)[index](), backends.fallbacks()
            try:
                error, allowed, reason = case.judge("op")
                if backend != "auto" and backends.fallbacks() != before:
                    reason = reason or "something slower ran than was asked for"
            except Exception as failure:  # one kernel's failure must not hide the others' results
                error, allowed, reason = float("inf"), 0.0, _one_line(failure)
        return case.title if backend == "auto" else f"{case.title} by {backend}", {
            "precision": precision,
            "error": error,
            "allowed": allowed,
            "passed": not reason,
            "reason": reason,
        }
    finally:
        torch.use_deterministic_algorithms(False)


def _smoke_lost(item: tuple[str, int, str, str], reason: str) -> tuple[str, dict[str, Any]]:
    precision, index, _, _ = item
    with torch.no_grad():
        title = ops.small(precision, "meta")[index]().title
    return title, {"precision": precision, "error": float("inf"), "allowed": 0.0, "passed": False, "reason": reason}


def permitted(cases: Iterable[Any]) -> list[Any]:
    """The cases whose precision may be timed: all of them, or those of the precisions that smoke found right."""
    names = os.environ.get(PERMITTED)
    return [case for case in cases if names is None or case.precision in names.split(",")]


def _workers(items: int) -> int:
    return max(1, min(8, (os.cpu_count() or 2) // 2, items))


@contextmanager
def _mapped(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int, lost: Callable[[Any, str], Any]
) -> Iterator[Iterator[Any]]:
    """What ``function`` makes of the items, in any order as they are done, by that many processes.

    A process that dies gives ``lost(item, reason)``; it is replaced, as is one that a faulting kernel has cost its GPU.
    """
    if workers == 1:
        yield map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    running: dict[int, Any] = {}
    for item in items:
        waiting.put(item)

    def serve(number: int) -> None:
        usable, connection = False, None
        with suppress(queue.Empty):
            while True:
                item = waiting.get_nowait()
                if not usable:
                    connection, theirs = context.Pipe()
                    running[number] = context.Process(target=_serve, args=(function, theirs), daemon=True)
                    running[number].start()
                    theirs.close()
                assert connection is not None
                try:
                    connection.send(item)
                    result, usable = connection.recv()
                except (EOFError, OSError):
                    running[number].join()
                    usable, status = False, running[number].exitcode
                    result = lost(item, f"its process ended with exit status {status}")
                done.put(result)

    threads = [threading.Thread(target=serve, args=(number,), daemon=True) for number in range(workers)]
    for thread in threads:
        thread.start()
    try:
        yield (done.get() for _ in items)
    finally:
        with suppress(queue.Empty):
            while True:
                waiting.get_nowait()
        for process in list(running.values()):
            process.terminate()


def _serve(function: Callable[[Any], Any], connection: Any) -> None:
    """Items in, results out, and whether this process still has its GPU; until it has not."""
    usable = True
    while usable:
        try:
            item = connection.recv()
        except EOFError:
            return
        result = function(item)
        try:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        except RuntimeError:
            usable = False
        connection.send((result, usable))


def accuracy(folder: Path, deadline: Deadline, device: str = "cuda", image_size: int = 224, batch: int = 128) -> int:
    """Relative error of whole networks, ours and plain torch's at the same precision, against float64: of the first
    and last two images of a batch of the size that is timed later."""
    book, wrong = Book(folder, "correctness", ("ops", "models")), 0
    picked = sorted({0, 1, batch - 2, batch - 1})
    for arch, precision in deadline.each(ACCURACY):
        model, dtype = _model(arch, image_size), DTYPES[precision]
        images = seeded_batches((batch, 3, image_size, image_size), 1, seed=7)[0].to(device, dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), tf32(precision == "tf32"):
            exact = plain(model).to(device).double()(images[picked].double()).cpu()
            same = plain(model).to(device, dtype).to(memory_format=torch.channels_last)(images)[picked].cpu()
            try:
                answer = cuda.PEERS["optimize"].build(cuda.Task(model, images, dtype))(images)[picked]
                row = judge(answer.float(), same, exact, dtype).as_dict()
            except Exception as failure:
                row = {"passed": False, "reason": _one_line(failure), "error": None, "allowed": None}
        row["torch"] = float((same.double() - exact).norm() / exact.norm())
        wrong += not row["passed"]
        book.add("models", f"{arch} {precision}", {"image_size": image_size, "batch": batch, **row})
        print(f"  {arch} {precision}: ours {row['error']}, torch {row['torch']:.2e} {row['reason']}", flush=True)
        gc.collect()
    return int(wrong > 0)


def tests(folder: Path, deadline: Deadline) -> int:
    """pytest on the kernels' tests, on the GPU, and on whatever else is marked for one."""
    kernels, _, marked = gpu_tests(Path("tests"))
    return _tests(folder, deadline, {"kernels": kernels, "marked gpu": ["-m", "gpu", *marked]})


def cuda_kernels(folder: Path, deadline: Deadline) -> int:
    """The CUDA kernels where ``_C`` is built: every op against float64 at small shapes, then their tests.

    ``CUT_OFF`` is returned where ops are left over; of the tests those count that there was time for.
    """
    reason = backends.available()["cuda"]
    if reason:
        print(f"  not run: {reason}", flush=True)
        return 0
    status = smoke(folder, Deadline(deadline.left / 2), workers=1, backend="cuda")
    return _tests(folder, deadline, {"cuda": gpu_tests(Path("tests"))[1]}) or status


def _tests(folder: Path, deadline: Deadline, runs: dict[str, list[str]]) -> int:
    book = Book(folder, "tests", ("pytest", "sanitizer"))
    failed = 0
    for name, arguments in runs.items():
        if not any(argument.endswith(".py") for argument in arguments):
            continue
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "--maxfail=25"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(8, max(1, (os.cpu_count() or 2) // 2)))]
        counts, output, status = _pytest([*command, *arguments], deadline)
        failed += counts.get("FAILED", 0) + counts.get("ERROR", 0) + (status not in (0, 5, None))
        ended = "out of time" if status is None else f"exit status {status}"
        book.add("pytest", name, {"counts": counts, "ended": ended, "tail": output[-4000:]})
        print(f"  {name}: {counts} ({ended})", flush=True)
        if counts.get("FAILED") or counts.get("ERROR") or status not in (0, 5, None):
            print(output[-3000:], flush=True)
    return int(failed > 0)


def gpu_tests(root: Path) -> tuple[list[str], list[str], list[str]]:
    """The test files of Triton's kernels, by name or by what they import; of CUDA's; and the others in which something
    is marked for a GPU."""

    def says(path: Path, pattern: str) -> bool:
        return re.search(pattern, path.read_text(encoding="utf-8")) is not None

    named, cudas = set(root.glob("test_triton_*.py")), set(root.glob("test_cuda_*.py"))
    imports = r"(?m)^from \.triton_device import"
    every = [path for path in sorted(root.glob("test_*.py")) if path not in cudas]
    kernels = [path for path in every if path in named or says(path, imports)]
    native = [path for path in sorted(root.glob("test_cuda_*.py")) if says(path, r"from \.cuda_device import")]
    others = [path for path in sorted(root.glob("test_*.py")) if path not in (*kernels, *native)]
    marked = [path for path in others if says(path, r"mark\.gpu\b")]
    return [str(path) for path in kernels], [str(path) for path in native], [str(path) for path in marked]


def _pytest(command: list[str], deadline: Deadline) -> tuple[dict[str, int], str, int | None]:
    """Outcomes counted line by line, so that what was cut off still counts; status None if it was."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=max(1.0, deadline.left - 3))
            status: int | None = process.returncode
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                output, _ = process.communicate(timeout=2)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
            status = None
    return outcomes(output), output, status


def outcomes(output: str) -> dict[str, int]:
    """How many tests passed, failed, ... in the output of ``pytest -v``, with or without xdist."""
    counts: dict[str, int] = {}
    for line in output.splitlines():
        match = re.match(
            r"(?:\[gw\d+\] \[ *\d+%\] (\w+) \S+::|\S+::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b)", line
        )
        if match:
            word = match[1] or match[2]
            counts[word] = counts.get(word, 0) + 1
    return counts


def sanitizer(folder: Path, deadline: Deadline) -> int:
    """compute-sanitizer on the ops at small shapes, those of the CUDA kernels first: memcheck and racecheck, for the
    CUDA kernels synccheck too; then memcheck on the kernels' tests."""
    book = Book(folder, "tests", ("pytest", "sanitizer"))
    program, failed = shutil.which("compute-sanitizer"), 0
    if program is None:
        print("  compute-sanitizer is not installed", flush=True)
        return 0
    # Without torch's pool every tensor is an allocation of its own, and its bounds are seen.
    surroundings = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    scratch = Path("sanitizer")

    def stage(name: str) -> list[str]:
        return ["-m", "benchmarks.gpu_stages", name, "--results", str(scratch), "--seconds", "100000"]

    triton_tests, cuda_tests, _ = gpu_tests(Path("tests"))
    built = not backends.available()["cuda"]
    runs = [(tool, "CUDA ops at small shapes", stage("cuda_alone")) for tool in ("memcheck", "racecheck", "synccheck")]
    runs = runs if built else []
    runs += [(tool, "ops at small shapes", stage("smoke_alone")) for tool in ("memcheck", "racecheck")]
    runs += [
        ("memcheck", path, ["-m", "pytest", "-q", "-p", "no:cacheprovider", path])
        for path in (*(cuda_tests if built else ()), *triton_tests)
    ]
    for tool, what, arguments in deadline.each(runs):
        command = [program, "--tool", tool, "--target-processes", "all", "--error-exitcode", "9", sys.executable]
        try:
            done = subprocess.run(
                [*command, *arguments], env=surroundings, capture_output=True, text=True,
                timeout=max(1.0, deadline.left - 3),
            )  # fmt: skip
            output, status = done.stdout + done.stderr, str(done.returncode)
        except subprocess.TimeoutExpired as error:
            output, status = (error.stdout or b"").decode(errors="replace"), "out of time"
        found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", output)
        errors = sum(int(a or b) for a, b in found) if found else None
        clean = errors == 0 and status == "0"
        failed += bool(errors)
        book.add(
            "sanitizer", f"{tool} {what}", {"errors": errors, "status": status, "clean": clean, "tail": output[-3000:]}
        )
        print(f"  {tool}, {what}: {'clean' if clean else f'errors {errors}, status {status}'}", flush=True)
    return int(failed > 0)


# --- how fast


def warm(folder: Path, deadline: Deadline) -> int:
    """Compiles in parallel what the later stages will run, by running each network once; nothing is kept but caches."""
    others = [Case(arch, precision, 128) for arch, precision in ACCURACY]
    cases = permitted([*FIRST, *(case for case in others if case not in FIRST)])
    with _mapped(_warm_one, cases, _workers(len(cases)), lambda case, reason: (case.name, reason)) as done:
        for name, reason in done:
            print(f"  {name} {reason or 'compiled'}", flush=True)
    return 0


def _warm_one(case: Case) -> tuple[str, str]:
    try:
        dtype = DTYPES[case.precision]
        with torch.no_grad(), tf32(case.precision == "tf32"):
            batch = torch.zeros(case.batch, 3, case.image_size, case.image_size, device="cuda", dtype=dtype)
            batch = batch.contiguous(memory_format=torch.channels_last)
            cuda.PEERS["optimize"].build(cuda.Task(_model(case.arch), batch, dtype))(batch)
            torch.cuda.synchronize()
        return case.name, ""
    except Exception as error:
        return case.name, _one_line(error)
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def models(folder: Path, deadline: Deadline) -> int:
    """ResNet-50 in float16 at every batch size, against torch eager."""
    return _models(folder, deadline, FIRST, ("optimize", "recorded", "live", "eager"))


def compiled(folder: Path, deadline: Deadline) -> int:
    """The same against torch.compile max-autotune, as far as its compile times let it."""
    return _models(folder, deadline, FIRST, ("optimize", "eager", "compile"))


def networks(folder: Path, deadline: Deadline) -> int:
    """The other networks and precisions, against torch eager."""
    return _models(folder, deadline, OTHERS, ("optimize", "eager"))


def jax(folder: Path, deadline: Deadline) -> int:
    """ResNet-50 in float16 against JAX/XLA, in a process of its own: two copies of cuDNN may not get on."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return _models(folder, deadline, FIRST, ("optimize", "eager", "jax"))


def cudnn(folder: Path, deadline: Deadline) -> int:
    """ResNet-50 in float16 against cuDNN's graph API, where its Python package is."""
    return _models(folder, deadline, FIRST, ("optimize", "eager", "cudnn"))


def _models(folder: Path, deadline: Deadline, cases: Iterable[Case], names: tuple[str, ...]) -> int:
    missing = [cuda.PEERS[name].missing() for name in names if cuda.PEERS[name].missing()]
    if missing:
        print(f"  nothing to compare with: {'; '.join(missing)}", flush=True)
        return 0
    wrong = 0
    for case in deadline.each(permitted(cases)):
        wrong += not measure_case(folder, case, names)
    return int(wrong > 0)


def measure_case(
    folder: Path, case: Case, names: tuple[str, ...], *, seconds: float = 1.5, device: Device | None = None
) -> bool:
    """Measures one case into ``models.json``, prints a line, and says whether our own answer was right.

    What is in the file already about contestants that take no part this time stays, marked by its own time.
    """
    book = Book(folder, "models", ("cases",))
    try:
        row = cuda.compare(case, _model(case.arch, case.image_size), names=names, device=device, seconds=seconds)
    except Exception as error:
        book.add("cases", case.name, {"setting": dataclasses.asdict(case), "failed": _one_line(error)})
        print(f"  {case.name}: FAILED {_one_line(error)}", flush=True)
        return False
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    earlier = book.data["cases"].get(case.name, {})
    for name, old in earlier.get("contestants", {}).items():
        if name not in row["contestants"]:
            row["contestants"][name] = {"time": earlier["time"], **old}
            if name in earlier["against"]:
                row["against"][name] = earlier["against"][name]
    book.add("cases", case.name, row)
    print(f"  {case.name}: {case_line(row)}", flush=True)
    return True


def case_line(row: dict[str, Any]) -> str:
    """``optimize 51234 img/s, eager 20123 (2.55x)``: each contestant's faster way, and how many times faster we are."""
    parts = []
    for name, found in row["contestants"].items():
        rates = [
            found[mode]["images_per_second"] for mode in ("call", "graph") if "images_per_second" in found.get(mode, {})
        ]
        if rates:
            ratio = row["against"].get(name, {}).get("best", {}).get("p50")
            parts.append(f"{name} {max(rates):.0f} img/s" + (f" ({ratio:.2f}x)" if ratio else ""))
        else:
            parts.append(f"{name}: {found['call'].get('reason')}")
    return ", ".join(parts)


_models_made: dict[tuple[str, int], nn.Module] = {}


def _model(arch: str, image_size: int = 224) -> nn.Module:
    """A seeded network, made once in a process."""
    key = (arch, image_size)
    if key not in _models_made:
        _models_made[key] = fresh_model(arch, image_size=image_size)
    return _models_made[key]


def kernels(folder: Path, deadline: Deadline, device: Device | None = None) -> int:
    """Each op at ResNet-50's shapes beside its floor, from the copy bandwidth and matrix rates measured here."""
    from resnet_fast.backends import triton

    place = device if device is not None else Device()
    book = Book(folder, "ops", ("ceilings", "rows"))
    gpu = triton.gpu_of(torch.device(place.name, 0) if place.name == "cuda" else torch.device(place.name))
    ceilings = measure_ceilings(place)
    for name, row in ceilings.items():
        book.add("ceilings", name, row)
    limits = dataclasses.replace(
        gpu, bandwidth=ceilings["copy"]["per_second"],
        flops={precision: ceilings[precision]["per_second"] for precision in PRECISIONS},
    )  # fmt: skip
    wanted = [(p, 128) for p in PRECISIONS[:1]] + [("fp16", 1), ("fp16", 32)] + [(p, 128) for p in PRECISIONS[1:]]
    wrong, wanted = 0, permitted(Case("resnet50", *pair) for pair in wanted)
    cases = ((make, case.precision) for case in wanted for make in ops.full(case.precision, case.batch, place.name))
    for make, precision in deadline.each(cases):
        with tf32(precision == "tf32"), torch.no_grad():
            wrong += not measure_op(book, make(), limits, place)
    return int(wrong > 0)


def measure_ceilings(device: Device, size: int = 1 << 28, edge: int = 8192) -> dict[str, dict[str, float]]:
    """Bytes a large copy moves in a second (read and written), and what a large product of random matrices computes."""

    def timed(call: Callable[[int], object]) -> list[list[float]]:
        return cuda.turns({"it": call}, device, seconds=0.3)["it"]

    source = torch.randn(size, device=device.name)
    found = {"copy": timed(functools.partial(_copy, torch.empty_like(source), source))}
    work = {"copy": 2.0 * source.numel() * source.element_size()}
    del source
    for precision in PRECISIONS:
        edge_now = edge if precision != "fp32" else edge // 2
        with tf32(precision == "tf32"):
            a, b = (torch.randn(edge_now, edge_now, device=device.name).to(DTYPES[precision]) for _ in range(2))
            found[precision] = timed(functools.partial(_multiply, a, b))
        work[precision] = 2.0 * edge_now**3
    return {
        name: {"per_second": work[name] / summarize(flatten(rounds)).p50, "work": work[name]}
        for name, rounds in found.items()
    }


def _copy(target: Tensor, source: Tensor, number: int) -> None:
    target.copy_(source)


def _multiply(a: Tensor, b: Tensor, number: int) -> Tensor:
    return a @ b


def measure_op(book: Book, case: ops.OpCase, limits: Any, device: Device, *, seconds: float = 0.3) -> bool:
    """Judges and times one op case against plain torch, replaying graphs, into ``book``. Whether it was right."""
    row: dict[str, Any] = {"op": case.op, "case": case.name, "precision": case.precision, "batch": case.batch}
    try:
        error, allowed, reason = case.judge("op")
        row |= {"error": error, "allowed": allowed, "passed": not reason, "reason": reason}
        if not reason:
            row |= time_op(case, limits, device, seconds=seconds)
    except Exception as failure:
        row |= {"passed": False, "reason": _one_line(failure)}
    book.add("rows", case.title, row)
    text = (
        f"{1e6 * row['seconds']['p50']:.1f} us, {100 * row['share']:.0f} % of its floor"
        if row["passed"]
        else row["reason"]
    )
    print(f"  {case.title}: {text}", flush=True)
    gc.collect()
    return bool(row["passed"])


def time_op(case: ops.OpCase, limits: Any, device: Device, *, seconds: float) -> dict[str, Any]:
    """Seconds of the op and of plain torch by graph replay, inputs rotating past the level-2 cache, and the share of
    the floor."""
    calls: dict[str, Callable[[int], object]] = {}
    count = 1
    for who in ("op", "plain"):
        every, count = case.rotation(who, limits.l2)
        replay, _ = device.capture(every)
        calls[who] = lambda number, replay=replay: replay()
    samples = {
        who: [[one / count for one in turn] for turn in rounds]
        for who, rounds in cuda.turns(calls, device, seconds=seconds, turn=0.005).items()
    }
    taken = {who: summarize(flatten(rounds)) for who, rounds in samples.items()}
    floor = case.work.floor(limits, case.precision)
    bytes_seconds = case.work.bytes / limits.bandwidth
    return {
        "seconds": taken["op"].as_dict(),
        "plain_seconds": taken["plain"].as_dict(),
        "against_plain": paired_ratio(samples["op"], samples["plain"]).as_dict(),
        "floor_seconds": floor,
        "bound": "bytes" if bytes_seconds >= floor else "math",
        "share": floor / taken["op"].p50,
        "bytes": case.work.bytes,
        "flops": case.work.flops,
        "input_sets": count,
    }


def tune(folder: Path, deadline: Deadline) -> int:
    """Sweeps the launch choices of ResNet-50 in float16, batch by batch, into a table beside the results: Triton's of
    all batches, then, in a quarter of the time, CUDA's, so that a CUDA kernel which faults costs only CUDA's. Of both a
    third is for what only training runs, in bfloat16."""
    from resnet_fast.backends import triton
    from resnet_fast.kernels import _tables
    from resnet_fast.tuning import ops as adapters
    from resnet_fast.tuning import sweep
    from resnet_fast.tuning.cuda import CudaRunner, versions

    device = torch.device("cuda", 0)
    gpu = triton.gpu_of(device)
    path = _tables.user_folder() / f"{gpu.name}.json"

    def batches(time: Deadline, native: bool) -> None:
        inference = Deadline((1 - TRAININGS_SHARE) * time.left)
        training_too = [(case, True) for case in permitted(TRAINED[:1])]
        for case, training in (*((case, False) for case in permitted(FIRST)), *training_too):
            left = time.left if training else inference.left
            wanted = [found for found in tunable(case, gpu, training) if adapters.is_cuda(found) == native]
            if wanted and left >= 10:
                sweep.sweep(
                    wanted, gpu, runner, path, measured_with=versions(device), seconds=left - 5, finished=_tuned
                )

    without = without_cuda()
    with CudaRunner(gpu, device) as runner:
        batches(deadline if without else Deadline(sweep.TRITONS_SHARE * deadline.left), native=False)
        if without:
            print(f"  without the CUDA kernels: {without}", flush=True)
            return 0
        return _cuda_pass(lambda: batches(deadline, native=True))


def without_cuda() -> str:
    """Why this stage must not launch the CUDA kernels, or cannot; "" if it may."""
    return os.environ.get(WITHOUT_CUDA, "") or backends.available()["cuda"]


def _cuda_pass(measure: Callable[[], None]) -> int:
    """``measure``, what a stage does last; a fault, after which this process has no GPU any more, is said, and 1."""
    try:
        measure()
    except RuntimeError as failure:
        print(f"  the CUDA kernels: FAILED {_one_line(failure)}; all else is measured and kept", flush=True)
        return 1
    return 0


def tunable(case: Case | bench_training.Case, gpu: Any, training: bool = False) -> list[Any]:
    """The launches of a network that no table in force has a choice for, of Triton's kernels and of CUDA's; with
    ``training`` those that only training runs."""
    from resnet_fast.kernels import _tables
    from resnet_fast.tuning import ops as adapters
    from resnet_fast.tuning import shapes

    every = shapes.problems([case.arch], [case.batch], [case.precision], gpu=gpu, training=training)
    cases = adapters.with_cuda([found for found in every if (found.op in shapes.TRAINING) == training], gpu)
    return [found for found in cases if _tables.lookup(found.op, found.problem.key(), gpu.name) is None]


def _tuned(outcome: Any) -> None:
    seconds = (
        f"{1e6 * outcome.seconds:.1f} us, floor {1e6 * outcome.floor:.1f} us" if outcome.config else "nothing runs"
    )
    refused = f", {len(outcome.refused)} refused" if outcome.refused else ""
    cut = "" if outcome.finished else " (cut off)"
    print(
        f"  {outcome.case.op} {outcome.case.problem.key()}: {seconds}, {outcome.tried} tried{refused}{cut}", flush=True
    )


def training(folder: Path, deadline: Deadline) -> int:
    """Training steps of ResNet-50 in bf16: images a second and peak memory. What is compiled comes last, for its time:
    a case that is cut off loses what it has measured."""
    cases = permitted(TRAINED)
    rounds = [(case, ("eager", "ours", "lean")) for case in cases]
    rounds += [(case, ("eager", "ours", name)) for name in ("compile", "ours_compile") for case in cases]
    wrong = 0
    for case, names in deadline.each(rounds):
        wrong += not measure_training(folder, case, names)
    return int(wrong > 0)


def measure_training(
    folder: Path, case: bench_training.Case, names: tuple[str, ...], *, device: str = "cuda", seconds: float = 4.0
) -> bool:
    """Measures one case into ``training.json``, prints a line, and says whether our own gradients were right.

    What is in the file already about contestants that take no part this time stays, marked by its own time.
    """
    book = Book(folder, "training", ("cases",))
    earlier = book.data["cases"].get(case.name, {})
    try:
        row = bench_training.measure(case, device=device, names=names, seconds=seconds)
    except Exception as error:
        failed = {"setting": dataclasses.asdict(case), "failed": _one_line(error)}
        book.add("cases", case.name, earlier | failed)
        print(f"  {case.name}: FAILED {_one_line(error)}", flush=True)
        return False
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(f"  {case.name}: {training_line(row)}", flush=True)
    right = all(found["status"] == "timed" for found in row["contestants"].values() if found["ours"])
    for name, old in earlier.get("contestants", {}).items():
        if name not in row["contestants"]:
            row["contestants"][name] = {"time": earlier["time"], **old}
            if name in earlier["against"]:
                row["against"][name] = earlier["against"][name]
    for name, ratios in row["against"].items():
        row["against"][name] = earlier.get("against", {}).get(name, {}) | ratios
    book.add("cases", case.name, row)
    return right


def layers(folder: Path, deadline: Deadline) -> int:
    """Every layer of ResNet-50 in float16, and every BatchNorm of its training in bfloat16: the floor, and what Triton,
    CUDA and cuDNN take, beside each other.

    CUDA's kernels come behind all else, in a third of the time: one that faults costs only what is left of its column.
    """
    from resnet_fast.backends import triton
    from resnet_fast.tuning import shapes
    from resnet_fast.tuning.cuda import CudaRunner

    book, device = Book(folder, "layers", ("rows",)), torch.device("cuda", 0)
    gpu, without, wrong = triton.gpu_of(device), without_cuda(), 0
    measured: list[tuple[Any, dict[str, Any]]] = []

    def add(problem: Any, row: dict[str, Any]) -> None:
        book.add("rows", str(problem), row)
        results.write_text(folder / "layers.md", gpu_layers.table(book.data))
        print(f"  {problem}: {gpu_layers.line(row)}", flush=True)

    def natives() -> None:
        nonlocal wrong
        for problem, row in deadline.each(measured):
            row["times"]["cuda"] = {"wrong": "the GPU failed"}  # unless there is more to say
            try:
                row["times"]["cuda"] = gpu_layers.measure_cuda(problem, gpu, runner)
            finally:
                wrong += "wrong" in row["times"]["cuda"]
                add(problem, row)

    with CudaRunner(gpu, device) as runner:

        def found(case: Case | bench_training.Case, training: bool = False) -> tuple[Any, ...]:
            return shapes.problems([case.arch], [case.batch], [case.precision], training=training)

        problems: Iterator[tuple[int | str, Any]] = itertools.chain(
            ((case.batch, problem) for case in permitted(FIRST[:1]) for problem in gpu_layers.contested(found(case))),
            (
                (f"{case.batch}, training", pair)
                for case in permitted(TRAINED[:1])
                for pair in gpu_layers.pairs(found(case, True), case.batch)
            ),
            ((case.batch, problem) for case in permitted(FIRST[1:]) for problem in gpu_layers.contested(found(case))),
        )
        first = deadline if without else Deadline(2 / 3 * deadline.left)
        for batch, problem in first.each(problems):
            row = {
                "batch": batch,
                **gpu_layers.measure(problem, gpu, runner, without_cuda=without or "not measured"),
            }
            wrong += "wrong" in row["times"]["triton"]
            measured.append((problem, row))
            add(problem, row)
        if without:
            print(f"  without the CUDA kernels: {without}", flush=True)
        else:
            wrong += _cuda_pass(natives)
    return int(wrong > 0)


# --- without a GPU


class FakeDriver:
    """Stands where Triton's CUDA driver would, so that kernels compile for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def is_active(self) -> bool:
        return True


class _Reroute(TorchDispatchMode):
    """Sends the package's ops to their Triton code, on tensors without data."""

    def __init__(self) -> None:
        super().__init__()
        self.without: set[str] = set()
        self.refused: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "resnet_fast":
            name = function._opname
            if importlib.util.find_spec(f"resnet_fast.ops.{name}") is None:  # one of the steps of batch_norm_act
                return function(*args, **(kwargs or {}))
            module = importlib.import_module(f"resnet_fast.ops.{name}")
            if hasattr(module, "run_kernel"):
                result = module.run_kernel("triton", *args)
                if result is not None:
                    return result
                self.refused[name] = self.refused.get(name, 0) + 1
            else:
                self.without.add(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def _recorded_launches() -> Iterator[list[Any]]:
    """Launches are collected instead of launched."""
    launch = importlib.import_module("resnet_fast.kernels._launch").Launch
    before, found = launch.__call__, []
    launch.__call__ = lambda self: found.append(self)
    try:
        yield found
    finally:
        launch.__call__ = before


def rehearse(folder: Path, deadline: Deadline) -> int:
    """Everything up to the first launch: result files, models and their plans, every launch of the op cases, and some
    of them compiled for compute capability 9.0."""
    from triton.runtime import driver

    build = _native_build(Path(os.environ["RESNET_FAST_CHECKOUT"]))
    print(f"  to build _C: nvcc {build.find_nvcc()}, CUTLASS {build.find_cutlass()}", flush=True)
    for name, sections in (("correctness", ("ops", "models")), ("tests", ("pytest", "sanitizer")),
                           ("models", ("cases",)), ("ops", ("ceilings", "rows")), ("native", ("build",)),
                           ("layers", ("rows",)), ("training", ("cases",))):  # fmt: skip
        Book(folder, name, sections)
    warnings.simplefilter("ignore")
    driver.set_active(FakeDriver(90))
    reroute = _Reroute()
    with torch.no_grad(), _recorded_launches() as launches, reroute:
        for precision in PRECISIONS:
            with tf32(precision == "tf32"):
                for make in (*ops.small(precision, "meta"), *ops.full(precision, 128, "meta")):
                    case = make()
                    case.contestants["op"](*case.data(0))
    kinds: dict[str, Any] = {}
    for launch in launches:
        kinds.setdefault(f"{launch.kernel.__module__}.{launch.kernel.__name__}", launch)
    print(f"  {len(launches)} launches built, of {len(kinds)} kernels", flush=True)
    for name, count in reroute.refused.items():
        print(f"  {name}: its kernel has no tile for {count} of the cases", flush=True)
    if reroute.without:
        print(f"  without Triton code: {', '.join(sorted(reroute.without))}", flush=True)
    for name, launch in deadline.each(kinds.items()):
        made = launch.compile()
        print(f"  compiled {name} for sm_90: {made.metadata.shared} bytes of shared memory", flush=True)
    from resnet_fast.graph import optimize
    from resnet_fast.kernels import gpus
    from resnet_fast.models import get_model
    from resnet_fast.tuning import compiler
    from resnet_fast.tuning import ops as adapters

    def heuristic(case: Any, gpu: Any) -> Any:
        return adapters.get(case.op).kernel.heuristic(case.problem, gpu)

    print(f"  {len(tunable(FIRST[0], gpus.known('h100')))} launches of {FIRST[0].name} to tune", flush=True)
    trained = tunable(TRAINED[0], gpus.known("h100"), training=True)
    made = [part for case in trained for part in compiler.launches(case, heuristic(case, gpus.known("h100")))]
    print(f"  {len(trained)} problems of {TRAINED[0].name} to tune, {len(made)} launches built", flush=True)
    for arch in deadline.each(("resnet50", "resnet18", "resnet152")):
        model = get_model(arch).eval()
        planned = optimize(
            model, dtype=torch.float16, gpu="h100", example_inputs=torch.empty(128, 3, 224, 224, device="meta")
        )
        counts: dict[str, int] = {}
        for node in planned.graph_module.graph.nodes:
            if node.op == "call_module":
                op = getattr(planned.graph_module.get_submodule(str(node.target)), "op", "other")
                counts[op] = counts.get(op, 0) + 1
        each = planned.report().bytes_per_image
        print(
            f"  {arch} fp16 batch 128, planned for an h100: {counts}, {each / 1e6 if each else 0:.1f} MB per image",
            flush=True,
        )
    return 0


STAGES: dict[str, Callable[[Path, Deadline], int]] = {"cuda": cuda_kernels} | {
    stage.__name__: stage
    for stage in (
        native,
        smoke,
        smoke_alone,
        cuda_alone,
        tests,
        accuracy,
        warm,
        models,
        compiled,
        networks,
        jax,
        cudnn,
        kernels,
        tune,
        training,
        layers,
        sanitizer,
        rehearse,
    )
}


def _one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_stages", description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--results", type=Path, required=True, help="folder of the result files")
    parser.add_argument("--seconds", type=float, required=True, help="time to be done in")
    given = parser.parse_args()
    return STAGES[given.stage](given.results, Deadline(given.seconds))


if __name__ == "__main__":
    sys.exit(main())
