"""A Caffe network as data: inputs, layers, parameters, which layers a phase includes, and every blob's shape.

No file format and no tensor here. Parameters and shapes follow the layers' documentation and code in BVLC/caffe.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .errors import CaffeError

Shape: TypeAlias = tuple[int, ...]

MAX_AXES = 32
"""Most axes of a blob (Caffe's kMaxBlobAxes)."""

MAX_ELEMENTS = 2**31 - 1
"""Most elements of a blob (Caffe counts them in an int)."""


class _SinglePrecision:
    """Floating point fields are float32 numbers, as in the files, whatever a caller wrote."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float):
                object.__setattr__(self, name, _float32(value))
            elif isinstance(value, tuple):
                object.__setattr__(self, name, tuple(_float32(v) if isinstance(v, float) else v for v in value))


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


@dataclass(frozen=True)
class Convolution:
    """2-D cross-correlation over [N, C, H, W]; weight [num_output, C / group, kernel...]."""

    num_output: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    group: int = 1
    bias_term: bool = True


@dataclass(frozen=True)
class BatchNorm(_SinglePrecision):
    """Normalisation of axis 1 without scale and shift; blobs mean, variance, factor.

    ``use_global_stats``: the stored statistics (True), those of the batch (False), or stored ones in the TEST phase and
    the batch's in the TRAIN phase (None).
    """

    use_global_stats: bool | None = None
    moving_average_fraction: float = 0.999
    eps: float = 1e-5


@dataclass(frozen=True)
class Scale:
    """Product with a parameter (or a second bottom) that covers ``num_axes`` axes (-1: all) from ``axis`` on."""

    axis: int = 1
    num_axes: int = 1
    bias_term: bool = False


@dataclass(frozen=True)
class ReLU(_SinglePrecision):
    """``max(x, 0) + negative_slope * min(x, 0)``."""

    negative_slope: float = 0.0


@dataclass(frozen=True)
class Eltwise(_SinglePrecision):
    """SUM (with one coefficient per bottom, or none at all), PROD or MAX of bottoms of one shape."""

    operation: str = "SUM"
    coeff: tuple[float, ...] = ()


@dataclass(frozen=True)
class Pooling:
    """MAX or AVE over windows; ``kernel`` None pools over the whole image."""

    method: str = "MAX"
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    round_mode: str = "CEIL"


@dataclass(frozen=True)
class InnerProduct:
    """A linear layer over everything from ``axis`` on; weight [num_output, K], or [K, num_output] if ``transpose``."""

    num_output: int
    bias_term: bool = True
    axis: int = 1
    transpose: bool = False


@dataclass(frozen=True)
class Softmax:
    """Softmax along ``axis``."""

    axis: int = 1


@dataclass(frozen=True)
class Dropout(_SinglePrecision):
    """In training each element is 0 with probability ``ratio``, the others are divided by 1 - ratio."""

    ratio: float = 0.5


@dataclass(frozen=True)
class Concat:
    """Bottoms one behind the other along ``axis``."""

    axis: int = 1


@dataclass(frozen=True)
class Split:
    """The bottom under several names."""


Parameters: TypeAlias = (
    Convolution | BatchNorm | Scale | ReLU | Eltwise | Pooling | InnerProduct | Softmax | Dropout | Concat | Split
)

SUPPORTED = tuple(kind.__name__ for kind in Parameters.__args__)


@dataclass(frozen=True)
class Input:
    """A blob that the caller gives; its shape's first number, the batch, is an example."""

    name: str
    shape: Shape


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
    """

    name: str
    inputs: tuple[Input, ...]
    layers: tuple[Layer, ...]
    source: str = field(default="", compare=False)

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
    """How errors name a layer."""
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
        least, most, tops = _COUNTS.get(layer.type, (1, 1, 1))
        if not least <= len(layer.bottoms) <= most:
            wanted = str(least) if least == most else f"{least} or more" if most > 2 else f"{least} or {most}"
            fail(f"{layer}: has {len(layer.bottoms)} bottoms, {layer.type} takes {wanted}")
        if len(layer.tops) != tops and not (layer.type == "Split" and layer.tops):
            fail(f"{layer}: has {len(layer.tops)} tops, {layer.type} makes {tops}")
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


_MANY = 2**31
#: Bottoms at least and at most, and tops, where they are not one each.
_COUNTS = {"Eltwise": (2, _MANY, 1), "Concat": (1, _MANY, 1), "Scale": (1, 2, 1)}


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
            tops = _tops(layer, bottoms)
            if inputs is None and any(math.prod(shape) > MAX_ELEMENTS for shape in (*tops, *bottoms)):
                raise _Illegal(f"its blobs {', '.join(map(times, (*bottoms, *tops)))}: more than {MAX_ELEMENTS:,} "
                               "elements")  # fmt: skip
        except _Illegal as error:
            raise CaffeError(f"{definition.source or 'definition'}: {layer}: {error}") from None
        blobs.update(zip(layer.tops, tops, strict=True))
        yield layer, bottoms, tops


def shapes(definition: Definition, inputs: Mapping[str, Shape] | None = None) -> dict[str, tuple[Shape, ...]]:
    """The shapes of each layer's tops by the layer's name; arguments and errors as for :func:`walk`."""
    return {layer.name: tops for layer, _, tops in walk(definition, inputs)}


def parameter_shapes(layer: Layer, bottoms: Sequence[Shape]) -> tuple[Shape, ...]:
    """The shapes of a layer's blobs in the order in which Caffe stores them."""
    parameters = layer.parameters
    if isinstance(parameters, Convolution):
        weight = (parameters.num_output, bottoms[0][1] // parameters.group, *parameters.kernel)
        return (weight, (parameters.num_output,)) if parameters.bias_term else (weight,)
    if isinstance(parameters, BatchNorm):
        return ((bottoms[0][1],), (bottoms[0][1],), (1,))
    if isinstance(parameters, Scale):
        covered = bottoms[1] if len(bottoms) > 1 else scale_shape(parameters, bottoms[0])
        scale = () if len(bottoms) > 1 else (covered,)
        return (*scale, covered) if parameters.bias_term else scale
    if isinstance(parameters, InnerProduct):
        inner = math.prod(bottoms[0][axis_of(parameters.axis, bottoms[0]) :])
        matrix = (inner, parameters.num_output) if parameters.transpose else (parameters.num_output, inner)
        return (matrix, (parameters.num_output,)) if parameters.bias_term else (matrix,)
    return ()


def scale_shape(parameters: Scale, x: Shape) -> Shape:
    """The axes of ``x`` that a Scale layer's own parameter covers."""
    axis = axis_of(parameters.axis, x)
    return x[axis:] if parameters.num_axes == -1 else x[axis : axis + parameters.num_axes]


def axis_of(axis: int, shape: Shape) -> int:
    """``axis`` counted from the front."""
    if not -len(shape) <= axis < len(shape):
        raise _Illegal(f"its axis {axis} is none of the {len(shape)} of its bottom {times(shape)}")
    return axis % len(shape)


def pooled_sizes(parameters: Pooling, height: int, width: int) -> tuple[int, int]:
    """How many windows fit, by Caffe's rule: one that begins beyond image and padding goes only if there is padding."""
    assert parameters.kernel is not None
    sizes = []
    for size, kernel, stride, pad in zip(
        (height, width), parameters.kernel, parameters.stride, parameters.padding, strict=True
    ):
        steps = size + 2 * pad - kernel
        windows = (-(-steps // stride) if parameters.round_mode == "CEIL" else steps // stride) + 1
        if any(parameters.padding) and (windows - 1) * stride >= size + pad:
            windows -= 1
        sizes.append(windows)
    return sizes[0], sizes[1]


class _Illegal(Exception):
    """A bottom that the layer cannot take."""


def times(shape: Iterable[Any]) -> str:
    """A shape as errors show it: ``1x3x224x224``."""
    return "x".join(map(str, shape)) or "of no axes"


def _tops(layer: Layer, bottoms: Sequence[Shape]) -> tuple[Shape, ...]:
    parameters, x = layer.parameters, bottoms[0]
    if isinstance(parameters, Convolution | Pooling) and len(x) != 4:
        raise _Illegal(f"its bottom is {times(x)}, [N, C, H, W] was expected")
    if isinstance(parameters, Convolution):
        return (_convolved(parameters, x),)
    if isinstance(parameters, Pooling):
        return (_pooled(parameters, x),)
    if isinstance(parameters, InnerProduct):
        return ((*x[: axis_of(parameters.axis, x)], parameters.num_output),)
    if isinstance(parameters, Concat):
        axis = axis_of(parameters.axis, x)
        for other in bottoms[1:]:
            if len(other) != len(x) or any(a != b for i, (a, b) in enumerate(zip(x, other, strict=True)) if i != axis):
                raise _Illegal(f"its bottoms {', '.join(map(times, bottoms))} differ elsewhere than along axis {axis}")
        return ((*x[:axis], sum(shape[axis] for shape in bottoms), *x[axis + 1 :]),)
    if isinstance(parameters, Eltwise):
        if any(shape != x for shape in bottoms):
            raise _Illegal(f"its bottoms {', '.join(map(times, bottoms))} are not of one shape")
        if parameters.coeff and len(parameters.coeff) != len(bottoms):
            raise _Illegal(f"it has {len(parameters.coeff)} coefficients for {len(bottoms)} bottoms")
    elif isinstance(parameters, Scale):
        _check_scale(parameters, bottoms)
    elif isinstance(parameters, Softmax):
        axis_of(parameters.axis, x)
    elif isinstance(parameters, BatchNorm) and len(x) < 2:
        raise _Illegal(f"its bottom is {times(x)}, at least [N, C] was expected")
    return (x,) * len(layer.tops)


def _check_scale(parameters: Scale, bottoms: Sequence[Shape]) -> None:
    x = bottoms[0]
    axis = axis_of(parameters.axis, x)
    if len(bottoms) == 1:
        if parameters.num_axes < -1 or axis + parameters.num_axes > len(x):
            raise _Illegal(f"it covers {parameters.num_axes} axes from axis {axis} on, its bottom is {times(x)}")
    elif x[axis : axis + len(bottoms[1])] != bottoms[1]:
        raise _Illegal(f"its second bottom {times(bottoms[1])} does not match {times(x)} from axis {axis} on")


def _convolved(parameters: Convolution, x: Shape) -> Shape:
    if x[1] % parameters.group or parameters.num_output % parameters.group:
        raise _Illegal(
            f"{x[1]} channels and num_output {parameters.num_output} must be multiples of group {parameters.group}"
        )
    sides = []
    for size, kernel, stride, pad, dilation in zip(
        x[2:], parameters.kernel, parameters.stride, parameters.padding, parameters.dilation, strict=True
    ):
        sides.append((size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1)
        if sides[-1] < 1:
            raise _Illegal(f"its kernel {times(parameters.kernel)} does not fit into {times(x[2:])} with its padding")
    return (x[0], parameters.num_output, *sides)


def _pooled(parameters: Pooling, x: Shape) -> Shape:
    if parameters.kernel is None:
        return (*x[:2], 1, 1)
    sides: Shape = pooled_sizes(parameters, x[2], x[3])
    if min(sides) < 1:
        raise _Illegal(f"its window {times(parameters.kernel)} does not fit into {times(x[2:])}")
    return (*x[:2], *sides)


# --------------------------------------------------------------------------------------------------------------- phase


@dataclass(frozen=True)
class State:
    """What include and exclude rules are compared with."""

    phase: str = "TEST"
    level: int = 0
    stages: frozenset[str] = frozenset()


def included(state: State, include: Sequence[Any], exclude: Sequence[Any]) -> bool:
    """Whether a layer with these rules (NetStateRule messages) is part of the network, as Caffe decides."""
    if include:
        return any(_meets(state, rule) for rule in include)
    return not any(_meets(state, rule) for rule in exclude)


def _meets(state: State, rule: Any) -> bool:
    phase = {"TRAIN": 0, "TEST": 1}[state.phase]
    return (
        (not rule.HasField("phase") or rule.phase == phase)
        and (not rule.HasField("min_level") or state.level >= rule.min_level)
        and (not rule.HasField("max_level") or state.level <= rule.max_level)
        and state.stages.issuperset(rule.stage)
        and state.stages.isdisjoint(rule.not_stage)
    )
