"""Which implementation of a fused op runs, and why a faster one did not.

The ops ask this module; users steer it with :func:`use` and read it with :func:`available` and :func:`fallbacks`.
It holds no kernel: the adapters beside it (``cpu``, ``onednn``) and the kernel packages do.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import cpu, cuda, onednn, triton

__all__ = [
    "ON_CPU", "Backend", "Choice", "FallbackWarning", "available", "candidates", "choose", "current", "fallback",
    "fallbacks", "named", "on_cpu", "pick", "runs", "use",
]  # fmt: skip


class Backend(Protocol):
    """What brings GPU kernels: the modules ``triton`` and ``cuda``."""

    NAME: str

    def unavailable(self) -> str:
        """Return why its kernels cannot be used in this process, "" if they can."""

    def unsupported(self, dtype: torch.dtype, device: torch.device) -> str:
        """Return why tensors of this dtype on this device cannot be computed by them, "" if they can."""


#: Every backend by name, with the device types it runs on (none named = any).
_DEVICES: dict[str, tuple[str, ...]] = {
    "reference": (), "cpu": ("cpu",), "onednn": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)
}  # fmt: skip

_OF_KERNELS: tuple[Backend, ...] = (triton, cuda)

#: What may compute an op on a CPU by itself, the fastest first.
ON_CPU = (cpu.NAME, "onednn")

_lock = threading.Lock()
#: The choice in force for the whole process, made by :class:`use`.
selected = "auto"
_fallbacks: dict[tuple[str, str], int] = {}


class FallbackWarning(UserWarning):
    """Something slower than asked for runs; the message says what and why. Given once per cause."""


def available() -> dict[str, str]:
    """Return each backend's name with ``""`` if it can be used here, else the reason why it cannot."""
    return {
        "reference": "",
        "cpu": cpu.unavailable(),
        "onednn": onednn.unavailable(),
        "triton": triton.unavailable(),
        "cuda": cuda.unavailable(),
    }


def current() -> str:
    """Return the backend chosen with :func:`use`: ``"auto"`` (the fastest that is available) unless somebody chose."""
    return selected


class use:  # lower case: reads as a verb at the call site, with or without `with`
    """Choose the backend of every fused op, for the whole process: ``"auto"`` or a name from :func:`available`.

    A call takes effect at once; as a context manager (``with use("reference"): ...``) the earlier choice comes back at
    the end. The choice is shared by all threads.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot be used on this machine (the message says why).
    """

    def __init__(self, name: str) -> None:
        global selected
        states = available()
        if name != "auto" and name not in states:
            raise ValueError(f"backends.use: unknown backend {name!r}; choose one of {['auto', *states]}")
        reason = cuda.unavailable(initialize=True) if name == "cuda" else states.get(name, "")
        if reason:
            raise RuntimeError(f"backends.use: {name!r} cannot be used here: {reason}")
        with _lock:
            self._previous, selected = selected, name

    def __enter__(self) -> use:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global selected
        with _lock:
            selected = self._previous


def runs(name: str, device: str, asked: str = "auto") -> bool:
    """Return whether the choice in force (``asked``, or the process-wide one if that is "auto") lets ``name`` run.

    Raises:
        RuntimeError: the chosen backend does not run on tensors of this device type.
    """
    chosen = asked if asked != "auto" else selected
    if chosen == "auto":
        return not _DEVICES[name] or device in _DEVICES[name]
    devices = _DEVICES[chosen]
    if devices and device not in devices and not (device == "cpu" and _on_cpu(chosen)):
        raise RuntimeError(f"backend {chosen!r} runs on {' and '.join(devices)} tensors, got a tensor on {device!r}")
    return chosen == name


def _on_cpu(name: str) -> bool:
    """Return whether a backend for GPUs is executed on the CPU, for tests."""
    return triton.interpreted() if name == "triton" else cuda.emulated()


def named(asked: str = "auto") -> bool:
    """Return whether somebody chose a backend by its name: the caller (``asked``), or :func:`use`."""
    return (asked if asked != "auto" else selected) != "auto"


def candidates(op: str, device: torch.device, dtype: torch.dtype, asked: str = "auto") -> tuple[Backend, ...]:
    """Return the backends whose kernels may compute an op for tensors of this device and dtype.

    By themselves on CUDA tensors; on CPU tensors only if somebody chose them. If they should run and none can, that is
    recorded as a fallback.

    Args:
        asked: "auto" for the process-wide choice, or a backend's name.

    Raises:
        RuntimeError: as :func:`runs`.
    """
    chosen = asked if asked != "auto" else selected
    if chosen == "auto":
        wanted = _OF_KERNELS if device.type == "cuda" else ()
    else:
        runs(chosen, device.type, chosen)
        wanted = tuple(backend for backend in _OF_KERNELS if chosen == backend.NAME)
    usable, reasons = [], []
    for backend in wanted:
        missing = backend.unavailable()
        reason = missing or backend.unsupported(dtype, device)
        if reason:
            reasons.append((bool(missing), reason))
        else:
            usable.append(backend)
    if reasons and not usable:
        # If one of them runs here, only why it refused matters, not that the other is missing.
        said = [reason for missing, reason in reasons if not missing] or [reason for _, reason in reasons]
        fallback(op, f"{'; '.join(said)}; the plain torch reference runs instead")
    return tuple(usable)


class Choice(NamedTuple):
    """What computes a problem: a kernel of a backend, by its name if there are several; without a backend, why none."""

    backend: Backend | None
    kernel: str = ""
    reason: str = ""

    @property
    def name(self) -> str:
        return "reference" if self.backend is None else self.backend.NAME


def pick(op: str, among: tuple[Backend, ...], problem: Any, device: torch.device, *tensors: Tensor | None) -> Choice:
    """Choose the kernel that computes a problem: CUDA's if tables say that it takes less time, else Triton's.

    Args:
        among: what :func:`candidates` found. tensors: their addresses limit the choice of CUDA's kernels.
    """
    if cuda not in among:
        return Choice(triton)
    gpu, alignment = triton.gpu_of(device), cuda.alignment(*tensors)
    if triton in among:
        kernel = cuda.faster(op, problem, gpu, alignment)
        return Choice(cuda, kernel) if kernel else Choice(triton)
    kernel, reason = cuda.kernel(op, problem, gpu, alignment)
    return Choice(None, "", reason) if reason else Choice(cuda, kernel)


def choose(op: str, among: tuple[Backend, ...], problem: Any, device: torch.device, *tensors: Tensor | None) -> Choice:
    """As :func:`pick`, and record it as a fallback if no kernel computes the problem."""
    choice = pick(op, among, problem, device, *tensors)
    if choice.backend is None:
        fallback(op, f"{choice.reason}; the plain torch reference runs instead")
    return choice


def on_cpu(op: str, device: str, asked: str, why_not: Callable[[str, bool], str]) -> str:
    """Return which of :data:`ON_CPU` computes an op on tensors of this device type; "" if none does.

    If they should and none can, that is recorded as a fallback.

    Args:
        asked: "auto" for the process-wide choice, or a backend's name.
        why_not: says why the backend of this name does not compute it, "" if it does; whether it was chosen by name.

    Raises:
        RuntimeError: as :func:`runs`.
    """
    reason, chosen = "", named(asked)
    for name in ON_CPU:
        if runs(name, device, asked):
            reason = why_not(name, chosen)
            if not reason:
                return name
    if reason:
        fallback(op, f"{reason}; the plain torch reference runs instead")
    return ""


def fallback(what: str, reason: str) -> None:
    """Record that ``what`` runs slower than it could because of ``reason``; warns at the first occurrence."""
    key = (what, reason)
    with _lock:
        count = _fallbacks.get(key, 0)
        _fallbacks[key] = count + 1
    if count == 0:
        warnings.warn(f"{what}: {reason}", FallbackWarning, stacklevel=3)


def fallbacks() -> dict[tuple[str, str], int]:
    """Return what fell back so far in this process: ``(what, reason) -> how often``."""
    with _lock:
        return dict(_fallbacks)
