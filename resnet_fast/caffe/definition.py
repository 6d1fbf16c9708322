"""A Caffe network as data: inputs, layers, their parameters, and every blob's shape.

No file format and no tensor here. What the layers' types have and do is declared in `kinds`, which this module offers
as its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .errors import CaffeError
from .kinds import *  # noqa: F403 - every declaration, under the names that it has there
from .parameters import *  # noqa: F403
from .parameters import KINDS, MAX_ELEMENTS, Illegal, Parameters, Shape, times

SUPPORTED = tuple(KINDS)


@dataclass(frozen=True)
class Transform:
    """What a data layer of Caffe does to pixels: ``(x - mean) * scale``; here the caller does it, before the network.

    ``mean_value`` has one value, or one for each channel; ``mean_file`` is the path of a mean image, which is not read.
    """

    scale: float = 1.0
    mean_value: tuple[float, ...] = ()
    mean_file: str = ""


@dataclass(frozen=True)
class Input:
    """A blob that the caller gives; its shape's first number, the batch, is an example.

    ``transform`` is what the data layer in its place says of the images; it does not count in comparisons.
    """

    name: str
    shape: Shape
    transform: Transform | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Layer:
    """One layer. ``line`` is where its definition begins, 0 if unknown; it does not count in comparisons."""

    name: str
    parameters: Parameters
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    line: int = field(default=0, compare=False)

    @property
    def type(self) -> str:
        """Caffe's name of the layer's type, such as ``Convolution``."""
        return type(self.parameters).__name__

    def __str__(self) -> str:
        return describe(self.name, self.type, self.line)


@dataclass(frozen=True)
class Definition:
    """A network: what a prototxt says, without the layers that the phase excludes.

    Attributes:
        source: where it is from, for errors; does not count in comparisons.
        left_out: names of further layers of the prototxt, which were not asked for; does not count either.
    """

    name: str
    inputs: tuple[Input, ...]
    layers: tuple[Layer, ...]
    source: str = field(default="", compare=False)
    left_out: tuple[str, ...] = field(default=(), compare=False)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The blobs that no layer reads after they were written last, in the order of writing."""
        unread: dict[str, None] = {entry.name: None for entry in self.inputs}
        for layer in self.layers:
            for name in (*layer.bottoms, *layer.tops):
                unread.pop(name, None)
            unread.update(dict.fromkeys(layer.tops))
        return tuple(unread)


def describe(name: str, kind: str, line: int) -> str:
    """Return how errors name a layer."""
    name, kind = (text if len(text) <= 80 else f"{text[:77]}..." for text in (name, kind))
    details = ", ".join(part for part in (kind, f"line {line}" if line else "") if part)
    return f"layer {name!r} ({details})" if details else f"layer {name!r}"


def check(definition: Definition) -> None:
    """Refuse wiring that has no meaning, or more than one.

    Some wiring that Caffe refuses is taken, since it means one thing here: a layer in place on a blob that another has
    read before, which keeps the old value.

    Raises:
        CaffeError: no input, no layer, a name twice, a bottom that nothing makes, a cycle, a top made twice.
    """

    def fail(message: str) -> None:
        raise CaffeError(f"{definition.source or 'definition'}: {message}")

    if not definition.layers:
        fail("no layers; a prototxt has `layer { ... }` entries")
    if not definition.inputs:
        fail("no input; give `input:` with `input_shape`, or a layer of type Input")
    makers: dict[str, str] = {}
    for entry in definition.inputs:
        if entry.name in makers:
            fail(f"input {entry.name!r} is declared twice")
        makers[entry.name] = "the network's input"
    later = {top: layer for layer in reversed(definition.layers) for top in layer.tops}
    names: dict[str, Layer] = {}
    for layer in definition.layers:
        if not layer.name:
            fail(f"{layer} has no name")
        if layer.name in names:
            fail(f"{layer} has the name of {names[layer.name]}; names must be unique, weights are stored by name")
        names[layer.name] = layer
        for what, names_of, (least, most) in (
            ("bottom", layer.bottoms, layer.parameters.bottoms),
            ("top", layer.tops, layer.parameters.tops),
        ):
            if not least <= len(names_of) <= most:
                wanted = str(least) if least == most else f"{least} or {'more' if most > least + 1 else most}"
                fail(f"{layer}: has {len(names_of)} {what}s, {layer.type} {_VERBS[what]} {wanted}")
        if len(set(layer.tops)) != len(layer.tops):
            fail(f"{layer}: makes the same top twice: {', '.join(layer.tops[:5])}")
        bottoms = set(layer.bottoms)
        for bottom in layer.bottoms:
            if bottom in makers:
                continue
            maker = later.get(bottom)
            if maker is None:
                fail(f"{layer}: no layer or input makes its bottom {bottom!r}")
            fail(
                f"{layer}: its bottom {bottom!r} is made by {'itself' if maker is layer else f'{maker}, later on'}; "
                "the layers form a cycle or are in the wrong order"
            )
        for top in layer.tops:
            if top in makers and top not in bottoms:
                fail(f"{layer}: its top {top!r} is made by {makers[top]} already, and it is not in place")
            makers[top] = str(layer)


_VERBS = {"bottom": "takes", "top": "makes"}


# -------------------------------------------------------------------------------------------------------------- shapes


def walk(
    definition: Definition, inputs: Mapping[str, Shape] | None = None
) -> Iterator[tuple[Layer, list[Shape], tuple[Shape, ...]]]:
    """Every layer with the shapes of its bottoms and tops, for inputs of these shapes (None: the declared ones).

    Raises:
        CaffeError: at a layer that cannot take its bottoms, and why; with the declared inputs also for a blob of more
            elements than Caffe can count.
    """
    blobs: dict[str, Shape] = {entry.name: entry.shape for entry in definition.inputs} if inputs is None else {**inputs}
    for layer in definition.layers:
        bottoms = [blobs[name] for name in layer.bottoms]
        try:
            tops = layer.parameters.shapes(bottoms, len(layer.tops))
            if inputs is None and any(math.prod(shape) > MAX_ELEMENTS for shape in (*tops, *bottoms)):
                raise Illegal(f"its blobs {', '.join(map(times, (*bottoms, *tops)))}: more than {MAX_ELEMENTS:,} "
                               "elements")  # fmt: skip
        except Illegal as error:
            raise CaffeError(f"{definition.source or 'definition'}: {layer}: {error}") from None
        blobs.update(zip(layer.tops, tops, strict=True))
        yield layer, bottoms, tops
