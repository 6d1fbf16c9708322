"""SyncBatchNorm over two gloo processes: the fused ops against one process that has the whole batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from tests.numerics import assert_obeys_error_rule

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")

#: Images of each process; statistics count values, so the shares need not be equal, and one may be empty.
SHARES = {"equal": (2, 2), "unequal": (1, 3), "one empty": (4, 0)}


def _network(dtype: torch.dtype = torch.float32, momentum: float | None = None) -> nn.Module:
    """Convolutions, a norm with and one without a ReLU, and one that averages over all batches (momentum None)."""
    torch.manual_seed(3)
    layers = rf.nn.ConvBNAct2d(3, 48, 3), rf.nn.ConvBNAct2d(48, 48, 1), rf.nn.ConvBNAct2d(48, 40, 1, activation=False)
    layers[1].bn.momentum = momentum
    return nn.Sequential(*layers).to(dtype)


def _step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients of x and of the parameters for a loss that sums over images, and buffers."""
    x = x.clone().requires_grad_()
    out = model(x)
    pattern = torch.arange(out[0].numel()).sin().view(out.shape[1:]) if len(out) else torch.zeros(out.shape[1:])
    (out * pattern + out.square() * pattern.roll(1)).sum().backward()
    found = {"output": out.detach(), "gradient of x": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return found | {name: value.clone() for name, value in model.named_buffers()}


def _worker(rank: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        inputs = torch.load(f"{folder}/inputs.pt", weights_only=True)
        results: dict[str, Any] = {}
        for case, shares in SHARES.items():
            for name in ("usual", "far"):
                model = nn.SyncBatchNorm.convert_sync_batchnorm(_network())
                mine = inputs[name].split(shares)[rank]
                reduces = _count_reductions()
                results[f"{case}, {name}"] = _step(model, mine)
                results[f"{case}, {name}"]["reductions"] = torch.tensor(reduces())
        group = torch.distributed.new_group([rank], use_local_synchronization=True)  # of one process: no communication
        model = nn.SyncBatchNorm.convert_sync_batchnorm(_network(), group)
        results["alone"] = _step(model, inputs["usual"])
        model = nn.SyncBatchNorm.convert_sync_batchnorm(_network(momentum=0.1))  # torch cannot compile an average
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
        results["compiled"] = _step(model, inputs["usual"].split(2)[rank])
        norm = nn.SyncBatchNorm.convert_sync_batchnorm(rf.nn.BNAct2d(3))
        reduces = _count_reductions()
        norm(inputs["usual"].split(SHARES["one empty"])[rank]).sum().backward()
        results["no gradient for x"] = torch.tensor(reduces())
        before = {name: value.clone() for name, value in norm.named_buffers()}
        norm(inputs["usual"][:0]).sum().backward()
        results["nothing anywhere"] = {n: (before[n], value) for n, value in norm.named_buffers() if "running" in n}
        for lean in (False, True):
            model = nn.SyncBatchNorm.convert_sync_batchnorm(_small_resnet(lean))
            results[f"lean {lean}"] = _step(model, torch.randn(2, 3, 64, 64, generator=torch.manual_seed(rank)))
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def _count_reductions() -> Any:
    """How often this process takes part in an all-reduce from now on, until asked."""
    real, calls = torch.distributed.all_reduce, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return real(*args, **kwargs)

    torch.distributed.all_reduce = counting

    def stop() -> int:
        torch.distributed.all_reduce = real
        return len(calls)

    return stop


def _small_resnet(lean: bool) -> nn.Module:
    torch.manual_seed(4)
    return rf.models.ResNet(rf.models.Bottleneck, [1, 1, 1, 1], num_classes=3, memory_efficient=lean)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    folder: Path = tmp_path_factory.mktemp("sync")
    torch.manual_seed(0)
    inputs = {"usual": torch.randn(4, 3, 6, 5), "far": torch.randn(4, 3, 6, 5) * 0.01 + 100}
    torch.save(inputs, folder / "inputs.pt")
    torch.multiprocessing.spawn(_worker, (str(folder),), nprocs=2)
    return inputs, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _expected(x: Tensor, momentum: float | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One process with the whole batch, in float32 by torch's layers and in float64."""
    same = _network(momentum=momentum)
    for module in same.modules():
        if hasattr(module, "act"):
            module.bn.register_forward_hook(lambda *_: None)  # the plain layers run
    return _step(same, x), _step(_network(torch.float64, momentum), x.double())


def _check(case: str, x: Tensor, parts: list[dict[str, Tensor]], momentum: float | None = None) -> None:
    same, exact = _expected(x, momentum)
    for name, wanted in same.items():
        if "far" in case and not name.startswith("0.bn.running"):
            continue  # whose terms, multiples of 100, cancel after each process has rounded its own
        if not wanted.is_floating_point():
            assert torch.equal(parts[0][name], wanted), f"{case}: {name}"
            continue
        if name in ("output", "gradient of x"):
            value = torch.cat([part[name] for part in parts])
        elif name.startswith("gradient"):
            value = parts[0][name] + parts[1][name]  # of a loss that sums over images
        else:
            assert torch.equal(parts[0][name], parts[1][name]), f"{case}: {name} differs between processes"
            value = parts[0][name]
        assert_obeys_error_rule(value, wanted, exact[name], f"{case}: {name}")


@pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning")
@pytest.mark.parametrize("case", SHARES)
@pytest.mark.parametrize("name", ["usual", "far"])
def test_two_processes_are_one_with_the_joint_batch(results: Any, case: str, name: str) -> None:
    inputs, ranks = results
    parts = [rank[f"{case}, {name}"] for rank in ranks]
    # One all-reduce a layer forward, one backward.
    assert [int(part.pop("reductions")) for part in parts] == [6, 6]
    _check(f"{case}, {name}", inputs[name], parts)


@pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning")
def test_a_compiled_network(results: Any) -> None:
    inputs, ranks = results
    compiled = [{name.replace("_orig_mod.", ""): value for name, value in rank["compiled"].items()} for rank in ranks]
    _check("compiled", inputs["usual"], compiled, 0.1)


@pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning")
def test_a_group_of_one_process(results: Any) -> None:
    inputs, ranks = results
    same, exact = _expected(inputs["usual"], None)
    for rank in ranks:
        for name, value in rank["alone"].items():
            if value.is_floating_point():
                assert_obeys_error_rule(value, same[name], exact[name], name)


def test_when_processes_communicate(results: Any) -> None:
    """Forward once, and backward only if x wants a gradient, with pixels or without: else they would wait for ever."""
    for rank in results[1]:
        assert int(rank["no gradient for x"]) == 1
        for before, after in rank["nothing anywhere"].values():
            assert torch.equal(before, after)


def test_memory_efficient_models_give_the_same_bits(results: Any) -> None:
    for rank in results[1]:
        for name, value in rank["lean False"].items():
            assert torch.equal(rank["lean True"][name], value), name
