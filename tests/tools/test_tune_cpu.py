"""Measured choices of the CPU engine: what a table does to layers and networks, and the command that makes one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("resnet_fast._cpu", reason="the CPU engine is not built here (make engine)")

import resnet_fast as rf
from resnet_fast.backends import cpu, cpu_choices
from resnet_fast.cli import app
from resnet_fast.kernels import _tables
from resnet_fast.tuning import cpu as tuner
from tests.ops.cpu.engine import DTYPES, name_of, same_bits

GEOMETRY: Any = ((1, 1), (1, 1), (1, 1), 1)
WITH = {"torch": "t"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder of tables, which is not there yet."""
    monkeypatch.setenv("RESNET_FAST_TUNED", str(tmp_path / "tuned"))
    _tables.forget()
    yield tmp_path / "tuned"
    _tables.forget()


def write(folder: Path, algorithm: str, dtype: torch.dtype = torch.float32, size: int = 8, **changes: Any) -> Path:
    """Write a table that has one choice, for :func:`layer`'s default."""
    given = {"isa": cpu.module().isa(), "dtype": name_of(dtype), "threads": torch.get_num_threads()}
    problem = cpu_choices.Layer(**({**given, "c": 64, "k": 64, "padding": (1, 1)} | changes))
    path = folder / f"{cpu.machine()}.json"
    choices = {cpu_choices.OP: {problem.key(size, size): {"algorithm": algorithm}}}
    _tables.write(path, cpu.machine(), WITH, choices, kind="cpu")
    return path


def layer(c: int = 64, dtype: torch.dtype = torch.float32, **more: Any) -> cpu.Convolution:
    weight = torch.randn(64, c, 3, 3, generator=torch.Generator().manual_seed(1)) / (9 * c) ** 0.5
    return cpu.Convolution(weight, torch.zeros(64), more.pop("geometry", GEOMETRY), dtype, **more)


def images(n: int, dtype: torch.dtype = torch.float32, c: int = 64) -> Tensor:
    return torch.randn(n, c, 8, 8, generator=torch.Generator().manual_seed(2)).to(dtype)


# --- what a table does


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", cpu_choices.ALGORITHMS)
def test_a_choice_is_obeyed_for_its_size(folder: Path, algorithm: str, dtype: torch.dtype) -> None:
    usual = layer(dtype=dtype)
    write(folder, algorithm, dtype)
    chosen = layer(dtype=dtype)
    assert chosen.algorithm(8, 8) == algorithm
    assert chosen.algorithm(16, 16) == usual.algorithm(16, 16)
    forced = layer(dtype=dtype, choices=[(8, 8, algorithm)])
    ours = chosen.run(images(2, dtype), None, False, False)
    assert same_bits(ours, forced.run(images(2, dtype), None, False, False))
    exact = torch.conv2d(images(2, dtype).double(), _weight(dtype).double(), padding=1)
    assert (ours.double() - exact).norm() / exact.norm() < (1e-6 if dtype is torch.float32 else 4 * 2.0**-8)


def _weight(dtype: torch.dtype) -> Tensor:
    return (torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(1)) / 24).to(dtype)


def test_a_plan_obeys_it_and_an_image_has_its_bits_in_any_batch(folder: Path) -> None:
    write(folder, "winograd2")

    def network() -> cpu.Network:
        made = cpu.Network()
        made.output(made.convolution(made.input(64, torch.float32), layer(), None, True), flat=False)
        return made

    ours, x = network(), images(7)
    given = [(x.data_ptr(), x.shape, x.stride())]
    assert "winograd 2x2" in ours._plan.algorithms(given, 1)
    whole = ours.run([x])[0]
    for i in range(7):
        assert same_bits(ours.run([x[i : i + 1]])[0], whole[i : i + 1])


def test_a_network_takes_it(folder: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, padding=1, bias=False), torch.nn.ReLU()).eval()
    x = images(1)
    with rf.backends.use("cpu"), torch.no_grad():
        usual = rf.optimize(model, example_inputs=x)(x)
        write(folder, "direct")
        chosen = rf.optimize(model, example_inputs=x)(x)
    assert not same_bits(usual, chosen), "F(4x4) ran both times"
    torch.testing.assert_close(chosen, usual, rtol=1e-4, atol=1e-4)


def test_f4x4_is_never_taken_against_the_bound(folder: Path) -> None:
    usual = layer(c=32)  # too few channels
    write(folder, "winograd4", c=32)
    chosen = layer(c=32)
    assert chosen.algorithm(8, 8) == usual.algorithm(8, 8) != "winograd4"
    sums = torch.ones(64, 64, 3, 3)  # neighbours' sums do not alternate
    for choices in ((), [(8, 8, "winograd4")]):
        forced = cpu.Convolution(sums, torch.zeros(64), GEOMETRY, torch.float32, choices)
        assert forced.algorithm(8, 8) != "winograd4"
    # It is weighed anew for layers that would not be asked without a table: this one has too many weights.
    many = torch.randn(512, 512, 3, 3) / 68
    assert cpu.Convolution(many, torch.zeros(512), GEOMETRY, torch.float32, ()).algorithm(8, 8) == "winograd2"
    for factor, algorithm in ((1.0, "winograd4"), (0.0, "winograd2")):
        forced = cpu.Convolution(many * factor, torch.zeros(512), GEOMETRY, torch.float32, [(8, 8, "winograd4")])
        assert forced.algorithm(8, 8) == algorithm


@pytest.mark.parametrize(
    "geometry", [((2, 2), (1, 1), (1, 1), 1), ((1, 1), (2, 2), (2, 2), 1), ((1, 1), (0, 0), (1, 1), 1)]
)
def test_other_layers_have_no_choice(folder: Path, geometry: Any) -> None:
    write(folder, "winograd2")
    assert layer(geometry=geometry).algorithm(8, 8) == layer(geometry=geometry, choices=()).algorithm(8, 8)


def test_winograd_is_never_taken_where_it_cannot_be() -> None:
    strided: Any = ((2, 2), (1, 1), (1, 1), 1)
    assert layer(geometry=strided, choices=[(8, 8, "winograd2")]).algorithm(8, 8) == "direct"


@pytest.mark.parametrize(
    "changes", [{"isa": "mmx"}, {"dtype": "bfloat16"}, {"threads": 999}, {"c": 65}, {"k": 65}, {"padding": (0, 0)}]
)
def test_choices_of_something_else_count_for_nothing(folder: Path, changes: dict[str, Any]) -> None:
    write(folder, "direct", **changes)
    assert layer().algorithm(8, 8) == layer(choices=()).algorithm(8, 8) == "winograd4"


def test_info_says_whether_a_table_is_in_use(folder: Path) -> None:
    def said() -> tuple[str, str]:
        found = rf.info()
        table, reason = found.engine["table"], found.engine["table_reason"]
        assert bool(table) != bool(reason) and (table or reason) in str(found)
        return table, reason

    assert said() == ("", f"there is no table of {cpu.machine()} in {folder}")
    path = write(folder, "direct")
    assert said() == (str(path), "")
    isa, threads = cpu.module().isa(), cpu_choices._threads(torch.get_num_threads())
    write(folder, "direct", isa="mmx", threads=1)
    assert said() == ("", f"{path} has choices for 1 thread of mmx, not for {threads} of {isa}")
    path.rename(folder / "cpu-z80.json")
    _tables.forget()
    assert said()[1] == f"there is no table of {cpu.machine()} in {folder}; there is one of cpu-z80"


def test_a_table_of_another_machine_is_not_used(folder: Path) -> None:
    path = write(folder, "direct")
    path.write_text(path.read_text().replace(cpu.machine(), "cpu-z80"))
    _tables.forget()
    with pytest.warns(UserWarning, match="is a table of 'cpu-z80', not of"):
        assert layer().algorithm(8, 8) == "winograd4"
    assert "is a table of 'cpu-z80', not of" in rf.info().engine["table_reason"]


SOUND = "avx2 float32 threads1 8x8 c64 k64 p1x1"
FOUND = {"algorithm": "direct"}
CHOICES: list[dict[str, Any]] = [
    {SOUND: {}}, {SOUND: 3}, {SOUND: {"algorithm": "fft"}}, {SOUND: {"algorithm": ["direct"]}}, {"8x8": FOUND},
    {SOUND.replace("8x8", "99999999999999999999x8"): FOUND}, {SOUND: FOUND, "": FOUND},
]  # fmt: skip
DAMAGED = [
    b"", b"{", b"[]", b"\xff", b"\x80\x04K\x01.", b'{"format": 1, "cpu": "?", "choices": 3}', b"[" * 100_000,
    *(json.dumps({"format": 1, "cpu": "?", "choices": {"convolution": each}}).encode() for each in CHOICES),
]  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED)
def test_a_damaged_table_is_a_warning_for_layers_and_one_line_for_the_command(folder: Path, data: bytes) -> None:
    folder.mkdir()
    path = folder / f"{cpu.machine()}.json"
    path.write_bytes(data.replace(b'"?"', json.dumps(cpu.machine()).encode()))
    with pytest.warns(UserWarning, match="measured choices are not used: .*"):
        assert layer().algorithm(8, 8) == "winograd4"
    assert str(path) in rf.info().engine["table_reason"]
    result = invoke("--arch", "resnet18", "--image-size", "32")
    (line,) = result.output.splitlines()
    assert result.exit_code == 1 and line.startswith("resnet-fast: ") and str(path) in line
    assert path.read_bytes() == data.replace(b'"?"', json.dumps(cpu.machine()).encode())


def test_without_a_home_folder_layers_are_as_they_are_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(_tables, "user_folder", nowhere)
    _tables.forget()
    assert layer().algorithm(8, 8) == "winograd4" and "home" in rf.info().engine["table_reason"]


# --- the command


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["tune", "--device", "cpu", *arguments])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes times meaningless and soon there."""
    monkeypatch.setattr(tuner, "ROUNDS", 1)
    monkeypatch.setattr(tuner, "_MOST", 0)


SMALL = ("--arch", "resnet18", "--image-size", "32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_command_writes_a_table_that_layers_obey(folder: Path, quick: None, dtype: torch.dtype) -> None:
    result = invoke(*SMALL, "--dtype", name_of(dtype), "--json", "-")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    path = folder / f"{cpu.machine()}.json"
    table = cpu_choices.read(path, cpu.machine())
    assert said["table"] == str(path) and rf.info().engine["table"] == str(path)
    assert [each["problem"] for each in said["choices"]] == [
        problem.key(dtype) for problem in tuner.problems(["resnet18"], 32)
    ]
    assert len(table) == 4 and {key: fields["algorithm"] for key, fields in table.items()} == {
        each["problem"]: each["algorithm"] for each in said["choices"]
    }
    for each in said["choices"]:
        assert each["algorithm"] == min(each["seconds"], key=each["seconds"].__getitem__)
        assert {*each["seconds"], *each["refused"]} == {*cpu_choices.ALGORITHMS}
    for problem in tuner.problems(["resnet18"], 32):
        weight = torch.randn(problem.k, problem.c, 3, 3)
        made = cpu.Convolution(weight, torch.zeros(problem.k), GEOMETRY, dtype)
        assert made.algorithm(problem.h, problem.w) == table[problem.key(dtype)]["algorithm"]
    assert "nothing to measure" in invoke(*SMALL, "--dtype", name_of(dtype)).output


def test_what_was_measured_before_stays(folder: Path, quick: None) -> None:
    path = write(folder, "winograd2", size=77)
    assert "4 problems" in invoke(*SMALL, "--dry-run").output and len(cpu_choices.read(path, cpu.machine())) == 1
    assert "4 of 4 problems written" in invoke(*SMALL).output
    assert len(cpu_choices.read(path, cpu.machine())) == 5
    assert "0 problems" in invoke(*SMALL, "--dry-run").output
    assert "4 problems" in invoke(*SMALL, "--dry-run", "--again").output


def test_a_problem_that_the_time_cut_off_is_not_written(folder: Path, quick: None) -> None:
    times = iter([0.0, 0.0, 1.0, 9.0, 9.0])
    wanted = [(problem, torch.float32) for problem in tuner.problems(["resnet18"], 32)]
    (outcome,) = tuner.sweep(wanted, folder / "cpu.json", seconds=5, clock=lambda: next(times))
    assert not outcome.finished and outcome.algorithm == "" and not folder.exists()


def test_a_stopped_command_shows_and_keeps_what_was_measured(
    folder: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, done = tuner._measure, []

    def interrupted(problem: tuner.Problem, *rest: Any) -> tuner.Outcome:
        if done:
            raise KeyboardInterrupt
        done.append(problem.key(torch.float32))
        return measure(problem, *rest)

    monkeypatch.setattr(tuner, "_measure", interrupted)
    result = invoke(*SMALL)
    path = folder / f"{cpu.machine()}.json"
    assert result.exit_code == 130 and done[0] in result.output, result.output
    last = f"resnet-fast: stopped; {path} keeps what was measured, and the same command goes on"
    assert result.output.splitlines()[-1] == last
    assert [*cpu_choices.read(path, cpu.machine())] == done


def test_a_wrong_answer_is_refused(folder: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cpu.Convolution.run

    def broken(self: cpu.Convolution, x: Tensor, *rest: Any) -> Tensor:
        out = run(self, x, *rest)
        return out + (self.algorithm(*x.shape[2:]) == "direct")

    monkeypatch.setattr(cpu.Convolution, "run", broken)
    result = invoke(*SMALL)
    assert result.output.count("direct: ") == 4 and "refused: " in result.output
    found = cpu_choices.read(folder / f"{cpu.machine()}.json", cpu.machine())
    assert len(found) == 4 and all(fields["algorithm"] != "direct" for fields in found.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arch", "resnet51"], "unknown arch 'resnet51'"),
        (["--op", "head"], "--op is for a GPU's kernels"),
        (["--gpu", "h100"], "--gpu is for a GPU's kernels"),
        (["--checked-in"], "--checked-in is for a GPU's kernels"),
        (["--dtype", "float16"], "the CPU engine computes float32 and bfloat16, not float16"),
        (["--dtype", "tf32"], "the CPU engine has no tf32"),
        (["--batch-size", "1", "--batch-size", "2"], "--batch-size may be given once"),
        (["--threads", "0"], "threads"),
        (["--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--device", "cuda", "--threads", "1"], "--threads goes with --device cpu"),
        (["--device", "cuda", "--json", "-"], "--json goes with --device cpu"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code in (1, 2)
    assert said in result.output and "Traceback" not in result.output


def test_another_instruction_set_ignores_the_table(folder: Path) -> None:
    if cpu.module().isa() == "portable":
        pytest.skip("there is no other instruction set here")
    path = write(folder, "direct")
    code = "import resnet_fast as rf; print(rf.info().engine['table_reason'])"
    environment = {**os.environ, "RESNET_FAST_ISA": "portable", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.startswith(f"{path} has choices for ") and said.stdout.endswith(" of portable\n")
