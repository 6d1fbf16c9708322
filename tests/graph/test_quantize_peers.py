"""int8 in benchmarks: what is right there, and the runtimes that run a quantized file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from resnet_fast.benchmarking.compare import Setting, _judge, compare
from resnet_fast.benchmarking.int8_peers import INT8_PEERS, simulated
from resnet_fast.benchmarking.peers import Contestant, Task, plain
from resnet_fast.benchmarking.timing import Schedule
from resnet_fast.graph import quantize_layers
from tests.graph.test_quantize import made, sqnr

BATCH = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(3))


def contestant(name: str, folder: Path) -> Contestant:
    missing = INT8_PEERS[name].missing(torch.int8)
    if missing:
        pytest.skip(missing)
    return INT8_PEERS[name].build(Task(made(), BATCH, torch.int8, torch.get_num_threads(), folder))


def test_the_simplest_recipe() -> None:
    """About as far from the exact answer as 8 bits are: neither exact nor useless."""
    model = made()
    with torch.no_grad():
        exact, found = plain(model).double()(BATCH.double()), simulated(model, BATCH)
        again = simulated(model, BATCH)
    assert 25 < sqnr(exact, found) < 50 and torch.equal(found, again)


@pytest.mark.parametrize("name", list(INT8_PEERS))
def test_contestants_are_right(name: str, tmp_path: Path) -> None:
    with torch.no_grad():
        verdict = _judge(made(), BATCH, torch.int8)
        answer = contestant(name, tmp_path)(BATCH)
    assert verdict(answer).passed, verdict(answer).reason
    assert not verdict(answer + 0.2 * answer.std()).passed
    assert answer.shape == (2, 10)


def test_a_comparison_in_int8() -> None:
    schedule = Schedule(seconds=0.01, min_rounds=1, calls=1, warmup=0)
    setting = Setting("resnet18", None, 1, 40, "int8", ("optimize",), schedule=schedule)
    assert setting.name == "resnet18-int8-b1" and setting.contestants == ("optimize",)
    from resnet_fast.benchmarking.compare import fresh_model

    result = compare(setting, fresh_model("resnet18", image_size=40))
    found = result["contestants"]["optimize"]
    assert found["status"] == "timed" and found["label"] == "resnet_fast.quantize()"
    assert found["layers_by_backend"][quantize_layers.computed_by((64, 64, 3, 3), 1)] == 66

    def wrong(task: Task) -> Contestant:
        right = INT8_PEERS["optimize"].build(task)

        def result(output: Tensor) -> Tensor:
            return right.result(output) * 1.3

        return replace(right, result=result)

    peers = {"optimize": replace(INT8_PEERS["optimize"], build=wrong)}
    with pytest.raises(RuntimeError, match=r"quantize|could not be measured"):
        compare(setting, fresh_model("resnet18", image_size=40), peers=peers)


def test_other_peers_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown peer 'mnn'; there are optimize, onnxruntime, openvino"):
        Setting(precision="int8", peers=("mnn",))
