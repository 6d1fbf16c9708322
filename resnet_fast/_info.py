"""Report what is installed, which backend runs, and why not a faster one: ``resnet_fast.info()``."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import backends
from .backends import cpu, cuda, triton

_PACKAGES = ("triton", "torchvision", "numpy", "safetensors", "Pillow", "protobuf", "onnxruntime", "openvino")


@dataclass(frozen=True, repr=False)
class Info:
    """A snapshot of this process: ``print(info)`` shows the whole report, :meth:`as_dict` gives it as data."""

    version: str
    python: str
    platform: str
    cpu: str
    cpu_capability: str
    threads: int
    torch: str
    packages: dict[str, str]
    gpus: list[str]
    choices: dict[str, str]
    engine: dict[str, Any]
    native: dict[str, Any]
    backend: str
    backends: dict[str, str]
    fallbacks: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists, strings and numbers."""
        return asdict(self)

    def __repr__(self) -> str:
        usable = ", ".join(name for name, why in self.backends.items() if not why)
        fell_back = f"{len(self.fallbacks)} fallbacks" if len(self.fallbacks) != 1 else "1 fallback"
        return (
            f"<resnet_fast {self.version}, torch {self.torch}, {', '.join(self.gpus) or 'no GPU'}, backend "
            f"{self.backend} (available: {usable}), {fell_back}; print() shows all>"
        )

    def __str__(self) -> str:
        rows = [
            ("resnet_fast", self.version),
            ("python", f"{self.python} on {self.platform}"),
            ("torch", f"{self.torch}, {self.threads} threads"),
            ("cpu", f"{self.cpu} ({self.cpu_capability})"),
            ("gpus", ", ".join(self.gpus) or "none that torch can use"),
            *(("choices", f"{name}: {line}") for name, line in self.choices.items()),
            ("engine", _engine(self.engine)),
            ("native", _native(self.native)),
            ("packages", ", ".join(f"{name} {version}" for name, version in self.packages.items())),
            ("backend", f"{self.backend} (choose with resnet_fast.backends.use)"),
        ]
        for name, why in self.backends.items():
            rows.append((f"  {name}", f"not available: {why}" if why else "available"))
        rows += [("fell back", line) for line in self.fallbacks] or [("fell back", "nothing so far in this process")]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _engine(found: dict[str, Any]) -> str:
    """Return one line on the CPU engine, or why there is none: a compiler's message may have several lines."""
    if not found["built"]:
        return str(found["reason"])
    lowered = f", lowered by RESNET_FAST_ISA from {found['best_isa']}" if found["isa"] != found["best_isa"] else ""
    sanitizer = f", with sanitizers ({found['sanitizer']})" if found["sanitizer"] else ""
    count = f"{found['threads']} threads" if found["threads"] != 1 else "1 thread"
    isas = ", ".join(found["isas"])
    table = f"choices of {found['table']}" if found["table"] else f"no measured choices: {found['table_reason']}"
    built = f"built for {isas} with {found['compiler']}{sanitizer}"
    return f"resnet_fast._cpu, {found['isa']}{lowered} ({built}), {count}; {table}"


def _native(found: dict[str, Any]) -> str:
    """Return one line on the CUDA C++ module, or why there is none: a compiler's message may have several lines."""
    if not found["built"]:
        return str(found["reason"])
    archs = ", ".join(found["archs"]) or "no GPU"
    ptx = f", PTX for newer ones from {found['ptx']}" if found.get("ptx") else ""
    what = f"resnet_fast._C for {archs}{ptx}, CUDA {found['cuda']}, {found['convolutions']} convolution kernels"
    if "90a" in found["archs"]:
        what += f", {found['cutlass'] or 'none'} of them CUTLASS's for Hopper"
    return f"{what}{', emulated on the CPU' if found['emulated'] else ''}"


def info() -> Info:
    """Return what is built, found and used in this process, and why not something faster.

    Examples:
        >>> import resnet_fast as rf
        >>> rf.info()  # one line; print() shows all  # doctest: +ELLIPSIS
        <resnet_fast ...; print() shows all>
        >>> rf.info().backends["reference"]  # the reason why a backend cannot be used; "" if it can
        ''
    """
    from . import __version__
    from .benchmarking import machine

    found = {package: machine.version_of(package) for package in _PACKAGES}
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return Info(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=f"{machine.processor()[0]}, {os.cpu_count()} cores",
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        packages={name: version for name, version in found.items() if version},
        gpus=gpus,
        choices=triton.described(),
        engine=cpu.described(),
        native=cuda.described(),
        backend=backends.current(),
        backends=backends.available(),
        fallbacks=[
            f"{what}: {why} ({'once' if count == 1 else f'{count} times'})"
            for (what, why), count in backends.fallbacks().items()
        ],
    )
