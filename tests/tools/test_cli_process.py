"""The command line as a process: help without torch, and what Ctrl-C and SIGTERM leave."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from resnet_fast import models
from resnet_fast.benchmarking import compare
from resnet_fast.cli import classify, common, convert
from tests.command_line import run

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = ["bench", "classify", "convert", "demo", "info", "models", "predict", "roofline", "serve", "train", "tune",
            "validate"]  # fmt: skip


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)


# --- the start


@pytest.mark.parametrize(
    "arguments",
    [(), ("--help",), ("-h",), ("--version",), ("-V",), ("clasify",), ("--verison",)]
    + [(command, "--help") for command in COMMANDS]
    + [
        ("classify", "--topk", "many"),
        ("train", "imagenet"),
        ("train", "residual", "-h"),
        ("bench", "--dtype", "int8"),
    ],
    ids=lambda each: " ".join(each) or "nothing",
)
def test_help_and_mistyped_arguments_need_no_torch(arguments: tuple[str, ...]) -> None:
    heavy = {"PIL", "matplotlib", "onnxruntime", "openvino", "sklearn", "torch"}
    ask = f"sys.exit(str(found) if (found := {heavy} & sys.modules.keys()) else 0)"
    code = f"import sys, resnet_fast_cli\ntry: resnet_fast_cli.main()\nfinally: {ask}"
    done = python("-c", code, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout or done.stderr).strip()


def test_completion() -> None:
    code = "import resnet_fast_cli; resnet_fast_cli.main()"
    asked = {
        "_RESNET_FAST_COMPLETE": "complete_bash",
        "COMP_WORDS": "resnet-fast train imagenet --dty",
        "COMP_CWORD": "3",
    }
    assert python("-c", code, env={**os.environ, **asked}).stdout.split() == ["--dtype"]


@pytest.mark.parametrize("module", ["resnet_fast", "resnet_fast.cli"])
@pytest.mark.parametrize(
    ("arguments", "says"), [("--version", "resnet-fast 0."), ("tune -h", "resnet-fast tune [OPTIONS]")]
)
def test_started_as_a_module(module: str, arguments: str, says: str) -> None:
    done = python("-X", "importtime", "-m", module, *arguments.split())
    assert done.returncode == 0 and says in done.stdout, done.stderr
    assert re.search(r"\bresnet_fast\.cli\b", done.stderr) and not re.search(r"\btorch\b", done.stderr)


def test_everywhere_else_all_is_imported() -> None:
    """That registers the ops, which exported programs need. The command line has the same names, when it asks."""
    ask = "import resnet_fast as rf; print(*(getattr(rf, name) for name in rf.__all__), sep='\\n')"
    eager = f"import resnet_fast, sys; assert 'resnet_fast.ops' in sys.modules; {ask}"
    lazy = f"import resnet_fast_cli, resnet_fast, sys; assert 'torch' not in sys.modules; {ask}"
    shown = [re.sub(r" at 0x\w+", "", python("-c", code).stdout) for code in (eager, lazy)]
    assert shown[0] == shown[1] and len(shown[0].splitlines()) > 15
    done = python("-c", "import resnet_fast_cli, resnet_fast as rf; rf.resnet55")
    assert "AttributeError: module 'resnet_fast' has no attribute 'resnet55'" in done.stderr


# --- the end


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def stopped(*arguments: str | Path) -> str:
    """The one line of a command that is interrupted."""
    found = run(*arguments)
    found.failed(code=130)
    return found.err.strip().removeprefix("resnet-fast: ")


def test_stopped_commands_say_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, image = tmp_path / "weights.pth", tmp_path / "image.png"
    torch.save(models.resnet18(num_classes=2).state_dict(), weights)
    Image.new("RGB", (40, 40)).save(image)
    again = "the same command starts again"

    table, plot = tmp_path / "table.json", tmp_path / "plot.png"
    monkeypatch.setattr(compare, "compare", interrupt)
    assert stopped("bench", "-a", "resnet18") == f"stopped; {again}"
    assert (
        stopped("bench", "--json", table, "--plot", plot) == f"stopped before {table} and {plot} were written; {again}"
    )
    assert not table.exists() and not plot.exists()

    monkeypatch.setattr(classify, "_run", interrupt)
    assert stopped("classify", image, "-a", "resnet18", "-w", weights) == f"stopped; {again}"

    target = tmp_path / "target.safetensors"
    target.write_bytes(b"of before")
    monkeypatch.setattr(convert, "_write_tensors", interrupt)
    assert stopped("convert", weights, target) == f"stopped before {target} was written; {again}"
    assert target.read_bytes() == b"of before"

    def write_and_stop(path: Path, *_: Any) -> None:
        path.write_bytes(b"of now, in full")
        interrupt()

    monkeypatch.setattr(convert, "_write_tensors", write_and_stop)
    assert stopped("convert", weights, target) == f"stopped; {target} was written; {again}"


def test_a_second_command_knows_nothing_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "compare", interrupt)
    assert "table.json" in stopped("bench", "--json", tmp_path / "table.json")
    assert stopped("bench") == "stopped; the same command starts again"


@pytest.mark.parametrize("resume", [False, True])
def test_a_training_says_where_it_goes_on(resume: bool, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    assert str(path) in common.training_stopped(path, resume)
    assert "before the first checkpoint" in common.training_stopped(path, resume)
    path.write_bytes(b"")
    assert common.training_stopped(path, resume).endswith(f" continues from {path}")
    assert ("--resume" in common.training_stopped(path, resume)) != resume


def test_an_interrupt_that_was_dropped_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def dropped(*_: Any, progress: Callable[[str, float], None], **__: Any) -> None:
        with contextlib.suppress(KeyboardInterrupt):  # as C++ code that clears every error does
            common.interrupt(signal.SIGINT, None)
        progress("timing", 0.5)
        raise AssertionError("it went on")

    monkeypatch.setattr(compare, "compare", dropped)
    assert stopped("bench") == "stopped; the same command starts again"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(("number", "status"), [("SIGINT", 7), ("SIGTERM", -15)])
def test_a_forked_process_leaves_ctrl_c_to_its_parent(number: str, status: int) -> None:
    """A terminal sends it to all of them, and each would show a traceback."""
    code = f"""
import resnet_fast_cli, resnet_fast.cli, os, signal
resnet_fast.cli.handle_signals()
child = os.fork()
if child == 0:
    os.kill(os.getpid(), signal.{number})
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = python("-c", code)
    assert (done.stdout, done.stderr) == (f"{status}\n", "")


def test_what_a_shell_ignores_stays_ignored() -> None:
    code = """
import resnet_fast_cli, resnet_fast.cli, os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
resnet_fast.cli.handle_signals()
os.kill(os.getpid(), signal.SIGINT)
print("here")
"""
    assert python("-c", code).stdout == "here\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_that_an_import_turns_into_an_error(number: int, status: int) -> None:
    """As "cannot load module more than once per process" of an import that was interrupted."""

    def load() -> None:
        try:
            common.interrupt(number, None)
        except KeyboardInterrupt as error:
            raise ImportError("cannot load module") from error

    with pytest.raises(common.Stopped) as stopped, common.stoppable():
        load()
    assert stopped.value.status == status
    with pytest.raises(ImportError), common.stoppable():  # nobody stopped this one
        raise ImportError("no such module")


class Training:
    """``train imagenet`` in a process group of its own, as a terminal starts it."""

    def __init__(self, data: Path, out: Path, *further: str) -> None:
        arguments = (
            "train", "imagenet", "--data", data, "--out", out, "--arch", "resnet18", "--epochs", "50", "-b", "4",
            "--image-size", "32", "--workers", "2", "--checkpoint-every", "1", "--device", "cpu", "--threads", "1",
        )  # fmt: skip
        code = "import resnet_fast_cli; resnet_fast_cli.main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments), *further],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def end(self, number: int, group: bool) -> tuple[str, str]:
        (os.killpg if group else os.kill)(self.process.pid, number)
        try:
            return self.process.communicate(timeout=120)
        finally:
            self.process.kill()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups to send signals to")
def test_a_stopped_training_goes_on(tmp_path: Path) -> None:
    """With reading processes, which get Ctrl-C as well, and leave the word to the first one."""
    for part, count in (("train", 12), ("val", 4)):
        for number in range(count):
            folder = tmp_path / "data" / part / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (9 * number, 50, 90)).save(folder / f"{number}.png")
    out = tmp_path / "out"
    path = out / "checkpoint.safetensors"

    first = Training(tmp_path / "data", out)
    first.wait_for(path.exists)
    output, said = first.end(signal.SIGINT, group=True)
    assert first.process.returncode == 130, (first.process.returncode, output, said)
    assert said == f"resnet-fast: stopped; the same command with --resume continues from {path}\n"

    before = path.stat().st_mtime_ns
    second = Training(tmp_path / "data", out, "--resume")
    second.wait_for(lambda: path.stat().st_mtime_ns != before)
    output, said = second.end(signal.SIGTERM, group=True)
    assert second.process.returncode == 143, (second.process.returncode, output, said)
    assert said == f"resnet-fast: stopped; the same command continues from {path}\n"
    assert "; resumed in epoch " in output
    assert {each.name for each in out.iterdir()} <= {path.name, "metrics.csv"}  # no temporary file
