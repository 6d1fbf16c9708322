"""Measured launch choices: tables in JSON, one per GPU or kind of CPU, looked up before any heuristic.

The user's table (written by ``resnet-fast tune``) comes first, then the one in ``tuned/`` of this package.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

_CHECKED_IN = Path(__file__).parent / "tuned"
_LARGEST = 16 * 1024 * 1024
FORMAT = 1

Choice = TypeVar("Choice")


def user_folder() -> Path:
    """Where the user's tables lie: ``$RESNET_FAST_TUNED``, else ``resnet_fast/tuned`` in the user's cache folder."""
    chosen = os.environ.get("RESNET_FAST_TUNED")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_fast" / "tuned"


def checked_in_folder() -> Path:
    """Return where the tables that come with the package lie."""
    return _CHECKED_IN


def read(path: Path, cpu: str = "") -> dict[str, dict[str, Any]]:
    """Return a table's choices, ``op -> problem -> fields``.

    Args:
        cpu: the processor that the table must be of; "" for a GPU's, whose file alone says what it is for.

    Raises:
        ValueError: the file is not such a table.
    """
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than any table ({_LARGEST})")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no table of launch choices: {error}") from None
    choices = data.get("choices") if isinstance(data, dict) and data.get("format") == FORMAT else None
    sound = isinstance(choices, dict) and all(
        isinstance(problems, dict) and all(isinstance(choice, dict) for choice in problems.values())
        for problems in choices.values()
    )
    if not sound:
        raise ValueError(f"{path} is no table of launch choices in format {FORMAT}")
    assert isinstance(choices, dict)
    if cpu and data.get("cpu") != cpu:
        raise ValueError(f"{path} is a table of {data.get('cpu')!r}, not of {cpu!r}")
    return choices


def write(
    path: Path, name: str, measured_with: Mapping[str, str], choices: Mapping[str, Mapping[str, Any]], kind: str = "gpu"
) -> None:
    """Replace the table at ``path`` in one step, so that no reader sees half of it.

    Args:
        name: of the device. kind: of device, "gpu" or "cpu".
    """
    data = {"format": FORMAT, kind: name, "measured_with": dict(measured_with), "choices": choices}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, sort_keys=True)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    forget()


@cache
def _load(gpu: str) -> dict[tuple[str, str], dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for folder in (_CHECKED_IN, user_folder()):
        path = folder / f"{gpu}.json"
        if path.is_file():
            try:
                table = read(path)
            except (OSError, ValueError) as error:
                warnings.warn(f"tuned launch choices are not used: {error}", stacklevel=4)
                continue
            found |= {(op, key): choice for op, problems in table.items() for key, choice in problems.items()}
    return found


def described(gpu: str) -> str:
    """Return how many measured choices of each op launches on a GPU are looked up in, and where they are from."""
    counts = Counter(op for op, _ in _load(gpu))
    if not counts:
        return f"none measured: there is no table {gpu}.json in {user_folder()}"
    paths = [str(path) for path in (user_folder() / f"{gpu}.json", _CHECKED_IN / f"{gpu}.json") if path.is_file()]
    return f"{', '.join(f'{op} {count}' for op, count in sorted(counts.items()))} of {' and '.join(paths)}"


def forget() -> None:
    """Read the tables again at the next look-up."""
    _load.cache_clear()
    for clear in _dependent:
        clear()


_dependent: list[Any] = []


def remembers(function: Any) -> Any:
    """Mark a cached function whose results rest on tables, so that :func:`forget` clears it too."""
    _dependent.append(function.cache_clear)
    return function


def lookup(op: str, problem: str, gpu: str) -> dict[str, Any] | None:
    """Return the measured choice for a problem's key on a GPU, None if nobody measured it."""
    return _load(gpu).get((op, problem))


_LARGEST_VALUE = 4096
#: Fields that count something else than elements or warps, which come in powers of two.
_ANY_COUNT = ("num_stages", "stages", "slice_stages", "rows", "persistent", "shares")


#: What can be launched at all: warps and stages of a program, and 16 values of a step through a product.
_RANGES = {
    "num_warps": (1, 32), "num_stages": (1, 8), "stages": (1, 8), "slice_stages": (1, 8),
    "block_k": (16, 4096), "block_c": (16, 4096), "persistent": (0, 4096),
}  # fmt: skip


def milliseconds(op: str, problem: str, gpu: str) -> float | None:
    """Return what the measured choice took, None if there is none or the table does not say."""
    found = lookup(op, problem, gpu)
    taken = None if found is None else found.get("ms")
    return float(taken) if type(taken) in (int, float) and 0 < taken < float("inf") else None


def pays(op: str, problem: str, gpu: str) -> bool:
    """Whether the table says that the kernel takes less time than the op's plain way; False if it does not say."""
    found = lookup(op, problem, gpu) or {}
    ours, plain = found.get("ms"), found.get("plain_ms")
    sound = all(type(taken) in (int, float) and 0 < taken < float("inf") for taken in (ours, plain))
    return sound and ours < plain  # type: ignore[operator]


def measured(op: str, problem: str, gpu: str, kind: type[Choice]) -> Choice | None:
    """The measured choice as a config of that dataclass; None if there is none, or none that a kernel can take."""
    found = lookup(op, problem, gpu)
    if found is None:
        return None
    values = {field.name: found.get(field.name, field.default) for field in fields(kind)}  # type: ignore[arg-type]
    for field in fields(kind):  # type: ignore[arg-type]
        value = values[field.name]
        if field.type == "bool":
            sound = isinstance(value, bool)
        elif field.type == "str":
            sound = isinstance(value, str) and value != ""
        else:
            least, most = _RANGES.get(field.name, (1, _LARGEST_VALUE))
            sound = type(value) is int and least <= value <= most
            sound = sound and (field.name in _ANY_COUNT or value & (value - 1) == 0)
        if not sound:
            return None
    return kind(**values)
