"""Help with torch.distributed: which of torchrun's processes this is, and values that all of them share.

Everything works unchanged in a single process that no launcher started. No training is here, no transport and no
reduction of its own: torchrun starts the processes, torch.distributed connects them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class AgreedError(ValueError):
    """Raised in every process for an error of one of them, so that one message is enough."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Args:
        rank: its number, 0 to ``world_size - 1``; 0 writes the files and prints.
        local_rank: its number on this machine, of ``local_world_size``; with CUDA also the number of its GPU.
        device: the device it computes on.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def connected(self) -> bool:
        """Return whether there is a process group; a single process without a launcher has none."""
        return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def start(device: str = "auto") -> Iterator[Processes]:
    """Join the processes that torchrun started, by NCCL on CUDA and gloo on the CPU, and leave them at the end.

    Args:
        device: "cuda", "cpu", or "auto" for CUDA where torch sees a GPU.

    Raises:
        ValueError: there is no GPU for this process, or torchrun's variables are incomplete.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device is {device!r}, it must be auto, cuda or cpu")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    absent = [name for name in _VARIABLES if name not in os.environ]
    if launched and absent:
        raise ValueError(
            f"RANK is set, but {', '.join(absent)} is not; start the processes with torchrun, which sets all"
        )
    numbers = [int(os.environ[name]) for name in _VARIABLES[:4]] if launched else [0, 1, 0, 1]
    rank, world_size, local_rank, local_world_size = numbers
    if kind == "cuda":
        seen = torch.cuda.device_count()
        if not seen:
            raise ValueError("device is cuda, and torch sees no CUDA GPU here; use cpu")
        if local_rank >= seen:
            raise ValueError(
                f"process {local_rank} of {local_world_size} on this machine has no GPU, torch sees {seen}; start "
                f"at most {seen} a machine (torchrun --nproc-per-node), or use device cpu"
            )
        torch.cuda.set_device(local_rank)
    place = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    processes = Processes(place, rank, world_size, local_rank, local_world_size)
    if not launched:
        yield processes
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=place if kind == "cuda" else None)
    try:
        yield processes
        dist.barrier()
    except AgreedError:
        dist.destroy_process_group()
        raise
    except BaseException:
        # The others may be waiting for this process inside NCCL, and leaving in order would wait for them; torchrun
        # ends them when this process has failed.
        if kind == "cpu":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextlib.contextmanager
def agreed(processes: Processes) -> Iterator[None]:
    """Guard a block that may fail in one process alone: then all raise AgreedError with the first one's message.

    Only ValueError and OSError are shared; anything else ends this process, and torchrun ends the others.
    """
    failure: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = error
    if not processes.connected:
        if failure is not None:
            raise failure
        return
    messages: list[str | None] = [None] * processes.world_size
    dist.all_gather_object(messages, None if failure is None else str(failure) or type(failure).__name__)
    for rank, message in enumerate(messages):
        if message is not None:
            everywhere = all(other == message for other in messages)
            raise AgreedError(message if everywhere else f"process {rank}: {message}") from failure


def from_first(value: Any, processes: Processes) -> Any:
    """Return process 0's ``value`` in every process. It is pickled: plain values and our own CPU tensors only."""
    if not processes.connected:
        return value
    box = [value if processes.first else None]
    dist.broadcast_object_list(box, src=0, device=processes.device)
    return box[0]


def total(values: Tensor, processes: Processes) -> Tensor:
    """Return the sum over all processes, in ``values``' dtype, a new tensor: exact for integers."""
    summed = values.detach().clone()
    if processes.connected:
        dist.all_reduce(summed)
    return summed


def gather(values: Tensor, processes: Processes) -> Tensor:
    """Return all processes' ``values``, stacked by rank: [world_size, ...] on the CPU, of one shape and dtype."""
    own = values.detach().to(processes.device)
    if not processes.connected:
        return own[None].cpu()
    parts = [torch.empty_like(own) for _ in range(processes.world_size)]
    dist.all_gather(parts, own)
    return torch.stack(parts).cpu()


def broadcast_buffers(module: nn.Module, processes: Processes) -> None:
    """Copy process 0's buffers to every process: BatchNorm's statistics differ if each sees its own images."""
    if processes.connected and processes.world_size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
