"""Measured launch choices: tables in JSON, one per GPU, looked up before any heuristic.

The user's table (written by ``resnet-fast tune``) comes first, then the one in ``tuned/`` of this package.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

_CHECKED_IN = Path(__file__).parent / "tuned"
_LARGEST = 16 * 1024 * 1024
FORMAT = 1


def user_folder() -> Path:
    """Where the user's tables lie: ``$RESNET_FAST_TUNED``, else ``resnet_fast/tuned`` in the user's cache folder."""
    chosen = os.environ.get("RESNET_FAST_TUNED")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_fast" / "tuned"


def checked_in_folder() -> Path:
    """Where the tables that come with the package lie."""
    return _CHECKED_IN


def read(path: Path) -> dict[str, dict[str, Any]]:
    """A table's choices, ``op -> problem -> fields``.

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
        isinstance(problems, dict) and all(isinstance(fields, dict) for fields in problems.values())
        for problems in choices.values()
    )
    if not sound:
        raise ValueError(f"{path} is no table of launch choices in format {FORMAT}")
    assert isinstance(choices, dict)
    return choices


def write(path: Path, gpu: str, measured_with: Mapping[str, str], choices: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the table at ``path`` in one step, so that no reader sees half of it."""
    data = {"format": FORMAT, "gpu": gpu, "measured_with": dict(measured_with), "choices": choices}
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
            found |= {(op, problem): fields for op, problems in table.items() for problem, fields in problems.items()}
    return found


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
    """The measured choice for a problem's key on a GPU, None if nobody measured it."""
    return _load(gpu).get((op, problem))
