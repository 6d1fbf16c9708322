"""Result files into the README's table and the plots in docs/benchmarks/: ``python -m benchmarks.report [--check]``.

It measures nothing. Everything between the two markers in the README is its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from resnet_fast._dtypes import DTYPES
from resnet_fast._files import write_text
from resnet_fast.benchmarking import plot, results
from resnet_fast.benchmarking.contention import processes
from resnet_fast.benchmarking.machine import DISTURBED, threads_text
from resnet_fast.benchmarking.peers import PEERS

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
HEADINGS = {
    "eager": "torch eager",
    "inductor": "inductor + freezing",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "mnn": "MNN",
    "ncnn": "ncnn",
    "live": "live module",
    "optimize": "**optimize()**",
}

ON_GPU = {
    "optimize": "**optimize()**",
    "recorded": "with its own graphs",
    "live": "live module",
    "eager": "torch eager",
    "compile": "torch.compile max-autotune",
    "jax": "JAX/XLA",
    "cudnn": "cuDNN graph API",
}


def load(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return all whole-model results below ``folder``, by machine, in the order of network, batch and precision."""
    machines: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        result = results.read(path)
        if result.get("kind") == "model":
            machines.setdefault(path.parent.name, []).append(result | {"name": path.stem})
    for found in machines.values():
        found.sort(key=_order)
    return machines


def _order(result: dict[str, Any]) -> tuple[int, str, int, bool, int]:
    setting = result["setting"]
    half = setting["dtype"] != "float32"
    return len(setting["arch"]), setting["arch"], setting["batch"], half, -setting["threads"]


def table(found: list[dict[str, Any]]) -> str:
    """Return the Markdown tables of one machine, with the line that says what it is: times, errors, and times beside
    busy processes."""
    parts = [time_table(found), accuracy_table(found), *(map(contended_table, found))]
    return "\n\n".join(filter(None, parts))


def time_table(found: list[dict[str, Any]]) -> str:
    """Return the medians of all contestants, and how many times faster ours is than eager and than the best peer."""
    names = [name for name in HEADINGS if any(_median(result, name) != "–" for result in found)]
    assert set(names) <= set(PEERS)
    heading = ["network", "precision", "batch", *map(HEADINGS.__getitem__, names), "against eager", "against best peer"]
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * 3 + "---:|" * (len(heading) - 3)]
    usual = found[0]["setting"]["threads"]
    for result in found:
        against = result["ratios"]["against"]
        cells = _case(result, usual) + [_median(result, name) for name in names]
        cells.append(f"{against['eager']['p50']:.2f}×" if "eager" in against else "–")
        best = result["ratios"]["best_peer"]
        cells.append(f"{against[best]['p50']:.2f}× ({HEADINGS[best]})" if best else "–")
        lines.append("| " + " | ".join(cells) + " |")
    machine, sizes = found[0]["machine"], sorted({result["setting"]["image_size"] for result in found})
    wide = ", ".join(flag for flag in machine["flags"] if flag.startswith(("avx512", "amx", "asimd", "sve")))
    installed = machine["versions"]
    runtimes = [name for name in ("torch", "onnxruntime", "openvino", "mnn", "ncnn") if name in installed]
    versions = ", ".join(f"{name} {installed[name]}" for name in runtimes)
    isa = found[0].get("resnet_fast", {}).get("engine", {}).get("isa")
    engine = f", CPU engine by {isa}" if isa else ""
    note = (
        f"Median ms per batch, {' and '.join(map(str, sizes))} px, {threads_text(usual)} on "
        f"{machine['cpu']} ({machine['cores']} cores{'; ' + wide if wide else ''}); {versions}{engine}; "
        "random weights. Ratios are medians over interleaved rounds of how many times faster optimize() is."
    )
    notes = {
        name: row["note"] for result in found for name in names if (row := _timed(result, name)) and row.get("note")
    }
    note += "".join(f" {HEADINGS[name]}: {text}." for name, text in notes.items())
    disturbed = [result["name"] for result in found if (result["others_busy_cores"] or 0) > DISTURBED]
    if disturbed:
        note += f" Other processes ran meanwhile, measure again: {', '.join(disturbed)}."
    return "\n".join([note, "", *lines])


def accuracy_table(found: list[dict[str, Any]]) -> str:
    """Return every contestant's error as a multiple of plain torch's; empty if no result has it."""
    names = [name for name in HEADINGS if any("times_torch" in _gate(result, name) for result in found)]
    if not names:
        return ""
    heading = ["network", "precision", "batch", *map(HEADINGS.__getitem__, names), "torch's error"]
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * 3 + "---:|" * (len(heading) - 3)]
    for result in found:
        gates = [_gate(result, name) for name in names]
        own = [f"{gate['torch']:.1e}" for gate in gates if "torch" in gate][:1]
        times = [f"{gate['times_torch']:.2f}" if gate.get("times_torch") is not None else "–" for gate in gates]
        lines.append("| " + " | ".join([*_case(result, found[0]["setting"]["threads"]), *times, *(own or "–")]) + " |")
    note = (
        "Error of the scores against float64, as a multiple of plain torch's at the same precision; the last column is "
        "torch's, relative to the norm of all scores. Above 2 (and one rounding) an answer counts as wrong: no time."
    )
    return "\n".join([note, "", *lines])


def contended_table(result: dict[str, Any]) -> str:
    """Return the times of one network beside busy processes; empty if they were not measured."""
    if "contended" not in result:
        return ""
    setting, contended = result["setting"], result["contended"]
    beside = f"beside {processes(contended['processes'])}"
    lines = [f"| runtime | alone, ms | {beside}, ms | times as long |", "|---|---:|---:|---:|"]
    there = [name for name in HEADINGS if name in contended["contestants"]]
    for name in sorted(there, key=lambda name: contended["contestants"][name]["slowdown"]):
        row = contended["contestants"][name]
        times = f"{_median(result, name)} | {1e3 * row['seconds']['p50']:.1f} | {row['slowdown']:.2f}"
        lines.append(f"| {HEADINGS[name]} | {times} |")
    note = (
        f"{setting['arch']}, {setting['dtype']}, batch {setting['batch']}, {threads_text(setting['threads'])} on "
        f"{result['machine']['cores']} cores, median ms per batch {beside} of one thread each:"
    )
    return "\n".join([note, "", *lines])


def _case(result: dict[str, Any], usual: int) -> list[str]:
    """The first cells of a row: network, precision, batch; the threads too if they are not the ``usual`` ones."""
    setting = result["setting"]
    threads = "" if setting["threads"] == usual else f", {threads_text(setting['threads'])}"
    return [setting["arch"] + threads, setting["dtype"], str(setting["batch"])]


def _median(result: dict[str, Any], name: str) -> str:
    """The median in ms; "wrong" for an answer that broke the error rule, a dash for who took no part."""
    if row := _timed(result, name):
        return f"{1e3 * row['seconds']['p50']:.1f}"
    return "wrong" if result["contestants"].get(name, {}).get("status") == "wrong" else "–"


def _gate(result: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = result["contestants"].get(name, {}).get("gate", {})
    return found


def _timed(result: dict[str, Any], name: str) -> dict[str, Any] | None:
    row = result["contestants"].get(name)
    return row if row and row["status"] == "timed" else None


# --- results of a GPU


def load_gpus(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what ``make gpu`` wrote below ``folder``: GPU -> "models", "ops", "correctness" -> the file's content."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in ("models", "ops", "correctness"):
        for path in sorted(folder.glob(f"*/{name}.json")):
            data = results.read(path)
            if data.get("kind") == f"gpu-{name}":
                found.setdefault(path.parent.name, {})[name] = data
    return found


def gpu_section(files: dict[str, dict[str, Any]]) -> str:
    """Return the tables of one GPU: networks, single ops at float16 and batch 128, relative errors."""
    parts = []
    if cases := measured(files):
        parts.append(gpu_table(cases, files["models"]["machine"]))
    if rows := op_rows(files):
        parts.append(op_table(rows, files["ops"]))
    if models := files.get("correctness", {}).get("models"):
        parts.append(error_table(models))
    return "\n\n".join(parts)


def measured(files: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the networks that were timed, by precision, network and batch."""
    cases = [row for row in files.get("models", {}).get("cases", {}).values() if "contestants" in row]
    precisions = list(DTYPES)

    def order(row: dict[str, Any]) -> tuple[int, int, str, int]:
        setting = row["setting"]
        return precisions.index(setting["precision"]), len(setting["arch"]), setting["arch"], setting["batch"]

    return sorted(cases, key=order)


def gpu_table(cases: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Images per second of every network, and how many times faster ours is."""
    names = [name for name in ON_GPU if any(_timed(row, name) for row in cases)]
    others = [name for name in names if not PEERS[name].ours]
    heading = ["network", "precision", "batch", *(ON_GPU[name] for name in names)]
    heading += [f"against {ON_GPU[name]}" for name in others]
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * 3 + "---:|" * (len(heading) - 3)]
    for row in cases:
        setting = row["setting"]
        cells = [setting["arch"], setting["precision"], str(setting["batch"])]
        for name in names:
            found = _timed(row, name)
            cells.append(f"{found['images_per_second']:,.0f}" if found else "–")
        for name in others:
            ratio = row["ratios"]["against"].get(name)
            cells.append(f"{ratio['p50']:.2f}×" if ratio else "–")
        lines.append("| " + " | ".join(cells) + " |")
    sizes = sorted({row["setting"]["image_size"] for row in cases})
    note = (
        f"Images per second, {' and '.join(map(str, sizes))} px, on {describe_gpu(machine)}; random weights. Each "
        "contestant by its faster way, plain calls or CUDA-graph replays; medians of interleaved rounds. "
        "Ratios are medians over the rounds of how many times faster optimize() is."
    )
    return "\n".join([note, "", *lines])


def describe_gpu(machine: dict[str, Any]) -> str:
    """Return the GPU with everything that its numbers depend on."""
    versions = machine["versions"]
    software = [f"{name} {versions[name]}" for name in ("torch", "triton", "jax") if name in versions]
    parts = [machine["gpu"], f"driver {machine['driver']}", *software, f"nvcc {machine['nvcc'] or 'none'}"]
    return ", ".join([*parts, f"commit {machine['commit'] or 'unknown'}"])


def op_rows(files: dict[str, dict[str, Any]], precision: str = "fp16", batch: int = 128) -> list[dict[str, Any]]:
    """Return the timed ops at one precision and batch size."""
    rows = files.get("ops", {}).get("rows", {}).values()
    return [row for row in rows if "share" in row and (row["precision"], row["batch"]) == (precision, batch)]


def op_table(rows: list[dict[str, Any]], file: dict[str, Any]) -> str:
    """Return each op beside its floor and plain torch."""
    lines = [
        "| op | shape | µs | floor µs | bound by | share of the floor | torch µs | Triton | CUDA | cuDNN |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        beside = [row.get("times", {}).get(name, {}) for name in ("triton", "cuda", "cudnn")]
        cells = [f"{one['us']:.1f}" if "us" in one else "wrong" if "wrong" in one else "–" for one in beside]
        lines.append(
            f"| {row['op']} | {row['case']} | {1e6 * row['seconds']['p50']:.1f} | {1e6 * row['floor_seconds']:.1f} | "
            f"{row['bound']} | {100 * row['share']:.0f} % | {1e6 * row['plain_seconds']['p50']:.1f} | "
            f"{' | '.join(cells)} |"
        )
    precision, batch = rows[0]["precision"], rows[0]["batch"]
    copied, computed = (file["ceilings"][name]["per_second"] / 1e12 for name in ("copy", precision))
    note = (
        f"Single ops, {precision}, batch {batch}, on {describe_gpu(file['machine'])}; medians of CUDA-graph replays, "
        f"inputs rotating past the level-2 cache. Floors from what was measured there: copy {copied:.2f} TB/s, "
        f"{precision} product {computed:.0f} TFLOP/s."
    )
    return "\n".join([note, "", *lines])


def error_table(models: dict[str, Any]) -> str:
    """Relative error of each network at each precision, ours and plain torch's."""
    lines = ["| network | relative error | of plain torch | allowed | |", "|---|---:|---:|---:|---|"]
    for name, row in models.items():
        cells = [f"{row[key]:.1e}" if row[key] is not None else "–" for key in ("error", "torch", "allowed")]
        lines.append(f"| {name} | {' | '.join(cells)} | {'right' if row['passed'] else 'WRONG: ' + row['reason']} |")
    return "\n".join(["Relative error of the scores against float64:", "", *lines])


def gpu_plots(slug: str, files: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """One plot for each precision that was timed, one of the ops' shares of their floors."""
    made, cases = [], measured(files)
    ours = {name for name, peer in PEERS.items() if peer.ours}
    for precision in dict.fromkeys(row["setting"]["precision"] for row in cases):
        groups = {}
        for row in cases:
            setting = row["setting"]
            timed = {name: found for name in row["contestants"] if (found := _timed(row, name))}
            if setting["precision"] == precision:
                rates = {name: found["images_per_second"] for name, found in timed.items()}
                groups[f"{setting['arch']} b{setting['batch']}"] = rates
        machine = files["models"]["machine"]
        title = f"{machine['gpu']}, {precision}, torch {machine['versions'].get('torch', '?')}"
        path = folder / f"{slug}-models-{precision}.svg"
        made.append(plot.save(plot.throughput(title, groups, ours), path))
    if rows := op_rows(files):
        found = {f"{row['op']} {row['case']}": row["share"] for row in rows}
        figure = plot.shares(f"{files['ops']['machine']['gpu']}, fp16, batch 128: share of the floor", found)
        made.append(plot.save(figure, folder / f"{slug}-ops-fp16-b128.svg"))
    return made


def markdown(machines: dict[str, list[dict[str, Any]]], gpus: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return what belongs between the markers."""
    sections = [gpu_section(files) for files in gpus.values()]
    return "\n\n".join([*filter(None, sections), *(table(found) for found in machines.values())])


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
    machines, gpus = load(given.results), load_gpus(given.results)
    if not machines and not gpus:
        print(f"report: no results in {given.results}; run python -m benchmarks.bench_models first", file=sys.stderr)
        return 1
    readme = given.readme.read_text(encoding="utf-8")
    try:
        fresh = spliced(readme, markdown(machines, gpus))
    except ValueError as error:
        print(f"report: {given.readme}: {error}", file=sys.stderr)
        return 1
    if given.check:
        if fresh != readme:
            print(f"report: {given.readme} is out of date; run python -m benchmarks.report", file=sys.stderr)
        return int(fresh != readme)
    write_text(given.readme, fresh)
    for slug, found in machines.items():
        for result in found:
            plot.save(plot.comparison(result), given.plots / f"{slug}-{result['name']}.svg")
    count = sum(map(len, machines.values()))
    count += sum(len(gpu_plots(slug, files, given.plots)) for slug, files in gpus.items())
    print(f"{given.readme} and {count} plots in {given.plots} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
