"""Global average pool, flatten and fully connected layer at the network's end become ``head``."""

from __future__ import annotations

from typing import Any

from torch import fx

from . import ir


def fuse_head(gm: fx.GraphModule) -> None:
    """Fuse every linear layer that alone reads the flattened global average of a batch of images."""
    for node in list(gm.graph.nodes):
        if not ir.is_call(node, ir.LINEAR):
            continue
        chain = _chain(gm, node)
        if isinstance(chain, str):
            ir.reject(node, chain)
            continue
        _, weight, bias = node.args
        pool = chain[0]
        with gm.graph.inserting_before(chain[0]):
            weight, bias = (ir.earlier(gm, constant) for constant in (weight, bias))
            new = ir.call(gm, ir.HEAD, (chain[0].args[0], weight, bias))
        if ir.is_call(pool, ir.AVG_POOL):
            new.meta["image_size"] = pool.args[1]
        ir.replace(chain, new)
    for node in gm.graph.nodes:
        if any(ir.is_call(node, pool) for pool in (ir.AVG_POOL, ir.ADAPTIVE_AVG_POOL, ir.MEAN)):
            ir.reject(node, "no linear layer alone reads the average over the whole image")
        elif ir.is_call(node, ir.FLATTEN):
            ir.reject(node, "it moves no data")


def _only_window(pool: fx.Node) -> bool:
    """Return whether this average pool without padding moves its window by single pixels."""
    return ir.is_call(pool, ir.AVG_POOL) and pool.args[2:4] == ((1, 1), (0, 0))


def _one_pixel(pool: fx.Node, weight: Any) -> bool:
    """Whether a linear layer reads one number per channel of ``pool``, so that its window must be the whole image.

    Images of another size are an error then, which the fused module raises too.
    """
    shape, matrix = ir.shape_of(pool.args[0]), ir.shape_of(weight)
    return shape is not None and matrix is not None and shape[1] == matrix[1] and shape[2:] == pool.args[1]


def _chain(gm: fx.GraphModule, linear: fx.Node) -> list[fx.Node] | str:
    """Return the nodes pool, flatten, linear (or mean, linear), else why they are not there."""
    source, weight, bias = linear.args
    if not ir.is_held(gm, weight) or (bias is not None and not ir.is_held(gm, bias)):
        return "its weight or bias is computed in the graph"
    nothing = "no global average pool feeds it alone"
    chain = [linear]
    if ir.is_call(source, ir.FLATTEN):
        chain.insert(0, source)  # type: ignore[arg-type]
        source = chain[0].args[0]
    if not isinstance(source, fx.Node) or any(len(node.users) != 1 for node in (source, *chain[:-1])):
        return nothing
    whole_image = (
        (ir.is_call(source, ir.ADAPTIVE_AVG_POOL) and source.args[1] == (1, 1) and len(chain) == 2)
        or (ir.is_call(source, ir.MEAN) and source.args[2] == (len(chain) == 2))
        or (_only_window(source) and len(chain) == 2 and _one_pixel(source, weight))
    )  # fmt: skip
    shape = ir.shape_of(source.args[0]) if whole_image else None
    if not whole_image or (shape is not None and len(shape) != 4):
        return nothing
    return [source, *chain]
