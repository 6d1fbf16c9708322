"""``make gpu`` without a GPU: budgets, stages, result files, the harness on a CPU in a GPU's place, and its report."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bench_training, environment, gpu, gpu_layers, gpu_stages, ops, report
from benchmarks.gpu import Outcome, Run, Stage
from resnet_fast import backends
from resnet_fast.backends import cuda as native
from resnet_fast.backends import triton
from resnet_fast.benchmarking import cuda, results, timing
from resnet_fast.benchmarking.compare import fresh_model
from resnet_fast.benchmarking.cuda import Case, Device, Peer
from resnet_fast.kernels import _tables, gpus
from resnet_fast.tuning import cuda as tuning
from resnet_fast.tuning import ops as adapters
from resnet_fast.tuning import shapes, sweep
from tests.cuda_device import installed

ROOT = Path(__file__).resolve().parents[2]
NO_GPU: dict[str, Any] = {
    "gpus": [], "nvcc": "", "python": "3", "cpu": "a cpu", "cores": 2, "versions": {}, "commit": "0123456789ab"
}  # fmt: skip


def recorded_on_cpu(run: Callable[[], Tensor]) -> cuda.Captured:
    """What a CUDA graph does, on a CPU: one static output that every replay fills."""
    output = run().clone()
    return lambda: output.copy_(run()), output


CPU = Device("cpu", lambda: None, recorded_on_cpu)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return fresh_model("resnet18", image_size=64)


# --- the whole thing


@pytest.mark.slow
def test_dry_run_does_everything_up_to_the_first_launch(tmp_path: Path) -> None:
    """As on a machine where nothing is installed: the package comes from the overlay alone."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RESNET_FAST_COMMIT")}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path)]
    environment = clean | {"OMP_NUM_THREADS": "1", "RESNET_FAST_COMMIT": "fedcba987654"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "gpu-dry-run"
    written = {path.stem: results.read(path) for path in folder.glob("*.json")}
    assert set(written) == {"environment", "correctness", "tests", "models", "ops", "native", "layers", "training"}
    assert {data["kind"] for data in written.values()} == {f"gpu-{name}" for name in written}
    assert written["models"]["machine"]["commit"] == "fedcba987654"
    stages = written["environment"]["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(
        ("import", "collect", "rehearse"), "done"
    )
    assert "overlay-" in stages["import"]["tail"]  # not the package that the tests themselves run on
    rehearsed = stages["rehearse"]["tail"]
    assert "compiled resnet_fast.kernels.conv_bn_act._boxes for sm_90" in rehearsed
    assert "  to build _C: nvcc " in rehearsed
    assert "of training-resnet50-bf16-b128 to tune" in rehearsed
    assert "'bottleneck_tail': 16" in rehearsed and "MB per image" in rehearsed
    for stage in gpu.STAGES:
        assert stage.what in done.stdout


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert gpu.main() == 1
    assert "--dry-run" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["gpu", "--stages", "smoke,sing"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "'sing' is none of native, smoke, tests" in capsys.readouterr().err


def test_every_stage_exists_and_the_most_important_come_first() -> None:
    names = [stage.name for stage in gpu.STAGES]
    assert set(names) | {gpu.WARM.name, "rehearse", "smoke_alone", "cuda_alone"} == set(gpu_stages.STAGES)
    assert names[0] == "native" and names.index("cuda") < names.index("models")
    assert names.index("tune") < names.index("training") < names.index("layers")
    assert [case.name for case in gpu_stages.TRAINED] == [f"training-resnet50-bf16-b{batch}" for batch in (128, 256)]
    assert sum(stage.least for stage in gpu.STAGES) < 0.6
    assert names.index("smoke") < names.index("tests") < names.index("accuracy")
    assert all(not stage.timed for stage in gpu.STAGES[:3]) and names.index("accuracy") < names.index("models")
    assert gpu_stages.FIRST[0].name == "resnet50-fp16-b128"
    cases = {case.name for case in (*gpu_stages.FIRST, *gpu_stages.OTHERS)}
    assert len(cases) == 3 * 4 * 5 == len(gpu_stages.FIRST) + len(gpu_stages.OTHERS)


def test_a_gpus_folder_is_named_as_its_table_of_launches_is() -> None:
    assert gpu.slug(NO_GPU) == "none"
    assert gpu.slug({"gpus": [{"name": "NVIDIA H200"}]}) == gpus.normalise("NVIDIA H200") == "h200"


# --- budget and stages


def test_a_stage_gets_its_most_but_never_what_later_ones_need() -> None:
    first, second = Stage("a", "", 0.5, 0.1), Stage("b", "", 0.4, 0.3)
    assert gpu.limit(first, (second,), 100, 100) == 50
    assert gpu.limit(first, (second,), 100, 60) == 30
    assert gpu.limit(first, (second,), 100, 20) == 0
    assert gpu.limit(second, (), 100, 20) == 20


class Fake:
    """Stages that are lines of Python, for ``gpu.perform``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **code: str) -> None:
        monkeypatch.setattr(gpu, "command", lambda name, folder, seconds: [sys.executable, "-c", code.get(name, "")])
        monkeypatch.setattr(environment.shutil, "which", lambda name: None)
        self.folder = tmp_path
        self.run = Run(tmp_path, 30.0, NO_GPU)

    def perform(self, *stages: Stage) -> int:
        return gpu.perform(self.run, stages, self.folder, os.environ)

    def statuses(self) -> dict[str, str]:
        data = results.read(self.folder / "environment.json")
        return {name: stage["status"] for name, stage in data["stages"].items()}


SMOKE, TIMED = Stage("smoke", "", 0.5, 0.0), Stage("models", "", 0.5, 0.0, timed=True)


def test_stages_run_in_order_and_show_their_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(monkeypatch, tmp_path, smoke="print('  right'); print('noise')", models="print('  fast')")
    assert fake.perform(SMOKE, TIMED) == 0
    assert fake.statuses() == {"smoke": "done", "warm": "done", "models": "done"}
    shown = capfd.readouterr().out
    assert shown.index("  right") < shown.index("  fast") and "noise" not in shown
    assert "noise" in fake.run.outcomes["smoke"].tail


def test_wrong_answers_are_never_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = Fake(monkeypatch, tmp_path, smoke="raise SystemExit(1)", models="open('timed', 'w')")
    assert fake.perform(SMOKE, TIMED, Stage("sanitizer", "", 0.5, 0.0)) == 1
    assert fake.statuses() == {"smoke": "failed", "models": "skipped", "sanitizer": "done"}
    assert not (tmp_path / "timed").exists()


def judged(asked: dict[str, int], ended: str, *, time: str = "9", **passed: list[bool]) -> str:
    """Code of a stage smoke that leaves these verdicts."""
    rows = {
        f"{precision} {index}": {"precision": precision, "passed": one, "time": time}
        for precision, every in passed.items()
        for index, one in enumerate(every)
    }
    data = {"schema": results.SCHEMA, "kind": "gpu-correctness", "asked": asked, "ops": rows, "models": {}}
    return f"open('correctness.json', 'w').write({json.dumps(data)!r}); {ended}"


@pytest.mark.parametrize(
    ("code", "told", "reason"),
    [
        (judged({"fp16": 2, "tf32": 2}, "exit(1)", fp16=[True] * 2, tf32=[True, False]), "fp16", "tf32 (1 of 2 right)"),
        (judged({"fp16": 2, "bf16": 1}, "exit(1)", fp16=[False, True], bf16=[True]), "bf16", "fp16 (1 of 2 right)"),
        # It broke off: what it has not judged is not right. Out of time it has judged the most important.
        (judged({"fp16": 2, "bf16": 2, "tf32": 1}, "exit(2)", fp16=[True] * 2, bf16=[True]), "fp16",
         "bf16 (1 of 2 right), tf32 (0 of 1 right)"),
        (judged({"fp16": 2, "bf16": 2, "tf32": 1}, f"exit({gpu.CUT_OFF})", fp16=[True] * 2, bf16=[True]), "fp16,bf16",
         "tf32 (0 of 1 right)"),
        (judged({"fp16": 1}, "exit(1)", fp16=[False]), None, "fp16 (0 of 1 right)"),
        (judged({"fp16": 1}, "exit(1)", time="2", fp16=[True]), None, "fp16 (0 of 1 right)"),  # an earlier run's
        ("exit(0)", "unset", ""),
    ],
)  # fmt: skip
def test_a_wrong_precision_costs_no_other_its_times(
    code: str, told: str | None, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    show = f"import os; open('told', 'w').write(os.environ.get({gpu.PRECISIONS!r}, 'unset'))"
    fake = Fake(monkeypatch, tmp_path, smoke=code, models=show, warm="")
    assert fake.perform(SMOKE, TIMED) == int("exit(1)" in code or "exit(2)" in code)
    assert (tmp_path / "told").exists() == (told is not None)
    assert fake.statuses()["models"] == ("skipped" if told is None else "done")
    assert told is None or (tmp_path / "told").read_text() == told
    assert fake.run.outcomes["models"].reason == (f"not timed after smoke: {reason}" if reason else "")


def test_a_stage_times_the_precisions_it_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timed: list[str] = []
    monkeypatch.setattr(gpu_stages, "measure_case", lambda folder, case, names: timed.append(case.precision) or True)
    monkeypatch.setattr(
        gpu_stages, "measure_training", lambda folder, case, names: timed.append(case.precision) or True
    )
    stages = (gpu_stages.models, gpu_stages.networks, gpu_stages.training)
    for told, left in (("fp16,fp32", {"fp16", "fp32"}), ("bf16", {"bf16"}), ("tf32", {"tf32"})):
        monkeypatch.setenv(gpu.PRECISIONS, told)
        timed.clear()
        for stage in stages:
            assert stage(tmp_path, gpu_stages.Deadline(100)) == 0
        assert set(timed) == left
    monkeypatch.delenv(gpu.PRECISIONS)
    assert gpu_stages.permitted(gpu_stages.OTHERS) == list(gpu_stages.OTHERS)


def archived(path: Path) -> dict[str, str]:
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        return {name: file.read().decode() for name, file in members.items() if file is not None}


def test_results_are_in_one_archive_after_every_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "h200"
    look = "import pathlib, shutil; shutil.copy('h200.tar.gz', 'seen.tar.gz'); pathlib.Path('h200/tuned').mkdir(); "
    fake = Fake(monkeypatch, tmp_path, smoke="", models=f"{look}open('h200/tuned/h200.json', 'w').write('1'); exit(1)")
    fake.run = Run(folder, 30.0, NO_GPU)
    assert fake.perform(SMOKE, TIMED) == 1
    assert "smoke      done" in archived(tmp_path / "seen.tar.gz")["h200/summary.txt"]
    files = archived(tmp_path / "h200.tar.gz")
    assert next(iter(files)) == "h200/summary.txt" and "models     failed" in files["h200/summary.txt"]
    assert set(files) == {"h200/summary.txt", "h200/environment.json", "h200/tuned/h200.json"}
    assert not list(tmp_path.glob(".*"))
    before = (tmp_path / "h200.tar.gz").read_bytes()
    monkeypatch.setattr(tarfile, "open", lambda **given: (_ for _ in ()).throw(OSError("disk full")))
    fake.run.save()  # says so and goes on
    assert (tmp_path / "h200.tar.gz").read_bytes() == before and not list(tmp_path.glob(".*"))


def test_results_are_archived_while_a_stage_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "PACKED_EVERY", 0.2)
    (tmp_path / "h200").mkdir()
    wait = "import os, time; open('h200/models.json', 'w').write('{}')\nwhile not os.path.exists('h200/go'): pass"
    fake = Fake(monkeypatch, tmp_path, models=wait)
    fake.run = Run(tmp_path / "h200", 30.0, NO_GPU)
    pack, seen = gpu.pack, list[set[str]]()

    def packed(results: Path, summary: str) -> None:
        pack(results, summary)
        seen.append(set(archived(gpu.archive(results))))
        if "h200/models.json" in seen[-1]:
            (results / "go").touch()

    monkeypatch.setattr(gpu, "pack", packed)
    assert fake.perform(Stage("models", "", 0.5, 0.0)) == 0  # which waits for the archive
    assert any("h200/go" not in names and "h200/models.json" in names for names in seen)


def falls(item: int) -> tuple[int, str]:
    """For processes of their own: one item ends its process."""
    if item == 2:
        os._exit(7)
    return item, "done"


def test_a_process_that_dies_costs_only_its_item() -> None:
    with gpu_stages._mapped(falls, range(5), 2, lambda item, reason: (item, reason)) as found:
        assert dict(found) == dict.fromkeys((0, 1, 3, 4), "done") | {2: "its process ended with exit status 7"}
    assert gpu_stages._smoke_lost(("tf32", 7, "cuda", "auto"), "gone")[0] == "add_act 17-9px tf32 batch 3"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("", ""),
        (None, ""),  # not asked for
        ("raise SystemExit(1)", "the stage cuda: failed, exit status 1"),
        ("import os; os.abort()", "the stage cuda: failed, exit status -6"),
        (f"raise SystemExit({gpu.CUT_OFF})", "the stage cuda: out of time"),
        ("import time; time.sleep(60)", "the stage cuda: out of time"),
        ("no time", "the stage cuda: skipped, no time left"),
    ],
)
def test_cuda_kernels_that_were_not_found_right_are_not_measured(
    code: str | None, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    show = f"import os; open('told', 'w').write(os.environ.get({gpu.WITHOUT_CUDA!r}, ''))"
    fake = Fake(monkeypatch, tmp_path, cuda=code or "", layers=show)
    least = 2.0 if code == "no time" else 0.0
    cuda_stage = Stage("cuda", "", 0.05, 0.0) if not least else Stage("cuda", "", 0.0, least)
    status = fake.perform(*([] if code is None else [cuda_stage]), Stage("layers", "", 0.5, 0.0, timed=True))
    assert (tmp_path / "told").read_text() == told and fake.statuses()["layers"] == "done"
    assert status == int("failed" in told)


def test_a_process_out_of_time_ends_with_all_it_started(tmp_path: Path) -> None:
    child = "import time; open('began', 'w'); time.sleep(3); open('survived', 'w')"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    process = gpu.Process([sys.executable, "-c", parent], tmp_path, os.environ)
    assert process.wait(1.5) is None
    assert (tmp_path / "began").exists()
    time.sleep(2.5)
    assert not (tmp_path / "survived").exists()


def test_no_time_left_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = Fake(monkeypatch, tmp_path)
    assert fake.perform(Stage("smoke", "", 1.0, 0.2), Stage("tests", "", 0.5, 0.95)) == 0
    assert fake.statuses() == {"smoke": "skipped", "tests": "done"}
    assert fake.run.outcomes["smoke"].reason == "no time left"


def test_deadline_starts_nothing_that_it_has_no_time_for() -> None:
    now = [0.0]
    deadline = gpu_stages.Deadline(10.0, clock=lambda: now[0])
    done = []
    for item in deadline.each(range(9)):
        now[0] += 3.0
        done.append(item)
    assert done == [0, 1, 2]


# --- environment


def test_environment_reads_what_nvidia_smi_and_nvcc_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (
        ("nvidia-smi", "NVIDIA H200, 580.1, 143771 MiB, 345 MHz, 1980 MHz, 3201 MHz, 3201 MHz, 700 W, 30, Default, P0"),
        ("nvcc", "Cuda compilation tools, release 13.0, V13.0.88"),
    ):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho '{text}'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("RESNET_FAST_COMMIT", "abc")
    found = environment.report()
    assert found["gpus"][0]["name"] == "NVIDIA H200" and found["gpus"][0]["clocks.max.sm"] == "1980 MHz"
    assert found["nvcc"] == "13.0.88" and found["commit"] == "abc"
    short = environment.summary(found)
    assert (short["gpu"], short["driver"]) == ("NVIDIA H200", "580.1")
    assert short["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    json.dumps(found)


def test_clocks_are_sampled_while_something_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1980, 3201, 650.1, 51'\necho '1755, 3201, 699.9, 60'\nsleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with environment.Clocks() as clocks:
        time.sleep(0.5)
    assert clocks.seen["clocks.sm"] == {"min": 1755.0, "median": 1980.0, "max": 1980.0, "samples": 2}
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with environment.Clocks() as none:
        pass
    assert none.seen == {}


# --- networks


def test_networks_are_judged_and_timed_as_calls_and_as_graphs(model: nn.Module) -> None:
    def wrong(task: cuda.Task) -> Any:
        right = cuda.PEERS["eager"].build(task)
        return cuda.Contestant(right.prepare, lambda batch: right.run(batch) * 1.1, right.result)

    def broken(task: cuda.Task) -> Any:
        raise OSError("no such\nlibrary")

    def stale(task: cuda.Task) -> Any:
        """Right when called, but its second call, which is what a graph records, is not."""
        right, calls = cuda.PEERS["eager"].build(task), []

        def run(batch: Tensor) -> Tensor:
            calls.append(1)
            return right.run(batch) * (1 if len(calls) == 1 else 2)

        return cuda.Contestant(right.prepare, run, right.result)

    lineup = dict(cuda.PEERS) | {
        "live": Peer("live", "wrong on purpose", wrong),
        "compile": Peer("compile", "broken on purpose", broken),
        "jax": Peer("jax", "missing on purpose", broken, needs=("no_such_module",)),
        "stale": Peer("stale", "another answer from graphs", stale),
    }
    names = ("optimize", "live", "eager", "compile", "jax", "stale")
    found = cuda.compare(
        Case("resnet18", "fp32", 2, 64), model, names=names, device=CPU, seconds=0.1, peers=lineup
    )  # fmt: skip
    rows = found["contestants"]
    assert {name: row["call"]["status"] for name, row in rows.items()} == {
        "optimize": "timed", "live": "wrong", "eager": "timed", "compile": "excluded", "jax": "excluded",
        "stale": "timed",
    }  # fmt: skip
    assert rows["compile"]["call"]["reason"] == "failed: OSError: no such library"
    assert "no_such_module" in rows["jax"]["call"]["reason"]
    assert rows["stale"]["graph"]["status"] == "wrong" and "seconds" not in rows["stale"]["graph"]
    assert "graph" not in rows["live"] and "seconds" not in rows["live"]["call"]
    for mode in ("call", "graph"):
        assert rows["optimize"][mode]["images_per_second"] > 0 and rows["eager"][mode]["gate"]["passed"]
    assert set(found["against"]["eager"]) == {"best", "call", "graph"}
    assert set(found["against"]["stale"]) == {"best", "call"}
    assert found["setting"]["name"] == "resnet18-fp32-b2"
    json.loads(results.dumps(found))


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_networks_at_every_precision(model: nn.Module, precision: str) -> None:
    case = Case("resnet18", precision, 2, 64)
    found = cuda.compare(case, model, names=("optimize", "live", "eager"), device=CPU, seconds=0.05)
    assert all(row["call"]["status"] == "timed" for row in found["contestants"].values())


def test_a_wrong_optimize_fails_the_case(model: nn.Module) -> None:
    def wrong(task: cuda.Task) -> Any:
        right = cuda.PEERS["eager"].build(task)
        return cuda.Contestant(right.prepare, lambda batch: right.run(batch) + 1, right.result)

    lineup = dict(cuda.PEERS) | {"optimize": Peer("optimize", "wrong", wrong)}
    with pytest.raises(RuntimeError, match=r"could not be measured at resnet18-fp32-b1: error .* is beyond"):
        cuda.compare(Case("resnet18", "fp32", 1, 64), model, device=CPU, seconds=0.05, peers=lineup)


@pytest.mark.parametrize(("wrong", "message"), [({"precision": "int8"}, "precision is 'int8'"), ({"batch": 0}, "is 0")])
def test_cases_refuse(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(**({"arch": "resnet18", "precision": "fp16", "batch": 1} | wrong))


def test_turns_divide_by_their_calls_and_wait_for_the_device() -> None:
    now, waits = [0.0], []

    def call(cost: float) -> Callable[[int], None]:
        def run(number: int) -> None:
            now[0] += cost

        return run

    device = Device("cpu", lambda: waits.append(now[0]), recorded_on_cpu)
    found = cuda.turns(
        {"slow": call(0.5), "quick": call(0.001)}, device, seconds=0.1, turn=0.02, clock=lambda: now[0]
    )  # fmt: skip
    assert len(found["slow"]) == len(found["quick"]) == 5
    assert found["quick"][0][0] == pytest.approx(0.001) and found["slow"][0][0] == pytest.approx(0.5)
    assert len(waits) >= 2 * 5


def test_against_takes_each_sides_faster_way() -> None:
    samples: timing.Samples = {
        "optimize call": [[4.0]], "optimize graph": [[1.0]], "eager call": [[8.0]], "eager graph": [[6.0]],
        "jax call": [[3.0]],
    }  # fmt: skip
    found = cuda.against(samples)
    assert {mode: ratio["p50"] for mode, ratio in found["eager"].items()} == {"best": 6, "call": 2, "graph": 6}
    assert {mode: ratio["p50"] for mode, ratio in found["jax"].items()} == {"best": 3, "call": 0.75}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_jax_gives_the_right_answer(model: nn.Module, precision: str) -> None:
    pytest.importorskip("jax")
    case = Case("resnet18", precision, 2, 64)
    found = cuda.compare(case, model, names=("optimize", "jax"), device=CPU, seconds=0.05)
    assert found["contestants"]["jax"]["call"]["status"] == "timed"


class FakeCudnn:
    """The part of nvidia-cudnn-frontend that the contestant uses, computed by torch, as its own tests call it."""

    class data_type:
        HALF, BFLOAT16, FLOAT = "half", "bfloat16", "float"

    class heur_mode:
        A, FALLBACK = "a", "fallback"

    class Value:
        """A tensor of a graph: how to compute it from what is bound to the graph's inputs."""

        def __init__(self, shape: list[int], compute: Callable[[dict[Any, Tensor]], Tensor] | None = None) -> None:
            self.shape, self.computed = shape, compute is not None
            self.compute = compute or (lambda bound: bound[self])

        def set_output(self, is_output: bool) -> FakeCudnn.Value:
            return self

        def set_data_type(self, kind: str) -> FakeCudnn.Value:
            return self

        def get_dim(self) -> list[int]:
            return self.shape

    class pygraph:
        def __init__(self, *, io_data_type: str, intermediate_data_type: str, compute_data_type: str, handle: Any):
            self.stages: list[str] = []

        def tensor(self, *, name: str, dim: list[int], stride: list[int], data_type: str) -> FakeCudnn.Value:
            assert stride[1] == 1 and len(dim) == len(stride) == 4
            return FakeCudnn.Value(dim)

        def conv_fprop(self, *, image: Any, weight: Any, **how: list[int]) -> FakeCudnn.Value:
            shape = list(nn.functional.conv2d(torch.empty(image.shape), torch.empty(weight.shape), **how).shape)

            def compute(bound: dict[Any, Tensor]) -> Tensor:
                return nn.functional.conv2d(bound[image].float(), bound[weight].float(), **how)

            return FakeCudnn.Value(shape, compute)

        def mul(self, *, a: Any, b: Any) -> FakeCudnn.Value:
            return FakeCudnn.Value(a.shape, lambda bound: a.compute(bound) * b.compute(bound))

        def add(self, *, a: Any, b: Any) -> FakeCudnn.Value:
            return FakeCudnn.Value(a.shape, lambda bound: a.compute(bound) + b.compute(bound))

        def relu(self, *, input: Any) -> FakeCudnn.Value:
            return FakeCudnn.Value(input.shape, lambda bound: input.compute(bound).relu())

        def __getattr__(self, name: str) -> Any:
            if name not in (
                "validate",
                "build_operation_graph",
                "create_execution_plans",
                "check_support",
                "build_plans",
            ):
                raise AttributeError(name)
            return lambda *given: self.stages.append(name)

        def get_workspace_size(self) -> int:
            assert self.stages[-1] == "build_plans"
            return 0

        def execute(self, bound: dict[Any, Tensor], workspace: Tensor, handle: Any) -> None:
            (output,) = (value for value in bound if value.computed)
            bound[output].copy_(output.compute(bound))

    @staticmethod
    def create_handle() -> str:
        return "a handle"


@pytest.mark.parametrize(("arch", "precision"), [("resnet18", "fp32"), ("resnet50", "bf16")])
def test_cudnn_gives_the_right_answer(arch: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", FakeCudnn)
    lineup = dict(cuda.PEERS) | {"cudnn": Peer("cudnn", "cuDNN graph API", cuda.PEERS["cudnn"].build)}
    found = cuda.compare(
        Case(arch, precision, 2, 64), fresh_model(arch, image_size=64), names=("optimize", "cudnn"), device=CPU,
        seconds=0.05, peers=lineup,
    )  # fmt: skip
    row = found["contestants"]["cudnn"]
    assert row["call"]["status"] == row["graph"]["status"] == "timed", row


def test_cases_of_several_runs_meet_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    case = Case("resnet18", "fp32", 1, 64)
    assert gpu_stages.measure_case(tmp_path, case, ("optimize", "live"), seconds=0.05, device=CPU)
    assert gpu_stages.measure_case(tmp_path, case, ("optimize", "eager"), seconds=0.05, device=CPU)
    row = results.read(tmp_path / "models.json")["cases"][case.name]
    assert set(row["contestants"]) == {"optimize", "live", "eager"} and set(row["against"]) == {"live", "eager"}
    assert row["commit"] == "0123456789ab" and "time" in row["contestants"]["live"]
    monkeypatch.setattr(cuda, "compare", lambda *given, **options: 1 / 0)
    assert not gpu_stages.measure_case(tmp_path, case, ("optimize", "eager"), device=CPU)
    assert "ZeroDivisionError" in results.read(tmp_path / "models.json")["cases"][case.name]["failed"]


# --- training


def test_training_steps_are_judged_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of several rounds in one file, with what an earlier one measured."""
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    case = bench_training.Case("resnet18", "fp32", 4, 32, judged=4)
    options: dict[str, Any] = {"device": "cpu", "seconds": 0.05}
    assert gpu_stages.measure_training(tmp_path, case, ("eager", "ours"), **options)
    assert gpu_stages.measure_training(tmp_path, case, ("eager", "lean"), **options)
    row = results.read(tmp_path / "training.json")["cases"][case.name]
    assert set(row["contestants"]) == {"eager", "ours", "lean"} and "time" in row["contestants"]["ours"]
    assert set(row["against"]) == {"ours", "lean"} and row["against"]["ours"]["eager"]["p50"] > 0
    assert row["commit"] == "0123456789ab" and row["contestants"]["lean"]["gate"]["gradients"]["passed"]
    row["contestants"]["ours"]["peak_bytes"] = 3 * 2**29
    assert " img/s 1.5 GiB (" in gpu.training_line(row)
    assert f"{case.name}: eager " in gpu.table(tmp_path, {})
    assert capsys.readouterr().out.count(f"  {case.name}: eager ") == 2


def test_wrong_gradients_fail_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    seen: list[tuple[str, tuple[str, ...]]] = []

    def measured(case: bench_training.Case, *, names: tuple[str, ...], **options: Any) -> dict[str, Any]:
        seen.append((case.name, names))
        rows = {name: {"ours": name != "eager", "status": "timed", "images_per_second": 9.0} for name in names}
        rows[names[-1]] |= status
        return {"contestants": rows, "against": {}}

    monkeypatch.setattr(bench_training, "measure", measured)
    status: dict[str, Any] = {}
    assert gpu_stages.training(tmp_path, gpu_stages.Deadline(100)) == 0
    assert [names[-1] for _, names in seen] == ["lean", "lean", "compile", "compile", "ours_compile", "ours_compile"]
    assert {name for name, _ in seen} == {case.name for case in gpu_stages.TRAINED}
    status |= {"status": "wrong", "reason": "gradients: beyond"}
    assert gpu_stages.training(tmp_path, gpu_stages.Deadline(100)) == 1
    monkeypatch.setattr(bench_training, "measure", lambda *given, **options: 1 / 0)
    assert gpu_stages.training(tmp_path, gpu_stages.Deadline(100)) == 1
    cases = results.read(tmp_path / "training.json")["cases"]
    assert all("ZeroDivisionError" in row["failed"] for row in cases.values())


# --- ops


def test_conv_shapes_are_those_of_the_network() -> None:
    found = ops.conv_shapes("resnet50")
    assert len(found) == len(set(found)) == 23
    assert ops.ConvShape(64, 256, 1, 1, 56, residual=True) in found
    assert ops.ConvShape(256, 512, 1, 2, 56, activation="none") in found
    assert ops.ConvShape(512, 512, 3, 2, 14) in found
    assert sum(shape.residual for shape in found) == 4
    basic = ops.conv_shapes("resnet18")
    assert ops.ConvShape(64, 64, 3, 1, 56, residual=True) in basic and ops.ConvShape(64, 64, 3, 1, 56) in basic
    assert any(shape.groups == 32 for shape in ops.conv_shapes("resnext50_32x4d"))


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_smoke_judges_every_op(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    monkeypatch.setattr(gpu_stages, "PRECISIONS", (precision,))
    before = torch.are_deterministic_algorithms_enabled()
    try:
        assert gpu_stages.smoke(tmp_path, gpu_stages.Deadline(100), "cpu", workers=1) == 0
        rows = results.read(tmp_path / "correctness.json")["ops"]
        every = {"conv_bn_act", "add_act", "batch_norm_act", "stem", "head", "bottleneck_tail"}
        assert {name.split()[0] for name in rows} == every
        assert all(row["passed"] and row["error"] <= row["allowed"] for row in rows.values())
    finally:
        torch.use_deterministic_algorithms(before)


def test_smoke_shares_its_work_between_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    monkeypatch.setattr(gpu_stages, "PRECISIONS", ("fp32",))
    assert gpu_stages.smoke(tmp_path, gpu_stages.Deadline(100), "cpu", workers=2) == 0
    assert len(results.read(tmp_path / "correctness.json")["ops"]) == len(ops.small("fp32", "cpu"))


def test_smoke_that_is_cut_off_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels are not measured then, so ``cuda`` must not count as done."""
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    passed, now = [True], [0.0]

    def one(item: Any) -> tuple[str, dict[str, Any]]:
        now[0] += 1
        return str(item[:2]), {"passed": passed[0], "error": 0.0, "allowed": 1.0, "reason": ""}

    monkeypatch.setattr(gpu_stages, "_smoke_one", one)
    whole = len(ops.small("fp16", "cpu")) * len(gpu_stages.PRECISIONS)
    for seconds, right, status in ((whole + 1, True, 0), (whole, True, 0), (3, True, gpu.CUT_OFF), (3, False, 1)):
        now[0], passed[0] = 0.0, right
        deadline = gpu_stages.Deadline(seconds, clock=lambda: now[0])
        assert gpu_stages.smoke(tmp_path, deadline, "cpu", workers=1) == status
    monkeypatch.setattr(backends, "available", lambda: {"cuda": ""})
    for judged, tested, status in ((0, 0, 0), (gpu.CUT_OFF, 0, gpu.CUT_OFF), (gpu.CUT_OFF, 1, 1), (1, 0, 1), (0, 1, 1)):
        monkeypatch.setattr(gpu_stages, "smoke", lambda *given, judged=judged, **options: judged)
        monkeypatch.setattr(gpu_stages, "_tests", lambda *given, tested=tested: tested)
        assert gpu_stages.cuda_kernels(tmp_path, gpu_stages.Deadline(9)) == status


def test_smoke_by_the_cuda_kernels_covers_all_that_they_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    seen: dict[str, set[str]] = {}

    def one(item: tuple[str, int, str, str]) -> tuple[str, dict[str, Any]]:
        precision, index, device, _ = item
        made: Any = ops.small(precision, device)[index]
        seen.setdefault(precision, set()).add(made.func.__name__)
        return str(item), {"passed": True, "error": 0.0, "allowed": 1.0, "reason": ""}

    monkeypatch.setattr(gpu_stages, "_smoke_one", one)
    assert gpu_stages.smoke(tmp_path, gpu_stages.Deadline(60), "cpu", workers=1, backend="cuda") == 0
    every = set(native.OPS)
    assert {"conv_bn_act", "stem", "head", "add_act"} <= every
    assert seen == {"fp16": every, "bf16": every, "tf32": every, "fp32": every - {"conv_bn_act", "stem"}}


def test_smoke_sees_a_wrong_and_a_broken_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    right = ops.add_act(16, 5, 2, "fp32")

    def skewed(x: Tensor, y: Tensor) -> Tensor:
        return right.contestants["plain"](x, y) * 1.001

    def spoiled(name: str, run: Callable[..., Tensor]) -> ops.OpCase:
        return ops.OpCase(
            "add_act", name, "fp32", 2, right.data, {**right.contestants, "op": run}, right.exact, right.work
        )

    cases = [right, spoiled("skewed", skewed), spoiled("broken", lambda x, y: 1 / 0)]
    monkeypatch.setattr(gpu_stages, "PRECISIONS", ("fp32",))
    monkeypatch.setattr(
        ops, "small", lambda precision, device: [functools.partial(lambda case: case, case) for case in cases]
    )
    before = torch.are_deterministic_algorithms_enabled()
    try:
        assert gpu_stages.smoke(tmp_path, gpu_stages.Deadline(100), "cpu", workers=1) == 1
    finally:
        torch.use_deterministic_algorithms(before)
    rows = results.read(tmp_path / "correctness.json")["ops"]
    assert [row["passed"] for row in rows.values()] == [True, False, False]
    assert "beyond the allowed" in rows["add_act skewed fp32 batch 2"]["reason"]
    assert "ZeroDivisionError" in rows["add_act broken fp32 batch 2"]["reason"]
    assert capsys.readouterr().out.count("WRONG") == 2


def test_ops_are_timed_beside_their_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    ceilings = gpu_stages.measure_ceilings(CPU, size=1 << 16, edge=64)
    assert set(ceilings) == {"copy", "fp16", "bf16", "tf32", "fp32"}
    assert all(row["per_second"] > 0 for row in ceilings.values())
    book = gpu_stages.Book(tmp_path, "ops", ("ceilings", "rows"))
    limits = gpus.GPU("slow", 90, 1, 1, 1, 1 << 16, 1e9, dict.fromkeys(gpus.PRECISIONS, 1e9))
    case = ops.conv_bn_act(ops.ConvShape(16, 16, 3, 1, 8), 2, "fp32")
    with torch.no_grad():
        assert gpu_stages.measure_op(book, case, limits, CPU, seconds=0.05)
    row = results.read(tmp_path / "ops.json")["rows"][case.title]
    assert row["floor_seconds"] == pytest.approx(
        2 * 2 * 16 * 64 * 9 * 16 / 1e9
    )  # by hand: 2 * N * P * Q * K * R * S * C
    assert row["bound"] == "math" and row["share"] == pytest.approx(row["floor_seconds"] / row["seconds"]["p50"])
    moved = 4 * (2 * 2 * 16 * 64)
    assert row["bytes"] == moved + 4 * 16 * 9 * 16 + 2 * 4 * 16
    assert row["input_sets"] == -(-2 * (1 << 16) // moved)
    assert set(row["against_plain"]) >= {"p10", "p50", "p90"}


def test_accuracy_is_written_for_every_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    monkeypatch.setattr(gpu_stages, "ACCURACY", (("resnet18", "bf16"), ("resnet18", "fp32")))
    assert gpu_stages.accuracy(tmp_path, gpu_stages.Deadline(100), "cpu", image_size=64, batch=5) == 0
    rows = results.read(tmp_path / "correctness.json")["models"]
    assert list(rows) == ["resnet18 bf16", "resnet18 fp32"]
    assert all(0 < row["error"] <= row["allowed"] and row["torch"] > 0 for row in rows.values())


# --- the native module


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose build is a script of ours, and a package beside it that an earlier build was copied into."""
    folder, package = tmp_path / "checkout", tmp_path / "overlay" / "resnet_fast"
    (folder / "csrc").mkdir(parents=True)
    (folder / "resnet_fast").mkdir()
    package.mkdir(parents=True)
    (package / "_C.cpython-old.so").write_text("of an earlier build")
    (package / "_C.pyi").write_text("types")
    import resnet_fast

    monkeypatch.setattr(resnet_fast, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    monkeypatch.setenv("RESNET_FAST_CHECKOUT", str(folder))
    return folder


def building(folder: Path, body: str, missing: str = "") -> None:
    """native_build.py, the parts that the stage uses, which as a program does ``body``."""
    (folder / "csrc" / "native_build.py").write_text(f"""
import json, sys
from pathlib import Path
RECORD = "_build_record.json"
def find_nvcc(): return None if {missing!r} == "nvcc" else "nvcc"
def find_tool(name): return None if {missing!r} == name else name
def remove_module(folder):
    for path in [*folder.glob("_C.*.so"), folder / RECORD]: path.unlink(missing_ok=True)
if __name__ == "__main__":
    assert sys.argv[1:] == ["--out", "resnet_fast", "--build-dir", "build/native"]
    out = Path("resnet_fast")
    print("$ cmake")
    {body}
""")


RECORD = {
    "built": True, "reason": "", "archs": ["90a"], "ptx": "", "cuda": "13.0.88", "sm90": "none", "seconds": 93.0
}  # fmt: skip


def test_the_native_module_is_built_and_taken_over(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    building(checkout, f"(out / '_C.new.so').write_text('code'); (out / RECORD).write_text({json.dumps(RECORD)!r})")
    real, seen = subprocess.run, []

    def run(command: list[str], **options: Any) -> Any:
        if "-c" in command:  # the check whether it loads
            seen.append(command)
            return subprocess.CompletedProcess(command, 0, "\n", "")
        return real(command, **options)

    monkeypatch.setattr(gpu_stages.subprocess, "run", run)
    assert gpu_stages.native(tmp_path, gpu_stages.Deadline(60)) == 0 and len(seen) == 1
    package = tmp_path / "overlay" / "resnet_fast"
    assert {path.name for path in package.iterdir()} == {"_C.new.so", "_C.pyi", "_build_record.json"}
    row = results.read(tmp_path / "native.json")["build"]["resnet_fast._C"]
    assert row["built"] and row["archs"] == ["90a"] and "$ cmake" in row["tail"] and row["status"] == 0
    line = "built with CUDA 13.0.88 for 90a in 93.0 s, without CUTLASS's kernels"
    assert line in capsys.readouterr().out and f"resnet_fast._C: {line}" in gpu.table(tmp_path, {})
    # Built, but it does not load here: wrong, and said.
    monkeypatch.setattr(gpu_stages.subprocess, "run", lambda command, **options: real(
        [sys.executable, "-c", "print('does not load: no symbol')"] if "-c" in command else command, **options
    ))  # fmt: skip
    assert gpu_stages.native(tmp_path, gpu_stages.Deadline(60)) == 1
    assert "FAILED: does not load: no symbol" in capsys.readouterr().out


def test_a_build_that_fails_leaves_no_module_and_says_why(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = json.dumps({**RECORD, "built": False, "reason": "ninja ended with status 1: x.cu(3): error: no\nmore"})
    building(checkout, f"(out / RECORD).write_text({left!r}); sys.exit(1)")
    assert gpu_stages.native(tmp_path, gpu_stages.Deadline(60)) == 1
    assert [path.name for path in (tmp_path / "overlay" / "resnet_fast").iterdir()] == ["_C.pyi"]
    row = results.read(tmp_path / "native.json")["build"]["resnet_fast._C"]
    assert not row["built"] and row["status"] == 1 and row["reason"].endswith("more")
    assert "  FAILED: ninja ended with status 1: x.cu(3): error: no\n" in capsys.readouterr().out


def test_a_build_that_is_cut_off_is_not_taken_for_an_earlier_one(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    building(checkout, f"(out / '_C.new.so').write_text('code'); (out / RECORD).write_text({json.dumps(RECORD)!r})")
    book = gpu_stages.Book(tmp_path, "native", ("build",))
    book.add("build", "resnet_fast._C", {"line": "built with CUDA 12.0"})
    assert "built with CUDA 12.0" in gpu.table(tmp_path, {})

    def ended(command: list[str], **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_stages.subprocess, "run", ended)
    with pytest.raises(KeyboardInterrupt):
        gpu_stages.native(tmp_path, gpu_stages.Deadline(60))
    assert "built" not in gpu.table(tmp_path, {})


@pytest.mark.parametrize("tool", ["nvcc", "cmake", "ninja"])
def test_without_a_tool_nothing_is_built_and_that_is_no_failure(
    tool: str, checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    building(checkout, "raise SystemExit('never')", missing=tool)
    assert gpu_stages.native(tmp_path, gpu_stages.Deadline(60)) == 0
    assert f"not built: there is no {tool} here" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "overlay" / "resnet_fast").iterdir()] == ["_C.pyi"]


def test_the_real_build_has_what_the_stage_uses() -> None:
    build = gpu_stages._native_build(ROOT)
    assert build.RECORD == "_build_record.json" and callable(build.remove_module)
    nvcc = build.find_nvcc()
    assert nvcc is None or Path(nvcc).is_file()
    assert build.find_tool("no-such-tool") is None


def test_without_a_module_the_cuda_stages_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not backends.available()["cuda"]:
        pytest.skip("it is built here")
    for stage in (gpu_stages.cuda_kernels, gpu_stages.cuda_alone):
        assert stage(tmp_path, gpu_stages.Deadline(60)) == 0
        assert f"  not run: {native.unavailable()}" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cuda
def test_smoke_by_the_cuda_kernels_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they do not compute is wrong there, for a fallback would be judged in their place."""
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    monkeypatch.setattr(gpu_stages, "PRECISIONS", ("fp16", "fp32"))
    native_device = "cuda" if not native.unavailable() else "cpu"

    def small(precision: str, device: str) -> list[Callable[[], ops.OpCase]]:
        given = (2, precision, device)
        return [
            functools.partial(ops.conv_bn_act, ops.ConvShape(17, 13, 3, 1, 5, residual=True), *given),
            functools.partial(ops.head, 17, 3, *given, k=13),
            functools.partial(ops.bottleneck_tail, ops.SMALL_TAILS[0], *given),
        ]

    monkeypatch.setattr(ops, "small", small)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        with installed():
            assert gpu_stages.smoke(tmp_path, gpu_stages.Deadline(60), native_device, workers=1, backend="cuda") == 0
            rows = results.read(tmp_path / "correctness.json")["ops"]
            assert [name.split()[0] for name in rows] == ["conv_bn_act", "head", "head"]
            assert all(name.endswith("by cuda") and row["passed"] for name, row in rows.items())
            monkeypatch.setattr(native, "kernel", lambda *given: ("", "not today"))
            with pytest.warns(backends.FallbackWarning):
                assert (
                    gpu_stages.smoke(tmp_path, gpu_stages.Deadline(60), native_device, workers=1, backend="cuda") == 1
                )
    finally:
        torch.use_deterministic_algorithms(before)
    rows = results.read(tmp_path / "correctness.json")["ops"]
    assert [row["reason"] for row in rows.values()] == ["something slower ran than was asked for"] * 3


# --- layer by layer


class Stopwatch:
    """A runner that runs nothing but torch's way: what each op's launches take, in microseconds, and who is wrong.

    Attributes:
        faulting: how many launches of CUDA's go well before one takes the GPU away. asked: whose launches, in order.
    """

    batch = 4

    def __init__(self, **taken: float) -> None:
        self.taken, self.liars, self.spilling = taken, set[str](), False
        self.case: adapters.Case | None = None
        self.faulting, self.asked = 1 << 30, list[str]()

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *given: object) -> None:
        pass

    def separately(self) -> float:
        return float("inf")

    def load(self, case: adapters.Case) -> None:
        self.case = case

    def unusable(self, configs: Any) -> dict[Any, str]:
        return dict.fromkeys(configs, "spills 8 bytes a thread") if self.spilling else {}

    def _who(self) -> str:
        assert self.case is not None
        return "cuda" if adapters.is_cuda(self.case) else "triton"

    def wrong(self, config: Any) -> str:
        self.asked.append(self._who())
        if self.asked.count("cuda") > self.faulting:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return "relative error 1" if self._who() in self.liars else ""

    def seconds(self, config: Any) -> float:
        return 1e-6 * self.taken[self._who()]

    def wrong_by(self, run: Any) -> str:
        self.asked.append("cudnn")
        try:
            run({"out": torch.empty(1)})
        except RuntimeError as failure:
            return f"does not run: {failure}"
        return "NaN or infinity in the answer" if "cudnn" in self.liars else ""

    def seconds_of(self, make: Any) -> float:
        make({})()
        return 1e-6 * self.taken["cudnn"]


H100 = gpus.known("h100")
EASY: dict[str, Any] = {op: lambda case, tensors: lambda: torch.zeros(1) for op in gpu_layers.WAYS}


class Listed:
    """A native module with one convolution kernel, for 1x1 alone."""

    def build_info(self) -> dict[str, Any]:
        return {"archs": ["90a"], "cuda": "13.0.88", "emulated": False}

    def conv_bn_act_kernels(self) -> list[dict[str, Any]]:
        return [{
            "name": "sm90_fp16_gemm_128x64", "algorithm": "cutlass_gemm", "least_capability": 90,
            "most_capability": 90, "precision": "fp16", "block_m": 128, "block_n": 64, "block_k": 64, "stages": 4,
            "threads": 384, "shared_bytes": 99_000,
        }]  # fmt: skip

    def conv_bn_act_unsupported(self, name: str, *fields: Any) -> str:
        return "" if fields[11:13] == (1, 1) else "a window"


def test_layers_are_measured_by_everybody_who_computes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    monkeypatch.setenv("RESNET_FAST_TUNED", str(tmp_path / "none"))
    problems = gpu_layers.contested(shapes.problems(["resnet50"], [128], ["fp16"]))
    kinds = [problem.op for problem in problems]
    assert kinds.count("conv_bn_act") == 23 and kinds.count("stem") == 2 and kinds.count("head") == 1
    pointwise = next(p for p in problems if p.op == "conv_bn_act" and p.problem.kernel == (1, 1))
    spatial = next(p for p in problems if p.op == "conv_bn_act" and p.problem.kernel == (3, 3))
    book = gpu_stages.Book(tmp_path, "layers", ("rows",))
    with native.substitute(Listed()):
        watch = Stopwatch(triton=30, cuda=20, cudnn=40)
        for problem in (pointwise, spatial):
            row = gpu_layers.measure(problem, H100, watch, EASY)
            assert row["times"]["cuda"] == {"none": "not measured"} and "cuda" not in watch.asked
            row["times"]["cuda"] = gpu_layers.measure_cuda(problem, H100, watch)
            book.add("rows", str(problem), {"batch": 128, **row})
            watch.asked.clear()
        first, second = book.data["rows"].values()
        assert first["times"]["cuda"] == {"us": pytest.approx(20), "choice": {"kernel": "sm90_fp16_gemm_128x64"}}
        assert first["times"]["triton"]["us"] == pytest.approx(30) and "block_m" in first["times"]["triton"]["choice"]
        assert first["floor_us"] == pytest.approx(
            1e6 * adapters.get("conv_bn_act").work(pointwise.problem).floor(H100, "fp16")
        )
        assert second["times"]["cuda"] == {"none": "no CUDA kernel computes it here"}
        assert "cuda 20.00 (" in gpu_layers.line(first) and "cuda: no CUDA kernel" in gpu_layers.line(second)
        text = gpu_layers.table(book.data)
        assert (
            f"| conv_bn_act {pointwise.problem.key()} (relu) | {first['floor_us']:.2f} | 30.00 | **20.00** | 40.00 |"
            in text
        )
        assert f"| {second['floor_us']:.2f} | **30.00** | none | 40.00 |  |" in text
        assert f"| sum where all three run | {first['floor_us']:.2f} | 30.00 | 20.00 | 40.00 | |" in text
        assert "layers at batch 128, fastest: cuda 1, triton 1" in gpu.table(tmp_path, {})
        assert "- CUDA, none: no CUDA kernel computes it here (1 of the layers)\n" in text
        assert "(torch.backends.cudnn.benchmark is True)" in text
        watch.liars = {"cuda"}
        row = gpu_layers.measure(pointwise, H100, watch, EASY)
        row["times"]["cuda"] = gpu_layers.measure_cuda(pointwise, H100, watch)
        assert row["times"]["cuda"] == {"wrong": "relative error 1"}
        assert "cuda WRONG: relative error 1" in gpu_layers.line(row)
        watch.liars, watch.spilling = {"cudnn"}, True
        row = gpu_layers.measure(spatial, H100, watch, EASY)
        assert row["times"]["triton"] == {"wrong": "spills 8 bytes a thread"} and "wrong" in row["times"]["cudnn"]
        gpu_layers.table({**book.data, "rows": {"x": {"batch": 1, **row}}})


def test_norms_are_measured_as_two_launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ours by the sum of both; torch's way does what the layers do."""
    monkeypatch.setenv("RESNET_FAST_TUNED", str(tmp_path / "none"))
    found = gpu_layers.pairs(shapes.problems(["resnet18"], [2], ["fp16"], 64, training=True), 2)
    assert len(found) == len(set(found)) and {pair.form for pair in found} == {"forward", "backward"}
    keys = {str(pair) for pair in found}
    assert "batch_norm_act (forward) fp16 2048x64 relu" in keys  # the stem's
    assert "batch_norm_act (backward) fp16 512x64 relu residual" in keys
    assert "batch_norm_act (forward) fp16 128x128" in keys  # a projection's
    for pair in found:
        assert pair.first.problem.step == {"forward": "statistics", "backward": "reduce"}[pair.form]
        assert pair.first.problem.relu == pair.second.problem.relu
    watch = Stopwatch(triton=30, cuda=20, cudnn=40)
    monkeypatch.setattr(watch, "seconds_of", lambda make: 40e-6)
    row = gpu_layers.measure(found[0], H100, watch)
    assert row["times"]["triton"]["us"] == pytest.approx(60) and row["times"]["cudnn"] == {"us": pytest.approx(40)}
    norm = adapters.get("batch_norm_act")
    floors = [norm.work(case.problem).floor(H100, "fp16") for case in (found[0].first, found[0].second)]
    assert row["floor_us"] == pytest.approx(1e6 * sum(floors))
    assert gpu_layers.measure_cuda(found[0], H100, watch) == {"none": "no CUDA kernel computes it here"}
    watch.liars = {"triton"}
    assert gpu_layers.measure(found[0], H100, watch)["times"]["triton"] == {"wrong": "relative error 1"}
    monkeypatch.setattr(watch, "seconds_of", lambda make: make({}))
    assert gpu_layers.line(row | {"times": row["times"] | {"cudnn": {"none": "x"}}})


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("form", ["forward", "backward"])
def test_torchs_way_of_a_norm_is_the_layers(form: str, residual: bool) -> None:
    found = gpu_layers.pairs(shapes.problems(["resnet18"], [2], ["fp32"], 64, training=True), 2)
    pair = next(p for p in found if p.form == form and p.second.problem.residual is residual)
    tensors = adapters.get("batch_norm_act").tensors(pair.second.problem, torch.device("cpu"))
    side, c = int((pair.second.problem.rows // 2) ** 0.5), pair.second.problem.c
    images = {
        name: tensor.view(2, side, side, c).permute(0, 3, 1, 2)
        for name, tensor in tensors.items()
        if tensor is not None and tensor.dim() == 2 and name != "out"
    }
    x, gamma = images["x"].clone().requires_grad_(), tensors["gamma"]
    beta = tensors["beta"] if form == "forward" else None
    y = nn.functional.batch_norm(x, None, None, gamma, beta, True, 0.1, 1e-5)
    made: Any = gpu_layers._norm(pair, tensors)()
    if form == "forward":
        y = y + images["residual"] if residual else y
        assert torch.equal(made, y.relu() if pair.second.form == "relu" else y)
        return
    g = torch.where(images["y"] <= 0, 0.0, images["grad"]) if "y" in images else images["grad"]
    (grad_x,) = torch.autograd.grad(y, [x], g)
    torch.testing.assert_close(made[0], grad_x)


@pytest.mark.parametrize("when", ["made", "run", "recorded"])
def test_what_cudnn_does_not_have_is_no_wrong_answer(when: str) -> None:
    """The runner says "does not run" of what raises; of cuDNN that is no verdict."""
    calls: list[str] = []

    def way(case: adapters.Case, tensors: Any) -> Callable[[], Tensor]:
        calls.append("made")
        if when == "made" or (when == "recorded" and len(calls) == 2):
            raise NotImplementedError("no such\nconvolution")

        def run() -> Tensor:
            if when == "run":
                raise RuntimeError("no such\nconvolution")
            return torch.zeros(1)

        return run

    case = gpu_layers.contested(shapes.problems(["resnet18"], [1], ["fp16"], 64))[0]
    row = gpu_layers.measure(case, H100, Stopwatch(triton=1, cudnn=1), {case.op: way})
    assert row["times"]["cudnn"] == {"none": "no such convolution"}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_cudnn_tries_its_algorithms(before: bool, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    seen: list[bool] = []

    def way(case: adapters.Case, tensors: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            seen.append(torch.backends.cudnn.benchmark)
            if fails:
                raise RuntimeError("no")
            return torch.zeros(1)

        return run

    case = gpu_layers.contested(shapes.problems(["resnet18"], [1], ["fp16"], 64))[0]
    gpu_layers.measure(case, H100, Stopwatch(triton=1, cudnn=1), {case.op: way})
    assert seen == ([True] if fails else [True, True]) and torch.backends.cudnn.benchmark is before


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stopwatch]:
    """What the stages ``tune`` and ``layers`` measure with, at two batches: Triton's, CUDA's of ``Listed``, cuDNN's."""
    runner = Stopwatch(triton=1e-3, cuda=1e-3, cudnn=1e-3)  # below every floor, so that the first choice is taken
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    monkeypatch.setenv("RESNET_FAST_TUNED", str(tmp_path / "tuned"))
    monkeypatch.delenv(gpu.WITHOUT_CUDA, raising=False)
    monkeypatch.setattr(triton, "gpu_of", lambda device: H100)
    monkeypatch.setattr(tuning, "CudaRunner", lambda *given: runner)
    monkeypatch.setattr(tuning, "versions", lambda device: {"torch": "t"})
    others = backends.available()
    monkeypatch.setattr(backends, "available", lambda: others | {"cuda": ""})
    monkeypatch.setattr(gpu_layers, "WAYS", EASY)
    monkeypatch.setattr(gpu_layers, "_norm", lambda pair, tensors: lambda: None)
    monkeypatch.setattr(gpu_stages, "FIRST", (Case("resnet18", "fp16", 2), Case("resnet18", "fp16", 1)))
    monkeypatch.setattr(gpu_stages, "TRAINED", (bench_training.Case("resnet18", "bf16", 4),))
    _tables.forget()
    with native.substitute(Listed()):
        yield runner
    _tables.forget()


def per_batch(choices: Any, op: str) -> list[int]:
    """How many choices of an op a table has, by batch."""
    return [sum(f" n{batch} " in key for key in choices.get(op, {})) for batch in (2, 1)]


def test_tune_measures_cudas_kernels_last(
    watch: Stopwatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A CUDA kernel that faults loses none of Triton's times, of no batch."""
    path = tmp_path / "tuned" / "h100.json"
    monkeypatch.setenv(gpu.WITHOUT_CUDA, "the stage cuda: failed")
    monkeypatch.setattr(gpu_stages, "FIRST", gpu_stages.FIRST[1:])
    assert gpu_stages.tune(tmp_path, gpu_stages.Deadline(1000)) == 0
    assert set(watch.asked) == {"triton"} and "  without the CUDA kernels: the stage cuda: failed\n" in (
        capsys.readouterr().out
    )
    path.unlink()
    _tables.forget()
    monkeypatch.delenv(gpu.WITHOUT_CUDA)
    monkeypatch.setattr(gpu_stages, "FIRST", (Case("resnet18", "fp16", 2), Case("resnet18", "fp16", 1)))
    watch.asked, watch.faulting = [], 2
    assert gpu_stages.tune(tmp_path, gpu_stages.Deadline(1000)) == 1
    assert watch.asked[-4:] == ["triton", "cuda", "cuda", "cuda"] and watch.asked.count("cuda") == 3
    whole, partly = _tables.read(path), [op for op in _tables.read(path) if op.endswith(".cuda")]
    assert min(per_batch(whole, "conv_bn_act")) > 5 and sum(len(whole[op]) for op in partly) == 2
    assert "the CUDA kernels: FAILED RuntimeError: CUDA error: an illegal" in capsys.readouterr().out


def test_tune_keeps_time_for_training_and_for_cudas_kernels(
    watch: Stopwatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[bool, float]] = []
    trained: list[float] = []

    def swept(cases: Any, *args: Any, seconds: float, **options: Any) -> None:
        ((native_cases, training),) = {
            (adapters.is_cuda(case), case.op.removesuffix(".cuda") in shapes.TRAINING) for case in cases
        }
        if not training:
            given.append((native_cases, seconds))
        elif not native_cases:
            trained.append(seconds)
            assert {case.op for case in cases} == set(shapes.TRAINING)
            assert {case.problem.precision for case in cases} == {"bf16"}

    monkeypatch.setattr(sweep, "sweep", swept)
    assert gpu_stages.tune(tmp_path, gpu_stages.Deadline(1000)) == 0
    assert [native_cases for native_cases, _ in given] == [False, False, True, True]
    assert 450 < given[0][1] < 500 and 640 < given[2][1] < 667
    assert len(trained) == 1 and 700 < trained[0] < 750
    others = backends.available()
    monkeypatch.setattr(backends, "available", lambda: others | {"cuda": "not built"})
    given.clear()
    assert gpu_stages.tune(tmp_path, gpu_stages.Deadline(1000)) == 0
    assert [native_cases for native_cases, _ in given] == [False, False] and 640 < given[0][1] < 667
    assert len(trained) == 2 and trained[1] > 950


def test_layers_measure_cudas_kernels_last(
    watch: Stopwatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watch.faulting = 2
    assert gpu_stages.layers(tmp_path, gpu_stages.Deadline(1000)) == 1
    rows = results.read(tmp_path / "layers.json")["rows"].values()
    assert {row["batch"] for row in rows} == {1, 2, "4, training"}
    assert all("us" in row["times"]["triton"] and "us" in row["times"]["cudnn"] for row in rows)
    column = [row["times"]["cuda"] for row in rows]
    assert sum("us" in one for one in column) == 2 and column.count({"wrong": "the GPU failed"}) == 1
    assert {"none": "not measured"} in column and watch.asked[-3:] == ["cuda"] * 3
    shown = capsys.readouterr().out
    assert "cuda WRONG: the GPU failed" in shown and "the CUDA kernels: FAILED RuntimeError: CUDA error" in shown
    assert "- CUDA, wrong: the GPU failed (1 of the layers)" in (tmp_path / "layers.md").read_text()

    watch.asked, watch.faulting = [], 1 << 30
    assert gpu_stages.layers(tmp_path, gpu_stages.Deadline(1000)) == 0
    column = [row["times"]["cuda"] for row in results.read(tmp_path / "layers.json")["rows"].values()]
    assert sum("us" in one for one in column) > 4 and {"none": "not measured"} not in column
    assert watch.asked.index("cuda") > max(at for at, who in enumerate(watch.asked) if who != "cuda")
    assert "CUDA, none: not measured" not in (tmp_path / "layers.md").read_text()

    real, given = gpu_stages.Deadline, list[float]()
    monkeypatch.setattr(gpu_stages, "Deadline", lambda seconds: given.append(seconds) or real(seconds))
    assert gpu_stages.layers(tmp_path, real(900)) == 0 and [round(seconds) for seconds in given] == [600]
    watch.asked = []
    capsys.readouterr()
    monkeypatch.setenv(gpu.WITHOUT_CUDA, "the stage cuda: failed")
    assert gpu_stages.layers(tmp_path, real(1000)) == 0 and len(given) == 1
    assert "cuda" not in watch.asked
    assert "  without the CUDA kernels: the stage cuda: failed\n" in capsys.readouterr().out
    assert "- CUDA, none: the stage cuda: failed (" in (tmp_path / "layers.md").read_text()


def test_torchs_ways_give_the_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's fused convolutions, as torch documents them, in torch's own operations."""

    def conv_relu(x: Tensor, weight: Tensor, bias: Tensor, *how: Any) -> Tensor:
        return torch.conv2d(x.float(), weight.float(), bias.float(), *how).relu().to(x.dtype)

    def conv_add_relu(x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *how: Any) -> Tensor:
        return (torch.conv2d(x.float(), weight.float(), bias.float(), *how) + alpha * z.float()).relu().to(x.dtype)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)
    found: dict[tuple[Any, ...], adapters.Case] = {}
    for case in shapes.problems(["resnet18"], [1], ["fp16"], 32):
        found.setdefault((case.op, case.form, getattr(case.problem, "residual", None)), case)
    cases = [case for case in found.values() if case.form != "backward"]
    assert len(cases) == 8
    for case in cases:
        adapter = adapters.get(case.op)
        tensors = adapter.tensors(case.problem, torch.device("cpu"))
        exact = adapter.reference(tuning._widened(tensors, torch.float32), case)["out"]
        ours = gpu_layers.WAYS[case.op](case, tensors)()
        assert ours.shape == exact.shape and tuning.error(ours, exact, "fp16") == "", str(case)


def test_one_runs_tensors_serve_triton_and_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    adapter = adapters.get("add_act")
    monkeypatch.setitem(adapters._OPS, "add_act", adapters.replace(
        adapter, tensors=lambda problem, device: made.append("") or adapter.tensors(problem, device)
    ))  # fmt: skip
    problem = adapter.kernel.Problem(1 << 20, "fp16")
    with tuning.CudaRunner(gpus.known("l4"), torch.device("cpu"), jobs=1) as runner:
        runner.load(adapters.Case("add_act", problem, "relu"))
        count = len(made)
        runner.load(adapters.Case("add_act.cuda", problem, "relu"))
        assert len(made) == count > 0 and runner.unusable([object()]) == {}
        runner.load(adapters.Case("add_act", problem, "backward"))
        assert len(made) == 2 * count


# --- pytest and the sanitizer


def test_outcomes_are_counted_with_and_without_xdist() -> None:
    text = (
        "tests/test_a.py::test_x[1] PASSED [ 10%]\ntests/test_a.py::test_y SKIPPED (needs it) [ 20%]\nnoise PASSED\n"
        "[gw3] [ 30%] FAILED tests/test_b.py::test_z[fp16-(1, 2)] \n[gw0] [ 35%] PASSED tests/test_b.py::test_w\n"
    )
    assert gpu_stages.outcomes(text) == {"PASSED": 2, "SKIPPED": 1, "FAILED": 1}


def test_gpu_tests_are_found(tmp_path: Path) -> None:
    (tmp_path / "test_triton_a.py").write_text("")
    (tmp_path / "test_b.py").write_text("@pytest.mark." + "gpu\ndef test(): pass")
    (tmp_path / "test_c.py").write_text("def test(): pass")
    (tmp_path / "test_e.py").write_text("from .triton_device import " + "DEVICE")
    (tmp_path / "test_cuda_d.py").write_text("from .cuda_device import DEVICE")
    (tmp_path / "test_cuda_graphs.py").write_text("@pytest.mark." + "gpu\ndef test(): pass")
    triton, cuda_kernels, marked = ([Path(path).name for path in found] for found in gpu_stages.gpu_tests(tmp_path))
    assert (triton, cuda_kernels) == (["test_e.py", "test_triton_a.py"], ["test_cuda_d.py"])
    assert marked == ["test_b.py", "test_cuda_graphs.py"]
    triton, cuda_kernels, _ = ([Path(path).name for path in found] for found in gpu_stages.gpu_tests(ROOT / "tests"))
    assert {"test_triton_stem.py", "test_triton_batch_norm_act.py", "test_conv_statistics.py"} < set(triton)
    assert {f"test_cuda_{op}.py" for op in ("conv_bn_act", "stem", "head", "add_act", "models")} < set(cuda_kernels)
    assert "test_cuda_on_cpu.py" not in cuda_kernels


def test_pytest_that_is_cut_off_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    monkeypatch.setattr(gpu_stages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    path = tmp_path / "tests" / "test_triton_it.py"
    path.write_text("import time\ndef test_a(): pass\ndef test_b(): assert 0\n")
    assert gpu_stages.tests(tmp_path, gpu_stages.Deadline(60)) == 1
    row = results.read(tmp_path / "tests.json")["pytest"]["kernels"]
    assert row["counts"] == {"PASSED": 1, "FAILED": 1} and row["ended"] == "exit status 1"
    begun = tmp_path / "begun"
    path.write_text(
        f"import time, pathlib\ndef test_a(): pass\n"
        f"def test_b(): pathlib.Path({str(begun)!r}).touch(); time.sleep(60)\n"
    )

    class OutOfTime(subprocess.Popen):  # type: ignore[type-arg]
        """As if the time were over when test_b has begun, however long that took."""

        def communicate(self, input: Any = None, timeout: float | None = None) -> Any:
            while not begun.exists() and self.poll() is None:
                time.sleep(0.05)
            return super().communicate(input, min(timeout or 0.1, 2))

    monkeypatch.setattr(gpu_stages.subprocess, "Popen", OutOfTime)
    assert gpu_stages.tests(tmp_path, gpu_stages.Deadline(60)) == 0
    row = results.read(tmp_path / "tests.json")["pytest"]["kernels"]
    assert row["counts"] == {"PASSED": 1} and row["ended"] == "out of time"


@pytest.mark.parametrize(("errors", "status"), [(0, 0), (3, 1)])
def test_the_sanitizers_summary_is_read(
    errors: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho '========= ERROR SUMMARY: {errors} errors'\nexit {9 if errors else 0}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert gpu_stages.sanitizer(tmp_path, gpu_stages.Deadline(60)) == status
    rows = results.read(tmp_path / "tests.json")["sanitizer"]
    assert rows["memcheck ops at small shapes"]["clean"] == (errors == 0)
    assert rows["racecheck ops at small shapes"]["errors"] == errors
    assert not any("CUDA" in name for name in rows)  # there are no CUDA kernels here
    monkeypatch.setattr(backends, "available", lambda: {"cuda": ""})
    assert gpu_stages.sanitizer(tmp_path, gpu_stages.Deadline(60)) == status
    rows = results.read(tmp_path / "tests.json")["sanitizer"]
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert rows[f"{tool} CUDA ops at small shapes"]["errors"] == errors


# --- the report


def quantiles(p50: float) -> dict[str, float]:
    return timing.summarize([0.9 * p50, p50, 1.1 * p50]).as_dict()


@pytest.fixture
def synthetic(tmp_path: Path) -> Path:
    """Result files of a GPU as the stages write them, with made-up numbers."""
    gpus_seen = [{"name": "NVIDIA H200", "driver_version": "580.1"}]
    versions = {"torch": "2.11.0", "triton": "3.6.0"}
    machine = environment.summary(NO_GPU | {"gpus": gpus_seen, "versions": versions})
    head = {"schema": results.SCHEMA, "machine": machine}

    def mode(rate: float) -> dict[str, Any]:
        return {"status": "timed", "reason": "", "seconds": quantiles(128 / rate), "images_per_second": rate}

    def case(precision: str, batch: int) -> dict[str, Any]:
        return {
            "setting": {"arch": "resnet50", "precision": precision, "batch": batch, "image_size": 224, "seed": 0},
            "contestants": {
                "optimize": {"label": "ours", "ours": True, "call": mode(41000.0), "graph": mode(52000.0)},
                "eager": {"label": "eager", "ours": False, "call": mode(13000.0), "graph": mode(12000.0)},
                "compile": {"label": "c", "ours": False, "call": {"status": "excluded", "reason": "failed: it"}},
            },
            "against": {"eager": {"best": quantiles(4.0)}},
        }

    row = {
        "op": "add_act", "case": "256-56px", "precision": "fp16", "batch": 128, "passed": True, "share": 0.93,
        "seconds": quantiles(1e-4), "plain_seconds": quantiles(2e-4), "floor_seconds": 9.3e-5, "bound": "bytes",
    }  # fmt: skip
    ceilings = {"copy": {"per_second": 4.3e12}, "fp16": {"per_second": 788e12}}
    folder = tmp_path / "results" / "h200"
    cases = {"b": case("bf16", 1), "a": case("fp16", 128), "broken": {"failed": "it did"}}
    results.write(folder / "models.json", head | {"kind": "gpu-models", "cases": cases})
    rows = {"x": row, "y": {**row, "batch": 1}, "z": {"passed": False}}
    results.write(folder / "ops.json", head | {"kind": "gpu-ops", "ceilings": ceilings, "rows": rows})
    models = {"resnet50 fp16": {"error": 1.2e-3, "allowed": 3e-3, "torch": 1.2e-3, "passed": True, "reason": ""}}
    results.write(folder / "correctness.json", head | {"kind": "gpu-correctness", "ops": {}, "models": models})
    results.write(folder / "environment.json", {"schema": results.SCHEMA, "kind": "gpu-environment"})
    return tmp_path


def test_report_of_a_gpu(synthetic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    readme = synthetic / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    arguments = [
        "report",
        "--results",
        f"{synthetic}/results",
        "--readme",
        str(readme),
        "--plots",
        f"{synthetic}/plots",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    assert report.main() == 0
    text = readme.read_text()
    assert "| resnet50 | fp16 | 128 | 52,000 | 13,000 | 4.00× |" in text
    assert text.index("| resnet50 | fp16 | 128 |") < text.index("| resnet50 | bf16 | 1 |")
    assert "NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, nvcc none, commit 0123456789ab" in text
    assert "| add_act | 256-56px | 100.0 | 93.0 | bytes | 93 % | 200.0 |" in text and text.count("| add_act") == 1
    assert "copy 4.30 TB/s" in text and "788 TFLOP/s" in text
    assert "| resnet50 fp16 | 1.2e-03 | 1.2e-03 | 3.0e-03 | right |" in text
    plots = {path.name: path.read_text() for path in (synthetic / "plots").iterdir()}
    assert set(plots) == {"h200-models-fp16.svg", "h200-models-bf16.svg", "h200-ops-fp16-b128.svg"}
    assert "optimize 52,000" in plots["h200-models-fp16.svg"] and "93 %" in plots["h200-ops-fp16-b128.svg"]
    monkeypatch.setattr("sys.argv", [*arguments, "--check"])
    assert report.main() == 0


def test_table_printed_last(synthetic: Path) -> None:
    text = gpu.table(synthetic / "results" / "h200", {"smoke": Outcome("done", seconds=12.0)})
    assert "smoke" in text and "models: 1 of 1 right" in text
    assert "img/s: optimize 52000, eager 13000 (4.00x)" in text
    assert "add_act: 93 % of the floor's speed (median of 2), least 93 % at 256-56px fp16 batch 1" in text
