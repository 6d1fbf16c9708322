"""Where the tests of the Triton kernels run: on the GPU if there is one, else on the CPU in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from resnet_fast import backends
from resnet_fast.backends import triton
from resnet_fast.kernels import gpus

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _spare_the_interpreter() -> None:
    """Spare the interpreter half of its time: at each call of a device function it would look through all of
    ``triton.language`` for functions to replace, which its kernel's launch has already replaced; and for each sum,
    difference and product of integers it would compute an assertion against overflow, which it then drops unless it
    debugs; and for each value a table of types.
    """
    import inspect

    from triton.language.core import block_type, dtype, is_builtin
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    table_at_each_call = interpreter._get_np_dtype
    of_scalars = functools.cache(table_at_each_call)

    def numpy_type(given: Any) -> Any:
        scalar = given.element_ty if isinstance(given, block_type) else given
        return of_scalars(scalar) if type(scalar) is dtype else table_at_each_call(given)  # of a pointer

    interpreter._get_np_dtype = numpy_type
    patch = interpreter._patch_builtin
    some_function: dict[Any, str | None] = {}

    def patch_what_is_not(package: Any, *others: Any) -> None:
        if package not in some_function:
            names = (name for name, member in inspect.getmembers(package) if is_builtin(member))
            some_function[package] = next(names, None)
        name = some_function[package]
        if name is None or is_builtin(getattr(package, name)):
            patch(package, *others)

    interpreter._patch_builtin = patch_what_is_not


if DEVICE == "cpu" and not triton.unavailable():
    _spare_the_interpreter()

#: In the interpreter launches are chosen as for these GPUs: with the copy engine, and without. A real GPU is itself.
FORMS = ["as found"] if DEVICE == "cuda" else ["h100", "a100"]


class _Unready(dict[Any, Any]):
    """No launch is made again but by its kernel's module."""

    def get(self, key: Any, default: Any = None) -> bool:
        return False


def launch_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch is made by its kernel's module, which a test watches, not as one before it."""
    monkeypatch.setattr(triton, "_ready", _Unready())


def count_launches(monkeypatch: pytest.MonkeyPatch, *ops: str) -> Counter[str]:
    """How often each of these ops' kernels is launched from now on."""
    counts: Counter[str] = Counter()
    launch_anew(monkeypatch)
    for op in ops:
        module = importlib.import_module(f"resnet_fast.kernels.{op}")
        for name in {"launch", "launch_sum"} & set(dir(module)):  # the last launch of a layer
            make = getattr(module, name)

            def launch(*args: Any, _make: Any = make, _op: str = op, **kwargs: Any) -> Any:
                counts[_op] += 1
                return _make(*args, **kwargs)

            monkeypatch.setattr(module, name, launch)
    return counts


@contextmanager
def kernels(form: str) -> Iterator[None]:
    """The ops run Triton, with launches chosen as for the GPU ``form``."""
    if DEVICE == "cuda":
        with backends.use("triton"):
            yield
        return
    with triton.assume(gpus.known(form)), backends.use("triton"):
        yield
