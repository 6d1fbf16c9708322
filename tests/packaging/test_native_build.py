"""csrc/native_build.py: what is built for which machine, and what is said if nothing is. No kernel is compiled here;
test_packaging.py goes through pip, `make native` through the compiler."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _import() -> ModuleType:
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "native_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


native_build = _import()
Program = Callable[[str, str], Path]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, program: Program) -> Callable[..., None]:
    """Sets what plan() sees: whether there is nvcc, the GPUs' capabilities (None: no GPU) and the variables."""

    def set_up(nvcc: bool = True, gpus: list[str] | None = None, **variables: str) -> None:
        for name in ("BUILD", "ARCHS", "SM90", "CUTLASS"):
            monkeypatch.delenv(f"RESNET_FAST_{name}", raising=False)
        monkeypatch.setenv("RESNET_FAST_CPU", "off")
        for name, value in variables.items():
            monkeypatch.setenv(f"RESNET_FAST_{name}", value)
        monkeypatch.setenv("CUDACXX", str(program("nvcc", "exit 0")) if nvcc else "/no/such/nvcc")
        smi = program("nvidia-smi", "exit 9" if gpus is None else "\n".join(f"echo {each}" for each in gpus))
        monkeypatch.setenv("PATH", str(smi.parent), prepend=os.pathsep)

    return set_up


# --- which architectures


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ("8.0", "80"), ("8.6", "86"), ("8.7", "86"), ("8.9", "89"), ("9.0", "90a"), ("10.0", "100a"), ("12.0", "120a"),
        ("10.3", "80"), ("12.1", "80"), ("11.0", "80"),  # which compile the PTX of 80
        ("7.5", None), ("6.1", None),
    ],
)  # fmt: skip
def test_arch_of_a_gpu(capability: str, arch: str | None) -> None:
    assert native_build.arch_of(capability) == arch


@pytest.mark.parametrize("text", ["80;90a", "90a, 80", " 80 90a ", "90a;80;80"])
def test_archs_are_a_list_in_order(text: str) -> None:
    assert native_build.parse_archs(text, "X") == "80;90a"


@pytest.mark.parametrize("text", ["75", "sm_80", "90", "80;70"])
def test_unknown_arch(text: str) -> None:
    with pytest.raises(native_build.BuildError, match=r"X names '\w+'; it may name 80, 86, 89, 90a, 100a, 120a"):
        native_build.parse_archs(text, "X")


# --- what pip is to do


KEPT = native_build.Plan("RESNET_FAST_BUILD=keep; `make native` builds it", keep=True)


@pytest.mark.parametrize(
    ("given", "plan"),
    [
        ({"gpus": ["9.0", "8.0", "9.0"]}, native_build.Plan("", "80;90a")),
        ({"ARCHS": "90a 80", "SM90": "ci"}, native_build.Plan("", "80;90a", "ci")),
        ({"BUILD": "require"}, native_build.Plan("", "", None, strict=True)),  # without a GPU for all
        ({"gpus": ["9.0"], "BUILD": "off"}, native_build.Plan("RESNET_FAST_BUILD=off")),
        ({"gpus": ["9.0"], "BUILD": "keep"}, KEPT),
    ],
)
def test_plan(given: dict[str, Any], plan: object, machine: Callable[..., None]) -> None:
    machine(**given)
    assert native_build.plan() == plan


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, ["no GPU", "RESNET_FAST_ARCHS"]),
        ({"gpus": ["7.5"]}, ["7.5"]),
        ({"nvcc": False, "gpus": ["9.0"], "BUILD": "auto"}, ["nvcc was not found", "/no/such/nvcc"]),
        ({"nvcc": False, "gpus": ["9.0"], "BUILD": ""}, ["nvcc was not found", "/no/such/nvcc"]),
        ({"nvcc": False, "BUILD": "require"}, ["nvcc was not found"]),
    ],
)
def test_why_nothing_can_be_built(given: dict[str, Any], said: list[str], machine: Callable[..., None]) -> None:
    """An error to come if a build is required."""
    machine(**given)
    plan = native_build.plan()
    assert all(words in plan.reason for words in said) and plan.strict == (given.get("BUILD") == "require")


def test_a_gpu_too_new_for_the_compiler_gets_the_oldest_code(machine: Callable[..., None], program: Program) -> None:
    machine(gpus=["12.0", "9.0"])
    program("nvcc", "echo sm_80; echo sm_90")
    assert native_build.plan().archs == "80;90a"
    program("nvcc", "echo sm_80; echo sm_90; echo sm_120")
    assert native_build.plan().archs == "90a;120a"
    program("nvcc", "exit 1")  # one that does not say
    assert native_build.plan().archs == "90a;120a"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"BUILD": "yes"}, "RESNET_FAST_BUILD is 'yes'.*'auto', 'off', 'require' or 'keep'"),
        ({"ARCHS": "75"}, "RESNET_FAST_ARCHS names '75'"),
        ({"SM90": "some"}, "RESNET_FAST_SM90 is 'some'.*'all', 'ci' or 'none'"),
    ],
)
def test_meaningless_variables(machine: Callable[..., None], variables: dict[str, str], said: str) -> None:
    machine(**variables)
    with pytest.raises(native_build.BuildError, match=said):
        native_build.plan()


def test_what_pip_must_install(machine: Callable[..., None]) -> None:
    def packages(**given: object) -> set[str]:
        machine(**given)
        return {requirement.split(">")[0].split("=")[0] for requirement in native_build.requirements()}

    assert packages(BUILD="off") == set()
    assert packages() == set()  # no GPU
    assert packages(nvcc=False, BUILD="require") == set()
    assert packages(ARCHS="80;90a") - {"ninja"} == {"pybind11", "cmake", "nvidia-cutlass"}
    assert packages(gpus=["8.6"]) - {"ninja"} == {"pybind11", "cmake"}
    assert packages(ARCHS="80;90a", CUTLASS="/somewhere") - {"ninja"} == {"pybind11", "cmake"}


# --- builds that fail


def test_a_failed_build_leaves_nothing_of_an_earlier_one(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cmake")
    pytest.importorskip("ninja")
    monkeypatch.setenv("CUDACXX", str(program("nvcc", "echo 'nvcc fatal   : out of order' >&2; exit 3")))
    out = tmp_path / "out"
    out.mkdir()
    for name in ("_C.cpython-311-x86_64-linux-gnu.so", "_C.abi3.so", "other.so"):
        (out / name).touch()
    assert native_build.main(["--out", str(out), "--archs", "80"]) == 1
    assert sorted(path.name for path in out.iterdir()) == ["_build_record.json", "other.so"]
    record = json.loads((out / "_build_record.json").read_text())
    assert record["built"] is False
    assert record["reason"] == "nvcc ended with status 3: nvcc fatal   : out of order"
    assert "nvcc fatal   : out of order" in capsys.readouterr().err


def test_a_silent_compiler_is_named(tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = program("nvcc", "exit 5")
    monkeypatch.setenv("CUDACXX", str(nvcc))
    with pytest.raises(native_build.BuildError, match=rf"nvcc ended with status 5: {nvcc} printed nothing"):
        native_build.build(tmp_path / "out")


def test_missing_tools_are_named(tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", str(program("nvcc", "exit 0")))
    monkeypatch.setattr(native_build, "find_tool", lambda *_: None)
    with pytest.raises(native_build.BuildError, match=r"cmake 3\.26 or newer was not found; .* pip install -U cmake`"):
        native_build.build(tmp_path / "out")


def test_the_first_tool_that_is_new_enough(program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = program("cmake", "echo cmake version 3.22.1")
    beside = tmp_path / "beside"
    beside.mkdir()
    monkeypatch.setattr(native_build.sysconfig, "get_path", lambda _: str(beside))
    monkeypatch.setenv("PATH", str(old.parent))
    assert native_build.find_tool("cmake") == str(old)
    assert native_build.find_tool("cmake", (3, 26)) is None
    new = program("cmake.new", "echo cmake version 3.31.6").rename(beside / "cmake")
    assert native_build.find_tool("cmake", (3, 26)) == str(new)
    old.write_text("#!/bin/sh\necho cmake version 4.0.2\n")
    assert native_build.find_tool("cmake", (3, 26)) == str(old)


def test_a_compiler_that_cannot_be_started_is_a_failed_build(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = program("nvcc", "")
    nvcc.write_bytes(b"\x7fELF nothing")
    monkeypatch.setenv("CUDACXX", str(nvcc))
    with pytest.raises(native_build.BuildError, match="Exec format error"):
        native_build.build(tmp_path / "out")
    assert not list((tmp_path / "out").glob("_C*"))


def test_the_command_takes_the_variables(
    tmp_path: Path, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(ARCHS="80 90a", SM90="ci")
    asked = []
    monkeypatch.setattr(native_build, "build", lambda *arguments: asked.append(arguments))
    assert native_build.main(["--out", str(tmp_path)]) == 0
    assert native_build.main(["--out", str(tmp_path), "--archs", "86", "--sm90", "none"]) == 0
    assert [(arguments[1], arguments[4]) for arguments in asked] == [("80;90a", "ci"), ("86", "none")]
    machine(SM90="some")
    assert native_build.main(["--out", str(tmp_path)]) == 1
    assert "RESNET_FAST_SM90 is 'some'" in json.loads((tmp_path / native_build.RECORD).read_text())["reason"]


@pytest.mark.parametrize(
    ("lines", "heart"),
    [
        (["[1/2] x", "FAILED: a.o", "a.cu(7): error: no such", "1 error detected"], "a.cu(7): error: no such"),
        (["-- fine", "CMake Error at CMakeLists.txt:1", "  words"], "CMake Error at CMakeLists.txt:1"),
        (["fine", "nvcc fatal   : bad"], "nvcc fatal   : bad"),
        (["only", "words"], "only"),
    ],
)
def test_the_heart_of_a_failure(lines: list[str], heart: str) -> None:
    assert native_build._heart(lines).splitlines()[0] == heart


def test_a_long_failure_is_cut() -> None:
    assert len(native_build._heart(["error: " + "x" * 10000])) < 4000
