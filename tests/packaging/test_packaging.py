"""What is installed, from where, and at what cost: the build files, both forms of the archive, the guards, torch.hub.

Each check runs in a process of its own, because this one has long imported everything. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import resnet_fast
from resnet_fast.models import list_models

ROOT = Path(__file__).resolve().parents[2]


def run(
    *args: str | Path, cwd: Path, isolated: bool = False, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Run this Python with args. An environment value of None unsets the variable. No engine is built unless asked."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and "RESNET_FAST_" not in key}
    env["RESNET_FAST_CPU"] = "off"
    env.update({key: value for key, value in environment.items() if value is not None})
    flags = ["-S"] if isolated else []
    return subprocess.run([sys.executable, *flags, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)


def succeed(*args: str | Path, cwd: Path, isolated: bool = False, **environment: str | None) -> str:
    result = run(*args, cwd=cwd, isolated=isolated, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_version_is_the_same_everywhere() -> None:
    assert resnet_fast.__version__ == importlib.metadata.version("resnet_fast")
    assert succeed("setup.py", "--version", cwd=ROOT).split()[-1] == resnet_fast.__version__


def test_setup_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('setup.py must not import torch')\n")
    assert succeed("setup.py", "--version", cwd=ROOT, PYTHONPATH=str(tmp_path)).strip()


def test_a_meaningless_choice_fails_and_says_why() -> None:
    result = run("setup.py", "--version", cwd=ROOT, RESNET_FAST_BUILD="yes")
    assert result.returncode != 0
    assert all(words in result.stderr for words in ["'yes'", "'auto'", "'off'", "'require'", "'keep'"]), result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def packages() -> str:
    """For PYTHONPATH, with -S: what is installed here, of which no .pth file is read, so nothing that is editable."""
    return os.pathsep.join(
        dict.fromkeys(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    )


WHICH_KERNELS = "import kernels; print('kernels:', getattr(kernels, '__file__', None))"


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("how", ["-c", "file", "-m", "pytest", "editable"])
def test_the_folder_kernels_leaves_its_name_to_an_installed_package(
    how: str, installed: bool, tmp_path: Path, packages: str
) -> None:
    """transformers and others import a package called kernels if there is one. A namespace without a file, which the
    folder looks like, is none to them."""
    site, work = tmp_path / "site", tmp_path / "work"
    theirs = site / "kernels" / "__init__.py"
    (theirs.parent if installed else site).mkdir(parents=True)
    if installed:
        theirs.write_text("")
    shutil.copytree(ROOT / "kernels", work / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (work / "which.py").write_text(WHICH_KERNELS)
    (work / "test_which.py").write_text("def test_it():\n    import which\n")
    command = {
        "-c": ("-c", WHICH_KERNELS),
        "file": ("which.py",),
        "-m": ("-m", "which"),
        "pytest": ("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "test_which.py"),
        "editable": ("-c", WHICH_KERNELS),  # whose folder stands behind what is installed
    }[how]
    folders = [str(site), packages, *([str(work)] if how == "editable" else [])]
    output = succeed(
        *command, cwd=site if how == "editable" else work, isolated=True, PYTHONPATH=os.pathsep.join(folders)
    )
    assert f"kernels: {theirs if installed else None}" in output.splitlines()


def test_import_is_cheap(tmp_path: Path) -> None:
    code = """
import gc, json, sys, time
began = time.process_time()  # not the clock: other processes may run
import torch
between, before = time.process_time(), set(sys.modules)
import resnet_fast
share = (time.process_time() - between) / (between - began)
assert gc.isenabled()
print(json.dumps([share, sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""
    runs = [json.loads(succeed("-c", code, cwd=tmp_path)) for _ in range(3)]
    costly = "PIL matplotlib onnx onnxruntime openvino rich safetensors sklearn torchvision triton typer"
    assert not set(costly.split()) & set(runs[0][1])
    # Of torch's own time, about 0.9 s where nothing else runs: what slows the processor slows both.
    assert min(share for share, _ in runs) < 1 / 3, runs


@pytest.mark.parametrize(("choice", "left"), [("keep", True), ("off", False), ("auto", False)])
def test_what_becomes_of_the_module_in_a_checkout(choice: str, left: bool, checkout: Path, tmp_path: Path) -> None:
    """An editable installation deletes a module that it did not build, unless make installs, which has built it."""
    copy = tmp_path / "checkout"
    shutil.copytree(checkout, copy)
    arguments = ("setup.py", "-q", "build_ext", "--inplace")
    succeed(*arguments, cwd=copy, RESNET_FAST_BUILD=choice, CUDACXX="/no/such/nvcc")
    assert bool(list((copy / "resnet_fast").glob("_C.*.so"))) == left
    record = json.loads((copy / "resnet_fast" / "_build_record.json").read_text())
    assert record["built"] == left
    assert left or {"off": "RESNET_FAST_BUILD=off", "auto": "nvcc was not found"}[choice] in record["reason"]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> tuple[set[str], Path]:
    """The names in the source archive, and the wheel that is built from that archive."""
    work = tmp_path_factory.mktemp("archives")
    succeed("setup.py", "-q", "sdist", "--dist-dir", work / "sdist", cwd=checkout)
    (archive,) = (work / "sdist").iterdir()
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(work / "unpacked")
    (unpacked,) = (work / "unpacked").iterdir()

    return names, wheel_of(unpacked, work / "wheel", RESNET_FAST_BUILD="off")


def pip_wheel(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Let pip build a wheel with what is installed here."""
    command = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", out)
    return run(*command, source, cwd=out.parent, **environment)


def wheel_of(source: Path, out: Path, **environment: str) -> Path:
    result = pip_wheel(source, out, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = out.iterdir()
    return wheel


def record_in(wheel: Path) -> dict[str, Any]:
    """What the package in a wheel says of its native build."""
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("resnet_fast/_build_record.json"))


def test_source_archive_is_complete(archives: tuple[set[str], Path]) -> None:
    names, _ = archives
    for name in (
        *("LICENSE", "README.md", "CHANGELOG.md", "Makefile", "constraints.txt", "hubconf.py", "CMakeLists.txt"),
        *("csrc/cpu/binding.cpp", "csrc/cpu/kernels_isa.h", "csrc/cpu/symbols.cmake", "resnet_fast/_cpu.pyi"),
        *("csrc/binding.cpp", "csrc/native_build.py", "csrc/build_backend.py", "csrc/kernels/conv_bn_act_sm90.cuh"),
        *("kernels/gpus.py", "kernels/resources.csv", "kernels/tuned/some-gpu.json", "resnet_fast/kernels/__init__.py"),
        *("resnet_fast/__init__.py", "resnet_fast/_C.pyi", "tests/packaging/test_packaging.py"),
        *(".pre-commit-config.yaml", ".github/workflows/ci.yml"),
    ):
        assert name in names, name
    assert not [name for name in names if name.endswith((".pyc", ".so", "_build_record.json"))]


def test_wheel_is_pure_and_holds_the_package_only(archives: tuple[set[str], Path]) -> None:
    _, wheel = archives
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        assert "resnet-fast = resnet_fast_cli:main" in archive.read(entry_points).decode()
    top = {name.partition("/")[0] for name in names}
    assert top == {"resnet_fast", "resnet_fast_cli.py", entry_points.partition("/")[0]}
    assert not [name for name in names if name.endswith(".so")]
    package = ROOT / "resnet_fast"
    expected = {str(path.relative_to(ROOT)) for kind in ("py", "json") for path in package.rglob(f"*.{kind}")}
    expected |= {f"resnet_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert {*expected, "resnet_fast/py.typed", "resnet_fast/kernels/tuned/some-gpu.json"} <= set(names)
    record = record_in(wheel)
    assert (record["built"], record["reason"]) == (False, "RESNET_FAST_BUILD=off")


@pytest.fixture
def broken_nvcc(program: Callable[[str, str], Path]) -> str:
    """A CUDA compiler that says what is wrong with it."""
    return str(program("nvcc", "echo 'nvcc fatal   : this compiler is broken on purpose' >&2\nexit 1"))


@pytest.mark.parametrize("found", [True, False])
def test_auto_without_a_working_compiler_is_pure_and_says_why(
    checkout: Path, tmp_path: Path, broken_nvcc: str, found: bool
) -> None:
    nvcc = broken_nvcc if found else "/no/such/nvcc"
    wheel = wheel_of(checkout, tmp_path / "wheel", RESNET_FAST_ARCHS="80", CUDACXX=nvcc)
    assert wheel.name.endswith("-py3-none-any.whl")
    record = record_in(wheel)
    assert record["built"] is False
    assert ("nvcc fatal   : this compiler is broken on purpose" if found else "nvcc was not found") in record["reason"]
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


def test_a_module_is_built_once_and_packaged(checkout: Path, tmp_path: Path) -> None:
    copy, calls = tmp_path / "checkout", tmp_path / "calls"
    shutil.copytree(checkout, copy)
    with (copy / "csrc" / "native_build.py").open("a") as file:  # a build that takes no time
        file.write(f"""
def build(out, archs, **options):
    print(out, archs, file=open({str(calls)!r}, "a"))
    remove_module(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "_C.of_now.so").write_text("of this build")
    Record(True, archs=("80",)).write(out)
""")
    wheel = wheel_of(copy, tmp_path / "wheel", RESNET_FAST_BUILD="require", RESNET_FAST_ARCHS="80", CUDACXX="/bin/true")
    assert len(calls.read_text().splitlines()) == 1
    assert not wheel.name.endswith("-any.whl")
    assert record_in(wheel)["built"] is True
    with zipfile.ZipFile(wheel) as archive:
        modules = [name for name in archive.namelist() if name.endswith(".so")]
        assert modules == ["resnet_fast/_C.of_now.so"]
        assert archive.read(modules[0]) == b"of this build"


@pytest.mark.parametrize("found", [True, False])
def test_require_without_a_working_compiler_fails(
    checkout: Path, tmp_path: Path, broken_nvcc: str, found: bool
) -> None:
    variables = {"RESNET_FAST_BUILD": "require", "RESNET_FAST_ARCHS": "80"}
    nvcc = broken_nvcc if found else "/no/such/nvcc"
    result = pip_wheel(checkout, tmp_path / "wheel", CUDACXX=nvcc, **variables)
    assert result.returncode != 0
    said = "nvcc fatal   : this compiler is broken on purpose" if found else "nvcc was not found"
    assert f"RESNET_FAST_BUILD=require: {'nvcc ended' if found else 'no CUDA'}" in result.stdout + result.stderr
    assert said in result.stdout + result.stderr
    assert not (tmp_path / "wheel").exists() or not list((tmp_path / "wheel").iterdir())


def test_hub_works_on_a_checkout_that_is_not_installed(tmp_path: Path, packages: str) -> None:
    code = f"""
import importlib.util, json, sys
import torch
assert importlib.util.find_spec("resnet_fast") is None
model = torch.hub.load({str(ROOT)!r}, "resnet18", source="local", weights=None, num_classes=7)
with torch.inference_mode():
    shape = list(model.eval()(torch.rand(1, 3, 64, 64)).shape)
spec = importlib.util.spec_from_file_location("hubconf", {str(ROOT / "hubconf.py")!r})
hubconf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hubconf)
names = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")]
import resnet_fast, resnet_fast.kernels.gpus
print(json.dumps([names, shape, resnet_fast.__file__, resnet_fast.kernels.gpus.__file__]))
"""
    output = succeed("-W", "ignore", "-c", code, cwd=tmp_path, isolated=True, PYTHONPATH=packages)
    names, shape, package, gpus = json.loads(output.splitlines()[-1])
    assert sorted(names) == sorted(list_models())
    assert shape == [1, 7]
    assert Path(package) == ROOT / "resnet_fast" / "__init__.py"
    assert Path(gpus) == ROOT / "kernels" / "gpus.py"


def python_of(environment: Path, packages: str) -> Path:
    """The Python of a new virtual environment that has all that is installed here except this checkout."""
    venv.create(environment, with_pip=False, symlinks=os.name != "nt")
    paths = {"base": str(environment), "platbase": str(environment)}
    (site,) = {Path(sysconfig.get_path(name, "venv", paths)) for name in ("purelib", "platlib")}
    (site / "packages.pth").write_text(packages.replace(os.pathsep, "\n"))
    return Path(sysconfig.get_path("scripts", "venv", paths)) / Path(sys.executable).name


def test_type_checkers_see_an_editable_installation(checkout: Path, tmp_path: Path, packages: str) -> None:
    """What is right passes, and a keyword that does not exist is an error."""
    copy = tmp_path / "checkout"
    shutil.copytree(checkout, copy)
    python = python_of(tmp_path / "environment", packages)
    pip = ("-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation", "--no-index")
    succeed(*pip, "-e", copy, cwd=tmp_path, RESNET_FAST_BUILD="off")

    user = tmp_path / "user"
    user.mkdir()
    (user / "right.py").write_text(
        "import resnet_fast as rf\n\nprint(rf.optimize(rf.resnet50().eval(), gpu='h100').report())\n"
    )
    (user / "wrong.py").write_text(
        "import resnet_fast as rf\n\nprint(rf.optimize(rf.resnet50().eval(), gbu='h100').report())\n"
    )
    (user / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-torch.*]\nfollow_imports = skip\n")
    (user / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "standard"}))
    for checker, says in (
        (("mypy", "--python-executable"), 'Unexpected keyword argument "gbu"'),
        (("basedpyright", "--pythonpath"), 'No parameter named "gbu"'),
    ):
        result = run("-m", *checker, python, "right.py", "wrong.py", cwd=user)
        errors = [line.strip() for line in result.stdout.splitlines() if re.search(r":\d+\b.*\berror\b", line)]
        assert len(errors) == 1 and "wrong.py" in errors[0] and says in errors[0], result.stdout + result.stderr

    code = "import resnet_fast.kernels.gpus as gpus; print(gpus.__file__)"
    result = subprocess.run([python, "-W", "ignore", "-c", code], cwd=user, capture_output=True, text=True)
    assert Path(result.stdout.strip()).samefile(copy / "kernels" / "gpus.py"), result.stdout + result.stderr
