"""Which images a list of sources names: files, folders, patterns, lists of paths, columns of CSV and Parquet tables.

Files are found here, not read. pyarrow is imported for Parquet alone.
"""

from __future__ import annotations

import csv
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from resnet_fast.inference.errors import ClassifierError
from resnet_fast.models.checkpoint import readable
from resnet_fast.models.images import find_images

MAX_LIST_BYTES = 2**30
"""Larger lists are refused. A million paths of a hundred bytes have a tenth of that."""

MAX_CELL = 2**16
"""Characters in a cell of a CSV table; no system has paths as long as that."""

LISTS, TABLES = (".txt",), (".csv", ".parquet")


@dataclass
class Sources:
    """What was found.

    Attributes:
        paths: each image once, in the order of the sources; of a folder in the order of the names.
        errors: why a folder among them has no images, by its path.
        repeated: how often a path came again.
    """

    paths: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    repeated: int = 0
    _seen: set[str] = field(default_factory=set)

    def add(self, path: str) -> None:
        normal = path if os.pardir in path else os.path.normpath(path)
        key = path if normal == path else normal  # one string in memory rather than two
        if key in self._seen:
            self.repeated += 1
        else:
            self._seen.add(key)
            self.paths.append(path)

    def add_error(self, error: OSError) -> None:
        folder = os.fsdecode(error.filename)
        self.errors[folder] = f"{readable(folder, 400)}: a folder that cannot be listed ({error.strerror})"
        self.add(folder)


def collect(sources: Sequence[str], *, column: str = "path", root: str = "", stdin: IO[bytes] | None = None) -> Sources:
    """Find the images of all sources, each once.

    Args:
        sources: paths of image files; of folders, for every image below them; patterns such as "photos/**/*.jpg";
            lists of paths (.txt, one a line, or separated by NUL; "-" is `stdin`); tables (.csv with a header,
            .parquet) with a column of paths.
        column: name of that column.
        root: folder from which relative paths in lists and tables start; "" is the current one.

    Raises:
        ClassifierError: if a source does not exist, names no image, or cannot be read; one folder inside another that
            cannot be listed is among the `errors` instead.
    """
    found = Sources()
    for source in sources:
        before = len(found.paths) + found.repeated
        try:
            _collect(source, found, column, root, stdin)
        except OSError as error:
            raise ClassifierError(f"{readable(source, 400)}: cannot be read ({error.strerror or error})") from error
        if len(found.paths) + found.repeated == before:
            raise ClassifierError(f"{readable(source, 400)}: {why_empty(source)}")
    return found


def expanded(path: str, on_error: Callable[[OSError], None] | None = None) -> Iterator[str] | None:
    """Return the images below a folder, or the files that match a pattern if no file of that name exists; None else.

    Args:
        on_error: as for `find_images`.
    """
    if os.path.isdir(path):
        return find_images(path, on_error)
    if not glob.has_magic(path) or os.path.lexists(path):
        return None
    matches = sorted(glob.iglob(path, recursive=True))
    return (each for match in matches for each in (find_images(match, on_error) if os.path.isdir(match) else (match,)))


def why_empty(path: str) -> str:
    """Say why a path stands for no image, without its name."""
    if os.path.isdir(path):
        return "a directory without images"
    return "names no images" if os.path.lexists(path) or path == "-" else "matches no file"


def _collect(source: str, found: Sources, column: str, root: str, stdin: IO[bytes] | None) -> None:
    shown = readable(source, 400)
    if source == "-":
        if stdin is None:
            raise ClassifierError("-: standard input is a terminal or closed; pipe a list of paths into it")
        _add_all(_lines(read_up_to(stdin, MAX_LIST_BYTES), "-"), found, root)
    elif (images := expanded(source, found.add_error)) is not None:
        for path in images:
            found.add(path)
    elif not os.path.lexists(source):
        raise ClassifierError(f"{shown}: no such file")
    elif (suffix := Path(source).suffix.lower()) in LISTS:
        with open(source, "rb") as file:
            _add_all(_lines(read_up_to(file, MAX_LIST_BYTES), shown), found, root)
    elif suffix in TABLES:
        if os.path.getsize(source) > MAX_LIST_BYTES:
            raise ClassifierError(f"{shown}: more than {MAX_LIST_BYTES:,} bytes, too large for a list of images")
        cells = _csv_column(source, column) if suffix == ".csv" else _parquet_column(source, column)
        for row, cell in cells:
            if not isinstance(cell, str) or not cell or "\0" in cell:
                raise ClassifierError(f"{shown}: row {row} has no path in the column {column!r}")
            _add_all((cell,), found, root)
    else:
        found.add(source)


def _add_all(paths: Sequence[str], found: Sources, root: str) -> None:
    for path in paths:
        found.add(os.path.join(root, path))


def _lines(content: bytes, shown: str) -> list[str]:
    """Return the paths of a list; with a NUL in it, as of `find -print0`, names may have line breaks."""
    if len(content) > MAX_LIST_BYTES:
        raise ClassifierError(f"{shown}: more than {MAX_LIST_BYTES:,} bytes, too large for a list of images")
    separated = content.split(b"\0") if b"\0" in content else content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = separated if b"\0" in content else [line.removesuffix(b"\r") for line in separated]
    return [os.fsdecode(line) for line in lines if line.strip()]


def _csv_column(source: str, column: str) -> Iterator[tuple[int, str | None]]:
    before = csv.field_size_limit(MAX_CELL)
    try:
        # As the operating system's names: bytes that are no UTF-8 come through.
        with open(source, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.DictReader(file)
            _require(column, rows.fieldnames or (), source)
            for number, row in enumerate(rows, 1):
                yield number, row[column]
    except csv.Error as error:
        raise ClassifierError(f"{readable(source, 400)}: not a CSV table ({error})") from error
    finally:
        csv.field_size_limit(before)


def _parquet_column(source: str, column: str) -> Iterator[tuple[int, Any]]:
    pyarrow = import_pyarrow(source)
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(source) as file:
            _require(column, file.schema_arrow.names, source)
            kind = file.schema_arrow.field(column).type
            text = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not (pyarrow.types.is_string(text) or pyarrow.types.is_large_string(text)):
                raise ClassifierError(f"{readable(source, 400)}: its column {column!r} is of {kind}, not of strings")
            number = 0
            for batch in file.iter_batches(columns=[column]):
                for cell in batch.column(0).to_pylist():
                    number += 1
                    yield number, cell
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ClassifierError(
            f"{readable(source, 400)}: not a Parquet table that can be read ({readable(error)})"
        ) from error


def _require(column: str, names: Sequence[str], source: str) -> None:
    if column not in names:
        shown = ", ".join(readable(repr(name), 60) for name in names[:20]) or "none"
        raise ClassifierError(
            f"{readable(source, 400)}: has no column {column!r}; there are {shown}. Give --column NAME"
        )


def read_up_to(file: IO[bytes], limit: int) -> bytes:
    """Return a file's content, of which more than `limit` bytes show that it has more; a pipe may give it in pieces."""
    pieces: list[bytes] = []
    size = 0
    while size <= limit and (piece := file.read(min(2**20, limit + 1 - size))):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def import_pyarrow(path: str | os.PathLike[str]) -> Any:
    """Return pyarrow.

    Raises:
        ClassifierError: if it is not installed; says which extra has it.
    """
    try:
        import pyarrow
    except ImportError:
        raise ClassifierError(f"{path}: Parquet needs pyarrow: pip install 'resnet_fast[parquet]'") from None
    return pyarrow
