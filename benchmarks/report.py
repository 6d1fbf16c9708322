"""Result files into the README's table and the plots in docs/benchmarks/: ``python -m benchmarks.report [--check]``.

It measures nothing. Everything between the two markers in the README is its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from resnet_fast.benchmarking import plot, results
from resnet_fast.benchmarking.machine import DISTURBED, threads_text
from resnet_fast.benchmarking.peers import PEERS

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
HEADINGS = {
    "eager": "torch eager",
    "inductor": "inductor + freezing",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "live": "live module",
    "optimize": "**optimize()**",
}


def load(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All whole-model results below ``folder``, by machine, in the order of network, batch and precision."""
    machines: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        result = results.read(path)
        if result.get("kind") == "model":
            machines.setdefault(path.parent.name, []).append(result | {"name": path.stem})
    for found in machines.values():
        found.sort(key=_order)
    return machines


def _order(result: dict[str, Any]) -> tuple[int, str, int, bool]:
    setting = result["setting"]
    return len(setting["arch"]), setting["arch"], setting["batch"], setting["dtype"] != "float32"


def table(found: list[dict[str, Any]]) -> str:
    """The Markdown table of one machine, with the line that says what it is."""
    names = [name for name in HEADINGS if any(_timed(result, name) for result in found)]
    assert set(names) <= set(PEERS)
    heading = ["network", "precision", "batch", *map(HEADINGS.__getitem__, names), "against eager", "against best peer"]
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * 3 + "---:|" * (len(heading) - 3)]
    for result in found:
        setting, against = result["setting"], result["ratios"]["against"]
        cells = [setting["arch"], setting["dtype"], str(setting["batch"])]
        cells += [f"{1e3 * row['seconds']['p50']:.1f}" if (row := _timed(result, name)) else "–" for name in names]
        cells.append(f"{against['eager']['p50']:.2f}×" if "eager" in against else "–")
        best = result["ratios"]["best_peer"]
        cells.append(f"{against[best]['p50']:.2f}× ({HEADINGS[best]})" if best else "–")
        lines.append("| " + " | ".join(cells) + " |")
    machine, sizes = found[0]["machine"], sorted({result["setting"]["image_size"] for result in found})
    wide = ", ".join(flag for flag in machine["flags"] if flag.startswith(("avx512", "amx", "asimd", "sve")))
    installed = machine["versions"]
    runtimes = [name for name in ("torch", "onnxruntime", "openvino") if name in installed]
    versions = ", ".join(f"{name} {installed[name]}" for name in runtimes)
    note = (
        f"Median ms per batch, {' and '.join(map(str, sizes))} px, {threads_text(found[0]['setting']['threads'])} on "
        f"{machine['cpu']} ({machine['cores']} cores{'; ' + wide if wide else ''}); {versions}; random weights. "
        "Ratios are medians over interleaved rounds of how many times faster optimize() is."
    )
    disturbed = [result["name"] for result in found if (result["others_busy_cores"] or 0) > DISTURBED]
    if disturbed:
        note += f" Other processes ran meanwhile, measure again: {', '.join(disturbed)}."
    return "\n".join([note, "", *lines])


def _timed(result: dict[str, Any], name: str) -> dict[str, Any] | None:
    row = result["contestants"].get(name)
    return row if row and row["status"] == "timed" else None


def markdown(machines: dict[str, list[dict[str, Any]]]) -> str:
    """What belongs between the markers."""
    return "\n\n".join(table(found) for found in machines.values())


def spliced(readme: str, text: str) -> str:
    """``readme`` with ``text`` between the markers. Raises ValueError if they are missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the README needs these two lines once each, in this order: {BEGIN} and {END}")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where the results are")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file with the markers")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "benchmarks", help="where the plots go")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README is out of date")
    given = parser.parse_args()
    machines = load(given.results)
    if not machines:
        print(f"report: no results in {given.results}; run python -m benchmarks.bench_models first", file=sys.stderr)
        return 1
    readme = given.readme.read_text(encoding="utf-8")
    try:
        fresh = spliced(readme, markdown(machines))
    except ValueError as error:
        print(f"report: {given.readme}: {error}", file=sys.stderr)
        return 1
    if given.check:
        if fresh != readme:
            print(f"report: {given.readme} is out of date; run python -m benchmarks.report", file=sys.stderr)
        return int(fresh != readme)
    results.write_text(given.readme, fresh)
    for slug, found in machines.items():
        for result in found:
            plot.save(plot.comparison(result), given.plots / f"{slug}-{result['name']}.svg")
    print(f"{given.readme} and {sum(map(len, machines.values()))} plots in {given.plots} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
