"""Prototxt, Caffe's text format, to a :class:`Definition` and back.

protobuf's text_format parses. Before that a scan of the tokens finds each layer's line, refuses what is too large, too
deep or unknown, and puts a space where two entries ran together because a text lost its line breaks
(``input_dim: 1input_dim: 3``). Weights are not here, and no tensor.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

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


@dataclass(frozen=True)
class Choice:
    """Which part of a prototxt is read.

    Attributes:
        phase: TEST or TRAIN.
        level: None for the file's own, which is 0 if it says nothing.
        stages: further to the file's own.
        upto: the last layer, by its own name or that of a blob that it writes; what stands behind it is not read.
        features: the blobs that are wanted; layers that they do not need are not read. None for all.
        inputs: shapes by name of blobs that the caller gives, in place of the layer or input that makes them.

    Raises:
        TypeError, ValueError: for values of other kinds.
    """

    phase: str = "TEST"
    level: int | None = None
    stages: Iterable[str] = ()
    upto: str | None = None
    features: Iterable[str] | None = None
    inputs: Mapping[str, Sequence[int]] | None = None

    def __post_init__(self) -> None:
        if self.phase not in ("TEST", "TRAIN"):
            raise ValueError(f"phase is {self.phase!r}; it must be 'TEST' or 'TRAIN'")
        if not (self.level is None or isinstance(self.level, int)):
            raise TypeError(f"level is {self.level!r}; an integer was expected")
        if not (self.upto is None or isinstance(self.upto, str)):
            raise TypeError(f"upto is {self.upto!r}; the name of one layer or blob was expected")
        for name in ("stages", "features"):
            value = getattr(self, name)
            if value is None and name == "features":
                continue
            names = () if isinstance(value, str) else tuple(value)
            if isinstance(value, str) or not all(isinstance(entry, str) for entry in names):
                raise TypeError(f"{name} is {value!r}; a list of names was expected")
            object.__setattr__(self, name, tuple(dict.fromkeys(names)))
        if self.features == ():
            raise ValueError("features is empty; at least one blob is needed")
        if not (self.inputs is None or isinstance(self.inputs, Mapping)):
            raise TypeError(f"inputs is a {type(self.inputs).__name__}; a dict of shapes by name was expected")


def read(path: str | os.PathLike[str], **choice: Any) -> d.Definition:
    """Return the network that a prototxt file defines; ``choice`` are fields of :class:`Choice`.

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
    return parse(content.decode("utf-8-sig", "surrogateescape"), source=str(path), **choice)


def parse(text: str, *, source: str = "prototxt", **choice: Any) -> d.Definition:
    """Return the network that a prototxt's text defines; ``choice`` are fields of :class:`Choice`.

    Layers whose include or exclude rules do not fit phase, level and stages are left out, and so are those that
    ``upto`` and ``features`` do not need, whatever their types are.

    Args:
        source: named in errors.

    Raises:
        TypeError, ValueError: for a phase or another choice that is none.
        CaffeError: with the line, for what Caffe would refuse and for what is not supported.
    """
    chosen = Choice(**choice)
    net = schema.message("NetParameter")
    from google.protobuf import text_format

    text, places = _scan(text, source, net.DESCRIPTOR)
    unknown = any(place.unknown for layers in places.values() for place in layers)
    try:  # what the scan did not report must not be skipped here
        text_format.Parse(text, net, allow_unknown_field=unknown)
    except text_format.ParseError as error:
        raise CaffeError(f"{source}: {_one_line(error)}") from None
    except RecursionError:
        raise CaffeError(f"{source}: nested too deeply") from None
    return _definition(net, places, source, chosen)


def emit(definition: d.Definition) -> str:
    """Return the prototxt of ``definition``; Caffe and :func:`parse` read it."""
    message = to_message(definition)
    from google.protobuf import text_format

    return str(text_format.MessageToString(message))


# --------------------------------------------------------------------------------------------------------- the scan


@dataclass
class _Place:
    """Where a layer stands, and what its text holds that the schema does not know."""

    line: int
    unknown: list[tuple[str, int]] = field(default_factory=list)


_Places: TypeAlias = "dict[str, list[_Place]]"  # of "layer" and "layers"


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


def _scan(text: str, source: str, root: Any) -> tuple[str, _Places]:
    """Return the text as protobuf reads it, and where its layers stand."""
    if "\0" in text:
        raise CaffeError(f"{source}: holds a NUL character, so it is no text; is it the caffemodel?")
    if len(text) > MAX_BYTES:
        raise CaffeError(f"{source}: {len(text):,} characters, more than the {MAX_BYTES:,} that are read")
    if re.match(r"\s*<(!doctype|html)", text, re.IGNORECASE):
        raise CaffeError(f"{source}: seems to be a web page, a prototxt was expected")
    if re.fullmatch(r"\S+\.(prototxt|txt|caffemodel)", text):
        raise CaffeError(f"{source}: the text is {text!r}; read_prototxt reads a file of that name")
    places: _Places = {"layer": [], "layers": []}
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
                if len(levels) == 1 + sum(entry.closing == "]" for entry in levels) and name in places:
                    place = _Place(line)
                    places[name].append(place)
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
    return "".join(out), places


def _split(token: str, level: _Level) -> tuple[str, str]:
    """Return a value and the field's name that ran into it, ("", token) if it is no such pair."""
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


@dataclass(frozen=True)
class _Entry:
    """A layer that phase, level and stages include."""

    message: Any
    place: _Place
    kind: str
    where: str

    def makes(self, name: str) -> bool:
        """Return whether the blob is new in this layer."""
        return name in self.message.top and name not in self.message.bottom


def _definition(net: Any, places: _Places, source: str, choice: Choice) -> d.Definition:
    entries = _included(net, places, source, choice)
    given = dict(choice.inputs or {})
    inputs = [] if given.keys() >= set(net.input) else list(_header_inputs(net, source))
    made = {*net.input, *(name for entry in entries for name in (*entry.message.top, *entry.message.bottom))}
    for name in given:
        if name not in made:
            raise CaffeError(f"{source}: inputs has {name!r}, {_no_blob(name, made)}")
    inputs = [entry for entry in inputs if entry.name not in given]
    inputs += [_input(name, shape, f"{source}: inputs: {name!r}") for name, shape in given.items()]
    kept = [entry for entry in entries if not any(entry.makes(name) for name in given)]
    if choice.upto is not None:
        kept = _up_to(kept, choice.upto, source)
    if choice.features is not None:
        kept = _needed(kept, choice.features, [entry.name for entry in inputs], source)
    read = {name for entry in kept for name in entry.message.bottom}
    layers: list[d.Layer] = []
    shared: dict[str, d.Layer] = {}
    for entry in kept:
        if entry.kind in _DATA_LAYERS:
            found = _data_inputs(entry)
            # What nothing reads, such as labels, need not be given.
            inputs += [e for i, e in enumerate(found) if i == 0 or e.name in read or entry.kind == "Input"]
            continue
        layers.append(_layer(entry, choice.phase, shared))
    if choice.upto is not None or choice.features is not None:
        inputs = [entry for entry in inputs if entry.name in read]
    names = {layer.name for layer in layers}
    left_out = tuple(message.name for message in net.layers or net.layer if message.name not in names)
    result = d.Definition(net.name, tuple(inputs), tuple(layers), source, left_out)
    d.check(result)
    return result


def _included(net: Any, places: _Places, source: str, choice: Choice) -> list[_Entry]:
    """Return the layers that phase, level and stages leave, as Caffe decides it by their NetStateRule messages."""
    if net.layer and net.layers:
        raise CaffeError(f"{source}: has both `layer` and `layers` entries; a network has one kind")
    phase, stages = {"TRAIN": 0, "TEST": 1}[choice.phase], {*net.state.stage, *choice.stages}
    level = net.state.level if choice.level is None else choice.level

    def meets(rule: Any) -> bool:
        return (
            (not rule.HasField("phase") or rule.phase == phase)
            and (not rule.HasField("min_level") or level >= rule.min_level)
            and (not rule.HasField("max_level") or level <= rule.max_level)
            and stages.issuperset(rule.stage)
            and stages.isdisjoint(rule.not_stage)
        )

    messages, found = net.layers or net.layer, places["layers" if net.layers else "layer"]
    if len(found) != len(messages):
        raise CaffeError(f"{source}: {len(messages)} layers were parsed, {len(found)} found in the text")
    entries = []
    for message, place in zip(messages, found, strict=True):
        kind = _type(message)
        where = f"{source}: {d.describe(message.name, kind, place.line)}"
        if message.include and message.exclude:
            raise CaffeError(f"{where}: has both include and exclude rules; Caffe takes one kind")
        excluded = not any(map(meets, message.include)) if message.include else any(map(meets, message.exclude))
        if excluded:
            continue
        if net.layers and any(name == "layer" for name, _ in place.unknown):
            raise CaffeError(f"{where}: of the V0 format; convert the file with Caffe's upgrade_net_proto_text")
        entries.append(_Entry(message, place, kind, where))
    return entries


def _up_to(entries: list[_Entry], last: str, source: str) -> list[_Entry]:
    """Return the layers as far as the one of this name, or the last that writes a blob of this name."""
    for found in (lambda e: e.message.name == last, lambda e: last in e.message.top):
        places = [index for index, entry in enumerate(entries) if found(entry)]
        if places:
            return entries[: places[-1] + 1]
    known = {name for entry in entries for name in (entry.message.name, *entry.message.top)}
    raise CaffeError(f"{source}: upto is {last!r}, {_no_blob(last, known, 'no layer or blob')}")


def _needed(entries: list[_Entry], features: Iterable[str], inputs: Iterable[str], source: str) -> list[_Entry]:
    """Return the layers that these blobs, with the values that they have at the end, are computed by."""
    known = {*inputs, *(name for entry in entries for name in entry.message.top)}
    for name in features:
        if name not in known:
            raise CaffeError(f"{source}: features has {name!r}, {_no_blob(name, known)}")
    needed, kept = set(features), []
    for entry in reversed(entries):
        if not needed.isdisjoint(entry.message.top):
            kept.append(entry)
            needed.difference_update(entry.message.top)
            needed.update(entry.message.bottom)
    return kept[::-1]


def _no_blob(name: str, known: Iterable[str], what: str = "no blob") -> str:
    close = difflib.get_close_matches(name[:80], sorted(known)[:1000], 3, 0.5)
    return f"which is {what} of the network" + (f"; it has {', '.join(close)}" if close else "")


def _layer(entry: _Entry, phase: str, shared: dict[str, d.Layer]) -> d.Layer:
    """One layer; ``shared`` has the first of each name of a parameter."""
    message, kind, where = entry.message, entry.kind, entry.where
    if kind not in d.KINDS:
        raise CaffeError(f"{where}: {_unsupported(kind)}")
    _all_known(entry)
    if kind in ("BatchNorm", "Dropout") and _phase_of(message) not in ("", phase):
        raise CaffeError(f"{where}: has a phase of its own, other than the network's {phase}; not supported")
    try:
        parameters = d.KINDS[kind].read(message)
    except ValueError as error:
        raise CaffeError(f"{where}: {error}") from None
    layer = d.Layer(message.name, parameters, tuple(message.bottom), tuple(message.top), entry.place.line)
    for spec in message.param:
        shared_name = spec if isinstance(spec, str) else spec.name
        if shared_name and shared.setdefault(shared_name, layer) is not layer:
            raise CaffeError(f"{where}: shares the parameter {shared_name!r} with {shared[shared_name]}; "
                             "shared parameters are not supported")  # fmt: skip
    return layer


def _all_known(entry: _Entry) -> None:
    for name, line in entry.place.unknown[:1]:
        raise CaffeError(f"{entry.where}: line {line}: unknown field {name!r}; it may change what the layer computes")


def _phase_of(message: Any) -> str:
    """Return the phase that a layer itself names, "" for none; V1 has no such field."""
    named = "phase" in message.DESCRIPTOR.fields_by_name and message.HasField("phase")
    return str(message.Phase.Name(message.phase)) if named else ""


def _type(message: Any) -> str:
    if isinstance(message.type, str):
        return message.type
    return schema.V1_TYPE_NUMBERS.get(message.type, f"V1 type {message.type}")


def _unsupported(kind: str) -> str:
    known = f"supported are {', '.join(d.SUPPORTED)} and Input"
    part = "load(..., features=[...]) leaves out what these blobs do not need"
    if kind.endswith("Data"):
        return f"a data layer, {_NO_SHAPE}"
    if kind.endswith("Loss") or kind in ("Accuracy", "Silence"):
        return (
            "losses and accuracies are not part of a network here; use the deploy definition, and compute them from "
            f"the network's output ({known}; {part})"
        )
    return f"layers of type {kind!r} are not supported; {known}; {part}" if kind else f"it has no type; {known}"


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


_NO_SHAPE = (
    "whose shape the prototxt does not say; put `input:` with `input_shape`, or a layer of type Input, in its place, "
    "or load it with inputs={name: shape}"
)


def _data_inputs(entry: _Entry) -> list[d.Input]:
    """Return the inputs that a data layer stands for, with the shapes that Caffe's layer gives its tops."""
    message, where = entry.message, entry.where
    _all_known(entry)
    if not message.top:
        raise CaffeError(f"{where}: has no top")
    if message.bottom:
        raise CaffeError(f"{where}: has bottoms, an input has none")
    try:
        shapes = _DATA_LAYERS[entry.kind](message)
    except ValueError as error:
        raise CaffeError(f"{where}: {error}") from None
    found = [_input(name, shape, where) for name, shape in zip(message.top, shapes, strict=True)]
    if message.HasField("transform_param"):
        t = message.transform_param
        values = (t.scale, *t.mean_value)
        if not all(map(math.isfinite, values)):
            raise CaffeError(
                f"{where}: transform_param has {', '.join(map(str, values[:5]))}; finite numbers are needed"
            )
        transform = d.Transform(t.scale, tuple(t.mean_value), t.mean_file)
        found[0] = dataclasses.replace(found[0], transform=transform)
    return found


def _input_shapes(message: Any) -> list[Sequence[int]]:
    given = message.input_param.shape
    if len(given) not in (1, len(message.top)):
        raise ValueError(f"{len(given)} shapes for {len(message.top)} tops; give one, or one for each")
    return [list(given[index if len(given) > 1 else 0].dim) for index in range(len(message.top))]


def _memory_data_shapes(message: Any) -> list[Sequence[int]]:
    p = message.memory_data_param
    return _with_labels(message, (p.batch_size, p.channels, p.height, p.width))


def _image_data_shapes(message: Any) -> list[Sequence[int]]:
    p = message.image_data_param
    crop = message.transform_param.crop_size or p.crop_size
    size = (crop, crop) if crop else (p.new_height, p.new_width)
    if not all(size):
        raise ValueError(f"a data layer, {_NO_SHAPE}")
    return _with_labels(message, (p.batch_size, 3 if p.is_color else 1, *size))


def _database_shapes(message: Any) -> list[Sequence[int]]:
    p, t = message.data_param, message.transform_param
    crop = t.crop_size or p.crop_size
    # Caffe takes the channels from the first image in the database, unless it converts all.
    colours = len(t.mean_value) if len(t.mean_value) > 1 else 0
    channels = 3 if t.force_color or p.force_encoded_color else 1 if t.force_gray else colours
    if not crop or not channels:
        raise ValueError(f"a data layer, {_NO_SHAPE}")
    return _with_labels(message, (p.batch_size, channels, crop, crop))


def _with_labels(message: Any, shape: Sequence[int]) -> list[Sequence[int]]:
    if len(message.top) > 2:
        raise ValueError(f"has {len(message.top)} tops, a data layer makes images and labels")
    return [shape, shape[:1]][: len(message.top)]


#: Layers whose tops the caller gives: how their shapes are read.
_DATA_LAYERS: dict[str, Callable[[Any], list[Sequence[int]]]] = {
    "Input": _input_shapes,
    "MemoryData": _memory_data_shapes,
    "ImageData": _image_data_shapes,
    "Data": _database_shapes,
}


def _input(name: str, shape: Sequence[int], where: str) -> d.Input:
    if not name:
        raise CaffeError(f"{where}: an input needs a name")
    if isinstance(shape, str) or not all(isinstance(size, int) for size in shape):
        raise TypeError(f"{where}: {shape!r} is no shape; a tuple of integers was expected")
    if not 1 <= len(shape) <= d.MAX_AXES or min(shape) < 1:
        raise CaffeError(f"{where}: shape {d.times(shape[:40])}; 1 to {d.MAX_AXES} sizes of at "
                         "least 1 are needed")  # fmt: skip
    if any(size > d.MAX_ELEMENTS for size in shape):
        raise CaffeError(f"{where}: shape {d.times(shape)} is too large")
    return d.Input(name, tuple(shape))


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
        layer.parameters.write(message)
    return net
