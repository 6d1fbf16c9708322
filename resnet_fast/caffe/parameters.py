"""What the parameters of every kind of Caffe layer share: a message read and written, checks, axes."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias

from torch import nn

from . import layers

Shape: TypeAlias = tuple[int, ...]

MAX_AXES = 32
"""Most axes of a blob (Caffe's kMaxBlobAxes)."""

MAX_ELEMENTS = 2**31 - 1
"""Most elements of a blob (Caffe counts them in an int)."""

MANY = MAX_ELEMENTS


class Illegal(Exception):
    """Bottoms that a layer cannot take."""


def times(shape: Iterable[Any]) -> str:
    """Return a shape as errors show it: ``1x3x224x224``."""
    return "x".join(map(str, shape)) or "of no axes"


def axis_of(axis: int, shape: Shape) -> int:
    """``axis`` counted from the front."""
    if not -len(shape) <= axis < len(shape):
        raise Illegal(f"its axis {axis} is none of the {len(shape)} of its bottom {times(shape)}")
    return axis % len(shape)


@dataclass(frozen=True)
class Message:
    """Where a layer's parameters stand in a file: a field of LayerParameter, and the message that it holds.

    Attributes:
        field: its name, such as ``pooling_param``.
        name: the message's name.
        number: the field's number in LayerParameter.
        v1: its number in V1LayerParameter, None if that has no such field.
        fields: of the message, as `schema` writes them.
    """

    field: str
    name: str
    number: int
    v1: int | None
    fields: str


KINDS: dict[str, type[Parameters]] = {}
"""The declarations by Caffe's name of the type."""


@dataclass(frozen=True)
class Parameters:
    """What one layer computes: base of the declarations.

    Fields of a subclass are those of its ``message`` with the same names, or another one under the key ``field`` of
    their metadata. Floating point values are rounded to float32, as in the files, and must be finite.
    """

    message: ClassVar[Message | None] = None
    bottoms: ClassVar[tuple[int, int]] = (1, 1)  # at least and at most
    tops: ClassVar[tuple[int, int]] = (1, 1)

    def __init_subclass__(cls) -> None:
        if not cls.__name__.startswith("_"):
            KINDS[cls.__name__] = cls

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value, name = getattr(self, entry.name), entry.metadata.get("field", entry.name)
            values = value if isinstance(value, tuple) else (value,)
            if any(isinstance(one, float) for one in values):
                finite(name, *values)
                rounded = tuple(to_float32(one) if isinstance(one, float) else one for one in values)
                object.__setattr__(self, entry.name, rounded if isinstance(value, tuple) else rounded[0])
        self.check()

    def check(self) -> None:
        """Raise ValueError for values that no layer of this type can have."""

    @classmethod
    def read(cls, layer: Any) -> Self:
        """Return the parameters in a LayerParameter or V1LayerParameter message; raises ValueError for wrong ones."""
        if cls.message is None or cls.message.field not in layer.DESCRIPTOR.fields_by_name:
            return cls()
        message = getattr(layer, cls.message.field)
        values: dict[str, Any] = {}
        for entry in dataclasses.fields(cls):
            name = entry.metadata.get("field", entry.name)
            descriptor, value = message.DESCRIPTOR.fields_by_name[name], getattr(message, name)
            if descriptor.enum_type is not None:
                value = descriptor.enum_type.values_by_number[value].name
            values[entry.name] = value if isinstance(value, bool | int | float | str) else tuple(value)
        return cls(**values)

    def write(self, layer: Any) -> None:
        """Set what differs from the defaults in a LayerParameter message."""
        if self.message is None:
            return
        message = getattr(layer, self.message.field)
        for entry in dataclasses.fields(self):
            value, name = getattr(self, entry.name), entry.metadata.get("field", entry.name)
            descriptor = message.DESCRIPTOR.fields_by_name[name]
            if descriptor.enum_type is not None:
                value = descriptor.enum_type.values_by_name[value].number
            if isinstance(value, tuple):
                getattr(message, name).extend(value)
            elif value is not None and (entry.default is None or getattr(message, name) != value):
                setattr(message, name, value)

    def shape(self, bottoms: Sequence[Shape]) -> Shape:
        """Return the shape of the top; raises Illegal for bottoms that the layer cannot take."""
        return bottoms[0]

    def shapes(self, bottoms: Sequence[Shape], tops: int) -> tuple[Shape, ...]:
        """Return the shapes of the tops."""
        return (self.shape(bottoms),) * tops

    def blobs(self, bottoms: Sequence[Shape]) -> dict[str, Shape]:
        """The shapes of the layer's own blobs by attribute of the module, in the order in which Caffe stores them."""
        return {}

    def module(self, bottoms: Sequence[Shape], tops: int) -> nn.Module | None:
        """Return what computes the layer for bottoms of these shapes, any batch; None for the bottom itself.

        A kind without a method of its own has the module of its name in `layers`, which is made from the parameters.
        """
        made: nn.Module = getattr(layers, type(self).__name__)(self)
        return made


def to_float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def finite(name: str, *values: float) -> None:
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name} is {', '.join(f'{value:g}' for value in values)}; finite numbers are needed")


def at_least(name: str, least: int, *values: int) -> None:
    if min(values, default=least) < least:
        raise ValueError(f"{name} is {min(values)}, at least {least} is needed")
    if max(values, default=least) > MAX_ELEMENTS:
        raise ValueError(f"{name} is {max(values)}, at most {MAX_ELEMENTS} is possible")


def four_axes(shape: Shape) -> Shape:
    """Return the shape of an image; raise Illegal for another."""
    if len(shape) != 4:
        raise Illegal(f"its bottom is {times(shape)}, [N, C, H, W] was expected")
    return shape


def two_axes(shape: Shape) -> Shape:
    """Return the shape of a blob with channels; raise Illegal for another."""
    if len(shape) < 2:
        raise Illegal(f"its bottom is {times(shape)}, at least [N, C] was expected")
    return shape


def axis_or_alias(message: Any, alias: str) -> int:
    """``axis``, or the older field that means the same and takes no negative number."""
    value = getattr(message, alias)
    if message.HasField("axis") and message.HasField(alias):
        raise ValueError(f"has both axis and {alias}; Caffe takes one")
    if value >= MAX_AXES:
        raise ValueError(f"{alias} is {value}; a blob has at most {MAX_AXES} axes")
    return int(value if message.HasField(alias) else message.axis)
