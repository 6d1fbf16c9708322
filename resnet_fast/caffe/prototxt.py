"""Prototxt, Caffe's text format, to a :class:`Definition` and back.

protobuf's text_format parses. Before that a scan of the tokens finds each layer's line, refuses what is too large, too
deep or unknown, and puts a space where two entries ran together because a text lost its line breaks
(``input_dim: 1input_dim: 3``). Weights are not here, and no tensor.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import definition as d
from . import schema
from .errors import CaffeError

MAX_BYTES = 4 * 2**20
"""Larger texts are refused. The published ResNet-152 has 98 KB."""

MAX_DEPTH = 32
"""Deepest nesting of braces and brackets. A layer's filler is at depth 3."""

MAX_MESSAGES = 100_000
"""Most pairs of braces in a text. The published ResNet-152 has 1,300."""

MAX_WORD = 1024
"""Longest name or number outside quotes."""

_TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*)|(?P<space>[^\S\n]+)|(?P<newline>\n)|(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')"""
    r"""|(?P<number>[+-]?\.?[0-9][0-9A-Za-z_.+-]*)|(?P<word>[A-Za-z_][0-9A-Za-z_]*)|(?P<symbol>.)""",
    re.DOTALL,
)
_NUMBER = r"[+-]?(?:0[xX][0-9a-fA-F]+|(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[fF]?)"
#: A colon, a brace or a bracket: the token before it is a field's name.
_BEFORE_VALUE = re.compile(r"\s*(?:#[^\n]*\n\s*)*[:{<\[]")  # only one way to match each character
_OPEN, _CLOSE = {"{": "}", "<": ">", "[": "]"}, {"}", ">", "]"}


def read(path: str | os.PathLike[str], *, phase: str = "TEST") -> d.Definition:
    """The network that a prototxt file defines.

    Raises:
        FileNotFoundError: if there is no such file.
        CaffeError: with the line, for what Caffe would refuse and for what is not supported.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such prototxt file")
    if not path.is_file():
        raise CaffeError(f"{path}: a prototxt file was expected, this is a directory or device")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise CaffeError(f"{path}: more than {MAX_BYTES:,} bytes, too large for a prototxt; is it the caffemodel?")
    # Comments may be in any encoding, as old files' are; elsewhere what is not UTF-8 is refused with its line.
    return parse(content.decode("utf-8-sig", "surrogateescape"), source=str(path), phase=phase)


def parse(text: str, *, source: str = "prototxt", phase: str = "TEST") -> d.Definition:
    """The network that a prototxt's text defines.

    Args:
        source: named in errors.
        phase: TEST or TRAIN; layers whose include or exclude rules do not fit it are left out.

    Raises:
        ValueError: for another phase.
        CaffeError: with the line, for what Caffe would refuse and for what is not supported.
    """
    if phase not in ("TEST", "TRAIN"):
        raise ValueError(f"phase is {phase!r}; it must be 'TEST' or 'TRAIN'")
    net = schema.message("NetParameter")
    from google.protobuf import text_format

    scanned = _scan(text, source, net.DESCRIPTOR)
    unknown = any(place.unknown for places in scanned.layers.values() for place in places)
    try:  # what the scan did not report must not be skipped here
        text_format.Parse(scanned.text, net, allow_unknown_field=unknown)
    except text_format.ParseError as error:
        raise CaffeError(f"{source}: {_one_line(error)}") from None
    except RecursionError:
        raise CaffeError(f"{source}: nested too deeply") from None
    return _definition(net, scanned, source, phase)


def emit(definition: d.Definition) -> str:
    """The prototxt of ``definition``; Caffe and :func:`parse` read it."""
    message = to_message(definition)
    from google.protobuf import text_format

    return str(text_format.MessageToString(message))


# --------------------------------------------------------------------------------------------------------- the scan


@dataclass
class _Place:
    """Where a layer stands, and what its text holds that the schema does not know."""

    line: int
    unknown: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class _Scanned:
    text: str
    layers: dict[str, list[_Place]]  # "layer" and "layers"


@dataclass
class _Level:
    """An open brace: the message inside (None if unknown), how it is closed, and the layer it belongs to."""

    message: Any
    closing: str
    place: _Place | None
    name: str
    enum: Any = None  # of the field that was named last
    items: tuple[str, Any] = ("", None)  # of a list: the field that it is of


#: Fields that a solver file begins with, which is sometimes given in place of the network's.
_OF_SOLVERS = ("net", "train_net", "test_net", "test_iter", "test_interval", "base_lr", "lr_policy", "solver_mode")


def _scan(text: str, source: str, root: Any) -> _Scanned:
    if "\0" in text:
        raise CaffeError(f"{source}: holds a NUL character, so it is no text; is it the caffemodel?")
    if len(text) > MAX_BYTES:
        raise CaffeError(f"{source}: {len(text):,} characters, more than the {MAX_BYTES:,} that are read")
    if re.match(r"\s*<(!doctype|html)", text, re.IGNORECASE):
        raise CaffeError(f"{source}: seems to be a web page, a prototxt was expected")
    if re.fullmatch(r"\S+\.(prototxt|txt|caffemodel)", text):
        raise CaffeError(f"{source}: the text is {text!r}; read_prototxt reads a file of that name")
    result = _Scanned("", {"layer": [], "layers": []})
    out: list[str] = []
    levels = [_Level(root, "", None, "the network")]
    line = 1
    named: tuple[str, Any] = ("", None)  # the last field's name and descriptor
    position = messages = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        assert match is not None  # the last alternative takes any character
        kind, token = match.lastgroup, match.group()
        level = levels[-1]
        if kind == "newline":
            line += 1
        elif kind in ("number", "word") and len(token) > MAX_WORD:
            raise CaffeError(f"{source}: line {line}: a word of {len(token):,} characters, at most {MAX_WORD} are read")
        elif kind == "comment":
            position = match.end()
            continue
        elif not token.isascii() and re.search("[\ud800-\udfff]", token):
            raise CaffeError(f"{source}: line {line}: not UTF-8 text; only comments may be in another encoding")
        elif kind == "symbol" and token in "\"'":  # at once: each further quote would be searched to the end as well
            raise CaffeError(f"{source}: line {line}: a string does not end on its line")
        elif kind in ("number", "word") and _BEFORE_VALUE.match(text, match.end()):
            head, name = (
                ("", token)
                if kind == "word" and (level.message is None or token in level.message.fields_by_name)
                else _split(token, level)
            )
            if head:
                out.append(head + " ")
                position += len(head)
                continue
            known = None if level.message is None else level.message.fields_by_name.get(name)
            named = (name, known)
            level.enum = known.enum_type if known is not None else None
            if level.message is not None and known is None:
                if level.place is None:
                    hint = "; it is a solver's" if name in _OF_SOLVERS else ""
                    raise CaffeError(f"{source}: line {line}: {level.name} has no field {name!r}{hint}")
                level.place.unknown.append((f"{level.name}.{name}".removeprefix("layer."), line))
        elif token in _OPEN and kind == "symbol":
            if len(levels) > MAX_DEPTH:
                raise CaffeError(f"{source}: line {line}: nested deeper than {MAX_DEPTH} braces")
            messages += 1
            if messages > MAX_MESSAGES:
                raise CaffeError(f"{source}: line {line}: more than {MAX_MESSAGES:,} pairs of braces")
            name, known = level.items if level.closing == "]" else named
            place, inner = level.place, None
            if token == "[":  # a list: of values, or of messages of the same field
                levels.append(_Level(level.message, "]", place, level.name, items=named))
            else:
                if known is not None:
                    inner = known.message_type
                if len(levels) == 1 + sum(entry.closing == "]" for entry in levels) and name in result.layers:
                    place = _Place(line)
                    result.layers[name].append(place)
                levels.append(_Level(inner, _OPEN[token], place, "layer" if place and not level.place else name))
                named = ("", None)
        elif token in _CLOSE and kind == "symbol":
            if len(levels) == 1 or token != level.closing:
                expected = repr(level.closing) if level.closing else "no closing brace"
                raise CaffeError(f"{source}: line {line}: {token!r}, {expected} was expected")
            levels.pop()
        out.append(token)
        position = match.end()
    if len(levels) > 1:
        raise CaffeError(f"{source}: ends inside {levels[-1].name!r}: {levels[-1].closing!r} is missing")
    result.text = "".join(out)
    return result


def _split(token: str, level: _Level) -> tuple[str, str]:
    """A value and the field's name that ran into it, ("", token) if it is no such pair."""
    if level.message is None:
        return "", token
    for name in sorted(level.message.fields_by_name, key=len, reverse=True):
        head = token.removesuffix(name)
        if head == token or not head:
            continue
        values = () if level.enum is None else level.enum.values_by_name
        if re.fullmatch(_NUMBER, head) or head in ("true", "false") or head in values:
            return head, name
    return "", token


def _one_line(error: BaseException) -> str:
    """protobuf's ``line:column : message`` as ``line 3: message``."""
    text = " ".join(str(error).split())
    place = re.match(r"(\d+):(\d+) ?: ?(.*)", text)
    text = f"line {place[1]}: {place[3]}" if place else text
    return text if len(text) <= 300 else text[:297] + "..."


# ---------------------------------------------------------------------------------------------- messages to definition


def _definition(net: Any, scanned: _Scanned, source: str, phase: str) -> d.Definition:
    if net.layer and net.layers:
        raise CaffeError(f"{source}: has both `layer` and `layers` entries; a network has one kind")
    state = d.State(phase, net.state.level, frozenset(net.state.stage))
    places = scanned.layers["layers" if net.layers else "layer"]
    if len(places) != len(net.layers or net.layer):
        raise CaffeError(
            f"{source}: {len(net.layers or net.layer)} layers were parsed, {len(places)} found in the text"
        )
    inputs = list(_header_inputs(net, source))
    layers: list[d.Layer] = []
    shared: dict[str, d.Layer] = {}
    for message, place in zip(net.layers or net.layer, places, strict=True):
        kind = _type(message)
        where = f"{source}: {d.describe(message.name, kind, place.line)}"
        if message.include and message.exclude:
            raise CaffeError(f"{where}: has both include and exclude rules; Caffe takes one kind")
        if not d.included(state, message.include, message.exclude):
            continue
        if net.layers and any(name == "layer" for name, _ in place.unknown):
            raise CaffeError(f"{where}: of the V0 format; convert the file with Caffe's upgrade_net_proto_text")
        if kind not in (*d.SUPPORTED, "Input"):
            raise CaffeError(f"{where}: {_unsupported(kind)}")
        if place.unknown:
            name, line = place.unknown[0]
            raise CaffeError(f"{where}: line {line}: unknown field {name!r}; it may change what the layer computes")
        if kind in ("BatchNorm", "Dropout") and _phase_of(message) not in ("", phase):
            raise CaffeError(f"{where}: has a phase of its own, other than the network's {phase}; not supported")
        if kind == "Input":
            inputs.extend(_input_layer(message, where))
            continue
        try:
            parameters = _READ[kind](message)
        except ValueError as error:
            raise CaffeError(f"{where}: {error}") from None
        layer = d.Layer(message.name, parameters, tuple(message.bottom), tuple(message.top), place.line)
        for spec in message.param:
            shared_name = spec if isinstance(spec, str) else spec.name
            if shared_name and shared.setdefault(shared_name, layer) is not layer:
                raise CaffeError(f"{where}: shares the parameter {shared_name!r} with {shared[shared_name]}; "
                                 "shared parameters are not supported")  # fmt: skip
        layers.append(layer)
    result = d.Definition(net.name, tuple(inputs), tuple(layers), source)
    d.check(result)
    return result


def _phase_of(message: Any) -> str:
    """The phase that a layer itself names, "" for none; V1 has no such field."""
    named = "phase" in message.DESCRIPTOR.fields_by_name and message.HasField("phase")
    return str(message.Phase.Name(message.phase)) if named else ""


def _type(message: Any) -> str:
    if isinstance(message.type, str):
        return message.type
    return schema.V1_TYPE_NUMBERS.get(message.type, f"V1 type {message.type}")


def _unsupported(kind: str) -> str:
    known = f"supported are {', '.join(d.SUPPORTED)} and Input"
    if kind.endswith("Data"):
        return "a data layer; a network to run has `input:` with `input_shape`, or a layer of type Input, in its place"
    if kind.endswith("Loss") or kind in ("Accuracy", "Silence"):
        return (
            "losses and accuracies are not part of a network here; use the deploy definition, or take such layers out, "
            f"and compute them from the network's output ({known})"
        )
    return f"layers of type {kind!r} are not supported; {known}" if kind else f"it has no type; {known}"


def _header_inputs(net: Any, source: str) -> Iterator[d.Input]:
    names, dims, given = list(net.input), list(net.input_dim), list(net.input_shape)
    if dims and given:
        raise CaffeError(f"{source}: has both input_dim and input_shape; a network has one kind")
    if dims and len(dims) != 4 * len(names):
        raise CaffeError(f"{source}: {len(dims)} input_dim entries for {len(names)} inputs; each input takes 4")
    if not dims and len(given) != len(names):
        raise CaffeError(
            f"{source}: {len(names)} inputs and {len(given)} input_shape entries; each input needs its shape"
        )
    for index, name in enumerate(names):
        shape = dims[4 * index : 4 * index + 4] if dims else list(given[index].dim)
        yield _input(name, shape, f"{source}: input {name!r}")


def _input_layer(message: Any, where: str) -> Iterator[d.Input]:
    given = message.input_param.shape
    if not message.top:
        raise CaffeError(f"{where}: has no top")
    if message.bottom:
        raise CaffeError(f"{where}: has bottoms, an input has none")
    if len(given) not in (1, len(message.top)):
        raise CaffeError(f"{where}: {len(given)} shapes for {len(message.top)} tops; give one, or one for each")
    for index, name in enumerate(message.top):
        yield _input(name, list(given[index if len(given) > 1 else 0].dim), where)


def _input(name: str, shape: Sequence[int], where: str) -> d.Input:
    if not name:
        raise CaffeError(f"{where}: an input needs a name")
    if not 1 <= len(shape) <= d.MAX_AXES or min(shape) < 1:
        raise CaffeError(f"{where}: shape {'x'.join(map(str, shape)) or 'of no axes'}; 1 to {d.MAX_AXES} sizes of at "
                         "least 1 are needed")  # fmt: skip
    if any(size > d.MAX_ELEMENTS for size in shape):
        raise CaffeError(f"{where}: shape {'x'.join(map(str, shape))} is too large")
    return d.Input(name, tuple(shape))


def _at_least(name: str, least: int, *values: int) -> None:
    if min(values) < least:
        raise ValueError(f"{name} is {min(values)}, at least {least} is needed")
    if max(values) > d.MAX_ELEMENTS:
        raise ValueError(f"{name} is {max(values)}, at most {d.MAX_ELEMENTS} is possible")


def _finite(name: str, *values: float) -> None:
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name} is {', '.join(f'{value:g}' for value in values)}; finite numbers are needed")


def _two(parameters: Any, name: str, short: str, default: int | None) -> tuple[int, int]:
    """A size for height and width: repeated or single under ``name``, or as ``short``_h and ``short``_w."""
    by_side = (f"{short}_h", f"{short}_w")
    either = [parameters.HasField(side) for side in by_side]
    value = getattr(parameters, name)
    values = list(value) if not isinstance(value, int) else [value] if parameters.HasField(name) else []
    if any(either):
        if values:
            raise ValueError(f"has both {name} and {by_side[0]} or {by_side[1]}; Caffe takes one kind")
        if not all(either) and default is None:
            raise ValueError(f"has one of {by_side[0]} and {by_side[1]}, both are needed")
        if not all(either) and default == 1:
            raise ValueError(f"has one of {by_side[0]} and {by_side[1]}, Caffe would take the other as 0")
        return getattr(parameters, by_side[0]), getattr(parameters, by_side[1])
    if not values:
        if default is None:
            raise ValueError(f"{name} is missing")
        return default, default
    if len(values) > 2:
        raise ValueError(f"{name} has {len(values)} values; one, or one each for height and width, was expected")
    return values[0], values[-1]


def _convolution(message: Any) -> d.Convolution:
    p = message.convolution_param
    kernel = _two(p, "kernel_size", "kernel", None)
    stride = _two(p, "stride", "stride", 1)
    padding = _two(p, "pad", "pad", 0)
    if len(p.dilation) > 2:
        raise ValueError(f"dilation has {len(p.dilation)} values; one, or one each for height and width, was expected")
    dilation = (p.dilation[0], p.dilation[-1]) if p.dilation else (1, 1)
    if p.axis not in (1, -3):
        raise ValueError(f"axis is {p.axis}; only axis 1, the channels, is supported")
    _at_least("num_output", 1, p.num_output)
    _at_least("group", 1, p.group)
    _at_least("kernel_size", 1, *kernel)
    _at_least("stride", 1, *stride)
    _at_least("dilation", 1, *dilation)
    _at_least("pad", 0, *padding)
    return d.Convolution(p.num_output, kernel, stride, padding, dilation, p.group, p.bias_term)


def _pooling(message: Any) -> d.Pooling:
    p = message.pooling_param
    method = p.PoolMethod.Name(p.pool)
    if method == "STOCHASTIC":
        raise ValueError("pool: STOCHASTIC is not supported; MAX and AVE are")
    stride = _two(p, "stride", "stride", 1)
    padding = _two(p, "pad", "pad", 0)
    _at_least("stride", 1, *stride)
    _at_least("pad", 0, *padding)
    if p.global_pooling:
        if any(p.HasField(name) for name in ("kernel_size", "kernel_h", "kernel_w")):
            raise ValueError("has global_pooling and a kernel size; Caffe takes one of them")
        if padding != (0, 0) or stride != (1, 1):
            raise ValueError("global_pooling takes no padding and no stride other than 1")
        return d.Pooling(method)
    kernel = _two(p, "kernel_size", "kernel", None)
    _at_least("kernel_size", 1, *kernel)
    if padding[0] >= kernel[0] or padding[1] >= kernel[1]:
        raise ValueError(f"pad {padding[0]}x{padding[1]} must be less than the kernel {kernel[0]}x{kernel[1]}")
    if p.HasField("ceil_mode") and p.HasField("round_mode"):
        raise ValueError("has both round_mode and ceil_mode, which mean the same")
    round_mode = p.RoundMode.Name(p.round_mode) if p.ceil_mode else "FLOOR"
    return d.Pooling(method, kernel, stride, padding, round_mode)


def _inner_product(message: Any) -> d.InnerProduct:
    p = message.inner_product_param
    _at_least("num_output", 1, p.num_output)
    return d.InnerProduct(p.num_output, p.bias_term, p.axis, p.transpose)


def _eltwise(message: Any) -> d.Eltwise:
    p = message.eltwise_param
    operation = p.EltwiseOp.Name(p.operation)
    if p.coeff and operation == "PROD":
        raise ValueError("coeff belongs to SUM, the operation is PROD")
    if len(p.coeff) not in (0, len(message.bottom)):
        raise ValueError(f"has {len(p.coeff)} coeff entries for {len(message.bottom)} bottoms; one each is needed")
    _finite("coeff", *p.coeff)
    # MAX ignores them, as in Caffe.
    return d.Eltwise(operation, () if operation == "MAX" or all(c == 1 for c in p.coeff) else tuple(p.coeff))


def _batch_norm(message: Any) -> d.BatchNorm:
    p = message.batch_norm_param
    _finite("moving_average_fraction", p.moving_average_fraction)
    if not 0 <= p.eps < math.inf:
        raise ValueError(f"eps is {p.eps:g}, it must be 0 or more")
    return d.BatchNorm(p.use_global_stats if p.HasField("use_global_stats") else None, p.moving_average_fraction, p.eps)


def _relu(message: Any) -> d.ReLU:
    slope = message.relu_param.negative_slope
    _finite("negative_slope", slope)
    return d.ReLU(slope)


def _dropout(message: Any) -> d.Dropout:
    ratio = message.dropout_param.dropout_ratio
    if not 0 < ratio < 1:
        raise ValueError(f"dropout_ratio is {ratio:g}, it must be between 0 and 1")
    return d.Dropout(ratio)


def _concat(message: Any) -> d.Concat:
    p = message.concat_param
    if p.HasField("axis") and p.HasField("concat_dim"):
        raise ValueError("has both axis and concat_dim; Caffe takes one")
    if p.concat_dim >= d.MAX_AXES:
        raise ValueError(f"concat_dim is {p.concat_dim}; a blob has at most {d.MAX_AXES} axes")
    return d.Concat(p.concat_dim if p.HasField("concat_dim") else p.axis)


_READ: dict[str, Callable[[Any], d.Parameters]] = {
    "Convolution": _convolution,
    "BatchNorm": _batch_norm,
    "Scale": lambda m: d.Scale(m.scale_param.axis, m.scale_param.num_axes, m.scale_param.bias_term),
    "ReLU": _relu,
    "Eltwise": _eltwise,
    "Pooling": _pooling,
    "InnerProduct": _inner_product,
    "Softmax": lambda m: d.Softmax(m.softmax_param.axis),
    "Dropout": _dropout,
    "Concat": _concat,
    "Split": lambda m: d.Split(),
}


# ---------------------------------------------------------------------------------------------- definition to messages


def to_message(definition: d.Definition) -> Any:
    """A NetParameter message of ``definition``: V2 layers, inputs as ``input`` with ``input_shape``, no weights."""
    net = schema.message("NetParameter")
    net.name = definition.name
    for entry in definition.inputs:
        net.input.append(entry.name)
        net.input_shape.add().dim.extend(entry.shape)
    for layer in definition.layers:
        message = net.layer.add(name=layer.name, type=layer.type, bottom=layer.bottoms, top=layer.tops)
        _WRITE[layer.type](layer.parameters, message)
    return net


def _put_two(message: Any, name: str, short: str, value: tuple[int, int], default: tuple[int, int] | None) -> None:
    if value == default:
        return
    if value[0] != value[1]:
        setattr(message, f"{short}_h", value[0])
        setattr(message, f"{short}_w", value[1])
    elif isinstance(getattr(message, name), int):
        setattr(message, name, value[0])
    else:
        getattr(message, name).append(value[0])


def _put_convolution(p: d.Convolution, layer: Any) -> None:
    message = layer.convolution_param
    message.num_output = p.num_output
    _put_two(message, "kernel_size", "kernel", p.kernel, None)
    _put_two(message, "stride", "stride", p.stride, (1, 1))
    _put_two(message, "pad", "pad", p.padding, (0, 0))
    if p.dilation != (1, 1):
        message.dilation.extend(p.dilation if p.dilation[0] != p.dilation[1] else p.dilation[:1])
    if p.group != 1:
        message.group = p.group
    if not p.bias_term:
        message.bias_term = False


def _put_pooling(p: d.Pooling, layer: Any) -> None:
    message = layer.pooling_param
    message.pool = message.PoolMethod.Value(p.method)
    if p.kernel is None:
        message.global_pooling = True
        return
    _put_two(message, "kernel_size", "kernel", p.kernel, None)
    _put_two(message, "stride", "stride", p.stride, (1, 1))
    _put_two(message, "pad", "pad", p.padding, (0, 0))
    if p.round_mode != "CEIL":
        message.round_mode = message.RoundMode.Value(p.round_mode)


def _put_batch_norm(p: d.BatchNorm, layer: Any) -> None:
    message = layer.batch_norm_param
    if p.use_global_stats is not None:
        message.use_global_stats = p.use_global_stats
    _put(message, moving_average_fraction=p.moving_average_fraction, eps=p.eps)


def _put_eltwise(p: d.Eltwise, layer: Any) -> None:
    message = layer.eltwise_param
    message.operation = message.EltwiseOp.Value(p.operation)
    message.coeff.extend(p.coeff)


def _put(message: Any, **values: Any) -> None:
    """Set what differs from the default."""
    for name, value in values.items():
        if getattr(message, name) != value:
            setattr(message, name, value)


_WRITE: dict[str, Callable[[Any, Any], None]] = {
    "Convolution": _put_convolution,
    "BatchNorm": _put_batch_norm,
    "Scale": lambda p, m: _put(m.scale_param, axis=p.axis, num_axes=p.num_axes, bias_term=p.bias_term),
    "ReLU": lambda p, m: _put(m.relu_param, negative_slope=p.negative_slope),
    "Eltwise": _put_eltwise,
    "Pooling": _put_pooling,
    "InnerProduct": lambda p, m: _put(
        m.inner_product_param,
        num_output=p.num_output,
        bias_term=p.bias_term,
        axis=p.axis,
        transpose=p.transpose,
    ),
    "Softmax": lambda p, m: _put(m.softmax_param, axis=p.axis),
    "Dropout": lambda p, m: _put(m.dropout_param, dropout_ratio=p.ratio),
    "Concat": lambda p, m: _put(m.concat_param, axis=p.axis),
    "Split": lambda p, m: None,
}
