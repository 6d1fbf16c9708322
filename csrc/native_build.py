"""Runs CMake on this checkout: what to build here and whether it can be, the build itself, and a record of it.

Standard library only, and no torch: setup.py, the build backend, ``make engine``, ``make native`` and ``make gpu``
share it. There are two modules, each with a plan of its own: ``_C``, the CUDA kernels, and ``_cpu``, the CPU engine.
How a file is compiled is not said here but in CMakeLists.txt.

    python csrc/native_build.py --out FOLDER [--archs "80;90a"] [--jobs N] [--cutlass FOLDER] [--sm90 all|ci|none]
    python csrc/native_build.py --module _cpu --out FOLDER [--jobs N] [--sanitize address,undefined]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = "_build_record.json"
ARCHS = ("80", "86", "89", "90a", "100a", "120a")
CHOICES = ("auto", "off", "require", "keep")
ENGINE_CHOICES = ("auto", "off", "require")
SUBSETS = ("all", "ci", "none")
CMAKE = (3, 26)  # CMakeLists.txt's minimum
KERNELS, ENGINE = "_C", "_cpu"  # the modules


class BuildError(Exception):
    """Why there is no module, in words: the compiler's own where it ran."""


@dataclass(frozen=True)
class Record:
    """What became of ``_C``, kept beside the package in _build_record.json; see ``resnet_fast.info()``.

    Attributes:
        built: whether there is a module. reason: why not, "" if there is one.
        archs: with machine code in the module. ptx: the one with PTX, which newer GPUs compile.
        cuda: the compiler's version. sm90: which of the kernels made with CUTLASS are in: all, ci, none.
        seconds: that the build took.
    """

    built: bool
    reason: str = ""
    archs: tuple[str, ...] = ()
    ptx: str = ""
    cuda: str = ""
    sm90: str = "none"
    seconds: float = 0.0

    def write(self, folder: Path) -> None:
        _write_record(folder, {**_engine_half(read_record(folder)), **asdict(self)})


@dataclass(frozen=True)
class EngineRecord:
    """What became of ``_cpu``: the entry "cpu" of the same file.

    Attributes:
        built: whether there is a module. reason: why not, "" if there is one.
        compiler: as "GNU 12.2.0". isas: the instruction sets in the module, lowest first.
        sources: what it was built from, as :func:`fingerprint`. seconds: that the build took.
    """

    built: bool
    reason: str = ""
    compiler: str = ""
    isas: tuple[str, ...] = ()
    sources: str = ""
    seconds: float = 0.0

    def write(self, folder: Path) -> None:
        _write_record(folder, {**read_record(folder), "cpu": asdict(self)})


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record in a folder; {} if there is none that can be read."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _engine_half(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name == "cpu"}


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{RECORD}.new"
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / RECORD)


@dataclass(frozen=True)
class Plan:
    """What pip is to do about a module. ``reason``: why nothing is tried; "" if a build is. ``archs``: for
    CMakeLists.txt, where "" means all that the compiler knows. ``strict``: a failure fails the installation.
    ``keep``: a module that is in the checkout stays there."""

    reason: str
    archs: str = ""
    sm90: str | None = None
    strict: bool = False
    keep: bool = False


# --- what there is


def find_tool(name: str, least: tuple[int, int] = (0, 0)) -> str | None:
    """The program of this name in at least this version: on PATH, where pip puts what a build requires, or beside this
    Python, whose environment need not be on PATH."""
    for path in (shutil.which(name), shutil.which(name, path=sysconfig.get_path("scripts"))):
        if path and (least == (0, 0) or _version(path) >= least):
            return path
    return None


def _version(program: str) -> tuple[int, int]:
    """Return what ``program --version`` says, (0, 0) if nothing."""
    try:
        output = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return 0, 0
    found = re.search(r"(\d+)\.(\d+)", output)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def find_nvcc() -> str | None:
    """CUDA's compiler: ``CUDACXX``, on PATH, in ``CUDA_HOME`` or ``CUDA_PATH``, or where it is usually installed."""
    given = os.environ.get("CUDACXX")
    if given:
        return shutil.which(given)
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc")] + [shutil.which(os.path.join(each, "bin", "nvcc")) for each in folders if each]
    return next(filter(None, candidates), None)


def find_cxx() -> list[str] | None:
    """The C++ compiler as a command: ``CXX``, which may have arguments, or what CMake finds first on PATH."""
    given = shlex.split(os.environ.get("CXX", ""))
    if given:
        return given if shutil.which(given[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def gpu_capabilities() -> list[str] | None:
    """Those of this machine's GPUs, as "9.0", by nvidia-smi; [] if they cannot be told, None without a GPU."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        found = re.findall(r"^\s*(\d+\.\d+)\s*$", output, re.MULTILINE)
        if found:
            return sorted(set(found))
    except (OSError, subprocess.SubprocessError):
        pass  # no nvidia-smi, or no driver for it: perhaps only the program is missing
    try:
        return [] if os.listdir("/proc/driver/nvidia/gpus") else None
    except OSError:
        return None


def arch_of(capability: str) -> str | None:
    """Return the architecture of ``ARCHS`` for a GPU of this capability; None if it is too old.

    Machine code runs on the same major version with the same or a higher minor one, code for an "a" architecture on
    exactly that one. What is left compiles the PTX for 80 when it is first used.
    """
    major, minor = map(int, capability.split("."))
    if major < 8:
        return None
    exact = [arch for arch in ARCHS if arch.rstrip("a") == f"{major}{minor}"]
    older = [arch for arch in ARCHS if not arch.endswith("a") and int(arch) // 10 == major and int(arch) % 10 < minor]
    return (exact or older[-1:] or ["80"])[0]


def find_cutlass(given: str | None = None) -> str | None:
    """The folder of CUTLASS's include/ and tools/util/include/: given, in ``RESNET_FAST_CUTLASS``, or the package's."""
    given = given or os.environ.get("RESNET_FAST_CUTLASS")
    if given:
        return str(Path(given).absolute())
    package = importlib.util.find_spec("cutlass_library")
    source = Path(package.origin).parent / "source" if package and package.origin else None
    return str(source) if source and (source / "include" / "cutlass").is_dir() else None


# --- what pip is to do


def plan() -> Plan:
    """Return what ``RESNET_FAST_BUILD``, ``RESNET_FAST_ARCHS``, ``RESNET_FAST_SM90`` and this machine come to.

    Raises:
        BuildError: a variable has a value that means nothing.
    """
    choice = os.environ.get("RESNET_FAST_BUILD") or "auto"
    if choice not in CHOICES:
        raise BuildError(f"RESNET_FAST_BUILD is {choice!r}; it must be one of 'auto', 'off', 'require' or 'keep'")
    sm90 = os.environ.get("RESNET_FAST_SM90") or None
    if sm90 not in (None, *SUBSETS):
        raise BuildError(f"RESNET_FAST_SM90 is {sm90!r}; it must be one of 'all', 'ci' or 'none'")
    archs = parse_archs(os.environ.get("RESNET_FAST_ARCHS", ""), "RESNET_FAST_ARCHS")
    strict = choice == "require"
    if choice in ("off", "keep"):
        hint = "; `make native` builds it" if choice == "keep" else ""
        return Plan(f"RESNET_FAST_BUILD={choice}{hint}", keep=choice == "keep")
    if find_nvcc() is None:
        given = os.environ.get("CUDACXX")
        where = f"CUDACXX is {given!r}" if given else "not on PATH, in CUDA_HOME or in /usr/local/cuda"
        return Plan(f"no CUDA compiler: nvcc was not found ({where})", strict=strict)
    if archs:
        return Plan("", archs, sm90, strict)
    capabilities = gpu_capabilities()
    if capabilities is None and not strict:
        return Plan(
            "nvcc was found, but no GPU to compile for; install again with RESNET_FAST_ARCHS='80;90a' or what you need"
        )
    try:
        return Plan("", native_archs(capabilities, known_archs()), sm90, strict)
    except BuildError as error:
        return Plan(str(error), strict=strict)


def engine_plan() -> Plan:
    """Return what ``RESNET_FAST_CPU`` and this machine come to: whether to build ``_cpu``.

    Raises:
        BuildError: the variable has a value that means nothing.
    """
    choice = os.environ.get("RESNET_FAST_CPU") or "auto"
    if choice not in ENGINE_CHOICES:
        raise BuildError(f"RESNET_FAST_CPU is {choice!r}; it must be one of 'auto', 'off' or 'require'")
    if choice == "off":
        return Plan("RESNET_FAST_CPU=off")
    return Plan(engine_obstacle(), strict=choice == "require")


def engine_obstacle() -> str:
    """Return why this machine cannot compile ``_cpu``, "" if nothing is seen that forbids it."""
    if find_cxx() is None:
        given = os.environ.get("CXX")
        where = f"CXX is {given!r}" if given else "no c++, g++ or clang++ on PATH"
        return f"no C++ compiler was found ({where}); install GCC 11, Clang 14 or newer"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return (
        "" if header.exists() else f"{header} is missing: install this Python's headers (package python3-dev or such)"
    )


def known_archs() -> list[str]:
    """Those of ``ARCHS`` that the compiler knows; all if it does not say."""
    nvcc = find_nvcc()
    try:
        output = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        output = ""
    found = set(re.findall(r"sm_(\d+)\b", output))  # it lists sm_90 without sm_90a
    return [arch for arch in ARCHS if arch.rstrip("a") in found] or list(ARCHS)


def native_archs(capabilities: Sequence[str] | None, known: Sequence[str] = ARCHS) -> str:
    """Return the architectures of GPUs with these capabilities; "", all that the compiler knows, if there are none.

    A GPU that is too new for the compiler gets "80", whose PTX its driver compiles.

    Raises:
        BuildError: they are all too old.
    """
    found = {arch if arch is None or arch in known else "80" for arch in map(arch_of, capabilities or ())}
    if found == {None}:
        raise BuildError(f"the GPU has capability {', '.join(capabilities or ())}; 8.0 or newer is needed")
    return ";".join(sorted(filter(None, found), key=ARCHS.index))


def parse_archs(text: str, name: str) -> str:
    """``text`` as CMake's list, whichever of ; , and blanks separates its items.

    Raises:
        BuildError: an item is not in ``ARCHS``.
    """
    found = re.findall(r"[^\s;,]+", text)
    for arch in found:
        if arch not in ARCHS:
            raise BuildError(f"{name} names {arch!r}; it may name {', '.join(ARCHS)}, as '80;90a'")
    return ";".join(sorted(set(found), key=ARCHS.index))


def requirements(editable: bool = False) -> list[str]:
    """Return the packages that the builds of :func:`plan` and :func:`engine_plan` need and this machine lacks, for pip.

    Args:
        editable: an engine that is in the checkout and up to date stays there.
    """
    kernels, engine = plan(), engine_plan()
    if kernels.reason and (engine.reason or (editable and engine_is_current(ROOT / "resnet_fast"))):
        return []
    found = ["pybind11>=2.12"]
    found += [] if shutil.which("ninja") else ["ninja"]
    # An installed CMake may be too old. The package is small beside the time to find that out.
    found += ["cmake>=3.26"]
    for_hopper = not kernels.archs or "90a" in kernels.archs.split(";")
    if not kernels.reason and for_hopper and kernels.sm90 != "none" and not os.environ.get("RESNET_FAST_CUTLASS"):
        found += ["nvidia-cutlass==4.2.*"]
    return found


def fingerprint() -> str:
    """Return a digest of what decides ``_cpu``: its sources, how they are compiled, and the Python it is for."""
    digest = hashlib.sha256(str(sysconfig.get_config_var("EXT_SUFFIX")).encode())
    for path in (*sorted((ROOT / "csrc" / "cpu").rglob("*")), ROOT / "csrc" / "compiler.h", ROOT / "CMakeLists.txt"):
        if path.is_file():
            digest.update(f"\0{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def engine_is_current(folder: Path) -> bool:
    """Return whether the engine in this folder was built from these sources for this Python."""
    kept = read_record(folder).get("cpu")
    built = isinstance(kept, dict) and kept.get("built") and kept.get("sources") == fingerprint()
    return bool(built and modules(folder, ENGINE))


# --- the build


def remove_module(folder: Path, name: str = KERNELS) -> None:
    """Delete what an earlier build left: a module that is not this build's must not be taken for it."""
    for path in [*modules(folder, name), *folder.glob(f"{name}.*.new")]:
        path.unlink(missing_ok=True)
    record = read_record(folder)
    kept = _engine_half(record) if name == KERNELS else {key: value for key, value in record.items() if key != "cpu"}
    if kept:
        _write_record(folder, kept)
    else:
        (folder / RECORD).unlink(missing_ok=True)


def modules(folder: Path, name: str = KERNELS) -> list[Path]:
    return [path for pattern in (f"{name}.*.so", f"{name}.so", f"{name}*.pyd") for path in folder.glob(pattern)]


def build(
    out: Path,
    archs: str = "",
    jobs: int | None = None,
    cutlass: str | None = None,
    sm90: str | None = None,
    build_dir: Path | None = None,
    strict: bool = False,
) -> Record:
    """Compile csrc/ and put the module and its record into ``out``, which holds no module if that fails.

    Args:
        archs: as "80;90a"; "" for all that the compiler knows. jobs: compilers at once, by default one for each core.
        cutlass: the folder of CUTLASS's headers. sm90: which of the kernels made with it, "all", "ci" or "none"; None
            means all if the headers are found, and ``strict`` that they must be.
        build_dir: kept between builds; a temporary folder by default.

    Raises:
        BuildError: there is no module.
    """
    try:
        remove_module(out)
        return _build(out, archs, jobs, cutlass, sm90, build_dir, strict)
    except (OSError, ValueError, KeyError) as error:  # such as a program that cannot be started, or a full disk
        with contextlib.suppress(OSError):
            remove_module(out)
        raise BuildError(f"{type(error).__name__}: {error}") from error


def _build(
    out: Path,
    archs: str,
    jobs: int | None,
    cutlass: str | None,
    sm90: str | None,
    build_dir: Path | None,
    strict: bool,
) -> Record:
    began = time.monotonic()
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("no CUDA compiler: nvcc was not found")
    headers = find_cutlass(cutlass)
    if sm90 is None:
        sm90 = "all" if headers or strict else "none"
        if sm90 == "none" and (not archs or "90a" in archs.split(";")):
            _say("CUTLASS's headers were not found, so its kernels for sm_90a are left out (RESNET_FAST_CUTLASS)")
    with tempfile.TemporaryDirectory(prefix="resnet_fast_build_") as temporary:
        folder = (build_dir or Path(temporary)).absolute()
        # CMake would say no more of a compiler that does not work than that it does not.
        probe = ("-std=c++20", "-I", str(ROOT / "csrc"), "-c", str(ROOT / "csrc" / "build_info.cu"))
        host = os.environ.get("CUDAHOSTCXX")
        options = [
            *(f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DRESNET_FAST_ARCHS={archs}", f"-DRESNET_FAST_SM90={sm90}"),
            *(f"-DRESNET_FAST_CUTLASS={headers or ''}", "-DRESNET_FAST_CPU=OFF"),
        ]
        probing = [nvcc, *(("-ccbin", host) if host else ()), *probe, "-o", str(Path(temporary) / "build_info.o")]
        module, _ = _compile(KERNELS, folder, probing, options, jobs)
        choices = json.loads((folder / "choices.json").read_text(encoding="utf-8"))
        size = _place(module, out)
    seconds = round(time.monotonic() - began, 1)
    record = Record(
        True, "", tuple(choices["archs"].split(",")), choices["ptx"], choices["cuda"], choices["sm90"], seconds
    )
    record.write(out)
    _say(f"built _C, {size:.1f} MB, with CUDA {record.cuda} for {', '.join(record.archs)} in {seconds:.0f} s")
    return record


def build_engine(out: Path, jobs: int | None = None, build_dir: Path | None = None, sanitize: str = "") -> EngineRecord:
    """Compile csrc/cpu/ and put ``_cpu`` and its record into ``out``, which holds no such module if that fails.

    Args:
        jobs, build_dir: as for :func:`build`. sanitize: compiled-in sanitizers, as "address,undefined" or "thread".

    Raises:
        BuildError: there is no module.
    """
    try:
        remove_module(out, ENGINE)
        return _build_engine(out, jobs, build_dir, sanitize)
    except (OSError, ValueError, KeyError) as error:
        with contextlib.suppress(OSError):
            remove_module(out, ENGINE)
        raise BuildError(f"{type(error).__name__}: {error}") from error


def _build_engine(out: Path, jobs: int | None, build_dir: Path | None, sanitize: str) -> EngineRecord:
    began = time.monotonic()
    obstacle, compiler = engine_obstacle(), find_cxx()
    if obstacle or compiler is None:
        raise BuildError(obstacle)
    sources = fingerprint()  # before the build: a file that is changed meanwhile makes it old
    with tempfile.TemporaryDirectory(prefix="resnet_fast_build_") as temporary:
        folder = (build_dir or Path(temporary)).absolute()
        probe = ("-std=c++20", "-I", str(ROOT / "csrc"), "-c", str(ROOT / "csrc" / "cpu" / "cpu.cpp"))
        probing = [*compiler, *probe, "-o", str(Path(temporary) / "cpu.o")]
        options = ["-DRESNET_FAST_CUDA=OFF", "-DRESNET_FAST_CPU=ON", f"-DRESNET_FAST_SANITIZE={sanitize}"]
        module, told = _compile(ENGINE, folder, probing, options, jobs, sanitizer_libraries(sanitize))
        info = json.loads(told)
        size = _place(module, out)
    seconds = round(time.monotonic() - began, 1)
    record = EngineRecord(True, "", info["compiler"], tuple(info["isas"]), sources, seconds)
    record.write(out)
    _say(f"built _cpu, {size:.1f} MB, with {record.compiler} for {', '.join(record.isas)} in {seconds:.0f} s")
    return record


def _compile(
    name: str, folder: Path, probe: Sequence[str], options: Sequence[str], jobs: int | None, preload: str = ""
) -> tuple[Path, str]:
    """Return the module of this name, compiled in ``folder``, and what its ``build_info()`` says, as JSON. ``preload``:
    a library that it must find loaded."""
    cmake, ninja = find_tool("cmake", CMAKE), find_tool("ninja")
    for tool, path in ((f"cmake {'.'.join(map(str, CMAKE))} or newer", cmake), ("ninja", ninja)):
        if path is None:
            raise BuildError(f"{tool} was not found; run `{sys.executable} -m pip install -U {tool.split()[0]}`")
    assert cmake and ninja
    _run(probe)
    _run([
        *(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *(f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}", *options),
    ])  # fmt: skip
    # Before the build, so that a failed one leaves nothing of an earlier one in a folder that is kept.
    remove_module(folder, name)
    _run([cmake, "--build", str(folder), "--parallel", str(jobs or default_jobs())])
    (module,) = modules(folder, name)
    script = (
        f"import json, sys; sys.path.insert(0, {str(folder)!r}); import {name}; print(json.dumps({name}.build_info()))"
    )
    loaded = ("env", f"LD_PRELOAD={preload}", "ASAN_OPTIONS=detect_leaks=0") if preload else ()
    return module, _run([*loaded, sys.executable, "-c", script])


def _place(module: Path, out: Path) -> float:
    """Copy a module into ``out``, whole or not at all; its size in MB."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy2(module, out / f"{module.name}.new")
    (out / f"{module.name}.new").replace(out / module.name)
    return module.stat().st_size / 2**20


def sanitizer_libraries(sanitize: str) -> str:
    """Return what a process with a sanitized ``_cpu`` must have in LD_PRELOAD; "" without sanitizers.

    Raises:
        BuildError: the compiler has no such library.
    """
    if not sanitize:
        return ""
    found = []
    # The C++ library too, or the sanitizer finds no function that throws: Python itself is linked without it.
    for name in ("libtsan.so" if sanitize == "thread" else "libasan.so", "libstdc++.so.6"):
        command = [*(find_cxx() or ["c++"]), f"-print-file-name={name}"]
        found.append(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
        if not Path(found[-1]).is_absolute():
            raise BuildError(
                f"{command[0]} has no {name}: the sanitizers are GCC's, in the packages libasan and libtsan"
            )
    return " ".join(found)


def default_jobs() -> int:
    """One compiler for each core that this process may use; CMakeLists.txt further bounds them by the memory."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _say(text: str) -> None:
    print(f"resnet_fast: {text}", flush=True)


def _run(command: Sequence[str]) -> str:
    """Run and show a command; returns its last line. Its failure is told in its own words."""
    print("$", " ".join(command), flush=True)
    lines: collections.deque[str] = collections.deque(maxlen=4000)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if process.returncode:
        said = _heart(lines) or f"{command[0]} printed nothing"
        raise BuildError(f"{Path(command[0]).name} ended with status {process.returncode}: {said}")
    return lines[-1] if lines else ""


def _heart(lines: Sequence[str], most: int = 3500) -> str:
    """Return what a failed command's output says of the cause: from its first error on, or its end."""
    lines = list(lines)
    # A compiler's "error:" before what other programs say about having failed.
    for pattern in (r"\b(fatal|error)\s*:", r"\b(error|fatal)\b"):
        first = next((at for at, line in enumerate(lines) if re.search(pattern, line, re.IGNORECASE)), None)
        if first is not None:
            break
    text = "\n".join(lines[-30:] if first is None else lines[first : first + 30]).strip()
    return text if len(text) <= most else text[:most] + " ..."


def _build_kernels(given: argparse.Namespace) -> None:
    named = os.environ.get("RESNET_FAST_ARCHS", "") if given.archs is None else given.archs
    archs = parse_archs(named, "RESNET_FAST_ARCHS" if given.archs is None else "--archs")
    if not archs and given.archs is None:
        archs = native_archs(gpu_capabilities(), known_archs())
    sm90 = given.sm90 or os.environ.get("RESNET_FAST_SM90") or None
    if sm90 not in (None, *SUBSETS):
        raise BuildError(f"RESNET_FAST_SM90 is {sm90!r}; it must be one of 'all', 'ci' or 'none'")
    build(given.out, archs, given.jobs, given.cutlass, sm90, given.build_dir)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python csrc/native_build.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="gets the module and its record")
    parser.add_argument(
        "--archs", default=None, help="as '80;90a'; by default RESNET_FAST_ARCHS, or this machine's GPUs'"
    )
    parser.add_argument("--jobs", type=int, default=None, help="compilers at once; by default one for each core")
    parser.add_argument("--cutlass", default=None, help="the folder of CUTLASS's include/ and tools/util/include/")
    parser.add_argument("--sm90", choices=SUBSETS, default=None, help="which of the kernels made with CUTLASS")
    parser.add_argument(
        "--build-dir", type=Path, default=None, help="kept for the next build; by default a temporary one"
    )
    parser.add_argument("--module", choices=(KERNELS, ENGINE), default=KERNELS, help="by default _C")
    parser.add_argument("--sanitize", default="", help="sanitizers in _cpu: 'address,undefined' or 'thread'")
    given = parser.parse_args(arguments)
    try:
        if given.module == ENGINE:
            build_engine(given.out, given.jobs, given.build_dir, given.sanitize)
        else:
            _build_kernels(given)
    except BuildError as error:
        remove_module(given.out, given.module)
        (EngineRecord if given.module == ENGINE else Record)(False, str(error)).write(given.out)
        print(f"resnet_fast: not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
