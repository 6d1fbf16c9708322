"""From a module to an ``fx.GraphModule``, by running the module's own code once on tensors without data.

The author's code runs as Python runs it: replaced methods, patched classes, hooks, flags, defaults and isinstance are
what they are. A torch function mode, which exists in the running thread alone, sees each call of torch and writes it
down; nothing of the process is patched. Sizes that the code asks for are symbols: what it computes from them stands in
the graph, and where it decides by them, the graph asks again (`guards.expect`). No layer is understood here; that is
normalize.py.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from . import guards, shapes
from .calling import Arguments, flatten
from .guards import Refused
from .recorder import Recorder, map_leaves
from .shapes import first_line

_UNKNOWN_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


@dataclasses.dataclass(eq=False)
class Captured:
    """A module as a graph.

    Attributes:
        gm: takes the tensors of the module's arguments, in their order, and returns the leaves of its result (the
            result itself if it is a tensor).
        arguments: how a call's arguments become these tensors. form: of the result, None if it is a tensor.
        guarded: whether the code may do something else for other inputs: it asks about sizes, about an input's type or
            dimensions, or catches exceptions. asks_kind: the second of these.
    """

    gm: fx.GraphModule
    arguments: Arguments
    form: Any
    guarded: bool
    asks_kind: bool


def capture(
    root: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    device: torch.device | None = None,
    part: bool = False,
    fixed: bool = False,
) -> Captured:
    """Return the graph that ``root`` computes for such arguments; ``root`` is run, and belongs to the graph then.

    Args:
        root: a module in eval mode, a copy that nobody else uses.
        args, kwargs: its arguments; of tensors only shape and dtype are read.
        device: what the tensors are on; None for their own.
        part: leave the hooks of ``root`` itself out, and refuse a module that writes into what it is given.
        fixed: whether sizes are plain numbers to the code, which the graph then asks for at each run.

    Raises:
        Refused: the code decides by values, or does what cannot be written down.
        Exception: whatever the module raises for such arguments.
    """
    arguments = Arguments(root.forward, args, kwargs)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = Recorder(root, fake_mode, fixed)
    names = arguments.placeholders()
    given = pytree.tree_map_only(
        Tensor, lambda tensor: recorder.take(next(names), tensor, device), (tuple(args), dict(kwargs))
    )
    held = [(module, dict(module._parameters), dict(module._buffers)) for module in root.modules()]
    try:
        with plain_modes(), recorder.watching(), fake_mode, recorder:
            before = _identities(given)
            result = (root.forward if part else root)(*given[0], **given[1])
            if _identities(given) != before:
                raise Refused("it writes into a list or dictionary that it is given")
            leaves, form = flatten(result, once=True)
            recorder.give(leaves, isinstance(result, Tensor), part)
    except _UNKNOWN_VALUES as error:
        raise Refused(f"its code decides by values ({first_line(error)})") from error
    finally:
        replaced = [name for each in held for name in _restored(*each, fake_mode)]
    if replaced:
        raise Refused(f"it puts what it computes in the place of {replaced[0]}, a parameter or buffer of its own")
    recorder.keep_constants()
    gm = fx.GraphModule(root, recorder.graph, class_name=type(root).__name__)
    recorder.drop_constants()
    gm.training = False
    for node in gm.graph.nodes:
        if "fake" in node.meta:
            node.meta["value"] = pytree.tree_map_only(FakeTensor, _without_data, node.meta.pop("fake"))
        if part and any(source.op == "placeholder" for source in node.meta.get("written", ())):
            raise Refused("it writes into its argument")
    _mark_made(gm)
    guarded = any(node.target in (guards.expect, guards.expect_length) for node in gm.graph.nodes)
    guarded |= recorder.asks_kind or any(_catches(module) for module in root.modules())
    return Captured(gm, arguments, None if isinstance(result, Tensor) else form, guarded, recorder.asks_kind)


def _catches(module: nn.Module) -> bool:
    """Return whether a module's own forward catches exceptions (or has a ``with``, which looks the same)."""
    code = getattr(inspect.unwrap(module.forward), "__code__", None)
    if code is None or type(module).__module__.startswith("torch."):
        return False
    return any(step.opname in ("SETUP_FINALLY", "PUSH_EXC_INFO") for step in dis.get_instructions(code))


@contextmanager
def plain_modes() -> Iterator[None]:
    """Whatever mode the caller is in: no gradients, no autocast, and no inference mode, which hides what is written."""
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _identities(value: Any) -> tuple[str, list[int]]:
    leaves, spec = pytree.tree_flatten(value)
    return str(spec), [id(leaf) for leaf in leaves]


def _restored(
    module: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any], fake_mode: FakeTensorMode
) -> list[str]:
    """Give a module its tensors back; returns the names of those that were replaced by others than themselves."""
    changed = []
    for kept, now in ((parameters, module._parameters), (buffers, module._buffers)):
        for name in {**kept, **now}:
            tensor, found = kept.get(name), now.get(name)
            if found is not tensor and (tensor is None or found is not fake_mode.from_tensor(tensor)):
                changed.append(f"{type(module).__name__}.{name}")
            if name in kept:
                now[name] = tensor
            else:
                del now[name]
    return changed


def confirmed(
    make: Callable[[], nn.Module],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    device: torch.device,
    part: bool,
    fixed: bool = False,
    larger_images: bool = True,
) -> Captured:
    """Capture a module, then once more for another batch and image size, and see that the graphs are equal.

    Sizes are plain numbers to code that can do nothing with symbols; the graph is for these sizes then.

    Args:
        make: gives the module, each time a new copy. fixed: whether sizes are plain numbers from the beginning.
        larger_images: whether the module takes them.

    Raises:
        Refused: they are not: the code keeps a state, draws random numbers of Python's, or makes a number of a size
            in a way that cannot be followed.
        Exception: whatever the module raises for such arguments.
    """
    root = make()
    try:
        captured = capture(root, args, kwargs, device, part, fixed)
    except Refused:
        raise
    except Exception:
        root, fixed = make(), True
        captured = capture(root, args, kwargs, device, part, fixed)
    # The same module once more, so that what it has kept since then counts.
    growths = ((1, 0, 32, 32), (1, 0, 0, 0), (0, 0, 0, 0))
    for more in growths[2:] if fixed else growths if larger_images else growths[1:]:
        larger = pytree.tree_map_only(Tensor, functools.partial(_grown, more=more), (tuple(args), dict(kwargs)))
        if shapes.run(captured.gm, captured.arguments.tensors_of(*larger)).outside:
            continue
        try:
            again = capture(root, larger[0], larger[1], device, part, fixed)
        except Refused:
            raise
        except Exception:  # the module takes no such image
            continue
        if where := _difference(captured.gm, again.gm):
            raise Refused(f"its code does not do the same each time: {where}")
        break
    return captured


def _grown(tensor: Tensor, more: tuple[int, ...]) -> Tensor:
    extra = more if tensor.dim() == 4 else (more[0],) + (0,) * (tensor.dim() - 1)
    return tensor.new_empty([size + by for size, by in zip(tensor.shape, extra, strict=False)])


def _difference(a: fx.GraphModule, b: fx.GraphModule) -> str:
    """Return where two graphs differ, "" if they do not."""
    place: dict[fx.Node, int] = {}
    for one, other in itertools.zip_longest(a.graph.nodes, b.graph.nodes):
        if one is None or other is None:
            return "once more is called than the other time"
        place[one] = place[other] = len(place)
        texts = [
            repr((node.op, node.target, fx.map_arg((node.args, node.kwargs), lambda source: f"%{place[source]}")))
            for node in (one, other)
        ]
        if texts[0] != texts[1]:
            return f"{one.format_node()} and {other.format_node()}"
        if one.op == "get_attr" and not _same(_attribute(a, one.target), _attribute(b, other.target)):
            return f"{one.target} has two values"
    return ""


def _attribute(gm: fx.GraphModule, target: Any) -> Any:
    return operator.attrgetter(str(target))(gm)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype is b.dtype and torch.equal(a, b))


def _without_data(fake: FakeTensor) -> Tensor:
    """Return the same view of the same memory as a tensor on the device "meta"."""
    made = torch.empty(0, dtype=fake.dtype, device="meta")
    return made.set_(fake.untyped_storage(), fake.storage_offset(), fake.size(), fake.stride())


def _mark_made(gm: fx.GraphModule) -> None:
    """Mark the calls whose result has a floating point type that none of their inputs has."""
    for node in gm.graph.nodes:
        value = node.meta.get("value")
        if node.op in ("call_function", "call_method") and isinstance(value, Tensor) and value.is_floating_point():
            sources = [source.meta.get("value") for source in node.all_input_nodes]
            node.meta["made"] = not any(isinstance(each, Tensor) and each.dtype is value.dtype for each in sources)


_CASTS = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}


def retype(gm: fx.GraphModule, original: torch.dtype, target: torch.dtype) -> None:
    """Have what computed in ``original`` compute in ``target``: casts that the author wrote, tensors made on the way.

    What gave ``original`` for values of another type, as a division of bytes does, is cast.
    """
    for node in list(gm.graph.nodes):
        if node.op == "call_method" and node.target == _CASTS.get(original):
            node.target, node.args = "to", (node.args[0], target)
        node.args, node.kwargs = map_leaves(
            (node.args, dict(node.kwargs)), lambda leaf: target if leaf is original else leaf
        )
        if node.meta.get("made") and node.meta["value"].dtype is original:
            with gm.graph.inserting_after(node):
                cast_ = gm.graph.call_method("to", (node, target))
            node.replace_all_uses_with(cast_, lambda user, own=cast_: user is not own)
    gm.recompile()


def move(gm: fx.GraphModule, old: torch.device, device: torch.device) -> None:
    """Have tensors that the graph makes on the way on the model's device come into being on its new one."""
    for node in gm.graph.nodes:
        node.args, node.kwargs = map_leaves(
            (node.args, dict(node.kwargs)),
            lambda leaf: device if isinstance(leaf, torch.device) and leaf == old else leaf,
        )
    gm.recompile()
