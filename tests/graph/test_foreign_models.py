"""Networks of torchvision's, through the very code that makes benchmarks/foreign_models.csv, give that table's rows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import foreign_models

TABLE = Path(foreign_models.__file__).with_suffix(".csv")
SOME = (
    "mobilenet_v3_small",
    "shufflenet_v2_x1_0",
    "densenet121",
    "regnet_y_400mf",
    "lraspp_mobilenet_v3_large",
    "r3d_18",
)


def rows() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_holds_what_is_said_of_it() -> None:
    """None is refused, nearly every 2-D convolution is fused, and what differs is what rounding changes anyway."""
    found = rows()
    assert len(found) >= 120
    assert {row["captured"] for row in found} <= {"whole", "parts"}
    convolutions, fused = (sum(int(row[column]) for row in found) for column in ("convolutions", "fused"))
    assert fused >= 0.95 * convolutions
    for row in found:
        errors = [float(row[column]) for column in ("error", "error_larger") if row[column]]
        assert errors and max(errors) <= max(foreign_models.TOLERANCE, 4 * float(row["rounding"] or 0)), row
        assert int(row["fused"]) == int(row["convolutions"]) or row["reason"], row


@pytest.mark.parametrize("name", SOME)
def test_rows_are_made_anew(name: str) -> None:
    entry = next(entry for entry in foreign_models.models() if entry.name == name and "torchvision" in entry.source)
    (expected,) = (row for row in rows() if (row["source"], row["name"]) == (entry.source, name))
    found = foreign_models.examine(entry, speed=False)
    for column in ("captured", "convolutions", "fused"):
        assert str(found[column]) == expected[column], column
    assert max(float(found[column]) for column in ("error", "error_larger")) <= foreign_models.TOLERANCE
