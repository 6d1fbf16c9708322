"""The sweep's runner on a CUDA GPU: compiles in other processes, checks against torch, times CUDA graphs of launches.

It changes no setting of the GPU and chooses nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_fast import backends
from resnet_fast.roofline.measure import tf32

from . import ops
from .compiler import Compiler, tasks
from .ops import Case, Example

if TYPE_CHECKING:
    from resnet_fast.kernels.gpus import GPU

#: The relative error, in the 2-norm, that a launch's answer may have: a few roundings of what it stores or multiplies.
#: Not of "int8", whose answers are exact. Of "fp8" both are rounded to 3 bits of fraction: few are on either side of a
#: half.
ALLOWED = {"fp16": 4 * 2.0**-11, "bf16": 4 * 2.0**-8, "tf32": 4 * 2.0**-11, "fp32": 1e-5, "fp8": 2.0**-6}

_SECONDS = 2e-3
"""How long one replay of a graph lasts at least."""

_MOST_LAUNCHES = 512
_MOST_SETS = 256
_REPLAYS = 5


def error(ours: Tensor, exact: Tensor, precision: str) -> str:
    """Return what is wrong with an answer beside the exact one, "" if nothing is.

    The error must be within ``ALLOWED`` of the exact answer's size, and no single element off by more than 16 times
    that, so that one wrong pixel among millions shows too. In "int8" every bit must be right.
    """
    if precision == "int8":
        different = int((ours != exact).sum())  # NaN is different, too
        return f"{different} of {exact.numel()} elements differ from the integer reference" if different else ""
    allowed = ALLOWED[precision]
    if precision == "fp8":
        ours, exact = ours.float(), exact.float()
    difference = (ours.to(exact.dtype) - exact).abs()
    if not bool(difference.isfinite().all()):
        return "NaN or infinity in the answer"
    size = exact.norm()
    relative = float(difference.norm() / size)
    if relative > allowed:
        return f"relative error {relative:.2e}, allowed is {allowed:.2e}"
    typical = size / max(1, exact.numel()) ** 0.5
    worst = float((difference / (typical + exact.abs())).max())
    if worst > 16 * allowed:
        return f"an element is off by {worst:.2e} of its size, allowed is {16 * allowed:.2e}"
    return ""


def poison(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Fill the outputs with what is right nowhere: NaN, of integers the complement of the right answer."""
    for output, right in zip(outputs, exact, strict=True):
        if output.is_floating_point():
            output.fill_(math.nan)
        elif output.numel():
            output.copy_(right.bitwise_not())


def wrong(outputs: Sequence[Tensor], exact: Sequence[Tensor], precision: str) -> str:
    """Return the first thing that is wrong with the outputs, "" if nothing is; empty ones have nothing to compare."""
    pairs = zip(outputs, exact, strict=True)
    return next((reason for ours, right in pairs if right.numel() and (reason := error(ours, right, precision))), "")


class CudaRunner:
    """Runs the launches of cases on one GPU; a context manager, since it owns processes.

    Args:
        gpu: its description. device: where its tensors are. jobs: processes that compile.
    """

    def __init__(self, gpu: GPU, device: torch.device, jobs: int | None = None) -> None:
        self.gpu, self.device = gpu, device
        self._compiler = Compiler(jobs)
        self.batch = 2 * self._compiler.jobs
        self._case: Case | None = None
        self._sets: list[Example] = []
        self._exact: tuple[Tensor, ...] = ()

    def __enter__(self) -> CudaRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._compiler.__exit__(kind, value, trace)

    def load(self, case: Case) -> None:
        op, before = ops.get(case.op), self._case
        if before is not None and _same_tensors(before, case):
            self._case = case
            return
        self._case, self._sets, self._exact = case, [], ()  # the last case's memory is free before more is taken
        torch.manual_seed(0)
        first = op.example(case, self.device)
        with tf32(False), torch.no_grad():
            self._exact = first.exact(torch.float32 if case.problem.precision in ("fp16", "bf16") else torch.float64)
        # Successive launches take different tensors, so that none finds its own in the level-2 cache.
        count = min(_MOST_SETS, 1 + math.ceil(2 * self.gpu.l2 / first.nbytes))
        self._sets = [first, *(op.example(case, self.device) for _ in range(count - 1))]

    def unusable(self, configs: Sequence[Any]) -> Mapping[Any, str]:
        assert self._case is not None
        if ops.is_cuda(self._case):
            return {}  # compiled they are, and a spill fails their build
        reasons: dict[Any, str] = {}
        wanted = [task for config in configs for task in tasks(self.gpu.capability, self._case, config)]
        for compiled in self._compiler.run(wanted):
            resources, reason = compiled.resources, compiled.error
            if resources is not None and resources.spills:
                reason = f"spills {resources.stack + resources.local} bytes a thread"
            elif resources is not None and resources.occupancy(self.gpu) == 0:
                reason = (
                    f"a block does not fit: {resources.shared} bytes of shared memory, {resources.registers} registers"
                )
            if reason:
                reasons[compiled.task.config] = reason
        return reasons

    def wrong(self, config: Any) -> str:
        from triton import errors

        case, example = self._case, self._sets[0]
        assert case is not None
        poison(example.outputs, self._exact)  # what the launch does not write shows
        try:
            with torch.cuda.device(self.device):
                self._launch_on(config, example)()
                torch.cuda.synchronize()
        except (errors.TritonError, RuntimeError, ValueError) as failure:
            torch.cuda.synchronize()  # raises where the GPU can run nothing any more in this process: the sweep is over
            return f"does not run: {' '.join(str(failure).split())[:200]}"
        return wrong(example.outputs, self._exact, case.problem.precision)

    def seconds(self, config: Any) -> float:
        return self._timed([self._launch_on(config, example) for example in self._sets])

    def separately(self) -> float:
        case = self._case
        assert case is not None
        parts = ops.get(case.op).parts
        if parts is None:
            return math.inf
        with torch.no_grad(), tf32(case.problem.precision == "tf32"):
            return self._timed([partial(parts, example) for example in self._sets])

    def _timed(self, launches: Sequence[Callable[[], object]]) -> float:
        """Seconds of one of the launches, from replays of a CUDA graph of them all."""
        with torch.cuda.device(self.device):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                begin.record()
                for launch in launches:
                    launch()
                end.record()
            torch.cuda.synchronize()
            once = 1e-3 * begin.elapsed_time(end) / len(launches)
            rounds = math.ceil(min(_MOST_LAUNCHES, _SECONDS / max(once, 1e-7)) / len(launches))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(rounds):
                    for launch in launches:
                        launch()
            taken = []
            for _ in range(1 + _REPLAYS):
                begin.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                taken.append(1e-3 * begin.elapsed_time(end))
        return statistics.median(taken[1:]) / (rounds * len(launches))

    def _launch_on(self, config: Any, example: Example) -> Any:
        assert self._case is not None
        op = ops.get(self._case.op)
        return op.launch(op.kernel, example, self._case, config)


def _same_tensors(a: Case, b: Case) -> bool:
    """Return whether the two cases are of Triton's and CUDA's kernels for one thing."""
    return (a.op.removesuffix(".cuda"), a.problem, a.form) == (b.op.removesuffix(".cuda"), b.problem, b.form)


def versions(device: torch.device) -> dict[str, str]:
    """What a table is measured with: the GPU as its driver names it, torch, triton, CUDA, and _C's compiler, if any."""
    import triton

    native = backends.cuda.native()
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        **({} if native is None else {"nvcc": str(native.info["cuda"])}),
    }
