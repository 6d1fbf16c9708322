"""Collect the images that a command is given: files, folders, pipes. ``resnet_fast.models`` reads them."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from resnet_fast.cli.common import UserError, as_user_errors

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIPE_BYTES = 2**28
"""Pipes that give more are refused, since their content is held in memory."""


@dataclass(frozen=True)
class Given:
    """One image of the command line: its name as given, and its path or the bytes from a pipe."""

    name: str
    content: str | bytes

    def read(self) -> Image:
        """Return the image; raise UserError, in one line that begins with its name."""
        from resnet_fast.models.images import NamedBytes

        return read_image(Path(self.content) if isinstance(self.content, str) else NamedBytes(self.content, self.name))


def read_image(source: Path | IO[bytes]) -> Image:
    """Call ``resnet_fast.models.read_image``, with its errors as UserError."""
    from resnet_fast import models

    with as_user_errors(models.ImageError):
        return models.read_image(source)


def given_images(arguments: Sequence[str]) -> tuple[list[Given], dict[int, UserError]]:
    """Return the images that the arguments stand for, in their order: files, each image below a folder, ``-``, pipes.

    Also returns the errors, by the position that the image would have had.
    """
    from resnet_fast.models.images import find_images

    found: list[Given] = []
    errors: dict[int, UserError] = {}
    pipes: dict[tuple[int, int], bytes] = {}
    for argument in arguments:
        try:
            if argument != "-" and os.path.isdir(argument):
                with as_user_errors(OSError):
                    inside = list(find_images(argument))
                if not inside:
                    raise UserError(f"{argument}: a directory without images")
                found += [Given(path, path) for path in inside]
                continue
            pipe = _pipe(argument, pipes)
            found.append(Given(argument, argument if pipe is None else pipe))
        except UserError as error:
            errors[len(found)] = error
            found.append(Given(argument, argument))
    return found, errors


def _pipe(argument: str, seen: dict[tuple[int, int], bytes]) -> bytes | None:
    """Return a pipe's content, the same each time it is named; None for a file."""
    if argument == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError("-: standard input is a terminal or closed; pipe an image into it")
        try:
            status = os.fstat(sys.stdin.fileno())
        except OSError:  # standard input is an object in this very process
            return sys.stdin.buffer.read(MAX_PIPE_BYTES)
    else:
        try:
            status = os.stat(argument)
        except (OSError, ValueError):  # the reader has the better message
            return None
        if not stat.S_ISFIFO(status.st_mode):
            return None
    key = (status.st_dev, status.st_ino)
    if key not in seen:
        with as_user_errors(OSError):
            if argument == "-":
                content = sys.stdin.buffer.read(MAX_PIPE_BYTES + 1)
            else:
                with open(argument, "rb") as file:
                    content = file.read(MAX_PIPE_BYTES + 1)
        if len(content) > MAX_PIPE_BYTES:
            raise UserError(f"{argument}: refused: gives more than the limit of {MAX_PIPE_BYTES:,} bytes")
        seen[key] = content
    return seen[key]
