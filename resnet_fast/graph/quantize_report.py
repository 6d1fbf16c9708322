"""How far a quantized snapshot is from the float one, as data and as a table. Nothing is computed of a graph here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerQuality:
    """One layer of the fused graph.

    Attributes:
        name: of the author's layer that the fused op begins with. op: the fused op, or the layer's kind.
        precision: "int8", "float8" or what stays floating point. reason: why it is not quantized; "" if it is.
        alone: signal-to-quantization-noise ratio of its output in dB, on the first image, if it alone is quantized, its
            inputs included.
        sqnr: the same in the quantized network, behind all layers before it, on the first 32 images. None if nothing
            was measured.
        input, output: how its input and its output are stored, (scale, zero point) with ``real = scale * (stored -
            zero_point)``; None if it is floating point.
    """

    name: str
    op: str
    precision: str
    reason: str = ""
    alone: float | None = None
    sqnr: float | None = None
    input: tuple[float, int] | None = None
    output: tuple[float, int] | None = None


@dataclass(frozen=True, repr=False)
class Quantization:
    """What ``quantize`` did and what it costs: ``print()`` shows a table, :meth:`as_dict` gives it as data.

    All of it is measured on the calibration images, against the float snapshot that ``optimize`` gives.

    Attributes:
        layers: the layers in the order in which they run.
        images: how many images were measured, 0 if nothing is quantized.
        sqnr: signal-to-quantization-noise ratio of the outputs in dB; infinite if they are equal.
        largest_error: of an element of the outputs. largest_output: the largest magnitude in the float ones.
        top1_agreement: share of the rows whose largest element is the same; None unless an output is [N, classes].
        bits: of the activations: 8, or 7 on a processor whose 8-bit products saturate.
        notes: remarks.
        precision: "int8" or "float8", what was asked for.
    """

    layers: tuple[LayerQuality, ...]
    images: int = 0
    sqnr: float | None = None
    largest_error: float | None = None
    largest_output: float | None = None
    top1_agreement: float | None = None
    bits: int = 8
    notes: tuple[str, ...] = field(default=())
    precision: str = "int8"

    @property
    def quantized(self) -> tuple[LayerQuality, ...]:
        """The layers that compute in ``precision``."""
        return tuple(layer for layer in self.layers if layer.precision == self.precision)

    @property
    def int8(self) -> tuple[LayerQuality, ...]:
        """The layers that compute in int8."""
        return self.quantized if self.precision == "int8" else ()

    @property
    def kept_float(self) -> tuple[LayerQuality, ...]:
        """The layers that stay floating point, with the reason."""
        return tuple(layer for layer in self.layers if layer.precision != self.precision)

    def as_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers; infinite ratios, of equal values, are None."""
        data = {**asdict(self), "layers": [asdict(layer) for layer in self.layers], "notes": list(self.notes)}
        for each in (data, *data["layers"]):
            for key in ("sqnr", "alone"):
                if isinstance(each.get(key), float) and not math.isfinite(each[key]):
                    each[key] = None
        return data

    def __repr__(self) -> str:
        return f"<Quantization: {self._summary()}; print() shows all layers>"

    def __str__(self) -> str:
        header = ("layer", "op", "computes in", "alone, dB", "here, dB", "input step", "output step", "")
        lines = [header]
        for layer in self.layers:
            measured = _decibels(layer.alone), _decibels(layer.sqnr), _step(layer.input), _step(layer.output)
            lines.append((layer.name, layer.op, layer.precision, *measured, layer.reason))
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        right = (False, False, False, True, True, True, True, False)

        def line(cells: tuple[str, ...]) -> str:
            aligned = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
            return "  ".join(aligned).rstrip()

        text = [
            line(header),
            "  ".join("-" * width for width in widths).rstrip(),
            *(line(cells) for cells in lines[1:]),
        ]
        return "\n".join([*text, "", self._summary(), *(f"note: {note}" for note in self.notes)])

    def _summary(self) -> str:
        counted = f"{len(self.quantized)} of {len(self.layers)} layers in {self.precision}"
        if not self.images:
            return counted
        parts = [counted, f"outputs {_decibels(self.sqnr)} dB"]
        if self.top1_agreement is not None:
            parts.append(f"top-1 agreement {self.top1_agreement:.2%}")
        parts.append(f"largest error {self.largest_error:.3g} of {self.largest_output:.3g}")
        images = "1 calibration image" if self.images == 1 else f"{self.images} calibration images"
        return f"{', '.join(parts)} ({images}, {self.bits}-bit activations)"


def _step(stored: tuple[float, int] | None) -> str:
    """Return a scale, and behind it the zero point unless that is 0."""
    if stored is None:
        return ""
    return f"{stored[0]:.3g}" + (f" - {stored[1]}" if stored[1] else "")


def _decibels(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if math.isfinite(value) else "equal"


class Noise:
    """Sums up signal and noise over several tensors.

    Args:
        extremes: whether the largest magnitude and the largest error are wanted too.
    """

    def __init__(self, extremes: bool = False) -> None:
        self._extremes = extremes
        self.signal = self.noise = 0.0
        self.largest_error = self.largest = 0.0
        self.measured = False

    def add(self, exact: Tensor, found: Tensor) -> None:
        """Take ``found`` for ``exact``, floating point tensors of one shape."""
        if not exact.numel():
            return
        difference = found - exact
        self.signal += _energy(exact)
        self.noise += _energy(difference)
        if self._extremes:
            self.largest = max(self.largest, float(exact.abs().max()))
            self.largest_error = max(self.largest_error, float(difference.abs().max()))
        self.measured = True

    @property
    def sqnr(self) -> float | None:
        """In dB; infinite without noise, None if nothing was measured."""
        if not self.measured:
            return None
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


class Top1:
    """Counts the rows of [N, classes] outputs whose largest element is the same."""

    def __init__(self) -> None:
        self.rows = self.same = 0

    def add(self, exact: Tensor, found: Tensor) -> None:
        """Take two outputs; other shapes than [N, classes] are passed over."""
        if exact.dim() == 2 and exact.shape[1] > 1:
            self.rows += len(exact)
            self.same += int(torch.eq(exact.argmax(1), found.argmax(1)).sum())

    @property
    def agreement(self) -> float | None:
        return self.same / self.rows if self.rows else None
