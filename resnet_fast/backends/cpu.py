"""The CPU engine: whether resnet_fast._cpu can run here, which of its instruction sets does, and why not.

The module is loaded when somebody asks, and what went wrong is kept. No other file touches it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

from .cuda import record

NAME = "cpu"

_INTERFACE = 1  # of the module's functions, as in csrc/cpu/binding.cpp


@functools.cache
def _loaded() -> tuple[Any, str]:
    """Return the installed module and "", or None and why there is none."""
    if importlib.util.find_spec("resnet_fast._cpu") is None:
        return None, f"resnet_fast._cpu is not built: {_why_not_built()}"
    try:
        module = importlib.import_module("resnet_fast._cpu")
        if module.build_info().get("interface") != _INTERFACE:
            return None, "resnet_fast._cpu was built from an older or newer csrc/ than this; build it again"
        module.isa()
    except ValueError as error:  # of RESNET_FAST_ISA
        return None, str(error)
    except Exception as error:  # whatever keeps a shared library from loading; kept, and shown by info()
        return None, f"resnet_fast._cpu does not load: {type(error).__name__}: {error}"
    return module, ""


def _why_not_built() -> str:
    found = record().get("cpu")
    if not isinstance(found, dict):
        return "this copy was not installed by setup.py (pip install -e ., or make engine)"
    if found.get("built"):
        return "it was, but for another Python, or the file is gone (install again)"
    return str(found.get("reason") or "the build gave no reason")


def load_error() -> str:
    """Why there is no module, "" if there is one: a compiler's message may have several lines."""
    return _loaded()[1]


def unavailable() -> str:
    """Return why the engine cannot be used in this process, or "" if it can."""
    return load_error().partition("\n")[0]


def module() -> Any:
    """Return ``resnet_fast._cpu``.

    Raises:
        RuntimeError: there is none that loads.
    """
    found, reason = _loaded()
    if found is None:
        raise RuntimeError(reason)
    return found


def described() -> dict[str, Any]:
    """Return the engine as ``resnet_fast.info()`` shows it.

    ``built``: whether there is a module that loads; ``reason``: why not, in full. If built: ``isa``, the instruction
    set that runs; ``best_isa``, the highest that this machine runs, which ``RESNET_FAST_ISA`` may have ruled out;
    ``isas`` in the build; ``compiler``; ``sanitizer``, "" for none; ``threads``, which are torch's.
    """
    found, reason = _loaded()
    if found is None:
        return {"built": False, "reason": reason}
    info = found.build_info()
    return {
        "built": True,
        "reason": "",
        "isa": found.isa(),
        "best_isa": found.choose_isa(found.features(of_machine=True)),
        "isas": list(info["isas"]),
        "compiler": info["compiler"],
        "sanitizer": info["sanitizer"],
        "threads": torch.get_num_threads(),
    }
