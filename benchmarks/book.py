"""What the benchmark commands share: their options, and result files that grow by a row at a time."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from resnet_fast.benchmarking import machine, results

RESULTS = Path(__file__).parent / "results"


class Options(argparse.ArgumentParser):
    """The command line of ``python -m benchmarks.NAME``, with the options that all of them take."""

    def __init__(self, name: str, doc: str | None, devices: tuple[str, ...] = ("cuda", "cpu")) -> None:
        super().__init__(prog=f"python -m benchmarks.{name}", description=(doc or "").split("\n")[0])
        only = devices[0] if len(devices) == 1 else None
        self.add_argument("--device", choices=devices, default=only, help="default: cuda if torch sees a GPU")
        self.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing that ends later than this")
        self.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/MACHINE)")

    def parse(self) -> argparse.Namespace:
        """Return the arguments, with the device and the folder of the results filled in."""
        given = self.parse_args()
        given.device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if given.device == "cuda" and not torch.cuda.is_available():
            self.error("--device cuda: torch sees no CUDA GPU here")
        if given.out is None and not getattr(given, "quick", False):
            given.out = folder_of(given.device)
        if getattr(given, "threads", None) is not None:
            torch.set_num_threads(given.threads)
        return given

    def names(self, option: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
        """Return the comma-separated names of ``text``; one that is not known ends the program with a message."""
        found = tuple(name for name in text.split(",") if name)
        for name in found:
            if name not in known:
                self.error(f"{option}: {name!r} is none of {', '.join(known)}")
        return found


def folder_of(device: str) -> Path:
    """Return where the results of this machine go unless told otherwise: named after its GPU, or its processor."""
    return RESULTS / (environment.slug(environment.report()) if device == "cuda" else machine.describe().slug)


class Book:
    """A result file of sections of named rows, whole on disk after every addition. Rows of earlier runs stay until
    they are measured again; each says of which commit it is."""

    def __init__(self, folder: Path, name: str, sections: tuple[str, ...]) -> None:
        self.path = folder / f"{name}.json"
        kind = f"gpu-{name}"
        try:
            self.data = results.read(self.path)
        except (OSError, ValueError):
            self.data = {}
        if self.data.get("kind") != kind:
            self.data = {}
        self.data |= {"schema": results.SCHEMA, "kind": kind, "machine": environment.summary(environment.report())}
        for section in sections:
            self.data.setdefault(section, {})
        self.save()

    def add(self, section: str, name: str, row: dict[str, Any]) -> None:
        """Put a row in, with the time and the commit."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.data[section][name] = {"time": now, "commit": self.data["machine"]["commit"], **row}
        self.save()

    def merge(self, name: str, row: dict[str, Any]) -> None:
        """Put a case in that keeps what the file has of contestants that took no part this time, with its own time."""
        earlier = self.data["cases"].get(name, {})
        for who, old in earlier.get("contestants", {}).items():
            row["contestants"].setdefault(who, {"time": earlier["time"], **old})
        _keep(row["ratios"], earlier.get("ratios", {}))
        self.add("cases", name, row)

    def save(self) -> None:
        """Write the file."""
        results.write(self.path, self.data)


def _keep(new: dict[str, Any], old: dict[str, Any]) -> None:
    """Add to a dictionary of dictionaries what only the old one has."""
    for key, value in old.items():
        if isinstance(value, dict) and isinstance(new.get(key), dict):
            _keep(new[key], value)
        else:
            new.setdefault(key, value)
