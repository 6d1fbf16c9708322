"""``optimize``: a frozen snapshot of a model for inference, its layers fused by the passes of this package.

The order of the passes and the module they end in are here; what each does is in its own file.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from resnet_fast import backends
from resnet_fast._dtypes import FLOAT8
from resnet_fast._warn import reworded, warn
from resnet_fast.backends import cuda, triton
from resnet_fast.backends.layouts import suggests_channels_last
from resnet_fast.kernels import gpus
from resnet_fast.ops.common import as_pair
from resnet_fast.roofline import cost

from . import calling, capture, copies, finite, ir, memory, parts, plan, selfcheck, shapes
from . import cuda_graphs as cuda_graphs_
from .fold_bn import fold_bn
from .fuse_act import fuse_act
from .fuse_add import fuse_add
from .fuse_head import fuse_head
from .fuse_stem import fuse_stem
from .fuse_tail import fuse_tail
from .guards import Refused
from .hoist_sizes import hoist_sizes
from .normalize import SharedMemoryError, is_norm, normalize
from .report import Report, Row
from .snapshot import ImageInput, OptimizedModule, as_dtype

#: How many images a plan for a GPU is made for. Smaller batches run the parts of a fused block one by one.
_PLANNED_BATCH = 128

_FIRST_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def optimize(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    example_inputs: Tensor | Sequence[Any] | None = None,
    cuda_graphs: bool | str = "auto",
    backend: str = "auto",
    gpu: str | None = None,
    check: bool = True,
    calibration: Iterable[Any] | None = None,
) -> OptimizedModule:
    """Return a frozen copy of ``model`` for inference whose layers run fused; ``model`` itself is not changed.

    Fused are convolution + BatchNorm (eval mode or frozen) + residual + ReLU, the stem with its max-pool, global
    average pool + linear, and addition + ReLU; for a GPU also bottleneck blocks from their 3x3 to the next block's
    first convolution, where that moves less. Everything else runs as before; ``report()`` of the result lists both.
    It is valid for every batch and image size that the model takes.

    Args:
        model: a module in eval mode. Its own code is run on tensors without data, twice, and its calls of torch are
            written down; it may look at sizes, and at other sizes that decide differently its own code runs. If it
            decides by values, or cannot be written down for another reason, its code stays in use, and the largest of
            its children that can be captured are fused.
        dtype: what to compute in: torch.float32, bfloat16, float16 or float64; None keeps the parameters' dtype.
            BatchNorm is folded in float64 and each weight rounded once. Results come in the model's own dtype.
            torch.int8 and torch.float8_e4m3fn are :func:`quantize`, which has more options: ``calibration`` is needed
            then, and the other arguments but ``check`` are not taken.
        example_inputs: a tensor or a sequence of the model's positional arguments, read for its sizes: tensors without
            data (device "meta") do as well. What is planned for a GPU is planned for this batch.
            None: one image (128 to plan for a GPU) of the first convolution's channels for each argument without a
            default, 224x224 or the first other size that fits.
        cuda_graphs: whether a run on a GPU is recorded at its second image of a shape and replayed from then on: "auto"
            where every layer runs as a kernel of ours, True always (ValueError where the graph cannot be replayed),
            False never.
        backend: "auto" or a name from ``resnet_fast.backends.available()``.
        gpu: the GPU to plan for, as "h100"; the result still runs on the model's device. None: the CUDA device that the
            model is on; on a CPU nothing is planned.
        check: whether the result is compared with ``model`` on one random image and on two of another size before it is
            returned, which takes about as long as eight images do. A part that differs stays as its author wrote it.
        calibration: the calibration batches of :func:`quantize`, for torch.int8 and torch.float8_e4m3fn alone.

    Raises:
        ValueError: the model or a part of it that minds is in training mode, it does not accept ``example_inputs``, or
            an argument has an impossible value.
        TypeError: the model cannot be copied, takes no image and no ``example_inputs`` are given, or is no module; an
            argument has the wrong type.

    Examples:
        >>> import torch
        >>> import resnet_fast as rf
        >>> fast = rf.optimize(rf.resnet18().eval())  # or any torchvision ResNet
        >>> fast(torch.rand(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
        >>> fast.report()  # one line; print() shows what became of every layer
        <Report: 69 of 69 layers fused, ...>
    """
    if dtype in (torch.int8, FLOAT8):
        return _quantized(model, dtype, calibration, check, example_inputs, cuda_graphs, backend, gpu)
    if calibration is not None:
        raise ValueError(f"optimize: calibration goes with dtype=torch.int8 or {FLOAT8}, and dtype is {dtype!r}")
    return unplanned(
        model, dtype=dtype, example_inputs=example_inputs, cuda_graphs=cuda_graphs, backend=backend, gpu=gpu,
        check=check, tails=True,
    )  # fmt: skip


def _quantized(model: nn.Module, dtype: Any, calibration: Any, check: bool, *others: Any) -> OptimizedModule:
    """Return what ``quantize`` gives, with errors in the words of ``optimize``'s arguments."""
    from .quantize import quantize

    if others[0] is not None or others[1:] != ("auto", "auto", None):
        raise ValueError(
            f"optimize: example_inputs, cuda_graphs, backend and gpu are not taken with dtype={dtype}: the "
            "calibration batches are the examples"
        )
    if calibration is None:
        raise ValueError(f"optimize: dtype={dtype} needs calibration, an iterable of batches, as quantize() does")
    try:
        return quantize(model, calibration, check=check, dtype=dtype)
    except (TypeError, ValueError) as error:
        said = reworded(error, "quantize", "optimize", "calibration_batches", "calibration")
        if said is error:
            raise
        raise said from error


def unplanned(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    example_inputs: Tensor | Sequence[Any] | None = None,
    cuda_graphs: bool | str = "auto",
    backend: str = "auto",
    gpu: str | None = None,
    check: bool = True,
    tails: bool = False,
) -> OptimizedModule:
    """As :func:`optimize`, but bottleneck blocks are fused for a GPU only with ``tails``."""
    if isinstance(model, OptimizedModule):
        raise TypeError("optimize: this module is the result of optimize() already; give it the original model")
    copies.check(model)
    device, original, mixed = _device_and_dtype(model, dtype)
    _check_options(dtype, cuda_graphs, backend, device)
    target = original if dtype is None else dtype
    planned = _planned(gpu, device) if tails else None
    hooks = copies.hooked(model)
    said = ""
    if hooks:
        said = (
            f"forward hooks are not called by the frozen snapshot, what they return is part of it: {', '.join(hooks)}"
        )
        warn(said, "optimize", "quantize")
    own = copies.copied(model)
    if mixed:
        own.to(target)
    written = target if mixed else original
    # A snapshot for a GPU that is not here, or without data, is made to be looked at, not to be run.
    elsewhere = device.type == "meta" or (planned is not None and device.type != "cuda")
    options = _Options(target, written, original, device, backend, cuda_graphs, planned, not elsewhere, check)
    refused, failed = "", ""
    for args in _examples(model, example_inputs, 1 if planned is None else _PLANNED_BATCH, written):
        try:
            return _snapshot(own, parts.Call(args, {}), options, (said,) if said else ())
        except Refused as error:
            refused = str(error)
        except Exception as error:
            failed = failed or shapes.first_line(error)
            if refused:
                break
        if refused or example_inputs is not None:
            try:
                return _in_parts(own, args, options, refused or failed)
            except Exception as error:
                if example_inputs is not None:
                    described = ", ".join(_described(value) for value in args)
                    raise ValueError(
                        f"optimize: the model does not accept example_inputs {described}: {shapes.first_line(error)}"
                    ) from error
    raise TypeError(
        f"optimize: {type(model).__name__} cannot be captured: no example input was found that the model accepts "
        f"({refused or failed}); pass example_inputs"
    )


class _Options(NamedTuple):
    """What the user asked for, and what it means for this model: ``written`` is the dtype that its code computes in."""

    target: torch.dtype
    written: torch.dtype
    original: torch.dtype
    device: torch.device
    backend: str
    cuda_graphs: bool | str
    planned: gpus.GPU | None
    runs: bool
    check: bool


def _snapshot(
    own: nn.Module,
    call: parts.Call,
    options: _Options,
    said: tuple[str, ...] = (),
    part: bool = False,
    fixed: bool = False,
) -> OptimizedModule:
    """Return the snapshot of ``own``, captured with these arguments.

    Args:
        said: notes for the report.
        part: ``own`` is called by the code of another model: its own hooks and its forward stay in use there.
        fixed: sizes are plain numbers to its code, and the snapshot is for these.

    Raises:
        Refused: it cannot be captured whole, or its snapshot gives another answer.
        Exception: whatever it raises for such arguments.
    """
    target, written, original, device = options.target, options.written, options.original, options.device
    notes = ir.Notes(list(said))
    answers = None
    if options.runs:
        alone = copies.copied(own)
        answers = selfcheck.Answers(alone.forward if part else alone, call, device, options.check)
    larger = answers is None or answers.takes_other_sizes
    captured = capture.confirmed(lambda: copies.shared(own), *call, device, part, fixed, larger)
    gm, inputs = captured.gm, _metas(tuple(captured.arguments.tensors_of(*call)))
    layers = _annotate(gm)
    try:
        normalize(gm, notes)
    except SharedMemoryError as error:
        raise Refused(f"in-place writes are kept as they are: {error}") from error
    image = shapes.image_input(gm)
    takes_images = image is not None  # as its first convolution does: floating point ones
    if image is not None and (part or captured.asks_kind or not captured.arguments.is_tensor(str(image[0].target))):
        image = None  # the author's code says what it takes
    shapes.mark_equal_adds(gm, inputs)
    hoist_sizes(gm)
    fold_bn(gm, torch.float64 if torch.float64 in (target, original) else torch.float32)
    fuse_act(gm)
    fuse_add(gm)
    fuse_stem(gm)
    fuse_head(gm)
    if (backends.current() if options.backend == "auto" else options.backend) == cuda.NAME:
        notes.add("no bottleneck_tail is planned, there is no CUDA kernel of it")
    elif options.planned is not None:
        fuse_tail(gm, options.planned, target, notes)
    gm = plan.lower(gm, target, options.backend)
    if target is not written:
        capture.retype(gm, written, target)
    _freeze(gm, target)
    guards = finite.certify(gm)
    if guards:
        measured = "1 tensor is" if guards == 1 else f"{guards} tensors are"
        notes.add(f"{measured} measured at each run for values near overflow; not counted in the bytes moved")
    recorded = not part and _records(gm, options.cuda_graphs, device, notes)
    report = _report(gm, type(own).__name__, layers, inputs, target, original, options.backend, notes)
    plain: Any = own.forward if part else None
    if not part and (captured.guarded or not captured.arguments.fixed or not takes_images):
        plain = copies.shared(own)  # which may take more than what it was captured with, such as pixels as integers
    result = OptimizedModule(
        gm,
        report,
        target,
        original,
        None if image is None else ImageInput(str(image[0].target), image[1]),
        captured,
        plain,
        device,
        written,
        part,
        recorded,
    )
    result.channels_last = any(suggests_channels_last(p) for p in own.parameters() if p.dim() == 4)
    for node in gm.graph.nodes:
        node.meta = {}
    if answers is not None:
        try:
            result.remark(answers.compare(result, written, target))
        except Refused:
            if fixed:
                raise
            return _snapshot(
                own, call, options, said, part, fixed=True
            )  # it may have asked what kind of number a size is
    return result


def _in_parts(own: nn.Module, args: tuple[Any, ...], options: _Options, why: str) -> OptimizedModule:
    """Return the model with its own code, and snapshots of the children that have one.

    Raises:
        Exception: whatever the model raises for such arguments.
    """
    calls = parts.calls_of(own, args, options.device)
    found, reasons = parts.split(own, calls, lambda child, call: _snapshot(child, call, options, part=True))
    call = parts.Call(args, {})
    result = parts.assemble(copies.shared(own), found, reasons, why, options.target, options.original)
    if options.runs and options.check:
        try:
            answers = selfcheck.Answers(copies.copied(own), call, options.device, compared=True)
            result.remark(answers.compare(copy.deepcopy(result), options.written, options.target, list(found)))
        except Refused as error:
            why = f"{why}; with its parts fused, {error}"
            result = parts.assemble(own, {}, reasons, why, options.target, options.original)
    warn(result.report().notes[0], "optimize", "quantize")
    return result


def _check_options(dtype: Any, cuda_graphs: Any, backend: Any, device: torch.device) -> None:
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(
            f"optimize: dtype is {dtype!r}; it must be None or one of {', '.join(map(str, _DTYPES))}, or "
            f"torch.int8 or {FLOAT8} with calibration"
        )
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


def _examples(model: nn.Module, given: Any, batch: int, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield positional arguments without data: those that are given, else of the sizes that a model's class says it is
    made for, then of the usual ones."""
    if given is not None:
        if isinstance(given, Mapping) or not isinstance(given, Tensor | Sequence) or isinstance(given, str):
            raise TypeError(
                f"optimize: example_inputs is a {type(given).__name__}; it must be a tensor or a sequence of the "
                "model's positional arguments"
            )
        inputs = (given,) if isinstance(given, Tensor) else tuple(given)
        yield as_dtype(pytree.tree_map_only(Tensor, _meta, inputs), None, dtype)
        return
    declared: Any = getattr(type(model), "_optimize_inputs", None)
    if declared is not None:
        for size in (batch, None):
            yield as_dtype(declared(model, size), None, dtype)
    first = next((module for module in model.modules() if isinstance(module, _FIRST_LAYERS)), None)
    count = calling.required(model)
    taken = {each.in_channels for each in model.modules() if isinstance(each, nn.Conv2d) and each.in_channels <= 4}
    if 1 < count <= 3 and len(taken) > 1:  # several images, such as colours and depth
        for mixed in itertools.product(sorted(taken, reverse=True), repeat=count):
            yield tuple(torch.empty((batch, channels, 224, 224), dtype=dtype, device="meta") for channels in mixed)
    for kind, channels in ((type(first), getattr(first, "in_channels", getattr(first, "in_features", 3))), (None, 3)):
        for images, size in itertools.product(dict.fromkeys((batch, 2)), shapes.SIZES):
            shapes_of: dict[Any, tuple[int, ...]] = {
                nn.Conv1d: (images, channels, size),
                nn.Conv3d: (images, channels, 8, size, size),
                nn.Linear: (images, channels),
            }
            shape = shapes_of.get(kind, (images, channels, size, size))
            yield (torch.empty(shape, dtype=dtype, device="meta"),) * count


def _meta(tensor: Tensor) -> Tensor:
    """Return a tensor's shape and dtype, a FakeTensor's without its mode, which takes no other tensors."""
    return torch.empty(tuple(int(size) for size in tensor.shape), dtype=tensor.dtype, device="meta")


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
            moved = row_bytes(gm, node, values)
            layer.shape = ir.shape_of(node)
            layer.bytes_before = moved if layer not in layers else _total(layer.bytes_before, moved)
            layers[layer] = None
    return list(layers)


def _total(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def row_bytes(gm: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> int | None:
    """Return inputs + constants read and output written by one node; 0 for a view, None if a shape is unknown."""
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
    values = {} if inputs is None else shapes.run(gm, as_dtype(_metas(inputs), None, dtype)).values
    rows: dict[ir.Layer, Row] = {}
    for node in gm.graph.nodes:
        members = ir.layers_of(node)
        after = row_bytes(gm, node, values)
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
