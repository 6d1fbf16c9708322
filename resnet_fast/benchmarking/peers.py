"""The contestants of a benchmark: this package, plain torch, and the runtimes that can run the same network.

Every one starts from the same parameters and gets the same number of threads and its own best input form. Nothing
here times anything, and nothing is imported before it is asked for.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import importlib
import importlib.util
import io
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CONVERSION = 300.0
"""Seconds that a runtime's converter may take."""


@dataclass(frozen=True)
class Task:
    """What every contestant has to do: run ``model`` (float32, eval mode, on the CPU) on batches like ``example`` at
    ``dtype``, on the device of ``example``.

    ``folder`` is a scratch folder that lives as long as the contestants do; exported files go there.
    """

    model: nn.Module
    example: Tensor
    dtype: torch.dtype
    threads: int
    folder: Path


@dataclass(frozen=True)
class Contestant:
    """A runtime ready to run: ``prepare`` turns a batch, float32 on a CPU, into its input form (untimed), ``run`` is
    timed, ``result`` turns an output into a tensor (untimed). ``details`` go into the result file."""

    prepare: Callable[[Tensor], Any]
    run: Callable[[Any], Any]
    result: Callable[[Any], Tensor]
    details: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, batch: Tensor) -> Tensor:
        return self.result(self.run(self.prepare(batch)))


@dataclass(frozen=True)
class Peer:
    """One kind of contestant.

    Attributes:
        needs: the modules it imports. devices: the kinds it runs on, "cpu" and "cuda". ours: whether it is this
            package's. graphs: whether it runs from the harness's CUDA graphs too. dtypes: what it can compute in.
            note: what a reader of its times must know.
    """

    name: str
    label: str
    build: Callable[[Task], Contestant]
    needs: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    devices: tuple[str, ...] = ("cpu", "cuda")
    graphs: bool = True
    ours: bool = False
    note: str = ""

    def missing(self, dtype: torch.dtype) -> str:
        """Return why it cannot take part at ``dtype`` on this machine; empty if it can."""
        absent = [module for module in self.needs if importlib.util.find_spec(module) is None]
        if absent:
            hint = ": pip install 'resnet_fast[bench]'" if "cpu" in self.devices else ""
            return f"not installed ({', '.join(absent)}){hint}"
        if dtype not in self.dtypes:
            return f"not at this precision: its CPU convolutions do not compute in {name_of(dtype)}"
        return ""


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def plain(model: nn.Module) -> torch.fx.GraphModule:
    """Return the same network made of plain torch layers: a traced copy whose every module comes from ``torch.nn``.

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


def torch_contestant(module: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Contestant:
    def prepare(batch: Tensor) -> Tensor:
        return batch.to(dtype).contiguous(memory_format=torch.channels_last)

    def run(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return module(batch)

    return Contestant(prepare, run, lambda output: output)


def _channels_last(model: nn.Module, task: Task) -> nn.Module:
    moved = copy.deepcopy(model).eval().to(task.example.device, task.dtype)
    return moved.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _build_optimized(task: Task, cuda_graphs: bool | str = False) -> Contestant:
    """On a GPU without graphs of its own: those are recorded by the harness, the same way for everybody."""
    from resnet_fast.graph import optimize

    device, how = task.example.device, {}
    if device.type == "cuda":
        how = {"example_inputs": torch.empty(task.example.shape, device="meta"), "cuda_graphs": cuda_graphs}
    model = copy.deepcopy(task.model).eval().to(device)
    fast = optimize(model, dtype=task.dtype, **how)  # type: ignore[arg-type]
    layers = Counter(row.backend for row in fast.report().rows if row.backend)
    return replace(torch_contestant(fast, task.dtype), details={"layers_by_backend": dict(layers)})


def _build_recorded(task: Task) -> Contestant:
    """As a user gets it: the module records its graphs itself, and copies each input into their memory."""
    return _build_optimized(task, cuda_graphs="auto")


def _build_live(task: Task) -> Contestant:
    return torch_contestant(_channels_last(task.model, task), task.dtype)


def _build_eager(task: Task) -> Contestant:
    return torch_contestant(_channels_last(plain(task.model), task), task.dtype)


def _build_inductor(task: Task) -> Contestant:
    from torch._inductor import config

    compiled = torch.compile(_channels_last(plain(task.model), task), dynamic=False)
    contestant = torch_contestant(compiled, task.dtype)
    with config.patch(freezing=True), torch.no_grad():
        compiled(contestant.prepare(task.example))
    return contestant


def _build_compile(task: Task) -> Contestant:
    """max-autotune, whose own graph recording is off: it would copy every input. It gets the harness's graphs."""
    torch._dynamo.reset()
    layers = _channels_last(plain(task.model), task)
    compiled = torch.compile(layers, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)
    return torch_contestant(compiled, task.dtype)


def _build_frozen(task: Task, mode: str = "max-autotune-no-cudagraphs") -> Contestant:
    """The same with freezing, which folds BatchNorm into the convolutions; compiled here, under the option."""
    from torch._inductor import config

    torch._dynamo.reset()
    layers = _channels_last(plain(task.model), task)
    compiled = torch.compile(layers, mode=mode, dynamic=False, fullgraph=True)
    contestant = torch_contestant(compiled, task.dtype)
    with config.patch(freezing=True), torch.no_grad():
        compiled(contestant.prepare(task.example).to(task.example.device))
    return contestant


def _build_cudagraphs(task: Task) -> Contestant:
    """Frozen, and as a user gets it: it records its own CUDA graphs, and copies each input into their memory."""
    frozen = _build_frozen(task, mode="max-autotune")
    return replace(frozen, run=lambda batch: frozen.run(batch).clone())  # the next replay overwrites the result


def _build_jax(task: Task) -> Contestant:
    from resnet_fast.benchmarking.jax_peer import build

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes most of the GPU's memory
    found = str(importlib.import_module("jax").default_backend())
    if task.example.is_cuda and found != "gpu":
        raise RuntimeError(f"jax sees no GPU here, its default backend is {found!r}")
    return build(plain(task.model), task.dtype)


def _build_cudnn(task: Task) -> Contestant:
    from resnet_fast.benchmarking.cudnn_peer import build

    return build(task.model, task.dtype, task.example.device)


def export_onnx(task: Task, batch: int | None = None) -> Path:
    """Exports the plain layers to ``task.folder`` once, for this batch size (default: that of ``task.example``), and
    returns the file.

    Nothing is folded by hand: each runtime does that at its own best setting.
    """
    example = task.example[:batch].float().contiguous()
    path = task.folder / f"network-b{len(example)}.onnx"
    if path.exists():
        return path
    layers = plain(task.model).float()
    failures = []
    for dynamo in (False, True):
        try:
            with quiet():
                torch.onnx.export(layers, (example,), str(path), dynamo=dynamo,
                                  input_names=["image"], output_names=["score"])  # fmt: skip
            return path
        except Exception as error:  # each torch release breaks another one of the two exporters
            failures.append(f"{type(error).__name__}: {error}")
            path.unlink(missing_ok=True)
    raise RuntimeError("neither of torch's ONNX exporters works here: " + "; ".join(failures))


def _build_onnxruntime(task: Task) -> Contestant:
    return run_onnxruntime(export_onnx(task), task)


def run_onnxruntime(file: Path, task: Task) -> Contestant:
    """Return ONNX Runtime with a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Contestant(
        prepare=lambda batch: {name: batch.float().contiguous().numpy()},
        run=lambda feed: session.run(None, feed)[0],
        result=torch.from_numpy,
    )


def _build_openvino(task: Task) -> Contestant:
    return run_openvino(export_onnx(task), task, {torch.float32: "f32", torch.bfloat16: "bf16"}[task.dtype])


def run_openvino(file: Path, task: Task, precision: str) -> Contestant:
    """Return OpenVINO with a file, computing in ``precision`` what is not quantized."""
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        str(file),
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


def _build_mnn(task: Task) -> Contestant:
    """The Module API with ``rearrange``. A Session, or a Module without it, takes 3 to 13 % less time, and has some 80
    times torch's error, so that it would not pass the gate."""
    file = task.folder / "network.mnn"
    code = "import MNN, sys, _tools; _tools.mnnconvert(sys.argv)"  # the command mnnconvert reports its use to a server
    given = ["-f", "ONNX", "--modelFile", str(export_onnx(task)), "--MNNModel", str(file), "--bizCode", "MNN"]
    _convert([sys.executable, "-c", code, *given], file)
    with _silent():
        import MNN

        config = {"backend": "CPU", "numThread": task.threads, "precision": "high", "memory": "high", "power": "high"}
        runtime = MNN.nn.create_runtime_manager((config,))
        module = MNN.nn.load_module_from_file(
            str(file), ["image"], ["score"], runtime_manager=runtime, rearrange=True, shape_mutable=False
        )

    def run(image: Any) -> Any:
        output = module.forward([image])[0]
        output.read()  # computed here at the latest
        return output

    return Contestant(
        prepare=lambda batch: MNN.expr.const(batch.float().contiguous().numpy(), list(batch.shape), MNN.expr.NCHW),
        run=run,
        result=lambda output: torch.from_numpy(output.read().copy()),
    )


def _build_ncnn(task: Task) -> Contestant:
    """Every optimisation that ncnn has is on by default; of the storage formats only that of ``task.dtype`` stays."""
    source = export_onnx(task, 1)
    parameters, weights = (task.folder / f"ncnn.{ending}" for ending in ("param", "bin"))
    others = ("pnnxparam", "pnnxbin", "pnnxpy", "pnnxonnx", "ncnnpy")
    with tempfile.TemporaryDirectory(dir=task.folder) as unused:  # as large as the network, several times
        given = [f"inputshape=[{','.join(map(str, (1, *task.example.shape[1:])))}]f32", "fp16=0"]
        given += [f"ncnnparam={parameters}", f"ncnnbin={weights}", *(f"{name}={unused}/{name}" for name in others)]
        _convert([importlib.import_module("pnnx").EXEC_PATH, str(source), *given], weights)
    import ncnn

    net, half = ncnn.Net(), task.dtype is torch.bfloat16
    net.opt.num_threads = task.threads
    for name in ("use_fp16_storage", "use_fp16_packed", "use_fp16_arithmetic", "use_bf16_storage", "use_bf16_packed"):
        setattr(net.opt, name, half and "bf16" in name)
    for load, path in ((net.load_param, parameters), (net.load_model, weights)):
        if load(str(path)) != 0:
            raise RuntimeError(f"ncnn cannot load {path.name}")
    (source_name,), (result_name,) = net.input_names(), net.output_names()

    def run(images: Sequence[Any]) -> list[Any]:
        found = []
        for image in images:
            with net.create_extractor() as extractor:
                extractor.input(source_name, image)
                status, output = extractor.extract(result_name)
            if status != 0:
                raise RuntimeError(f"ncnn's extract failed with status {status}")
            found.append(output)
        return found

    return Contestant(
        prepare=lambda batch: [ncnn.Mat(image).clone() for image in batch.float().contiguous().numpy()],
        run=run,
        result=lambda outputs: torch.stack([torch.from_numpy(output.numpy().copy()) for output in outputs]),
    )


def _convert(command: list[str], made: Path) -> None:
    """Runs a converter, which need not say by its exit status that it failed, until ``made`` is there."""
    done = subprocess.run(
        command, cwd=made.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=CONVERSION, check=False
    )
    if done.returncode != 0 or not made.exists():
        last = done.stdout.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"the converter made no {made.name} (exit status {done.returncode}): {' '.join(last)}")


_CPU: dict[str, Any] = {"devices": ("cpu",), "dtypes": (torch.float32, torch.bfloat16)}
_FLOAT32: dict[str, Any] = {"devices": ("cpu",), "dtypes": (torch.float32,)}
_CUDA: dict[str, Any] = {"devices": ("cuda",)}
_REARRANGED = "with rearranged weights; without them it is some percent faster, but fails the accuracy check"
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("optimize", "resnet_fast.optimize()", _build_optimized, ours=True),
        Peer("recorded", "resnet_fast.optimize(), its own graphs", _build_recorded, **_CUDA, graphs=False, ours=True),
        Peer("live", "resnet_fast, live module", _build_live, ours=True),
        Peer("eager", "torch eager, channels_last", _build_eager),
        Peer("inductor", "torch.compile, inductor with freezing", _build_inductor, **_CPU),
        Peer("compile", "torch.compile, max-autotune", _build_compile, **_CUDA),
        Peer("frozen", "torch.compile, max-autotune, freezing", _build_frozen, **_CUDA),
        Peer("cudagraphs", "torch.compile, freezing, its own graphs", _build_cudagraphs, **_CUDA, graphs=False),
        Peer("onnxruntime", "ONNX Runtime", _build_onnxruntime, ("onnxruntime", "onnx"), **_FLOAT32),
        Peer("openvino", "OpenVINO", _build_openvino, ("openvino", "onnx"), **_CPU),
        Peer("mnn", "MNN", _build_mnn, ("MNN", "onnx"), **_FLOAT32, note=_REARRANGED),
        Peer("ncnn", "ncnn", _build_ncnn, ("ncnn", "pnnx", "onnx"), **_CPU, note="no batches: image by image"),
        Peer("jax", "JAX/XLA, jit", _build_jax, ("jax",), **_CUDA, graphs=False),
        Peer("cudnn", "cuDNN graph API", _build_cudnn, ("cudnn",), **_CUDA),
    )
}
"""Every contestant there is, in the order in which tables list them."""


def serving(kind: str) -> tuple[str, ...]:
    """Return the names of those that run on this kind of device, "cpu" or "cuda"."""
    return tuple(name for name, peer in PEERS.items() if kind in peer.devices)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the exporters' chatter."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silences what a runtime's own code, which Python's ``sys.stdout`` does not see, prints to standard output."""
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    library.fflush(None)
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        library.fflush(None)  # what is still in C's buffer belongs to the silence
        os.dup2(kept, 1)
        os.close(kept)
