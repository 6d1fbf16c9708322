"""Which launches the networks need: every fused op of every layer, read off the graphs that ``optimize`` makes.

No table of shapes is written down anywhere, so a change in a model or in a pass changes what is compiled and measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from resnet_fast._dtypes import QUANTIZED
from resnet_fast.kernels.gpus import PRECISIONS

from . import ops
from .ops import Case

if TYPE_CHECKING:
    from resnet_fast.graph.inventory import Block, Layer
    from resnet_fast.kernels.gpus import GPU

#: The networks whose launches are checked: deeper ones have the same layers more often, wider ones more channels in the
#: same code.
MODELS = ("resnet18", "resnet50", "resnext50_32x4d")
BATCHES = (1, 32, 128, 256)

#: The ops that only training runs.
TRAINING = ("batch_norm_act", "conv_statistics")

#: How launches compute: as ``kernels.gpus.PRECISIONS``, and quantized convolutions, which have ops of their own.
TYPES = (*PRECISIONS, *QUANTIZED)


def problems(
    models: Sequence[str],
    batches: Iterable[int],
    precisions: Iterable[str],
    image_size: int = 224,
    gpu: GPU | None = None,
    training: bool = False,
) -> tuple[Case, ...]:
    """Return every case of these networks, each once, in the order of models, batches, precisions and layers.

    Args:
        models: names from ``resnet_fast.models``. precisions: of ``TYPES``.
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
        layers = fused_ops(model, image_size)
        for batch in batches:
            for precision in precisions:
                for layer in (layer.at(batch, precision) for layer in layers):
                    for op in map(ops.get, [f"conv_{precision}"] if precision in QUANTIZED else chosen):
                        for case in op.cases(layer):
                            if gpu is None or ops.supported(case, gpu):
                                found[case] = None
    return tuple(found)


def quantized(
    models: Sequence[str],
    batches: Iterable[int],
    image_size: int = 224,
    gpu: GPU | None = None,
    precision: str = "int8",
) -> tuple[Case, ...]:
    """Return every case of these networks as ``quantize`` makes them for a GPU, with float16 beside int8 or float8.

    Args:
        models, image_size: as for :func:`problems`. precision: "int8" or "fp8".
        gpu: on which a case must have a kernel; None: any.

    Raises:
        ValueError: as :func:`problems`.
    """
    from resnet_fast.graph import inventory, schedules

    batches = tuple(batches)
    found: dict[Case, None] = {}
    for model in models:
        fused = [layer for layer in fused_ops(model, image_size) if isinstance(layer, inventory.Layer)]
        for batch in batches:
            layers = [layer.at(batch, "fp16") for layer in fused]
            for layer, conv in zip(layers, schedules.quantized_problems(layers, precision), strict=True):
                if conv is not None:
                    cases: Iterable[Case] = (Case(conv.op, conv, layer.activation),)
                else:
                    cases = ops.get(layer.op).cases(layer)
                found |= dict.fromkeys(case for case in cases if gpu is None or ops.supported(case, gpu))
    return tuple(found)


@cache
def fused_ops(model: str, image_size: int) -> tuple[Layer | Block, ...]:
    """Return every fused op of the network's graph, then every block that one kernel might compute."""
    from resnet_fast import models as networks
    from resnet_fast.graph import inventory, optimize

    with torch.device("meta"):
        network = networks.get_model(model).eval()
        image = torch.empty(1, 3, image_size, image_size)
    graph = optimize(network, example_inputs=image, backend="reference").graph_module
    layers = inventory.layers(graph, (image,))
    return (*layers, *inventory.blocks(layers))
