"""``make gpu`` without a GPU: budgets, stages and their commands, result files, the gate for each precision."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    bench_models,
    bench_ops,
    bench_training,
    counters,
    environment,
    gpu,
    prepare,
    process,
    stages,
    summary,
)
from benchmarks.gpu import Run
from benchmarks.stages import Command, Stage
from resnet_fast.benchmarking import results
from resnet_fast.benchmarking.device import CUDA
from resnet_fast.benchmarking.peers import PEERS
from resnet_fast.kernels import gpus
from tests.tools.test_comparison_on_gpu import NO_GPU

ROOT = Path(__file__).resolve().parents[2]
Program = Callable[[str, str], Path]


# --- the whole thing


@pytest.mark.slow
def test_dry_run_does_everything_up_to_the_first_launch(tmp_path: Path) -> None:
    """As on a machine if nothing is installed: the package comes from the overlay alone."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RESNET_FAST_COMMIT")}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path)]
    environment = clean | {"OMP_NUM_THREADS": "1", "RESNET_FAST_COMMIT": "fedcba987654"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "gpu-dry-run"
    written = {path.stem: results.read(path) for path in folder.glob("*.json")}
    assert set(written) == {"environment", "correctness", "ops", "training", "resnet18-float32-b4"}
    assert {data["kind"] for data in written.values()} >= {
        "gpu-environment",
        "gpu-correctness",
        "gpu-ops",
        "gpu-training",
    }
    assert written["ops"]["machine"]["commit"] == "fedcba987654"
    assert all(row["passed"] for row in written["correctness"]["ops"].values())
    rehearsed = written["environment"]["stages"]
    assert {name: stage["status"] for name, stage in rehearsed.items()} == {
        command.row: "done" for command in stages.REHEARSED
    }
    assert "overlay-" in rehearsed["import"]["tail"]  # not the package that the tests themselves run on
    assert "kernels in" in rehearsed["compile"]["tail"] and "all well" in rehearsed["compile"]["tail"]
    assert "  to build _C: nvcc " in done.stdout
    assert "candidates" in rehearsed["tune for training"]["tail"] and "tests collected" in rehearsed["collect"]["tail"]
    for stage in stages.STAGES:
        assert stage.what in done.stdout
    assert "ESTIMATE, not measured" in rehearsed["estimate"]["tail"] or "An estimate" in rehearsed["estimate"]["tail"]
    assert rehearsed["counters"]["tail"].count("would watch, by the estimate for h200: ") == 5
    assert "  carried: " in done.stdout and "compiled kernels" in done.stdout


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert gpu.main() == 1
    assert "--dry-run" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["gpu", "--stages", "smoke,sing"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "'sing' is none of native, smoke, models" in capsys.readouterr().err


def test_the_most_important_stages_come_first() -> None:
    names = {
        when: [stage.name for stage in stages.STAGES if stage.when == when] for when in ("first", "second", "asked")
    }
    assert names["first"] == [
        "smoke", "models", "layers", "cuda", "kernels", "tests", "cudnn", "compiled", "smoke32", "accuracy", "counters",
        "tune",
    ]  # fmt: skip
    assert names["second"][0] == "sanitizer" and names["asked"] == ["native"]
    for when in ("first", "second"):
        assert sum(stage.least for stage in stages.STAGES if stage.when == when) < 0.6
    assert gpu.BUDGET <= 8.5 * 60
    assert {each: stage.name for stage in stages.STAGES for each in stage.judges} == {
        "fp16": "smoke", "bf16": "smoke", "tf32": "smoke32", "fp32": "smoke32",
    }  # fmt: skip
    assert bench_models.FIRST[0] == ("resnet50", "fp16", 128)
    cases = set(bench_models.SETS["all"])
    assert len(cases) == 3 * 4 * 5 == len(bench_models.FIRST) + len(bench_models.OTHERS)
    shares, left = [], 1.0
    for command in next(stage for stage in stages.STAGES if stage.name == "tune").commands:
        shares.append(command.share * left)
        left -= shares[-1]
    assert shares == pytest.approx([0.5] * 2)


def test_batches_128_and_1_have_thirty_rounds() -> None:
    given = argparse.Namespace(case_seconds=1.5, image_size=224, threads=None, busy=None, arch=None)
    found = bench_models.settings_of(bench_models.FIRST, CUDA, ("eager",), given)
    assert {setting.batch: setting.schedule.min_rounds for setting in found} == {128: 30, 1: 30, 32: 7, 256: 7, 8: 7}


def test_peers_have_their_best_settings() -> None:
    compiled = next(stage for stage in stages.STAGES if stage.name == "compiled").commands[0].text
    for name in ("frozen", "compile", "cudagraphs", "eager"):
        assert name in compiled and name in PEERS
    assert PEERS["frozen"].graphs and not PEERS["cudagraphs"].graphs


MAINS = {
    "bench_ops": bench_ops, "bench_models": bench_models, "bench_training": bench_training, "counters": counters
}  # fmt: skip


@pytest.mark.parametrize(
    "command", [c for stage in (*stages.STAGES, stages.WARM) for c in stage.commands], ids=lambda c: c.text[3:60]
)
def test_every_command_is_one_that_users_have(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its arguments are understood; without a GPU that is then what it says."""
    if torch.cuda.is_available():
        pytest.skip("it would run")
    arguments = gpu.arguments(command, Run(tmp_path, 30.0, NO_GPU), 20.0, stages.ALL)
    assert arguments[:2] == [sys.executable, "-m"] and "{" not in " ".join(arguments)
    module = arguments[2].removeprefix("benchmarks.")
    if module == "pytest":
        assert arguments[3:5] == ["-v", "--tb=short"] and "tests" in arguments
    elif module == "resnet_fast":
        from resnet_fast.cli import main

        monkeypatch.setattr("sys.argv", ["resnet-fast", *arguments[3:]])
        if arguments[3] == "roofline":  # that says what it knows without a GPU
            monkeypatch.setattr("resnet_fast.cli.roofline.schedules", lambda *given: ())
            monkeypatch.setattr("resnet_fast.cli.roofline.show", lambda *given: None)
        with pytest.raises(SystemExit) as ended:
            main()
        assert "nothing can be measured here" in capsys.readouterr().err or (arguments[3], ended.value.code) == (
            "roofline",
            0,
        )
    else:
        monkeypatch.setattr("sys.argv", arguments[2:])
        with pytest.raises(SystemExit):
            MAINS[module].main()
        assert "--device cuda: torch sees no CUDA GPU here" in capsys.readouterr().err


def test_a_gpus_folder_is_named_as_its_table_of_launches_is() -> None:
    assert environment.slug(NO_GPU) == "none"
    assert environment.slug({"gpus": [{"name": "NVIDIA H200"}]}) == gpus.normalise("NVIDIA H200") == "h200"


# --- budget and stages


def test_a_stage_gets_its_most_but_never_what_later_ones_need() -> None:
    first, second = Stage("a", "", 0.5, 0.1), Stage("b", "", 0.4, 0.3)
    assert stages.limit(first, (second,), 100, 100) == 50
    assert stages.limit(first, (second,), 100, 60) == 30
    assert stages.limit(first, (second,), 100, 20) == 0
    assert stages.limit(second, (), 100, 20) == 20


class Fake:
    """A run whose stages are lines of Python, by the stage's name; there is a native module in its package."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **code: str) -> None:
        monkeypatch.setattr(environment.shutil, "which", lambda name: None)
        self.folder, self.code = tmp_path, {"warm": "", **code}
        self.run = Run(tmp_path, 30.0, NO_GPU)
        warm = Stage("warm", "", 0.5, 0.0, (self.command("warm", "{dtypes}"),))
        monkeypatch.setattr(gpu, "WARM", warm)

    def command(self, name: str, more: str = "") -> Command:
        return Command(f"-c {shlex.quote(self.code.get(name, '').replace('{', '{{').replace('}', '}}'))} {more}")

    def perform(self, *given: Stage) -> int:
        made = [replace(s, commands=s.commands or (self.command(s.name, "{dtypes}"),)) for s in given]
        return gpu.perform(self.run, tuple(made))

    def statuses(self) -> dict[str, str]:
        data = results.read(self.folder / "environment.json")
        return {name: stage["status"] for name, stage in data["stages"].items()}


SMOKE, TIMED = Stage("smoke", "", 0.5, 0.0, judges=stages.ALL), Stage("models", "", 0.5, 0.0, timed=True)


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
    assert fake.perform(SMOKE, TIMED, Stage("accuracy", "", 0.5, 0.0)) == 1
    assert fake.statuses() == {"smoke": "failed", "models": "skipped", "accuracy": "done"}
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
        ("exit(0)", "fp16,bf16,tf32,fp32", ""),
    ],
)  # fmt: skip
def test_a_wrong_precision_costs_no_other_its_times(
    code: str, told: str | None, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    show = "import sys; open('told', 'w').write(sys.argv[1])"
    fake = Fake(monkeypatch, tmp_path, smoke=code, models=show, warm="")
    assert fake.perform(SMOKE, TIMED) == int("exit(1)" in code or "exit(2)" in code)
    assert (tmp_path / "told").exists() == (told is not None)
    assert fake.statuses()["models"] == ("skipped" if told is None else "done")
    assert told is None or (tmp_path / "told").read_text() == told
    assert fake.run.outcomes["models"].reason == (f"not timed after smoke: {reason}" if reason else "")


def test_commands_are_told_the_precisions_they_may_time(tmp_path: Path) -> None:
    run = Run(tmp_path, 30.0, NO_GPU)
    by_name = {stage.name: stage for stage in stages.STAGES}

    def told(name: str, *right: str) -> list[str]:
        found = [c for c in by_name[name].commands if set(c.precisions) & set(right)]
        return [a[a.index("--dtype") + 1] for c in found for a in [gpu.arguments(c, run, 20.0, right)]]

    assert told("models", "fp16", "fp32") == ["fp16"] and told("models", "bf16") == []
    assert told("networks", "bf16", "fp32") == ["bf16,fp32"] and told("training", "tf32") == []
    assert told("tune", *stages.ALL) == ["fp16"] * 2 and told("tune-training", *stages.ALL) == ["bf16"]
    assert told("smoke", *stages.ALL) == ["fp16,bf16"] and told("smoke32", *stages.ALL) == ["tf32,fp32"]
    assert told("kernels", *stages.ALL) == ["fp16,bf16"] * 2


def archived(path: Path) -> dict[str, str]:
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        return {name: file.read().decode() for name, file in members.items() if file is not None}


def test_results_are_in_one_archive_after_every_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "h200"
    look = "import pathlib, shutil; shutil.copy('h200.tar.gz', 'seen.tar.gz'); pathlib.Path('h200/tuned').mkdir(); "
    fake = Fake(monkeypatch, tmp_path, smoke="", models=f"{look}open('h200/tuned/h200.json', 'w').write('1'); exit(1)")
    fake.run = Run(folder, 30.0, NO_GPU, tmp_path)
    assert fake.perform(SMOKE, TIMED) == 1
    assert "smoke      done" in archived(tmp_path / "seen.tar.gz")["h200/summary.txt"]
    files = archived(tmp_path / "h200.tar.gz")
    assert next(iter(files)) == "h200/summary.txt" and "models     failed" in files["h200/summary.txt"]
    assert set(files) == {"h200/summary.txt", "h200/environment.json", "h200/tuned/h200.json"}
    assert not list(tmp_path.glob(".*"))
    before = (tmp_path / "h200.tar.gz").read_bytes()
    monkeypatch.setattr(tarfile, "open", lambda *given, **options: (_ for _ in ()).throw(OSError("disk full")))
    fake.run.save()  # says so and goes on
    assert (tmp_path / "h200.tar.gz").read_bytes() == before and not list(tmp_path.glob(".*"))


def test_results_are_archived_while_a_stage_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process, "EVERY", 0.2)
    (tmp_path / "h200").mkdir()
    wait = "import os, time; open('h200/models.json', 'w').write('{}')\nwhile not os.path.exists('h200/go'): pass"
    fake = Fake(monkeypatch, tmp_path, models=wait)
    fake.run = Run(tmp_path / "h200", 30.0, NO_GPU, tmp_path)
    pack, seen = gpu.pack, list[set[str]]()

    def packed(results: Path, summary: str, to: Path) -> None:
        pack(results, summary, to)
        seen.append(set(archived(gpu.archive(results))))
        if "h200/models.json" in seen[-1]:
            (results / "go").touch()

    monkeypatch.setattr(gpu, "pack", packed)
    assert fake.perform(Stage("models", "", 0.5, 0.0)) == 0  # which waits for the archive
    assert any("h200/go" not in names and "h200/models.json" in names for names in seen)


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
    """The module is out of the package then, and its record says why; for the sanitizer it is back."""
    package = tmp_path / "resnet_fast"
    package.mkdir()
    module, record = package / "_C.cpython.so", package / "_build_record.json"
    module.write_text("code")
    record.write_text('{"built": true, "reason": ""}')
    show = (
        "import glob, json; open('told', 'w').write(json.load(open('resnet_fast/_build_record.json'))['reason']"
        " if not glob.glob('resnet_fast/_C*.so') else '')"
    )
    fake = Fake(monkeypatch, tmp_path, cuda=code or "", layers=show)
    least = 2.0 if code == "no time" else 0.0
    share = 0.05 if "out of time" in told else 0.4  # of half a minute, in which a Python starts also where others run
    cuda_stage = Stage("cuda", "", share, 0.0) if not least else Stage("cuda", "", 0.0, least)
    status = fake.perform(*([] if code is None else [cuda_stage]), Stage("layers", "", 0.5, 0.0, timed=True))
    assert (tmp_path / "told").read_text() == told and fake.statuses()["layers"] == "done"
    assert status == int("failed" in told)
    assert module.exists() == (told == "")
    fake.perform(Stage("sanitizer", "", 0.5, 0.0))
    assert module.exists() and json.loads(record.read_text()) == {"built": True, "reason": ""}


def test_a_process_out_of_time_ends_with_all_it_started(tmp_path: Path) -> None:
    child = "import time; open('began', 'w'); time.sleep(3); open('survived', 'w')"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    started = process.Process([sys.executable, "-c", parent], tmp_path, os.environ)
    end = time.monotonic() + 120
    while not (tmp_path / "began").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert (tmp_path / "began").exists()
    assert started.wait(0.1) is None
    time.sleep(3.5)
    assert not (tmp_path / "survived").exists()


def test_a_failing_command_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a stage; its end is the worst of theirs, and each has its share of the time."""
    fake = Fake(monkeypatch, tmp_path, first="raise SystemExit(4)", second="open('second', 'w')",
                slow="import time; time.sleep(60)")  # fmt: skip
    slow = replace(fake.command("slow"), share=0.05)
    given = Stage("accuracy", "", 0.5, 0.0, (fake.command("first"), slow, fake.command("second")))
    assert fake.perform(given) == 1 and (tmp_path / "second").exists()
    outcome = fake.run.outcomes["accuracy"]
    assert (outcome.status, outcome.reason) == ("failed", "exit status 4") and outcome.seconds < 50
    assert fake.perform(Stage("accuracy", "", 0.5, 0.0, (slow, fake.command("second")))) == 0
    assert fake.run.outcomes["accuracy"].status == "out of time"


def test_a_command_without_its_packages_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine where the command line of the package has not what it needs only that is missing."""
    fake = Fake(monkeypatch, tmp_path, second="open('second', 'w')")
    given = Stage(
        "accuracy", "", 0.5, 0.0, (replace(fake.command("first"), needs=("no_such",)), fake.command("second"))
    )
    assert fake.perform(given) == 0 and (tmp_path / "second").exists()
    assert "  not run: there is no no_such here\n" in capsys.readouterr().out
    commands = [command for stage in stages.STAGES for command in stage.commands]
    assert all(bool(command.needs) == ("-m resnet_fast " in command.text) for command in commands)


def test_no_time_left_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = Fake(monkeypatch, tmp_path)
    assert fake.perform(Stage("smoke", "", 1.0, 0.2), Stage("tests", "", 0.5, 0.95)) == 0
    assert fake.statuses() == {"smoke": "skipped", "tests": "done"}
    assert fake.run.outcomes["smoke"].reason == "no time left"
    assert "\nnot run for lack of time: smoke\n" in gpu.table(tmp_path, fake.run.outcomes) + "\n"


def test_nothing_is_timed_before_it_was_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stage between two that judge has the precisions of the first; one without any is left out, and why is said."""
    half, full = (
        replace(SMOKE, name=name, judges=each) for name, each in (("smoke", ("fp16",)), ("smoke32", ("tf32",)))
    )
    show = "import sys; open('told', 'a').write(sys.argv[1] + ';')"
    fake = Fake(monkeypatch, tmp_path, models=show, smoke="", smoke32="")
    only = Stage("only", "", 0.5, 0.0, (replace(fake.command("models", "{dtypes}"), precisions=("tf32",)),), timed=True)
    assert (
        fake.perform(
            half, TIMED, only, full, replace(TIMED, name="later", commands=(fake.command("models", "{dtypes}"),))
        )
        == 0
    )
    assert (tmp_path / "told").read_text() == "fp16,bf16,fp32;fp16,bf16,tf32,fp32;"
    assert fake.run.outcomes["only"] == gpu.Outcome("skipped", "nothing that it times has been found right")
    wrong = judged({"tf32": 1}, "exit(1)", tf32=[False])
    fake = Fake(monkeypatch, tmp_path, models=show, smoke=wrong)
    assert fake.perform(replace(SMOKE, judges=("tf32",)), only) == 1
    assert fake.run.outcomes["only"].reason == "not timed after smoke: tf32 (0 of 1 right)"


def test_the_archive_can_be_the_one_file_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = Fake(monkeypatch, tmp_path, smoke="")
    fake.run = Run(tmp_path / "h200", 30.0, NO_GPU, tmp_path, into=tmp_path / "back")
    assert fake.perform(SMOKE) == 0
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["h200.tar.gz"]
    assert not (tmp_path / "h200.tar.gz").exists()
    assert str(tmp_path / "back" / "h200.tar.gz") in archived(tmp_path / "back" / "h200.tar.gz")["h200/summary.txt"]


def test_a_carried_cache_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "CACHE", tmp_path / "triton-cache")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    run = Run(tmp_path, 30.0, NO_GPU, tmp_path)
    assert "TRITON_CACHE_DIR" not in gpu.surroundings(tmp_path, "", tmp_path)
    assert gpu.carried(run).startswith("carried: no resnet_fast._C") and gpu.carried(run).endswith(
        "; no compiled kernels"
    )
    (tmp_path / "triton-cache" / "ABC").mkdir(parents=True)
    (tmp_path / "triton-cache" / "ABC" / "_boxes.cubin").touch()
    (tmp_path / "resnet_fast").mkdir()
    (tmp_path / "resnet_fast" / "_C.cpython-312.so").touch()
    assert gpu.surroundings(tmp_path, "", tmp_path)["TRITON_CACHE_DIR"] == str(tmp_path / "triton-cache")
    assert gpu.carried(run) == "carried: _C.cpython-312.so; 1 compiled kernels"
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert gpu.surroundings(tmp_path, "", tmp_path)["TRITON_CACHE_DIR"] == "/elsewhere"
    assert prepare.CACHE.parent == gpu.BUILD


# --- counters


NCU = """==PROF== Connected to process 7
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum","lts__t_bytes.sum"
"","","ns","byte","byte"
"0","_boxes","61,024","115,343,360","n/a"
"""


def test_counters_are_read_and_their_lack_is_said(program: Program, tmp_path: Path) -> None:
    assert counters.read(NCU) == {"gpu__time_duration.sum ns": 61024.0, "dram__bytes.sum byte": 115343360.0}
    assert counters.read("==ERROR== no\n") == {}
    (tmp_path / "page").write_text(NCU)
    assert counters.watch(str(program("ncu", f"cat {tmp_path}/page")), 3, "_boxes", 10.0)["counters"] == counters.read(
        NCU
    )
    denied = program("ncu", "echo '==ERROR== ERR_NVGPUCTRPERM - The user does not have permission'; exit 1")
    assert counters.watch(str(denied), 3, "_boxes", 10.0) == {
        "none": "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"
    }
    assert counters.watch(str(program("ncu", "exit 3")), 3, "_boxes", 10.0) == {
        "none": "ncu gave no counters, exit status 3"
    }
    assert counters.watch(str(program("ncu", "sleep 60")), 3, "_boxes", 1.0) == {"none": "out of time"}


def test_counters_watch_the_launches_that_lose_most(tmp_path: Path) -> None:
    h200 = gpus.known("h200")
    launched = counters.launched(h200)
    assert counters.measured(tmp_path, h200) == []
    rows = [
        {"parts": list(parts), "floor_seconds": 1e-5, "measured_seconds": 1e-5 + 1e-6 * (number % 9)}
        for number, (parts, _) in enumerate(launched)
    ]
    rows[4]["measured_seconds"] = None
    found = {"schedules": [{"name": "per-conv", "rows": []}, {"name": "planned", "rows": rows}]}
    (tmp_path / "layers-resnet50-fp16-b128.json").write_text(json.dumps(found))
    places = counters.measured(tmp_path, h200)
    assert len(places) == 5 == len({launched[place][1] for place in places}) and places[0] % 9 == 8 and 4 not in places


# --- environment


def test_environment_reads_what_nvidia_smi_and_nvcc_say(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "NVIDIA H200, 580.1, 143771 MiB, 345 MHz, 1980 MHz, 3201 MHz, 3201 MHz, 700 W, 30, Default, P0"
    program("nvidia-smi", f"echo '{said}'")
    nvcc = program("nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    monkeypatch.setenv("PATH", str(nvcc.parent), prepend=os.pathsep)
    monkeypatch.setenv("RESNET_FAST_COMMIT", "abc")
    found = environment.report()
    assert found["gpus"][0]["name"] == "NVIDIA H200" and found["gpus"][0]["clocks.max.sm"] == "1980 MHz"
    assert found["nvcc"] == "13.0.88" and found["commit"] == "abc"
    short = environment.summary(found)
    assert (short["gpu"], short["driver"]) == ("NVIDIA H200", "580.1")
    assert short["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    json.dumps(found)


def test_clocks_are_sampled_while_something_runs(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = program("nvidia-smi", "echo '1980, 3201, 650.1, 51'\necho '1755, 3201, 699.9, 60'\nsleep 60")
    monkeypatch.setenv("PATH", str(smi.parent), prepend=os.pathsep)
    with environment.Clocks() as clocks:
        time.sleep(0.5)
    assert clocks.seen["clocks.sm"] == {"min": 1755.0, "median": 1980.0, "max": 1980.0, "samples": 2}
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with environment.Clocks() as none:
        pass
    assert none.seen == {}


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
    monkeypatch.setattr(gpu, "ROOT", folder)
    monkeypatch.setattr(environment, "ROOT", folder)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)  # there is pybind11
    return folder


def build(tmp_path: Path) -> tuple[str, str]:
    """How the build ended, and why."""
    end, reason, _ = gpu.native(Run(tmp_path, 100.0, NO_GPU, tmp_path / "overlay"), 60.0)
    return end, reason


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

    monkeypatch.setattr(subprocess, "run", run)
    assert build(tmp_path) == ("done", "") and len(seen) == 1
    package = tmp_path / "overlay" / "resnet_fast"
    assert {path.name for path in package.iterdir()} == {"_C.new.so", "_C.pyi", "_build_record.json"}
    row = results.read(tmp_path / "native.json")["build"]["resnet_fast._C"]
    assert row["built"] and row["archs"] == ["90a"] and "$ cmake" in row["tail"] and row["status"] == 0
    line = "built with CUDA 13.0.88 for 90a in 93.0 s, without CUTLASS's kernels"
    assert line in capsys.readouterr().out and f"resnet_fast._C: {line}" in gpu.table(tmp_path, {})
    # Built, but it does not load here: wrong, and said.
    monkeypatch.setattr(subprocess, "run", lambda command, **options: real(
        [sys.executable, "-c", "print('does not load: no symbol')"] if "-c" in command else command, **options
    ))  # fmt: skip
    assert build(tmp_path) == ("failed", "FAILED: does not load: no symbol")
    assert "FAILED: does not load: no symbol" in capsys.readouterr().out


def test_a_build_that_fails_leaves_no_module_and_says_why(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = json.dumps({**RECORD, "built": False, "reason": "ninja ended with status 1: x.cu(3): error: no\nmore"})
    building(checkout, f"(out / RECORD).write_text({left!r}); sys.exit(1)")
    assert build(tmp_path) == ("failed", "FAILED: ninja ended with status 1: x.cu(3): error: no")
    assert [path.name for path in (tmp_path / "overlay" / "resnet_fast").iterdir()] == ["_C.pyi"]
    row = results.read(tmp_path / "native.json")["build"]["resnet_fast._C"]
    assert not row["built"] and row["status"] == 1 and row["reason"].endswith("more")
    assert "  FAILED: ninja ended with status 1: x.cu(3): error: no\n" in capsys.readouterr().out
    # A record of the CPU engine alone says nothing of this module.
    building(checkout, """(out / RECORD).write_text('{"cpu": {"built": true}}'); sys.exit(1)""")
    assert build(tmp_path) == ("failed", "FAILED: the build left no record")


def test_a_build_that_is_cut_off_is_not_taken_for_an_earlier_one(checkout: Path, tmp_path: Path) -> None:
    building(checkout, "(out / '_C.new.so').write_text('code'); import time; time.sleep(60)")
    run = Run(tmp_path, 100.0, NO_GPU, tmp_path / "overlay")
    run.add("native", "build", "resnet_fast._C", {"line": "built with CUDA 12.0"})
    assert "built with CUDA 12.0" in gpu.table(tmp_path, {})
    assert gpu.native(run, 1.0)[0] == "out of time"
    assert "built" not in gpu.table(tmp_path, {})
    assert [path.name for path in run.cwd.glob("resnet_fast/_C*")] == ["_C.pyi"]


@pytest.mark.parametrize("tool", ["nvcc", "cmake", "ninja"])
def test_without_a_tool_nothing_is_built_and_that_is_no_failure(
    tool: str, checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    building(checkout, "raise SystemExit('never')", missing=tool)
    assert build(tmp_path) == ("done", "")
    assert f"not built: there is no {tool} here" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "overlay" / "resnet_fast").iterdir()] == ["_C.pyi"]


def test_the_real_build_has_what_the_stage_uses() -> None:
    found = environment.module_at("csrc/native_build.py")
    assert found.RECORD == "_build_record.json" and callable(found.remove_module)
    nvcc = found.find_nvcc()
    assert nvcc is None or Path(nvcc).is_file()
    assert found.find_tool("no-such-tool") is None


# --- pytest and the sanitizer


def test_outcomes_are_counted_with_and_without_xdist() -> None:
    text = (
        "tests/test_a.py::test_x[1] PASSED [ 10%]\ntests/test_a.py::test_y SKIPPED (needs it) [ 20%]\nnoise PASSED\n"
        "[gw3] [ 30%] FAILED tests/test_b.py::test_z[fp16-(1, 2)] \n[gw0] [ 35%] PASSED tests/test_b.py::test_w\n"
    )
    assert summary.outcomes(text) == {"PASSED": 2, "SKIPPED": 1, "FAILED": 1}


def test_gpu_tests_are_found_by_their_marks() -> None:
    found = {marks: gpu.files_with(marks, ROOT, os.environ) for marks in ("triton", "cuda")}
    shared = {f"tests/ops/kernels/test_{op}.py" for op in ("conv_bn_act", "stem", "head", "add_act")}
    assert shared < set(found["triton"])
    assert {"tests/ops/test_conv_statistics.py", "tests/caffe/test_on_triton.py"} < set(found["triton"])
    assert shared < set(found["cuda"])
    assert "tests/models/test_on_cuda.py" in found["cuda"]
    others = ("tests/tools", "tests/emulator", "tests/packaging")
    assert not any(path.startswith(others) for paths in found.values() for path in paths)


def test_pytest_that_is_cut_off_still_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = Fake(monkeypatch, tmp_path)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = triton\n")
    path, head = tmp_path / "tests" / "test_it.py", "import pathlib, pytest, time\npytestmark = pytest.mark.triton\n"
    given = Stage("tests", "", 0.9, 0.0, (stages.pytest_command("kernels", "triton"),))

    def row() -> dict[str, Any]:
        found: dict[str, Any] = results.read(tmp_path / "tests.json")["pytest"]["kernels"]
        return found

    path.write_text(f"{head}def test_a(): pass\ndef test_b(): assert 0\n")
    assert fake.perform(given) == 1 and fake.statuses() == {"tests": "failed"}
    assert row()["counts"] == {"PASSED": 1, "FAILED": 1} and row()["ended"] == "exit status 1"
    begun = tmp_path / "begun"
    path.write_text(f"{head}def test_a(): pass\ndef test_b(): pathlib.Path({str(begun)!r}).touch(); time.sleep(60)\n")

    def until_begun(self: process.Process, seconds: float, meanwhile: Any = None) -> int | None:
        """As if the time were over when test_b has begun, however long that took."""
        while not begun.exists() and self._process.poll() is None:
            time.sleep(0.05)
        self.end()
        return None

    monkeypatch.setattr(process.Process, "wait", until_begun)
    assert fake.perform(given) == 0 and fake.statuses() == {"tests": "done"}
    assert row()["counts"] == {"PASSED": 1} and row()["ended"] == "out of time"
    fails = f"{head}def test_a(): assert 0\ndef test_b(): pathlib.Path({str(begun)!r}).touch(); time.sleep(60)\n"
    path.write_text(fails)
    begun.unlink()
    assert fake.perform(given) == 1 and row()["counts"] == {"FAILED": 1}


@pytest.mark.parametrize(("errors", "status"), [(0, 0), (3, 1)])
def test_the_sanitizers_summary_is_read(
    errors: int, status: int, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch, tmp_path)
    said = f"echo '========= ERROR SUMMARY: {errors} errors'"
    sanitizer = program("compute-sanitizer", f"{said}\nexit {9 if errors else 0}")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: str(sanitizer) if name == sanitizer.name else None)
    monkeypatch.setattr(gpu, "files_with", lambda marks, cwd, env: [f"tests/{marks}.py"])
    given = Stage("sanitizer", "", 0.9, 0.0)
    assert gpu.perform(fake.run, (given,)) == status
    rows = results.read(tmp_path / "tests.json")["sanitizer"]
    assert rows["memcheck ops at small shapes"]["clean"] == (errors == 0)
    assert rows["racecheck ops at small shapes"]["errors"] == errors and "memcheck tests/triton.py" in rows
    assert not any("CUDA" in name or "cuda" in name for name in rows)  # there are no CUDA kernels here
    (tmp_path / "resnet_fast").mkdir()
    (tmp_path / "resnet_fast" / "_C.so").touch()
    assert gpu.perform(fake.run, (given,)) == status
    rows = results.read(tmp_path / "tests.json")["sanitizer"]
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert rows[f"{tool} CUDA ops at small shapes"]["errors"] == errors
    assert rows["memcheck tests/cuda.py"]["clean"] == (errors == 0)
