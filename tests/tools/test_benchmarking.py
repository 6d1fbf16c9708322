"""The measuring harness: what it refuses, in which order it runs, what it computes, and how it writes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import report
from resnet_fast import backends
from resnet_fast.benchmarking import contention, gate, machine, network, peers, plot, profile, results, timing
from resnet_fast.benchmarking.compare import Setting, compare, fresh_model, ratios
from resnet_fast.benchmarking.device import CUDA
from resnet_fast.benchmarking.timing import Schedule
from resnet_fast.cli import bench

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return fresh_model("resnet18", image_size=64)


QUICK = Schedule(rounds=2, calls=2, pause=0.0)


# --- timing


def test_quantiles_interpolate() -> None:
    assert timing.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    found = timing.summarize([float(n) for n in range(11)])
    assert (found.p10, found.p50, found.p90, found.min, found.max, found.count) == (1, 5, 9, 0, 10, 11)
    assert timing.quantile([7.0], 0.9) == 7.0


@pytest.mark.parametrize(("values", "fraction"), [([], 0.5), ([1.0], 1.5), ([1.0], -0.1)])
def test_quantile_refuses(values: list[float], fraction: float) -> None:
    with pytest.raises(ValueError, match="quantile"):
        timing.quantile(values, fraction)


def test_rotation_gives_everybody_every_place() -> None:
    names = ["a", "b", "c"]
    orders = [timing.rotated(names, number) for number in range(6)]
    assert all(sorted(order) == names for order in orders)
    for place in range(3):
        assert {order[place] for order in orders} == set(names)
    followers = {(order[i], order[i + 1]) for order in orders for i in range(2)}
    assert len(followers) == 6  # everybody follows everybody else at some time
    assert timing.rotated([], 3) == []


def test_interleave_runs_turns_in_rotated_order_and_times_only_the_calls() -> None:
    clock, log = Clock(), []

    def contestant(name: str, cost: float) -> Callable[[int], None]:
        def call(number: int) -> None:
            log.append((name, number))
            clock.now += cost

        return call

    fractions: list[float] = []
    samples = timing.interleave(
        {"a": contestant("a", 1.0), "b": contestant("b", 2.0)},
        Schedule(rounds=3, calls=2, warmup=1, pause=0.5),
        clock=clock,
        sleep=clock.sleep,
        progress=fractions.append,
    )
    assert samples == {"a": [[1.0, 1.0]] * 3, "b": [[2.0, 2.0]] * 3}
    turns = [name for name, _ in log[::3]]
    assert turns == ["a", "b", "a", "b", "a", "b"]  # rotated once, then reversed; rotated twice
    assert [number for name, number in log if name == "a"] == [number for name, number in log if name == "b"]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert clock.now == 3 * (2 * 0.5 + 3 * 1.0 + 3 * 2.0)


def test_interleave_by_seconds_does_the_least_number_of_rounds() -> None:
    clock = Clock()

    def call(number: int) -> None:
        clock.now += 1.0

    slow = timing.interleave({"a": call}, Schedule(seconds=0.1, min_rounds=4, pause=0), clock=clock, sleep=clock.sleep)
    assert len(slow["a"]) == 4
    long = timing.interleave({"a": call}, Schedule(seconds=50, min_rounds=4, pause=0), clock=clock, sleep=clock.sleep)
    assert len(long["a"]) == 10  # five calls of a second each
    assert timing.interleave({}, Schedule()) == {}


@pytest.mark.parametrize(
    "wrong", [{"rounds": 0}, {"seconds": 0.0}, {"calls": 0}, {"warmup": -1}, {"pause": -0.1}, {"min_rounds": 0}]
)
def test_schedule_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Schedule(**wrong)


def test_settle_waits_until_no_thread_spins() -> None:
    """With a runtime's thread that spins for 0.3 s after its call, and one that never stops."""
    clock = Clock()
    timing.settle(0.08, sleep=clock.sleep, used=lambda: min(clock.now, 0.3))
    assert clock.now == pytest.approx(0.31, abs=0.011)
    clock = Clock()
    timing.settle(0.08, sleep=clock.sleep, used=lambda: 0.0)
    assert clock.now == pytest.approx(0.08)
    clock = Clock()
    timing.settle(0.08, sleep=clock.sleep, used=lambda: clock.now)
    assert clock.now == pytest.approx(0.08 + timing.PATIENCE)


def test_paired_ratio_cancels_what_slows_a_whole_round() -> None:
    ours, theirs = [[1.0, 1.0], [10.0, 10.0], [1.0, 1.0]], [[2.0, 2.0], [20.0, 20.0], [2.0, 2.0]]
    found = timing.paired_ratio(ours, theirs)
    assert (found.p10, found.p50, found.p90) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="3 rounds against 2"):
        timing.paired_ratio(ours, theirs[:2])


def test_ratios_find_the_best_foreign_contestant() -> None:
    samples = {"optimize call": [[1.0]], "live call": [[0.5]], "eager call": [[3.0]], "openvino call": [[2.0]]}
    found = ratios(samples, ("optimize", "live"))
    assert found["best_peer"] == "openvino"
    assert {name: ratio["p50"] for name, ratio in found["against"].items()} == {"live": 0.5, "eager": 3, "openvino": 2}
    assert set(found) == {"against", "best_peer"}  # on a CPU there are no graphs to compare
    assert ratios({"optimize call": [[1.0]]}, ("optimize",)) == {"against": {}, "best_peer": None}


# --- the gate


def test_gate_lets_the_right_answer_pass_and_stops_the_wrong_ones() -> None:
    exact = torch.randn(4, 10, dtype=torch.float64)
    plain = exact.float() * (1 + 1e-6)
    assert gate.judge(exact.float(), plain, exact, torch.float32).passed
    assert gate.judge(exact.float() * (1 + 1.9e-6), plain, exact, torch.float32).passed
    wrong = gate.judge(exact.float() * (1 + 4e-6), plain, exact, torch.float32)
    assert not wrong.passed
    assert "beyond the allowed" in wrong.reason
    assert wrong.torch == pytest.approx(1e-6, rel=0.2) and wrong.times_torch == pytest.approx(4, rel=0.2)
    assert wrong.as_dict()["times_torch"] == wrong.times_torch
    assert gate.judge(exact, exact, exact, torch.float32).times_torch == 1
    assert gate.judge(exact * (1 + 1e-9), exact, exact, torch.float32).times_torch == math.inf
    assert "shape" in gate.judge(exact[:2].float(), plain, exact, torch.float32).reason
    hole = exact.float()
    hole[0, 0] = math.nan
    assert gate.judge(hole, plain, exact, torch.float32).reason == "answer is not finite"
    swapped = exact.float().flip(0)
    assert not gate.judge(swapped, plain, exact, torch.bfloat16).passed


@pytest.mark.parametrize("unfit", [torch.zeros(0), torch.ones(5), torch.tensor([1.0, math.inf])])
def test_gate_refuses_references_that_cannot_judge(unfit: Tensor) -> None:
    with pytest.raises(ValueError, match="nothing can be judged by it"):
        gate.judge(unfit, unfit, unfit.double(), torch.float32)
    with pytest.raises(ValueError, match=r"torch\.float64"):
        gate.judge(torch.rand(3), torch.rand(3), torch.rand(3), torch.float32)


# --- the network


def test_randomized_networks_are_seeded_varied_and_sane() -> None:
    first, again = (fresh_model("resnet18", image_size=64) for _ in range(2))
    for (name, a), (_, b) in zip(first.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert not first.training
    norm = first.layer1[0].bn1  # type: ignore[union-attr, index]
    assert norm.momentum == 0.1
    assert norm.running_var.std() > 0 and norm.weight.std() > 0 and norm.running_mean.abs().max() > 0
    batch = network.seeded_batches((2, 3, 64, 64), 1, seed=9)[0]
    with torch.no_grad():
        answer = first(batch)
    assert answer.isfinite().all() and answer.std() > 0.01 and not torch.equal(answer[0], answer[1])


def test_plain_is_the_same_network_in_torch_layers(model: nn.Module) -> None:
    layers = peers.plain(model)
    kinds = {type(module).__module__.split(".")[1] for module in layers.modules() if not list(module.children())}
    assert kinds == {"nn"}
    batch = network.seeded_batches((2, 3, 64, 64), 1)[0]
    with torch.no_grad():
        torch.testing.assert_close(layers(batch), model(batch), rtol=1e-5, atol=1e-5)

    class Quantized(nn.Identity):
        pass

    class CallsOurs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.resnet_fast.add_act.default(x, x, "relu")

    Quantized.__module__ = "torch.ao.nn.somewhere"  # a layer to fx, but none of torch.nn
    with pytest.raises(TypeError, match=r"layer 0 is a .*Quantized"):
        peers.plain(nn.Sequential(Quantized()))
    with pytest.raises(TypeError, match="no plain torch function"):
        peers.plain(CallsOurs())


# --- the comparison


def test_compare_times_the_right_and_reports_the_rest(model: nn.Module) -> None:
    def build_wrong(task: peers.Task) -> peers.Contestant:
        right = peers.PEERS["eager"].build(task)
        return dataclasses.replace(right, result=lambda output: output * 1.001)

    def build_broken(task: peers.Task) -> peers.Contestant:
        raise OSError("no such\nlibrary")

    lineup = dict(peers.PEERS) | {
        "live": peers.Peer("live", "wrong on purpose", build_wrong, ours=True),
        "onnxruntime": peers.Peer("onnxruntime", "broken on purpose", build_broken),
        "openvino": peers.Peer("openvino", "missing on purpose", build_broken, needs=("no_such_module",)),
        "inductor": peers.Peer("inductor", "other precision", build_broken, dtypes=(torch.bfloat16,)),
    }
    lineup |= {name: dataclasses.replace(lineup["openvino"], name=name) for name in ("mnn", "ncnn")}
    stages: list[str] = []
    setting = Setting(arch="resnet18", image_size=64, batch=3, schedule=QUICK)
    found = compare(setting, model, peers=lineup, progress=lambda stage, fraction: stages.append(stage))

    rows = found["contestants"]
    assert {name: row["status"] for name, row in rows.items()} == {
        "optimize": "timed",
        "live": "wrong",
        "eager": "timed",
        "inductor": "excluded",
        "onnxruntime": "excluded",
        "openvino": "excluded",
        "mnn": "excluded",
        "ncnn": "excluded",
    }
    assert "beyond the allowed" in rows["live"]["reason"]
    assert "seconds" not in rows["live"] and "live" not in found["samples"]
    assert rows["onnxruntime"]["reason"] == "failed: OSError: no such library"
    assert "pip install 'resnet_fast[bench]'" in rows["openvino"]["reason"]
    assert "not at this precision" in rows["inductor"]["reason"]
    assert found["ratios"]["best_peer"] == "eager"
    assert rows["eager"]["seconds"]["count"] == 4
    assert [len(turn) for turn in found["samples"]["eager"]] == [2, 2]
    assert stages.index("checked") < stages.index("measuring")
    assert rows["live"]["gate"]["times_torch"] > 100 and rows["eager"]["gate"]["times_torch"] == pytest.approx(1)
    layers = rows["optimize"]["layers_by_backend"]
    assert sum(layers.values()) == 69 and set(layers) <= set(backends.available()) | {"torch"}
    assert found["resnet_fast"]["cpu_capability"] and "contended" not in found
    assert json.loads(results.dumps(found))["machine"]["versions"]["torch"] == torch.__version__


def test_compare_measures_once_more_beside_busy_processes(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a contestant that takes at least 0.3 s while a busy process is there."""
    running: list[int] = []

    @contextlib.contextmanager
    def busy(count: int) -> Iterator[None]:
        running.append(count)
        yield
        running.clear()

    def build_slowed(task: peers.Task) -> peers.Contestant:
        right = peers.PEERS["eager"].build(task)
        return dataclasses.replace(right, run=lambda x: [time.sleep(0.3 if running else 0.0), right.run(x)][1])

    def build_wrong(task: peers.Task) -> peers.Contestant:
        return dataclasses.replace(peers.PEERS["eager"].build(task), result=lambda output: output * 1.001)

    monkeypatch.setattr(contention, "busy", busy)
    lineup = dict(peers.PEERS) | {
        "eager": peers.Peer("eager", "slowed", build_slowed, note="a remark"),
        "live": peers.Peer("live", "wrong", build_wrong, ours=True),
    }
    schedule = Schedule(rounds=1, calls=1, warmup=0, pause=0.0)
    names = ("live", "eager")
    setting = Setting(arch="resnet18", image_size=64, peers=names, schedule=schedule, threads=2, busy=2)
    before = torch.get_num_threads()
    assert before == 1
    found = compare(setting, model, peers=lineup)
    contended = found["contended"]
    assert contended["processes"] == 2 and set(contended["contestants"]) == {"optimize", "eager"}
    row = contended["contestants"]["eager"]
    assert row["seconds"]["p50"] > 0.3
    assert row["slowdown"] == pytest.approx(row["seconds"]["p50"] / found["contestants"]["eager"]["seconds"]["p50"])
    assert contended["ratios"]["best_peer"] == "eager"
    assert found["setting"]["threads"] == found["machine"]["threads"] == 2 and torch.get_num_threads() == before
    assert found["setting"]["name"] == "resnet18-float32-b1-t2" and found["setting"]["busy"] == 2

    found["resnet_fast"]["engine"] = {"isa": "avx2"}
    bench.show(found)
    shown = " ".join(capsys.readouterr().out.split())
    assert "The same beside 2 busy processes" in shown and "slowed: a remark" in shown
    assert re.search(r"optimize\(\) ran \d+ layers by \w+.*; instruction set of the CPU engine: avx2", shown)
    assert re.search(r"wrong [│|] wrong", shown) and "not timed: wrong: error" in shown
    text = report.table([found | {"name": "one"}])
    assert "| resnet18 | float32 | 1 |" in text and " | wrong | " in text and " torch eager: a remark." in text
    assert ", CPU engine by avx2; random weights" in text
    assert "resnet18, float32, batch 1, 2 threads" in text and "beside 2 busy processes of one thread each" in text
    assert f"| torch eager | {1e3 * found['contestants']['eager']['seconds']['p50']:.1f} | " in text
    assert f"| {row['slowdown']:.2f} |" in text
    two = found | {"setting": found["setting"] | {"threads": 1}, "name": "two"}
    both = report.table([found | {"name": "one"}, two])
    assert "| resnet18, 1 thread | float32 | 1 |" in both and "2 threads on" in both


def test_busy_processes_run_and_end_with_who_started_them() -> None:
    if machine.busy_seconds() is None:
        pytest.skip("nothing tells how busy this machine is")
    with contention.busy(1):
        disturbance = machine.Disturbance()
        time.sleep(0.5)
        cores = disturbance.cores()
    assert cores is not None and cores > 0.2
    code = (
        "import os; from resnet_fast.benchmarking import contention\nbusy = contention.busy(1)\nbusy.__enter__()\n"
        "print(busy.gen.gi_frame.f_locals['running'][0].pid, flush=True)\nos._exit(0)"
    )
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "check": True}
    pid = int(subprocess.run([sys.executable, "-c", code], **given).stdout)
    for _ in range(1_200):
        with contextlib.suppress(FileNotFoundError):
            if "getppid" in Path(f"/proc/{pid}/cmdline").read_text():
                time.sleep(0.1)
                continue
        return
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"process {pid} still runs")


def test_compare_fails_if_the_optimized_network_is_wrong(model: nn.Module) -> None:
    def build(task: peers.Task) -> peers.Contestant:
        right = peers.PEERS["eager"].build(task)
        return dataclasses.replace(right, result=lambda output: output + 1)

    lineup = dict(peers.PEERS) | {"optimize": peers.Peer("optimize", "wrong", build)}
    with pytest.raises(RuntimeError, match=r"could not be measured: error .* is beyond"):
        compare(Setting(image_size=64, peers=("eager",), schedule=QUICK), model, peers=lineup)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"image_size": 8}, "image size is 8"),
        ({"precision": "int4"}, "precision is 'int4', it must be one of fp32, bf16, int8"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
        ({"peers": ("tensorflow",)}, "unknown peer 'tensorflow'; there are optimize, live"),
        ({"peers": ("jax",)}, "unknown peer 'jax'"),
        ({"threads": 0}, "threads is 0"),
        ({"busy": -1}, "busy is -1"),
        ({"busy": 1, "device": CUDA}, "busy is 1, it must be at least 0, and 0 on a GPU"),
        ({"precision": "int8", "device": CUDA}, "precision is 'int8'"),
        ({"peers": ("openvino",), "device": CUDA}, "unknown peer 'openvino'; there are optimize, recorded"),
    ],
)
def test_setting_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setting(**wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["live", "onnxruntime", "openvino", "mnn", "ncnn"])
def test_contestants_give_the_right_answer(
    name: str, dtype: torch.dtype, model: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """For two batches in turn, of images whose planes are no multiple of a vector."""
    peer = peers.PEERS[name]
    reason = peer.missing(dtype)
    if reason:
        pytest.skip(reason)
    batches = [batch.to(dtype).float() for batch in network.seeded_batches((2, 3, 65, 65), 2)]
    contestant = peer.build(peers.Task(model, batches[0], dtype, 1, tmp_path))
    inputs = [contestant.prepare(batch) for batch in batches]
    for batch, ready in [*zip(batches, inputs, strict=True)] * 2:
        with torch.no_grad():
            exact = peers.plain(model).double()(batch.double())
            plain = peers.plain(model).to(dtype)(batch.to(dtype))
        verdict = gate.judge(contestant.result(contestant.run(ready)), plain, exact, dtype)
        # ncnn's Winograd has 1 to 2.2 times torch's error on images as small as these: the gate may refuse it here
        assert verdict.reason == "" or (name == "ncnn" and verdict.times_torch < 4)
    os.write(1, b"only this")
    assert capfd.readouterr().out == "only this"  # what the runtimes print would spoil `--json -`


def test_converters_that_make_nothing_have_failed(tmp_path: Path) -> None:
    code = [sys.executable, "-c", "print('fine')\nprint('no such layer')"]
    with pytest.raises(RuntimeError, match=r"the converter made no net\.mnn \(exit status 0\): no such layer"):
        peers._convert(code, tmp_path / "net.mnn")
    (tmp_path / "net.mnn").touch()
    peers._convert(code, tmp_path / "net.mnn")
    with pytest.raises(RuntimeError, match="exit status 3"):
        peers._convert([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "net.mnn")


@pytest.mark.slow
def test_inductor_contestant_is_frozen(tmp_path: Path) -> None:
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    batch = torch.randn(1, 3, 8, 8)
    try:
        contestant = peers.PEERS["inductor"].build(peers.Task(small, batch, torch.float32, 1, tmp_path))
    except Exception as error:  # there is no C++ compiler on every machine
        pytest.skip(f"inductor does not work here: {error}")
    with torch.no_grad():
        torch.testing.assert_close(contestant(batch), small(batch), rtol=1e-4, atol=1e-4)


# --- where the time goes


def test_node_times_name_kinds_and_stages(model: nn.Module) -> None:
    from resnet_fast.graph import optimize

    batch = network.seeded_batches((1, 3, 64, 64), 1)[0]
    plain, fused = profile.node_times([peers.plain(model), optimize(model).graph_module], batch, runs=2)
    assert {"convolution", "batch norm", "relu", "add", "pooling", "linear"} <= set(profile.by_part(plain))
    parts = {"fused stem", "fused conv + BN + add + ReLU", "fused head"}
    assert set(profile.by_part(fused)) - {"overflow guards"} == parts  # which oneDNN alone needs
    assert sum(time.part == "convolution" for time in plain) == 20
    assert sum(time.part == "add" for time in plain) == 8
    for times in (plain, fused):
        assert all(seconds > 0 for seconds in profile.by_stage(times).values())
        assert list(profile.by_stage(times)) == list(profile.STAGES)
    assert set(profile.by_part(plain)) | set(profile.by_part(fused)) <= set(plot.PARTS)


# --- the machine


def test_machine_describes_this_one() -> None:
    found = machine.describe()
    assert found.cpu and found.cores >= 1 and found.threads == torch.get_num_threads()
    assert found.versions["torch"] == torch.__version__ and found.versions["resnet_fast"]
    assert found.slug == found.slug.lower() and " " not in found.slug and found.slug.endswith("cores")
    assert str(found.threads) in found.summary
    json.loads(results.dumps(found.as_dict()))


def test_machine_slug_drops_decoration() -> None:
    found = dataclasses.replace(machine.describe(), cpu="Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", cores=8)
    assert found.slug == "intel-xeon-platinum-8481c-8-cores"


def test_disturbance_is_read_or_unknown() -> None:
    cores = machine.Disturbance().cores()
    assert cores is None or cores >= 0


# --- files


def test_results_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "result.json"
    results.write(path, {"schema": 1, "nan": math.nan, "pair": (1, 2.5)})
    assert results.read(path) == {"schema": 1, "nan": None, "pair": [1, 2.5]}
    assert '"pair": [1, 2.5]' in path.read_text()
    monkeypatch.setenv("HOME", "/home/ada")
    results.write(path, {"schema": 1, "reason": "no table in /home/ada/.cache, nor in /home/adam"})
    assert results.read(path)["reason"] == "no table in ~/.cache, nor in /home/adam"

    def fail(source: Any, target: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        results.write(path, {"schema": 1, "new": True})
    assert "new" not in results.read(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["result.json"]
    with pytest.raises(TypeError):
        results.write(path, {"schema": object()})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"{path}: cannot be written \(No space left on device\); what was there before"):
        results.write(path, {"schema": 1, "new": True})
    assert "new" not in results.read(path)
    with pytest.raises(IsADirectoryError, match=r"is a folder"):
        results.write(path.parent, {"schema": 1})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99}', "\x00"])
def test_results_refuse_other_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a result file"):
        results.read(path)


@pytest.fixture(scope="module")
def result(model: nn.Module) -> dict[str, Any]:
    setting = Setting(arch="resnet18", image_size=64, peers=("eager",), schedule=QUICK)
    return compare(setting, model)


def test_plots_are_drawn(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first = plot.save(plot.comparison(result), tmp_path / "a.svg").read_bytes()
    assert b"resnet_fast.optimize()" in first
    assert plot.save(plot.comparison(result), tmp_path / "b.svg").read_bytes() == first
    labels = [text for text in plot.comparison(result).axes[0].texts if text.get_text().endswith("ms")]
    assert labels and all(text.xyann[0] >= 4 and text.get_text() == text.get_text().strip() for text in labels)
    bars = {"plain": {"convolution": 0.2, "relu": 0.1}, "fused": {"fused head": 0.1}}
    assert plot.save(plot.breakdown("title", bars), tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(plot.PlotError, match="must end in"):
        plot.save(plot.breakdown("title", bars), tmp_path / "c.txt")


def test_plots_without_matplotlib_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(plot.PlotError, match=r"pip install 'resnet_fast\[plot\]'"):
        plot.check("a.png")


def test_report_writes_between_the_markers_and_checks(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    results.write(tmp_path / "results" / "some-machine" / "resnet18-float32-b1.json", result)
    readme = tmp_path / "README.md"
    arguments = ["report", "--results", f"{tmp_path}/results", "--readme", str(readme), "--plots", f"{tmp_path}/plots"]

    readme.write_text("no markers")
    monkeypatch.setattr("sys.argv", arguments)
    assert report.main() == 1
    assert "the README needs these two lines" in capsys.readouterr().err

    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr("sys.argv", [*arguments, "--check"])
    assert report.main() == 1
    monkeypatch.setattr("sys.argv", arguments)
    assert report.main() == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| resnet18 | float32 | 1 |" in text
    assert (tmp_path / "plots" / "some-machine-resnet18-float32-b1.svg").exists()
    monkeypatch.setattr("sys.argv", [*arguments, "--check"])
    assert report.main() == 0
