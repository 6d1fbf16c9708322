"""The estimate of time per launch: its arithmetic by hand, what it reads, and the command that labels it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from resnet_fast.cli import roofline as command
from resnet_fast.kernels import bottleneck_tail_choice, conv_bn_act, conv_int8, gpus
from resnet_fast.kernels import stem as stem_kernel
from resnet_fast.kernels.problems import AddAct, BottleneckTail, ConvBNAct, ConvInt8, Head, Stem
from resnet_fast.roofline import estimate
from resnet_fast.roofline.estimate import ASSUMED, Code, Estimate
from resnet_fast.tuning import estimate as launches
from resnet_fast.tuning import shapes, sweep
from tests import command_line

pytest.importorskip("triton")

H200 = gpus.known("h200")


def tile(m: int = 128, n: int = 128, k: int = 64, stages: int = 3, persistent: int = 0) -> conv_bn_act.Config:
    return conv_bn_act.Config(m, n, k, 4, stages, True, persistent)


USUAL = tile()


def conv(n: int = 128, side: int = 14, c: int = 256, k: int = 256, taps: int = 3, residual: bool = False) -> ConvBNAct:
    return ConvBNAct(
        n, side, side, c, k, (taps, taps), (1, 1), (taps // 2,) * 2, (1, 1), 1, "fp16", residual
    )  # fmt: skip


def of(
    problem: ConvBNAct, code: Code, config: conv_bn_act.Config = USUAL, programs: int | None = None, **gpu: Any
) -> Estimate:
    tiles = -(-problem.pixels // config.block_m) * -(-problem.k // config.block_n)
    program = estimate.conv(problem, config, tiles, tiles if programs is None else programs)
    return estimate.estimate(problem, program, code, dataclasses.replace(H200, **gpu))


# --- the arithmetic


def test_a_3x3_by_hand() -> None:
    """392 tiles on 264 places: a full wave of two on a multiprocessor, then 128 alone."""
    found = of(conv(), Code(128, 2, 4))
    assert (found.programs, found.blocks) == (392, 2) and found.waves == pytest.approx(392 / 264)
    ends = 0.8e-6 + 0.85e-6 + 0.5e-6 + 0.4e-6
    fetched = 256 * 64 * 2  # a step: 128 pixels and 128 channels, 64 deep
    share = 8.5e12 / 132
    product = 2 * 128 * 128 * 64 / 4096 / 1.755e9
    first = 36 * max(2 * fetched / share, 0.85e-6 / 2, product + 100 / 1.755e9) + ends
    alone = 36 * max(fetched / (8.5e12 / 128), 0.85e-6 / 2, product + 100 / 1.755e9) + ends
    assert found.chain == pytest.approx(first)
    assert found.seconds == pytest.approx(first + alone + 0.7e-6)
    assert found.l2 == pytest.approx(392 * 256 * 2304 * 2 / 8.5e12)
    assert found.floor == pytest.approx(2 * 128 * 196 * 256 * 2304 / 788e12)
    assert found.binds == "part of a wave, L2 traffic"


def test_one_stage_waits_for_each_copy() -> None:
    """With two, a copy is on its way while the step before multiplies; with one, the step takes both."""
    # One program alone on its multiprocessor, so that nothing but its own copies and products counts.
    problem = conv(n=16, side=2)
    one, two = (of(problem, Code(128, 1, 4), tile(stages=stages)) for stages in (1, 2))
    product = 2 * 128 * 128 * 64 / 4096 / 1.755e9 + 100 / 1.755e9
    assert one.seconds - two.seconds == pytest.approx(36 * (0.85e-6 + product - max(0.85e-6, product)))


def test_a_large_copy_is_bound_by_memory() -> None:
    found = of(conv(side=56, c=256, k=64, taps=1), Code(64, 8, 4), tile(n=64))
    bytes_moved = 128 * 3136 * (256 + 64) * 2 + 64 * 256 * 2 + 64 * 8
    assert found.binds == "memory" and found.seconds == pytest.approx(bytes_moved / (0.92 * 4.3e12) + 0.7e-6)


@pytest.mark.parametrize("n", [1, 8, 32, 128, 256])
@pytest.mark.parametrize("taps", [1, 3])
def test_what_makes_a_launch_slower(n: int, taps: int) -> None:
    base = of(conv(n, taps=taps), Code(90, 2, 4))
    assert base.seconds >= base.floor and base.seconds > base.l2
    for worse in (
        of(conv(n, taps=taps), Code(90, 2, 4, serialised=True)),
        of(conv(n, taps=taps), Code(90, 2, 4, a="registers")),
        of(conv(n, taps=taps, residual=True), Code(90, 2, 4)),
        of(conv(n, taps=taps), Code(90, 2, 4), tile(stages=2)),
        of(conv(n, taps=taps), Code(90, 2, 4), l2_bandwidth=2e12),
        of(conv(n, taps=taps), Code(90, 2, 4), bandwidth=1e12),
    ):
        assert worse.seconds >= base.seconds
    serial = of(conv(1, taps=taps), Code(90, 1, 4, serialised=True), tile(64, 64, 64, 8))
    assert serial.seconds > of(conv(1, taps=taps), Code(90, 1, 4), tile(64, 64, 64, 8)).seconds
    assert "products that wait" in serial.binds or taps == 1


def test_shared_sums_shorten_the_loop_and_take_another_launch() -> None:
    few = conv(1, side=7, c=512, k=512)
    whole, split = (of(few, Code(90, 2, 4), tile(64, 64, 64, 4), 8 * shares) for shares in (1, 4))
    ends = 0.8e-6 + 0.55e-6 + 0.9e-6 / 4
    assert whole.binds.startswith("few blocks") and split.chain - ends == pytest.approx((whole.chain - ends) / 4)
    sums = 4 * 49 * 512 * 4
    second = 0.7e-6 + 0.8e-6 + 0.55e-6 + 0.4e-6 + sums / 8.5e12
    assert split.seconds == pytest.approx(split.chain + 0.7e-6 + second)
    assert split.l2 == pytest.approx(whole.l2 + sums / 8.5e12)
    late = dataclasses.replace(few, residual=True)  # which the second launch reads beside the sums
    whole_late, split_late = (of(late, Code(90, 2, 4), tile(64, 64, 64, 4), 8 * shares) for shares in (1, 4))
    assert whole_late.chain == pytest.approx(whole.chain + 0.55e-6) and split_late.chain == split.chain


def test_the_heuristic_of_few_programs_knows_the_same_gpu() -> None:
    assert ASSUMED.port * ASSUMED.clock == conv_bn_act._PORT and ASSUMED.cache == conv_bn_act._ARRIVAL
    assert ASSUMED.epilogue + ASSUMED.store == conv_bn_act._END
    assert (ASSUMED.step + ASSUMED.wait / 2) / ASSUMED.clock == conv_bn_act._STEP
    second = ASSUMED.gap + ASSUMED.start + ASSUMED.cache + ASSUMED.store
    assert second == pytest.approx(conv_bn_act._SECOND)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "wide_resnet50_2"])
@pytest.mark.parametrize("batch", [1, 2, 8, 32])
def test_few_programs_are_the_better_choice_by_the_estimate(arch: str, batch: int) -> None:
    """Against the usual tiles; several shares also against every candidate that has one, second launch included."""
    gains = []
    for case in dict.fromkeys(case for _, case in launches.launched(launches.PER_CONV, arch, batch, 224, "fp16", H200)):
        if case.op != "conv_bn_act" or conv_bn_act._few(case.problem, H200) is None:
            continue

        def seconds(config: conv_bn_act.Config, asked: ConvBNAct = case.problem) -> float:
            program = estimate.conv(asked, config, launches._tiles(asked, config), conv_bn_act.blocks(asked, config))
            code = Code(0, launches._blocks(asked, config, H200), config.num_warps)
            return estimate.estimate(asked, program, code, H200).seconds

        chosen, usual = conv_bn_act.heuristic(case.problem, H200), conv_bn_act.tiled(case.problem, H200)
        assert seconds(chosen) <= 1.01 * seconds(usual), (case, chosen, usual)
        gains.append(seconds(usual) - seconds(chosen))
        if chosen.shares > 1:
            others = [c for c in conv_bn_act.candidates(case.problem, H200) if c.shares == 1 and c.boxes]
            assert seconds(chosen) < 0.95 * min(map(seconds, others)), (case, chosen)
    assert sum(gains) > 2e-6


def test_a_persistent_block_starts_once_and_waits_for_each_residual() -> None:
    """Its loop over tiles and steps fetches operands across tiles, a residual where it is added (seen in its code)."""
    wide = conv(side=14, c=256, k=1024, taps=1, residual=True)
    bare = dataclasses.replace(wide, residual=False)
    for problem, waits in ((wide, 1), (bare, 0)):
        each, persistent = (of(problem, Code(90, 2, 4), programs=programs) for programs in (None, 264))
        assert persistent.programs == 264 and persistent.seconds < each.seconds
        fixed = ASSUMED.start + ASSUMED.memory
        assert persistent.chain == pytest.approx(fixed + 6 * (each.chain - fixed))  # 1568 tiles
        assert each.chain == pytest.approx(of(bare, Code(90, 2, 4)).chain + waits * ASSUMED.memory)


@pytest.mark.parametrize(("stages", "latencies"), [(2, 1.0), (3, 1.0), (4, 0.5)])
def test_blocks_that_keep_their_weights_by_hand(stages: int, latencies: float) -> None:
    """A step is a tile with its end; copies are asked for behind the end of the tile that had their place."""
    found = {}
    for side, c, k in ((14, 256, 1024), (28, 128, 512), (56, 64, 256)):
        problem, config = conv(side=side, c=c, k=k, taps=1, residual=True), tile(64, 128, c, stages, 132)
        programs = conv_bn_act.blocks(problem, config)
        assert config.resident(problem) and programs == 132 // (k // 128) * (k // 128)
        launch = of(problem, Code(69, 1, 8), config, programs)
        product = 2 * 64 * 128 * c / 4096 / 1.755e9 + 100 / 1.755e9 + 0.9e-6 / 2
        fetched = (64 * c + 64 * 128) * 2
        step = max(product, fetched * 132 / 8.5e12, latencies * ASSUMED.memory)
        taken = -(-128 * side * side // 64 * (k // 128) // programs)
        assert launch.chain == pytest.approx(ASSUMED.start + 2 * ASSUMED.memory + taken * step)
        assert launch.l2 * 8.5e12 == 128 * side * side // 64 * (k // 128) * fetched + programs * 128 * c * 2
        found[c] = step == product
    assert found[256] and found[64] is (stages == 4)


@pytest.mark.parametrize(("m", "n"), [(64, 64), (128, 128), (256, 128), (512, 64)])
def test_the_end_of_a_tile_by_hand(m: int, n: int) -> None:
    """Twice the outputs take twice as long to scale and to store, whatever the number of warps."""
    found = of(conv(c=64, k=n, side=56, taps=1), Code(160, 1, 8), tile(m, n, 64, 1))
    step = max((m + n) * 64 * 2 * 132 / 8.5e12, 2 * m * n * 64 / 4096 / 1.755e9 + 100 / 1.755e9)
    assert found.chain == pytest.approx(0.8e-6 + 0.85e-6 + step + 0.9e-6 * m * n / 128**2)


@pytest.mark.parametrize(("residual", "count"), [(False, 10), (True, 14)])
@pytest.mark.parametrize("blocks", [1, 3])
def test_an_int8_end_is_its_instructions(residual: bool, count: int, blocks: int) -> None:
    """All blocks' of a multiprocessor, where they take longer than an end in half precision."""
    floats = conv(side=56, c=64, k=256, taps=1, residual=residual)
    problem = ConvInt8(**vars(dataclasses.replace(floats, precision="int8")))
    config = conv_int8.Config(64, 64, 64, 4, 3, True, 132 * blocks)
    assert config.resident(problem)
    launch = of(problem, Code(108, blocks, 4), config, conv_int8.blocks(problem, config))
    issued = blocks * 64 * 64 / 32 * count / 2.5 / 1.755e9
    step = 2 * 64 * 64 * 64 / 8192 / 1.755e9 + 100 / 1.755e9 + max(issued, 0.5e-6 / 4) + 0.4e-6 / 4
    taken = -(-128 * 56 * 56 // 64 * 4 // launch.programs)
    assert launch.chain == pytest.approx(ASSUMED.start + 2 * ASSUMED.memory + taken * max(step, ASSUMED.memory))
    half = of(floats, Code(108, blocks, 4), tile(64, 64, 64, 3, 132 * blocks))
    assert issued > 0.5e-6 / 4 and half.chain <= launch.chain


def test_other_ops() -> None:
    stem = Stem(128, 224, 224, 3, 64, False, False, "fp16")
    config = stem_kernel.Config(64, 64, 64, 7, 4, 2, True)
    program = estimate.stem(stem, config, 896)
    assert program.prepared == 128 * ((56 + 7) * 2 + 4) * (56 * 2 + 4) * 32 + 128 * 224 * 224 * 3 * 2
    (loop,) = program.loops
    assert (loop.steps, loop.depth, loop.bytes) == (45, 256, 4 * 64 * 128) and program.l2 == 896 * 45 * loop.bytes
    found, alone = (estimate.estimate(stem, program, Code(168, blocks, 4), H200) for blocks in (3, 1))
    assert found.binds == "part of a wave, L2 traffic" and alone.binds.endswith("instructions")
    assert alone.chain == pytest.approx(
        45 * (520 * 2.5 + 2 * 64 * 64 * 256 / 4096 + 8 * 20 + 80) / 1.755e9 + 0.8e-6 + 0.85e-6 + 0.9e-6 / 4
    )
    before = program.prepared / (0.92 * 4.3e12) + 0.7e-6
    assert found.seconds == pytest.approx(0.7e-6 + before + 2 * found.chain + alone.chain, rel=0.01)
    one_by_one = dataclasses.replace(ASSUMED, hidden=0.0)  # two launches, neither of which overlaps the one before
    slower = estimate.estimate(stem, program, Code(168, 3, 4), H200, one_by_one)
    assert slower.seconds - found.seconds == pytest.approx(2 * 1.3e-6)
    head = Head(1, 7, 7, 2048, 1000, "fp16")
    config = type("Config", (), {"block_m": 1, "block_n": 16, "block_c": 256, "block_p": 64, "num_stages": 1})
    found = estimate.estimate(head, estimate.head(head, config, 63), Code(60, 4, 8), H200)
    assert 8 * 0.55e-6 < found.seconds < 10e-6 and found.binds == "few blocks, load latency"
    config.num_stages = 4
    ahead = estimate.estimate(head, estimate.head(head, config, 63), Code(142, 1, 8), H200)
    product = (2 * 16 * 256 / 4096 + 20 + 80) / 1.755e9  # which one stage adds to the wait for its copy
    assert ahead.chain == pytest.approx(found.chain - 8 * (0.55e-6 + product - 65 * 256 * 2 / (64 * 1.755e9)))
    block = BottleneckTail(128, 56, 56, 64, 256, 1, None, 64, "fp16")
    choice = bottleneck_tail_choice.choose(block, H200)
    assert choice is not None
    program = estimate.tail(block, choice, 3136)
    one, two = (estimate.estimate(block, program, Code(130, blocks, 8), H200) for blocks in (1, 2))
    assert program.l2 == choice.l2_reads(block) and one.floor < two.seconds < one.seconds
    assert [loop.steps for loop in program.loops] == [9, 4]


@pytest.mark.parametrize("name", ["a100", "b200", "rtx4090"])
def test_no_estimate_where_the_latencies_are_not_known(name: str) -> None:
    program = estimate.conv(conv(), USUAL, 392, 392)
    with pytest.raises(ValueError, match=f"no estimate for {name}: .* known are h100 and h200"):
        estimate.estimate(conv(), program, Code(128, 2, 4), gpus.known(name))


# --- what it reads


def test_the_table_of_resources_is_read_by_names(tmp_path: Path) -> None:
    path = tmp_path / "resources.csv"
    path.write_text(
        "# triton 3.7.1\noccupancy,a,arch,kernel,type,constants,shared,registers,serialised,more\n"
        "2,registers,sm_90,conv_bn_act._boxes,fp16,BLOCK_N=128 num_warps=8 C%16,1,134,1,x\n"
        "3,shared,sm_90,conv_bn_act._boxes,fp16,BLOCK_N=64 num_warps=4,1,90,0,x\n"
    )
    assert list(launches.table(path).values()) == [
        Code(134, 2, 8, True, "registers"), Code(90, 3, 4, False, "shared")
    ]  # fmt: skip
    assert launches.table(tmp_path / "none.csv") == {}
    of_two = "# made by\ntriton,arch,kernel,type,constants,registers,occupancy,serialised,a\n" + "".join(
        f"{version},sm_90,head._head,fp16,num_warps=4,{registers},2,yes,\n"
        for version, registers in (("0.1", 1), (importlib.metadata.version("triton"), 2), ("99.9", 3))
    )
    path.write_text(of_two)
    assert [code.registers for code in launches.table(path).values()] == [2]
    assert all(code.serialised for code in launches.table(path).values())
    committed = launches.table(launches.resources.table_path())
    assert len(committed) > 500 and all(code.registers > 0 and code.blocks > 0 for code in committed.values())


def test_measured_figures_come_from_result_files(tmp_path: Path) -> None:
    assert launches.measured("resnet50-fp16-b128", H200, tmp_path) == (None, None)
    rows = [{"parts": ["conv1"], "measured_seconds": 5e-5}, {"parts": ["b", "c"], "measured_seconds": None}]
    schedules = [{"name": "per-conv", "rows": []}, {"name": "planned", "rows": rows}]
    (tmp_path / "layers-resnet50-fp16-b128.json").write_text(json.dumps({"schedules": schedules}))
    contestants = {"optimize": {"images_per_second": 40_000.0}, "eager": {"images_per_second": 1.0}}
    cases = {"resnet50-fp16-b128": {"contestants": contestants}, "resnet50-fp16-b1": {"failed": "it did"}}
    (tmp_path / "models.json").write_text(json.dumps({"cases": cases}))
    assert launches.measured("resnet50-fp16-b128", H200, tmp_path) == ({frozenset({"conv1"}): 5e-5}, 2.5e-5)
    assert launches.measured("resnet50-fp16-b1", H200, tmp_path) == (None, None)


def test_the_planned_launches_are_those_of_the_plan() -> None:
    planned = command.schedules(command.Subject("resnet50", 128, 224, command.Arithmetic("fp16")), H200)[3]
    found = launches.launched(launches.PLANNED, "resnet50", 128, 224, "fp16", H200)
    assert {frozenset(parts) for parts, _ in found} == {frozenset(kernel.parts) for kernel in planned.kernels}
    works = {frozenset(kernel.parts): kernel.work for kernel in planned.kernels}
    assert all(estimate.work(case.problem) == works[frozenset(parts)] for parts, case in found)
    assert len(launches.launched(launches.PLANNED, "resnet50", 1, 224, "fp16", H200)) == 54
    assert len(launches.launched(launches.PER_CONV, "resnet50", 128, 224, "fp16", H200)) == 54


# --- the command


def test_the_command_labels_what_it_shows(tmp_path: Path) -> None:
    """Compiled kernels have names and constants that interpreted ones lack, so a process of its own."""
    found = command_line.run_process(
        "roofline", "--arch", "resnet50", "--gpu", "h200", "--estimate", "--json", tmp_path / "a.json",
        TRITON_INTERPRET="0",
    )  # fmt: skip
    out = found.passed()
    headings = [line.strip() for line in out.splitlines() if line and not line.startswith(("┏", "┃", "┡", "│", "└"))]
    assert headings[0] == "ESTIMATE, not measured: planned, resnet50, float16, batch 128, 224 px, h200"
    assert headings[1] == "ESTIMATE, not measured: an image, resnet50, float16, h200"
    assert "good to about 30 %" in out and "8.5 TB/s out of L2 (assumed)" in out
    rows = [line for line in out.splitlines() if line.startswith("│")]
    assert len(rows) > 25 and all("not run" in row or "per-conv" in row for row in rows)
    data = json.loads((tmp_path / "a.json").read_text())["estimate"]
    assert "only what is called measured was measured" in data["what"]
    assert data["assumptions"]["memory"] == ASSUMED.memory and data["assumptions"]["l2_bandwidth"] == 8.5e12
    assert [(each["batch"], each["schedule"]) for each in data["per_image"]] == [
        (batch, schedule) for batch in shapes.BATCHES for schedule in ("per-conv", "planned")
    ]
    assert all(each["estimate"] > each["floor"] and each["measured"] is None for each in data["per_image"])
    whole = sum(launch["estimated_seconds"] for launch in data["launches"]) / 128
    assert whole == pytest.approx(
        next(s["estimate"] for s in data["per_image"] if s["batch"] == 128 and s["launches"] < 54)
    )
    assert all(launch["code_registers"] > 0 and launch["measured_seconds"] is None for launch in data["launches"])


def test_measured_times_stand_beside_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    problem = conv()
    case = launches.Case("conv_bn_act", problem)
    launch = launches.Launch(
        ("layer3.1.conv2",), case, tile(), Code(128, 2, 4, True, "registers"), of(problem, Code(128, 2, 4))
    )
    subject = command.Subject("resnet50", 128, 224, command.Arithmetic("fp16"))
    sums = (command.Sum(128, "planned", 1, 1e-6, 3e-6, 2.5e-6), command.Sum(128, "per-conv", 1, 1e-6, 3e-6, None))
    seconds = {frozenset({"layer3.1.conv2"}): 7.7e-5}
    command.show_estimates(command.Estimates(subject, H200, (launch,), sums, seconds), "remark")
    out = capsys.readouterr().out
    assert "77.0" in out and "2.50" in out and out.count("not run") == 1
    assert "A in registers, serialised" in out and "remark" in out and "does not say" not in out


def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str) -> command_line.Outcome:
        return command_line.run("roofline", "--estimate", "-a", "resnet18", "-b", "1", *arguments)

    run("--gpu", "h200").failed("--estimate is of compiled kernels, and TRITON_INTERPRET is set; unset it")
    monkeypatch.setattr("resnet_fast.backends.triton.missing", lambda: "triton is not installed")
    run("--gpu", "h200").failed("--estimate needs the kernels' launch choices, and triton is not installed")
    run("--gpu", "a100").failed("no estimate for a100: the latencies assumed are Hopper's; known are h100 and h200")


# --- which choices are worth measuring


def test_tuning_measures_the_choices_that_the_estimate_prefers() -> None:
    case = launches.Case("conv_bn_act", conv(128, 14, 256, 1024, 1, residual=True), "relu")
    every = sweep.configs(case, H200)
    few = sweep.configs(case, H200, 6)
    assert len(every) > 20 and len(few) == 6 == len(set(few)) and set(few) < set(every)
    assert few[0] == every[0]  # the heuristic's own comes first, whatever the estimate says
    order = launches.ranked(case, every, H200)
    assert [config for config in order if config in few[1:]] == list(few[1:])
    worst = order[-1]
    assert worst not in few and sorted(map(str, order)) == sorted(map(str, every))
    # No estimate: all of them.
    for unknown, gpu in ((case, gpus.known("a100")), (launches.Case("add_act", AddAct(10**6, "fp16")), H200)):
        assert sweep.configs(unknown, gpu, 2) == sweep.configs(unknown, gpu)


def test_every_op_of_the_plan_can_be_ranked() -> None:
    for parts, case in dict.fromkeys(launches.launched(launches.PLANNED, "resnet50", 128, 224, "fp16", H200)):
        few = sweep.configs(case, H200, 6)
        assert 1 <= len(few) <= 6, parts
