"""The contestants of a benchmark: this package, plain torch, and the CPU runtimes that can run the same network.

Every one starts from the same parameters and gets the same number of threads and its own best input form. Nothing
here times anything, and nothing is imported before it is asked for.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """What every contestant has to do: run ``model`` (float32, eval mode) on batches like ``example`` at ``dtype``.

    ``folder`` is a scratch folder that lives as long as the contestants do; exported files go there.
    """

    model: nn.Module
    example: Tensor
    dtype: torch.dtype
    threads: int
    folder: Path


@dataclass(frozen=True)
class Contestant:
    """A runtime ready to run: ``prepare`` turns a float32 batch into its input form (untimed), ``run`` is what is
    timed, ``result`` turns an output into a tensor (untimed)."""

    prepare: Callable[[Tensor], Any]
    run: Callable[[Any], Any]
    result: Callable[[Any], Tensor]

    def __call__(self, batch: Tensor) -> Tensor:
        return self.result(self.run(self.prepare(batch)))


@dataclass(frozen=True)
class Peer:
    """One kind of contestant. ``needs`` are the modules it imports; ``dtypes`` what it can compute in on a CPU."""

    name: str
    label: str
    build: Callable[[Task], Contestant]
    needs: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def missing(self, dtype: torch.dtype) -> str:
        """Why it cannot take part at ``dtype`` on this machine; empty if it can."""
        absent = [module for module in self.needs if importlib.util.find_spec(module) is None]
        if absent:
            return f"not installed ({', '.join(absent)}): pip install 'resnet_fast[bench]'"
        if dtype not in self.dtypes:
            return f"not at this precision: its CPU convolutions do not compute in {name_of(dtype)}"
        return ""


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def plain(model: nn.Module) -> torch.fx.GraphModule:
    """The same network made of plain torch layers: a traced copy whose every module comes from ``torch.nn``.

    Raises TypeError naming the layer where one does not.
    """
    traced = torch.fx.symbolic_trace(copy.deepcopy(model).eval())
    for node in traced.graph.nodes:
        if node.op == "call_module":
            layer = traced.get_submodule(str(node.target))
            if not type(layer).__module__.startswith("torch.nn"):
                kind = type(layer).__qualname__
                raise TypeError(f"plain: layer {node.target} is a {kind}, which torch.nn does not have")
        elif node.op == "call_function" and "resnet_fast" in f"{getattr(node.target, '__module__', '')} {node.target}":
            raise TypeError(f"plain: the graph calls {node.target}, which is no plain torch function")
    return traced


def _torch_contestant(module: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Contestant:
    def prepare(batch: Tensor) -> Tensor:
        return batch.to(dtype).contiguous(memory_format=torch.channels_last)

    def run(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return module(batch)

    return Contestant(prepare, run, lambda output: output)


def _channels_last(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).eval().to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _build_optimized(task: Task) -> Contestant:
    from resnet_fast.graph import optimize

    optimized = optimize(copy.deepcopy(task.model).eval(), dtype=task.dtype)
    return _torch_contestant(optimized, task.dtype)


def _build_live(task: Task) -> Contestant:
    return _torch_contestant(_channels_last(task.model, task.dtype), task.dtype)


def _build_eager(task: Task) -> Contestant:
    return _torch_contestant(_channels_last(plain(task.model), task.dtype), task.dtype)


def _build_inductor(task: Task) -> Contestant:
    from torch._inductor import config

    compiled = torch.compile(_channels_last(plain(task.model), task.dtype), dynamic=False)
    contestant = _torch_contestant(compiled, task.dtype)
    with config.patch(freezing=True), torch.no_grad():
        compiled(contestant.prepare(task.example))
    return contestant


def export_onnx(task: Task) -> Path:
    """Exports the plain layers to ``task.folder`` once, for the batch of ``task.example``, and returns the file.

    Nothing is folded by hand: each runtime does that at its own best setting.
    """
    path = task.folder / "network.onnx"
    if path.exists():
        return path
    layers, example = plain(task.model).float(), task.example.float().contiguous()
    failures = []
    for dynamo in (False, True):
        try:
            with _quiet():
                torch.onnx.export(layers, (example,), str(path), dynamo=dynamo,
                                  input_names=["image"], output_names=["score"])  # fmt: skip
            return path
        except Exception as error:  # each torch release breaks another one of the two exporters
            failures.append(f"{type(error).__name__}: {error}")
            path.unlink(missing_ok=True)
    raise RuntimeError("neither of torch's ONNX exporters works here: " + "; ".join(failures))


def _build_onnxruntime(task: Task) -> Contestant:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(export_onnx(task)), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Contestant(
        prepare=lambda batch: {name: batch.float().contiguous().numpy()},
        run=lambda feed: session.run(None, feed)[0],
        result=torch.from_numpy,
    )


def _build_openvino(task: Task) -> Contestant:
    import openvino

    core = openvino.Core()
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[task.dtype]
    compiled = core.compile_model(
        str(export_onnx(task)),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": task.threads,
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    request = compiled.create_infer_request()

    def run(image: Any) -> Any:
        return request.infer([image], share_inputs=True, share_outputs=True)[0]

    return Contestant(
        prepare=lambda batch: batch.float().contiguous().numpy(),
        run=run,
        result=lambda output: torch.from_numpy(output.copy()),
    )


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("optimize", "resnet_fast.optimize()", _build_optimized),
        Peer("live", "resnet_fast, live module", _build_live),
        Peer("eager", "torch eager, channels_last", _build_eager),
        Peer("inductor", "torch.compile, inductor with freezing", _build_inductor),
        Peer("onnxruntime", "ONNX Runtime", _build_onnxruntime, needs=("onnxruntime", "onnx"), dtypes=(torch.float32,)),
        Peer("openvino", "OpenVINO", _build_openvino, needs=("openvino", "onnx")),
    )
}
"""Every contestant there is, in the order in which tables list them."""

OURS = ("optimize", "live")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporters' chatter."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
