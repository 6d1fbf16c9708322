"""From fused nodes to modules that hold their constants packed, and where a residual's memory may be written over.

Which backend runs is the bound op's choice; nothing here knows one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from resnet_fast import ops
from resnet_fast.nn.pristine import capturing
from resnet_fast.ops._op import Bound, Op

from . import ir, memory
from .copies import rebuilt
from .guard import careful


class Fused(nn.Module):
    """A fused op on constant tensors, which are its buffers; the packed copies are made anew after a copy or a load.

    Attributes:
        options: the op's constants that are no tensors.
        overwrites: whether the result may be written into the residual, which nobody reads afterwards.
        no_nan: whether no NaN can reach the ReLU; set by finite.certify.
        image_size: height and width that images must have, None if any will do.
        layer: the name of the first of the author's layers that it computes.
    """

    def __init__(
        self,
        op: Op[Any],
        constants: dict[str, Any],
        dtype: torch.dtype,
        backend: str,
        device: torch.device,
        overwrites: bool = False,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.op = op.name
        self.options: dict[str, Any] = {}
        for name, value in constants.items():
            if value is None or isinstance(value, Tensor):
                frozen = None if value is None else nn.Parameter(value.detach(), requires_grad=False)
                self.register_parameter(name, frozen)
            else:
                self.options[name] = value
        self._device = device
        self.dtype = dtype
        self.asked = backend
        self.training = False
        self.overwrites, self.image_size = overwrites, image_size
        self.no_nan = False
        self.layer = ""
        self._bound: Bound[Any] | None = None

    @property
    def declared(self) -> Op[Any]:
        return ops.ALL[self.op]

    def constants(self) -> dict[str, Tensor]:
        """Return the op's constant tensors, by the names of its arguments."""
        return {name: tensor for name, tensor in self._parameters.items() if tensor is not None}

    def arguments(self) -> Any:
        """Return the op's arguments without data."""
        return self.declared.arguments(**dict.fromkeys(self.declared.data), **self.constants(), **self.options)

    def prepare(self) -> Bound[Any]:
        """Return the bound op, made at the first use."""
        if self._bound is None:
            constants = {**self.constants(), **self.options}
            self._bound = Bound(self.declared, constants, self.dtype, self.asked, self._device)
        return self._bound

    @property
    def backend(self) -> str:
        """The name of the backend that runs it, "auto" if each input's shape decides."""
        return self.prepare().backend

    def backend_for(self, *inputs: Tensor) -> str:
        """Return the name of the backend that runs it on such inputs, which may be without data."""
        return self.prepare().backend_for(*inputs)

    def forward(self, *inputs: Tensor) -> Any:
        if capturing() or torch.compiler.is_compiling():
            return self.plain(self.constants(), *inputs)
        self._check(inputs[0])
        if not self.overwrites and not self.no_nan:
            return self.prepare()(*inputs)
        return self.prepare()(*inputs, overwrite_residual=self.overwrites, finite=self.no_nan and not careful())

    def plain(self, state: dict[str, Tensor], *inputs: Tensor) -> Any:
        """Compute the op itself on the constants in ``state``: for shapes."""
        self._check(inputs[0])
        op, dtype = self.declared, inputs[0].dtype
        tensors = {name: state[name] if _is_vector(name) else state[name].to(dtype) for name in self.constants()}
        a = op.arguments(**tensors, **self.options, **dict(zip(op.data, inputs, strict=False)))
        return op.single(a, op.overload(*a))

    def _check(self, x: Tensor) -> None:
        if self.image_size is not None and tuple(x.shape[2:]) != self.image_size:
            raise ValueError(
                f"the average pool and linear layer at the end take {self.image_size[0]}x{self.image_size[1]} pixels, "
                f"here they are given {x.shape[2]}x{x.shape[3]}: the network is made for inputs of another size"
            )

    def constant_bytes(self) -> int:
        """Return what it reads besides its inputs at each call: weights in the computing dtype, per-channel vectors."""
        return sum(
            tensor.numel() * (tensor.element_size() if _is_vector(name) else self.dtype.itemsize)
            for name, tensor in self.constants().items()
        )

    def extra_repr(self) -> str:
        shapes = (f"{name} {'x'.join(map(str, value.shape))}" for name, value in self.constants().items())
        parts = [self.op, *(shape for shape in shapes if shape.startswith("weight"))]
        parts += [f"{name}={value}" for name, value in self.options.items()]
        return ", ".join((*parts, str(self.dtype)[6:]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None}

    def _changed(self) -> None:
        """Other constants: what was packed and what was proved about them is void."""
        self._bound = None
        self.no_nan = False

    def _apply(self, fn: Any, recurse: bool = True) -> Fused:
        self._changed()
        self._device = fn(torch.empty(0, dtype=torch.long, device=self._device)).device  # of ops without constants, too
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._changed()
        super()._load_from_state_dict(*args)


def _is_vector(name: str) -> bool:
    """Return whether a constant of this name is per channel and stays in the precision it was folded in."""
    return name.startswith(("scale", "shift"))


def lower(gm: fx.GraphModule, dtype: torch.dtype, backend: str) -> fx.GraphModule:
    """Return ``gm`` with its fused nodes as calls of modules that compute in ``dtype``, and nothing its graph does not
    use."""
    device = next((tensor.device for tensor in (*gm.parameters(), *gm.buffers())), torch.device("cpu"))
    order = ir.positions(gm.graph)
    made = {
        node: module
        for node in gm.graph.nodes
        if (module := _module(gm, node, dtype, backend, device, order)) is not None
    }
    names = _names(gm, made)
    for node, module in made.items():
        a = ir.arguments_of(node)
        module.layer = ir.name_of(node)
        inputs = tuple(value for name in module.declared.data if (value := getattr(a, name)) is not None)
        with gm.graph.inserting_before(node):
            new = gm.graph.create_node("call_module", names[node], inputs)
        new.meta = dict(node.meta)
        if node.target is ir.BOTTLENECK_TAIL and a.weight1 is None:
            # The op always gives two tensors, the module only what there is.
            for output in list(node.users):
                new.meta["value"] = output.meta.get("value")
                output.replace_all_uses_with(new)
                gm.graph.erase_node(output)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    for node in list(gm.graph.nodes):
        if node.op == "get_attr" and not node.users:
            gm.graph.erase_node(node)
    return rebuilt(gm, {names[node]: module for node, module in made.items()})


def _module(
    gm: fx.GraphModule, node: fx.Node, dtype: torch.dtype, backend: str, device: torch.device, order: dict[fx.Node, int]
) -> Fused | None:
    """Return the module for a fused node, None for any other node."""
    op = ir.op_of(node)
    if op is None:
        return None
    a = ir.arguments_of(node)
    constants = {name: _constant(gm, value, dtype) for name, value in a._asdict().items() if name not in op.data}
    overwrites = node.target is ir.CONV_BN_ACT and _may_overwrite(gm, node, order)
    return Fused(op, constants, dtype, backend, device, overwrites, node.meta.get("image_size"))


def _constant(gm: fx.GraphModule, value: Any, dtype: torch.dtype) -> Any:
    """Return the tensor behind a ``get_attr`` node, or the option; float64 is kept only if it is computed in."""
    if not isinstance(value, fx.Node):
        return value
    tensor = ir.tensor_of(gm, value)
    narrow = tensor is not None and tensor.dtype is torch.float64 and dtype is not torch.float64
    return tensor.float() if tensor is not None and narrow else tensor


def _names(gm: fx.GraphModule, made: dict[fx.Node, Fused]) -> dict[fx.Node, str]:
    """Return a name for each module: its first layer's, with a number if that is taken."""
    taken = {
        str(node.target).partition(".")[0]
        for node in gm.graph.nodes
        if node.op == "call_module" or (node.op == "get_attr" and any(user not in made for user in node.users))
    }
    names: dict[fx.Node, str] = {}
    for node in made:
        base = candidate = ir.identifier(ir.name_of(node))
        count = 1
        while candidate in taken or hasattr(fx.GraphModule, candidate):
            candidate, count = f"{base}_{count}", count + 1
        taken.add(candidate)
        names[node] = candidate
    return names


def _may_overwrite(gm: fx.GraphModule, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether the residual of this conv_bn_act is memory that this graph allocated and nobody reads after this node.

    Views count as readers of the memory they show, the graph's output as the last reader of all.
    """
    conv = ir.arguments_of(node)
    residual = conv.residual
    if not any(ir.is_call(residual, op) for op in (ir.CONV_BN_ACT, ir.STEM, ir.ADD_ACT)):
        return False
    shown = memory.views_of(gm, residual)
    if conv.x in shown:
        return False
    readers = {user for view in shown for user in view.users if user is not node}
    return all(order[reader] < order[node] for reader in readers)
