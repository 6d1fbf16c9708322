"""Compiles csrc/ for the CPU: the same binding.cpp and kernels, with the headers in include/ in CUDA's place.

Objects and modules are kept in build/emulator/ under names that are hashes of all that went into them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

_FLAGS = [
    "-std=c++20",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fmax-errors=3",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
    "-DRESNET_FAST_CUDA",
    "-DRESNET_FAST_EMULATED",
    '-DRESNET_FAST_ARCHS=""',
]
# The stacks are fibers', of which the sanitizer knows nothing; what matters lies on the heap.
_SANITIZE = [
    "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
    "--param",
    "asan-stack=0",
]
# Not instrumented: the emulator touches a kernel's memory by memcpy and memset alone, which the sanitizer replaces.
_OURS = ("binding.cpp", "emulator.cpp")
# AddressSanitizer, and behind it C++, whose exceptions it otherwise does not find.
_PRELOADED = ("libasan.so", "libstdc++.so")


@functools.cache
def unavailable(sanitize: bool = False) -> str:
    """Why the kernels cannot be compiled here, '' if they can."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return "no g++ (set CXX)"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    number = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=False).stdout
    if "Free Software Foundation" not in version or int(number.split(".")[0] or 0) < 11:
        return f"{compiler} is not GCC 11 or newer"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return f"no Python.h in {sysconfig.get_path('include')}: the headers of this Python are not installed"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    if sanitize and len(sanitizer()) != len(_PRELOADED):
        return f"{compiler} has no AddressSanitizer (libasan)"
    return ""


@functools.cache
def sanitizer() -> list[Path]:
    """What a process must load first."""
    paths = []
    for name in _PRELOADED:
        asked = [_compiler(), f"-print-file-name={name}"]
        path = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
        if path.is_absolute() and path.exists():
            paths.append(path.resolve())
    return paths


def kernel_sources() -> list[Path]:
    """What of csrc/kernels/ is compiled here."""
    return sorted(
        path
        for path in (ROOT / "csrc" / "kernels").iterdir()
        if path.suffix in {".cu", ".cpp", ".cuh"}
        and "_sm90" not in path.name
        and path.name.startswith(os.environ.get("CUDA_ON_CPU_ONLY", ""))
    )


def build(sanitize: bool = True, selftest: bool = False) -> Path:
    """The compiled module ``_C``, or of selftest.cu alone, a library.

    Raises:
        RuntimeError: with the compiler's words if a file does not compile, or the reason of ``unavailable()``.
    """
    if unavailable(sanitize):
        raise RuntimeError(unavailable(sanitize))
    import fcntl  # Windows has none, and no emulator

    if selftest:
        sources = [HERE / "selftest.cu"]
    else:
        sources = [path for path in kernel_sources() if path.suffix != ".cuh"]
        sources.append(ROOT / "csrc" / "binding.cpp")
    # Behind the kernels: of a function in several objects the linker takes the first, which is to be instrumented.
    sources.append(HERE / "emulator.cpp")
    _staged()  # before the threads, which would make the links at once
    # Another process that wants the same waits for it instead of compiling it, too.
    with (cache() / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = list(pool.map(lambda source: _object(source, sanitize), sources))
    flags = [*(_SANITIZE if sanitize else ()), "-shared"]
    key = _hash(*(path.name for path in objects), *flags)
    library = cache() / f"{'selftest' if selftest else '_C'}-{key}" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        _run_into(library, [_compiler(), *flags, *map(str, objects)])
    return library


@functools.cache
def module() -> ModuleType:
    """The emulated ``_C``, for tensors in this process's memory."""
    return loaded(build(sanitize=False))


def loaded(library: Path) -> ModuleType:
    """The compiled ``_C``; what was compiled with the sanitizers only below ``sanitizer()``."""
    loader = importlib.machinery.ExtensionFileLoader("emulator._C", str(library))
    spec = importlib.util.spec_from_file_location("emulator._C", library, loader=loader)
    assert spec is not None
    before = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)  # kernels that CUDA_ON_CPU_ONLY leaves out are missing only if they are called
    native = importlib.util.module_from_spec(spec)
    sys.setdlopenflags(before)
    loader.exec_module(native)
    return native


def selftest(library: Path) -> ctypes.CDLL:
    """The compiled kernels of selftest.cu, likewise."""
    kernels = ctypes.CDLL(str(library))
    kernels.selftest.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    kernels.selftest.restype = ctypes.c_char_p
    kernels.emulator_seed.argtypes = [ctypes.c_uint64]
    return kernels


def _compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert compiler is not None
    return compiler


@functools.cache
def cache() -> Path:
    """The folder for what is compiled."""
    folder = ROOT / "build" / "emulator"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.gettempdir()) / "resnet_fast_emulator"
        folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def _staged() -> Path:
    """csrc/ as a tree of links with our ptx.cuh in it: an #include "ptx.cuh" looks beside its own file first."""
    folder = cache() / "staged"
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in {".cu", ".cuh", ".h", ".cpp"}:
            continue
        link = folder / path.relative_to(ROOT)
        target = HERE / "include" / "ptx.cuh" if link == folder / "csrc" / "ptx.cuh" else path
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink() or Path(os.readlink(link)) != target:
            fresh = link.with_name(f"{link.name}.{os.getpid()}")
            fresh.symlink_to(target)
            os.replace(fresh, link)
    return folder


def _object(source: Path, sanitize: bool) -> Path:
    import pybind11

    staged = _staged()
    below_csrc = source.is_relative_to(ROOT / "csrc")
    compiled = staged / source.relative_to(ROOT) if below_csrc else source
    flags = [
        *_FLAGS,
        # Without the sanitizer GCC 12 inlines more, and takes a loop that writes all of an array for one that may not.
        *(_SANITIZE if sanitize and source.name not in _OURS else ("-Wno-maybe-uninitialized",)),
        f"-ffile-prefix-map={ROOT}/=",
        f"-ffile-prefix-map={staged}/=",  # of two that match the last one counts
        *("-I", str(HERE / "include"), "-I", str(HERE), "-I", str(staged / "csrc")),
        *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")),
    ]
    # What the last compilation of this file read; a file that reads others than before has changed itself.
    name = f"{source.stem}-{source.suffix[1:]}-{_hash(str(source), *flags)}"
    dependencies = cache() / f"{name}.d"

    def object_path() -> Path | None:
        if not dependencies.exists():
            return None
        contents = [file.read_bytes().hex() if file.exists() else "" for file in _read_by(dependencies)]
        return cache() / f"{name}-{_hash(*contents)}.o"

    path = object_path()
    if path is None or not path.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            made, listed = Path(folder) / "made.o", Path(folder) / "made.d"
            for _ in range(3):
                began = time.time_ns()
                _run_into(made, [_compiler(), *flags, "-MMD", "-MF", str(listed), "-x", "c++", "-c", str(compiled)])
                # Of a file that was edited meanwhile nobody knows what the compiler saw.
                if all(file.stat().st_mtime_ns < began for file in _read_by(listed)):
                    break
            os.replace(listed, dependencies)
            path = object_path()
            assert path is not None
            os.replace(made, path)
    return path


def _read_by(listed: Path) -> list[Path]:
    """What a compilation read, from the rule that it wrote for make."""
    return [Path(path) for path in re.sub(r"\\\n", " ", listed.read_text()).split(":", 1)[1].split()]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _run_into(output: Path, command: list[str]) -> None:
    """Runs a compiler that writes ``output``, which appears complete or not at all."""
    fresh = output.with_name(f"{output.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    os.replace(fresh, output)


if __name__ == "__main__":
    print(build(sanitize=False))
    print(build(sanitize=True))
