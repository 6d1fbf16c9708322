"""The module of the CPU engine: when it is built and when it is not, what the record and ``rf.info()`` say of that, and
which instruction set it chooses. Where a test needs a build it pretends one, except those of ``built``, which run what
the installation of this checkout has compiled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import resnet_fast as rf
from resnet_fast.backends import cpu

from .test_native_build import native_build
from .test_packaging import pip_wheel, record_in, run, succeed, wheel_of

ROOT = Path(__file__).resolve().parents[2]
Program = Callable[[str, str], Path]
BROKEN = "echo 'cpu.cpp:1:2: error: this compiler is broken on purpose' >&2\nexit 1"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, program: Program) -> Path:
    """A C++ compiler, alone on PATH, that is never run."""
    for name in ("CXX", "RESNET_FAST_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RESNET_FAST_BUILD", "off")
    found = program("c++", "exit 9")
    monkeypatch.setenv("PATH", str(found.parent))
    return found


# --- whether to build


@pytest.mark.parametrize(
    ("choice", "plan"),
    [
        ("", native_build.Plan("")),
        ("auto", native_build.Plan("")),
        ("require", native_build.Plan("", strict=True)),
        ("off", native_build.Plan("RESNET_FAST_CPU=off")),
    ],
)
def test_plan(choice: str, plan: object, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_FAST_CPU", choice)
    assert native_build.engine_plan() == plan


def test_a_meaningless_choice(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_FAST_CPU", "keep")
    with pytest.raises(native_build.BuildError, match=r"RESNET_FAST_CPU is 'keep'; .* 'auto', 'off' or 'require'$"):
        native_build.engine_plan()
    result = run("setup.py", "--version", cwd=ROOT, RESNET_FAST_CPU="yes")
    assert result.returncode != 0 and "RESNET_FAST_CPU is 'yes'" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("choice", ["auto", "require"])
def test_without_a_compiler(choice: str, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNET_FAST_CPU", choice)
    compiler.unlink()
    plan = native_build.engine_plan()
    assert plan.reason.startswith("no C++ compiler was found (no c++, g++ or clang++ on PATH); install GCC")
    assert plan.strict == (choice == "require")
    monkeypatch.setenv("CXX", "/no/such/g++ -m64")
    assert "(CXX is '/no/such/g++ -m64')" in native_build.engine_plan().reason


def test_without_pythons_headers(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build.sysconfig, "get_path", lambda name: f"/no/such/{name}")
    assert native_build.engine_plan().reason.startswith("/no/such/include/Python.h is missing: install this Python's")


@pytest.mark.parametrize("name", ["c++", "g++", "clang++"])
def test_the_compilers_that_are_looked_for(
    name: str, compiler: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.unlink()
    program(name, "")
    assert native_build.find_cxx() == [name]
    monkeypatch.setenv("CXX", f"{program('ccache', '')} g++")
    assert native_build.find_cxx() == [str(compiler.parent / "ccache"), "g++"]


def test_what_pip_must_install(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def packages(editable: bool = False) -> set[str]:
        return {each.split(">")[0].split("=")[0] for each in native_build.requirements(editable)}

    monkeypatch.setattr(native_build, "engine_is_current", lambda folder: True)
    assert packages() == {"pybind11", "cmake", "ninja"} and packages(editable=True) == set()
    monkeypatch.setattr(native_build, "engine_is_current", lambda folder: False)
    assert packages() == packages(editable=True) == {"pybind11", "cmake", "ninja"}
    for variables in ({"RESNET_FAST_CPU": "off"}, {"CXX": "/no/such/compiler"}):
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        assert packages() == set()


# --- the record of both modules


def test_each_module_keeps_to_its_half_of_the_record(tmp_path: Path) -> None:
    record = tmp_path / native_build.RECORD
    native_build.EngineRecord(True, isas=("portable",)).write(tmp_path)
    assert "built" not in native_build.read_record(tmp_path)  # nothing is known of _C
    native_build.Record(False, "no nvcc").write(tmp_path)
    native_build.EngineRecord(False, "no compiler").write(tmp_path)
    found = json.loads(record.read_text())
    assert (found["built"], found["reason"]) == (False, "no nvcc")
    assert (found["cpu"]["built"], found["cpu"]["reason"]) == (False, "no compiler")
    native_build.Record(True, archs=("80",)).write(tmp_path)
    assert native_build.read_record(tmp_path)["cpu"]["reason"] == "no compiler"
    native_build.remove_module(tmp_path)
    assert list(native_build.read_record(tmp_path)) == ["cpu"]
    native_build.remove_module(tmp_path, native_build.ENGINE)
    assert not record.exists()


@pytest.mark.parametrize("left", ['{"built": true, "archs": ["80"]}', "[1]", "no JSON", ""])
def test_records_of_earlier_builds_are_read(left: str, tmp_path: Path) -> None:
    (tmp_path / native_build.RECORD).write_text(left)
    assert not native_build.engine_is_current(tmp_path)
    native_build.EngineRecord(False, "off").write(tmp_path)
    found = native_build.read_record(tmp_path)
    assert found["cpu"]["reason"] == "off" and found.get("archs") == (["80"] if "80" in left else None)


def test_a_module_of_other_sources_is_not_current(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_build, "ROOT", tmp_path)
    (tmp_path / "csrc" / "cpu" / "kernels").mkdir(parents=True)
    for name in ("CMakeLists.txt", "csrc/compiler.h", "csrc/cpu/a.cpp", "csrc/cpu/kernels/b.h"):
        (tmp_path / name).write_text("1")
    out = tmp_path / "out"
    native_build.EngineRecord(True, sources=native_build.fingerprint()).write(out)
    assert not native_build.engine_is_current(out)  # the file is gone
    (out / "_cpu.cpython-311-x86_64-linux-gnu.so").touch()
    assert native_build.engine_is_current(out)
    for name in ("CMakeLists.txt", "csrc/compiler.h", "csrc/cpu/a.cpp", "csrc/cpu/kernels/b.h"):
        (tmp_path / name).write_text("2")
        assert not native_build.engine_is_current(out), name
        (tmp_path / name).write_text("1")
    (tmp_path / "csrc/cpu/new.cpp").touch()
    assert not native_build.engine_is_current(out)
    (tmp_path / "csrc/cpu/new.cpp").unlink()
    assert native_build.engine_is_current(out)
    monkeypatch.setattr(native_build.sysconfig, "get_config_var", lambda name: ".cpython-399.so")
    assert not native_build.engine_is_current(out)


# --- through setup.py and pip


def test_a_compiler_that_fails_is_quoted(compiler: Path, program: Program, tmp_path: Path) -> None:
    program("c++", BROKEN)
    program("cmake", "echo cmake version 9.9")
    program("ninja", "")
    out = tmp_path / "out"
    out.mkdir()
    (out / "_cpu.cpython-311-x86_64-linux-gnu.so").touch()
    native_build.Record(True).write(out)
    assert native_build.main(["--module", "_cpu", "--out", str(out)]) == 1
    assert [path.name for path in out.iterdir()] == [native_build.RECORD]
    record = native_build.read_record(out)
    assert record["built"] is True and record["cpu"]["built"] is False
    assert record["cpu"]["reason"] == "c++ ended with status 1: cpu.cpp:1:2: error: this compiler is broken on purpose"


@pytest.mark.parametrize("found", [True, False])
def test_auto_is_pure_and_says_why(checkout: Path, tmp_path: Path, program: Program, found: bool) -> None:
    broken = str(program("c++", BROKEN)) if found else "/no/such/c++"
    wheel = wheel_of(checkout, tmp_path / "wheel", RESNET_FAST_BUILD="off", RESNET_FAST_CPU="auto", CXX=broken)
    assert wheel.name.endswith("-py3-none-any.whl")
    record = record_in(wheel)["cpu"]
    said = "error: this compiler is broken on purpose" if found else "no C++ compiler was found (CXX is '/no/such/c++')"
    assert record["built"] is False and said in record["reason"]
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(site)
    told = succeed("-m", "resnet_fast", "info", cwd=site, PYTHONPATH=str(site))
    (line,) = (line for line in told.splitlines() if line.startswith("engine"))
    assert "resnet_fast._cpu is not built: " in line and said in line


@pytest.mark.parametrize("found", [True, False])
def test_require_fails_in_the_compilers_words(checkout: Path, tmp_path: Path, program: Program, found: bool) -> None:
    broken = str(program("c++", BROKEN)) if found else "/no/such/c++"
    variables = {"RESNET_FAST_BUILD": "off", "RESNET_FAST_CPU": "require", "CXX": broken}
    result = pip_wheel(checkout, tmp_path / "wheel", **variables)
    assert result.returncode != 0
    said = "this compiler is broken on purpose" if found else "no C++ compiler was found"
    assert f"RESNET_FAST_CPU=require: {'c++ ended with status 1' if found else said}" in result.stdout + result.stderr
    assert said in result.stdout + result.stderr
    assert not (tmp_path / "wheel").exists() or not list((tmp_path / "wheel").iterdir())


PRETENDED = """
def build_engine(out, *arguments, **options):
    print("built", file=open({calls!r}, "a"))
    remove_module(out, ENGINE)
    out.mkdir(parents=True, exist_ok=True)
    (out / ("_cpu" + sysconfig.get_config_var("EXT_SUFFIX"))).write_text("of this build")
    EngineRecord(True, sources=fingerprint()).write(out)
"""


@pytest.fixture
def pretending(checkout: Path, tmp_path: Path) -> tuple[Path, Callable[[], int]]:
    """A copy of the checkout whose engine takes no time to build, and how often it was built."""
    copy, calls = tmp_path / "checkout", tmp_path / "calls"
    shutil.copytree(checkout, copy)
    with (copy / "csrc" / "native_build.py").open("a") as file:
        file.write(PRETENDED.format(calls=str(calls)))
    return copy, lambda: len(calls.read_text().splitlines()) if calls.exists() else 0


def test_the_wheel_carries_the_engine(pretending: tuple[Path, Callable[[], int]], tmp_path: Path) -> None:
    copy, built = pretending
    variables = {"RESNET_FAST_CPU": "auto", "CXX": "/bin/true", "CUDACXX": "/no/such/nvcc"}
    wheel = wheel_of(copy, tmp_path / "wheel", **variables)
    assert built() == 1
    assert not wheel.name.endswith("-any.whl") and f"-cp{sys.version_info[0]}{sys.version_info[1]}-" in wheel.name
    record = record_in(wheel)
    assert record["cpu"]["built"] is True and record["built"] is False and "nvcc was not found" in record["reason"]
    with zipfile.ZipFile(wheel) as archive:
        (module,) = (name for name in archive.namelist() if name.endswith(".so"))
        assert module.startswith("resnet_fast/_cpu.") and archive.read(module) == b"of this build"
        assert "resnet_fast/_cpu.pyi" in archive.namelist()


def test_an_editable_installation_builds_what_has_changed(pretending: tuple[Path, Callable[[], int]]) -> None:
    copy, built = pretending
    package = copy / "resnet_fast"

    def install(choice: str) -> bool:
        arguments = ("setup.py", "-q", "build_ext", "--inplace")
        succeed(*arguments, cwd=copy, RESNET_FAST_BUILD="keep", RESNET_FAST_CPU=choice, CXX="/bin/true")
        return bool(native_build.modules(package, native_build.ENGINE))

    assert install("auto") and built() == 1
    assert install("auto") and install("require") and built() == 1
    (copy / "csrc" / "cpu" / "cpu.cpp").write_text("// changed")
    assert install("auto") and built() == 2
    assert native_build.modules(package), "the module _C, which is kept, is another matter"
    assert not install("off") and built() == 2
    assert native_build.read_record(package)["cpu"]["reason"] == "RESNET_FAST_CPU=off"
    assert native_build.read_record(package)["built"] is True


SOURCE = "#include <string>\n#include <vector>\nnamespace resnet_fast::cpu::avx2 {{\n{}\n}}\n"
KEEP = "void push(std::vector<T>& all, const T& one) {{ all.push_back(one); all.insert(all.begin(), 3, one); }}"


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("namespace { int twice(int x) { return 2 * x; } }\nint four(int x) { return twice(twice(x)); }", ""),
        (f"struct T {{ int x; std::string name; }};\n{KEEP.format()}", ""),  # an instance for a type of its own
        ("inline int twice(int x) { return 2 * x; }\nint (*pointer())(int) { return twice; }", ""),
        (f"using T = std::string;\n{KEEP.format()}", "_ZNSt6vectorI"),
        ("int f(); int x = f();", "_GLOBAL__"),
    ],
)
def test_code_for_one_instruction_set_stays_with_it(code: str, wrong: str, tmp_path: Path) -> None:
    pytest.importorskip("cmake")
    compiler, nm = native_build.find_cxx(), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("no C++ compiler or no nm here")
    (tmp_path / "a.cpp").write_text(SOURCE.format(code))
    subprocess.run([*compiler, "-std=c++20", "-O3", "-c", "a.cpp", "-o", "a.o"], cwd=tmp_path, check=True)
    script = ROOT / "csrc" / "cpu" / "symbols.cmake"
    found = run("-m", "cmake", f"-DNM={nm}", "-DISA=avx2", "-DOBJECT=a.o", "-P", script, cwd=tmp_path)
    assert (found.returncode != 0) == bool(wrong), found.stderr
    assert not wrong or (wrong in found.stderr and "isa_avx2.cpp defines what machines without" in found.stderr)


# --- what the package says of it


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The loader as in a new process."""
    cpu._loaded.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    cpu._loaded.cache_clear()


@pytest.mark.parametrize(
    ("left", "why"),
    [
        ({}, "this copy was not installed by setup.py (pip install -e ., or make engine)"),
        (
            {"built": True, "archs": ["80"]},
            "this copy was not installed by setup.py (pip install -e ., or make engine)",
        ),
        ({"cpu": "?"}, "this copy was not installed by setup.py (pip install -e ., or make engine)"),
        ({"cpu": {"built": True}}, "it was, but for another Python, or the file is gone (install again)"),
        ({"cpu": {"built": False, "reason": "RESNET_FAST_CPU=off"}}, "RESNET_FAST_CPU=off"),
        ({"cpu": {"built": False}}, "the build gave no reason"),
        ({"cpu": {"built": False, "reason": "c++ ended\nx.cpp(3): error: no\n"}}, "c++ ended"),
    ],
)
def test_why_there_is_none(left: dict[str, Any], why: str, loader: pytest.MonkeyPatch) -> None:
    loader.setattr(cpu.importlib.util, "find_spec", lambda name: None)
    loader.setattr(cpu, "record", lambda: left)
    assert cpu.unavailable() == f"resnet_fast._cpu is not built: {why}"
    with pytest.raises(RuntimeError, match="is not built"):
        cpu.module()
    found = rf.info()
    assert found.engine == {"built": False, "reason": cpu.load_error()}
    assert f"engine       resnet_fast._cpu is not built: {why}" in str(found)


def _no_such_isa() -> str:
    raise ValueError("RESNET_FAST_ISA is 'mmx'; it must be")


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (ImportError("undefined symbol: f"), "resnet_fast._cpu does not load: ImportError: undefined symbol: f"),
        (SimpleNamespace(build_info=lambda: {}), "resnet_fast._cpu was built from an older or newer csrc/"),
        (SimpleNamespace(build_info=lambda: {"interface": 1}, isa=_no_such_isa), "RESNET_FAST_ISA is 'mmx'"),
    ],
)
def test_a_module_that_is_of_no_use(module: Any, said: str, loader: pytest.MonkeyPatch) -> None:
    def load(name: str) -> ModuleType:
        if isinstance(module, Exception):
            raise module
        return module  # type: ignore[no-any-return]

    loader.setattr(cpu, "_INTERFACE", 1)
    loader.setattr(cpu.importlib.util, "find_spec", lambda name: SimpleNamespace())
    loader.setattr(cpu.importlib, "import_module", load)
    assert cpu.unavailable().startswith(said) and rf.info().engine["reason"].startswith(said)


# --- what this checkout's module says of the machine


@pytest.fixture
def built() -> Any:
    if cpu.unavailable():
        pytest.skip(cpu.unavailable())
    return cpu.module()


def _python(code: str, *under: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code on the module alone, without torch; ``under`` another program."""
    code = f"import resnet_fast._cpu as engine; {code}"
    code = (
        f"import sys, types; sys.modules['resnet_fast'] = p = types.ModuleType('p'); p.__path__ = [sys.argv[1]]; {code}"
    )
    env = {name: value for name, value in os.environ.items() if name != "RESNET_FAST_ISA"} | environment
    command = [*under, str(Path(sys.executable).resolve()), "-c", code, str(Path(rf.__file__).parent)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_the_module_needs_no_torch_and_says_what_it_is(built: Any) -> None:
    said = _python("print(engine.build_info(), 'torch' in sys.modules)").stdout
    assert said == f"{built.build_info()} False\n"
    info = built.build_info()
    assert info["isas"][0] == "portable" and info["cxx_standard"] >= 202002 and info["compiler"]
    found = rf.info()
    assert found.engine["isa"] == built.isa() and found.engine["isas"] == info["isas"]
    assert f"resnet_fast._cpu, {built.isa()}" in str(found) and info["compiler"] in str(found)


def test_caches_are_those_of_a_processor(built: Any) -> None:
    caches = built.caches()
    assert 4 << 10 <= caches["l1d"] <= 1 << 20 and caches["l1d"] <= caches["l2"] <= 1 << 28
    assert caches["l3"] == 0 or caches["l2"] <= caches["l3"] <= 1 << 32
    assert caches["l3_threads"] >= 1


def test_features_are_those_that_the_system_lists(built: Any) -> None:
    listed = Path("/proc/cpuinfo")
    if "avx2" not in built.build_info()["isas"] or not listed.exists():
        pytest.skip("no list of an x86 processor's features here")
    flags = set(listed.read_text().partition("flags")[2].partition("\n")[0].split())
    needed = {
        "avx2": "avx2", "fma": "fma", "f16c": "f16c", "avx_vnni": "avx_vnni", "avx512_bf16": "avx512_bf16",
        "avx512": "avx512f avx512bw avx512dq avx512vl", "avx512_vnni": "avx512_vnni",
        "amx_bf16": "amx_tile amx_bf16", "amx_int8": "amx_tile amx_int8",
    }  # fmt: skip
    assert built.features(of_machine=True) == {name: set(each.split()) <= flags for name, each in needed.items()}


X86 = {"avx2": True, "fma": True, "avx512": True}
ISAS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
TILES = {"avx512_vnni": True, "avx512_bf16": True, "amx_bf16": True, "amx_int8": True}


@pytest.mark.parametrize(
    ("features", "isa"),
    [
        (X86, "avx512"),
        (X86 | {"avx512_vnni": True}, "avx512_vnni"),
        (X86 | {"avx512_vnni": True, "avx512_bf16": True}, "avx512_bf16"),
        (X86 | TILES, "amx"),
        (X86 | TILES | {"amx_int8": False}, "avx512_bf16"),  # as no processor has, nor the next three
        (X86 | TILES | {"avx512_bf16": False}, "avx512_vnni"),
        (TILES, "portable"),
        (X86 | {"avx512_bf16": True}, "avx512"),
        (X86 | {"avx512": False, "avx512_vnni": True, "avx512_bf16": True}, "avx2"),
        (X86 | {"avx2": False}, "portable"),  # and AVX-512, as no processor has
        (X86 | {"fma": False}, "portable"),
        ({"avx2": True, "fma": True}, "avx2"),
        ({"avx512_bf16": True, "avx512_vnni": True}, "portable"),
        ({}, "portable"),
    ],
)
def test_the_instruction_set_of_a_machine(features: dict[str, bool], isa: str, built: Any) -> None:
    if "avx2" not in built.build_info()["isas"]:
        isa = "portable"
    assert built.choose_isa(features) == isa
    for index, wanted in enumerate(ISAS):
        if ISAS.index(isa) >= index:
            assert built.choose_isa(features, wanted) == wanted
        else:
            with pytest.raises(
                ValueError, match=rf"RESNET_FAST_ISA is '{wanted}', which this (processor|build) does not"
            ):
                built.choose_isa(features, wanted)


def test_the_variable_lowers_the_instruction_set(built: Any) -> None:
    best = built.choose_isa(built.features(of_machine=True))
    isas = built.build_info()["isas"]
    for isa in isas[: isas.index(best) + 1]:
        assert _python("print(engine.isa())", RESNET_FAST_ISA=isa).stdout == f"{isa}\n"
    said = _python("print(engine.isa(), *engine.features().values())", RESNET_FAST_ISA="portable").stdout
    assert said == "portable" + 9 * " False" + "\n"
    if best.startswith("avx512"):
        said = _python("print(*(name for name, there in engine.features().items() if there))", RESNET_FAST_ISA="avx2")
        assert {"avx2", "fma"} <= set(said.stdout.split()) <= {"avx2", "fma", "f16c", "avx_vnni"}
    said = _python(
        "import os; os.environ['RESNET_FAST_ISA'] = ''; print(engine.isa())", RESNET_FAST_ISA="portable"
    ).stdout
    assert said == f"{best}\n"  # read at the first call, not at the import
    failed = _python("engine.isa()", RESNET_FAST_ISA="AVX2")
    known = ", ".join(f"'{isa}'" for isa in ISAS)
    assert f"ValueError: RESNET_FAST_ISA is 'AVX2'; it must be one of {known}, or empty for the best" in failed.stderr


def test_info_says_that_it_was_lowered(built: Any, tmp_path: Path) -> None:
    best = built.choose_isa(built.features(of_machine=True))
    if best == "portable":
        pytest.skip("nothing lower than what runs here")
    told = succeed("-m", "resnet_fast", "info", cwd=tmp_path, RESNET_FAST_ISA="portable")
    assert f"engine       resnet_fast._cpu, portable, lowered by RESNET_FAST_ISA from {best} (built for" in told


# A convolution of 13x9 pixels by each algorithm, and whether it is what Python's own sums are.
CONVOLUTION = """
import array, random
random.seed(0)
x, weight = ([random.gauss(0, 1) for _ in range(n)] for n in (13 * 9 * 16, 17 * 16 * 9))
x, weight, bias = array.array("f", x), array.array("f", weight), array.array("f", [0.5] * 17)
layer = engine.Convolution(weight.buffer_info()[0], bias.buffer_info()[0], 17, 16, 1, [3, 3], [1, 1], [1, 1], [1, 1])
for algorithm in ("direct", "winograd2", "winograd4"):
    out, errors = array.array("f", [float("nan")] * (13 * 9 * 17)), []
    layer.run(x.buffer_info()[0], 1, 13, 9, 0, out.buffer_info()[0], False, False, 2, algorithm)
    for p, q, k in ((0, 0, 0), (12, 8, 16), (5, 3, 7), (7, 0, 2), (11, 8, 16)):
        right = bias[k] + sum(
            x[((p + r - 1) * 9 + q + s - 1) * 16 + c] * weight[((k * 16 + c) * 3 + r) * 3 + s]
            for r in range(3) for s in range(3) for c in range(16) if 0 <= p + r - 1 < 13 and 0 <= q + s - 1 < 9)
        errors.append(abs(out[(p * 9 + q) * 17 + k] - right))
    print(all(error < 1e-4 for error in errors))
"""


@pytest.mark.parametrize(("processor", "isa"), [("Nehalem", "portable"), ("Haswell", "avx2")])
def test_an_emulated_processor(processor: str, isa: str, built: Any) -> None:
    """QEMU's own processor refuses every instruction that it is not to have, wherever in the module one were left."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None or "avx2" not in built.build_info()["isas"]:
        pytest.skip("needs qemu-x86_64 (package qemu-user) and an x86 module")
    ran = _python(f"print(engine.isa())\n{CONVOLUTION}", emulator, "-cpu", processor)
    assert ran.returncode == 0 and ran.stdout.split() == [isa, "True", "True", "True"], ran.stdout + ran.stderr
