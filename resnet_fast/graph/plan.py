"""From fused nodes to modules that hold their constants packed, and where a residual's memory may be written over.

Which backend runs is the prepared ops' choice; nothing here knows one.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from resnet_fast.ops import prepared
from resnet_fast.ops._common import kernels_for

from . import ir, memory
from .guard import careful
from .trace import rebuilt

add_act: Any = importlib.import_module("resnet_fast.ops.add_act")  # the package's attribute is the function


class Fused(nn.Module):
    """A fused op on constant tensors, which are its buffers; the packed copies are made anew after a copy or a load."""

    op: str

    def __init__(self, tensors: dict[str, Tensor | None], dtype: torch.dtype, backend: str) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach())
        self.dtype = dtype
        self.asked = backend
        self.training = False
        self.no_nan = False  # whether no NaN can reach the ReLU; set by finite.certify
        self._prepared: Any = None

    def prepare(self) -> Any:
        """The prepared op, made at the first use."""
        if self._prepared is None:
            self._prepared = self._make()
        return self._prepared

    def _make(self) -> Any:
        raise NotImplementedError

    @property
    def backend(self) -> str:
        """The name of the backend that runs it, "auto" where each input's shape decides."""
        return cast(str, self.prepare().backend)

    def backend_for(self, *inputs: Tensor) -> str:
        """The name of the backend that runs it on such inputs, which may be without data."""
        return cast(str, self.prepare().backend_for(*inputs))

    def constant_bytes(self) -> int:
        """What it reads besides its inputs at each call: weights in the computing dtype, per-channel vectors."""
        total = 0
        for name, tensor in self._buffers.items():
            if tensor is not None:
                size = tensor.element_size() if name.startswith(("scale", "shift")) else self.dtype.itemsize
                total += tensor.numel() * size
        return total

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}

    def _changed(self) -> None:
        """Other constants: what was packed and what was proved about them is void."""
        self._prepared = None
        self.no_nan = False

    def _apply(self, fn: Any, recurse: bool = True) -> Fused:
        self._changed()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._changed()
        super()._load_from_state_dict(*args)


class FusedConvBNAct(Fused):
    """``conv_bn_act``; with ``overwrites`` the result is written into the residual, which nobody reads afterwards."""

    op = "conv_bn_act"

    def __init__(
        self,
        tensors: dict[str, Tensor | None],
        dtype: torch.dtype,
        backend: str,
        conv: ir.Conv,
        overwrites: bool,
    ) -> None:
        super().__init__(tensors, dtype, backend)
        self.stride, self.padding, self.dilation, self.groups = list(conv[5]), list(conv[6]), list(conv[7]), conv[8]
        self.activation, self.late = conv.activation, conv.residual_after_activation
        self.overwrites = overwrites

    def _make(self) -> Any:
        constants: Any = (self.weight, self.scale, self.shift)
        return prepared.ConvBNAct(
            *constants, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups,
            activation=self.activation, residual_after_activation=self.late, dtype=self.dtype, backend=self.asked,
        )  # fmt: skip

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        finite = self.no_nan and not careful()
        return cast(Tensor, self.prepare()(x, residual, self.overwrites, finite))

    def plain(self, state: dict[str, Tensor], x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The op itself on the constants in ``state``: for shapes."""
        return cast(Tensor, ir.CONV_BN_ACT(
            x, state["weight"].to(x.dtype), state["scale"], state["shift"], residual,
            self.stride, self.padding, self.dilation, self.groups, self.activation, self.late,
        ))  # fmt: skip

    def extra_repr(self) -> str:
        k, c, r, s = self.weight.shape  # type: ignore[misc]
        return f"{c * self.groups}, {k}, {r}x{s}, stride={self.stride}, {self.activation}, {str(self.dtype)[6:]}"


class FusedStem(Fused):
    """``stem`` for float images."""

    op = "stem"

    def __init__(self, tensors: dict[str, Tensor | None], dtype: torch.dtype, backend: str, ceil_mode: bool) -> None:
        super().__init__(tensors, dtype, backend)
        self.ceil_mode = ceil_mode

    def _make(self) -> Any:
        constants: Any = (self.weight, self.scale, self.shift)
        return prepared.Stem(*constants, ceil_mode=self.ceil_mode, dtype=self.dtype, backend=self.asked)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.prepare()(x))

    def plain(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        weight = state["weight"].to(x.dtype)
        return cast(Tensor, ir.STEM(x, weight, state["scale"], state["shift"], None, None, self.ceil_mode))


class FusedHead(Fused):
    """``head``; ``image_size`` is height and width that images must have, None where any will do."""

    op = "head"

    def __init__(
        self,
        tensors: dict[str, Tensor | None],
        dtype: torch.dtype,
        backend: str,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(tensors, dtype, backend)
        self.image_size = image_size

    def _make(self) -> Any:
        constants: Any = (self.weight, self.bias)
        return prepared.Head(*constants, dtype=self.dtype, backend=self.asked)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return cast(Tensor, self.prepare()(x))

    def _check(self, x: Tensor) -> None:
        if self.image_size is not None and tuple(x.shape[2:]) != self.image_size:
            raise ValueError(
                f"the average pool and linear layer at the end take {self.image_size[0]}x{self.image_size[1]} pixels, "
                f"here they are given {x.shape[2]}x{x.shape[3]}: the network is made for inputs of another size"
            )

    def plain(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        self._check(x)
        bias = state.get("bias")
        return cast(Tensor, ir.HEAD(x, state["weight"].to(x.dtype), None if bias is None else bias.to(x.dtype)))


class FusedBottleneckTail(Fused):
    """``bottleneck_tail``: y, or the pair (y, following) where the next block's 1x1 is part of it."""

    op = "bottleneck_tail"

    def __init__(
        self,
        tensors: dict[str, Tensor | None],
        dtype: torch.dtype,
        backend: str,
        stride: tuple[int, int],
        shortcut_stride: tuple[int, int],
    ) -> None:
        super().__init__(tensors, dtype, backend)
        self.stride, self.shortcut_stride = list(stride), list(shortcut_stride)

    def _make(self) -> Any:
        constants: Any = {name: getattr(self, name) for name in _TAIL_CONSTANTS}
        return prepared.BottleneckTail(
            **constants, stride=self.stride, shortcut_stride=self.shortcut_stride, dtype=self.dtype, backend=self.asked
        )

    def forward(self, a: Tensor, residual: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return cast("Tensor | tuple[Tensor, Tensor]", self.prepare()(a, residual))

    def plain(self, state: dict[str, Tensor], a: Tensor, residual: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The op itself on the constants in ``state``: for shapes."""
        values = [
            value.to(a.dtype) if value is not None and name.startswith("weight") else value
            for name, value in ((name, state.get(name)) for name in _TAIL_CONSTANTS)
        ]
        y, following = ir.BOTTLENECK_TAIL(a, *values[:6], residual, *values[6:], self.stride, self.shortcut_stride)
        return y if state.get("weight1") is None else (y, following)

    def extra_repr(self) -> str:
        (k, mid, *_), first = self.weight3.shape, self.weight1  # type: ignore[misc]
        parts = [f"{mid}, {k}", f"stride={self.stride}"]
        parts += ["projection"] if self.weight_shortcut is not None else []
        parts += [f"following={first.shape[0]}"] if isinstance(first, Tensor) else []
        return ", ".join((*parts, str(self.dtype)[6:]))


#: The constants of a tail in the order of the op's schema, the residual left out.
_TAIL_CONSTANTS = (
    "weight2", "scale2", "shift2", "weight3", "scale3", "shift3",
    "weight_shortcut", "scale_shortcut", "shift_shortcut", "weight1", "scale1", "shift1",
)  # fmt: skip


def lower(gm: fx.GraphModule, dtype: torch.dtype, backend: str) -> fx.GraphModule:
    """``gm`` with its fused nodes as calls of modules that compute in ``dtype``, and nothing its graph does not use."""
    made = {node: module for node in gm.graph.nodes if (module := _module(gm, node, dtype, backend)) is not None}
    names = _names(gm, made)
    for node in made:
        inputs = [node.args[0]]
        if ir.is_call(node, ir.CONV_BN_ACT) and node.args[4] is not None:
            inputs.append(node.args[4])
        if ir.is_call(node, ir.BOTTLENECK_TAIL):
            inputs.append(node.args[7])
        with gm.graph.inserting_before(node):
            new = gm.graph.create_node("call_module", names[node], tuple(inputs))
        new.meta = dict(node.meta)
        if isinstance(made[node], FusedBottleneckTail) and made[node].weight1 is None:
            # The op always gives two tensors, the module only what there is.
            for output in list(node.users):
                new.meta["value"] = output.meta.get("value")
                output.replace_all_uses_with(new)
                gm.graph.erase_node(output)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    for node in gm.graph.nodes:
        if ir.is_call(node, ir.ADD_ACT) and backend in ADD_ACTS:
            # The op itself follows the choice for the whole process; one made for this graph alone is kept here.
            node.target = ADD_ACTS[backend]
    for node in list(gm.graph.nodes):
        if node.op == "get_attr" and not node.users:
            gm.graph.erase_node(node)
    return rebuilt(gm, {names[node]: module for node, module in made.items()})


def _module(gm: fx.GraphModule, node: fx.Node, dtype: torch.dtype, backend: str) -> Fused | None:
    """The module for a fused node, None for any other node."""
    if ir.is_call(node, ir.CONV_BN_ACT):
        conv = ir.Conv.of(node)
        tensors = _constants(gm, dtype, weight=conv.weight, scale=conv.scale, shift=conv.shift)
        return FusedConvBNAct(tensors, dtype, backend, conv, _may_overwrite(gm, node))
    if ir.is_call(node, ir.STEM):
        _, weight, scale, shift, _, _, ceil_mode = node.args
        tensors = _constants(gm, dtype, weight=weight, scale=scale, shift=shift)
        return FusedStem(tensors, dtype, backend, cast(bool, ceil_mode))
    if ir.is_call(node, ir.BOTTLENECK_TAIL):
        nodes = (*node.args[1:7], *node.args[8:14])
        tensors = _constants(gm, dtype, **dict(zip(_TAIL_CONSTANTS, nodes, strict=True)))
        stride, shortcut_stride = cast(Any, node.args[14:])
        return FusedBottleneckTail(tensors, dtype, backend, stride, shortcut_stride)
    if ir.is_call(node, ir.HEAD):
        _, weight, bias = node.args
        size = node.meta.get("image_size")
        return FusedHead(_constants(gm, dtype, weight=weight, bias=bias), dtype, backend, size)
    return None


def _names(gm: fx.GraphModule, made: dict[fx.Node, Fused]) -> dict[fx.Node, str]:
    """A name for each module: its first layer's, with a number where that is taken."""
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


def add_act_reference(x: Tensor, y: Tensor, activation: str) -> Tensor:
    """``add_act`` in plain torch, whatever backend was chosen for the process."""
    return add_act.reference(x, y, activation)


def _add_act_by(backend: str, x: Tensor, y: Tensor, activation: str) -> Tensor:
    if torch.compiler.is_compiling():
        return cast(Tensor, ir.ADD_ACT(x, y, activation))
    x, y = x.resolve_neg(), y.resolve_neg()
    z = add_act.run_kernel(kernels_for(add_act.NAME, x, asked=backend), x, y, activation)
    return cast(Tensor, add_act.reference(x, y, activation) if z is None else z)


def add_act_triton(x: Tensor, y: Tensor, activation: str) -> Tensor:
    """``add_act`` by its Triton kernel where that can run, whatever backend was chosen for the process."""
    return _add_act_by("triton", x, y, activation)


def add_act_cuda(x: Tensor, y: Tensor, activation: str) -> Tensor:
    """``add_act`` by its CUDA kernel where that can run, whatever backend was chosen for the process."""
    return _add_act_by("cuda", x, y, activation)


#: ``add_act`` by the backend asked for.
ADD_ACTS = {"reference": add_act_reference, "triton": add_act_triton, "cuda": add_act_cuda}


def _constants(gm: fx.GraphModule, dtype: torch.dtype, **nodes: Any) -> dict[str, Tensor | None]:
    """The tensors behind ``get_attr`` nodes; float64 is kept only where it is computed in."""
    tensors = {name: ir.tensor_of(gm, node) for name, node in nodes.items()}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype is torch.float64 and dtype is not torch.float64:
            tensors[name] = tensor.float()
    return tensors


def _may_overwrite(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the residual of this conv_bn_act is memory that this graph allocated and nobody reads after this node.

    Views count as readers of the memory they show, the graph's output as the last reader of all.
    """
    conv = ir.Conv.of(node)
    residual = conv.residual
    if residual is None or not (
        ir.is_call(residual, ir.CONV_BN_ACT) or ir.is_call(residual, ir.STEM) or ir.is_call(residual, ir.ADD_ACT)
    ):
        return False
    order = ir.positions(gm.graph)
    shown = memory.views_of(gm, residual)
    if conv.x in shown:
        return False
    readers = {user for view in shown for user in view.users if user is not node}
    return all(order[reader] < order[node] for reader in readers)
