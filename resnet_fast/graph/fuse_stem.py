"""Convolution 7x7/2, ReLU and max-pool 3x3/2 become ``stem``, so that the large tensor between them is never stored."""

from __future__ import annotations

from torch import fx

from . import ir

#: The pool's (kernel, stride, padding, dilation, ceil_mode), and the op's ceil_mode: PyTorch's and Caffe's.
_POOLS = {
    ((3, 3), (2, 2), (1, 1), (1, 1), False): False,
    ((3, 3), (2, 2), (0, 0), (1, 1), True): True,
}


def fuse_stem(gm: fx.GraphModule) -> None:
    """Fuse every such pair; a max-pool that does not fit is listed with the reason."""
    for node in list(gm.graph.nodes):
        if not ir.is_call(node, ir.MAX_POOL):
            continue
        source, *pool = node.args
        reason = _why_not(source, tuple(pool))
        if reason:
            ir.reject(node, reason)
            continue
        conv = ir.arguments_of(source)
        arguments = (conv.x, conv.weight, conv.scale, conv.shift, None, None, _POOLS[tuple(pool)])
        with gm.graph.inserting_before(source):
            new = ir.call(gm, ir.STEM, arguments)
        ir.replace([source, node], new)


def _why_not(source: object, pool: tuple[object, ...]) -> str:
    if pool not in _POOLS:
        return "no fused form of this window"
    if not isinstance(source, fx.Node) or not ir.is_call(source, ir.CONV_BN_ACT):
        return "it follows no convolution"
    if len(source.users) > 1:
        return f"the output of {ir.name_of(source)} is used elsewhere too"
    conv = ir.arguments_of(source)
    weight = conv.weight.meta.get("value")
    fits = (
        weight is not None
        and tuple(weight.shape[2:]) == (7, 7)
        and (conv.stride, conv.padding, conv.dilation, conv.groups) == ((2, 2), (3, 3), (1, 1), 1)
        and conv.activation == "relu"
        and conv.residual is None
    )
    return "" if fits else "the convolution before it is not 7x7 with stride 2, padding 3 and ReLU"
