"""Files written whole or not at all, with errors that name the file. Standard library only."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[str], object], *, make_folder: bool = False) -> Path:
    """Write a file whole or not at all: `write` gets a temporary name next to `path`, which is renamed to `path`.

    Raises:
        OSError: if there is no such folder and it is not to be made, or the file cannot be written; it names `path`
            and the cause.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, the name of a file was expected")
    if not make_folder and not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    name = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(descriptor)
        write(name)
        os.chmod(name, 0o666 & ~_umask())
        _sync(name, os.O_RDWR)
        os.replace(name, path)
        if os.name == "posix":  # the new name itself; elsewhere a folder cannot be opened
            _sync(path.parent, os.O_RDONLY)
    except BaseException as error:
        if name:
            Path(name).unlink(missing_ok=True)
        number = _system_error(error) if isinstance(error, Exception) else None
        if number is None:
            raise
        there = "what was there before is whole" if path.exists() else "nothing is left of it"
        failure = OSError(f"{path}: cannot be written ({os.strerror(number)}); {there}")
        failure.errno = number
        raise failure from error
    return path


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` whole or not at all, making its folder if there is none.

    Raises:
        OSError: as `write_whole`.
    """
    return write_whole(Path(path), lambda name: Path(name).write_bytes(data), make_folder=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8; as `write_bytes`."""
    return write_bytes(path, text.encode("utf-8"))


def _system_error(error: BaseException | None) -> int | None:
    """Return the errno of an error or of its cause: torch.save raises another error about the position in the file,
    safetensors one of its own with the number in the text."""
    while error is not None:
        match = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
        number = int(match[1]) if match else getattr(error, "errno", None)
        if isinstance(number, int):
            return number
        error = error.__cause__ or error.__context__
    return None


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
