"""Real machine code without a GPU: launches compiled for a capability in worker processes, and what came out of it.

Nothing is ever launched here. Triton keeps what was compiled in its cache on disk, where a later launch finds it.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import ops
from .ops import Case

if TYPE_CHECKING:
    from resnet_fast.kernels.gpus import GPU

#: Multiply instructions by the lowest nine bits of their machine code, the same on capabilities 8.0 to 10.0: warp
#: products and warp-group products of floating point numbers, of integers and of float8, products in tensor memory, and
#: plain multiply-adds, one or two at a time.
OPCODES = {
    0x03C: "HMMA", 0x037: "IMMA", 0x1F0: "HGMMA", 0x1F1: "IGMMA", 0x1F3: "QGMMA", 0x1EA: "UTCHMMA", 0x023: "FFMA",
    0x049: "FFMA",
}  # fmt: skip
#: Of warp groups: they run on while the program goes on, until it waits for them.
GROUPED = ("HGMMA", "IGMMA", "QGMMA")

#: The instruction that waits for warp-group products, in the same nine bits; bit 16 of its upper half tells it from the
#: one that begins them, the next eight bits below are how many may be left unfinished.
_WARPGROUP, _WAITS = 0x1C5, 1 << 16

#: The wait for the kernel before (ACQBULK), the branch and the exit, in the same nine bits.
_WAIT, _BRANCH, _EXIT = 0x02E, 0x147, 0x14D

#: What reads or writes memory of the device, or fetches it into a cache: LD, LDG, ST, STG, ATOM, RED, CCTL, ATOMG,
#: LDGSTS, UTMALDG, UTMASTG, UTMAPF, UBLKCP, UBLKRED, UBLKPF.
_MEMORY = frozenset(
    (0x180, 0x181, 0x185, 0x186, 0x18A, 0x18E, 0x18F, 0x1A8, 0x1AE, 0x1B4, 0x1B5, 0x1B8, 0x1BA, 0x1BB, 0x1BC)
)

#: Of HGMMA's, IGMMA's and QGMMA's twelve bits, the one that says that the first operand comes from registers.
_FROM_REGISTERS = 1 << 10

#: A maximum in PTX without ``.NaN``.
_MAXIMUM = re.compile(r"\bmax(?:\.ftz)?\.(?:b?f16x?2?|f32)\b")

_USAGE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")

#: Threads and blocks that a multiprocessor holds at most, if it is not 2048 and 32.
_THREADS = {86: 1536, 87: 1536, 89: 1536, 120: 1536, 121: 1536}
_BLOCKS = {86: 16, 87: 16, 89: 24}

#: Columns of tensor memory on a multiprocessor of capability 10.
_TENSOR_COLUMNS = 512


@dataclass(frozen=True)
class Task:
    """A launch to compile: for which capability, of which case, with which of its kernel's configs.

    Attributes:
        part: which of the case's launches it is, where there are several.
    """

    capability: int
    case: Case
    config: Any
    part: int = 0


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes, and which instructions multiply in it.

    Attributes:
        registers: of a thread. stack, local: bytes of memory a thread uses besides, which is where spills go.
        shared: bytes of shared memory of a block. threads: of a block.
        tensor_columns: of tensor memory, which capability 10 has.
        matrix: its multiply instructions, as named in ``OPCODES``; FFMA only if no matrix unit works, "" without any.
        serialised: whether ptxas makes each of those of warp groups wait for the last (its warnings C7510 to C7515).
        a: where those take their first operand from: "shared", "registers", both joined by "+", "" without any.
        drops_nan: whether it takes a floating point maximum that turns NaN into the other operand.
        early: whether it is launched while the kernel before still runs. waits: whether it waits for that kernel:
            "first", "late" if it may touch memory without, "" not at all.
    """

    registers: int
    stack: int
    local: int
    shared: int
    threads: int
    tensor_columns: int
    matrix: str
    serialised: bool = False
    a: str = ""
    drops_nan: bool = False
    early: bool = False
    waits: str = ""

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.local > 0

    def occupancy(self, gpu: GPU) -> int:
        """Return how many blocks a multiprocessor of ``gpu`` holds at once; 0 if not even one fits."""
        warps = self.threads // 32
        per_warp = -(-self.registers * 32 // 256) * 256  # registers are handed out to warps in units of 256
        by_registers = 4 * (gpu.registers // 4 // per_warp) // warps  # each quarter has its own
        by_shared = gpu.shared_memory_per_multiprocessor // (self.shared + 1024)  # the system keeps 1 KB of each block
        if self.shared > gpu.shared_memory:
            by_shared = 0
        by_threads = _THREADS.get(gpu.capability, 2048) // self.threads
        limits = [by_registers, by_shared, by_threads, _BLOCKS.get(gpu.capability, 32)]
        if self.tensor_columns:
            limits.append(_TENSOR_COLUMNS // self.tensor_columns)
        return min(limits)


@dataclass(frozen=True)
class Compiled:
    """A task's outcome: resources, or the error in one line."""

    task: Task
    resources: Resources | None
    error: str = ""


class _Driver:
    """Stands in for the driver of a GPU of one capability. The capability is its device number too, since Triton
    remembers the target of each device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def is_active(self) -> bool:
        return True


def launches(case: Case, config: Any) -> tuple[Any, ...]:
    """Return the case's ``Launch``, or all of them in order, on tensors that have no data."""
    op = ops.get(case.op)
    made = op.launch(op.kernel, op.example(case, torch.device("meta")), case, config)
    return made.parts if isinstance(made, ops.Launches) else (made,)


def launch(task: Task) -> Any:
    """Return the task's ``Launch``, on tensors that have no data."""
    return launches(task.case, task.config)[task.part]


def tasks(capability: int, case: Case, config: Any) -> tuple[Task, ...]:
    """Return what is to be compiled for a case: a task for each of its launches."""
    return tuple(Task(capability, case, config, part) for part in range(len(launches(case, config))))


def compile_task(task: Task) -> Compiled:
    """Compile one task in this process, whose Triton must not interpret; its active driver is replaced for good."""
    import triton

    triton.runtime.driver.set_active(_Driver(task.capability))
    try:
        return Compiled(task, _resources(launch(task).compile()))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Compiled(task, None, f"{type(error).__name__}: {lines[-1].strip()}")


def _resources(kernel: Any) -> Resources:
    from triton import knobs

    metadata, cubin = kernel.metadata, kernel.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in _USAGE.findall(text)}
    code = read_code(cubin)
    return Resources(
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=metadata.shared,
        threads=32 * metadata.num_warps,
        tensor_columns=getattr(metadata, "tmem_size", 0) or 0,
        matrix="+".join(sorted(code.multiplies - {"FFMA"})) or "+".join(code.multiplies),
        serialised=code.serialised,
        a="+".join(sorted(code.a)),
        drops_nan=bool(_MAXIMUM.search(kernel.asm["ptx"])),
        early=metadata.launch_pdl,
        waits=code.waits,
    )


@dataclass(frozen=True)
class Code:
    """What machine code says of its products and of its wait: see :class:`Resources`."""

    multiplies: frozenset[str]
    serialised: bool
    a: frozenset[str]
    waits: str


def read_code(cubin: bytes) -> Code:
    """Return what the machine code in a 64-bit ELF file multiplies with (named in ``OPCODES``), and if it waits first.

    Read from the code itself: nvdisasm takes longer for one kernel than compiling it.
    """
    sections = struct.unpack_from("<Q", cubin, 40)[0]
    size, count, named = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + index * size) for index in range(count)]
    strings = headers[named][4]
    found, a = set(), set()
    products: list[bool] = []  # of each warp-group product, whether all products are waited for before the next
    waits, touched, furthest = "", False, 0  # until the wait: was memory touched, or does a branch lead past it
    for name, _, _, _, offset, length in headers:
        if not cubin.startswith(b".text.", strings + name):
            continue
        for at in range(offset, offset + length, 16):  # instructions have 128 bits, the opcode comes first
            low, high = struct.unpack_from("<QQ", cubin, at)
            if not waits:
                touched |= low & 0x1FF in _MEMORY or low & 0x1FF == _EXIT
                if low & 0x1FF == _BRANCH:
                    furthest = max(furthest, _target(at, low))
                if low & 0x1FF == _WAIT:
                    always = low >> 12 & 15 == 7  # no predicate
                    waits = "first" if always and not touched and furthest <= at else "late"
            if low & 0x1FF == _WARPGROUP:
                if products and high & _WAITS and not high >> 8 & 0xFF:
                    products[-1] = True
                continue
            multiply = OPCODES.get(low & 0x1FF)
            if multiply is not None:
                found.add(multiply)
            if multiply in GROUPED:
                a.add("registers" if low & _FROM_REGISTERS else "shared")
                products.append(False)
    # One product alone is waited for at once in any case.
    return Code(frozenset(found), len(products) > 1 and all(products), frozenset(a), waits)


def _target(at: int, low: int) -> int:
    """Return where the branch at ``at`` leads: a signed number of words from the next instruction on."""
    words = low >> 34 << 8 | low >> 16 & 0xFF
    return at + 16 + 4 * (words - (1 << 38 if words >> 37 else 0))


def _begin(environment: dict[str, str]) -> None:
    """In a new worker: no interpreter, the parent's other settings, and Ctrl-C left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)


class Compiler:
    """Worker processes that compile; a context manager. ``jobs``: how many, by default one for each core."""

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs or os.cpu_count() or 1
        # Workers are started anew, not forked: this process may have a GPU or an interpreting Triton.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self._pool = ProcessPoolExecutor(
            self.jobs, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(environment,)
        )

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, tasks: Iterable[Task]) -> Iterator[Compiled]:
        """The outcomes, in the order in which they come."""
        futures = [self._pool.submit(compile_task, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
