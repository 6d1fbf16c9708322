"""Result files: written whole or not at all, read back with a check of their version."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from resnet_fast._files import write_text

SCHEMA = 1


def dumps(data: Any) -> str:
    """``data`` as JSON that any reader accepts: what is not finite becomes null."""
    text = json.dumps(_finite(data), indent=1, allow_nan=False)
    return re.sub(r"\[[-+\d.eE,\s]+\]", _on_one_line, text) + "\n"


def write(path: str | os.PathLike[str], data: Any) -> Path:
    """Writes ``data`` as JSON to ``path``, atomically; results are published, so the home folder is "~" in them."""
    home = os.path.expanduser("~")
    text = dumps(data)
    return write_text(path, text.replace(f"{home}{os.sep}", f"~{os.sep}") if len(home) > 1 else text)


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


def one_line(error: BaseException) -> str:
    """Return the kind and the text of an error without line breaks, cut to a readable length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."


def _on_one_line(numbers: re.Match[str]) -> str:
    return "[" + " ".join(numbers[0][1:-1].split()) + "]"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
