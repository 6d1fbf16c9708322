"""The answers of an unfinished prediction of many images: a file beside the output that survives any interruption.

One line of JSON is one answer. Lines are appended; what a kill or a full disk cuts off is dropped when the file is
opened again. The output is made of it when all answers are there.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from resnet_fast.inference.errors import ClassifierError

_FORMAT = "resnet_fast predictions"
_VERSION = 1
_SYNC_SECONDS = 5.0
MAX_LINE_BYTES = 2**20
"""Longer lines are taken for damage."""


class Row(NamedTuple):
    """The answer to one image: classes and probabilities, the most probable first, or an error."""

    path: str
    indices: tuple[int, ...]
    probabilities: tuple[float, ...]
    error: str | None = None

    def line(self) -> bytes:
        """Return it as a line; names that are no UTF-8 are escaped, and probabilities have nine digits, as float32."""
        rounded = [float(f"{value:.9g}") for value in self.probabilities]
        return json.dumps([self.path, self.indices, rounded, self.error], separators=(",", ":")).encode() + b"\n"


class Journal:
    """The answers so far, by path; open until `close`, for one process at a time.

    Attributes:
        done: where the answer to each path begins in the file.

    Raises:
        ClassifierError: if the file is of a prediction with other settings, is no such file, or is in use.
        OSError: if it cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path = path
        self.done: dict[str, int] = {}
        self._file = _open_locked(path)
        try:
            self._end = self._read(settings, restart)
        except BaseException:
            os.close(self._file)
            raise
        self._synced = time.monotonic()

    def _read(self, settings: Mapping[str, Any], restart: bool) -> int:
        """Read headline and answers; cut off what is no whole line; return the file's length."""
        head = json.dumps({"format": _FORMAT, "version": _VERSION, "settings": dict(settings)}).encode() + b"\n"
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            first = file.readline(MAX_LINE_BYTES)
            begun = first.endswith(b"\n")
            if not restart and first and not (begun or head.startswith(first[:40])):
                raise ClassifierError(f"{self.path}: not written by `resnet-fast predict`; move it away or delete it")
            end = 0
            if not restart and begun:
                theirs = self._settings(first)
                end = len(first)
                while (line := file.readline(MAX_LINE_BYTES)) and (row := _parsed(line)) is not None:
                    self.done.setdefault(row.path, end)
                    end += len(line)
                if self.done:
                    self._compare(theirs, settings)
                else:
                    end = 0  # nothing would be lost
        os.ftruncate(self._file, end)
        if end == 0:
            self._write(head, 0)
            end = len(head)
        return end

    def _settings(self, first: bytes) -> dict[str, Any]:
        """Return the settings of the headline."""
        try:
            found = json.loads(first)
            theirs = found["settings"] if found["format"] == _FORMAT else None
            version = found["version"]
        except (ValueError, TypeError, KeyError, RecursionError):
            theirs = version = None
        if not isinstance(theirs, dict):
            raise ClassifierError(f"{self.path}: not written by `resnet-fast predict`; move it away or delete it")
        if version != _VERSION:
            raise ClassifierError(f"{self.path}: written by another version of resnet_fast; --restart begins anew")
        return theirs

    def _compare(self, theirs: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        differing = [name for name in settings if theirs.get(name) != settings[name]]
        if differing:
            parts = "; ".join(f"{name} {theirs.get(name)!r}, not {settings[name]!r}" for name in differing)
            raise ClassifierError(
                f"{self.path}: begun with {parts}. Continue with the same, or begin anew by --restart"
            )

    def append(self, lines: Iterable[bytes]) -> int:
        """Append answers as `Row.line` gives them, and return how many; a second one for a path is left out.

        Raises:
            OSError: if they cannot be written; those before are kept.
        """
        kept: dict[str, bytes] = {}
        for line in lines:
            row = _parsed(line)
            if row is None:
                raise ValueError("journal: a line that Row.line does not write")
            if row.path not in self.done:
                kept.setdefault(row.path, line)
        self._write(b"".join(kept.values()), self._end)
        for path, line in kept.items():
            self.done[path] = self._end
            self._end += len(line)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file)
            self._synced = time.monotonic()
        return len(kept)

    def _write(self, content: bytes, at: int) -> None:
        try:
            while content:
                written = os.pwrite(self._file, content, at)
                content, at = content[written:], at + written
        except OSError as error:
            text = f"{self.path}: cannot be written ({error.strerror}); the answers before are kept"
            raise _failure(text, error) from error

    def rows(self, paths: Sequence[str]) -> Iterator[Row]:
        """Yield the answers to these paths, in their order.

        Raises:
            KeyError: for a path without an answer.
        """
        with os.fdopen(os.dup(self._file), "rb") as file:
            for path in paths:
                offset = self.done[path]
                if file.tell() != offset:
                    file.seek(offset)
                row = _parsed(file.readline(MAX_LINE_BYTES))
                if row is None or row.path != path:
                    raise ClassifierError(f"{self.path}: was changed by another program; --restart begins anew")
                yield row

    def close(self) -> None:
        """Close the file, and delete it if there is no answer in it."""
        if not self.done:
            self.path.unlink(missing_ok=True)
        os.close(self._file)

    def remove(self) -> None:
        """Delete the file; the output has all answers."""
        self.path.unlink(missing_ok=True)
        os.close(self._file)


def _open_locked(path: Path) -> int:
    """Open or make the file, locked against other processes until it is closed."""
    import fcntl

    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _failure(f"{path}: cannot be written ({error.strerror})", error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.fstat(file).st_ino == os.stat(path).st_ino
        except FileNotFoundError:
            same = False
        except OSError as error:
            os.close(file)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ClassifierError(f"{path}: in use by another `resnet-fast predict`") from None
            raise
        if same:
            return file
        os.close(file)  # another process finished and removed it meanwhile


def _failure(text: str, error: OSError) -> OSError:
    failure = OSError(text)  # of one argument, so that the text has no number before it
    failure.errno = error.errno
    return failure


def _parsed(line: bytes) -> Row | None:
    """Return the answer of a whole line, None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        path, indices, probabilities, error = json.loads(line)
        row = Row(path, tuple(indices), tuple(probabilities), error)
    except (ValueError, TypeError, RecursionError):
        return None
    right = (
        isinstance(path, str)
        and all(type(each) is int and each >= 0 for each in row.indices)
        and all(isinstance(each, float | int) for each in row.probabilities)
        and len(row.indices) == len(row.probabilities)
        and (error is None or isinstance(error, str))
        and (error is None) == bool(row.indices)
    )
    return row if right else None
