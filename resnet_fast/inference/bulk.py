"""Classify many files into a table, resumable at any moment; in this process, or by workers that Ray manages.

An answer is in the journal before the next batch is taken, and the table is made of the journal at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from resnet_fast.inference import tables
from resnet_fast.inference.classifier import Classifier, top
from resnet_fast.inference.errors import ClassifierError
from resnet_fast.inference.journal import Journal, Row
from resnet_fast.inference.sources import Sources
from resnet_fast.inference.stream import BATCH_SIZE, WORKERS, read_bounded, stream
from resnet_fast.models.checkpoint import readable
from resnet_fast.models.images import ImageError

Lines = Iterator[list[bytes]]
"""Answers as `Row.line` gives them, batch by batch."""

Engine = Callable[[list[str]], Lines]
"""Takes the paths without an answer and yields the answers, in any order."""


class Bulk:
    """One prediction of many files: what is done, and what remains.

    Args:
        sources: the images. out: the table to be written. classifier: the network. topk: classes for each image.
        restart: do again what an interrupted prediction has done.

    Attributes:
        done: how many of the images have an answer. resumed: how many had one at the beginning.

    Raises:
        ClassifierError: if the interrupted prediction had other settings, or goes on in another process.
        OSError: if the journal cannot be written.
    """

    def __init__(
        self, sources: Sources, out: Path, classifier: Classifier, topk: int, *, restart: bool = False
    ) -> None:
        self.sources, self.out, self.classifier = sources, out, classifier
        self.topk = min(topk, len(classifier.labels))
        settings = {
            "network": classifier.name, "weights": classifier.digest, "dtype": str(classifier.dtype), "topk": self.topk,
        }  # fmt: skip
        self.journal = Journal(journal_of(out), settings, restart=restart)
        self.done = self.resumed = len(sources.paths) - len(self._remaining())

    def _remaining(self) -> list[str]:
        return [path for path in self.sources.paths if path not in self.journal.done]

    def run(self, engine: Engine, progress: Callable[[int], None] = lambda done: None) -> int:
        """Answer what remains, write the table and delete the journal; return how many images could not be read.

        Args:
            progress: called with the number of images done, after every batch.

        Raises:
            ClassifierError: if the network cannot answer, or the engine left images out.
            OSError: if a file cannot be written. The journal stays in either case.
        """
        try:
            failed = self._run(engine, progress)
        except BaseException:
            self.journal.close()
            raise
        self.journal.remove()
        return failed

    def _run(self, engine: Engine, progress: Callable[[int], None]) -> int:
        errors = self.sources.errors
        listed = [path for path in self._remaining() if path in errors]
        self.done += self.journal.append(Row(path, (), (), errors[path]).line() for path in listed)
        progress(self.done)
        for lines in engine(self._remaining()):
            self.done += self.journal.append(lines)
            progress(self.done)
        if missing := self._remaining():
            raise ClassifierError(f"{len(missing):,} images have no answer, such as {readable(missing[0], 200)}")
        failed = 0

        def counted() -> Iterator[Row]:
            nonlocal failed
            for row in self.journal.rows(self.sources.paths):
                failed += row.error is not None
                yield row

        tables.write(self.out, counted(), self.classifier.labels, self.topk)
        return failed


def journal_of(out: Path) -> Path:
    """Return the journal's path, next to the output."""
    return out.with_name(out.name + ".partial")


def here(classifier: Classifier, topk: int, *, batch_size: int = BATCH_SIZE, workers: int = WORKERS) -> Engine:
    """Return the engine that classifies in this process, with threads that read."""

    def run(paths: list[str]) -> Lines:
        lines: list[bytes] = []
        for path, outcome in stream(paths, classifier, read_bounded, batch_size=batch_size, workers=workers):
            lines.append(answer_line(path, outcome, classifier, topk))
            if len(lines) == batch_size:
                yield lines
                lines = []
        if lines:
            yield lines

    return run


def answer_line(path: str, outcome: Tensor | ImageError, classifier: Classifier, topk: int) -> bytes:
    """Return an outcome of `stream` as a line of the journal."""
    if not isinstance(outcome, Tensor):
        return Row(path, (), (), readable(outcome, 600)).line()
    found = top(outcome, classifier.labels, topk)
    return Row(path, tuple(each.index for each in found), tuple(each.probability for each in found)).line()
