"""cuDNN's graph API as a contestant: every convolution with its scale, shift, residual and ReLU as one fused graph.

The layers are fused by this package's own passes, then run by cuDNN; max-pooling and the head stay torch's. The module
``cudnn`` comes from the package nvidia-cudnn-frontend. Nothing of it is used if that is missing.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.benchmarking.peers import Contestant
from resnet_fast.graph.plan import Fused


def build(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Contestant:
    """``model`` (float32, eval mode, on the CPU) on cuDNN graphs in ``dtype``.

    Raises:
        NotImplementedError: it has a layer that this contestant does not know: groups, or a residual behind the ReLU.
    """
    from resnet_fast.graph import optimize

    cudnn = importlib.import_module("cudnn")
    # Planned on a CPU and for the reference: one op for each convolution, nothing that belongs to a backend of ours.
    planned = optimize(copy.deepcopy(model).eval(), dtype=dtype, backend="reference").graph_module
    handle = cudnn.create_handle()
    for name, layer in list(planned.named_modules()):
        if not isinstance(layer, Fused):
            continue
        if layer.op in ("conv_bn_act", "stem"):
            replaced: nn.Module = FusedConv(cudnn, handle, layer, dtype, device)
        elif layer.op == "head":
            replaced = _Head(layer, dtype, device)
        else:
            raise NotImplementedError(f"cudnn: {name} is a {layer.op}")
        planned.set_submodule(name, replaced)
    planned.to(device)
    return Contestant(prepare=lambda batch: batch, run=planned, result=lambda output: output)


@dataclass(frozen=True)
class _Plan:
    """A cuDNN graph for one input shape: its tensors by role, what it needs to run, and its output's shape."""

    graph: Any
    tensors: dict[str, Any]
    workspace: Tensor
    shape: tuple[int, ...]


class FusedConv(nn.Module):
    """One ``conv_bn_act``, or the convolution of a ``stem`` with torch's max-pool behind it."""

    def __init__(self, cudnn: Any, handle: Any, layer: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._cudnn, self._handle, self._plans = cudnn, handle, {}  # type: ignore[var-annotated]
        self._stem = layer.op == "stem"
        self._stride, self._padding, self._dilation, self._relu = [2, 2], [3, 3], [1, 1], True
        a = layer.arguments()
        if not self._stem:
            self._stride, self._padding, self._dilation = (list(pair) for pair in (a.stride, a.padding, a.dilation))
            self._relu = a.activation == "relu"
            if a.groups != 1 or a.residual_after_activation:
                late = a.residual_after_activation
                raise NotImplementedError(f"cudnn: {a.groups} groups, residual behind the ReLU: {late}")
        elif a.ceil_mode:
            raise NotImplementedError("cudnn: a stem with Caffe's pooling")
        self._weight = a.weight.to(device, dtype).contiguous(memory_format=torch.channels_last)
        self._vectors = {
            name: value.to(device, torch.float32).view(1, -1, 1, 1)
            for name, value in (("scale", a.scale), ("shift", a.shift))
        }

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        given = {"x": x, "weight": self._weight, **self._vectors}
        if residual is not None:
            given["residual"] = residual.contiguous(memory_format=torch.channels_last)
        key = tuple(x.shape)
        if key not in self._plans:
            self._plans[key] = self._plan(given)
        plan = self._plans[key]
        y = torch.empty(plan.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        if x.is_cuda:
            self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
        given["y"] = y
        plan.graph.execute(
            {plan.tensors[name]: tensor for name, tensor in given.items()}, plan.workspace, handle=self._handle
        )
        return F.max_pool2d(y, 3, 2, 1) if self._stem else y

    def _plan(self, given: dict[str, Tensor]) -> _Plan:
        cudnn, kinds = self._cudnn, self._cudnn.data_type
        kind = {torch.float16: kinds.HALF, torch.bfloat16: kinds.BFLOAT16, torch.float32: kinds.FLOAT}
        graph = cudnn.pygraph(
            io_data_type=kind[given["x"].dtype],
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
            handle=self._handle,
        )
        tensors = {
            name: graph.tensor(
                name=name, dim=list(value.shape), stride=_strides(value), data_type=kind[value.dtype]
            )
            for name, value in given.items()
        }  # fmt: skip
        y = graph.conv_fprop(
            image=tensors["x"], weight=tensors["weight"], padding=self._padding, stride=self._stride,
            dilation=self._dilation,
        )  # fmt: skip
        y = graph.mul(a=y, b=tensors["scale"])
        y = graph.add(a=y, b=tensors["shift"])
        if "residual" in tensors:
            y = graph.add(a=y, b=tensors["residual"])
        if self._relu:
            y = graph.relu(input=y)
        y.set_output(True).set_data_type(kind[given["x"].dtype])
        tensors["y"] = y
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=given["x"].device)
        return _Plan(graph, tensors, workspace, tuple(y.get_dim()))


def _strides(tensor: Tensor) -> list[int]:
    """Return a dense channels_last tensor's strides, those of dimensions of one element too."""
    _, c, h, w = tensor.shape
    return [c * h * w, 1, w * c, c]


class _Head(nn.Module):
    def __init__(self, layer: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        a = layer.arguments()
        self._weight = a.weight.to(device, dtype)
        self._bias = None if a.bias is None else a.bias.to(device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self._weight, self._bias)
