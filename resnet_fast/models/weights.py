"""List and download pretrained weights by name, and say what they expect.

If torchvision is installed its weights enums are used, otherwise enums of the same names made from `weights.json`.
torchvision is imported only when weights are asked for, never on import.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from resnet_fast.models import hub
from resnet_fast.models.checkpoint import WeightsError, file_and_part, one_line, read_checkpoint, read_with_metadata
from resnet_fast.models.preprocessing import Preprocessing

__all__ = [
    "WeightsEnum",
    "arch_of",
    "categories",
    "download",
    "get_model_weights",
    "get_weight",
    "named_classes",
    "preprocessing",
    "preprocessing_of",
    "resolve",
]

_FILE_SUFFIXES = (".pth", ".pt", ".safetensors", ".tar", ".bin", ".ckpt")
_CONNECT_SECONDS = 20.0


@dataclass(frozen=True)
class _Entry:
    """One entry of `weights.json`."""

    url: str
    preprocessing: Preprocessing
    num_params: int
    gmacs: float
    file_size_mib: float
    accuracy_at_1: float
    accuracy_at_5: float


class WeightsEnum(Enum):
    """The weights of one model, for machines without torchvision, with the usual attributes of torchvision's enums."""

    @property
    def url(self) -> str:
        entry: _Entry = self.value
        return entry.url

    @property
    def transforms(self) -> Callable[[], Preprocessing]:
        """A function that returns the `Preprocessing` with which these weights were evaluated."""
        entry: _Entry = self.value
        return lambda: entry.preprocessing

    @property
    def meta(self) -> dict[str, Any]:
        entry: _Entry = self.value
        metrics = {"acc@1": entry.accuracy_at_1, "acc@5": entry.accuracy_at_5}
        return {
            "min_size": (1, 1),
            "categories": list(_imagenet_categories()),
            "num_params": entry.num_params,
            "_metrics": {"ImageNet-1K": metrics},
            "_ops": entry.gmacs,
            "_file_size": entry.file_size_mib,
        }

    def get_state_dict(self, progress: bool = True, check_hash: bool = True) -> dict[str, Tensor]:
        """Read the weights, downloaded or from torch.hub's folder. The hash is always checked."""
        return read_checkpoint(download(self.url, progress=progress))

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    __str__ = __repr__


@functools.cache
def _packaged(name: str) -> dict[str, Any]:
    text = resources.files("resnet_fast.models").joinpath(name).read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def _table() -> dict[str, Any]:
    models: dict[str, Any] = _packaged("weights.json")["models"]
    return models


def categories(weights: Enum | str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """Return the names of the classes, in the order of the outputs.

    Args:
        weights: as for `preprocessing`; None for ImageNet-1K's 1000 classes.

    Raises:
        WeightsError: if it is a file that does not name its classes.

    Examples:
        >>> import resnet_fast as rf
        >>> rf.models.categories()[:2]
        ('tench', 'goldfish')
    """
    if weights is None:
        return _imagenet_categories()
    path = _local_file(weights)
    if path is None:
        member: Any = get_weight(weights) if isinstance(weights, str) else weights
        return tuple(member.meta["categories"])
    names = named_classes(read_with_metadata(path)[1])
    if names is None:
        raise WeightsError(f"{path}: does not name its classes, which `resnet-fast train imagenet` does in its files")
    return names


@functools.cache
def _imagenet_categories() -> tuple[str, ...]:
    return tuple(_packaged("imagenet_categories.json")["categories"])


def named_classes(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the classes' names of the key `classes`, a JSON list of strings; None if it is not one."""
    try:
        found = json.loads(metadata.get("classes", "null"))
    except (ValueError, RecursionError):
        return None
    return tuple(found) if isinstance(found, list) and found and all(isinstance(x, str) for x in found) else None


@functools.cache
def _torchvision_models() -> ModuleType | None:
    try:
        return import_module("torchvision.models")
    except Exception:  # a torchvision made for another torch raises RuntimeError: the same as having none
        return None


def enum_names() -> tuple[str, ...]:
    """Return the names of the ten enums, such as `ResNet50_Weights`."""
    return tuple(entry["enum"] for entry in _table().values())


def enum_name(model: str) -> str:
    """Return the name of a model's enum: `ResNet50_Weights` for `resnet50`."""
    name: str = _table()[model]["enum"]
    return name


@functools.cache
def _own_enum(model: str) -> type[WeightsEnum]:
    table = _table()[model]
    members = {
        name: _Entry(
            url=entry["url"],
            preprocessing=Preprocessing(**entry["preprocessing"]),
            num_params=entry["num_params"],
            gmacs=entry["gmacs"],
            file_size_mib=entry["file_size_mib"],
            accuracy_at_1=entry["acc@1"],
            accuracy_at_5=entry["acc@5"],
        )
        for name, entry in table["weights"].items()
    }
    members["DEFAULT"] = members[table["default"]]
    make: Callable[..., type[WeightsEnum]] = WeightsEnum  # type: ignore[assignment]
    return make(table["enum"], members, module="resnet_fast.models")


def get_model_weights(model: str | Callable[..., Any]) -> type[Enum]:
    """Return the weights enum of a model, given by its name or its constructor: torchvision's if that imports.

    Raises:
        ValueError: for an unknown model.

    Examples:
        >>> import resnet_fast as rf
        >>> [weights.name for weights in rf.models.get_model_weights("resnet50")]
        ['IMAGENET1K_V1', 'IMAGENET1K_V2']
    """
    name = model if isinstance(model, str) else getattr(model, "__name__", str(model))
    if name not in _table():
        raise ValueError(f"unknown model {name!r}, expected one of {', '.join(_table())}")
    enum = getattr(_torchvision_models(), _table()[name]["enum"], None)
    return enum if enum is not None else _own_enum(name)


def model_of(enum_name: str) -> str | None:
    """Return `resnet50` for `ResNet50_Weights`; None for anything but an enum's name."""
    return next((model for model, entry in _table().items() if entry["enum"] == enum_name), None)


def get_weight(name: str) -> Enum:
    """Return the enum member of a full name such as `"ResNet50_Weights.IMAGENET1K_V2"`.

    Raises:
        ValueError: if there is no such enum or member.

    Examples:
        >>> import resnet_fast as rf
        >>> rf.models.get_weight("ResNet50_Weights.IMAGENET1K_V2").meta["_metrics"]["ImageNet-1K"]["acc@1"]
        80.858
    """
    enum_name, _, member = name.partition(".")
    model = model_of(enum_name)
    if model is not None:
        return _member(model, member, name)
    if any(name in entry["weights"] for entry in _table().values()):
        raise ValueError(f"{name!r} does not say which model's weights; 'ResNet50_Weights.{name}', for example, does")
    raise ValueError(f"unknown weights {name!r}, expected for example 'ResNet50_Weights.IMAGENET1K_V2'")


def _member(model: str, member: str, given: str) -> Enum:
    enum = get_model_weights(model)
    if member not in enum.__members__:
        raise ValueError(
            f"{model}: unknown weights {given!r}, expected one of {', '.join(enum.__members__)} "
            "or the path of a .pth, .pt or .safetensors file"
        )
    return enum[member]


def resolve(model: str, weights: Any) -> Enum | Path | None:
    """Resolve the argument `weights=` of `model`: a member of its enum, a local file, or None.

    A string that begins with `hf://` is fetched from Hugging Face's hub. Any other is a path if it has a folder or a
    checkpoint's suffix or such a file exists, alone or before `:PART`; otherwise a name.

    Raises:
        ValueError: for a name that the model does not have.
        TypeError: for another model's enum or any other type.
    """
    if weights is None:
        return None
    if isinstance(weights, os.PathLike):
        return Path(weights)
    enum_name = _table()[model]["enum"]
    if isinstance(weights, str):
        if "://" in weights and not weights.startswith(hub.PREFIX):
            raise ValueError(f"{model}: weights is a URL, {weights}; download the file and give its path")
        if (path := _local_file(weights)) is not None:
            return path
        return _member(model, weights.removeprefix(f"{enum_name}."), weights)
    if isinstance(weights, Enum) and type(weights).__name__ == enum_name:
        return weights
    if isinstance(weights, Enum):
        given = f"{type(weights).__name__}.{weights.name}"
        raise TypeError(f"{model}: weights must be a member of {enum_name}, got {given}")
    raise TypeError(
        f"{model}: weights must be None, a member of {enum_name}, a name or a path, got {type(weights).__name__}"
    )


def _local_file(weights: Any) -> Path | None:
    """Return `weights` as a path, downloaded for an address on the hub; None for a name or a member of an enum."""
    if isinstance(weights, os.PathLike):
        return Path(weights)
    if not isinstance(weights, str):
        return None
    if weights.startswith(hub.PREFIX):
        return hub.fetch(weights)
    path = Path(weights).expanduser()
    is_path = os.path.dirname(weights) or weights.endswith(_FILE_SUFFIXES) or file_and_part(path)[0].is_file()
    return path if is_path else None


def legacy_default(model: str) -> Enum:
    """Return the weights of `pretrained=True`."""
    enum = get_model_weights(model)
    if "IMAGENET1K_V1" not in enum.__members__:
        raise ValueError(f"No weights available for model {model}")
    return enum["IMAGENET1K_V1"]


def num_classes(member: Enum) -> int:
    """Return the number of outputs of a model with these weights."""
    meta: dict[str, Any] = member.meta  # type: ignore[attr-defined]
    return len(meta["categories"])


def url(member: Enum) -> str:
    """Return the URL of these weights."""
    return str(member.url)  # type: ignore[attr-defined]


def preprocessing(weights: Enum | str | os.PathLike[str] | None = None) -> Preprocessing:
    """Return how images are prepared for `weights`.

    Args:
        weights: an enum member or its full name; or a local file: its metadata decides (`Preprocessing.to_metadata`),
            else the published file of the same name; otherwise, and for None, the usual ImageNet evaluation.

    Raises:
        ValueError: for an unknown name.
        WeightsError: if it is a file that cannot be read, or its metadata is unusable.

    Examples:
        >>> import resnet_fast as rf
        >>> prepare = rf.models.preprocessing("ResNet50_Weights.IMAGENET1K_V2")
        >>> prepare("photo.jpg").shape
        torch.Size([3, 224, 224])
    """
    if weights is None:
        return Preprocessing()
    path = _local_file(weights)
    if path is not None:
        return preprocessing_of(path, read_with_metadata(path)[1])
    member: Any = get_weight(weights) if isinstance(weights, str) else weights
    return Preprocessing.from_transforms(member.transforms())


def preprocessing_of(path: Path, metadata: Mapping[str, str]) -> Preprocessing:
    """Return the `preprocessing` of a file with metadata that was read already."""
    try:
        found = Preprocessing.from_metadata(metadata)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    if found is not None:
        return found
    published = (member for model in _table() for member in get_model_weights(model))
    return next((preprocessing(member) for member in published if Path(url(member)).name == path.name), Preprocessing())


def arch_of(path: Path, metadata: Mapping[str, str]) -> str | None:
    """Return the model's name by the metadata's key `arch`; None if there is none.

    Raises:
        WeightsError: if it is none of the ten.
    """
    arch = metadata.get("arch")
    if arch is not None and arch not in _table():
        raise WeightsError(f"{path}: its metadata calls it {arch[:40]!r}, which is none of {', '.join(_table())}")
    return arch


def download(url: str, *, progress: bool = True) -> Path:
    """Return the file published at `url`, from torch.hub's folder `checkpoints` or downloaded into it.

    The file's name must end in the first digits of its SHA-256, as in `resnet50-11ad3fa6.pth`. They are compared on
    every call. An interrupted or wrong download leaves no file of that name.

    Raises:
        WeightsError: if it cannot be downloaded, is not what was expected, or the file found is damaged.
    """
    name = Path(urllib.parse.urlparse(url).path).name
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    if match is None:
        raise WeightsError(f"{url}: the file name holds no SHA-256 prefix to verify a download by")
    expected = match.group(1)
    path = Path(torch.hub.get_dir()).expanduser() / "checkpoints" / name
    if path.exists():
        found = _sha256(path)
        if not found.startswith(expected):
            raise WeightsError(
                f"{path}: damaged: its SHA-256 begins with {found[: len(expected)]} instead of {expected}; "
                f"delete the file to have it downloaded again from {url}"
            )
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _connect(url)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=expected, progress=progress)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise WeightsError(
            f"cannot download {url} ({one_line(error)}); without a connection, put the file {name} into {path.parent}"
        ) from error
    return path


def _connect(url: str) -> None:
    """Fail soon without a connection: torch.hub waits for as long as the system does."""
    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "torch.hub"})
        urllib.request.urlopen(request, timeout=_CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return  # the server answers; what it says to the download itself counts


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
