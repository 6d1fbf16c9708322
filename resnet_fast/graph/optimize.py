"""``optimize``: a frozen snapshot of a model for inference, its layers fused by the passes of this package.

The order of the passes and the module they end in are here; what each does is in its own file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from resnet_fast import backends
from resnet_fast.backends import cuda, triton
from resnet_fast.backends.layouts import suggests_channels_last
from resnet_fast.kernels import gpus
from resnet_fast.ops.common import as_pair
from resnet_fast.roofline import cost

from . import batching, capture, copies, finite, ir, memory, plan, shapes
from . import cuda_graphs as cuda_graphs_
from .fold_bn import fold_bn
from .fuse_act import fuse_act
from .fuse_add import fuse_add
from .fuse_head import fuse_head
from .fuse_stem import fuse_stem
from .fuse_tail import fuse_tail
from .guard import TooLarge, with_separate_relus
from .guards import OutsideGuards
from .hoist_sizes import hoist_sizes
from .normalize import SharedMemoryError, is_norm, normalize
from .report import Report, Row

#: How many images a plan for a GPU is made for. Smaller batches run the parts of a fused block one by one.
_PLANNED_BATCH = 128

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ImageInput(NamedTuple):
    """The one image that a graph takes: its argument's name and how many channels it must have."""

    name: str
    channels: int


class OptimizedModule(nn.Module):
    """A frozen model for inference, made by :func:`optimize`. Its constants are buffers; it has no training mode.

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
        plain: nn.Module | None,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__()
        self.training = False
        self.graph_module = graph_module
        self.dtype, self.output_dtype = dtype, output_dtype
        self._report = report
        self._image = image
        self._arguments, self._form = captured.arguments, captured.form
        self._plain = plain if plain is None else (plain,)  # not one of this module's children
        self._certified = True  # finite.certify has seen these constants
        self._separable = not batching.why_not_separable(graph_module)
        self._pieces: dict[tuple[Any, ...], int] = {}
        self.cuda_graphs = cuda_graphs
        self._recorder: cuda_graphs_.Recorder | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the original model's result, without gradients. Floating point inputs are cast to ``dtype``.

        Raises:
            TypeError, ValueError: the graph takes a single image and this is not a floating point [N, C, H, W] tensor.
        """
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
        return result if self._form is None else capture.unflatten(self._form, result)

    def _compute(self, tensors: list[Tensor]) -> Any:
        first = tensors[0] if len(tensors) == 1 else None
        if first is not None and first.device.type == "cpu" and first.dim():
            batching.prime_allocator()
            piece = self._piece(first) if self._separable and first.shape[0] > 1 else 0
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
        given = _cast(list(tensors), None, self.dtype)
        device = given[0].device.type if given else "cpu"
        with ExitStack() as stack:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(
                device
            ):  # this module's dtype was chosen when it was made
                stack.enter_context(torch.autocast(device, enabled=False))
            try:
                result = self.graph_module(*given)
            except TooLarge:
                backends.fallback("optimize", "NaN, infinity or huge activations: such a batch runs again, exactly")
                stack.enter_context(with_separate_relus())
                result = self.graph_module(*given)
        return self._laid_out(_cast(result, self.dtype, self.output_dtype), given)

    def _run_plain(self, reason: OutsideGuards, args: Any, kwargs: Any) -> Any:
        """Run the author's own code on what the graph was not made for."""
        if self._plain is None:
            raise ValueError(f"{self._report.model}: the snapshot was not made for such inputs: {reason}") from reason
        backends.fallback("optimize", f"the model's own code runs, unfused, for some inputs: {reason}")
        args, kwargs = _cast((args, kwargs), None, self.output_dtype)
        return self._plain[0](*args, **kwargs)

    def _laid_out(self, result: Any, given: Any) -> Any:
        """Feature maps as the original gives them: NCHW unless an image or a weight of it is channels_last."""
        images = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor) and leaf.dim() == 4]
        if self.channels_last or any(suggests_channels_last(image) for image in images):
            return result

        def one(leaf: Any) -> Any:
            nhwc = isinstance(leaf, Tensor) and leaf.dim() == 4 and suggests_channels_last(leaf)
            return leaf.contiguous() if nhwc else leaf

        return pytree.tree_map(one, result)

    def _recorded(self, x: Tensor) -> Any:
        if self._recorder is None:
            parts = [module for module in self.graph_module.modules() if isinstance(module, plan.Fused)]
            self._recorder = cuda_graphs_.Recorder(self._run, constants=lambda: tuple(part.prepare() for part in parts))
        return self._recorder(x)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recorder": None}

    def _load_from_state_dict(self, *args: Any) -> None:
        self._certified = False  # of the old constants; the new ones are looked at when they run
        self._recorder = None
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

    @property
    def code(self) -> str:
        """The fused graph as Python source."""
        return self.graph_module.code

    def train(self, mode: bool = True) -> OptimizedModule:
        """Raises RuntimeError for ``mode=True``: there is nothing left in it that could be trained."""
        if mode:
            raise RuntimeError(
                "this is a frozen snapshot for inference, it has no training mode; "
                "train the original model and call optimize() again"
            )
        return self

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
        self._recorder = None
        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        if self._plain is not None:
            self._plain[0]._apply(lambda tensor: tensor.to(fn(torch.empty(0, device=tensor.device)).device))
        capture.move(self.graph_module, fn(torch.empty(0, device=self._device)).device)
        return self

    def extra_repr(self) -> str:
        return f"{self._report.model}, dtype={self.dtype}"


def _may_record() -> bool:
    """Not while somebody else records, or traces."""
    return not (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())


def _cast(value: Any, source: torch.dtype | None, target: torch.dtype) -> Any:
    """Floating point tensors of dtype ``source`` (None: any) in a nest as ``target``."""
    if source is target:
        return value

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and (source is None or leaf.dtype is source):
            return leaf.to(target).resolve_neg()  # kernels read memory as it is
        return leaf

    return pytree.tree_map(one, value)


def optimize(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    example_inputs: Tensor | Sequence[Any] | None = None,
    cuda_graphs: bool | str = "auto",
    backend: str = "auto",
    gpu: str | None = None,
) -> OptimizedModule:
    """Return a frozen copy of ``model`` for inference whose layers run fused; ``model`` itself is not changed.

    Fused are convolution + BatchNorm (eval mode or frozen) + residual + ReLU, the stem with its max-pool, global
    average pool + linear, and addition + ReLU; for a GPU also bottleneck blocks from their 3x3 to the next block's
    first convolution, where that moves less. Everything else runs as before; ``report()`` of the result lists both.
    It is valid for every batch and image size that the model takes.

    Args:
        model: a module in eval mode that ``torch.fx`` can trace, or an ``fx.GraphModule``.
        dtype: what to compute in: torch.float32, bfloat16, float16 or float64; None keeps the parameters' dtype.
            BatchNorm is folded in float64 and each weight rounded once. Results come in the model's own dtype.
        example_inputs: a tensor or a sequence of the model's positional arguments, read for its sizes: tensors without
            data (device "meta") do as well. What is planned for a GPU is planned for this batch.
            None: one image (128 to plan for a GPU) of the first convolution's channels, 224x224 or the first other
            size that fits.
        cuda_graphs: whether a run on a GPU is recorded at its second image of a shape and replayed from then on: "auto"
            where every layer runs as a kernel of ours, True always (ValueError where the graph cannot be replayed),
            False never.
        backend: "auto" or a name from ``resnet_fast.backends.available()``.
        gpu: the GPU to plan for, as "h100"; the result still runs on the model's device. None: the CUDA device that the
            model is on; on a CPU nothing is planned.

    Raises:
        ValueError: the model or one of its batch norms is in training mode, or an argument has an impossible value.
        TypeError: the model cannot be traced (or is no module), or an argument has the wrong type.

    Examples:
        >>> import torch
        >>> import resnet_fast as rf
        >>> fast = rf.optimize(rf.resnet18().eval())  # or any torchvision ResNet
        >>> fast(torch.rand(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
        >>> fast.report()  # one line; print() shows what became of every layer
        <Report: 69 of 69 layers fused, ...>
    """
    if isinstance(model, OptimizedModule):
        raise TypeError("optimize: this module is the result of optimize() already; give it the original model")
    copies.check(model)
    device, original, mixed = _device_and_dtype(model, dtype)
    _check_options(dtype, cuda_graphs, backend, device)
    target = original if dtype is None else dtype
    planned = _planned(gpu, device)
    cuda_only = (backends.current() if backend == "auto" else backend) == cuda.NAME
    notes = ir.Notes()
    hooks = copies.hooked(model)
    if hooks:
        names = ", ".join(hooks)
        said = f"forward hooks are not called by the frozen snapshot, what they return is part of it: {names}"
        notes.add(said)
        warnings.warn(f"optimize: {said}", stacklevel=2)

    own = copies.copied(model)
    if mixed:
        own.to(target)
    written = target if mixed else original
    batch = 1 if planned is None else _PLANNED_BATCH
    captured, given = _capture(own, model, example_inputs, batch, written, device)
    gm, inputs = captured.gm, _metas(tuple(captured.arguments.tensors_of(*given)))
    layers = _annotate(gm)
    try:
        normalize(gm, notes)
    except SharedMemoryError as error:
        captured = capture.capture(copies.shared(own), *given, device)
        gm = copies.rebuilt(captured.gm)
        layers = _annotate(gm)
        image = None
        for layer in layers:
            layer.reason = f"in-place writes are kept as they are: {error}"
        notes.add(f"nothing is fused: {error}")
    else:
        image = shapes.image_input(gm)
        shapes.mark_equal_adds(gm, inputs)
        hoist_sizes(gm)
        fold_bn(gm, torch.float64 if torch.float64 in (target, original) else torch.float32)
        fuse_act(gm)
        fuse_add(gm)
        fuse_stem(gm)
        fuse_head(gm)
        if cuda_only:
            notes.add("no bottleneck_tail is planned, there is no CUDA kernel of it")
        elif planned is not None:
            fuse_tail(gm, planned, target, notes)
        gm = plan.lower(gm, target, backend)
    if target is not written:
        capture.retype(gm, written, target)
    _freeze(gm, target)
    guards = finite.certify(gm)
    if guards:
        measured = "1 tensor is" if guards == 1 else f"{guards} tensors are"
        notes.add(f"{measured} measured at each run for values near overflow; not counted in the bytes moved")
    recorded = _records(gm, cuda_graphs, device, notes)
    report = _report(gm, type(model).__name__, layers, inputs, target, original, backend, notes)
    needs_plain = captured.guarded or not captured.arguments.fixed
    result = OptimizedModule(
        gm,
        report,
        target,
        original,
        None if image is None else ImageInput(str(image[0].target), image[1]),
        captured,
        copies.shared(own) if needs_plain else None,
        recorded,
    )
    result._device = device
    result.channels_last = any(suggests_channels_last(p) for p in model.parameters() if p.dim() == 4)
    for node in gm.graph.nodes:
        node.meta = {}
    return result


def _check_options(dtype: Any, cuda_graphs: Any, backend: Any, device: torch.device) -> None:
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"optimize: dtype is {dtype!r}; it must be None or one of {', '.join(map(str, _DTYPES))}")
    if not (cuda_graphs is True or cuda_graphs is False or cuda_graphs == "auto"):
        raise ValueError(f"optimize: cuda_graphs is {cuda_graphs!r}; it must be 'auto', True or False")
    if cuda_graphs is True and device.type != "cuda":
        raise ValueError(f"optimize: cuda_graphs=True needs the model on a CUDA device, it is on {device}")
    states = backends.available()
    if backend != "auto" and backend not in states:
        raise ValueError(f"optimize: backend is {backend!r}; it must be one of {['auto', *states]}")
    if backend != "auto" and states[backend]:
        raise RuntimeError(f"optimize: backend {backend!r} cannot be used here: {states[backend]}")


def _records(gm: fx.GraphModule, asked: bool | str, device: torch.device, notes: ir.Notes) -> bool:
    """Return whether runs are recorded as CUDA graphs, with a note of the reason if they are not."""
    if device.type != "cuda" or asked is False:
        return False
    reason = cuda_graphs_.why_not_recordable(gm)
    if reason and asked is True:
        raise ValueError(f"optimize: cuda_graphs=True, but a run cannot be recorded: {reason}")
    notes.add(f"cuda_graphs: not recorded, {reason}" if reason else "cuda_graphs: recorded from the second image on")
    return not reason


def _planned(name: Any, device: torch.device) -> gpus.GPU | None:
    """Return the GPU to plan for: the one asked for, else the one that the model is on."""
    if name is None:
        return triton.gpu_of(device) if device.type == "cuda" and not triton.unavailable() else None
    if not isinstance(name, str):
        raise TypeError(f"optimize: gpu is {name!r}; it must be None or a GPU's name, as 'h100'")
    try:
        return gpus.known(name)
    except ValueError as error:
        raise ValueError(f"optimize: gpu is {name!r}: {error}") from None


def _device_and_dtype(model: nn.Module, asked: torch.dtype | None) -> tuple[torch.device, torch.dtype, bool]:
    """Return the first parameter's (or buffer's) device, the floating point dtype of the model's layers, and whether
    others have another.

    Batch norms may be wider than the rest, as is usual beside half precision; other mixtures need ``dtype``.
    """
    tensors: dict[torch.dtype, str] = {}
    norms: dict[torch.dtype, str] = {}
    device = torch.device("cpu")
    for name, module in model.named_modules():
        norm = is_norm(module)
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if not tensors and not norms:
                device = tensor.device
            if tensor.is_floating_point():
                (norms if norm else tensors).setdefault(tensor.dtype, f"{name}.{key}" if name else key)
    found = tensors or norms or {torch.get_default_dtype(): ""}
    if len(found) > 1 and asked is None:
        mixture = ", ".join(f"{name} is {dtype}" for dtype, name in found.items())
        raise ValueError(f"optimize: the model mixes dtypes ({mixture}); pass the dtype to compute in")
    return device, next(iter(found)), len(found) > 1


def _capture(
    own: nn.Module, model: nn.Module, given: Any, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[capture.Captured, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the graph of ``own``, and the arguments it was captured with."""
    kind, first = type(model).__name__, ""
    if given is None:
        attempts: Iterator[tuple[Any, ...]] = _examples(model, batch, dtype)
    elif isinstance(given, Mapping) or not isinstance(given, Tensor | Sequence) or isinstance(given, str):
        raise TypeError(
            f"optimize: example_inputs is a {type(given).__name__}; it must be a tensor or a sequence of the model's "
            "positional arguments"
        )
    else:
        inputs = (given,) if isinstance(given, Tensor) else tuple(given)
        attempts = iter((_cast(pytree.tree_map_only(FakeTensor, _meta, inputs), None, dtype),))
    for args in attempts:
        placed = pytree.tree_map_only(Tensor, lambda leaf: torch.empty_like(leaf, device="meta"), args)
        try:
            return capture.confirmed(lambda: copies.shared(own), placed, device), (placed, {})
        except capture.Refused as error:
            raise TypeError(f"optimize: {kind} cannot be captured: {error}") from error
        except Exception as error:
            first = first or shapes.first_line(error)
            if given is not None:
                described = ", ".join(_described(value) for value in args)
                raise ValueError(f"optimize: the model does not accept example_inputs {described}: {first}") from error
    raise TypeError(
        f"optimize: {kind} cannot be captured: no example input was found that the model accepts ({first}); "
        "pass example_inputs"
    )


def _examples(model: nn.Module, batch: int, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield inputs of the sizes that a model's class says it is made for, then images of the usual sizes."""
    declared: Any = getattr(type(model), "_optimize_inputs", None)
    if declared is not None:
        for size in (batch, None):
            yield _cast(declared(model, size), None, dtype)
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    for size in shapes.SIZES:
        image = torch.empty((batch, channels, size, size), dtype=dtype, device="meta")
        yield (image,) * capture.required(model)


def _meta(fake: Tensor) -> Tensor:
    """Return a FakeTensor's shape and dtype without its mode, which takes no other tensors."""
    return torch.empty(tuple(int(size) for size in fake.shape), dtype=fake.dtype, device="meta")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"[{'x'.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}]"
    return repr(value)


def _annotate(gm: fx.GraphModule) -> list[ir.Layer]:
    """Return the author's layers in order, each with its output's shape and the bytes that it moves by itself."""
    values = {node: node.meta.get("value") for node in gm.graph.nodes}
    layers: dict[ir.Layer, None] = {}
    for node in gm.graph.nodes:
        for layer in ir.layers_of(node):
            moved = _bytes_moved(gm, node, values)
            layer.shape = ir.shape_of(node)
            layer.bytes_before = moved if layer not in layers else _total(layer.bytes_before, moved)
            layers[layer] = None
    return list(layers)


def _total(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def _bytes_moved(gm: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> int | None:
    """Inputs + constants read and output written by one node; 0 for a view, None if a shape is unknown."""
    result = values.get(node)
    if result is None or isinstance(result, shapes.Unknown):
        return None
    written = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    read: list[Tensor] = []
    for source in node.all_input_nodes:
        value = values.get(source)
        if value is None or isinstance(value, shapes.Unknown):
            return None
        read.extend(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
    storages = {tensor.untyped_storage()._cdata for tensor in read}
    if all(tensor.untyped_storage()._cdata in storages for tensor in written) and not memory.written(gm, node):
        return 0
    total = sum(tensor.numel() * tensor.element_size() for tensor in (*read, *written))
    total -= _skipped(gm, node, values)
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, plan.Fused):
            return total + module.constant_bytes()
        constants = (*module.parameters(), *module.buffers())
        total += sum(tensor.numel() * tensor.element_size() for tensor in constants if tensor.dim())
    return total


def _skipped(gm: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> int:
    """Bytes of its input that a convolution module steps over: pixels between those of a 1x1 with a stride."""
    module: Any = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if ir.calls(node, ir.CONV) and not node.kwargs:
        found = ir.tensor_of(gm, node.args[1])
        stride = as_pair(node.args[3]) if len(node.args) > 3 else (1, 1)
        if found is None or found.dim() != 4:
            return 0
        position, weight = 0, found
    elif isinstance(module, plan.Fused) and module.op == "conv_bn_act":
        position, weight, stride = 0, cast(Tensor, module.weight), module.options["stride"]
    elif isinstance(module, plan.Fused) and "weight_shortcut" in module.constants():
        position, weight, stride = 1, cast(Tensor, module.weight_shortcut), module.options["shortcut_stride"]
    else:
        return 0
    source = node.args[position] if len(node.args) > position else None
    x, result = values.get(source) if isinstance(source, fx.Node) else None, values.get(node)
    y = result[0] if isinstance(result, tuple) else result
    if stride is None or not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.dim() != 4 or y.dim() != 4:
        return 0
    pixels = x.shape[2] * x.shape[3] - cost.pixels_read(x.shape[2:], weight.shape[2:], stride, y.shape[2:])
    return x.shape[0] * x.shape[1] * pixels * x.element_size()


def _freeze(gm: fx.GraphModule, dtype: torch.dtype) -> None:
    """Parameters that are left become buffers without gradient, floating point ones in ``dtype``."""
    kept: set[Tensor] = set()  # statistics stay wide beside half precision
    for node in gm.graph.nodes:
        if ir.calls(node, ir.BATCH_NORM):
            kept |= {tensor for source in node.all_input_nodes if (tensor := ir.tensor_of(gm, source)) is not None}

    def target(tensor: Tensor, wide: bool) -> Tensor:
        tensor = tensor.detach()
        if not tensor.is_floating_point():
            return tensor
        if wide and tensor.dtype.itemsize > dtype.itemsize:  # what is called on half precision takes float32 beside it
            return tensor.to(torch.float32) if dtype.itemsize < 4 else tensor.to(dtype)
        return tensor.to(dtype)

    leaves = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    for name, module in gm.named_modules():
        if isinstance(module, plan.Fused):
            continue
        inside_leaf = any(name == leaf or name.startswith(f"{leaf}.") for leaf in leaves)
        norm = is_norm(module)
        for key, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[key] = target(buffer, norm or buffer in kept)
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            value = target(parameter, norm or parameter in kept)
            if inside_leaf:
                parameter.requires_grad_(False)
                parameter.data = value
            else:
                del module._parameters[key]
                module.register_buffer(key, value)
    for module in gm.modules():
        if isinstance(module, plan.Fused):
            module.prepare()


def _report(
    gm: fx.GraphModule,
    model: str,
    layers: list[ir.Layer],
    inputs: tuple[Any, ...],
    dtype: torch.dtype,
    original: torch.dtype,
    backend: str,
    notes: ir.Notes,
) -> Report:
    values = {} if inputs is None else shapes.run(gm, _cast(_metas(inputs), None, dtype)).values
    rows: dict[ir.Layer, Row] = {}
    for node in gm.graph.nodes:
        members = ir.layers_of(node)
        after = _bytes_moved(gm, node, values)
        op, runs = "", "torch"
        if node.op == "call_module" and isinstance(module := gm.get_submodule(str(node.target)), plan.Fused):
            given = [value for source in node.args if isinstance(value := values.get(cast(fx.Node, source)), Tensor)]
            known = len(given) == len(node.args)
            op, runs = module.op, module.backend_for(*given) if known else module.backend
        for index, layer in enumerate(members):
            reason = "" if op else layer.reason or ("it moves no data" if after == 0 else "no fused form of this layer")
            fused = f"{op} {members[0].name}" if op else ""
            moved = after if index == 0 else 0
            if layer in rows:  # a layer of several calls
                moved = _total(rows[layer].bytes_after, moved)
            rows[layer] = Row(layer.name, layer.kind, fused, reason, runs, layer.shape, layer.bytes_before, moved)
    for layer in layers:
        if layer not in rows:
            rows[layer] = Row(layer.name, layer.kind, "", "", "", layer.shape, layer.bytes_before, 0)
    ordered = tuple(rows[layer] for layer in layers)
    example = () if inputs is None else tuple(_described(value) for value in inputs)
    first = next((value for value in inputs or () if isinstance(value, Tensor) and value.dim() > 0), None)
    batch = None if first is None else first.shape[0]
    return Report(
        model,
        str(dtype).removeprefix("torch."),
        example,
        ordered,
        tuple(notes.lines),
        batch,
        str(original).removeprefix("torch."),
    )


def _metas(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return pytree.tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), inputs)
