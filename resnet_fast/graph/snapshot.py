"""The frozen module that ``optimize`` returns: what a call's inputs go through before and behind the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from resnet_fast import backends
from resnet_fast.backends.layouts import suggests_channels_last
from resnet_fast.nn.pristine import capturing

from . import batching, calling, capture, engine, finite, plan
from . import cuda_graphs as cuda_graphs_
from .guard import TooLarge, looking_later, with_separate_relus, without_integers
from .guards import OutsideGuards
from .quantize_report import Quantization
from .report import Report, Row


class ImageInput(NamedTuple):
    """The one image that a graph takes: its argument's name and how many channels it must have."""

    name: str
    channels: int


class OptimizedModule(nn.Module):
    """A frozen model for inference, made by :func:`optimize`. It has no training mode: ``train()`` leaves it as it is.

    Attributes:
        graph_module: the fused graph, an ``fx.GraphModule``.
        dtype: what it computes in.
        output_dtype: of its floating point results: the original model's.
        channels_last: whether feature maps that it returns are channels_last for NCHW images too, as those of a model
            with channels_last weights are.
    """

    channels_last = False

    def __init__(
        self,
        graph_module: fx.GraphModule,
        report: Report,
        dtype: torch.dtype,
        output_dtype: torch.dtype,
        image: ImageInput | None,
        captured: capture.Captured,
        plain: Callable[..., Any] | None,
        device: torch.device,
        written: torch.dtype,
        part: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__()
        self.training = False
        self.graph_module = graph_module
        self.dtype, self.output_dtype = dtype, output_dtype
        self._report = report
        self._image = image
        self._arguments, self._form = captured.arguments, captured.form
        self._plain = (plain,) if isinstance(plain, nn.Module) else plain  # not one of this module's children
        self._device, self._written, self._part = device, written, part
        self._certified = True  # finite.certify has seen these constants
        self._separable = not batching.why_not_separable(graph_module)
        self._pieces: dict[tuple[Any, ...], int] = {}
        self._planned: tuple[fx.GraphModule | None] | None = None
        self.cuda_graphs = cuda_graphs
        self._recorder: cuda_graphs_.Recorder | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the original model's result, without gradients. Floating point inputs are cast to ``dtype``.

        Raises:
            TypeError, ValueError: the graph takes a single image and this is not a floating point [N, C, H, W] tensor.
        """
        _refuse_export(args)
        if capturing() or torch.compiler.is_compiling():  # who writes the ops down decides by no value and no layout
            leaves = self.graph_module(*self._arguments.tensors_of(args, kwargs))
            return leaves if self._form is None else calling.unflatten(self._form, leaves)
        if self._part and _observed():
            assert callable(self._plain)
            return self._plain(*args, **kwargs)
        if self._image is not None:
            self._check_image(args[0] if args else kwargs.get(self._image.name))
        with torch.no_grad():
            if not self._certified:
                finite.certify(self.graph_module)
                self._certified = True
            try:
                result = self._compute(self._arguments.tensors_of(args, kwargs))
            except OutsideGuards as error:
                return self._run_plain(error, args, kwargs)
            except Exception as error:  # the author's code may do without what fails here, or has its own words for it
                if self._plain is None:
                    raise
                return self._run_plain(error, args, kwargs)
        return result if self._form is None else calling.unflatten(self._form, result)

    def _compute(self, tensors: list[Tensor]) -> Any:
        first = tensors[0] if len(tensors) == 1 else None
        if first is not None and first.device.type == "cpu" and first.dim():
            batching.prime_allocator()
            many = self._separable and first.shape[0] > 1 and not self._in_one_call()
            piece = self._piece(first) if many else 0
            if 0 < piece < first.shape[0]:
                return batching.run_pieces(self._run, first, piece)
        if self.cuda_graphs and first is not None and first.is_cuda and first.numel() and _may_record():
            try:
                return self._recorded(first)
            except cuda_graphs_.RecordingFailed as error:
                self.cuda_graphs, self._recorder = False, None
                backends.fallback("optimize", f"runs are no longer recorded as CUDA graphs: {error}")
        return self._run(*tensors)

    def _run(self, *tensors: Tensor) -> Any:
        given = as_dtype(list(tensors), None, self.dtype)
        device = given[0].device.type if given else "cpu"
        with ExitStack() as stack:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(
                device
            ):  # this module's dtype was chosen when it was made
                stack.enter_context(torch.autocast(device, enabled=False))
            planned = self._engine() if device == "cpu" else None
            try:
                result = self._run_planned(planned, given) if planned is not None else self.graph_module(*given)
            except TooLarge:
                backends.fallback("optimize", "NaN, infinity or huge activations: such a batch runs again, exactly")
                stack.enter_context(with_separate_relus())
                stack.enter_context(without_integers())
                result = self.graph_module(*given)
        return self._laid_out(as_dtype(result, self.dtype, self.output_dtype), given)

    def _run_planned(self, planned: fx.GraphModule, given: Any) -> Any:
        try:
            with with_separate_relus():
                return planned(*given)
        except engine.NotPlanned:
            return self.graph_module(*given)  # the layers, one by one

    def _engine(self) -> fx.GraphModule | None:
        """Return the graph as calls of the CPU engine, made at the first run; None if it computes no layer."""
        if self._planned is None:
            self._planned = (engine.planned(self.graph_module),)
        return self._planned[0]

    def _in_one_call(self) -> bool:
        """Return whether the whole graph is one call of the CPU engine, which divides batches itself."""
        planned = self._engine() if self._device.type == "cpu" else None
        return planned is not None and sum(node.op != "output" for node in planned.graph.nodes) == 2

    def _run_plain(self, error: Exception, args: Any, kwargs: Any) -> Any:
        """Run the author's own code on what the graph was not made for."""
        reason = str(error) if isinstance(error, OutsideGuards) else f"their graph raises {type(error).__name__}"
        if self._plain is None:
            raise ValueError(f"{self._report.model}: the snapshot was not made for such inputs: {reason}") from error
        backends.fallback("optimize", f"the model's own code runs, unfused, for some inputs: {reason}")
        plain = self._plain[0] if isinstance(self._plain, tuple) else self._plain
        args, kwargs = as_dtype((args, kwargs), None, self._written)
        with ExitStack() as stack:
            for device in () if self._part else ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return as_dtype(plain(*args, **kwargs), self._written, self.output_dtype)

    def _laid_out(self, result: Any, given: Sequence[Any]) -> Any:
        """Feature maps as the original gives them: NCHW unless an image or a weight of it is channels_last."""
        images = [leaf for leaf in given if isinstance(leaf, Tensor) and leaf.dim() == 4]
        if self.channels_last or any(suggests_channels_last(image) for image in images):
            return result

        def one(leaf: Any) -> Any:
            nhwc = isinstance(leaf, Tensor) and leaf.dim() == 4 and suggests_channels_last(leaf)
            return leaf.contiguous() if nhwc else leaf

        return _mapped(one, result)

    def _recorded(self, x: Tensor) -> Any:
        """Return a run's result, recorded from the second image of a shape on."""
        if self._recorder is None:
            parts = [module for module in self.graph_module.modules() if isinstance(module, plan.Fused)]
            constants = lambda: tuple(part.prepare() for part in parts)  # noqa: E731
            self._recorder = cuda_graphs_.Recorder(self._unread, constants=constants)
        result, *finite = self._recorder(x)
        if finite and not bool(finite[0]):
            return self._run(x)  # which meets the same, and has a way for it
        return result

    def _unread(self, x: Tensor) -> tuple[Any, ...]:
        """Run without reading of the GPU whether all values fit in uint8.

        If some become that, the second result says whether they do.
        """
        with looking_later() as kept:
            result = self._run(x)
        return (result, torch.stack(kept).all()) if kept else (result,)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recorder": None, "_planned": None}

    def _load_from_state_dict(self, *args: Any) -> None:
        self._certified = False  # of the old constants; the new ones are looked at when they run
        self._recorder = self._planned = None
        self._plain = None  # it has the constants of before
        super()._load_from_state_dict(*args)

    def _piece(self, x: Tensor) -> int:
        """Return how many images like ``x`` to run at a time, 0 for all."""
        key = (*x.shape[1:], x.dtype)
        if key not in self._pieces:
            dtype = self.dtype if x.is_floating_point() else x.dtype
            largest = batching.largest_tensor(self.graph_module, torch.empty(x.shape, dtype=dtype, device="meta"))
            self._pieces[key] = max(1, batching.LARGEST_TENSOR // largest) if largest else 0
        return self._pieces[key]

    def _check_image(self, x: Any) -> None:
        assert self._image is not None
        channels = self._image.channels
        expected = f"expected a floating point NCHW tensor of shape [N, {channels}, H, W]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{expected}, got {type(x).__name__}")
        if not x.is_floating_point():
            advice = (
                "; prepare images as the network was trained on them (torchvision's: x.float() / 255, then normalise)"
                if x.dtype == torch.uint8
                else ""
            )
            raise TypeError(f"{expected}, got {x.dtype} of shape {list(x.shape)}{advice}")
        if x.dim() != 4:
            advice = "; x.unsqueeze(0) adds the batch dimension" if x.dim() == 3 else ""
            raise ValueError(f"{expected}, got {x.dim()}-D {x.dtype} of shape {list(x.shape)}{advice}")
        if x.shape[1] != channels:
            advice = "; is it NHWC? x.permute(0, 3, 1, 2) makes it NCHW" if x.shape[3] == channels else ""
            raise ValueError(f"{expected}, got {x.dtype} of shape {list(x.shape)}{advice}")

    def report(self) -> Report:
        """Return what was fused and what was not, layer by layer, with the bytes moved before and after."""
        return self._report

    def remark(self, note: str) -> None:
        """Add a note to the report, unless it is empty."""
        self._report = dataclasses.replace(self._report, notes=(*self._report.notes, *([note] if note else [])))

    @property
    def quantization(self) -> Quantization | None:
        """What ``quantize`` did, and what it costs in accuracy; None for a result of ``optimize``."""
        return self._report.quantization

    def become(self, graph_module: fx.GraphModule) -> None:
        """Compute another graph of the same inputs and outputs from now on."""
        self.graph_module = graph_module
        self._separable = not batching.why_not_separable(graph_module)
        self._pieces, self._planned, self._recorder = {}, None, None
        if self.cuda_graphs and (reason := cuda_graphs_.why_not_recordable(graph_module)):
            self.cuda_graphs = False
            self.remark(f"cuda_graphs: not recorded after all, {reason}")

    def quantized_as(self, quantization: Quantization, row: Callable[[Row], Row]) -> None:
        """Put into the report what became of the layers; ``row`` gives the new row for an old one."""
        rows = tuple(row(each) for each in self._report.rows)
        self._report = dataclasses.replace(self._report, rows=rows, quantization=quantization)

    @property
    def code(self) -> str:
        """The fused graph as Python source."""
        return self.graph_module.code

    def train(self, mode: bool = True) -> OptimizedModule:
        """Return this module as it is: a part of another model that trains, it stays frozen."""
        return self

    def __prepare_scriptable__(self) -> None:
        raise TypeError(f"a snapshot cannot be compiled by TorchScript; {_EXPORT}")

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModule:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            if moved.dtype is not tensor.dtype:
                if moved.dtype is not self.dtype:
                    raise RuntimeError(
                        f"this is a frozen snapshot in {self.dtype}, it cannot be cast to {moved.dtype}; "
                        f"call optimize(model, dtype={moved.dtype}) on the original model"
                    )
                moved = tensor.to(moved.device)  # what is stored wider than the snapshot computes stays so
            return moved

        self._certified = False
        self._recorder = self._planned = None
        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        if isinstance(self._plain, tuple):
            self._plain[0]._apply(lambda tensor: tensor.to(fn(torch.empty(0, device=tensor.device)).device))
        device = fn(torch.empty(0, device=self._device)).device
        capture.move(self.graph_module, self._device, device)
        self._device = device
        return self

    def extra_repr(self) -> str:
        return f"{self._report.model}, dtype={self.dtype}"


class PartlyOptimizedModule(OptimizedModule):
    """A frozen model whose own code runs, with the parts of it that could be captured in the places of their forwards.

    Attributes:
        model: a copy of the original. parts: the snapshots of its children, by name.
    """

    def __init__(self, model: nn.Module, parts: dict[str, OptimizedModule], report: Report, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.training = False
        self.model = model
        self.parts = nn.ModuleList(parts.values()).eval()
        self.dtype = dtype
        self._report = report
        for name, part in parts.items():
            model.get_submodule(name).__dict__["forward"] = part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the original model's result, without gradients."""
        _refuse_export(args)
        with torch.no_grad():
            return self.model(*args, **kwargs)

    @property
    def code(self) -> str:
        """The fused graphs of the parts as Python source, one behind the other."""
        return "\n".join(str(part.code) for part in self.parts)

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModule:
        for part in self.parts:
            part._apply(fn, recurse)
        self.model._apply(lambda tensor: tensor.to(fn(torch.empty(0, device=tensor.device)).device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)


_EXPORT = "export resnet_fast.exportable(snapshot), which is torch's own layers, or the original model"


def _refuse_export(args: Any) -> None:
    """Raise TypeError if somebody writes down what happens: our kernels would not be understood where it is read."""
    way = ""
    if torch._C._get_tracing_state() is not None or torch.onnx.is_in_onnx_export():
        way = "traced by torch.jit or written as ONNX"
    elif torch.compiler.is_exporting():
        way = "exported"
    elif isinstance(args, fx.Proxy) or any(isinstance(arg, fx.Proxy) for arg in args):
        way = "traced by torch.fx"
    if way:
        raise TypeError(f"a snapshot cannot be {way}; {_EXPORT}")


def _observed() -> bool:
    """Return whether the code around a part asks for more than its values: gradients, autocast, a transform."""
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return torch.is_grad_enabled() or autocast or torch._C._functorch.peek_interpreter_stack() is not None


def _may_record() -> bool:
    """Not while somebody else records, or traces."""
    return not (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())


def as_dtype(value: Any, source: torch.dtype | None, target: torch.dtype) -> Any:
    """Floating point tensors of dtype ``source`` (None: any) in a nest as ``target``."""
    if source is target:
        return value

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and (source is None or leaf.dtype is source):
            return leaf.to(target).resolve_neg()  # kernels read memory as it is
        return leaf

    return _mapped(one, value)


def _mapped(one: Callable[[Any], Any], value: Any) -> Any:
    """Return ``tree_map`` of a nest, which takes its time even for a tensor or a list of some."""
    if isinstance(value, Tensor):
        return one(value)
    return [_mapped(one, item) for item in value] if type(value) is list else pytree.tree_map(one, value)
