"""Which launches the networks need: every fused op of every layer, read off the graphs that ``optimize`` makes.

No table of shapes is written down anywhere, so a change in a model or in a pass changes what is compiled and measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from . import ops
from .ops import Block, Case, Layer

if TYPE_CHECKING:
    from resnet_fast.kernels.gpus import GPU

#: The networks whose launches are checked; the wider and deeper ones have no form of launch that these lack.
MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")
BATCHES = (1, 8, 32, 128, 256)

#: The ops that only training runs.
TRAINING = ("batch_norm_act", "conv_statistics")


def problems(
    models: Sequence[str],
    batches: Iterable[int],
    precisions: Iterable[str],
    image_size: int = 224,
    gpu: GPU | None = None,
    training: bool = False,
) -> tuple[Case, ...]:
    """Every case of these networks, each once, in the order of models, batches, precisions and layers.

    Args:
        models: names from ``resnet_fast.models``. precisions: of ``kernels.gpus.PRECISIONS``.
        image_size: height and width of the images.
        gpu: blocks fused for this GPU are among the cases; None: one kernel per layer alone.
        training: whether what only training runs, ``TRAINING``, is among the cases.

    Raises:
        ValueError: an unknown model, or one that does not take such images.
    """
    batches, precisions = tuple(batches), tuple(precisions)
    without = {*(() if gpu is not None else ("bottleneck_tail",)), *(() if training else TRAINING)}
    chosen = [name for name in ops.names() if name not in without]
    found: dict[Case, None] = {}
    for model in models:
        layers = _layers(model, image_size)
        for batch in batches:
            for precision in precisions:
                for layer in layers:
                    for op in map(ops.get, chosen):
                        for case in op.cases(op.kernel, layer, batch, precision):
                            if gpu is None or ops.supported(case, gpu):
                                found[case] = None
    return tuple(found)


@cache
def _layers(model: str, image_size: int) -> tuple[Layer | Block, ...]:
    """Every fused module of the network's graph, then every block that one kernel might compute."""
    from resnet_fast import models as networks
    from resnet_fast.graph import optimize, shapes

    with torch.device("meta"):
        network = networks.get_model(model).eval()
        image = torch.empty(1, 3, image_size, image_size)
    graph = optimize(network, example_inputs=image, backend="reference").graph_module
    values = shapes.run(graph, (image,)).values
    found = []
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        op = getattr(module, "op", None)
        if op is not None:
            sources = node.all_input_nodes
            inputs = tuple(tuple(values[source].shape) for source in sources)
            names = tuple(source.name for source in sources)
            found.append(Layer(op, node.name, names, module, inputs, tuple(values[node].shape)))
    return (*found, *_blocks(found))


def _blocks(layers: Sequence[Layer]) -> Iterator[Block]:
    """Bottlenecks: a 3x3 read by nothing but a 1x1 with a residual."""
    made = {layer.name: layer for layer in layers}
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        for source in layer.sources:
            readers.setdefault(source, []).append(layer)
    for expand in layers:
        if not _pointwise(expand, "relu") or len(expand.sources) != 2 or expand.module.late:
            continue
        spatial, project = made.get(expand.sources[0]), made.get(expand.sources[1])
        if spatial is None or not _spatial(spatial) or readers[spatial.name] != [expand]:
            continue
        if project is None or readers[project.name] != [expand] or not _pointwise(project, "none"):
            project = None
        behind = [layer for layer in readers.get(expand.name, []) if layer.sources == (expand.name,)]
        following = [layer for layer in behind if _pointwise(layer, "relu") and tuple(layer.module.stride) == (1, 1)]
        yield Block(spatial, expand, project, following[0] if following else None)


def _pointwise(layer: Layer, activation: str) -> bool:
    if layer.op != "conv_bn_act" or layer.module.activation != activation or layer.module.groups != 1:
        return False
    return tuple(layer.module.weight.shape[2:]) == (1, 1) and not any(layer.module.padding)


def _spatial(layer: Layer) -> bool:
    """A 3x3 that keeps the number of channels and the size, but for its stride."""
    if layer.op != "conv_bn_act" or len(layer.sources) != 1 or layer.module.groups != 1:
        return False
    module = layer.module
    window = tuple(module.weight.shape[2:]), tuple(module.padding), tuple(module.dilation)
    same = layer.inputs[0][1] == layer.output[1] and module.activation == "relu"
    return window == ((3, 3), (1, 1), (1, 1)) and same
