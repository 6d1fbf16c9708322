"""Save and load training checkpoints: one safetensors file, written whole or not at all; no code in it is run.

Weights alone, of any origin, are `resnet_fast.models.checkpoint`'s affair; what a run keeps is decided by its loop.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fast._files import write_whole
from resnet_fast.models.checkpoint import TRAINING_FORMAT, one_line, open_safetensors

MAX_BYTES = 16 * 2**30
"""Larger files are refused, in both directions. The largest of the ten ResNets with Adam and an average has 2 GB."""

MAX_STATE_BYTES = 32 * 2**20
"""The same limit for everything but tensors, as JSON."""

_FORMAT = TRAINING_FORMAT
_VERSION = "1"
_TAG = "$"
_RIGHT = "a checkpoint written by resnet_fast.training.checkpoint.save was expected"


@dataclass(frozen=True)
class Checkpoint:
    """The arguments of `save`, with tensors on the CPU and contiguous.

    Attributes:
        model: for `load_state_dict`. Tied tensors are one tensor under several names.
        optimizer: for the optimizer's `load_state_dict`, which may go on to use (and change) these very tensors.
        state, tensors, about: as given to `save`.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    about: dict[str, str]


def save(
    path: str | os.PathLike[str],
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint to ``path``, whose folder must exist; readers and crashes find the old file or the new one.

    In the file tensors are called ``model/<name>``, ``optimizer/<parameter>/<name>`` and ``tensors/<name>``; the rest
    is JSON in the file's metadata. Values, shapes and dtypes are kept, strides are not (a channels_last parameter comes
    back contiguous).

    Args:
        model: a module's `state_dict()`. optimizer: an optimizer's `state_dict()`, or {} for none.
        state: epoch, step, arguments, scheduler, scaler: None, bool, int, float, str, tensors, and lists, tuples and
            dicts (keys str or int) of these. They come back as they were, infinities included.
        tensors: further tensors, such as the states of random generators or a moving average.
        about: what the model is, as further metadata of the file: `arch`, `classes` and so on.

    Raises:
        TypeError: for a value of another type, with its position.
        ValueError: for a tensor without dense data, or more than MAX_BYTES.
        OSError: if the file cannot be written.
    """
    writer = _Writer()
    for name, tensor in model.items():
        writer.add(f"model/{name}", tensor)
    for name, tensor in (tensors or {}).items():
        writer.add(f"tensors/{name}", tensor)
    if optimizer and not ("state" in optimizer and "param_groups" in optimizer):
        raise TypeError("checkpoint: optimizer must be an optimizer's state_dict() or {}")
    parts = dict(optimizer)
    encoded = {
        "optimizer": {
            **{key: writer.encode(value, f"optimizer/{key}") for key, value in parts.items() if key != "state"},
            **({"state": writer.encode(parts["state"], "optimizer")} if parts else {}),
        },
        "state": writer.encode(dict(state), "state"),
    }
    content = json.dumps({**encoded, "aliases": writer.aliases}, allow_nan=False, separators=(",", ":"))
    if len(content) > MAX_STATE_BYTES:
        raise ValueError(
            f"checkpoint: state has {len(content):,} bytes as JSON, at most {MAX_STATE_BYTES:,} are kept; "
            "put what is large into tensors"
        )
    if (size := sum(tensor.nbytes for tensor in writer.tensors.values())) > MAX_BYTES:
        raise ValueError(f"checkpoint: {size:,} bytes of tensors, the limit is {MAX_BYTES:,}")
    own = {"format": _FORMAT, "version": _VERSION, "content": content}
    return _write(Path(path), writer.tensors, {**(about or {}), **own})


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the checkpoint at ``path``. Nothing in the file is executed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, foreign or damaged; names the path and what would be right.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not path.is_file():
        raise ValueError(f"{path}: not a file; {_RIGHT}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path}: {size:,} bytes, a checkpoint has at most {MAX_BYTES:,}")
    tensors, metadata = _read(path)
    if metadata.get("version") != _VERSION:
        raise ValueError(f"{path}: checkpoint version {metadata.get('version')!r}, this package reads {_VERSION!r}")
    try:
        content = _parse(metadata.get("content", ""))
        for name, same in content["aliases"].items():
            tensors[name] = tensors[same]
        decoded = {part: _decode(content[part], tensors) for part in ("optimizer", "state")}
        optimizer, state = _checked_optimizer(decoded["optimizer"]), decoded["state"]
        if not isinstance(state, dict):
            raise _Damaged(f"state is a {type(state).__name__}")
    except _Damaged as error:
        raise ValueError(f"{path}: damaged: {error}; {_RIGHT}") from None
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: damaged: {type(error).__name__}: {one_line(error)}; {_RIGHT}") from None
    return Checkpoint(_under("model/", tensors), optimizer, state, _under("tensors/", tensors), _without_own(metadata))


def read_about(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the `about` of a checkpoint without reading its tensors.

    Raises:
        ValueError: if it is not a checkpoint.
    """
    return _without_own(_read(Path(path), tensors=False)[1])


def _without_own(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in metadata.items() if name not in ("format", "version", "content")}


class _Damaged(ValueError):
    """Raised with what is wrong with a file, without its name."""


class _Writer:
    """Return the tensors by name; one that shares an earlier one's memory is stored as its alias."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self._seen: dict[tuple[Any, ...], str] = {}
        self._pointers: set[int] = set()

    def add(self, name: str, tensor: Any) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"checkpoint: {name} is a {type(tensor).__name__}, a tensor was expected")
        if name in self.tensors or name in self.aliases:
            raise ValueError(f"checkpoint: there are two tensors {name!r}")
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            kind = "a meta" if tensor.is_meta else "a quantized" if tensor.is_quantized else f"a {tensor.layout}"
            raise ValueError(f"checkpoint: {name} is {kind} tensor, a dense one was expected")
        same = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(),
                tensor.is_neg())  # fmt: skip
        if tensor.numel() and same in self._seen:
            self.aliases[name] = self._seen[same]
            return
        self._seen[same] = name
        data = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        # Views of one storage that are not aliases are written as if each had its own.
        if data.untyped_storage().nbytes() != data.nbytes or data.data_ptr() in self._pointers:
            data = data.clone()
        self._pointers.add(data.data_ptr())
        self.tensors[name] = data

    def encode(self, value: Any, where: str) -> Any:
        """Return ``value`` in JSON's types; other types become a dict with the key "$"."""
        if isinstance(value, Tensor):
            self.add(where, value)
            return {_TAG: "tensor", "v": where}
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return str(value)
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {_TAG: "float", "v": repr(float(value))}
        if isinstance(value, list | tuple):
            items = [self.encode(item, f"{where}/{index}") for index, item in enumerate(value)]
            return items if isinstance(value, list) else {_TAG: "tuple", "v": items}
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str | int) or isinstance(key, bool):
                    raise TypeError(f"checkpoint: {where} has the key {key!r}, a str or an int was expected")
            encoded = [(key, self.encode(item, f"{where}/{key}")) for key, item in value.items()]
            plain = _TAG not in value and all(isinstance(key, str) for key in value)
            return dict(encoded) if plain else {_TAG: "items", "v": [list(pair) for pair in encoded]}
        raise TypeError(
            f"checkpoint: {where} is a {type(value).__name__}; "
            "None, bool, int, float, str, tensors, and list, tuple and dict of these can be kept"
        )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _decode(item, tensors) for key, item in value.items()}
    kind, inner = value[_TAG], value.get("v")
    if kind == "tensor" and isinstance(inner, str) and inner in tensors:
        return tensors[inner]
    if kind == "float" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if kind == "tuple" and isinstance(inner, list):
        return tuple(_decode(item, tensors) for item in inner)
    if kind == "items" and isinstance(inner, list):
        pairs = [(key, _decode(item, tensors)) for key, item in inner]
        if all(isinstance(key, str | int) for key, _ in pairs):
            return dict(pairs)
    raise _Damaged(f"{str(kind)[:40]!r} {str(inner)[:80]!r} is not a value of a checkpoint")


def _parse(text: str) -> dict[str, Any]:
    if len(text) > MAX_STATE_BYTES:
        raise _Damaged(f"{len(text):,} bytes of JSON, at most {MAX_STATE_BYTES:,} were expected")
    content = json.loads(text)
    if not isinstance(content, dict) or not {"optimizer", "state", "aliases"} <= content.keys():
        raise _Damaged("its metadata lacks optimizer, state or aliases")
    return content


def _checked_optimizer(optimizer: Any) -> dict[str, Any]:
    """Return ``optimizer`` if it is empty or has the form of an optimizer's state_dict; raise otherwise."""
    if optimizer == {}:
        return {}
    if not isinstance(optimizer, dict):
        raise _Damaged(f"optimizer is a {type(optimizer).__name__}")
    state, groups = optimizer.get("state"), optimizer.get("param_groups")
    if not isinstance(state, dict) or not all(isinstance(value, dict) for value in state.values()):
        raise _Damaged("optimizer's state is not a dict of dicts")
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise _Damaged("optimizer's param_groups is not a list of dicts with params")
    return optimizer


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def write_model(
    path: str | os.PathLike[str], model: Mapping[str, Tensor], about: Mapping[str, str] | None = None
) -> Path:
    """Write parameters and buffers alone, atomically: a file for ``weights=``, or for ``load_state_dict``.

    Args:
        model: a ``state_dict()``. about: the file's metadata.
    """
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.items()}
    return _write(Path(path), state, dict(about or {}))


def check_folder(folder: Path) -> None:
    """Create ``folder`` and check that a file can be written there, before hours of training.

    Raises:
        ValueError: it is a file, or cannot be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out is {folder}, a file; it must be a folder, or not exist yet")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out is {folder}, which cannot be written to ({error.strerror}); give another") from error


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError

    try:
        with open_safetensors(path) as file:
            metadata: dict[str, str] = file.metadata() or {}
            ours = metadata.get("format") == _FORMAT
            names = file.keys() if ours and tensors else ()
            # Copies: the file is mapped, and may be replaced or cut while its tensors are in use.
            found = {name: file.get_tensor(name).clone() for name in names}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or one_line(error)}); {_RIGHT}") from error
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({one_line(error)}); {_RIGHT}") from error
    if not ours:
        raise ValueError(f"{path}: a safetensors file, but not a training checkpoint; {_RIGHT}")
    return found, metadata


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    from safetensors.torch import save_file

    return write_whole(path, lambda name: save_file(tensors, name, metadata=metadata))
