"""Checkpoint files: read without running any code they contain, and loaded completely or not at all.

Knows nothing of URLs or of particular weights; that is `resnet_fast.models.weights`.
"""

from __future__ import annotations

import os
import pickletools
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from safetensors import safe_open

__all__ = [
    "MAX_CHECKPOINT_BYTES",
    "MAX_METADATA_CHARACTERS",
    "WeightsError",
    "load_into",
    "open_safetensors",
    "read_checkpoint",
    "read_with_metadata",
    "with_metadata",
    "write_whole",
]

MAX_CHECKPOINT_BYTES = 4 * 2**30
"""Larger files are refused before they are read. The largest of the ten models has 0.5 GB of float32 parameters."""

MAX_METADATA_CHARACTERS = 32 * 2**20
"""More text in a file's metadata is refused. A pickle says it shorter than it is, by naming one string many times."""

_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_METADATA = "resnet_fast"
_SHOWN = 3
_OPENINGS = 100


class WeightsError(RuntimeError):
    """Weights that cannot be had, read, or loaded. The message is one line."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of anything `torch.save` wrote, by name, on the CPU.

    `{"state_dict": ...}` and `{"model": ...}` are unwrapped; the prefixes `module.` (DataParallel, DDP) and
    `_orig_mod.` (torch.compile) are removed.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if it is too large, truncated, no checkpoint, or holds anything but tensors.
    """
    return read_with_metadata(path)[0]


def read_with_metadata(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `read_checkpoint` gives, and what the file says of it.

    That is the metadata of a `.safetensors` file, or what `with_metadata` gave a state_dict; empty for other files.

    Raises:
        FileNotFoundError, WeightsError: as `read_checkpoint`; also for longer metadata than
            MAX_METADATA_CHARACTERS.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such weights file")
    if not path.is_file():
        raise WeightsError(f"{path}: a weights file was expected, this is a directory or device")
    size = path.stat().st_size
    if size == 0:
        raise WeightsError(f"{path}: the file is empty")
    _check_size(path, size)
    if path.suffix == ".safetensors":
        content, metadata = _read_safetensors(path)
    else:
        content = _unwrapped(_read_torch(path))
        metadata = _metadata_of(content)
    _check_metadata(path, metadata)
    return _state_dict(path, content), metadata


def with_metadata(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> OrderedDict[str, Tensor]:
    """A state_dict for `torch.save` that carries text about itself, for `read_checkpoint`; others see tensors alone.

    torch keeps versions of modules in the attribute `_metadata` of a state_dict, and keys that it does not know.
    Copying the dictionary, or loading it into a module, loses the text.
    """
    state = OrderedDict(tensors)
    if metadata:
        state._metadata = OrderedDict({"": {_METADATA: dict(metadata)}})  # type: ignore[attr-defined]
    return state


def open_safetensors(path: Path) -> safe_open:
    """`safetensors.safe_open` of a file that others may replace, by renaming another: header and data of the same one.

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
    """Copies `state` into `model` after checking every key, shape and dtype, so an error changes nothing.

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
        raise WeightsError(f"{source} does not fit {name} with {len(own)} entries: {'; '.join(problems)}")
    model.load_state_dict(dict(state), strict=False, assign=assign)


def write_whole(path: Path, write: Callable[[str], object]) -> Path:
    """Writes a file whole or not at all: `write` is given a temporary name beside `path`, which it becomes.

    Raises:
        OSError: if there is no such folder, or the file cannot be written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, the name of a file was expected")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(descriptor)
    try:
        write(name)
        os.chmod(name, 0o666 & ~_umask())
        _sync(name, os.O_RDWR)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name itself; elsewhere a folder cannot be opened
        _sync(path.parent, os.O_RDONLY)
    return path


def _sync(path: str | os.PathLike[str], flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _problem(entries: list[str], what: str) -> Iterator[str]:
    if entries:
        more = ", ..." if len(entries) > _SHOWN else ""
        yield f"{len(entries)} {what} ({', '.join(entries[:_SHOWN])}{more})"


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


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        from safetensors import SafetensorError
    except ImportError as error:
        raise WeightsError(f"{path}: reading safetensors needs the package safetensors: {error}") from error
    try:
        with open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from error
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path}: truncated or not a safetensors file ({one_line(error)})") from error


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        looks_like_zip = file.read(4) == b"PK\x03\x04"
    if looks_like_zip:
        # The directory of a zip file is at its end.
        if not zipfile.is_zipfile(path):
            raise WeightsError(f"{path}: the file is truncated")
        with zipfile.ZipFile(path) as archive:
            _check_size(path, sum(entry.file_size for entry in archive.infolist()))
            if any(entry.filename.endswith("/constants.pkl") for entry in archive.infolist()):
                raise WeightsError(f"{path}: refused: contains code, not just tensors (a TorchScript archive)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols of files that are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch.load has no common error: KeyError for a text file, EOFError, OSError, ...
        foreign = _foreign_globals(path, looks_like_zip)
        if foreign:
            shown = ", ".join(foreign[:_SHOWN])
            raise WeightsError(
                f"{path}: refused: contains code, not just tensors ({shown}); save the state_dict alone"
            ) from error
        if isinstance(error, EOFError) or "EOF" in str(error):
            raise WeightsError(f"{path}: the file is truncated") from error
        raise WeightsError(f"{path}: damaged, or not a PyTorch checkpoint ({type(error).__name__})") from error


def _foreign_globals(path: Path, is_zip: bool) -> list[str]:
    """Names of what unpickling would import, other than torch's own tensor classes. Reads opcodes, executes none."""
    found: dict[str, None] = {}
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                for entry in archive.namelist():
                    if entry.endswith("/data.pkl"):
                        found.update(dict.fromkeys(_globals(archive.read(entry))))
        else:
            with path.open("rb") as file:
                while True:  # the old format is several pickles, one after the other
                    found.update(dict.fromkeys(_globals(file)))
    except Exception:  # the end of the pickles or a damaged file: what was found until here counts
        pass
    return [name for name in found if not _is_tensor_part(name)]


def _is_tensor_part(name: str) -> bool:
    return name.startswith("torch._utils.") or name.endswith("Storage") or name == "collections.OrderedDict"


def _globals(pickle: Any) -> Iterable[str]:
    memo: list[str] = []
    strings: list[str] = []
    found: list[str] = []
    latest = "?"
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name == "GLOBAL":
                found.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                found.append(".".join(strings[-2:]))
            elif opcode.name == "MEMOIZE":
                memo.append(latest)
            elif opcode.name in ("BINGET", "LONG_BINGET") and int(str(argument)) < len(memo):
                strings.append(memo[int(str(argument))])
            elif isinstance(argument, str):
                strings.append(argument)
            latest = argument if isinstance(argument, str) else "?"
    except Exception:
        if not found:
            raise
    return found


# What follows calls the methods of dict itself: a file may give an OrderedDict attributes with the names of methods.


def _unwrapped(content: Any) -> Any:
    parts = [dict.get(content, key) for key in _WRAPPERS] if isinstance(content, dict) else []
    return next((part for part in parts if isinstance(part, dict)), content)


def _metadata_of(state: Any) -> dict[str, str]:
    """What `with_metadata` noted; of a file, so that everything may be anything."""
    found = getattr(state, "_metadata", None)
    for key in ("", _METADATA):
        found = dict.get(found, key) if isinstance(found, dict) else None
    if type(found) is not dict or not all(isinstance(part, str) for item in found.items() for part in item):
        return {}
    return found


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
        raise WeightsError(f"{path}: damaged: its metadata is no text ({error.reason})") from error


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, a dictionary of tensors by name was expected")
    state: dict[str, Tensor] = {}
    for key, value in dict.items(content):
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{path}: entry {str(key)[:80]!r} is a {type(value).__name__}, a dictionary of tensors by name, alone "
                f"or under {' or '.join(map(repr, _WRAPPERS))}, was expected"
            )
        short = _without_prefixes(key)
        if short in state:
            raise WeightsError(f"{path}: has {short!r} twice, with and without a prefix")
        state[short] = value
    if not state:
        raise WeightsError(f"{path}: holds no tensors")
    return state


def _without_prefixes(key: str) -> str:
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return key


def one_line(error: BaseException) -> str:
    """The error's text without line breaks, cut to a readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
