"""A driver without a GPU for Triton: libcuda.c, compiled, loaded, and active in this process, which must not interpret.

Triton's own loader, launcher and tensor-map encoder run on it. Nothing is computed; what is launched is checked.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.emulator.build import cache

_SOURCE = Path(__file__).with_name("libcuda.c")
_FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]


@functools.cache
def unavailable() -> str:
    """Return why Triton cannot run on this driver here, "" if it can."""
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    if _compiler() is None:
        return "no C compiler (set CC)"
    return ""


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "gcc"))


def build() -> Path:
    """Return ``libcuda.so.1``, compiled with the headers that Triton brings.

    Raises:
        RuntimeError: the reason of ``unavailable()``; subprocess.CalledProcessError: it does not compile.
    """
    if unavailable():
        raise RuntimeError(unavailable())
    import triton.backends.nvidia

    headers = Path(triton.backends.nvidia.__file__).parent / "include"
    command = [str(_compiler()), *_FLAGS, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers}", str(_SOURCE)]
    parts = (_SOURCE.read_bytes(), (headers / "cuda.h").read_bytes(), " ".join(command).encode())
    key = hashlib.sha256(b"".join(parts)).hexdigest()
    library = cache() / f"libcuda-{key[:16]}" / "libcuda.so.1"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        made = library.with_name(f"{os.getpid()}.so")
        subprocess.run([*command, "-o", str(made)], check=True)
        made.replace(library)
    return library


class Driver:
    """The driver, active in this process from now on.

    Args:
        stream: the current stream of the device, a number.
    """

    def __init__(self, stream: int = 0) -> None:
        if os.environ.get("TRITON_INTERPRET"):
            raise RuntimeError("Triton interprets in this process: unset TRITON_INTERPRET before it is imported")
        path = build()
        os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)
        # Loaded once, it is the libcuda.so.1 of everything that this process loads later.
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self._library.fake_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._library.fake_recorded.restype = ctypes.c_void_p
        self._library.fake_refuse.argtypes = [ctypes.c_char_p, ctypes.c_int]
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia import driver

        fake = self

        class Cuda(driver.CudaDriver):  # type: ignore[misc]
            def __init__(self) -> None:
                self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
                self.get_current_device = lambda: 0
                self.get_current_stream = lambda device=None: fake.stream
                self.get_device_capability = lambda device=None: (9, 0)

            @staticmethod
            def is_active() -> bool:
                return True

            def get_current_target(self) -> Any:
                return GPUTarget("cuda", 90, 32)

        self.stream = stream
        triton.runtime.driver.set_active(Cuda())

    @property
    def launches(self) -> int:
        """How many there were so far."""
        return int(self._library.fake_launches())

    @property
    def early(self) -> int:
        """How many of them may start before the kernel before is over."""
        return int(self._library.fake_early())

    @property
    def tensor_maps(self) -> int:
        """How many were asked for so far."""
        return int(self._library.fake_tensor_maps())

    @contextlib.contextmanager
    def memory(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Nothing but these tensors is memory of the device; otherwise everything is."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._library.fake_memory(storage.data_ptr(), storage.nbytes())
        try:
            yield
        finally:
            self._library.fake_forget_memory()

    @contextlib.contextmanager
    def shared_memory(self, bytes_: int) -> Iterator[None]:
        """A block may opt in to no more than these bytes."""
        self._library.fake_shared_memory(bytes_)
        try:
            yield
        finally:
            self._library.fake_shared_memory(0)

    @contextlib.contextmanager
    def refusing(self, kernel: str, error: int) -> Iterator[None]:
        """Launches of the kernel with this name fail with this number of a ``CUresult``."""
        self._library.fake_refuse(kernel.encode(), error)
        try:
            yield
        finally:
            self._library.fake_refuse(b"", 0)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[bytes]]:
        """What is launched meanwhile, at the end: equal bytes for equal kernels, grids, streams and parameters."""
        found: list[bytes] = []
        self._library.fake_record(1)
        try:
            yield found
            size = ctypes.c_size_t()
            found.append(ctypes.string_at(self._library.fake_recorded(ctypes.byref(size)), size.value))
        finally:
            self._library.fake_record(0)


def with_memory(tensor: Tensor) -> Tensor:
    """Return a CPU tensor like one without data, of memory that nobody touches and that therefore costs nothing."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
