"""The table of hostile Caffe files and the error that each gives; the files themselves are those of the tests.

python -m tests.caffe.hostile --write docs/caffe_hostile.md
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from resnet_fast import caffe
from resnet_fast.caffe import caffemodel
from tests.caffe import files
from tests.caffe import test_caffemodel as binary
from tests.caffe import test_net as weights
from tests.caffe import test_prototxt as text

TABLE = Path(__file__).parents[2] / "docs" / "caffe_hostile.md"
HEAD = """# Hostile Caffe files

What a file that is damaged, made to do harm, or simply another file gives. Every error is a `CaffeError` of one line,
with the layer and the line or byte. The tests hold each of these; hypothesis and `python -m tests.caffe.fuzz` look for
more ([testing.md](testing.md)).

Written by `python -m tests.caffe.hostile --write docs/caffe_hostile.md`.
"""
SECTIONS = (
    ("Definitions", ""),
    ("Weights, byte by byte", ""),
    ("Weights of another network", "For a small network whose prototxt and caffemodel do not belong together."),
    (
        "Files of 60 MB",
        "Each is refused after a bounded number of fields, layers or blobs: within seconds, and with at most 60 MB\n"
        "more memory than before, mapped pages of the file included.",
    ),
)


def _message(action: Callable[[], object]) -> str:
    try:
        action()
    except caffe.CaffeError as error:
        return str(error)
    raise AssertionError("this file is no longer refused")


def _definitions() -> Iterator[tuple[str, str]]:
    for name, (content, _) in text.HOSTILE.items():
        yield name, _message(lambda: caffe.Net(caffe.parse_prototxt(content)))  # noqa: B023 - called at once


def _binaries(folder: Path) -> Iterator[tuple[str, str]]:
    path = folder / "net.caffemodel"
    for name, (data, _) in binary.HOSTILE.items():
        path.write_bytes(data)
        yield f"{name} ({len(data):,} bytes)", _message(lambda: caffemodel.read(path))


def _mismatches(folder: Path) -> Iterator[tuple[str, str]]:
    definition, path = folder / "net.prototxt", folder / "net.caffemodel"
    definition.write_text(weights.SMALL)
    stored = weights.blobs_of(files.network(weights.SMALL))
    for name, (change, _) in weights.MISMATCHES.items():
        files.write_layers(path, change(stored))
        yield name, _message(lambda: caffe.load(definition, path))


def table() -> str:
    """The whole page."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = [list(_definitions()), list(_binaries(folder)), list(_mismatches(folder))]
    parts.append([(name, f"{message}..." if "byte" in message else message)
                  for name, (_, message) in binary._FILLED.items()])  # fmt: skip
    lines = [HEAD]
    for (title, remark), rows in zip(SECTIONS, parts, strict=True):
        lines += [f"## {title}", "", *([remark, ""] if remark else []), "| file | error |", "|---|---|"]
        lines += [f"| {case} | {_cell(message, name)} |" for case, message in rows]
        lines.append("")
    return "\n".join(lines)


def _cell(message: str, folder: str) -> str:
    message = message.replace(f"{folder}/", "").removeprefix("prototxt: ").removeprefix("net.caffemodel: ")
    message = re.sub(r"supported are .*? and Input", "supported are ...", message)
    message = message if len(message) <= 240 else f"{message[:237]}..."
    return "`" + message.replace("`", "'").replace("|", "\\|") + "`"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        Path(sys.argv[2]).write_text(table(), encoding="utf-8")
    else:
        print(table())
