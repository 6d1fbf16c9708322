"""The benchmark commands without a GPU: what they judge, in which order and for how long they measure, their files."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    bench_models,
    bench_ops,
    bench_training,
    environment,
    gpu,
    ops,
    report,
    summary,
    workers,
)
from benchmarks.book import Book
from benchmarks.gpu import Outcome
from resnet_fast import backends
from resnet_fast._dtypes import DTYPES
from resnet_fast.backends import cuda as native
from resnet_fast.benchmarking import results, timing
from resnet_fast.benchmarking.compare import Setting
from resnet_fast.benchmarking.timing import Deadline
from resnet_fast.kernels import gpus
from resnet_fast.tuning import cuda as tuning
from resnet_fast.tuning import ops as adapters
from tests.cuda_device import installed
from tests.tools.test_comparison_on_gpu import CPU, NO_GPU

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a GPU; torch is left as deterministic, which ``--check`` makes it, as it was before."""
    monkeypatch.setattr(environment, "report", lambda: NO_GPU)
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_deadline_starts_nothing_that_it_has_no_time_for() -> None:
    now = [0.0]
    deadline = Deadline(10.0, clock=lambda: now[0])
    done = []
    for item in deadline.each(range(9)):
        now[0] += 3.0
        done.append(item)
    assert done == [0, 1, 2]
    assert deadline.share(0.5).left == pytest.approx(0.5)


def falls(item: int) -> tuple[int, str]:
    """For processes of their own: one item ends its process."""
    if item == 2:
        os._exit(7)
    return item, "done"


def test_a_process_that_dies_costs_only_its_item() -> None:
    with workers.mapped(falls, range(5), 2, lambda item, reason: (item, reason)) as found:
        assert dict(found) == dict.fromkeys((0, 1, 3, 4), "done") | {2: "its process ended with exit status 7"}
    assert bench_ops._lost(("tf32", 7, "cuda", "auto", 1), "gone")[0] == "add_act 17-9px tf32 batch 3"


# --- training


def test_training_steps_are_judged_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of several rounds in one file, with what an earlier one measured."""
    case = bench_training.Case("resnet18", "fp32", 4, 32, judged=4)
    options: dict[str, Any] = {"device": "cpu", "seconds": 0.05}
    assert bench_training.measure_into(tmp_path, case, ("eager", "ours"), **options)
    assert bench_training.measure_into(tmp_path, case, ("eager", "lean"), **options)
    row = results.read(tmp_path / "training.json")["cases"][case.name]
    assert set(row["contestants"]) == {"eager", "ours", "lean"} and "time" in row["contestants"]["ours"]
    assert set(row["ratios"]) == {"ours", "lean"} and row["ratios"]["ours"]["eager"]["p50"] > 0
    assert row["commit"] == "0123456789ab" and row["contestants"]["lean"]["gate"]["gradients"]["passed"]
    row["contestants"]["ours"]["peak_bytes"] = 3 * 2**29
    assert " 1.5 GiB (" in summary.rates(row)
    assert f"{case.name}: img/s: eager " in gpu.table(tmp_path, {})
    assert capsys.readouterr().out.count(f"  {case.name}: img/s: eager ") == 2


def test_wrong_gradients_fail_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, tuple[str, ...]]] = []

    def measured(case: bench_training.Case, *, names: tuple[str, ...], **options: Any) -> dict[str, Any]:
        seen.append((case.name, names))
        rows = {name: {"ours": name != "eager", "status": "timed", "images_per_second": 9.0} for name in names}
        rows[names[-1]] |= status
        return {"contestants": rows, "ratios": {}}

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["it", "--device", "cpu", "--out", str(tmp_path), *arguments])
        return bench_training.main()

    monkeypatch.setattr(bench_training, "measure", measured)
    status: dict[str, Any] = {}
    assert run() == 0 and [name for name, _ in seen] == [f"training-resnet50-{p}-b8" for p in ("bf16", "fp32")]
    status |= {"status": "wrong", "reason": "gradients: beyond"}
    assert run("--dtype", "bf16") == 1
    monkeypatch.setattr(bench_training, "measure", lambda *given, **options: 1 / 0)
    assert run() == 1
    cases = results.read(tmp_path / "training.json")["cases"]
    assert all("ZeroDivisionError" in row["failed"] for row in cases.values())
    cases = [bench_training.Case("resnet50", "bf16", batch) for batch in (128, 256)]
    order = [names for _, names in bench_training.rounds(cases, bench_training.NAMES, "cuda")]
    assert [names[-1] for names in order] == ["lean", "lean", "compile", "compile", "ours_compile", "ours_compile"]
    assert all(names[:2] == ("eager", "ours") for names in order)


# --- ops


def test_conv_shapes_are_those_of_the_network() -> None:
    found = ops.conv_shapes("resnet50")
    assert len(found) == len(set(found)) == 23
    assert ops.ConvShape(64, 256, 1, 1, 56, residual=True) in found
    assert ops.ConvShape(256, 512, 1, 2, 56, activation="none") in found
    assert ops.ConvShape(512, 512, 3, 2, 14) in found
    assert sum(shape.residual for shape in found) == 4
    basic = ops.conv_shapes("resnet18")
    assert ops.ConvShape(64, 64, 3, 1, 56, residual=True) in basic and ops.ConvShape(64, 64, 3, 1, 56) in basic
    assert any(shape.groups == 32 for shape in ops.conv_shapes("resnext50_32x4d"))


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_smoke_judges_every_op(precision: str, tmp_path: Path) -> None:
    assert bench_ops.check(tmp_path, Deadline(100), device="cpu", workers=1, precisions=(precision,)) == 0
    rows = results.read(tmp_path / "correctness.json")["ops"]
    every = {"conv_bn_act", "add_act", "batch_norm_act", "stem", "head", "bottleneck_tail"}
    assert {name.split()[0] for name in rows} == every
    assert all(row["passed"] and row["error"] <= row["allowed"] for row in rows.values())


def test_smoke_shares_its_work_between_processes(tmp_path: Path) -> None:
    assert bench_ops.check(tmp_path, Deadline(100), device="cpu", workers=2, precisions=("fp32",)) == 0
    assert len(results.read(tmp_path / "correctness.json")["ops"]) == len(ops.small("fp32", "cpu"))


def test_smoke_compares_the_bits_of_every_answer() -> None:
    case, calls = ops.small("fp32", "cpu")[0](), [0]

    def now_and_then(*activations: Any) -> Any:
        calls[0] += 1
        answer = case.contestants["op"](*activations)
        first = answer[0] if isinstance(answer, tuple) else answer
        if calls[0] in (3, 7):
            first[(0,) * first.dim()] += 1e-6
        return answer

    assert case.varies("op", 50) == ""
    odd = dataclasses.replace(case, contestants={**case.contestants, "op": now_and_then})
    assert odd.varies("op", 50) == "2 of 50 answers have other bits" and calls == [50]
    nan = torch.full((3,), float("nan"), dtype=torch.bfloat16)
    same = dataclasses.replace(case, contestants={**case.contestants, "op": lambda *_: nan})
    assert same.varies("op", 3) == ""


def test_smoke_that_is_cut_off_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels are not measured then, so ``cuda`` must not count as done."""
    passed, now = [True], [0.0]

    def one(item: Any) -> tuple[str, dict[str, Any]]:
        now[0] += 1
        return str(item[:2]), {"passed": passed[0], "error": 0.0, "allowed": 1.0, "reason": ""}

    monkeypatch.setattr(bench_ops, "_judged", one)
    whole = len(ops.small("fp16", "cpu")) * len(DTYPES)
    for seconds, right, status in ((whole + 1, True, 0), (whole, True, 0), (3, True, bench_ops.CUT_OFF), (3, False, 1)):
        now[0], passed[0] = 0.0, right
        deadline = Deadline(seconds, clock=lambda: now[0])
        assert bench_ops.check(tmp_path, deadline, device="cpu", workers=1) == status
    assert bench_ops.CUT_OFF == gpu.CUT_OFF


def test_smoke_by_the_cuda_kernels_covers_all_that_they_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}

    def one(item: bench_ops.Item) -> tuple[str, dict[str, Any]]:
        precision, index, device, *_ = item
        made: Any = ops.small(precision, device)[index]
        seen.setdefault(precision, set()).add(made.func.__name__)
        return str(item), {"passed": True, "error": 0.0, "allowed": 1.0, "reason": ""}

    monkeypatch.setattr(bench_ops, "_judged", one)
    assert bench_ops.check(tmp_path, Deadline(60), device="cpu", workers=1, backend="cuda") == 0
    every = set(native.OPS)
    assert {"conv_bn_act", "stem", "head", "add_act"} <= every
    assert seen == {"fp16": every, "bf16": every, "tf32": every, "fp32": every - {"conv_bn_act", "stem"}}


def test_smoke_sees_a_wrong_and_a_broken_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.add_act(16, 5, 2, "fp32")

    def skewed(x: Tensor, y: Tensor) -> Tensor:
        return right.contestants["plain"](x, y) * 1.001

    def spoiled(name: str, run: Callable[..., Tensor]) -> ops.OpCase:
        return ops.OpCase(
            "add_act", name, "fp32", 2, right.data, {**right.contestants, "op": run}, right.exact, right.work
        )

    cases = [right, spoiled("skewed", skewed), spoiled("broken", lambda x, y: 1 / 0)]

    def add_act(case: ops.OpCase) -> ops.OpCase:
        return case

    monkeypatch.setattr(ops, "small", lambda precision, device: [functools.partial(add_act, case) for case in cases])
    assert bench_ops.check(tmp_path, Deadline(100), device="cpu", workers=1, precisions=("fp32",)) == 1
    rows = results.read(tmp_path / "correctness.json")["ops"]
    assert [row["passed"] for row in rows.values()] == [True, False, False]
    assert "beyond the allowed" in rows["add_act skewed fp32 batch 2"]["reason"]
    assert "ZeroDivisionError" in rows["add_act broken fp32 batch 2"]["reason"]
    assert capsys.readouterr().out.count("WRONG") == 2


def test_ops_are_timed_beside_their_floor(book: Book, tmp_path: Path) -> None:
    ceilings = bench_ops.measure_ceilings(CPU, size=1 << 16, edge=64)
    assert set(ceilings) == {"copy", "fp16", "bf16", "tf32", "fp32"}
    assert all(row["per_second"] > 0 for row in ceilings.values())
    case = ops.conv_bn_act(ops.ConvShape(16, 16, 3, 1, 8), 2, "fp32")
    with torch.no_grad():
        assert bench_ops.measure_op(book, case, LIMITS, CPU, seconds=0.05)
    row = results.read(tmp_path / "ops.json")["rows"][case.title]
    assert row["floor_seconds"] == pytest.approx(2 * 2 * 16 * 64 * 9 * 16 / 1e9)  # 2 * N * P * Q * K * R * S * C
    assert row["bound"] == "math" and row["share"] == pytest.approx(row["floor_seconds"] / row["seconds"]["p50"])
    moved = 4 * (2 * 2 * 16 * 64)
    assert row["bytes"] == moved + 4 * 16 * 9 * 16 + 2 * 4 * 16
    assert row["input_sets"] == -(-2 * (1 << 16) // moved)
    assert set(row["against_plain"]) >= {"p10", "p50", "p90"}


def test_accuracy_is_written_for_every_network(tmp_path: Path) -> None:
    cases = (("resnet18", "bf16"), ("resnet18", "fp32"))
    assert bench_models.check(tmp_path, Deadline(100), cases, device="cpu", image_size=64, batch=5) == 0
    rows = results.read(tmp_path / "correctness.json")["models"]
    assert list(rows) == ["resnet18 bf16", "resnet18 fp32"]
    assert all(0 < row["error"] <= row["allowed"] and row["torch"] > 0 for row in rows.values())


def test_ops_are_timed_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a floor, and with constants bound beforehand beside the op."""
    options = ["--device", "cpu", "--op", "head", "--dtype", "fp32", "--batch", "1", "--case-seconds", "0.01"]
    monkeypatch.setattr("sys.argv", ["it", *options, "--out", str(tmp_path)])
    assert bench_ops.main() == 0
    (row,) = results.read(tmp_path / "ops.json")["rows"].values()
    assert row["op"] == "head" and row["passed"] and "share" not in row
    assert all(row[key]["p50"] > 0 for key in ("seconds", "plain_seconds", "prepared_seconds"))
    assert "x plain torch's speed" in capsys.readouterr().out


def test_without_a_module_the_cuda_check_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not backends.available()["cuda"]:
        pytest.skip("it is built here")
    options = ["--check", "--backend", "cuda", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["it", *options])
    assert bench_ops.main() == 0
    assert f"  not run: {native.unavailable()}" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


@pytest.mark.cuda
def test_smoke_by_the_cuda_kernels_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they do not compute is wrong there, for a fallback would be judged in their place."""
    native_device = "cuda" if not native.unavailable() else "cpu"

    def small(precision: str, device: str) -> list[Callable[[], ops.OpCase]]:
        given = (2, precision, device)
        return [
            functools.partial(ops.conv_bn_act, ops.ConvShape(17, 13, 3, 1, 5, residual=True), *given),
            functools.partial(ops.head, 17, 3, *given, k=13),
            functools.partial(ops.bottleneck_tail, ops.SMALL_TAILS[0], *given),
        ]

    monkeypatch.setattr(ops, "small", small)
    how: dict[str, Any] = {"device": native_device, "workers": 1, "backend": "cuda", "precisions": ("fp16", "fp32")}
    with installed():
        assert bench_ops.check(tmp_path, Deadline(60), **how) == 0
        rows = results.read(tmp_path / "correctness.json")["ops"]
        assert [name.split()[0] for name in rows] == ["conv_bn_act", "head", "head"]
        assert all(name.endswith("by cuda") and row["passed"] for name, row in rows.items())
        monkeypatch.setattr(native, "kernel", lambda *given: ("", "not today"))
        with pytest.warns(backends.FallbackWarning):
            assert bench_ops.check(tmp_path, Deadline(60), **how) == 1
    rows = results.read(tmp_path / "correctness.json")["ops"]
    assert [row["reason"] for row in rows.values()] == ["something slower ran than was asked for"] * 3


# --- by every kind of kernel


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Book:
    return Book(tmp_path, "ops", ("ceilings", "rows"))


LIMITS = gpus.GPU("slow", 90, 1, 1, 1, 1 << 16, 1e9, dict.fromkeys(gpus.PRECISIONS, 1e9))


def kernels(monkeypatch: pytest.MonkeyPatch, **by: Callable[..., Tensor]) -> None:
    """In place of each backend's kernels these functions."""
    real = bench_ops._by
    monkeypatch.setattr(bench_ops, "_by", lambda backend, run: by.get(backend) or real(backend, run))


def test_each_kind_of_kernel_stands_beside_the_op(
    book: Book, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong and slower answers are no times; a CUDA pass later leaves what there is."""
    case = ops.add_act(16, 8, 2, "fp32")

    def falls_back(x: Tensor, y: Tensor) -> Tensor:
        backends.fallback("add_act", "no tile")
        return torch.relu(x + y)

    kernels(monkeypatch, triton=lambda x, y: torch.relu(x + y) * 1.001, cuda=lambda x, y: torch.relu(x + y))
    with torch.no_grad():
        assert not bench_ops.measure_op(book, case, LIMITS, CPU, peers=("op", "plain", "triton", "cudnn"), seconds=0.01)
        row = book.data["rows"][case.title]
        assert "beyond the allowed" in row["times"]["triton"]["wrong"] and "cudnn" not in row["times"]
        assert row["passed"] and row["share"] > 0 and "plain_seconds" in row
        # Triton's answer of before is wrong still.
        assert not bench_ops.measure_op(book, case, LIMITS, CPU, peers=("cuda",), seconds=0.01)
        later = book.data["rows"][case.title]
        assert later["times"]["cuda"]["us"] > 0 and later["seconds"] == row["seconds"]
        kernels(monkeypatch, triton=falls_back)
        with pytest.warns(backends.FallbackWarning):
            assert bench_ops.measure_op(book, case, LIMITS, CPU, peers=("op", "triton"), seconds=0.01)
    assert book.data["rows"][case.title]["times"] == {"triton": {"none": "no triton kernel computes it here"}}
    shown = capsys.readouterr().out
    assert "triton WRONG: error" in shown and "cuda " in shown and "triton no triton kernel" in shown
    book.data["rows"] = {"x": {**row, "precision": "fp16", "times": {"triton": {"us": 2.0}, "cuda": {"us": 1.0}}}}
    book.save()
    assert "layers at batch 2, fastest: cuda 1" in gpu.table(book.path.parent, {})


@pytest.mark.parametrize("before", [False, True])
def test_cudnn_tries_its_algorithms_and_may_have_none(
    before: bool, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    seen: list[bool] = []

    def none(x: Tensor, y: Tensor) -> Tensor:
        seen.append(torch.backends.cudnn.benchmark)
        raise RuntimeError("no such\nconvolution")

    case = ops.add_act(16, 8, 2, "fp32")
    case = dataclasses.replace(case, contestants={**case.contestants, "cudnn": none})
    with torch.no_grad():
        assert bench_ops.measure_op(book, case, LIMITS, CPU, peers=("op", "cudnn"), seconds=0.01)
    assert book.data["rows"][case.title]["times"] == {"cudnn": {"none": "RuntimeError: no such convolution"}}
    assert seen == [True] and torch.backends.cudnn.benchmark is before


def test_a_kernel_that_takes_the_gpu_away_ends_the_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = []

    def faults(x: Tensor, y: Tensor) -> Tensor:
        launched.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def synchronize() -> None:
        if launched:
            faults(torch.empty(0), torch.empty(0))

    kernels(monkeypatch, cuda=faults)
    others = backends.available()
    monkeypatch.setattr(backends, "available", lambda: others | {"cuda": ""})
    place = dataclasses.replace(CPU, kind="cpu", synchronize=synchronize)
    options: dict[str, Any] = {"precisions": ("fp32",), "batches": (1,), "chosen": ("add_act",), "peers": ("cuda",)}
    assert bench_ops.measure(tmp_path, Deadline(100), place, **options) == 1 and len(launched) == 2
    (row,) = results.read(tmp_path / "ops.json")["rows"].values()  # of two cases the second was not begun
    assert "illegal memory access" in row["times"]["cuda"]["wrong"]
    assert "the GPU FAILED: RuntimeError: CUDA error" in capsys.readouterr().out
    monkeypatch.setattr(backends, "available", lambda: others | {"cuda": "the stage cuda: failed"})
    assert bench_ops.measure(tmp_path, Deadline(100), place, **options) == 0 and len(launched) == 2
    assert "  without cuda: the stage cuda: failed\n" in capsys.readouterr().out


def test_the_most_important_cases_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[str, int], set[str]] = {}

    def full(precision: str, batch: int, device: str) -> list[Any]:
        seen[precision, batch] = {ops.op_of(make) for make in real(precision, batch, device)}
        return []

    real = ops.full
    monkeypatch.setattr(ops, "full", full)
    place = dataclasses.replace(CPU, kind="cpu")
    options: dict[str, Any] = {"precisions": tuple(DTYPES), "batches": (128, 1, 32, 256, 8)}
    assert bench_ops.measure(tmp_path, Deadline(100), place, **options) == 0
    rest = [("bf16", 128), ("tf32", 128), ("fp32", 128), ("fp16", 32), ("fp16", 256), ("fp16", 8)]
    assert list(seen) == [("fp16", 128), ("fp16", 1), *rest]
    assert [pair for pair, found in seen.items() if "batch_norm_act" in found] == [("bf16", 128)]


def test_cases_on_a_cpu_are_those_of_the_table() -> None:
    given = argparse.Namespace(case_seconds=None, image_size=224, threads=None, busy=None, arch=None)

    def settings(cases: Sequence[bench_models.Case], **changed: Any) -> list[Setting]:
        return bench_models.settings_of(cases, bench_models.CPU, (), argparse.Namespace(**vars(given) | changed))

    found = settings([case for case in bench_models.ON_CPU if case[1] == "fp32"])
    assert [(one.name, one.busy) for one in found] == [
        ("resnet50-float32-b1", 1),
        ("resnet50-float32-b1-t1", 0),
        ("resnet50-float32-b16", 0),
        ("resnet18-float32-b1", 0),
        ("resnet18-float32-b16", 0),
        ("resnet152-float32-b1", 0),
        ("resnet152-float32-b16", 0),
    ]
    rhythms = [(one.schedule.min_rounds, one.schedule.warmup, one.schedule.calls) for one in found[1:3]]
    assert rhythms == [(7, 1, 4), (5, 0, 1)]
    (one,) = settings([bench_models.SHARED], arch="resnet50", busy=0)
    assert (one.name, one.busy) == ("resnet50-float32-b1", 0)
    (one,) = settings([bench_models.SHARED], threads=1, busy=2)
    assert (one.name, one.busy) == ("resnet50-float32-b1-t1", 2)
    (one,) = bench_models.settings_of([("resnet50", "fp16", 128)], bench_models.CUDA, (), given)
    assert (one.busy, one.threads, one.schedule.calls) == (0, None, 4)


def test_a_wrong_network_on_a_cpu_does_not_keep_the_others_from_being_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(setting: Setting, folder: Path) -> Path:
        if setting.batch == 1:
            raise RuntimeError("resnet_fast.optimize() could not be measured")
        return folder / setting.name

    monkeypatch.setattr(bench_models, "measure_on_cpu", measure)
    assert bench_models._all([Setting(batch=1), Setting(batch=2)], Deadline(), tmp_path) == 1
    shown = capsys.readouterr().err
    assert "resnet50-float32-b1: FAILED" in shown and f"written: {tmp_path}/resnet50-float32-b2" in shown
    assert bench_models._all([Setting(batch=2)], Deadline(), tmp_path) == 0


def test_cudnns_way_gives_the_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's fused convolutions, as torch documents them, in torch's own operations."""

    def conv_relu(x: Tensor, weight: Tensor, bias: Tensor, *how: Any) -> Tensor:
        return torch.conv2d(x, weight, bias, *how).relu()

    def conv_add_relu(x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *how: Any) -> Tensor:
        return (torch.conv2d(x, weight, bias, *how) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)
    cases = [make() for make in ops.small("fp32", "cpu")]
    judged = [case for case in cases if "cudnn" in case.contestants]
    assert {case.op for case in judged} == {"conv_bn_act", "stem"} and len(judged) == len(ops.SMALL_CONVS) + 2
    for case in judged:
        with torch.no_grad():
            assert case.judge("cudnn")[2] == "", case.title


def test_one_runs_tensors_serve_triton_and_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    adapter = adapters.get("add_act")
    declared = adapter.declared
    watched = adapters.replace(adapter, declared=lambda case: made.append("") or declared(case))
    monkeypatch.setitem(adapters._OPS, "add_act", watched)
    problem = adapter.kernel.Problem(1 << 20, "fp16")
    with tuning.CudaRunner(gpus.known("l4"), torch.device("cpu"), jobs=1) as runner:
        runner.load(adapters.Case("add_act", problem, "relu"))
        count = len(made)
        runner.load(adapters.Case("add_act.cuda", problem, "relu"))
        assert len(made) == count > 0 and runner.unusable([object()]) == {}
        runner.load(adapters.Case("add_act", problem, "backward"))
        assert len(made) == 2 * count


# --- the report


def quantiles(p50: float) -> dict[str, float]:
    return timing.summarize([0.9 * p50, p50, 1.1 * p50]).as_dict()


@pytest.fixture
def synthetic(tmp_path: Path) -> Path:
    """Result files of a GPU as the stages write them, with made-up numbers."""
    gpus_seen = [{"name": "NVIDIA H200", "driver_version": "580.1"}]
    versions = {"torch": "2.11.0", "triton": "3.6.0"}
    machine = environment.summary(NO_GPU | {"gpus": gpus_seen, "versions": versions})
    head = {"schema": results.SCHEMA, "machine": machine}

    def timed(label: str, ours: bool, call: float, graph: float) -> dict[str, Any]:
        ways = {
            way: {"status": "timed", "reason": "", "seconds": quantiles(128 / rate), "images_per_second": rate}
            for way, rate in (("call", call), ("graph", graph))
        }
        return {"label": label, "ours": ours, **ways["call" if call > graph else "graph"], **ways}

    def case(precision: str, batch: int) -> dict[str, Any]:
        return {
            "setting": {"arch": "resnet50", "precision": precision, "batch": batch, "image_size": 224, "seed": 0},
            "contestants": {
                "optimize": timed("ours", True, 41000.0, 52000.0),
                "eager": timed("eager", False, 13000.0, 12000.0),
                "compile": {"label": "c", "ours": False, "status": "excluded", "reason": "failed: it"},
            },
            "ratios": {"against": {"eager": quantiles(4.0)}, "best_peer": "eager"},
        }

    row = {
        "op": "add_act", "case": "256-56px", "precision": "fp16", "batch": 128, "passed": True, "share": 0.93,
        "seconds": quantiles(1e-4), "plain_seconds": quantiles(2e-4), "floor_seconds": 9.3e-5, "bound": "bytes",
        "times": {"triton": {"us": 101.0}, "cuda": {"wrong": "it"}},
    }  # fmt: skip
    ceilings = {"copy": {"per_second": 4.3e12}, "fp16": {"per_second": 788e12}}
    folder = tmp_path / "results" / "h200"
    cases = {"b": case("bf16", 1), "a": case("fp16", 128), "broken": {"failed": "it did"}}
    results.write(folder / "models.json", head | {"kind": "gpu-models", "cases": cases})
    rows = {"x": row, "y": {**row, "batch": 1}, "z": {"passed": False}}
    results.write(folder / "ops.json", head | {"kind": "gpu-ops", "ceilings": ceilings, "rows": rows})
    models = {"resnet50 fp16": {"error": 1.2e-3, "allowed": 3e-3, "torch": 1.2e-3, "passed": True, "reason": ""}}
    results.write(folder / "correctness.json", head | {"kind": "gpu-correctness", "ops": {}, "models": models})
    results.write(folder / "environment.json", {"schema": results.SCHEMA, "kind": "gpu-environment"})
    return tmp_path


def test_report_of_a_gpu(synthetic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    readme = synthetic / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    arguments = [
        "report",
        "--results",
        f"{synthetic}/results",
        "--readme",
        str(readme),
        "--plots",
        f"{synthetic}/plots",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    assert report.main() == 0
    text = readme.read_text()
    assert "| resnet50 | fp16 | 128 | 52,000 | 13,000 | 4.00× |" in text
    assert text.index("| resnet50 | fp16 | 128 |") < text.index("| resnet50 | bf16 | 1 |")
    assert "NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, nvcc none, commit 0123456789ab" in text
    assert (
        "| add_act | 256-56px | 100.0 | 93.0 | bytes | 93 % | 200.0 | 101.0 | wrong | – |" in text
        and text.count("| add_act") == 1
    )
    assert "copy 4.30 TB/s" in text and "788 TFLOP/s" in text
    assert "| resnet50 fp16 | 1.2e-03 | 1.2e-03 | 3.0e-03 | right |" in text
    plots = {path.name: path.read_text() for path in (synthetic / "plots").iterdir()}
    assert set(plots) == {"h200-models-fp16.svg", "h200-models-bf16.svg", "h200-ops-fp16-b128.svg"}
    assert "optimize 52,000" in plots["h200-models-fp16.svg"] and "93 %" in plots["h200-ops-fp16-b128.svg"]
    monkeypatch.setattr("sys.argv", [*arguments, "--check"])
    assert report.main() == 0


def test_table_printed_last(synthetic: Path) -> None:
    text = gpu.table(synthetic / "results" / "h200", {"smoke": Outcome("done", seconds=12.0)})
    assert "smoke" in text and "models: 1 of 1 right" in text
    assert "img/s: optimize 52000, eager 13000 (4.00x)" in text
    assert "add_act: 93 % of the floor's speed (median of 2), least 93 % at 256-56px fp16 batch 1" in text
