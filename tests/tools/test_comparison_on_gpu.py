"""The comparison on a GPU, with a CPU in its place: calls and graphs, JAX, cuDNN, and files that several runs share."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bench_models, environment
from resnet_fast.benchmarking import peers, results, timing
from resnet_fast.benchmarking.compare import Setting, compare, fresh_model, ratios
from resnet_fast.benchmarking.device import Captured, Device
from resnet_fast.benchmarking.peers import PEERS, Peer, Task
from resnet_fast.benchmarking.timing import Schedule

NO_GPU: dict[str, Any] = {
    "gpus": [], "nvcc": "", "python": "3", "cpu": "a cpu", "cores": 2, "versions": {}, "commit": "0123456789ab"
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def recorded_on_cpu(run: Callable[[], Tensor]) -> Captured:
    """What a CUDA graph does, on a CPU: one static output that every replay fills."""
    output = run().clone()
    return lambda: output.copy_(run()), output


CPU = Device("cpu", "cuda", lambda: None, recorded_on_cpu)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return fresh_model("resnet18", image_size=64)


def setting(*names: str, precision: str = "fp32", batch: int = 2, arch: str = "resnet18") -> Setting:
    return Setting(arch, None, batch, 64, precision, names, schedule=Schedule(seconds=0.05), device=CPU)


def test_networks_are_judged_and_timed_as_calls_and_as_graphs(model: nn.Module) -> None:
    def wrong(task: Task) -> Any:
        right = PEERS["eager"].build(task)
        return peers.Contestant(right.prepare, lambda batch: right.run(batch) * 1.1, right.result)

    def broken(task: Task) -> Any:
        raise OSError("no such\nlibrary")

    def stale(task: Task) -> Any:
        """Right when called, but its second call, which is what a graph records, is not."""
        right, calls = PEERS["eager"].build(task), []

        def run(batch: Tensor) -> Tensor:
            calls.append(1)
            return right.run(batch) * (1 if len(calls) == 1 else 2)

        return peers.Contestant(right.prepare, run, right.result)

    lineup = dict(PEERS) | {
        "live": Peer("live", "wrong on purpose", wrong),
        "compile": Peer("compile", "broken on purpose", broken),
        "jax": Peer("jax", "missing on purpose", broken, needs=("no_such_module",)),
        "cudnn": Peer("cudnn", "another answer from graphs", stale),
    }
    found = compare(setting("live", "eager", "compile", "jax", "cudnn"), model, peers=lineup)
    rows = found["contestants"]
    assert {name: row["call"]["status"] for name, row in rows.items()} == {
        "optimize": "timed", "live": "wrong", "eager": "timed", "compile": "excluded", "jax": "excluded",
        "cudnn": "timed",
    }  # fmt: skip
    assert rows["compile"]["call"]["reason"] == "failed: OSError: no such library"
    assert "no_such_module" in rows["jax"]["call"]["reason"]
    assert rows["cudnn"]["graph"]["status"] == "wrong" and "seconds" not in rows["cudnn"]["graph"]
    assert "graph" not in rows["live"] and "seconds" not in rows["live"]["call"]
    for mode in ("call", "graph"):
        assert rows["optimize"][mode]["images_per_second"] > 0 and rows["eager"][mode]["gate"]["passed"]
    assert set(found["ratios"]["against"]) == set(found["ratios"]["call"]) == {"eager", "cudnn"}
    assert set(found["ratios"]["graph"]) == {"eager"} and found["ratios"]["best_peer"] in ("eager", "cudnn")
    best = max(rows["eager"][mode]["images_per_second"] for mode in ("call", "graph"))
    assert rows["eager"]["status"] == "timed" and rows["eager"]["images_per_second"] == best
    assert rows["live"]["status"] == "wrong" and rows["compile"]["reason"] == "failed: OSError: no such library"
    assert found["setting"]["name"] == "resnet18-fp32-b2"
    json.loads(results.dumps(found))


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_networks_at_every_precision(model: nn.Module, precision: str) -> None:
    found = compare(setting("live", "eager", precision=precision), model)
    assert all(row["call"]["status"] == "timed" for row in found["contestants"].values())


def test_turns_divide_by_their_calls_and_wait_for_the_device() -> None:
    now, waits = [0.0], []

    def call(cost: float) -> Callable[[int], None]:
        def run(number: int) -> None:
            now[0] += cost

        return run

    calls = {"slow": call(0.5), "quick": call(0.001)}
    found = timing.turns(calls, lambda: waits.append(now[0]), seconds=0.1, turn=0.02, clock=lambda: now[0])
    assert len(found["slow"]) == len(found["quick"]) == 5
    assert found["quick"][0][0] == pytest.approx(0.001) and found["slow"][0][0] == pytest.approx(0.5)
    assert len(waits) >= 2 * 5


def test_against_takes_each_sides_faster_way() -> None:
    samples: timing.Samples = {
        "optimize call": [[4.0]], "optimize graph": [[1.0]], "eager call": [[8.0]], "eager graph": [[6.0]],
        "jax call": [[3.0]],
    }  # fmt: skip
    found = ratios(samples, ("optimize",))
    assert {kind: {who: one["p50"] for who, one in found[kind].items()} for kind in ("against", "call", "graph")} == {
        "against": {"eager": 6, "jax": 3}, "call": {"eager": 2, "jax": 0.75}, "graph": {"eager": 6}
    }  # fmt: skip
    assert found["best_peer"] == "jax"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_jax_gives_the_right_answer(model: nn.Module, precision: str) -> None:
    pytest.importorskip("jax")
    found = compare(setting("jax", precision=precision), model)
    assert found["contestants"]["jax"]["call"]["status"] == "timed"


class FakeCudnn:
    """The part of nvidia-cudnn-frontend that the contestant uses, computed by torch, as its own tests call it."""

    class data_type:
        HALF, BFLOAT16, FLOAT = "half", "bfloat16", "float"

    class heur_mode:
        A, FALLBACK = "a", "fallback"

    class Value:
        """A tensor of a graph: how to compute it from what is bound to the graph's inputs."""

        def __init__(self, shape: list[int], compute: Callable[[dict[Any, Tensor]], Tensor] | None = None) -> None:
            self.shape, self.computed = shape, compute is not None
            self.compute = compute or (lambda bound: bound[self])

        def set_output(self, is_output: bool) -> FakeCudnn.Value:
            return self

        def set_data_type(self, kind: str) -> FakeCudnn.Value:
            return self

        def get_dim(self) -> list[int]:
            return self.shape

    class pygraph:
        def __init__(self, *, io_data_type: str, intermediate_data_type: str, compute_data_type: str, handle: Any):
            self.stages: list[str] = []

        def tensor(self, *, name: str, dim: list[int], stride: list[int], data_type: str) -> FakeCudnn.Value:
            assert stride[1] == 1 and len(dim) == len(stride) == 4
            return FakeCudnn.Value(dim)

        def conv_fprop(self, *, image: Any, weight: Any, **how: list[int]) -> FakeCudnn.Value:
            shape = list(nn.functional.conv2d(torch.empty(image.shape), torch.empty(weight.shape), **how).shape)

            def compute(bound: dict[Any, Tensor]) -> Tensor:
                return nn.functional.conv2d(bound[image].float(), bound[weight].float(), **how)

            return FakeCudnn.Value(shape, compute)

        def mul(self, *, a: Any, b: Any) -> FakeCudnn.Value:
            return FakeCudnn.Value(a.shape, lambda bound: a.compute(bound) * b.compute(bound))

        def add(self, *, a: Any, b: Any) -> FakeCudnn.Value:
            return FakeCudnn.Value(a.shape, lambda bound: a.compute(bound) + b.compute(bound))

        def relu(self, *, input: Any) -> FakeCudnn.Value:
            return FakeCudnn.Value(input.shape, lambda bound: input.compute(bound).relu())

        def __getattr__(self, name: str) -> Any:
            if name not in (
                "validate",
                "build_operation_graph",
                "create_execution_plans",
                "check_support",
                "build_plans",
            ):
                raise AttributeError(name)
            return lambda *given: self.stages.append(name)

        def get_workspace_size(self) -> int:
            assert self.stages[-1] == "build_plans"
            return 0

        def execute(self, bound: dict[Any, Tensor], workspace: Tensor, handle: Any) -> None:
            (output,) = (value for value in bound if value.computed)
            bound[output].copy_(output.compute(bound))

    @staticmethod
    def create_handle() -> str:
        return "a handle"


@pytest.mark.parametrize(("arch", "precision"), [("resnet18", "fp32"), ("resnet50", "bf16")])
def test_cudnn_gives_the_right_answer(arch: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", FakeCudnn)
    lineup = dict(PEERS) | {"cudnn": Peer("cudnn", "cuDNN graph API", PEERS["cudnn"].build)}
    found = compare(setting("cudnn", arch=arch, precision=precision), fresh_model(arch, image_size=64), peers=lineup)
    row = found["contestants"]["cudnn"]
    assert row["call"]["status"] == row["graph"]["status"] == "timed", row


def test_cases_of_several_runs_meet_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    case = setting("live", batch=1)
    assert bench_models.measure(tmp_path, case)
    assert bench_models.measure(tmp_path, dataclasses.replace(case, peers=("eager",)))
    row = results.read(tmp_path / "models.json")["cases"][case.name]
    assert set(row["contestants"]) == {"optimize", "live", "eager"} and set(row["ratios"]["against"]) == {
        "live",
        "eager",
    }
    assert row["commit"] == "0123456789ab" and "time" in row["contestants"]["live"]
    assert set(row["ratios"]["graph"]) == {"live", "eager"}
    monkeypatch.setattr(bench_models, "compare", lambda *given, **options: 1 / 0)
    assert not bench_models.measure(tmp_path, case)
    assert "ZeroDivisionError" in results.read(tmp_path / "models.json")["cases"][case.name]["failed"]
