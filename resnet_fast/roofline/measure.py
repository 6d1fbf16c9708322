"""Measured time beside the floor: what each node of a fused graph takes on a CUDA GPU, by events, within a forward.

It knows no floor and no op, and checks no answer.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

_FASTEST_CLOCK = 2.5e9
"""Cycles per second that no GPU of today exceeds: a wait counted in cycles lasts at least as long as asked."""

_LONGEST_WAIT = 0.5


class _Timed(fx.Interpreter):
    """Records an event before and behind each node that computes."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.events: dict[str, tuple[Any, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if not n.op.startswith("call_"):
            return super().run_node(n)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        result = super().run_node(n)
        end.record()
        self.events[n.name] = (begin, end)
        return result


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 convolutions and products may round to tf32, for the time being."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def node_seconds(graph_module: fx.GraphModule, x: Tensor, *, runs: int = 20, warmup: int = 3) -> dict[str, float]:
    """Median seconds on the GPU of every node of ``graph_module`` that computes, over ``runs`` forwards of ``x``.

    The GPU is kept waiting until the whole forward is queued, so that what the host needs between two launches is not
    counted. What the nodes before left in the level-2 cache is there, as in any forward: small batches can be faster
    than device memory allows.
    """
    timed = _Timed(graph_module)
    with torch.no_grad(), torch.cuda.device_of(x):
        for _ in range(warmup):
            timed.run(x)
        torch.cuda.synchronize()
        began = time.perf_counter()
        timed.run(x)
        queued = time.perf_counter() - began
        torch.cuda.synchronize()
        samples: dict[str, list[float]] = {}
        for _ in range(runs):
            torch.cuda._sleep(int(min(2 * queued, _LONGEST_WAIT) * _FASTEST_CLOCK))
            timed.run(x)
            torch.cuda.synchronize()
            for name, (begin, end) in timed.events.items():
                samples.setdefault(name, []).append(1e-3 * begin.elapsed_time(end))
    return {name: statistics.median(seconds) for name, seconds in samples.items()}
