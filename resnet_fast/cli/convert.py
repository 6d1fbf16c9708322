"""``resnet-fast convert``: convert weights from one kind of file to another, using the readers of other modules."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resnet_fast.cli.common import UserError, as_user_errors, check_output

if TYPE_CHECKING:
    from torch import Tensor

    from resnet_fast.caffe import Net

SUFFIXES = {".caffemodel": "caffemodel", ".safetensors": "safetensors", ".pth": "pth", ".pt": "pth"}

V1 = {"stride_in_1x1": "true", "unpadded_pool": "true"}
"""Metadata of a file with torchvision's keys whose weights are a Caffe ResNet's."""

_HDF5 = "HDF5 is not read or written; Caffe itself writes it again as binary, with snapshot_format: BINARYPROTO"
_CAFFEMODEL = (b"\x0a", b"\x12", b"\x1a", b"\xa2")
"""How a NetParameter begins: with its name, or a layer, or an input."""


class Names(str, enum.Enum):
    """Naming of the tensors in a file."""

    caffe = "caffe"
    torchvision = "torchvision"


@dataclass(frozen=True)
class _Tensors:
    """A file of tensors by name: the tensors, its metadata, and its naming (None if unknown)."""

    path: Path
    state: dict[str, Tensor]
    metadata: dict[str, str]
    names: Names | None


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A caffemodel, a safetensors file, or what torch.save wrote, whatever its suffix. FILE:PART names "
            "one of several networks, e.g. last.pth:model_ema.",
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="A .caffemodel, .safetensors, .pth or .pt file to write.")
    ],
    prototxt: Annotated[
        Path | None,
        typer.Option(
            "--prototxt",
            "-p",
            metavar="FILE",
            help="Definition of the caffemodel, or of a file with Caffe's names that holds none.",
        ),
    ] = None,
    to: Annotated[
        Names | None,
        typer.Option(
            "--to",
            help="Names in TARGET: Caffe's, bit for bit (the default), or torchvision's, for the published ResNets.",
        ),
    ] = None,
    v1: Annotated[
        bool,
        typer.Option(
            "--v1",
            help="Declare that a file with torchvision's names is of a network with the stride in the first 1x1 and an "
            "unpadded pool, which the names do not show; torchvision's own weights are of another.",
        ),
    ] = False,
    write_prototxt: Annotated[
        Path | None,
        typer.Option("--write-prototxt", metavar="FILE", help="Also write the definition of a caffemodel to FILE."),
    ] = None,
) -> None:
    """Convert weights between Caffe's .caffemodel, .safetensors and .pth.

    The metadata of .safetensors and .pth files keeps what converting back needs.
    """
    from resnet_fast.models.checkpoint import file_and_part

    file = file_and_part(source)[0]
    kinds = [_kind_of_source(file), _kind_of_target(target)]
    check_output(target)
    check_output(write_prototxt)
    _check_apart(file, target, prototxt, write_prototxt)
    if "caffemodel" not in kinds:
        _refuse(prototxt is not None, "--prototxt", "a caffemodel", kinds)
        _refuse(to is not None, "--to", "a caffemodel as SOURCE", kinds)
    if kinds[1] == "caffemodel":
        _refuse(to is not None, "--to", "a .safetensors or .pth file as TARGET", kinds)
    else:
        _refuse(write_prototxt is not None, "--write-prototxt", "a caffemodel as TARGET", kinds)
    if v1 and (kinds[0] == "caffemodel" or kinds[1] != "caffemodel"):
        raise UserError("--v1 belongs to torchvision's names on their way to a caffemodel")

    found = None if kinds[0] == "caffemodel" else _read(source)
    if found is not None and kinds[1] != "caffemodel":
        _write_tensors(target, found.state, found.metadata)
        typer.echo(_summary(target, f"{len(found.state)} tensors"))
        return
    net = _load(source, prototxt) if found is None else _network(found, prototxt, v1)
    if kinds[1] == "caffemodel":
        _write_caffemodel(target, net, write_prototxt)
    else:
        _write_net(target, net, to or Names.caffe)


def _kind_of_source(path: Path) -> str:
    """Return the kind of a file by its content; a caffemodel has no magic number, only likely first bytes."""
    from resnet_fast.models.checkpoint import file_format

    named = SUFFIXES.get(path.suffix.lower())
    if not path.is_file():
        if named is None:
            raise UserError(f"{path}: no such file")
        return named
    with as_user_errors(OSError):
        form = file_format(path)
        with path.open("rb") as file:
            first = file.read(1)
    if form == "hdf5" or path.name.endswith(".caffemodel.h5"):
        raise UserError(f"{path}: {_HDF5}")
    if form != "other":
        return "pth" if form == "torch" else form
    if named is None and first in _CAFFEMODEL:
        return "caffemodel"
    if named is None:
        raise UserError(f"{path}: neither a caffemodel, nor safetensors, nor what torch.save wrote")
    return named


def _kind_of_target(path: Path) -> str:
    if path.name.endswith(".caffemodel.h5"):
        raise UserError(f"{path}: {_HDF5}")
    if (kind := SUFFIXES.get(path.suffix.lower())) is None:
        raise UserError(f"{path}: its suffix says what to write, and must be one of {', '.join(SUFFIXES)}")
    return kind


def _check_apart(source: Path, target: Path, prototxt: Path | None, write_prototxt: Path | None) -> None:
    """Raise UserError if an output file is one of the inputs."""
    read = [path.resolve() for path in (source, prototxt) if path is not None]
    written = [path.resolve() for path in (target, write_prototxt) if path is not None]
    for path in written:
        if path in read or written.count(path) > 1:
            raise UserError(f"{path} would be written over another file of this conversion; give another name")


def _refuse(given: bool, option: str, belongs_to: str, kinds: list[str]) -> None:
    if given:
        raise UserError(f"{option} belongs to {belongs_to}; this conversion is from {kinds[0]} to {kinds[1]}")


# ------------------------------------------------------------------------------------------------------------- reading


def _load(source: Path, prototxt: Path | None) -> Net:
    from resnet_fast import caffe

    if prototxt is None:
        raise UserError(f"{source}: a caffemodel needs its definition; give it with --prototxt FILE")
    with as_user_errors(ValueError, OSError):
        return caffe.load(prototxt, source)


def _read(source: Path) -> _Tensors:
    from resnet_fast.models import checkpoint

    with as_user_errors(checkpoint.WeightsError, OSError, ValueError):
        state, metadata = checkpoint.read_with_metadata(source)
    names = metadata.get("names")
    if names in (Names.caffe.value, Names.torchvision.value):
        return _Tensors(source, state, metadata, Names(names))
    of_torchvision = {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "fc.weight"} <= state.keys()
    return _Tensors(source, state, metadata, Names.torchvision if of_torchvision else None)


def _network(found: _Tensors, prototxt: Path | None, v1: bool) -> Net:
    """Return the Caffe network whose weights a file of tensors holds."""
    if found.names is Names.torchvision:
        if prototxt is not None:
            raise UserError(
                f"{found.path} has torchvision's names, whose definition is known; --prototxt belongs to Caffe's names "
                "(--write-prototxt FILE writes the definition)"
            )
        return _from_torchvision(found, v1)
    if v1:
        raise UserError(f"{found.path}: --v1 belongs to torchvision's names, which this file does not have")
    return _from_caffe(found, prototxt)


def _from_caffe(found: _Tensors, prototxt: Path | None) -> Net:
    import torch

    from resnet_fast import caffe
    from resnet_fast.models.checkpoint import WeightsError, load_into

    text = found.metadata.get("prototxt")
    if prototxt is None and text is None:
        raise UserError(
            f"{found.path}: holds neither torchvision's names nor a definition; give the definition with "
            "--prototxt FILE"
        )
    with as_user_errors(ValueError, OSError):
        if prototxt is not None:
            definition = caffe.read_prototxt(prototxt)
        else:
            definition = caffe.parse_prototxt(text or "", source=f"{found.path}, its prototxt")
        with torch.device("meta"):  # the file may be small, and its definition declare gigabytes
            net = caffe.Net(definition).eval()
    with as_user_errors(WeightsError):
        load_into(net, _widened(found.state), source=str(found.path), name=definition.source, assign=True)
    return net


def _from_torchvision(found: _Tensors, v1: bool) -> Net:
    from resnet_fast import caffe

    told = {name: found.metadata.get(name) for name in V1}
    if "arch" in found.metadata and told != V1:
        raise UserError(
            f"{found.path}: its metadata calls it a {found.metadata['arch']!r} without stride_in_1x1 and "
            "unpadded_pool; a Caffe ResNet has both, and would give other answers with these weights"
        )
    if told != V1 and not v1:
        raise UserError(
            f"{found.path}: torchvision's names do not tell where the stride is. Caffe's ResNets have it in the first "
            "1x1, and an unpadded pool; torchvision's have neither, and their weights would give other answers. If "
            "these are of a network with both (stride_in_1x1=True, unpadded_pool=True), say so with --v1"
        )
    depth = _depth(found.state)
    if depth is None:
        raise UserError(f"{found.path}: its blocks are not those of ResNet-50, 101 or 152, which can be converted")
    with as_user_errors(ValueError):
        return caffe.from_state_dict(_widened(found.state), depth)


def _depth(state: Mapping[str, Any]) -> int | None:
    """Return 50, 101 or 152, by the number of bottlenecks in the four stages."""
    from resnet_fast.caffe.resnet import BLOCKS

    blocks = {key.rsplit(".", 2)[0] for key in state if key.startswith("layer") and key.endswith(".conv3.weight")}
    count = tuple(sum(block.startswith(f"layer{stage}.") for block in blocks) for stage in (1, 2, 3, 4))
    return next((depth for depth, known in BLOCKS.items() if known == count), None)


def _widened(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with all floating point ones in one dtype that holds them exactly, as a caffemodel's are."""
    import torch

    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in state.values()) else torch.float32
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


# ------------------------------------------------------------------------------------------------------------- writing


def _write_tensors(target: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    from resnet_fast.models.checkpoint import save_torch, with_metadata
    from resnet_fast.training.checkpoint import write_model

    with as_user_errors(OSError, ValueError, KeyError, RuntimeError):
        if SUFFIXES[target.suffix.lower()] == "safetensors":
            write_model(target, state, metadata)
        else:
            # Clones, since torch.save writes the whole storage of a view.
            tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
            save_torch(target, with_metadata(tensors, metadata))


def _write_net(target: Path, net: Net, names: Names) -> None:
    from resnet_fast import caffe

    metadata = {"names": names.value}
    if names is Names.caffe:
        state: dict[str, Tensor] = net.state_dict()
        metadata["prototxt"] = caffe.emit_prototxt(net.definition)
    else:
        with as_user_errors(ValueError):
            state = caffe.to_state_dict(net)
        metadata |= {"arch": f"resnet{_depth(state)}", **V1}
    _write_tensors(target, state, metadata)
    of_whom = "Caffe's" if names is Names.caffe else "torchvision's"
    typer.echo(_summary(target, f"{len(state)} tensors of {net.definition.name!r} by {of_whom} names"))
    if names is Names.torchvision:
        classes = len(state["fc.weight"])
        more = "" if classes == 1000 else f", num_classes={classes}"
        typer.echo(
            f"They are for resnet_fast.{metadata['arch']}(stride_in_1x1=True, unpadded_pool=True{more}) and images as "
            "Caffe takes them (BGR, 0 to 255, minus the mean); torchvision's model would give other answers"
        )


def _write_caffemodel(target: Path, net: Net, write_prototxt: Path | None) -> None:
    from resnet_fast import caffe

    with as_user_errors(OSError, ValueError):
        caffe.save(net, write_prototxt, target)
    blobs = len(net.state_dict())
    typer.echo(_summary(target, f"{blobs} blobs of {net.definition.name!r}"))
    if write_prototxt is not None:
        typer.echo(f"{write_prototxt}: its definition, {len(net.definition.layers)} layers")


def _summary(path: Path, content: str) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return f"{path}: {content}, {path.stat().st_size:,} bytes, sha256 {digest.hexdigest()[:16]}"
