"""Result files: written whole or not at all, read back with a check of their version."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

SCHEMA = 1


def dumps(data: Any) -> str:
    """``data`` as JSON that any reader accepts: what is not finite becomes null."""
    text = json.dumps(_finite(data), indent=1, allow_nan=False)
    return re.sub(r"\[[-+\d.eE,\s]+\]", _on_one_line, text) + "\n"


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes ``text`` to ``path`` atomically: a reader sees the old file or the new one, never a part."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Writes ``data`` to ``path`` atomically, making the folder if needed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


def write(path: str | os.PathLike[str], data: Any) -> Path:
    """Writes ``data`` as JSON to ``path``, atomically."""
    return write_text(path, dumps(data))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a result file. Raises ValueError for a file that is none, or one of another version."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a result file: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path} is not a result file of version {SCHEMA}: found {found!r}")
    return data


def _on_one_line(numbers: re.Match[str]) -> str:
    return "[" + " ".join(numbers[0][1:-1].split()) + "]"


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
