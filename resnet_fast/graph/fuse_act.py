"""``conv_bn_act`` followed by ReLU: the ReLU moves into the convolution. Nothing else has to be true."""

from __future__ import annotations

from torch import fx

from . import ir


def fuse_act(gm: fx.GraphModule) -> None:
    """Move every ReLU that alone reads a conv_bn_act without activation into it."""
    for node in list(gm.graph.nodes):
        if not ir.is_call(node, ir.RELU):
            continue
        source = node.args[0]
        if not ir.plain_conv(source):
            ir.reject(node, _why_not(source))
            continue
        conv = ir.arguments_of(source)._replace(activation="relu")
        with gm.graph.inserting_before(source):
            new = ir.call(gm, ir.CONV_BN_ACT, tuple(conv))
        ir.replace([source, node], new)


def _why_not(source: object) -> str:
    if not isinstance(source, fx.Node) or not ir.layers_of(source):
        return "it follows no convolution or addition"
    if ir.is_call(source, ir.CONV_BN_ACT) and len(source.users) > 1:
        return f"the output of {ir.name_of(source)} is used elsewhere too"
    return f"it follows {ir.layers_of(source)[-1].name}, which cannot take it along"
