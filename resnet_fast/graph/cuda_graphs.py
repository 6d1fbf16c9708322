"""One CUDA graph per input shape: the whole network as a single launch, so that no kernel waits for Python.

What may be recorded is decided here; what a run computes is not known here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from resnet_fast.backends import triton

from . import guards, ir, memory, plan
from .quantize_layers import Quantized

#: Shapes kept; the one used longest ago makes room for a new one.
SHAPES_KEPT = 8

#: Puts what a function does on the GPU into a graph: the function's result, and what replays it.
Record = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]


def why_not_recordable(gm: fx.GraphModule) -> str:
    """Return why a lowered graph cannot be replayed for other data of the same shape, or "" if it can.

    Fused ops and plain torch ops on one image do the same launches for each input. Modules and methods of others may
    look at values, draw random numbers or keep state.
    """
    if sum(node.op == "placeholder" for node in gm.graph.nodes) != 1:
        return "the model takes more than one input"
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if memory.written(gm, node):
            return f"{node.name} writes in place"
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, plan.Fused):
            if not module.prepare().candidates:
                return f"{ir.name_of(node)} runs on the backend {module.backend!r}"
        elif isinstance(module, Quantized):
            continue  # they read nothing of the GPU under guard.looking_later
        elif not memory.fresh(gm, node) and not _selects(node):
            return f"{node.name} is no fused op"
    return ""


def _selects(node: fx.Node) -> bool:
    """Return whether the node takes one result out of several, flattens, or is about sizes, the same at each replay."""
    if node.target in (guards.compute, guards.expect, guards.expect_length) or not ir.reads_data(node):
        return True
    return node.op == "call_function" and getattr(node.target, "__name__", "") in ("getitem", "flatten")


def recording() -> Record:
    """Captures functions in CUDA graphs on the current device, of which all on one device work in the same memory.

    They may share it since no two run at once and nothing in it is read after its graph's replay and the copies of
    the results behind it. Each device has a stream of its own: torch's default one belongs to the first device of the
    process, and what then runs on another is not captured.
    """
    places: dict[int, tuple[torch.cuda.Stream, Any]] = {}

    def record(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        device = torch.cuda.current_device()
        if device not in places:
            places[device] = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        stream, pool = places[device]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = function()
        return result, graph.replay

    return record


def _dense(x: Tensor) -> bool:
    """Return whether the elements fill their memory, in whatever order of dimensions."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _same(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    return len(a) == len(b) and all(one is other for one, other in zip(a, b, strict=True))


def _other(image: Tensor) -> Tensor:
    """Return an image that nobody's is: all values from -1 to 1."""
    return torch.linspace(-1, 1, image.numel(), device=image.device).view(image.shape).to(image.dtype)


def _equal(a: Any, b: Any) -> bool:
    """Return whether two results are the same in every bit but NaN's."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(
        torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
        if isinstance(one, Tensor)
        else one == other
        for one, other in pairs
    )


class RecordingFailed(RuntimeError):
    """The GPU or its driver refused to record a run, in its own words, or replays something else than the run."""


@dataclass
class _Recorded:
    image: Tensor
    result: Any
    replay: Callable[[], None]
    constants: tuple[object, ...]


class Recorder:
    """Runs ``run`` for the first image of a shape, and from the second on replays it as recorded.

    So nobody waits for a recording before the first answer, and kernels are compiled before anything is captured.
    Results are copies: the next call does not change them. One call at a time; the GPU's work is ordered by events, so
    calls on several streams are right, one after the other. ``constants``: what the run reads besides its input; other
    objects than at the recording make all recordings void.

    Raises:
        RecordingFailed: a run could not be recorded, or the first replay, of another image, did not give what running
            gives. Nothing is lost, it can run as usual.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Any],
        record: Record | None = None,
        constants: Callable[[], tuple[object, ...]] = tuple,
    ) -> None:
        self._run, self._record = run, recording() if record is None else record
        self._constants = constants
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[Any, ...], _Recorded | None] = OrderedDict()
        self._last: torch.cuda.Event | None = None

    def __call__(self, x: Tensor) -> Any:
        # float32 is multiplied as torch is set to at each run, which a recording cannot follow.
        precision = triton.precision(torch.float32), triton.precision(torch.float32, "matmul")
        key = (x.shape, x.stride(), x.dtype, x.device, *precision)
        with self._lock, torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            recorded = self._seen.get(key)
            constants = self._constants()
            if recorded is not None and not _same(recorded.constants, constants):
                self._wait(x)
                self._seen.clear()  # what the recordings read is gone
                recorded = None
            if key not in self._seen:
                result = self._run(x)
                self._wait(x)
                self._seen[key] = None
                if len(self._seen) > SHAPES_KEPT:
                    self._seen.popitem(last=False)
                return result
            self._seen.move_to_end(key)
            self._wait(x)
            if recorded is None:
                recorded = self._seen[key] = self._recorded(x, constants)
            recorded.image.copy_(x)
            if x.is_cuda:  # when it is forgotten, nobody gets its memory before the replays on all streams are over
                recorded.image.record_stream(torch.cuda.current_stream(x.device))
            recorded.replay()
            result = pytree.tree_map_only(Tensor, torch.clone, recorded.result)
            self._done(x)
            return result

    def _recorded(self, x: Tensor, constants: tuple[object, ...]) -> _Recorded:
        # What is written at every call must be no inference tensor, whatever mode the first caller is in.
        with torch.inference_mode(False), torch.no_grad():
            image = (
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
                if _dense(x)
                else (torch.empty(x.shape, dtype=x.dtype, device=x.device))
            )
            image.copy_(x)
            try:
                self._run(image)  # compiles what this image's own layout and address need, which capture may not do
                result, replay = self._record(lambda: self._run(image))
                image.copy_(_other(image))
                expected = self._run(image)
                replay()
                same = _equal(result, expected)
            except Exception as error:  # out of memory, for one: a recording keeps what it works in
                raise RecordingFailed(str(error)) from error
            if not same:
                raise RecordingFailed("a replay for another image gives other values than the run it was recorded from")
        return _Recorded(image, result, replay, constants)

    def _wait(self, x: Tensor) -> None:
        """The buffers of the recordings are free: what an earlier call put on another stream has ended."""
        if x.is_cuda and self._last is not None:
            torch.cuda.current_stream(x.device).wait_event(self._last)

    def _done(self, x: Tensor) -> None:
        if x.is_cuda:
            self._last = torch.cuda.Event()
            self._last.record(torch.cuda.current_stream(x.device))
