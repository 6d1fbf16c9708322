"""What all kernels share on the host: a launch as a value, the precision of a product, powers of two, limits.

A kernel's file makes a ``Launch`` out of tensors, a problem and a config; whoever holds it runs it or only compiles it.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dis
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

#: Offsets from this element count on need 64 bits.
WIDE_FROM = 2**31

_LARGEST_TILE = 2**16

ITEMSIZE = {"fp16": 2, "bf16": 2, "tf32": 4, "fp32": 4, "int8": 1, "fp8": 1}

#: The copy engine wants addresses and strides in multiples of this many bytes.
ALIGNMENT = 16


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is called with. ``options``: its compile-time constants, num_warps, num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> None:
        """Put it on the current stream of the current device (or run it in Triton's interpreter)."""
        self.kernel[self.grid](*self.args, **self.options, **_dependency(self.kernel))

    def compile(self) -> Any:
        """Compile for the active driver's target and return Triton's compiled kernel; nothing is launched."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self.options, **_dependency(self.kernel))


def _dependency(kernel: Any) -> dict[str, bool]:
    """Return the option of programmatic dependent launch if the current GPU has it, from capability 9.0 on.

    Kernels compiled with it wait first (``_language.wait_for_earlier_kernels``), so they may follow any other.
    ``RESNET_FAST_PDL=0`` switches it off.
    """
    if not hasattr(kernel, "device_caches"):  # interpreted
        return {}
    settle(kernel)
    if os.environ.get("RESNET_FAST_PDL") == "0":
        return {}
    from triton.runtime import driver

    target = driver.active.get_current_target()
    early = target.backend == "cuda" and target.arch >= 90 and _driver_version() >= _RECORDS_EDGES
    return {"launch_pdl": True} if early else {}


def settle(kernel: Any) -> None:
    """Let Triton compute the cache key of what ``kernel`` calls before its own.

    The key has the constants that those functions read only if Triton knows them by then, so otherwise it would depend
    on what the process has compiled before, and the cache would not find what another process has left there.
    """
    if getattr(kernel, "hash", "") is not None:  # known already
        return
    for instruction in dis.get_instructions(kernel.fn):
        if instruction.opname == "LOAD_GLOBAL":  # not an attribute of the same name, as dot of tl.dot
            settle(kernel.fn.__globals__.get(instruction.argval))
    kernel.cache_key  # noqa: B018 - computed when first asked for


#: The driver's version of CUDA from which on a graph can hold such a launch.
_RECORDS_EDGES = 12030


@lru_cache(maxsize=1)
def _driver_version() -> int:
    """Return the version of CUDA that the driver has, as 12030; without a driver, where nothing runs, that one."""
    version = ctypes.c_int(_RECORDS_EDGES)
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


#: Addresses of one tensor whose maps are kept; allocators give the same few again and again.
_MAPS_KEPT = 64


class Ready:
    """A launch whose kernel is loaded, for other tensors of the same shapes: it goes straight to Triton's C launcher.

    What Triton does at each launch is done once: binding and specialising arguments, and encoding tensor maps, once for
    each address. :meth:`of` makes one.
    """

    def __init__(self, launcher: Callable[..., None], head: list[Any], nested: bool, values: list[Any]) -> None:
        self._launcher, self._head, self._nested, self._values = launcher, head, nested, values
        from triton import knobs
        from triton.runtime import driver

        self._hooks, self._drivers = knobs.runtime, driver
        self._stream = -1
        self._like: list[tuple[Any, Any] | None] = []
        self._pointers: list[tuple[int, int]] = []
        self._maps: list[tuple[int, int, Any, Any, dict[int, Any]]] = []

    @classmethod
    def of(cls, launch: Launch, tensors: Sequence[Any]) -> Ready | None:
        """Return the launch for other tensors in the place of ``tensors``, from which it was made, all different.

        None if that cannot be: the interpreter, an unknown launcher, a tensor that is not among them, scratch memory.
        """
        kernel = launch.kernel
        own = {id(tensor): index for index, tensor in enumerate(tensors) if tensor is not None}
        if not hasattr(kernel, "device_caches") or kernel.pre_run_hooks:
            return None
        compiled = launch.compile()
        run = compiled.run
        scratch = getattr(run, "global_scratch_size", 1), getattr(run, "profile_scratch_size", 1)
        if any(scratch) or not hasattr(run, "launch"):
            return None
        rest = kernel.params[len(launch.args) :]
        bound = (*launch.args, *(launch.options.get(each.name, each.default) for each in rest))
        # What its launcher is called with: in one list behind the others (Triton 3.7), or one by one (3.6).
        given: list[Any] = []
        spy, stream, grid = copy.copy(run), object(), (*launch.grid, 1, 1)[:3]
        spy.launch = lambda *values: given.extend(values)
        spy(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *bound)
        nested = len(given[-1]) == len(bound) if isinstance(given[-1], tuple | list) else False
        head, tail = (given[:-1], given[-1]) if nested else (given[: -len(bound)], given[-len(bound) :])
        if any(one is not other for one, other in zip(tail, bound, strict=True)) or stream not in head:
            return None

        described = [index for index, value in enumerate(bound) if hasattr(value, "block_shape")]
        launcher, metadata = run.launch, [None] * len(described)
        if described:
            inside = inspect.getclosurevars(run.launch).nonlocals
            if set(inside.get("tensordesc_indices", ())) != set(described) or "launcher" not in inside:
                return None
            launcher, metadata = inside["launcher"], inside["tensordesc_meta"]
            if None in metadata:
                return None
        made = cls(launcher, head, nested, [])
        made._stream = head.index(stream)
        for index, value in enumerate(bound):
            base = getattr(value, "base", value)
            if index in described:
                if id(base) not in own:
                    return None
                place, empty = len(made._values), copy.copy(value)
                empty.base = None  # or the memory of the first tensors would be kept
                made._maps.append((place, own[id(base)], empty, metadata[len(made._maps)], {}))
                made._values += [None, *value.shape, *value.strides]
            elif hasattr(value, "data_ptr"):
                if id(value) not in own:
                    return None
                made._pointers.append((len(made._values), own[id(value)]))
                made._values.append(None)
            else:
                made._values.append(value)
        made._like = [None if each is None else (each.stride(), each.dtype) for each in tensors]
        return made

    def __call__(self, tensors: Sequence[Any]) -> bool:
        """Put it on the current stream of the current device; False, and nothing is done, if that cannot be.

        Args:
            tensors: of the shapes of those it was made from; other strides, dtypes and alignments are seen.
        """
        addresses = []
        for tensor, like in zip(tensors, self._like, strict=True):
            if tensor is None or like is None:
                if tensor is not like:
                    return False
                addresses.append(0)
                continue
            address = tensor.data_ptr()
            if address % ALIGNMENT or tensor.stride() != like[0] or tensor.dtype is not like[1]:
                return False
            addresses.append(address)
        for hook in (self._hooks.launch_enter_hook, self._hooks.launch_exit_hook):
            if hook is not None and getattr(hook, "calls", True):  # somebody watches launches, such as a profiler
                return False
        values, head = self._values.copy(), self._head.copy()
        for place, index in self._pointers:
            values[place] = addresses[index]
        for place, index, descriptor, metadata, known in self._maps:
            address = addresses[index]
            if address not in known:
                if len(known) >= _MAPS_KEPT:
                    known.clear()
                known[address] = _encoded(descriptor, metadata, tensors[index])
            values[place] = known[address]
        active = self._drivers.active
        head[self._stream] = active.get_current_stream(active.get_current_device())
        if self._nested:
            self._launcher(*head, values)
        else:
            self._launcher(*head, *values)
        return True


def _encoded(descriptor: Any, metadata: Any, base: Any) -> Any:
    """Return the tensor map of a descriptor of another tensor."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    other = copy.copy(descriptor)
    other.base = base
    return make_tensordesc_arg(other, metadata)[0]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(value: int, least: int, most: int) -> int:
    """Return the smallest power of two that is not below ``value``, within [least, most]."""
    return min(most, max(least, 1 << max(0, value - 1).bit_length()))


def dividing_power_of_two(value: int, most: int) -> int:
    """Return the largest power of two that divides ``value``, at most ``most``."""
    return min(most, value & -value)


def dot_precision(precision: str) -> str:
    """``tl.dot``'s input_precision; it means something for float32 operands only."""
    return "ieee" if precision == "fp32" else "tf32"


def aligned(*tensors: Any) -> bool:
    """Return whether the copy engine can address each tensor's first element."""
    return all(tensor is None or tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)


def wide(*tensors: Any) -> bool:
    """Return whether offsets into one of the tensors, masked ones of its last tile too, may not fit in 32 bits."""
    return any(tensor is not None and tensor.numel() >= WIDE_FROM - _LARGEST_TILE for tensor in tensors)


@lru_cache(maxsize=4096)
def image_box(n: int, p: int, q: int, pixels: int) -> tuple[int, int, int]:
    """Return a box of ``pixels`` (a power of two) [images, rows, columns], powers of two, that covers [N, P, Q] best.

    Least waste first; among equals the one with most pixels of one image, and the squarest.
    """

    def cost(box: tuple[int, int, int]) -> tuple[int, int, int]:
        covered = cdiv(n, box[0]) * cdiv(p, box[1]) * cdiv(q, box[2])
        return covered, box[0], abs(box[1].bit_length() - box[2].bit_length())

    powers = [1 << i for i in range(pixels.bit_length())]
    boxes = [(pixels // (h * w), h, w) for h in powers for w in powers if h * w <= pixels]
    return min(boxes, key=cost)
