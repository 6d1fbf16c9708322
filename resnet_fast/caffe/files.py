"""From the files of a Caffe network to a :class:`Net` and back. What the files mean is read elsewhere."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from resnet_fast._files import write_whole

from . import caffemodel, layers, prototxt
from . import definition as d
from .errors import CaffeError
from .net import Net


def load(
    prototxt_file: str | os.PathLike[str],
    caffemodel_file: str | os.PathLike[str] | None = None,
    *,
    phase: str = "TEST",
    level: int | None = None,
    stages: Iterable[str] = (),
    upto: str | None = None,
    features: Iterable[str] | None = None,
    inputs: Mapping[str, Sequence[int]] | None = None,
    strict: bool = True,
) -> Net:
    """Return the network that a prototxt defines, with the weights of a caffemodel, float32 on the CPU.

    Args:
        prototxt_file: a deploy definition: a path.
        caffemodel_file: a binary caffemodel, V2 or V1; without it the parameters are initialised.
        phase: "TEST" for a network in eval mode, "TRAIN" for train mode; layers that its rules exclude are left out.
        level, stages: what `include` and `exclude` rules are compared with besides the phase, as in pycaffe's
            ``Net(file, phase, level, stages)``; None for the level that the file says.
        upto: the last layer, by its own name or that of a blob that it writes. What stands behind it in the file is not
            read, and may be of any type.
        features: the blobs that a call returns. Layers that they do not need are not read, and may be of any type.
        inputs: shapes by name of blobs that a call is given, in place of the layer or the input that makes them.
        strict: whether every layer with parameters must be in the file; otherwise such layers keep their
            initialisation, with a warning, as in Caffe when it finetunes.

    Raises:
        FileNotFoundError: for a file that is not there.
        CaffeError: for a file or network that cannot be used; names the layer and the line or byte.
    """
    if isinstance(prototxt_file, str) and re.search(r"[\n{]", prototxt_file):
        raise ValueError("load: prototxt_file is a text; give its path, or Net(parse_prototxt(text)) for a text")
    features = None if features is None else tuple(features) if not isinstance(features, str) else features
    definition = prototxt.read(
        prototxt_file, phase=phase, level=level, stages=stages, upto=upto, features=features, inputs=inputs
    )
    if caffemodel_file is None:
        net = Net(definition, features)
    else:
        stored = caffemodel.read(caffemodel_file)
        with torch.device("meta" if strict else "cpu"):
            net = Net(definition, features)
        _fill(net, stored, str(caffemodel_file), strict)
    return net.eval() if phase == "TEST" else net.train()


def _fill(net: Net, stored: caffemodel.StoredNet, source: str, strict: bool) -> None:
    """Give every layer its blobs, after all have been checked."""
    by_name = {entry.name: entry for entry in stored.layers if entry.blobs}
    absent: list[str] = []
    checked: list[tuple[nn.Module, str, caffemodel.Blob, tuple[int, ...]]] = []
    used: set[str] = set()
    for layer in net.definition.layers:
        own = layers.blobs(module) if (module := net.find(layer.name)) is not None else {}
        entry = by_name.get(layer.name)
        if entry is None:
            absent += [layer.name] if own else []
            continue
        used.add(layer.name)
        where = f"{source}: {layer} at byte {entry.offset}"
        named = ", ".join(own)
        if len(entry.blobs) != len(own):
            raise CaffeError(
                f"{where}: holds {len(entry.blobs)} blobs, the layer has {f'{len(own)} ({named})' if own else 'none'}; "
                "caffemodel and prototxt do not belong together"
            )
        for (name, tensor), blob in zip(own.items(), entry.blobs, strict=True):
            if not _same_shape(blob, tuple(tensor.shape)):
                raise CaffeError(
                    f"{where}: its {name} is {d.times(blob.shape)}, the prototxt makes it {d.times(tensor.shape)}; "
                    "caffemodel and prototxt do not belong together"
                )
            assert module is not None
            checked.append((module, name, blob, tuple(tensor.shape)))
    if absent and strict:
        raise CaffeError(
            f"{source}: holds no weights for {len(absent)} of the layers ({_some(absent)}); do caffemodel and prototxt "
            "belong together? (load(..., strict=False) leaves such layers as initialised)"
        )
    if absent:
        warnings.warn(f"{source}: no weights for {_some(absent)}: left as initialised", stacklevel=3)
    left_out = set(net.definition.left_out)
    ignored = [name for name in by_name if name not in used and name not in left_out]
    if ignored:
        warnings.warn(f"{source}: weights of layers that the prototxt does not have: {_some(ignored)}", stacklevel=3)
    for module, name, blob, shape in checked:
        tensor = torch.from_numpy(np.array(blob.values, dtype=np.float32)).reshape(shape)
        if name in module._buffers:
            module._buffers[name] = tensor
        else:
            module._parameters[name] = nn.Parameter(tensor)


def _same_shape(blob: caffemodel.Blob, shape: tuple[int, ...]) -> bool:
    """Caffe's comparison: four legacy dimensions stand for fewer axes with ones before them."""
    if blob.legacy:
        return len(shape) <= 4 and blob.shape == (1,) * (4 - len(shape)) + shape
    return blob.shape == shape


def save(
    net: Net,
    prototxt_file: str | os.PathLike[str] | None,
    caffemodel_file: str | os.PathLike[str] | None,
) -> None:
    """Write a network as prototxt and binary caffemodel (V2), each whole or not at all; None leaves one out.

    Parameters are stored as float32 (float64 ones as doubles); half precision is widened, which is exact.

    Raises:
        TypeError: if ``net`` is no :class:`Net`.
        ValueError: if both are one file, or the names say that their order is wrong.
        OSError: if a file cannot be written there.
        CaffeError: for parameters without data, or more than the 2 GiB that the format can hold.
    """
    if not isinstance(net, Net):
        raise TypeError(f"save: expected the module that load() gives, got {type(net).__name__}")
    _check_targets(prototxt_file, caffemodel_file)
    blobs: list[list[Tensor]] = []
    for layer, bottoms, _ in d.walk(net.definition):
        own = [] if (module := net.find(layer.name)) is None else list(layers.blobs(module).values())
        shapes = [tuple(tensor.shape) for tensor in own]
        defined = list(layer.parameters.blobs(bottoms).values())
        if shapes != defined:
            raise CaffeError(
                f"save: {layer} has blobs of {', '.join(map(d.times, shapes)) or 'nothing'}; its definition says "
                f"{', '.join(map(d.times, defined))}; the module was changed"
            )
        if any(tensor.is_meta for tensor in own):
            raise CaffeError(f"save: {layer} has parameters without data, on the meta device")
        blobs.append(own)
    text = prototxt.emit(net.definition)

    def write_weights() -> None:
        if caffemodel_file is not None:
            caffemodel.write(caffemodel_file, prototxt.to_message(net.definition), blobs)

    def write_both(name: str) -> None:  # the weights last of what can fail, and the text takes its name after them
        Path(name).write_text(text, encoding="utf-8")
        write_weights()

    if prototxt_file is None:
        write_weights()
    else:
        write_whole(Path(prototxt_file), write_both)


def _check_targets(
    prototxt_file: str | os.PathLike[str] | None, caffemodel_file: str | os.PathLike[str] | None
) -> None:
    """Nothing is written where one of two files could not be, or where they were given in the wrong order."""
    given = {name: Path(path) for name, path in (("prototxt", prototxt_file), ("caffemodel", caffemodel_file)) if path}
    for name, path in given.items():
        if path.suffix in (".prototxt", ".caffemodel") and path.suffix != f".{name}":
            raise ValueError(f"save: the {name} would be {path}; the order is net, prototxt, caffemodel")
        if path.is_dir():
            raise IsADirectoryError(f"{path}: is a folder, the name of the {name} was expected")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if len({path.resolve() for path in given.values()}) < len(given):
        raise ValueError(f"save: prototxt and caffemodel are both {given['prototxt']}; they are two files")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
