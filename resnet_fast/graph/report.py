"""Report what ``optimize`` did to each layer, as data and as a table. This file computes nothing about the graph."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .quantize_report import Quantization


@dataclass(frozen=True)
class Row:
    """One layer of the original model.

    Attributes:
        name, kind: of the layer; a module's qualified name and class, or a function call's.
        fused: the fused op it became part of, and the layer that op is named after; "" if it was not fused.
        reason: why it was not fused; "" if it was.
        backend: what runs it: a backend's name, "torch" for a plain torch op, "" if nothing is left to run.
        shape: of its output at the example input; None if unknown.
        bytes_before: inputs + weights + output, the layer run by itself; None if unknown.
        bytes_after: the fused op's inputs, weights and output, counted at its first layer, 0 at the others.
    """

    name: str
    kind: str
    fused: str
    reason: str
    backend: str
    shape: tuple[int, ...] | None
    bytes_before: int | None
    bytes_after: int | None


@dataclass(frozen=True, repr=False)
class Report:
    """What ``optimize`` did: ``print(report)`` shows the whole table, :meth:`as_dict` gives it as data.

    Attributes:
        model, dtype: the original model's class, and what the optimized one computes in.
        example: the example inputs that the shapes and bytes are counted for.
        rows: the layers in the model's order.
        notes: remarks on the whole model.
        batch: number of images in the example inputs; None if unknown.
        dtype_before: the original model's dtype, in which ``bytes_before`` is counted.
        quantization: what ``quantize`` did, and what it costs in accuracy; None for a result of ``optimize``.
    """

    model: str
    dtype: str
    example: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())
    batch: int | None = None
    dtype_before: str = ""
    quantization: Quantization | None = None

    @property
    def fused(self) -> tuple[Row, ...]:
        """The layers that are part of a fused op."""
        return tuple(row for row in self.rows if row.fused)

    @property
    def not_fused(self) -> tuple[Row, ...]:
        """The layers that run as they did before, with the reason."""
        return tuple(row for row in self.rows if not row.fused and row.reason)

    @property
    def bytes_before(self) -> int | None:
        """Total over all layers, None if one of them is unknown."""
        return _total([row.bytes_before for row in self.rows])

    @property
    def bytes_after(self) -> int | None:
        """Total over all fused ops and remaining layers, None if one of them is unknown."""
        return _total([row.bytes_after for row in self.rows])

    @property
    def bytes_per_image(self) -> float | None:
        """``bytes_after`` by image of the example inputs, their share of the weights included; None if unknown."""
        after = self.bytes_after
        return None if after is None or not self.batch else after / self.batch

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, with the totals."""
        totals = {
            "layers": len(self.rows),
            "fused": len(self.fused),
            "not_fused": len(self.not_fused),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bytes_per_image": self.bytes_per_image,
        }
        data = asdict(self)
        for row in data["rows"]:
            row["shape"] = None if row["shape"] is None else list(row["shape"])
        data["quantization"] = None if self.quantization is None else self.quantization.as_dict()
        return {**data, "rows": list(data["rows"]), "example": list(self.example), "notes": list(self.notes), **totals}

    def __repr__(self) -> str:
        return f"<Report: {self._counts()}; {self._traffic()}; print() shows all layers>"

    def __str__(self) -> str:
        header = ("layer", "kind", "fused into", "runs here on", "output", "before", "after")
        lines = [header, *(self._cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        right = (False, False, False, False, False, True, True)

        def line(cells: tuple[str, ...]) -> str:
            aligned = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
            return "  ".join(aligned).rstrip()

        text = [f"{self.model} in {self.dtype}, example input {', '.join(self.example) or 'unknown'}", ""]
        text += [line(header), "  ".join("-" * width for width in widths), *(line(cells) for cells in lines[1:])]
        text += ["", self._counts(), self._traffic(), *(f"note: {note}" for note in self.notes)]
        if self.quantization is not None:
            text += ["", str(self.quantization)]
        return "\n".join(text)

    def _counts(self) -> str:
        return f"{len(self.fused)} of {len(self.rows)} layers fused, {len(self.not_fused)} not fused"

    def _traffic(self) -> str:
        before, after = self.bytes_before, self.bytes_after
        if before is None or after is None:
            return "bytes moved: unknown"
        ratio = f" ({before / after:.2f} times less)" if after else ""
        each = f", {_size(after // self.batch)} per image" if self.batch and self.batch > 1 else ""
        differ = self.dtype_before not in ("", self.dtype)
        kinds = [f" ({kind})" if differ else "" for kind in (self.dtype_before, self.dtype)]
        return f"bytes moved: {_size(before)} before{kinds[0]}, {_size(after)} after{kinds[1]}{ratio}{each}"

    @staticmethod
    def _cells(row: Row) -> tuple[str, ...]:
        shape = "?" if row.shape is None else "x".join(map(str, row.shape))
        fused = row.fused or (f"not fused: {row.reason}" if row.reason else "removed: nothing left to compute")
        return row.name, row.kind, fused, row.backend, shape, _size(row.bytes_before), _size(row.bytes_after)


def _total(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _size(value: int | None) -> str:
    if value is None:
        return "?"
    if value < 1000:
        return f"{value} B" if value else "0"
    for unit, size in (("kB", 1e3), ("MB", 1e6)):
        if value < size * 1000:
            return f"{value / size:.1f} {unit}"
    return f"{value / 1e9:.2f} GB"
