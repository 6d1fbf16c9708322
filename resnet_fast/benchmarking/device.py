"""Where contestants run: how to wait for the device, and how a CUDA graph of a call is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Captured = tuple[Callable[[], object], Tensor]
"""What replays a recorded graph, and the tensor that each replay fills."""


def capture(run: Callable[[], Tensor]) -> Captured:
    """Record ``run``, which must read static tensors and launch on the current stream, into a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        output = run()
    torch.cuda.synchronize()
    return graph.replay, output


@dataclass(frozen=True)
class Device:
    """Where contestants run.

    Attributes:
        name: torch's name of it. kind: "cpu" or "cuda", whose peers take part; tests put a CPU in a GPU's place.
        synchronize: waits until all that was launched is done. capture: records a call into a graph, None if the
            device has no graphs.
    """

    name: str
    kind: str
    synchronize: Callable[[], object]
    capture: Callable[[Callable[[], Tensor]], Captured] | None


CPU = Device("cpu", "cpu", lambda: None, None)
CUDA = Device("cuda", "cuda", torch.cuda.synchronize, capture)


def of(name: str) -> Device:
    """Return the device called "cpu" or "cuda"."""
    return CUDA if name == "cuda" else CPU
