"""Read checkpoint files without running any code they contain, and load them completely or not at all.

Knows nothing of URLs or of particular weights; that is `resnet_fast.models.weights`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resnet_fast._files import write_whole
from resnet_fast.models import folder, layouts, torchfile

if TYPE_CHECKING:
    from safetensors import safe_open

__all__ = [
    "MAX_CHECKPOINT_BYTES",
    "MAX_METADATA_CHARACTERS",
    "TRAINING_FORMAT",
    "WeightsError",
    "file_and_part",
    "file_format",
    "load_into",
    "open_safetensors",
    "read_checkpoint",
    "read_with_metadata",
    "save_torch",
    "state_of",
    "with_metadata",
]

MAX_CHECKPOINT_BYTES = 4 * 2**30
"""Larger files are refused unread. The largest of the ten models has 0.5 GB of float32 parameters."""

MAX_METADATA_CHARACTERS = 32 * 2**20
"""Larger metadata is refused. A pickle can name one string many times, so the file itself may be much smaller."""

TRAINING_FORMAT = "resnet_fast checkpoint"
"""The format's name in the metadata of `resnet_fast.training.checkpoint`'s files."""

_METADATA = "resnet_fast"
_SHOWN = 3
_OPENINGS = 100


class WeightsError(RuntimeError):
    """Raised for weights that cannot be downloaded, read or loaded. The message is one line."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of anything `torch.save` wrote, by name, on the CPU.

    A file's content decides its format, not its suffix. A ResNet is found under any dictionaries and prefixes
    (`{"state_dict": {"module.conv1.weight": ...}}`) and returned under torchvision's names; names of Hugging Face
    transformers, pretrainedmodels and OpenMMLab are translated. Optimizers, arguments and anything else that a training
    script saved are not read. If the file also has an average of the network, the network itself is returned, with a
    warning.

    Args:
        path: of the file; `FILE:PART` selects one of several networks, such as `last.pth:model_ema`.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if it is too large, truncated, not a checkpoint, holds several networks, or no tensors by name.

    Examples:
        >>> import torch
        >>> import resnet_fast as rf
        >>> torch.save({"epoch": 3, "state_dict": rf.resnet18().state_dict()}, "last.pth")
        >>> rf.models.read_checkpoint("last.pth")["fc.weight"].shape
        torch.Size([1000, 512])
    """
    return read_with_metadata(path)[0]


def read_with_metadata(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what `read_checkpoint` returns, and the file's metadata.

    That is the metadata of a safetensors file, or what `with_metadata` gave a state_dict; empty for other files. The
    configuration of timm or transformers next to a file adds what it says of architecture, classes and preprocessing.

    Raises:
        FileNotFoundError, WeightsError: as `read_checkpoint`; also for longer metadata than
            MAX_METADATA_CHARACTERS.
    """
    path, part = file_and_part(Path(path))
    if path.is_dir():  # as timm and transformers save
        names = folder.WEIGHT_FILES
        found = next((one for name in names if (one := path / name).is_file()), None)
        if found is None:
            raise WeightsError(f"{path}: a weights file was expected, this is a directory without {' or '.join(names)}")
        path = found
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such weights file")
    if not path.is_file():
        raise WeightsError(f"{path}: a weights file was expected, this is a device")
    size = path.stat().st_size
    if size == 0:
        raise WeightsError(f"{path}: the file is empty")
    _check_size(path, size)
    with _opened(path) as file:
        entries, metadata = _chosen(path, file, part)
        metadata |= file.metadata
        _check_metadata(path, metadata)
        state = {name: file.tensor(entry) for name, entry in entries.items()}
    return state, metadata


def state_of(content: Mapping[Any, Any], *, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what `read_with_metadata` returns, of a file's content that is in memory already: nested dictionaries.

    name: for the errors.
    """
    held = _File(
        dict(content),
        {},
        lambda leaf: isinstance(leaf, Tensor),
        lambda one, other: one.shape == other.shape and bool(torch.equal(one, other)),
        lambda leaf: leaf.detach(),
    )
    entries, metadata = _chosen(Path(name), held, None)
    _check_metadata(Path(name), metadata)
    return {key: held.tensor(entry) for key, entry in entries.items()}, metadata


def file_format(path: Path) -> str:
    """Return a file's format by its first bytes: "torch" (a zip file or a pickle), "safetensors", "hdf5" or "other"."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < 2**32:  # the length of a header in JSON, and that
        return "safetensors"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "torch"
    return "hdf5" if start.startswith(b"\x89HDF") else "other"


def file_and_part(path: Path) -> tuple[Path, str | None]:
    """Split `FILE:PART`, unless a file has this very name."""
    head, colon, part = str(path).rpartition(":")
    return (Path(head), part) if colon and not path.exists() and Path(head).is_file() else (path, None)


def with_metadata(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> OrderedDict[str, Tensor]:
    """Return a state_dict for `torch.save` with metadata for `read_checkpoint`; other readers see only the tensors.

    torch keeps versions of modules in the attribute `_metadata` of a state_dict, and keys that it does not know.
    Copying the dictionary, or loading it into a module, loses the text.
    """
    state = OrderedDict(tensors)
    if metadata:
        state._metadata = OrderedDict({"": {_METADATA: dict(metadata)}})  # type: ignore[attr-defined]
    return state


def open_safetensors(path: Path) -> safe_open:
    """Open a safetensors file that may be replaced meanwhile, so that header and data belong to the same file.

    `safe_open` opens the name twice, for the header and for the data, and so can mix two files.

    Raises:
        OSError: if the file cannot be opened, or is another one each time. SafetensorError, RuntimeError: if it is no
            such file.
    """
    from safetensors import SafetensorError, safe_open

    for _ in range(_OPENINGS):
        with path.open("rb") as before:  # while it is open its identity cannot become another file's
            failure: Exception | None = None
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError, ValueError, RuntimeError) as error:
                failure = error
            with path.open("rb") as after:
                same = os.path.sameopenfile(before.fileno(), after.fileno())
            if same and failure is not None:
                raise failure
            if same:
                return file
    raise OSError(f"replaced by another file each of the {_OPENINGS} times it was opened")


def load_into(model: nn.Module, state: Mapping[str, Tensor], *, source: str, name: str, assign: bool = False) -> None:
    """Copy `state` into `model` after checking every key, shape and dtype, so an error changes nothing.

    BatchNorm's `num_batches_tracked` counters may be missing or left over: old files and frozen BatchNorm lack them.

    Args:
        source, name: of the file and the model, for the error.
        assign: make the tensors the model's own, in their dtype, instead of copying; for models without data.

    Raises:
        WeightsError: listing what is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state and not _is_counter(key)]
    unexpected = [key for key in state if key not in own and not _is_counter(key)]
    common = [key for key in own if key in state]
    shapes = [
        f"{key}: {list(state[key].shape)} in the file, {list(own[key].shape)} in the model"
        for key in common
        if state[key].shape != own[key].shape
    ]
    dtypes = [f"{key}: {state[key].dtype}" for key in common if not _can_copy(state[key], own[key])]
    problems = [
        *_problem(missing, "missing"),
        *_problem(unexpected, "unexpected"),
        *_problem(shapes, "of another shape"),
        *_problem(dtypes, "of an unusable dtype or layout"),
    ]
    if problems:
        whose = layouts.whose(state)
        hint = f"; its names are {whose}" if whose else ""
        raise WeightsError(f"{source} does not fit {name} with {len(own)} entries{hint}: {'; '.join(problems)}")
    model.load_state_dict(dict(state), strict=False, assign=assign)


def save_torch(path: Path, content: Any) -> Path:
    """Call `torch.save`, writing the file whole or not at all, with an error that names the cause.

    Raises:
        OSError: as `write_whole`.
    """

    def write(name: str) -> None:
        with open(name, "wb") as file:  # of a file that torch opens itself it does not say what the system said
            torch.save(content, file)

    return write_whole(path, write)


def _problem(entries: list[str], what: str) -> Iterator[str]:
    if entries:
        more = ", ..." if len(entries) > _SHOWN else ""
        yield f"{len(entries)} {what} ({', '.join(map(readable, entries[:_SHOWN]))}{more})"


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _can_copy(source: Tensor, target: Tensor) -> bool:
    if source.is_meta or source.is_quantized or source.layout != torch.strided:
        return False
    return source.is_floating_point() or not target.is_floating_point()


def _check_size(path: Path, size: int) -> None:
    if size > MAX_CHECKPOINT_BYTES:
        raise WeightsError(
            f"{path}: refused: {size:,} bytes, more than the limit of {MAX_CHECKPOINT_BYTES:,} "
            "(resnet_fast.models.checkpoint.MAX_CHECKPOINT_BYTES)"
        )


@dataclass(frozen=True)
class _Stored:
    """A tensor of a safetensors file."""

    name: str


@dataclass(frozen=True)
class _File:
    """An open file of either kind: nested dictionaries, and a function that turns their leaves into tensors."""

    content: Any
    metadata: dict[str, str]
    is_tensor: Callable[[Any], bool]
    same: Callable[[Any, Any], bool]
    tensor: Callable[[Any], Tensor]


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    form = file_format(path)
    if form == "hdf5":
        raise WeightsError(f"{path}: an HDF5 file; safetensors, or what torch.save wrote, was expected")
    if form == "safetensors" or (form == "other" and path.suffix == ".safetensors"):
        try:
            from safetensors import SafetensorError
        except ImportError as error:
            raise WeightsError(f"{path}: reading safetensors needs the package safetensors: {error}") from error
        failures: tuple[type[Exception], ...] = (SafetensorError, ValueError, RuntimeError)
        opening, what = _safetensors(path), "truncated or not a safetensors file (%s)"
    else:
        failures, what = (torchfile.NotATorchFile,), "%s"
        opening = _torch(path)
    try:
        with opening as file:
            yield file
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from error
    except WeightsError:
        raise
    except failures as error:
        raise WeightsError(f"{path}: {what.replace('%s', one_line(error))}") from error


@contextmanager
def _torch(path: Path) -> Iterator[_File]:
    with torchfile.open_torch(path, lambda size: _check_size(path, size)) as file:
        yield _File(file.content, {}, file.is_tensor, file.same, file.tensor)


@contextmanager
def _safetensors(path: Path) -> Iterator[_File]:
    with open_safetensors(path) as file:
        metadata: dict[str, str] = file.metadata() or {}
        names = {name: _Stored(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        content: dict[str, Any] = dict(names)
        if metadata.get("format") == TRAINING_FORMAT:
            parts = ("model", "tensors")
            content = {
                part: {name.removeprefix(f"{part}/"): of for name, of in names.items() if name.startswith(f"{part}/")}
                for part in parts
            }
            metadata = {key: text for key, text in metadata.items() if key not in ("format", "version", "content")}
        yield _File(
            content,
            metadata,
            lambda leaf: isinstance(leaf, _Stored),
            lambda one, other: bool(one == other),
            lambda leaf: file.get_tensor(leaf.name),
        )


# A file may give a dictionary attributes with the names of methods: what follows calls the methods of dict itself.


def _chosen(path: Path, file: _File, part: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Return names and leaves of the network in the file or, if there is none, of its tensors; and their metadata."""

    def same(one: layouts.Network, other: layouts.Network) -> bool:
        names = one.entries.keys()
        return names == other.entries.keys() and all(file.same(one.entries[k], other.entries[k]) for k in names)

    try:
        found = layouts.networks(file.content, file.is_tensor)
        if not found:
            holder = _tensors_alone(path, file, part)
            return _state_dict(path, file, holder), _metadata_of(holder)
        network, remark = layouts.choose(found, part, same)
    except layouts.Unclear as error:
        raise WeightsError(f"{path}: {readable(error, 600)}") from error
    if remark is not None:
        warnings.warn(f"{path}: {readable(remark, 600)}", stacklevel=2)
    metadata = _metadata_of(network.holder)
    try:
        metadata |= folder.metadata_of(path, network.transformers)
    except folder.Unfit as error:
        raise WeightsError(f"{path}: refused: {error}") from error
    if not network.transformers:
        metadata |= _Told(path, file.content).by_others(network)
    return _state_dict(path, file, network.entries), metadata


@dataclass(frozen=True)
class _Told:
    """What a file says of its network besides names and shapes, which some other networks share with the ten."""

    path: Path
    content: Any

    def by_others(self, network: layouts.Network) -> dict[str, str]:
        """Return the position of the strides, by OpenMMLab's configuration in the file.

        Raises:
            WeightsError: if timm's `arch` is one with anti-aliased convolutions.
        """
        arch = self._text("arch")
        if re.match(r"(?:resnet|seresnet|ecaresnet)(?:blur|aa)", arch):
            raise WeightsError(
                f"{self.path}: refused: its weights are of {arch[:40]!r}, whose anti-aliasing none of the ten ResNets "
                "has; they would load, and give other answers"
            )
        told = self._text("meta", "cfg") or self._text("meta", "config")
        caffe = network.place.endswith("backbone") and re.search(r"\bstyle\W{1,4}caffe\b", told)
        return {"stride_in_1x1": "true"} if caffe else {}

    def _text(self, *keys: str) -> str:
        found = self.content
        for key in keys:
            found = dict.get(found, key) if isinstance(found, dict) else None
        return found if isinstance(found, str) else ""


def _tensors_alone(path: Path, file: _File, part: str | None) -> Any:
    """Return the dictionary of tensors in a file without a ResNet: the whole content, or the only one inside."""
    holders = [
        (keys, holder)
        for keys, holder in layouts.dictionaries(file.content)
        if any(file.is_tensor(value) for value in dict.values(holder)) and (part is None or ".".join(keys) == part)
    ]
    if part is not None and not holders:
        raise WeightsError(f"{path}: has no tensors under {part!r}")
    wrapped = [holder for keys, holder in holders if keys in (("state_dict",), ("model",))]
    if wrapped or len(holders) == 1:
        return (wrapped or [holders[0][1]])[0]
    if not holders or not holders[0][0]:
        return file.content
    places = [readable(".".join(keys)) for keys, _ in holders[:_SHOWN]]
    raise WeightsError(
        f"{path}: holds tensors in {len(holders)} places ({', '.join(map(repr, places))}, ...); say which by "
        f"FILE:{places[0]}"
    )


def _metadata_of(state: Any) -> dict[str, str]:
    """Return what `with_metadata` stored; it comes from a file, so any value may be of any type."""
    found = state.state if isinstance(state, torchfile.Made) else None
    for key in ("_metadata", "", _METADATA):
        found = dict.get(found, key) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not all(isinstance(part, str) for item in dict.items(found) for part in item):
        return {}
    return dict(dict.items(found))


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    if (size := sum(len(part) for item in metadata.items() for part in item)) > MAX_METADATA_CHARACTERS:
        raise WeightsError(
            f"{path}: refused: {size:,} characters of metadata, more than the limit of {MAX_METADATA_CHARACTERS:,} "
            "(resnet_fast.models.checkpoint.MAX_METADATA_CHARACTERS)"
        )
    try:
        for item in metadata.items():
            "".join(item).encode()
    except UnicodeEncodeError as error:
        raise WeightsError(f"{path}: damaged: its metadata is not text ({error.reason})") from error


def _state_dict(path: Path, file: _File, content: Any) -> dict[str, Any]:
    """Return the leaves by name, if all are tensors."""
    if not isinstance(content, dict) or (isinstance(content, torchfile.Made) and not content.is_dictionary):
        raise WeightsError(_not_tensors(path, content))
    if content and all(isinstance(key, str) and key.startswith("module.") for key in dict.keys(content)):
        content = {key.removeprefix("module."): value for key, value in dict.items(content)}
    state: dict[str, Any] = {}
    for key, value in dict.items(content):
        if not isinstance(key, str) or not file.is_tensor(value):
            raise WeightsError(_not_tensors(path, value, f"entry {str(key)[:80]!r}"))
        name = layouts.without_wrappers(key)
        if name in state:
            raise WeightsError(f"{path}: has {readable(name)!r} twice, with and without a prefix")
        state[name] = value
    if not state:
        raise WeightsError(f"{path}: holds no tensors")
    return state


def _not_tensors(path: Path, value: Any, where: str = "") -> str:
    if isinstance(value, torchfile.Made) and not value.is_dictionary:
        kind = f"{where} is a {readable(value.maker)}" if where else readable(value.maker)
        return f"{path}: refused: contains code, not just tensors ({kind}); save the state_dict alone"
    kind = type(value).__name__ if not isinstance(value, torchfile.Made) else "dict"
    return f"{path}: {f'{where} is' if where else 'holds'} a {kind}, a dictionary of tensors by name was expected"


def one_line(error: BaseException) -> str:
    """Return the error's text without line breaks, cut to a readable length."""
    return readable(error) or type(error).__name__


def readable(text: object, limit: int = 200) -> str:
    """Return a text from a file on one line, cut to `limit` characters, unprintable ones escaped."""
    shown = " ".join(str(text).split())
    shown = shown if len(shown) <= limit else shown[: limit - 3] + "..."
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in shown)
