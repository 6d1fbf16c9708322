"""What a measurement on a GPU ran on: GPU, driver, clocks, compilers, versions, commit. Standard library only.

So it works where torch does not. It reads; it changes no setting of the GPU and needs no privilege.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GPU_FIELDS = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem",
    "power.limit", "temperature.gpu", "compute_mode", "pstate",
)  # fmt: skip
CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
DISTRIBUTIONS = (
    "torch", "triton", "torchvision", "timm", "numpy", "pytest", "pytest-xdist", "hypothesis", "safetensors", "jax",
    "jaxlib", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-frontend", "matplotlib", "typer", "rich",
)  # fmt: skip
TOOLS = ("nvcc", "compute-sanitizer", "ncu", "cuobjdump")
VARIABLES = re.compile(r"CUDA_VISIBLE_DEVICES|(TRITON|TORCH|PYTORCH|RESNET_FAST|XLA|NVIDIA_TF32)_.*")


def module_at(path: str) -> ModuleType:
    """Return a file of this checkout that needs no more than the standard library, as a module, without its package."""
    name = f"_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


MACHINE = module_at("resnet_fast/benchmarking/machine.py")


def report() -> dict[str, Any]:
    """Everything, as a dictionary of plain values; what cannot be read is empty."""
    return {
        "gpus": _query(GPU_FIELDS) or _query(GPU_FIELDS[:2]),
        "nvcc": _nvcc(),
        "tools": {name: shutil.which(name) or "" for name in TOOLS},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": MACHINE.processor()[0],
        "cores": os.cpu_count() or 1,
        "versions": versions(),
        "commit": MACHINE.commit(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)},
    }


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return the part that every result file repeats beside its numbers."""
    gpu = found["gpus"][0] if found["gpus"] else {}
    return {
        "gpu": gpu.get("name", ""),
        "driver": gpu.get("driver_version", ""),
        "nvcc": found["nvcc"],
        "python": found["python"],
        "cpu": found["cpu"],
        "cores": found["cores"],
        "versions": found["versions"],
        "commit": found["commit"],
    }


def versions() -> dict[str, str]:
    """Installed distributions that matter; what is not installed is left out."""
    return {name: version for name in DISTRIBUTIONS if (version := MACHINE.version_of(name))}


def slug(found: dict[str, Any]) -> str:
    """Return the folder's name for results of this GPU, as kernels/gpus.py writes it; "none" without one."""
    return str(module_at("kernels/gpus.py").normalise(found["gpus"][0]["name"])) if found["gpus"] else "none"


class Clocks:
    """Clocks, power and temperature seen while the block runs, one sample in two seconds: ``with Clocks() as clocks``.

    ``seen`` afterwards: least, median and most of each, and how many samples; empty without a GPU.
    """

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def __enter__(self) -> Clocks:
        self._process: subprocess.Popen[bytes] | None = None
        program = shutil.which("nvidia-smi")
        if program:
            self._file = tempfile.TemporaryFile()
            command = [
                program,
                f"--query-gpu={','.join(CLOCK_FIELDS)}",
                "--format=csv,noheader,nounits",
                "-lms",
                "2000",
            ]
            try:
                self._process = subprocess.Popen(command, stdout=self._file, stderr=subprocess.DEVNULL)
            except OSError:
                self._file.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        self._process.terminate()
        self._process.wait()
        with self._file:
            self._file.seek(0)
            self.seen = _ranges(self._file.read().decode(errors="replace"))


def _ranges(text: str) -> dict[str, Any]:
    columns: list[list[float]] = [[] for _ in CLOCK_FIELDS]
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(columns):
            for column, cell in zip(columns, cells, strict=True):
                if re.fullmatch(r"[\d.]+", cell):
                    column.append(float(cell))
    return {
        name: {
            "min": min(column),
            "median": sorted(column)[len(column) // 2],
            "max": max(column),
            "samples": len(column),
        }
        for name, column in zip(CLOCK_FIELDS, columns, strict=True)
        if column
    }


def _query(fields: tuple[str, ...]) -> list[dict[str, str]]:
    text = _output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def _nvcc() -> str:
    match = re.search(r"release ([\d.]+), V([\d.]+)", _output(["nvcc", "--version"]))
    return match[2] if match else ""


def _output(command: list[str]) -> str:
    """Return what a program prints; "" if there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
