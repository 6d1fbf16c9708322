"""Write answers as a table: CSV, Parquet or lines of JSON, by the file's suffix, whole or not at all."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from resnet_fast._files import write_whole
from resnet_fast.inference.errors import ClassifierError
from resnet_fast.inference.journal import Row
from resnet_fast.inference.sources import import_pyarrow

SUFFIXES = (".csv", ".parquet", ".jsonl")

_ROW_GROUP = 65536


def check_output(path: Path) -> None:
    """Raise ClassifierError unless a table can be written there."""
    if path.suffix.lower() not in SUFFIXES:
        raise ClassifierError(
            f"{path}: must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, which says its format"
        )
    if path.suffix.lower() == ".parquet":
        import_pyarrow(path)
    if path.is_dir():
        raise ClassifierError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ClassifierError(f"{path}: there is no folder {path.parent}")


def columns(topk: int) -> list[str]:
    """Return the names: path, label, index, probability, then label_2 and so on for the next classes, error."""
    ranks = ("", *(f"_{rank}" for rank in range(2, topk + 1)))
    return ["path", *(name + rank for rank in ranks for name in ("label", "index", "probability")), "error"]


def write(path: Path, rows: Iterable[Row], labels: Sequence[str], topk: int) -> None:
    """Write the rows, in their order.

    Names in CSV and Parquet that are no UTF-8 have escapes such as ``\\udcff`` in place of the bytes.

    Raises:
        OSError: if it cannot be written; a file that was there before stays.
    """
    writer = {".csv": _write_csv, ".parquet": _write_parquet, ".jsonl": _write_jsonl}[path.suffix.lower()]
    write_whole(path, lambda name: writer(name, rows, labels, topk))


def _cells(row: Row, labels: Sequence[str], topk: int) -> list[Any]:
    """Return one value for each of `columns`, None for what is missing."""
    cells: list[Any] = [_utf8(row.path)]
    for index, probability in zip(row.indices, row.probabilities, strict=True):
        cells += [_utf8(labels[index]), index, probability]
    return [*cells, *[None] * (3 * (topk - len(row.indices))), None if row.error is None else _utf8(row.error)]


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _write_csv(name: str, rows: Iterable[Row], labels: Sequence[str], topk: int) -> None:
    with open(name, "w", newline="", encoding="utf-8") as file:
        plain = csv.writer(file, lineterminator="\n")
        quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        plain.writerow(columns(topk))
        for row in rows:
            cells = _cells(row, labels, topk)
            # Left to itself the module quotes a carriage return only if it is part of the line's end.
            (quoted if any("\r" in cell for cell in cells if isinstance(cell, str)) else plain).writerow(cells)


def _write_jsonl(name: str, rows: Iterable[Row], labels: Sequence[str], topk: int) -> None:
    with open(name, "w", encoding="ascii") as file:
        for row in rows:
            predictions = [
                {"index": index, "label": labels[index], "probability": probability}
                for index, probability in zip(row.indices, row.probabilities, strict=True)
            ]
            file.write(json.dumps({"path": row.path, "predictions": predictions, "error": row.error}) + "\n")


def _write_parquet(name: str, rows: Iterable[Row], labels: Sequence[str], topk: int) -> None:
    import pyarrow
    from pyarrow import parquet

    kinds = {"index": pyarrow.int32(), "probability": pyarrow.float64()}
    names = columns(topk)
    schema = pyarrow.schema([(each, kinds.get(each.partition("_")[0], pyarrow.string())) for each in names])
    with parquet.ParquetWriter(name, schema) as writer:
        for part in _parts(rows):
            cells = zip(*(_cells(row, labels, topk) for row in part), strict=True)
            arrays = [pyarrow.array(list(values), kind) for values, kind in zip(cells, schema.types, strict=True)]
            writer.write_table(pyarrow.table(arrays, schema=schema))


def _parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    source = iter(rows)
    while part := list(itertools.islice(source, _ROW_GROUP)):
        yield part
