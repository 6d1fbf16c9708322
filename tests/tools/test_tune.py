"""Tuning without a GPU: the tables, the search with a runner that only pretends, the gate, and the command."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

import resnet_fast
from resnet_fast import backends
from resnet_fast._dtypes import STORED
from resnet_fast.backends import cuda as native
from resnet_fast.backends import triton
from resnet_fast.cli import app
from resnet_fast.kernels import _tables, bottleneck_tail, conv_bn_act, conv_int8, conv_statistics, cuda_choice, gpus
from resnet_fast.tuning import compile, cuda, ops, shapes, sweep
from tests.cuda_device import DEVICE as CUDA_DEVICE
from tests.cuda_device import installed
from tests.triton_device import kernels

H100 = gpus.known("h100")
LITTLE = dataclasses.replace(H100, multiprocessors=2)  # on which small images are worth a fused block
WITH = {"torch": "t", "triton": "v"}
CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(**changes: Any) -> conv_bn_act.Problem:
    given = conv_bn_act.Problem(8, 14, 14, 64, 64, (1, 1), (1, 1), (0, 0), (1, 1), 1, "fp16", False)
    return dataclasses.replace(given, **changes)


def case(**changes: Any) -> ops.Case:
    return ops.Case("conv_bn_act", problem(**changes), "relu")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """The package's folder of tables and the user's, both empty."""
    checked_in, user = tmp_path / "checked_in", tmp_path / "user"
    checked_in.mkdir()
    monkeypatch.setattr(_tables, "_CHECKED_IN", checked_in)
    monkeypatch.setenv("RESNET_FAST_TUNED", str(user))
    _tables.forget()
    yield checked_in, user
    _tables.forget()


# --- tables


FIELDS = dataclasses.asdict(conv_bn_act.Config(64, 32, 16, 4, 2, False))


def test_table_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "h100.json"
    choices = {"conv_bn_act": {problem().key(): FIELDS | {"ms": 0.25}}}
    _tables.write(path, "h100", WITH, choices)
    assert _tables.read(path) == choices
    assert json.loads(path.read_text())["measured_with"] == WITH
    assert [entry.name for entry in path.parent.iterdir()] == ["h100.json"]


def test_the_users_choice_comes_before_the_packages(folders: tuple[Path, Path]) -> None:
    checked_in, user = folders
    mine, theirs, other = problem(), problem(n=9), problem(n=10)
    wide = FIELDS | {"block_m": 128}
    _tables.write(checked_in / "h100.json", "h100", WITH, {"conv_bn_act": {p.key(): FIELDS for p in (mine, theirs)}})
    assert conv_bn_act.choose(mine, H100).block_m == 64
    _tables.write(user / "h100.json", "h100", WITH, {"conv_bn_act": {mine.key(): wide}})
    assert conv_bn_act.choose(mine, H100).block_m == 128
    assert conv_bn_act.choose(theirs, H100).block_m == 64
    assert conv_bn_act.choose(other, H100) == conv_bn_act.heuristic(other, H100)
    assert conv_bn_act.choose(mine, gpus.known("a100")) == conv_bn_act.heuristic(mine, gpus.known("a100"))


def test_tables_from_before_a_field_are_read(folders: tuple[Path, Path]) -> None:
    deep = problem(n=1, h=7, w=7, c=512, k=512, kernel=(3, 3), padding=(1, 1))
    shared = dataclasses.replace(conv_bn_act.heuristic(deep, H100), shares=6)
    fields = dataclasses.asdict(shared)
    older = {name: value for name, value in fields.items() if name not in ("persistent", "shares")}
    path = folders[1] / "h100.json"
    for given, chosen in ((fields, shared), (older, dataclasses.replace(shared, shares=1))):
        _tables.write(path, "h100", WITH, {"conv_bn_act": {deep.key(): given}})
        assert conv_bn_act.choose(deep, H100) == chosen != conv_bn_act.heuristic(deep, H100) or given is older
    for wrong in (0, 5, 2.0, True):  # 5 does not divide the steps
        _tables.write(path, "h100", WITH, {"conv_bn_act": {deep.key(): fields | {"shares": wrong}}})
        assert conv_bn_act.choose(deep, H100) == conv_bn_act.heuristic(deep, H100)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format": 2, "choices": {}}', '{"format": 1, "choices": {"conv_bn_act": 3}}', "\xff"],
)
def test_a_broken_table_is_a_warning_and_the_heuristic(folders: tuple[Path, Path], text: str) -> None:
    folders[1].mkdir()
    (folders[1] / "h100.json").write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match="tuned launch choices are not used"):
        assert conv_bn_act.choose(problem(), H100) == conv_bn_act.heuristic(problem(), H100)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {name: value for name, value in FIELDS.items() if name != "block_k"},
        FIELDS | {"block_m": 4096, "block_n": 4096},  # more shared memory than there is
        FIELDS | {"boxes": True},  # on a GPU without a copy engine
        FIELDS | {"block_n": 48},
        FIELDS | {"block_k": 0},
        FIELDS | {"num_warps": "4"},
        FIELDS | {"num_stages": True},
        FIELDS | {"boxes": 0},
    ],
)
def test_a_choice_that_cannot_be_is_not_taken(folders: tuple[Path, Path], fields: dict[str, Any]) -> None:
    a100 = gpus.known("a100")
    _tables.write(folders[1] / "a100.json", "a100", WITH, {"conv_bn_act": {problem().key(): fields}})
    assert conv_bn_act.choose(problem(), a100) == conv_bn_act.heuristic(problem(), a100)


@pytest.mark.parametrize("changed", [{"block_c": 128}, {"block_n": 8}, {"block_n": 256, "boxes": True}, {"stages": 0}])
def test_a_tile_that_would_leave_channels_out_is_not_taken(folders: tuple[Path, Path], changed: dict[str, Any]) -> None:
    described = bottleneck_tail.Problem(128, 56, 56, 64, 128, 1, None, 0, "fp16")
    standard = bottleneck_tail.heuristic(described, H100)
    assert standard is not None
    fields = dataclasses.asdict(standard) | changed
    _tables.write(folders[1] / "h100.json", "h100", WITH, {"bottleneck_tail": {described.key(): fields}})
    assert bottleneck_tail.choose(described, H100) == standard
    described = problem(c=48, k=64)
    fields = dataclasses.asdict(conv_bn_act.heuristic(described, H100)) | {"block_k": 32}
    _tables.write(folders[1] / "h100.json", "h100", WITH, {"conv_bn_act": {described.key(): fields}})
    assert fields["boxes"] and conv_bn_act.choose(described, H100).block_k == 16


# --- the search


class Pretender:
    """A runner whose times are a function of the config; a clock that its work moves on.

    Attributes:
        asked: what was timed, in order. refused: configs to refuse at compiling. lying: configs with a wrong answer.
    """

    batch = 4

    def __init__(self, slowness: float = 10.0) -> None:
        self.slowness = slowness
        self.now = 0.0
        self.loaded: list[ops.Case] = []
        self.compiled: list[Any] = []
        self.asked: list[Any] = []
        self.refused: set[Any] = set()
        self.lying: set[Any] = set()
        self.times: dict[Any, float] = {}
        self.apart = math.inf

    def clock(self) -> float:
        return self.now

    def load(self, case: ops.Case) -> None:
        self.loaded.append(case)

    def unusable(self, configs: Sequence[Any]) -> Mapping[Any, str]:
        assert len(configs) <= self.batch
        self.compiled += configs
        return {config: "spills 8 bytes a thread" for config in configs if config in self.refused}

    def wrong(self, config: Any) -> str:
        assert config not in self.refused
        return "relative error 1e+00" if config in self.lying else ""

    def seconds(self, config: Any) -> float:
        assert config not in self.lying
        self.asked.append(config)
        self.now += 1.0
        return self.times.get(config, self.slowness * sweep.floor(self.loaded[-1], H100))

    def separately(self) -> float:
        return self.apart


def run(runner: Pretender, cases: Sequence[ops.Case], path: Path, **options: Any) -> list[sweep.Outcome]:
    given = {"measured_with": WITH, "seconds": 1e9, "clock": runner.clock} | options
    return sweep.sweep(cases, H100, runner, path, **given)


def test_the_fastest_correct_config_is_kept(tmp_path: Path) -> None:
    runner, path = Pretender(), tmp_path / "h100.json"
    every = sweep.configs(case(), H100)
    assert every[0] == conv_bn_act.heuristic(problem(), H100) and len(set(every)) == len(every) > 10
    best, wrong, spilling = every[7], every[3], every[5]
    floor = sweep.floor(case(), H100)
    runner.times = {best: 2 * floor, wrong: 1.5 * floor, spilling: 1.2 * floor}
    runner.lying, runner.refused = {wrong}, {spilling}
    (outcome,) = run(runner, [case()], path)
    assert outcome.config == best and outcome.seconds == 2 * floor and outcome.floor == floor and outcome.finished
    assert dict(outcome.refused) == {wrong: "relative error 1e+00", spilling: "spills 8 bytes a thread"}
    assert outcome.tried == len(every) - 2 and runner.asked == [each for each in every if each not in (wrong, spilling)]
    fields = _tables.read(path)["conv_bn_act"][problem().key()]
    assert fields["ms"] == pytest.approx(2e3 * floor, rel=1e-3, abs=1e-6)
    assert fields["floor_ms"] == pytest.approx(1e3 * floor, rel=1e-3, abs=1e-6)
    assert {name: fields[name] for name in FIELDS} == dataclasses.asdict(best)


def test_what_was_measured_is_chosen_afterwards(folders: tuple[Path, Path]) -> None:
    runner = Pretender()
    best = sweep.configs(case(), H100)[4]
    runner.times = {best: 3 * sweep.floor(case(), H100)}
    assert conv_bn_act.choose(problem(), H100) != best
    run(runner, [case()], folders[1] / "h100.json")
    assert conv_bn_act.choose(problem(), H100) == best


@pytest.mark.parametrize("faster", [True, False])
def test_a_block_whose_parts_are_faster_is_left_to_them(folders: tuple[Path, Path], faster: bool) -> None:
    """Measured, and from then on neither planned nor launched."""
    described = bottleneck_tail.Problem(128, 14, 14, 256, 1024, 1, None, 256, "fp16")
    block = ops.Case("bottleneck_tail", described)
    runner = Pretender(slowness=3.0)
    runner.apart = (2.0 if faster else 4.0) * sweep.floor(block, H100)
    assert bottleneck_tail.supports(described, H100)
    run(runner, [block], folders[1] / "h100.json")
    fields = _tables.read(folders[1] / "h100.json")["bottleneck_tail"][described.key()]
    assert fields["separate"] is faster and fields["separate_ms"] == pytest.approx(1e3 * runner.apart, rel=1e-3)
    assert bottleneck_tail.supports(described, H100) is not faster
    assert (bottleneck_tail.choose(described, H100) is None) is faster


@pytest.mark.parametrize("faster", [True, False])
def test_a_training_convolution_is_measured_against_the_plain_way(folders: tuple[Path, Path], faster: bool) -> None:
    """Both times are written, and the op takes the kernel where its own is less."""
    convolution = cases_of("conv_statistics")[0]
    runner = Pretender(slowness=3.0)
    runner.apart = (4.0 if faster else 2.0) * sweep.floor(convolution, H100)
    (outcome,) = run(runner, [convolution], folders[1] / "h100.json")
    fields = _tables.read(folders[1] / "h100.json")["conv_statistics"][convolution.problem.key()]
    assert fields["plain_ms"] == pytest.approx(1e3 * runner.apart, rel=1e-3, abs=1e-6) and "separate" not in fields
    assert fields["ms"] == pytest.approx(1e3 * outcome.seconds, rel=1e-3, abs=1e-6)
    assert _tables.pays("conv_statistics", convolution.problem.key(), "h100") is faster
    assert conv_statistics.choose(convolution.problem, H100) == outcome.config


@pytest.mark.parametrize("normalised", [False, True])
def test_the_plain_way_of_a_training_convolution_does_the_same(normalised: bool) -> None:
    given = next(each for each in cases_of("conv_statistics") if each.problem.normalised is normalised)
    given = dataclasses.replace(given, problem=dataclasses.replace(given.problem, precision="fp32"))
    op = ops.get("conv_statistics")
    example = op.example(given, CPU)
    _, *exact = example.exact(torch.float64)
    before = torch.backends.cudnn.benchmark
    assert op.parts is not None
    mean, invstd, _ = op.parts(example)
    assert torch.backends.cudnn.benchmark is before
    assert cuda.wrong([mean, invstd.square().reciprocal() - 1e-5], exact, "fp32") == ""


def test_training_convolutions_are_those_of_the_network() -> None:
    assert not [each for each in shapes.problems(["resnet50"], [8], ["fp16"]) if each.op in shapes.TRAINING]
    cases = shapes.problems(["resnet50"], [8], ["fp16"], training=True)
    found = {
        (each.problem.c, each.problem.k, each.problem.kernel[0], each.problem.stride[0], each.problem.normalised)
        for each in cases
        if each.op == "conv_statistics"
    }
    assert (3, 64, 7, 2, False) in found and (3, 64, 7, 2, True) not in found
    for last in (False, True):  # a block's 3x3 and last 1x1, behind what ``memory_efficient`` keeps raw
        assert (128, 128, 3, 2, last) in found and (512, 2048, 1, 1, last) in found
    assert (2048, 512, 1, 1, True) not in found and (1024, 2048, 1, 2, True) not in found  # first 1x1, projection
    cases = shapes.problems(["resnet18"], [8], ["fp16"], training=True)
    spatial = [each.problem for each in cases if each.op == "conv_statistics" and each.problem.kernel == (3, 3)]
    basic = {(each.c, each.k, each.normalised) for each in spatial}
    assert (64, 64, True) in basic and (64, 128, True) not in basic
    norms = [each.problem for each in cases if each.op == "batch_norm_act" and each.problem.step == "statistics"]
    assert [(each.rows, each.c) for each in norms[:2]] == [(8 * 112**2, 64), (8 * 56**2, 64)]  # the stem's without pool


def test_blocks_are_measured_with_and_without_the_next_1x1() -> None:
    cases = shapes.problems(["resnet50"], [128], ["fp16"], gpu=H100)
    blocks = {each.problem for each in cases if each.op == "bottleneck_tail"}
    longer = {block for block in blocks if block.following}
    assert longer and {dataclasses.replace(block, following=0) for block in longer} <= blocks


def test_near_the_floor_the_search_ends(tmp_path: Path) -> None:
    runner = Pretender()
    every = sweep.configs(case(), H100)
    runner.times = {every[2]: 1.04 * sweep.floor(case(), H100)}
    (outcome,) = run(runner, [case()], tmp_path / "h100.json")
    assert outcome.config == every[2] and outcome.finished
    assert runner.asked == list(every[:3]) and runner.compiled == list(every[:4])


def test_nothing_correct_is_not_written(tmp_path: Path) -> None:
    runner, path = Pretender(), tmp_path / "h100.json"
    runner.lying = set(sweep.configs(case(), H100))
    (outcome,) = run(runner, [case()], path)
    assert outcome.config is None and outcome.tried == 0 and len(outcome.refused) == len(runner.lying)
    assert not path.exists()


def test_the_budget_is_kept_and_the_rest_is_done_later(tmp_path: Path) -> None:
    cases, path = [case(n=n) for n in (8, 16, 32)], tmp_path / "h100.json"
    count = len(sweep.configs(cases[2], H100))
    runner = Pretender()
    outcomes = run(runner, cases, path, seconds=count + 5)  # a config takes a second
    assert [outcome.finished for outcome in outcomes] == [True, False] and len(runner.asked) == count + 5
    assert list(_tables.read(path)["conv_bn_act"]) == [cases[2].problem.key()]
    runner = Pretender()
    outcomes = run(runner, cases, path)
    assert [outcome.case for outcome in outcomes] == [cases[1], cases[0]]
    assert len(_tables.read(path)["conv_bn_act"]) == 3
    assert run(Pretender(), cases, path) == []
    assert len(run(Pretender(), cases, path, again=True)) == 3
    assert run(Pretender(), cases, path, again=True, seconds=0) == []


def test_the_most_expensive_comes_first_and_each_once(tmp_path: Path) -> None:
    small, large = case(n=1), case(n=64)
    twin = dataclasses.replace(large, form="none")  # the same problem without ReLU
    seen: list[sweep.Progress] = []
    told: list[ops.Case] = []
    run(
        Pretender(1.0), [small, large, twin, small], tmp_path / "h100.json",
        progress=seen.append, finished=lambda outcome: told.append(outcome.case),
    )  # fmt: skip
    assert told == [large, small]
    assert [(state.done, state.total, state.case) for state in seen] == [(0, 2, large), (1, 2, small)]


def test_an_interruption_leaves_what_was_measured(tmp_path: Path) -> None:
    class Interrupted(Pretender):
        def seconds(self, config: Any) -> float:
            if len(self.loaded) == 2:
                raise KeyboardInterrupt
            return super().seconds(config)

    path = tmp_path / "h100.json"
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), [case(n=8), case(n=16)], path)
    assert list(_tables.read(path)["conv_bn_act"]) == [problem(n=16).key()]


def test_a_file_that_is_no_table_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    path.write_text("mine")
    with pytest.raises(ValueError, match="no table"):
        run(Pretender(), [case()], path)
    assert path.read_text() == "mine"


def test_other_choices_in_the_table_stay(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    before = {"conv_bn_act": {"another": FIELDS}, "pool": {"x": {}}}
    _tables.write(path, "h100", WITH, before)
    run(Pretender(), [case()], path)
    after = _tables.read(path)
    assert (
        after["pool"] == {"x": {}}
        and after["conv_bn_act"].pop(problem().key())
        and after["conv_bn_act"] == before["conv_bn_act"]
    )


# --- every op's adapter, and the gate


@functools.cache
def some_cases() -> list[ops.Case]:
    """A small case of every kind that the networks have. Not made at the import, for which every collection waits."""
    found: dict[tuple[Any, ...], ops.Case] = {}
    models, types = ["resnet18", "resnet50", "resnext50_32x4d"], ["fp16", *shapes.QUANTIZED]
    for each in shapes.problems(models, [2], types, 32, LITTLE, training=True):
        given = each.problem
        names = ("residual", "uint8", "kernel", "groups", "step", "relu", "normalised", "out")
        kind = (each.op, each.form, *(getattr(given, name, None) for name in names))
        if each.op == "bottleneck_tail":
            kind = (each.op, given.shortcut is None, given.following > 0, given.stride)
        found.setdefault(kind, each)
    return list(found.values())


def cases_of(op: str) -> list[ops.Case]:
    return [each for each in some_cases() if each.op == op]


def test_every_op_has_a_case() -> None:
    assert {each.op for each in some_cases()} == set(ops.names())


@pytest.mark.parametrize("name", ops.names())
def test_adapters_describe_what_the_kernels_take(name: str) -> None:
    """References fill the outputs' shapes; work is positive; each heuristic makes a launch."""
    for given in cases_of(name):
        print(given)  # which is seen if it fails
        assert_described(given)


def assert_described(given: ops.Case) -> None:
    op = ops.get(given.op)
    example = op.example(given, CPU)
    for output, answer in zip(example.outputs, example.exact(torch.float64), strict=True):
        dtype = output.dtype if given.problem.precision in shapes.QUANTIZED else torch.float64
        assert output.shape == answer.shape and answer.dtype is dtype
        answer = answer.double()
        assert not answer.numel() or (answer.isfinite().all() and 0.05 < answer.std() < 100)
    assert sweep.floor(given, LITTLE) > 0
    configs = sweep.configs(given, LITTLE)
    assert {type(config) for config in configs} == {op.kernel.Config}
    launch = op.launch(op.kernel, example, given, configs[0])
    for part in launch.parts if isinstance(launch, ops.Launches) else (launch,):
        assert math.prod(part.grid) >= 1


def assert_passes_the_gate(given: ops.Case, example: ops.Example, exact: Sequence[torch.Tensor], config: Any) -> None:
    """A launch fills its outputs, which are right nowhere before, with the right answer."""
    op = ops.get(given.op)
    cuda.poison(example.outputs, exact)
    assert cuda.wrong(example.outputs, exact, given.problem.precision) != ""
    op.launch(op.kernel, example, given, config)()
    assert cuda.wrong(example.outputs, exact, given.problem.precision) == "", (str(given), config)


@pytest.mark.parametrize("op", ops.names())
def test_launches_pass_the_gate(op: str) -> None:
    """The kernels themselves, on the smallest case of each kind: in the interpreter if there is no GPU."""
    kinds: dict[tuple[Any, ...], ops.Case] = {}
    for each in sorted(cases_of(op), key=lambda each: -ops.get(op).work(each.problem).flops):
        following = getattr(each.problem, "following", 0) > 0
        names = ("residual", "shortcut", "step", "normalised", "out")
        kinds[(each.form, *(getattr(each.problem, name, None) for name in names), following)] = each
    adapter = ops.get(op)
    for given in list(kinds.values())[-(8 if op == "batch_norm_act" else 4) :]:
        example = adapter.example(given, torch.device(DEVICE))
        assert_passes_the_gate(
            given, example, example.exact(torch.float32), adapter.kernel.heuristic(given.problem, LITTLE)
        )


@pytest.mark.parametrize("precision", list(cuda.ALLOWED))
def test_the_gate(precision: str) -> None:
    dtype = STORED[precision]
    exact = torch.randn(4, 64, 14, 14, dtype=torch.float64)
    if dtype in shapes.QUANTIZED.values():  # answers are compared as they are stored
        exact = exact.float().to(dtype).double()
    rounded = exact.to(torch.float32).to(dtype)
    assert cuda.error(rounded, exact, precision) == ""
    assert "relative error" in cuda.error(
        (exact * (1 + 2 * cuda.ALLOWED[precision])).to(torch.float64), exact, precision
    )
    for value, reason in ((math.nan, "NaN"), (math.inf, "NaN"), (7.0, "an element")):
        broken = rounded.clone()
        broken[1, 2, 3, 4] = value
        assert reason in cuda.error(broken, exact, precision) or "relative error" in cuda.error(
            broken, exact, precision
        )
    assert "relative error" in cuda.error(torch.zeros_like(rounded), exact, precision)


def test_one_wrong_element_among_a_million_shows() -> None:
    exact = torch.randn(1_000_000, dtype=torch.float64)
    ours = exact.half()
    ours[12345] = exact[12345] + 0.5
    assert "an element is off" in cuda.error(ours, exact, "fp16")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_the_gate_of_int8_is_every_bit(dtype: torch.dtype) -> None:
    exact = torch.randint(0, 255, (4, 64, 5, 5)).to(dtype)
    ours = exact.clone()
    assert cuda.error(ours, exact, "int8") == ""
    ours[1, 2, 3, 4] += 1
    assert cuda.error(ours, exact, "int8") == "1 of 6400 elements differ from the integer reference"
    cuda.poison([ours], [exact])
    assert cuda.error(ours, exact, "int8") == "6400 of 6400 elements differ from the integer reference"


# --- quantized networks


def int8_case(**changes: Any) -> ops.Case:
    given = {"n": 128, "c": 128, "k": 128, "kernel": (3, 3), "padding": (1, 1), "precision": "int8"} | changes
    return ops.Case("conv_int8", conv_int8.Problem(**{**vars(problem()), **given}), "relu")


@pytest.mark.parametrize("changes", [{}, {"kernel": (1, 1), "padding": (0, 0), "residual": True}, {"out": "fp16"}])
def test_an_int8_choice_is_measured_among_few_and_read_at_run_time(
    folders: tuple[Path, Path], changes: dict[str, Any]
) -> None:
    given, other = int8_case(**changes), int8_case(**changes, shifted=True)
    every, few = sweep.configs(given, H100), sweep.configs(given, H100, most=6)
    assert few[0] == conv_int8.heuristic(given.problem, H100) and len(few) == 6 < len(every) and set(few) <= set(every)
    assert all(config.boxes for config in few)
    runner, path = Pretender(slowness=4.0), folders[1] / "h100.json"
    runner.times = {few[3]: 2 * sweep.floor(given, H100)}
    run(runner, [given], path, most=6)
    assert runner.asked == list(few)
    assert list(_tables.read(path)) == ["conv_int8"] and list(_tables.read(path)["conv_int8"]) == [given.problem.key()]
    assert conv_int8.choose(given.problem, H100) == few[3] != few[0]
    assert conv_int8.choose(other.problem, H100) == conv_int8.heuristic(other.problem, H100)
    with triton.assume(H100):
        assert resnet_fast.info().choices == {"h100": f"conv_int8 1 of {path}"}
        assert f"h100: conv_int8 1 of {path}" in str(resnet_fast.info())


def test_info_says_that_nothing_was_measured(folders: tuple[Path, Path]) -> None:
    with triton.assume(H100):
        assert resnet_fast.info().choices == {"h100": f"none measured: there is no table h100.json in {folders[1]}"}


def test_int8_problems_are_those_that_a_quantized_network_looks_up(monkeypatch: pytest.MonkeyPatch) -> None:
    op = importlib.import_module("resnet_fast.ops.conv_int8")
    image, asked = torch.rand(2, 3, 32, 32), set()

    def watching(among: Any, a: Any, bound: Any = None) -> torch.Tensor:
        asked.add(op.problem(a))
        return op.reference(a)

    fast = pickle.dumps(resnet_fast.quantize(resnet_fast.resnet18().eval(), [image], check=False))
    with kernels("h100"):
        monkeypatch.setattr(op.OP, "by_kernel", watching)
        pickle.loads(fast)(image)
    cases = shapes.quantized(["resnet18"], [2], 32, H100)
    found = {each.problem for each in cases if each.op == "conv_int8"}
    assert {each.out for each in found} == {"uint8", "fp16"} and {each.out for each in asked} == {"uint8", "fp32"}
    floats = {"fp16": "fp32"}  # what a network that was quantized on a CPU has beside int8
    assert {dataclasses.replace(each, out=floats.get(each.out, each.out)) for each in found} == asked and len(asked) > 8
    assert {each.op for each in cases} == {"stem", "head", "conv_int8"}
    assert {each.problem.precision for each in cases if each.op != "conv_int8"} == {"fp16"}


def test_groups_stay_in_half_precision() -> None:
    cases = shapes.quantized(["resnext50_32x4d"], [1], gpu=H100)
    grouped = [each for each in cases if getattr(each.problem, "groups", 1) > 1]
    assert grouped and {(each.op, each.problem.precision) for each in grouped} == {("conv_bn_act", "fp16")}


# --- CUDA's kernels beside Triton's


class Listed:
    """A native module that says which kernels it has; it launches nothing."""

    def __init__(self, archs: tuple[str, ...] = ("90a",), emulated: bool = False) -> None:
        self.archs, self.emulated = archs, emulated

    def build_info(self) -> dict[str, Any]:
        return {"archs": list(self.archs), "cuda": "13.0.88", "emulated": self.emulated}

    def conv_bn_act_kernels(self) -> list[dict[str, Any]]:
        return [
            {
                "name": f"sm90_fp16_{tile}x{tile}", "algorithm": "cutlass_gemm", "least_capability": 90,
                "most_capability": 90, "precision": "fp16", "block_m": tile, "block_n": tile, "block_k": 64,
                "stages": 4, "threads": 384, "shared_bytes": 99_000,
            }
            for tile in (64, 128)
        ]  # fmt: skip

    def conv_bn_act_unsupported(self, name: str, *fields: Any) -> str:
        return "groups" if fields[-5] > 1 else ""


def test_cases_of_cuda_kernels_stand_behind_tritons() -> None:
    given = [case(), case(groups=2), case(precision="fp32"), case(precision="bf16")]
    stem, tail = cases_of("stem")[0], cases_of("bottleneck_tail")[0]
    assert ops.with_cuda(given, H100) == tuple(given)  # nothing is built here, or not for this
    with native.substitute(Listed()):
        made = ops.with_cuda([*given, stem, tail], H100)
        assert ops.with_cuda(given, gpus.known("a100")) == tuple(given)
        assert ops.with_cuda([tail], H100) == (tail,)
    twins = [each for each in made if ops.is_cuda(each)]
    assert [(each.op, each.problem, each.form) for each in twins] == [
        ("conv_bn_act.cuda", given[0].problem, "relu"),
        ("stem.cuda", stem.problem, stem.form),
    ]
    assert [made.index(each) - 1 for each in twins] == [made.index(given[0]), made.index(stem)]
    assert ops.get("head.cuda").kernel.op == "head" and "head.cuda" not in ops.names()
    with pytest.raises(ValueError, match=r"'bottleneck_tail\.cuda'.*there are conv_bn_act, .*, add_act\.cuda"):
        ops.get("bottleneck_tail.cuda")


@pytest.mark.parametrize("cuda_wins", [True, False])
def test_both_are_measured_and_the_faster_runs_from_then_on(folders: tuple[Path, Path], cuda_wins: bool) -> None:
    runner, path = Pretender(), folders[1] / "h100.json"
    adds = [
        ops.Case("add_act", ops.get("add_act").kernel.Problem(1 << 24, "fp16"), form) for form in ("relu", "backward")
    ]
    with native.substitute(Listed()), triton.assume(H100):
        cases = ops.with_cuda([case(), *adds], H100)
        floor, small, large = (
            sweep.floor(case(), H100),
            *map(cuda_choice.Config, ("sm90_fp16_64x64", "sm90_fp16_128x128")),
        )
        assert set(sweep.configs(cases[1], H100)) == {small, large}
        runner.times = {large: (3 if cuda_wins else 5) * floor}
        runner.times |= dict.fromkeys(sweep.configs(case(), H100), 4 * floor)
        runner.times[cuda_choice.Only()] = (2 if cuda_wins else 30) * sweep.floor(adds[0], H100)
        outcomes = run(runner, cases, path)
        assert [outcome.case.op for outcome in outcomes] == [
            "add_act",
            "conv_bn_act",
            "add_act.cuda",
            "conv_bn_act.cuda",
        ]
        table = _tables.read(path)
        row = table["conv_bn_act.cuda"][problem().key()]
        assert row["kernel"] == "sm90_fp16_128x128"
        assert row["ms"] == pytest.approx((3e3 if cuda_wins else 5e3) * floor, rel=1e-3, abs=1e-6)
        assert table["conv_bn_act"][problem().key()]["ms"] == pytest.approx(4e3 * floor, rel=1e-3, abs=1e-6)
        assert set(table["add_act.cuda"][adds[0].problem.key()]) == {"ms", "floor_ms"}
        for op, key, name in (("conv_bn_act", problem(), "sm90_fp16_128x128"), ("add_act", adds[0].problem, "add_act")):
            choice = backends.pick(op, (triton, native), key, CPU)
            assert (choice.name, choice.kernel) == (("cuda", name) if cuda_wins else ("triton", ""))
        assert run(Pretender(), cases, path) == []


def test_tritons_cases_come_first_and_leave_time_for_cudas(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    with native.substitute(Listed()):
        cases = ops.with_cuda([case(n=8), case(n=64)], H100)
        wanted = [(each.op, each.problem.n) for each in sweep.pending(cases, H100, {})]
        assert wanted == [(op, n) for op in ("conv_bn_act", "conv_bn_act.cuda") for n in (64, 8)]
        runner, count = Pretender(), len(sweep.configs(cases[2], H100))
        outcomes = run(runner, cases, path, seconds=(count + 1) / sweep.TRITONS_SHARE)  # a config takes a second
        assert [outcome.finished for outcome in outcomes] == [True, False, True, True]
        assert set(_tables.read(path)["conv_bn_act.cuda"]) == {each.problem.key() for each in cases}
        outcomes = run(Pretender(), cases, tmp_path / "begun.json", seconds=(count - 0.5) / sweep.TRITONS_SHARE)
        assert [ops.is_cuda(outcome.case) for outcome in outcomes] == [False, True, True]
        runner = Pretender()
        outcomes = run(runner, [case(n=8)], path, seconds=count + 1)  # none of CUDA's waits
        assert outcomes[0].finished
        outcomes = run(Pretender(), cases, tmp_path / "other.json", seconds=0)
        assert outcomes == []


class Faulting(Pretender):
    """The GPU is lost at the second launch of a CUDA kernel."""

    launched = 0

    def __enter__(self) -> Faulting:
        return self

    def __exit__(self, *given: object) -> None:
        pass

    def wrong(self, config: Any) -> str:
        self.launched += ops.is_cuda(self.loaded[-1])
        if self.launched > 1:
            raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")
        return super().wrong(config)


def test_a_cuda_kernel_that_faults_costs_none_of_tritons_times(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    with native.substitute(Listed()), pytest.raises(RuntimeError, match="illegal"):
        run(Faulting(slowness=1.0), ops.with_cuda([case(n=n) for n in (64, 8, 1)], H100), path)
    table = _tables.read(path)
    assert len(table["conv_bn_act"]) == 3
    assert list(table["conv_bn_act.cuda"]) == [problem(n=64).key()]


def test_a_wrong_cuda_kernel_is_refused(tmp_path: Path) -> None:
    runner, path = Pretender(), tmp_path / "h100.json"
    with native.substitute(Listed()):
        cases = ops.with_cuda([case()], H100)[1:]
        runner.lying = {cuda_choice.Config("sm90_fp16_64x64")}
        (outcome,) = run(runner, cases, path)
        assert outcome.config == cuda_choice.Config("sm90_fp16_128x128") and len(outcome.refused) == 1
        runner.lying |= {outcome.config}
        (outcome,) = run(runner, cases, path, again=True)
    assert outcome.config is None


@pytest.mark.cuda
@pytest.mark.parametrize("op", ["conv_bn_act", "stem", "head", "add_act", "batch_norm_act"])
def test_cuda_launches_pass_the_gate(op: str) -> None:
    """The adapters of the CUDA kernels, on a small problem of each form."""
    if op not in native.OPS:
        pytest.skip(f"backends.cuda does not list {op}")
    device = torch.device(CUDA_DEVICE)
    described: list[ops.Case] = {
        "conv_bn_act": [case(n=1, h=5, w=4, c=16, k=24, residual=True), dataclasses.replace(case(n=1), form="none")],
        "stem": cases_of("stem"),
        "head": [ops.Case("head", ops.get("head").kernel.Problem(2, 3, 2, 40, 17, "fp16"))],
        "add_act": [
            ops.Case("add_act", ops.get("add_act").kernel.Problem(1000, "bf16"), form) for form in ("relu", "backward")
        ],
        "batch_norm_act": [
            dataclasses.replace(each, problem=dataclasses.replace(each.problem, rows=100, c=24))
            for each in cases_of("batch_norm_act")
        ],
    }[op]
    with installed():
        gpu = triton.gpu_of(device)
        cases = [each for each in ops.with_cuda(described, gpu) if ops.is_cuda(each)]
        assert len(cases) == len(described)
        for given in cases:
            adapter = ops.get(given.op)
            example = adapter.example(given, device)
            exact = example.exact(torch.float32)
            for config in dict.fromkeys([adapter.kernel.choose(given.problem, gpu), *sweep.configs(given, gpu)[:3]]):
                assert_passes_the_gate(given, example, exact, config)


def test_the_compile_check_knows_cudas_choices_by_their_problems(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = case()
    monkeypatch.setattr(shapes, "problems", lambda *models, **options: (known,))
    row = {"kernel": "sm90_fp16_64x64", "ms": 0.1}
    choices = {"conv_bn_act.cuda": {known.problem.key(): row, "fp16 n1 somewhere": row}}
    _tables.write(folders[0] / "h100.json", "h100", WITH, choices)
    tasks, wrong = compile.table_tasks(H100, folders[0])
    assert tasks == {} and wrong == ["h100.json: conv_bn_act.cuda fp16 n1 somewhere: no network has this launch"]


# --- the command


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["tune", *arguments])


def test_dry_run_lists_problems_and_counts(folders: tuple[Path, Path]) -> None:
    result = invoke(
        "--dry-run", "--gpu", "a100", "--arch", "resnet18", "--batch-size", "4", "--op", "conv_bn_act", "--op", "head"
    )
    assert result.exit_code == 0, result.output
    cases = [
        each
        for each in shapes.problems(["resnet18"], [4], ["fp16"], gpu=gpus.known("a100"))
        if each.op in ("conv_bn_act", "head")
    ]
    waiting = sweep.pending(cases, gpus.known("a100"), {})
    whole = sum(len(sweep.configs(each, gpus.known("a100"))) for each in waiting)
    assert f"{len(waiting)} problems, {whole} candidates" in result.output
    assert all(each.problem.key() in result.output for each in waiting)
    assert not folders[1].exists()


def test_dry_run_of_int8_lists_what_quantize_makes() -> None:
    arguments = ["--dry-run", "--gpu", "h200", "--arch", "resnet18", "--batch-size", "128", "--dtype", "int8"]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    h200 = gpus.known("h200")
    waiting = sweep.pending(shapes.quantized(["resnet18"], [128], gpu=h200), h200, {})
    counts = [len(sweep.configs(each, h200, 6)) for each in waiting]
    assert f"{len(waiting)} problems, {sum(counts)} candidates" in result.output and max(counts) == 6
    assert all(each.problem.key() in result.output for each in waiting)
    assert "conv_bn_act" not in result.output
    both = invoke(*arguments, "--dtype", "float16", "--op", "conv_int8", "--op", "conv_bn_act").output
    assert "conv_int8" in both and "conv_bn_act" in both and "stem" not in both


def test_training_is_measured_where_it_is_named() -> None:
    arguments = ["--dry-run", "--arch", "resnet18", "--batch-size", "4"]
    plain = invoke(*arguments).output
    shown = invoke(*arguments, "--op", "conv_statistics", "--op", "batch_norm_act").output
    assert "conv_statistics" not in plain and "batch_norm_act" not in plain
    cases = [each for each in shapes.problems(["resnet18"], [4], ["fp16"], training=True) if each.op in shapes.TRAINING]
    assert f"{len(sweep.pending(cases, H100, {}))} problems" in shown
    assert "conv_bn_act" not in shown and all(each.problem.key() in shown for each in cases)


def test_dry_run_lists_the_cuda_kernels_that_are_built() -> None:
    arguments = ["--dry-run", "--arch", "resnet18", "--batch-size", "4", "--op", "conv_bn_act", "--op", "head"]
    with native.substitute(Listed()):
        shown = invoke(*arguments)
        others = invoke(*arguments, "--gpu", "a100")
    assert shown.exit_code == 0 and "conv_bn_act.cuda" in shown.output and "head.cuda" in shown.output
    assert ".cuda" not in others.output and others.exit_code == 0


def test_dry_run_leaves_out_what_is_known(folders: tuple[Path, Path]) -> None:
    arguments = ["--dry-run", "--arch", "resnet18", "--batch-size", "4", "--op", "conv_bn_act"]
    known = next(each for each in shapes.problems(["resnet18"], [4], ["fp16"]) if each.op == "conv_bn_act")
    _tables.write(folders[0] / "h100.json", "h100", WITH, {"conv_bn_act": {known.problem.key(): FIELDS}})
    count = int(re.findall(r"(\d+) problems", invoke(*arguments, "--again").output)[0])
    assert f"{count - 1} problems" in invoke(*arguments).output
    assert f"{count - 1} problems" in invoke(*arguments, "--checked-in").output


def test_a_gpu_that_is_lost_is_said_behind_what_was_measured(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = importlib.import_module("resnet_fast.cli.tune")
    monkeypatch.setattr(cli, "_this_gpu", lambda: H100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "CudaRunner", lambda *given: Faulting(slowness=1.0))
    monkeypatch.setattr(cuda, "versions", lambda device: WITH)
    with native.substitute(Listed()):
        result = invoke("--arch", "resnet18", "--batch-size", "4", "--op", "conv_bn_act")
    assert result.exit_code == 1 and "measured on h100" in result.output
    assert re.search(
        r"tune: the GPU failed at conv_bn_act\.cuda \(\w+\) fp16 n4 .*: CUDA error: an illegal memory access was "
        r"encountered; what was measured before is kept\n", result.output,
    )  # fmt: skip
    table = _tables.read(folders[1] / "h100.json")
    assert len(table["conv_bn_act"]) > 5 and len(table["conv_bn_act.cuda"]) == 1


def test_a_stopped_command_shows_and_keeps_what_was_measured(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Faulting):
        def seconds(self, config: Any) -> float:
            if len(self.loaded) == 2:
                raise KeyboardInterrupt
            return super().seconds(config)

    cli = importlib.import_module("resnet_fast.cli.tune")
    monkeypatch.setattr(cli, "_this_gpu", lambda: H100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "CudaRunner", lambda *given: Interrupted(slowness=1.0))
    monkeypatch.setattr(cuda, "versions", lambda device: WITH)
    result = invoke("--arch", "resnet18", "--batch-size", "4", "--op", "conv_bn_act")
    path = folders[1] / "h100.json"
    assert result.exit_code == 130 and "measured on h100" in result.output, result.output
    last = f"resnet-fast: stopped; {path} keeps what was measured, and the same command goes on"
    assert result.output.splitlines()[-1] == last
    assert len(_tables.read(path)["conv_bn_act"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so() -> None:
    ran = subprocess.run([sys.executable, "-m", "resnet_fast.cli", "tune"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1 and ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("resnet-fast: tune: nothing can be measured here: ") and "--dry-run" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dry-run", "--arch", "resnet51"], "unknown arch 'resnet51'"),
        (["--dry-run", "--gpu", "h9"], "unknown GPU 'h9'"),
        (["--gpu", "h100"], "--gpu goes with --dry-run"),
        (["--dry-run", "--op", "pool"], "pool"),
        (["--dry-run", "--batch-size", "0"], "greater"),
        (["--device", "cpu", "--dtype", "int8"], "in int8 the CPU engine has one algorithm"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code in (1, 2)
    assert said in result.output and "Traceback" not in result.output


def test_tuning_imports_neither_typer_nor_rich() -> None:
    code = """
import sys
import resnet_fast.tuning.cuda, resnet_fast.tuning.sweep, resnet_fast.tuning.shapes, resnet_fast.tuning.compile
print([name for name in ("typer", "rich", "triton") if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.gpu
def test_a_sweep_on_the_gpu(tmp_path: Path) -> None:
    from resnet_fast.backends import triton

    device = torch.device("cuda", torch.cuda.current_device())
    gpu = triton.gpu_of(device)
    path = tmp_path / f"{gpu.name}.json"
    with cuda.CudaRunner(gpu, device) as runner:
        (outcome,) = sweep.sweep([case()], gpu, runner, path, measured_with=cuda.versions(device), seconds=120)
    assert outcome.config is not None and outcome.tried >= 1
    assert outcome.floor < outcome.seconds < 1e-3
    assert [reason for _, reason in outcome.refused if "error" in reason or "element" in reason] == []
    if outcome.finished:
        assert problem().key() in _tables.read(path)["conv_bn_act"]


@pytest.mark.gpu
@pytest.mark.skipif(CUDA_DEVICE == "cpu", reason="resnet_fast._C does not run here")
def test_a_sweep_of_both_kinds_of_kernel_on_the_gpu(folders: tuple[Path, Path]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = triton.gpu_of(device)
    path = folders[1] / f"{gpu.name}.json"
    with cuda.CudaRunner(gpu, device) as runner:
        both = ops.with_cuda([case()], gpu)
        outcomes = sweep.sweep(both, gpu, runner, path, measured_with=cuda.versions(device), seconds=240)
    assert [outcome.case.op for outcome in outcomes] == ["conv_bn_act", "conv_bn_act.cuda"]
    for outcome in outcomes:
        assert outcome.config is not None and outcome.floor < outcome.seconds < 1e-3
        assert [reason for _, reason in outcome.refused if "error" in reason or "element" in reason] == []
    table = _tables.read(path)
    if all(outcome.finished for outcome in outcomes):
        times = [table[outcome.case.op][problem().key()]["ms"] for outcome in outcomes]
        choice = backends.pick("conv_bn_act", (triton, native), problem(), device)
        assert choice.name == ("cuda" if times[1] < times[0] else "triton")
