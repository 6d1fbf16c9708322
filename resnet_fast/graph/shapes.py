"""Shapes and dtypes of every value in a graph, found by running it on tensors without data (device "meta").

Used for decisions that need shapes and for the report; what is fused stays valid for every batch and image size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from .guards import OutsideGuards
from .ir import ADD, BATCH_NORM, CONV, calls, is_call, nodes_in, tensor_of


class Unknown:
    """The value of a node that could not be computed."""


UNKNOWN = Unknown()
#: Heights and widths that models are made for.
SIZES = (224, 299, 64, 32, 28, 96, 128, 256, 384, 512)


class MetaRun(fx.Interpreter):
    """Runs a graph on meta tensors; ``values`` has what each node gave, ``error`` the first thing that went wrong.

    ``outside``: whether the sizes are others than the graph is for.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}
        self.error: str = ""
        self.outside = False
        self._metas: dict[int, Tensor] = {}

    def _meta(self, tensor: Tensor) -> Tensor:
        key = id(tensor)
        if key not in self._metas:
            self._metas[key] = torch.empty_like(tensor, device="meta", requires_grad=False)
        return self._metas[key]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self.fetch_attr(target)
        return self._meta(value) if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        training = args[5] if len(args) > 5 else kwargs.get("training", False)
        if target is BATCH_NORM and args and training is False:
            return torch.empty_like(args[0])  # its meta kernel takes as long as all other layers together
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, _BatchNorm) and not module.training and len(args) == 1:
            return torch.empty_like(args[0])
        plain: Callable[..., Any] | None = getattr(module, "plain", None)  # the fused modules of plan.py
        state = {name: self._meta(value) for name, value in (*module.named_parameters(), *module.named_buffers())}
        if plain is None:
            return torch.func.functional_call(module, state, args, kwargs)
        return plain(state, *args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if any(self.env.get(node) is UNKNOWN for node in nodes_in((n.args, n.kwargs))):
            value: Any = UNKNOWN
        else:
            try:
                value = super().run_node(n)
            except OutsideGuards:
                value, self.outside = UNKNOWN, True
            except Exception as error:
                self.error = self.error or f"{n.name}: {first_line(error)}"
                value = UNKNOWN
        self.values[n] = value
        return value


def first_line(error: BaseException) -> str:
    """Return an exception's message, first line only."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def run(gm: fx.GraphModule, inputs: Sequence[Any]) -> MetaRun:
    """Run ``gm`` on ``inputs`` (tensors are replaced by meta ones). Never raises; see ``MetaRun.error``."""
    metas = pytree.tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), list(inputs))
    interpreter = MetaRun(gm)
    with torch.no_grad(), torch.device("meta"):
        try:
            interpreter.run(*metas, enable_io_processing=False)
        except Exception as error:  # fewer inputs than placeholders, for one
            interpreter.error = interpreter.error or first_line(error)
    return interpreter


def required_inputs(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the placeholders."""
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def mark_equal_adds(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Set ``meta["same_shape"]`` on the additions whose operands have one shape and dtype whatever the input's size.

    Equal sizes at one input may be chance (a batch of one, a 1x1 map), so they must also be equal for a larger batch,
    and for a larger image where the model takes one.
    """
    runs = [run(gm, inputs)]
    for growth in ((1, 0, 0, 0), (2, 0, 96, 160)):
        if not all(isinstance(value, Tensor) and value.dim() > 0 for value in pytree.tree_leaves(list(inputs))):
            break

        def grown(value: Tensor, growth: tuple[int, ...] = growth) -> Tensor:
            extra = growth if value.dim() == 4 else (growth[0],) + (0,) * (value.dim() - 1)
            return value.new_empty([size + more for size, more in zip(value.shape, extra, strict=True)], device="meta")

        result = run(gm, pytree.tree_map_only(Tensor, grown, list(inputs)))
        if not result.error:
            runs.append(result)

    def equal(values: dict[fx.Node, Any], a: Any, b: Any) -> bool:
        x, y = values.get(a), values.get(b)
        return isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype

    for node in gm.graph.nodes:
        if is_call(node, ADD):
            node.meta["same_shape"] = len(runs) > 1 and all(equal(result.values, *node.args) for result in runs)


def image_input(gm: fx.GraphModule) -> tuple[fx.Node, int] | None:
    """The placeholder that a convolution reads, as it is or padded, and its channels, where the graph has exactly one
    required input."""
    inputs = required_inputs(gm)
    if len(inputs) != 1:
        return None
    for node in gm.graph.nodes:
        if is_call(node, CONV) and _without_padding(node.args[0]) is inputs[0]:
            weight = tensor_of(gm, node.args[1])
            if weight is not None:
                return inputs[0], weight.shape[1] * node.args[6]
    return None


def _without_padding(source: Any) -> Any:
    """Return what ``source`` was before its height and width were padded."""
    if not calls(source, nn.functional.pad) or len(source.args) < 2:
        return source
    sizes = source.args[1]
    return source.args[0] if isinstance(sizes, tuple | list) and len(sizes) <= 4 else source
