"""JAX as a contestant: the plain layers of a network as one jitted function of ``jax.lax`` operations, NHWC.

It knows the layers that ResNets are made of and refuses any other. Nothing of it is used where jax is missing.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from resnet_fast.benchmarking.peers import Contestant


def build(layers: fx.GraphModule, dtype: torch.dtype) -> Contestant:
    """``layers`` (float32, eval mode) as a jitted function computing in ``dtype``.

    Convolutions and the linear layer multiply in ``dtype``; BatchNorm is scale and shift in float32, rounded once, as
    in torch. float32 multiplies as torch is set to: with tf32, or in full. Raises TypeError for an unknown layer.
    """
    jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")
    kind = {torch.float16: jnp.float16, torch.bfloat16: jnp.bfloat16, torch.float32: jnp.float32}[dtype]
    reduced = dtype is not torch.float32 or torch.backends.cudnn.allow_tf32
    precision = jax.lax.Precision.DEFAULT if reduced else jax.lax.Precision.HIGHEST
    steps = [(node, _step(layers, node, kind, precision)) for node in layers.graph.nodes]

    def network(image: Any) -> Any:
        values: dict[fx.Node, Any] = {}
        for node, step in steps:
            if node.op == "placeholder":
                values[node] = image
            elif node.op == "output":
                return values[node.args[0]]
            else:
                values[node] = step(*(values[value] for value in node.args if isinstance(value, fx.Node)))
        raise AssertionError("a graph without output")

    run = jax.jit(network)
    return Contestant(
        prepare=lambda batch: jax.device_put(
            jnp.asarray(batch.float().permute(0, 2, 3, 1).contiguous().cpu().numpy(), kind)
        ),
        run=run,
        result=lambda output: torch.from_numpy(_numpy(output)),
    )


def _numpy(output: Any) -> Any:
    import numpy as np

    return np.array(output.astype("float32"))


def _step(layers: fx.GraphModule, node: fx.Node, kind: Any, precision: Any) -> Callable[..., Any]:
    """Return what ``node`` does to its inputs."""
    jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")
    if node.op in ("placeholder", "output"):
        return lambda value: value
    if node.op == "call_module":
        layer = layers.get_submodule(str(node.target))
        if isinstance(layer, nn.Conv2d) and layer.bias is None:
            weight = jnp.asarray(_array(layer.weight.permute(2, 3, 1, 0)), kind)
            padding = [(int(pad), int(pad)) for pad in layer.padding]
            stride, dilation, groups = layer.stride, layer.dilation, layer.groups
            return lambda x: jax.lax.conv_general_dilated(
                x, weight, stride, padding, rhs_dilation=dilation, dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups, precision=precision,
            )  # fmt: skip
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            gain = layer.weight / torch.sqrt(layer.running_var + layer.eps)
            scale, shift = jnp.asarray(_array(gain)), jnp.asarray(_array(layer.bias - layer.running_mean * gain))
            return lambda x: (x.astype(jnp.float32) * scale + shift).astype(kind)
        if isinstance(layer, nn.ReLU):
            return lambda x: jnp.maximum(x, 0)
        if isinstance(layer, nn.MaxPool2d) and not layer.ceil_mode:
            sizes: Any = (layer.kernel_size, layer.stride, layer.padding)
            size, step, pad = map(int, sizes)
            border = [(0, 0), (pad, pad), (pad, pad), (0, 0)]
            return lambda x: jax.lax.reduce_window(
                x, kind(-jnp.inf), jax.lax.max, (1, size, size, 1), (1, step, step, 1), border
            )
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            return lambda x: jnp.mean(x, axis=(1, 2), dtype=jnp.float32, keepdims=True).astype(kind)
        if isinstance(layer, nn.Linear):
            matrix, bias = jnp.asarray(_array(layer.weight.t()), kind), jnp.asarray(_array(layer.bias), kind)
            return lambda x: jnp.dot(x, matrix, precision=precision) + bias
    if node.target in (torch.flatten,):
        return lambda x: x.reshape(x.shape[0], -1)
    if node.target in (operator.add, operator.iadd, torch.add):
        return lambda x, y: x + y
    if node.target in (F.relu, torch.relu):
        return lambda x: jnp.maximum(x, 0)
    raise TypeError(f"jax: {node.format_node()} is nothing that this contestant knows")


def _array(tensor: Tensor) -> Any:
    return tensor.detach().float().contiguous().cpu().numpy()
