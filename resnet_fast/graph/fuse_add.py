"""Residual additions: into the convolution that feeds them, else with their ReLU into ``add_act``.

Additions that broadcast, or whose shapes are unknown, stay; so does one that a remaining in-place write could overtake.
"""

from __future__ import annotations

from torch import fx

from . import ir, memory


def fuse_add(gm: fx.GraphModule) -> None:
    """Fuse every addition of two values of one shape (``meta["same_shape"]``, see shapes.mark_equal_adds)."""
    depth = _depths(gm.graph)
    for node in list(gm.graph.nodes):
        if ir.is_call(node, ir.ADD):
            _fuse(gm, node, depth)


def _fuse(gm: fx.GraphModule, add: fx.Node, depth: dict[fx.Node, int]) -> None:
    if not add.meta.get("same_shape", False):
        known = all(ir.shape_of(operand) is not None for operand in add.args)
        return ir.reject(add, f"its operands' shapes {'differ (it broadcasts)' if known else 'are unknown'}")
    a, b = add.args
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    user = next(iter(add.users)) if len(add.users) == 1 else None
    relu = user if user is not None and ir.is_call(user, ir.RELU) else None
    # The deeper operand is the block's main path: the shortcut's value exists by then and can be overwritten.
    operands = sorted((a, b), key=lambda node: -depth.get(node, 0)) if a is not b else []
    movable = [node for node in operands if not _written_between(gm, node, add)]
    plain = [node for node in movable if ir.plain_conv(node)]
    activated = [node for node in movable if ir.plain_conv(node, "relu")]
    chain = [add]
    if plain or (activated and relu is None):
        source = plain[0] if plain else activated[0]
        late = not plain
        if relu is not None:
            chain.append(relu)
        arguments = ir.arguments_of(source)._replace(
            residual=b if source is a else a,
            activation="relu" if late or relu is not None else "none",
            residual_after_activation=late,
        )
        with gm.graph.inserting_before(add):
            new = ir.call(gm, ir.CONV_BN_ACT, tuple(arguments))
        # The convolution itself stays in front of the addition until that is gone: it is the addition's operand.
        new.meta["layers"] = []
        layers = [layer for node in (source, *chain) for layer in ir.layers_of(node)]
        ir.replace(chain, new)
        gm.graph.erase_node(source)
        new.meta["layers"] = layers
    elif relu is not None:
        with gm.graph.inserting_before(add):
            new = ir.call(gm, ir.ADD_ACT, (a, b, "relu"))
        ir.replace([add, relu], new)
    else:
        return ir.reject(add, "no convolution feeds it alone and no ReLU follows it alone")
    depth[new] = max(depth.get(a, 0), depth.get(b, 0)) + 1
    return None


def _depths(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return the length of the longest path from an input to each node."""
    depth: dict[fx.Node, int] = {}
    for node in graph.nodes:
        depth[node] = 1 + max((depth[source] for source in node.all_input_nodes), default=-1)
    return depth


def _written_between(gm: fx.GraphModule, first: fx.Node, last: fx.Node) -> bool:
    """Return whether a node from ``first`` to ``last`` writes in place: ``first`` may then not be computed later."""
    current = first.next
    while current is not last and current.op != "root":
        if memory.written(gm, current):
            return True
        current = current.next
    return False
