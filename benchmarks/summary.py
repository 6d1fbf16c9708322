"""What ``make gpu`` found, as the short table that is printed last. Standard library only; it reads result files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def lines(results: Path) -> list[str]:
    """Return a line for each thing that the result files say."""
    text = [f"{name}: {row['line']}" for name, row in _rows(results, "native", "build")]
    for section in ("ops", "models"):
        found = _rows(results, "correctness", section)
        wrong = [name for name, row in found if not row["passed"]]
        if found:
            which = f"; WRONG: {', '.join(wrong)}" if wrong else ""
            text.append(f"{section}: {len(found) - len(wrong)} of {len(found)} right{which}")
    text += [f"tests, {name}: {row['counts']} ({row['ended']})" for name, row in _rows(results, "tests", "pytest")]
    sanitizer = _rows(results, "tests", "sanitizer")
    text += [f"{name}: {'clean' if row['clean'] else 'NOT CLEAN'}" for name, row in sanitizer]
    text += [f"{n:22s} img/s: {rates(row)}" for n, row in _rows(results, "models", "cases") if "contestants" in row]
    text += [f"{n}: img/s: {rates(row)}" for n, row in _rows(results, "training", "cases") if "contestants" in row]
    text += _fastest([row for _, row in _rows(results, "ops", "rows")])
    rows = [row for _, row in _rows(results, "ops", "rows") if "share" in row]
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        shares = sorted((100 * row["share"], f"{row['case']} {row['precision']} batch {row['batch']}") for row in mine)
        middle, (least, where) = shares[len(shares) // 2][0], shares[0]
        text.append(
            f"{op}: {middle:.0f} % of the floor's speed (median of {len(mine)}), least {least:.0f} % at {where}"
        )
    return text


def rates(row: Mapping[str, Any]) -> str:
    """Return ``optimize 51234, eager 20123 (2.55x)``: images a second of each contestant's faster way, and how many
    times ours is that; for training the peak memory too, or what is kept, and how many times eager's ours is."""
    parts = []
    for name, found in row["contestants"].items():
        if "images_per_second" not in found:
            parts.append(f"{name}: {found['status']}, {found['reason']}")
            continue
        memory = found.get("peak_bytes", found.get("kept_bytes"))
        ratio = row["ratios"].get("against", {}).get(name) or row["ratios"].get(name, {}).get("eager") or {}
        rate = found["images_per_second"]
        parts.append(
            (f"{name} {rate:.0f}" if rate >= 100 else f"{name} {rate:.3g}")
            + ("" if memory is None else f" {memory / 2**30:.1f} GiB" if memory >= 2**30 else f" {memory >> 20} MiB")
            + (f" ({ratio['p50']:.2f}x)" if ratio else "")
        )
    return ", ".join(parts)


def outcomes(output: str) -> dict[str, int]:
    """Return how many tests passed, failed, ... in the output of ``pytest -v``, with or without xdist."""
    counts: dict[str, int] = {}
    for line in output.splitlines():
        match = re.match(
            r"(?:\[gw\d+\] \[ *\d+%\] (\w+) \S+::|\S+::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b)", line
        )
        if match:
            word = match[1] or match[2]
            counts[word] = counts.get(word, 0) + 1
    return counts


def _fastest(rows: list[dict[str, Any]]) -> list[str]:
    """Per batch of ResNet-50 in float16, how many of its layers each kind of kernel is fastest at."""
    text = []
    for batch in dict.fromkeys(row["batch"] for row in rows if "batch" in row):
        wins: dict[str, int] = {}
        for row in rows:
            times = {name: one["us"] for name, one in row.get("times", {}).items() if "us" in one}
            if (row.get("precision"), row.get("batch")) == ("fp16", batch) and times:
                first = min(times, key=times.__getitem__)
                wins[first] = wins.get(first, 0) + 1
        if wins:
            counts = ", ".join(f"{name} {n}" for name, n in wins.items())
            text.append(f"layers at batch {batch}, fastest: {counts}")
    return text


def _rows(results: Path, name: str, section: str) -> list[tuple[str, dict[str, Any]]]:
    return list(read(results / f"{name}.json").get(section, {}).items())


def read(path: Path) -> dict[str, Any]:
    """Return the content of a result file; empty if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
