"""What a measurement ran on: processor, operating system, versions, commit. Standard library, and torch to describe.

It reads; it changes no setting of the machine and needs no privilege.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

INTERESTING_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
                     "amx_int8", "asimd", "sve", "bf16", "i8mm")  # fmt: skip
PEER_DISTRIBUTIONS = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "openvino",
                      "mnn", "ncnn", "pnnx", "numpy", "triton")  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """One machine and one set of installed software, as far as they explain a measurement."""

    cpu: str
    cores: int
    flags: tuple[str, ...]
    torch_capability: str
    memory_gib: float | None
    clock_mhz: tuple[float, ...]
    load: float | None
    system: str
    python: str
    threads: int
    versions: dict[str, str]
    commit: str

    @property
    def slug(self) -> str:
        """A folder name for results of machines like this one: processor and usable cores."""
        name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*$", " ", self.cpu.lower())
        return re.sub(r"[^a-z0-9]+", "-", f"{name} {self.cores} cores").strip("-")

    @property
    def summary(self) -> str:
        """One line for people."""
        wide = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16", "asimd") if flag in self.flags]
        return f"{self.cpu}, {self.cores} cores ({', '.join(wide) or 'no AVX-512'}), {threads_text(self.threads)}"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "slug": self.slug}


DISTURBED = 0.15
"""Cores kept busy by other processes from which on times are not to be trusted."""


def threads_text(count: int) -> str:
    """``1 thread`` or ``2 threads``."""
    return f"{count} thread{'' if count == 1 else 's'}"


def describe() -> Machine:
    """Describes this machine now."""
    import torch

    cpu, flags, clocks = processor()
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    try:
        load: float | None = round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        load = None
    return Machine(
        cpu=cpu,
        cores=cores,
        flags=tuple(flag for flag in INTERESTING_FLAGS if flag in flags),
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        memory_gib=_memory_gib(),
        clock_mhz=clocks,
        load=load,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        threads=torch.get_num_threads(),
        versions=versions(),
        commit=commit(),
    )


def supports_bfloat16() -> bool:
    """Return whether the processor has bfloat16 instructions; without them bfloat16 runs, but slower than float32."""
    _, flags, _ = processor()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & flags)


def versions() -> dict[str, str]:
    """Installed versions of the contestants and of what they are built on; what is not installed is left out."""
    import torch

    found = {"resnet_fast": version_of("resnet_fast")}
    found.update({name: version_of(name) for name in PEER_DISTRIBUTIONS})
    found["torch"] = torch.__version__
    return {name: version for name, version in found.items() if version}


def commit() -> str:
    """Return the commit of the source tree this package runs from, with ``+changes`` if files differ; empty elsewhere.

    ``RESNET_FAST_COMMIT`` says it for a copy without .git.
    """
    if os.environ.get("RESNET_FAST_COMMIT"):
        return os.environ["RESNET_FAST_COMMIT"]
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    revision = _git(root, "rev-parse", "--short=12", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{revision}+changes" if revision and changed else revision


def busy_seconds() -> float | None:
    """Processor seconds that everybody on this machine has used since it started; None if that cannot be read."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[1:9])
        return float(user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None


class Disturbance:
    """How many cores others kept busy between its making and ``cores()``: a measurement beside others is no good."""

    def __init__(self) -> None:
        self._start = busy_seconds(), time.process_time(), time.perf_counter()

    def cores(self) -> float | None:
        """Cores kept busy by other processes, on average; None if that cannot be known."""
        busy_before, own_before, clock_before = self._start
        busy, own, clock = busy_seconds(), time.process_time(), time.perf_counter()
        if busy is None or busy_before is None or clock <= clock_before:
            return None
        return round(max(0.0, (busy - busy_before) - (own - own_before)) / (clock - clock_before), 3)


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def version_of(distribution: str) -> str:
    """Return the version of an installed distribution; empty if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def processor() -> tuple[str, set[str], tuple[float, ...]]:
    """Model name, feature flags and the clocks seen; from /proc/cpuinfo if there is one."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), set(), ()
    fields: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), []).append(value.strip())
    name = next((fields[key][0] for key in ("model name", "hardware", "cpu model") if key in fields), "")
    flags = set(" ".join(fields.get("flags", fields.get("features", []))[:1]).split())
    clocks = tuple(round(float(value)) for value in fields.get("cpu mhz", []) if re.fullmatch(r"[\d.]+", value))
    return name or platform.machine(), flags, clocks


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
