"""Which implementation of a fused op runs, and why a faster one did not.

The ops ask this module; users steer it with :func:`use` and read it with :func:`available` and :func:`fallbacks`.
It holds no kernel: the adapters beside it (``onednn``) and the kernel packages do.
"""

from __future__ import annotations

import threading
import warnings
from types import TracebackType

from . import cuda, onednn, triton

__all__ = ["FallbackWarning", "available", "current", "fallback", "fallbacks", "kernels", "runs", "use"]

#: Every backend by name, with the device types it runs on (none named = any).
_DEVICES: dict[str, tuple[str, ...]] = {
    "reference": (), "onednn": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)
}  # fmt: skip

_lock = threading.Lock()
_selected = "auto"
_fallbacks: dict[tuple[str, str], int] = {}


class FallbackWarning(UserWarning):
    """Something slower than asked for runs; the message says what and why. Given once per cause."""


def available() -> dict[str, str]:
    """Each backend's name with ``""`` if it can be used here, else the reason why it cannot."""
    return {
        "reference": "",
        "onednn": onednn.unavailable(),
        "triton": triton.unavailable(),
        "cuda": cuda.unavailable(),
    }


def current() -> str:
    """The backend chosen with :func:`use`: ``"auto"`` (the fastest that is available) unless somebody chose."""
    return _selected


class use:  # lower case: reads as a verb at the call site, with or without `with`
    """Choose the backend of every fused op, for the whole process: ``"auto"`` or a name from :func:`available`.

    A call takes effect at once; as a context manager (``with use("reference"): ...``) the earlier choice comes back at
    the end. The choice is shared by all threads.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot be used on this machine (the message says why).
    """

    def __init__(self, name: str) -> None:
        global _selected
        states = available()
        if name != "auto" and name not in states:
            raise ValueError(f"backends.use: unknown backend {name!r}; choose one of {['auto', *states]}")
        reason = cuda.unavailable(initialize=True) if name == "cuda" else states.get(name, "")
        if reason:
            raise RuntimeError(f"backends.use: {name!r} cannot be used here: {reason}")
        with _lock:
            self._previous, _selected = _selected, name

    def __enter__(self) -> use:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _selected
        with _lock:
            _selected = self._previous


def runs(name: str, device: str, asked: str = "auto") -> bool:
    """Whether the choice in force (``asked``, or the process-wide one where that is "auto") lets ``name`` run.

    Raises:
        RuntimeError: the chosen backend does not run on tensors of this device type.
    """
    chosen = asked if asked != "auto" else _selected
    if chosen == "auto":
        return not _DEVICES[name] or device in _DEVICES[name]
    devices = _DEVICES[chosen]
    if devices and device not in devices and not (device == "cpu" and _on_cpu(chosen)):
        raise RuntimeError(f"backend {chosen!r} runs on {' and '.join(devices)} tensors, got a tensor on {device!r}")
    return chosen == name


def _on_cpu(name: str) -> bool:
    """Whether a backend for GPUs is executed on the CPU, for tests."""
    return triton.interpreted() if name == "triton" else cuda.emulated()


def kernels(device: str, asked: str = "auto") -> str:
    """Whose kernels may compute for tensors of this device type: "triton", "cuda", either ("auto") or nobody's ("").

    Raises:
        RuntimeError: as :func:`runs`.
    """
    chosen = asked if asked != "auto" else _selected
    if chosen == "auto":
        return "auto" if device == "cuda" else ""
    return chosen if runs(chosen, device, chosen) and chosen in ("triton", "cuda") else ""


def fallback(what: str, reason: str) -> None:
    """Record that ``what`` runs slower than it could because of ``reason``; warns at the first occurrence."""
    key = (what, reason)
    with _lock:
        count = _fallbacks.get(key, 0)
        _fallbacks[key] = count + 1
    if count == 0:
        warnings.warn(f"{what}: {reason}", FallbackWarning, stacklevel=3)


def fallbacks() -> dict[tuple[str, str], int]:
    """What fell back so far in this process: ``(what, reason) -> how often``."""
    with _lock:
        return dict(_fallbacks)
