"""The compile check: what it compiles, what it finds wrong, and its table. Real machine code, no GPU."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from resnet_fast.kernels import conv_bn_act, gpus
from resnet_fast.kernels.problems import BatchNormAct
from resnet_fast.tuning import compile as check
from resnet_fast.tuning import compiler, ops, shapes

H100 = gpus.known("h100")
RESOURCES = compiler.Resources(
    registers=100, stack=0, local=0, shared=49152, threads=128, tensor_columns=0, matrix="HGMMA", a="shared",
    early=True, waits="first",
)  # fmt: skip


def problem(**changes: Any) -> conv_bn_act.Problem:
    given = conv_bn_act.Problem(1, 14, 14, 64, 64, (1, 1), (1, 1), (0, 0), (1, 1), 1, "fp16", False)
    return dataclasses.replace(given, **changes)


def task(config: Any = None, capability: int = 90, **changes: Any) -> compiler.Task:
    case = ops.Case("conv_bn_act", problem(**changes), "relu")
    return compiler.Task(capability, case, config or conv_bn_act.heuristic(case.problem, H100))


def outcome(**changes: Any) -> compiler.Compiled:
    return compiler.Compiled(task(), dataclasses.replace(RESOURCES, **changes))


def succeed(code: str, tmp_path: Path) -> Any:
    """The JSON that ``code`` prints in a process whose Triton compiles, with a cache of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


# --- which launches


def test_cases_are_those_of_the_network() -> None:
    cases = shapes.problems(["resnet50"], [128], ["fp16"])
    convolutions = [case for case in cases if case.op == "conv_bn_act"]
    assert len({case.problem for case in convolutions}) == 23
    first = problem(n=128, h=56, w=56, k=64)
    assert ops.Case("conv_bn_act", first, "relu") in convolutions
    projection = problem(n=128, h=56, w=56, c=256, k=512, stride=(2, 2))
    assert ops.Case("conv_bn_act", projection, "none") in convolutions
    assert {case.op for case in cases} >= {"conv_bn_act", "head", "add_act"}
    assert "bottleneck_tail" not in {case.op for case in cases}
    assert len(set(cases)) == len(cases)


def test_cases_of_groups_and_batches() -> None:
    cases = shapes.problems(["resnext50_32x4d"], [1, 8], ["fp16", "fp32"], 64)
    grouped = [case.problem for case in cases if case.op == "conv_bn_act" and case.problem.groups == 32]
    assert {(each.n, each.precision) for each in grouped} == {(1, "fp16"), (1, "fp32"), (8, "fp16"), (8, "fp32")}
    assert all(each.h <= 16 for each in grouped)


def test_blocks_become_tails_where_a_gpu_is_given() -> None:
    cases = shapes.problems(["resnet50", "resnet18"], [128], ["fp16"], gpu=H100)
    tails = [case.problem for case in cases if case.op == "bottleneck_tail"]
    described = {(each.mid, each.k, each.stride, each.shortcut, each.following) for each in tails}
    assert (64, 256, 1, (64, 56, 56, 1), 64) in described
    assert (64, 256, 1, None, 64) in described and (64, 256, 1, None, 0) in described
    assert (128, 512, 2, (256, 56, 56, 2), 128) in described
    assert all(each.k == 4 * each.mid for each in tails)
    assert not [
        case for case in shapes.problems(["resnet18"], [128], ["fp16"], gpu=H100) if case.op == "bottleneck_tail"
    ]


def test_training_adds_the_passes_of_batch_norm() -> None:
    assert not [case for case in shapes.problems(["resnet50"], [128], ["fp16"]) if case.op == "batch_norm_act"]
    cases = shapes.problems(["resnet50"], [128], ["fp16"], training=True)
    found = [(each.problem, each.form) for each in cases if each.op == "batch_norm_act"]
    norm = functools.partial(BatchNormAct, precision="fp16")
    assert (norm(128 * 112 * 112, 64, step="statistics"), "") in found  # the stem's
    assert (norm(128 * 7 * 7, 2048, step="apply", residual=True), "relu") in found
    assert (norm(128 * 7 * 7, 2048, step="backward", relu=True, residual=True), "") in found
    assert (norm(128 * 7 * 7, 2048, step="apply"), "none") in found  # a projection's
    assert (norm(128 * 7 * 7, 2048, step="reduce"), "") in found
    # Three shapes in each stage but for its first block's before the stride: 64, 128, 256, 512 channels twice.
    assert len({(problem.rows, problem.c) for problem, _ in found}) == 1 + 2 + 3 * 3
    assert len(set(found)) == len(found)


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match="resnet51"):
        shapes.problems(["resnet51"], [1], ["fp16"])


def test_unknown_op() -> None:
    with pytest.raises(ValueError, match=r"'pool'.*conv_bn_act"):
        ops.get("pool")


# --- what is wrong with a launch


def test_faults() -> None:
    assert check.faults(outcome(), H100) == []
    (spill,) = check.faults(outcome(stack=16), H100)
    assert "spills" in spill and "16 bytes" in spill
    assert "spills" in check.faults(outcome(local=8), H100)[0]
    (shared,) = check.faults(outcome(shared=H100.shared_memory + 1), H100)
    assert str(H100.shared_memory + 1) in shared and str(H100.shared_memory) in shared
    (matrix,) = check.faults(outcome(matrix="HMMA"), H100)
    assert "HMMA instead of HGMMA" in matrix
    assert check.faults(outcome(matrix="HMMA", early=False, waits=""), gpus.known("a100")) == []
    assert (
        check.faults(compiler.Compiled(task(precision="fp32"), dataclasses.replace(RESOURCES, matrix="FFMA")), H100)
        == []
    )
    (rounds,) = check.faults(compiler.Compiled(task(precision="fp32"), RESOURCES), H100)
    assert "HGMMA, which rounds to tf32" in rounds
    (nan,) = check.faults(outcome(drops_nan=True), H100)
    assert "drops NaN" in nan
    (never,) = check.faults(outcome(waits=""), H100)
    assert "never waits for it" in never
    (late,) = check.faults(outcome(waits="late"), H100)
    assert "may touch memory before it waits" in late
    assert check.faults(outcome(early=False, waits=""), H100) == ["is launched when the kernel before is over"]
    assert len(check.faults(outcome(early=False), H100)) == 2
    (early,) = check.faults(outcome(matrix="HMMA"), gpus.known("a100"))
    assert early == "is launched before the kernel before is over"
    (serialised,) = check.faults(outcome(serialised=True), H100)
    assert "wait for the one before" in serialised and "C7515" in serialised
    for a in ("registers", "registers+shared"):
        assert check.faults(outcome(a=a), H100) == ["takes the weights, HGMMA's A, through registers"]
    gathered = conv_bn_act.Config(64, 64, 64, 4, 4, False)
    assert check.faults(compiler.Compiled(task(gathered), dataclasses.replace(RESOURCES, a="registers")), H100) == []
    rounds_a = compiler.Compiled(task(precision="tf32"), dataclasses.replace(RESOURCES, a="registers"))
    assert check.faults(rounds_a, H100) == []
    (broken,) = check.faults(compiler.Compiled(task(), None, "CompilationError: no"), H100)
    assert "CompilationError" in broken


@pytest.mark.parametrize(
    "changes",
    [{"registers": 148, "threads": 256}, {"shared": 120 * 1024}, {"registers": 160, "threads": 384}],
    ids=["registers", "shared", "both"],
)
def test_fewer_programs_at_once_than_meant(changes: dict[str, int]) -> None:
    """Two are to hide each other's epilogues."""
    (fault,) = check.faults(outcome(**changes), H100)
    assert fault == "has room for 1 on a multiprocessor at once; the launch choice means 2"
    alone = conv_bn_act.Config(128, 256, 64, 8, 4, True)  # whose stages leave no room for another
    assert check.faults(compiler.Compiled(task(alone), dataclasses.replace(RESOURCES, **changes)), H100) == []


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_wide_projections_of_tails_may_be_serialised_by_one_triton(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    serialised = dataclasses.replace(RESOURCES, serialised=True, a="registers")
    found = {}
    for case in shapes.problems(["resnet50"], [128], ["fp16"], gpu=H100):
        if case.op == "bottleneck_tail":
            tail = compiler.Task(90, case, ops.get(case.op).kernel.heuristic(case.problem, H100))
            found[case.problem] = check.faults(compiler.Compiled(tail, serialised), H100) != []
    assert len(found) > 8
    assert {
        problem for problem, faulty in found.items() if not faulty
    } == {
        problem for problem in found if version == "3.6.0" and problem.shortcut is not None and problem.mid > 64
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "drops"),
    [
        ("max.NaN.f32 %r1, %r2, 0f00000000;", False),
        ("max.f32 %r1, %r2, 0f00000000;", True),
        ("max.ftz.f32 %r1, %r2, %r3;", True),
        ("max.f16x2 %r1, %r2, %r3;", True),
        ("max.NaN.bf16x2 %r1, %r2, %r3;", False),
        ("max.s32 %r1, %r2, %r3;", False),
    ],
)
def test_maxima_that_drop_nan_are_seen(line: str, drops: bool) -> None:
    assert bool(compiler._MAXIMUM.search(line)) is drops


@pytest.mark.parametrize(
    ("changes", "gpu", "blocks"),
    [
        ({"registers": 128, "threads": 128, "shared": 0}, "h100", 4),
        ({"registers": 255, "threads": 256, "shared": 0}, "h100", 1),
        ({"registers": 97, "threads": 128, "shared": 0}, "h100", 4),  # 104 registers after rounding, 19 warps
        ({"registers": 32, "threads": 1024, "shared": 0}, "h100", 2),
        ({"registers": 16, "threads": 1024, "shared": 0}, "rtx4090", 1),
        ({"registers": 32, "threads": 32, "shared": 0}, "h100", 32),
        ({"registers": 32, "threads": 32, "shared": 0}, "rtx4090", 24),
        ({"registers": 32, "threads": 128, "shared": 113 * 1024}, "h100", 2),
        ({"registers": 32, "threads": 128, "shared": 114 * 1024}, "h100", 1),
        ({"registers": 32, "threads": 128, "shared": 228 * 1024}, "h100", 0),
        ({"registers": 32, "threads": 128, "shared": 0, "tensor_columns": 256}, "b200", 2),
    ],
)
def test_occupancy(changes: dict[str, int], gpu: str, blocks: int) -> None:
    assert dataclasses.replace(RESOURCES, **changes).occupancy(gpus.known(gpu)) == blocks


# --- the table


def _table() -> check.Table:
    key = check.Key("sm_90", "conv_bn_act._boxes", "fp16", "R=1 x[1x1x128x64]")
    return {
        key: ("100", "49152", "4", "HGMMA", "no", "shared"),
        dataclasses.replace(key, arch="sm_80"): ("90", "1", "2", "HMMA", "", ""),
    }


def test_table_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "resources.csv"
    hopper, _ = sorted(_table(), reverse=True)
    tables = {"3.7.1": _table(), "3.6.0": {hopper: _table()[hopper]}}
    check.write_table(path, tables)
    text = path.read_text()
    assert text.startswith("# made by: python -m resnet_fast.tuning.compile --write")
    assert check.read_table(path) == tables
    check.write_table(path, {"3.6.0": tables["3.6.0"], "3.7.1": dict(reversed(_table().items()))})
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["", "arch,kernel\n", "# made by\narch,kernel\n"])
def test_no_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "resources.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="no table of resources"):
        check.read_table(path)


def test_differences() -> None:
    table = _table()
    hopper, _ = sorted(table, reverse=True)
    assert check.differences(table, table, ["sm_80", "sm_90"]) == []
    (changed,) = check.differences(table, table | {hopper: ("101", *table[hopper][1:])}, ["sm_80", "sm_90"])
    assert changed.endswith("registers 100 -> 101") and hopper.constants in changed
    (gone,) = check.differences(table, {hopper: table[hopper]}, ["sm_80", "sm_90"])
    assert "no launch needs it" in gone
    assert check.differences(table, {hopper: table[hopper]}, ["sm_90"]) == []
    (new,) = check.differences({hopper: table[hopper]}, table, ["sm_80", "sm_90"])
    assert new.startswith("sm_80") and "not in the table" in new


def test_the_committed_table_is_of_the_pinned_and_the_oldest_triton() -> None:
    root = Path(__file__).parents[2]
    (pinned,) = re.findall(r"^triton==(.+)$", (root / "constraints.txt").read_text(), re.MULTILINE)
    (oldest,) = set(re.findall(r"triton==([0-9.]+)", (root / ".ci" / "oldest").read_text()))
    tables = check.read_table(check.table_path())
    assert set(tables) == {pinned, oldest}
    assert {key.arch for key in tables[pinned]} == {"sm_80", "sm_90", "sm_100"}
    assert {key.arch for key in tables[oldest]} == {"sm_90"}
    assert {key.kernel.partition(".")[0] for key in tables[pinned]} == set(check.CHECKED)


def test_the_committed_convolutions_on_hopper_overlap_and_hide_each_other() -> None:
    """Two at once, but of tiles that fill the registers and of those that keep weights and copy whole tiles ahead."""
    for version, table in check.read_table(check.table_path()).items():
        rows = {key: row for key, row in table.items() if key.arch == "sm_90"}
        rows = {key: row for key, row in rows.items() if key.kernel in ("conv_bn_act._boxes", "conv_bn_act._resident")}
        assert {key.type for key in rows} >= {"fp16", "bf16"}, version
        for key, (registers, _, occupancy, matrix, serialised, a) in rows.items():
            constants = dict(word.split("=") for word in key.constants.split() if "=" in word)
            box = ("BLOCK_M",) if key.kernel.endswith("_resident") else ("BOX_N", "BOX_P", "BOX_Q")
            large = math.prod(int(constants[name]) for name in (*box, "BLOCK_N")) > 128 * 128
            threads = 32 * int(constants["num_warps"])
            if key.kernel.endswith("_resident"):  # registers leave room for a second, shared memory need not
                assert 2 * int(registers) * threads <= 65536, (version, key)
            else:
                assert int(occupancy) >= (1 if large else 2), (version, key)
            assert serialised != "yes", (version, key)
            if key.type in ("fp16", "bf16"):
                assert (matrix, a) == ("HGMMA", "shared"), (version, key)


INT8_FORMS = ("conv_int8._boxes", "conv_int8._resident")
FLOAT8_FORMS = ("conv_fp8._boxes", "conv_fp8._resident")


def test_the_committed_int8_kernels_on_hopper_overlap_and_hide_each_other() -> None:
    for version, table in check.read_table(check.table_path()).items():
        rows = {key: row for key, row in table.items() if key.arch == "sm_90" and key.kernel in INT8_FORMS}
        assert len(rows) > 50 and {key.kernel for key in rows} == {*INT8_FORMS}, version
        for key, (_, _, occupancy, matrix, serialised, a) in rows.items():
            assert (matrix, serialised, a) == ("IGMMA", "no", "registers"), (version, key)
            stated = dict(word.split("=") for word in key.constants.split() if "=" in word and word[0].isupper())
            if key.kernel == "conv_int8._resident":
                assert int(occupancy) >= (2 if "x[64x512]" in key.constants else 3), (version, key)
                continue
            pixels = math.prod(int(stated[f"BOX_{axis}"]) for axis in "NPQ")
            assert int(occupancy) >= (1 if pixels * int(stated["BLOCK_N"]) > 128 * 128 else 2), (version, key)


def test_the_committed_float8_kernels_on_hopper_overlap() -> None:
    for version, table in check.read_table(check.table_path()).items():
        rows = {key: row for key, row in table.items() if key.arch == "sm_90" and key.kernel in FLOAT8_FORMS}
        assert len(rows) > 50 and {key.kernel for key in rows} == {*FLOAT8_FORMS}, version
        for key, (registers, _, occupancy, matrix, serialised, _) in rows.items():
            assert (matrix, serialised) == ("QGMMA", "no") and int(registers) < 255, (version, key)
            assert int(occupancy) >= (2 if key.kernel == "conv_fp8._resident" or "num_warps=4" in key.constants else 1)


def test_int8_kernels_round_every_product(tmp_path: Path) -> None:
    """As the interpreter and the reference do: nothing is contracted to a multiply-add; for two architectures."""
    code = """
import json
import triton
from resnet_fast.kernels import conv_int8, gpus
from resnet_fast.tuning import compiler, ops
found = []
for name in ("h100", "a100"):
    gpu = gpus.known(name)
    triton.runtime.driver.set_active(compiler._Driver(gpu.capability))
    problem = conv_int8.Problem(1, 7, 7, 64, 64, (1, 1), (1, 1), (0, 0), (1, 1), 1, "int8", True)
    case = ops.Case("conv_int8", problem, "relu")
    task = compiler.Task(gpu.capability, case, conv_int8.heuristic(problem, gpu))
    ptx = compiler.launch(task).compile().asm["ptx"]
    products = ".s32.s8.s8" in ptx or ".s8.s8.s32" in ptx
    found.append(["fma.rn" in ptx, "mul.f32" in ptx or "mul.rn.f32" in ptx or "mul.rn.f32x2" in ptx, products])
print(json.dumps(found))
"""
    assert succeed(code, tmp_path) == [[False, True, True]] * 2


def test_int8_kernels_of_other_outputs_are_other_rows(tmp_path: Path) -> None:
    code = """
import dataclasses
import json
from resnet_fast.kernels import conv_int8, gpus
from resnet_fast.tuning import compile as check, compiler, ops
found = []
for name in ("h100", "a100"):
    gpu = gpus.known(name)
    problem = conv_int8.Problem(1, 7, 7, 64, 64, (1, 1), (1, 1), (0, 0), (1, 1), 1, "int8", True)
    config = conv_int8.heuristic(problem, gpu)
    cases = [ops.Case("conv_int8", dataclasses.replace(problem, out=out), "relu") for out in ("uint8", "fp16", "bf16")]
    keys = [check.key(compiler.Task(gpu.capability, case, config)) for case in cases]
    found.append([len({*keys}), *(key.constants.endswith(" out:fp16") for key in keys)])
print(json.dumps(found))
"""
    assert succeed(code, tmp_path) == [[3, False, True, False]] * 2


def test_tables_of_launch_choices_are_compiled(tmp_path: Path) -> None:
    case = problem(n=3, h=56, w=56)
    fields = dataclasses.asdict(conv_bn_act.Config(64, 32, 32, 4, 2, True))
    choices = {
        "conv_bn_act": {case.key(): fields | {"ms": 0.1}, "fp16 n3 5x5": fields, problem(n=3, h=7, w=7).key(): {}}
    }
    del choices["conv_bn_act"][case.key()]["shares"]  # a table from before this field
    (tmp_path / "h100.json").write_text(json.dumps({"format": 1, "gpu": "h100", "choices": choices}))
    (tmp_path / "h9.json").write_text(json.dumps({"format": 1, "gpu": "h9", "choices": {}}))
    code = f"""
import json
from pathlib import Path
from resnet_fast import models
from resnet_fast.kernels import gpus
from resnet_fast.tuning import compile as check
models.list_models = lambda: ["resnet50"]
made, wrong = check.table_tasks(gpus.known("h100"), Path({str(tmp_path)!r}))
other, _ = check.table_tasks(gpus.known("a100"), Path({str(tmp_path)!r}))
print(json.dumps([[key.constants for key in made], wrong, len(other)]))
"""
    made, wrong, other = succeed(code, tmp_path)
    assert made and all("BLOCK_N=32" in constants and "num_stages=2" in constants for constants in made)
    assert len(wrong) == 3 and other == 0
    assert any("h9.json" in line for line in wrong)
    assert any("fp16 n3 5x5: no network has this launch" in line for line in wrong)


# --- real compilation

_COMPILED = """
import dataclasses, json, re, subprocess, tempfile
import torch, triton
from triton import knobs
from resnet_fast.kernels import conv_bn_act as kernel, gpus
from resnet_fast.tuning import compile as check, compiler, ops

def task(name, precision, n=1, c=64, config=None):
    gpu = gpus.known(name)
    problem = kernel.Problem(n, 14, 14, c, 64, (1, 1), (1, 1), (0, 0), (1, 1), 1, precision, False)
    case = ops.Case("conv_bn_act", problem, "relu")
    return compiler.Task(gpu.capability, case, config or kernel.heuristic(problem, gpu))

def disassembled(task):
    cubin = compiler.launch(task).compile().asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name], capture_output=True).stdout
    found = set(re.findall(r"\\b(HGMMA|HMMA|UTC[A-Z]*MMA|FFMA)2?\\b", text.decode()))
    return sorted(found), sorted(compiler.read_code(cubin).multiplies)

made, names = [], []
for name in ("a100", "h100", "b200"):
    for precision in ("fp16", "fp32"):
        found = compiler.compile_task(task(name, precision))
        faults = check.faults(found, gpus.known(name))
        made.append([name, precision, dataclasses.asdict(found.resources), faults, found.error])
        names.append(disassembled(task(name, precision)))
small = kernel.Config(64, 64, 32, 4, 2, False)
keys = [check.key(task("h100", "fp16", n, c, small)).constants for n, c in ((1, 64), (2, 64), (1, 32), (1, 40))]
odd = compiler.compile_task(task("h100", "fp16", config=kernel.Config(64, 48, 64, 4, 2, False)))
odd = check.faults(odd, gpus.known("h100"))
norm = ops.get("batch_norm_act").kernel
cases = [
    ops.Case("batch_norm_act", norm.Problem(6272, 512, "fp16", step)) for step in ("statistics", "reduce", "apply")
]
several = check.tasks(gpus.known("h100"), cases)
merging = compiler.compile_task(list(several.values())[1])
several = {
    "kernels": [[key.kernel, task.part] for key, task in several.items()],
    "again": all(check.key(task) == key for key, task in several.items()),
    "tasks": [task.part for task in compiler.tasks(90, cases[0], merging.task.config)],
    "merging": [merging.resources.matrix, merging.error, check.faults(merging, gpus.known("h100"))],
}
triton.runtime.driver.set_active(compiler._Driver(90))
given = task("h100", "fp16", 128)
example = ops.get("conv_bn_act").example(given.case, torch.device("meta"))
a, (out,) = example.arguments, example.outputs
workspace = torch.empty(kernel.workspace_size(given.case.problem, given.config), device="meta")
raw = []
for options in ({}, {"scale_in": a.scale, "shift_in": a.shift}):
    arguments = (a.x, a.weight, out, given.case.problem, given.config)
    launch, _ = kernel.launch_raw(*arguments, workspace=workspace, **options)
    ran = dataclasses.replace(given.config, boxes=launch.kernel.__name__ == "_boxes")
    found = compiler.Compiled(dataclasses.replace(given, config=ran), compiler._resources(launch.compile()))
    raw.append([launch.kernel.__name__, check.faults(found, gpus.known("h100"))])
print(json.dumps({"made": made, "names": names, "keys": keys, "odd": odd, "several": several, "raw": raw}))
"""


_PLANTED = """
import importlib.util, json, sys
from pathlib import Path
from resnet_fast.kernels import conv_bn_act, gpus
from resnet_fast.tuning import compile as check, compiler, ops

gpu = gpus.known("h100")
problem = conv_bn_act.Problem(64, 14, 14, 256, 256, (3, 3), (1, 1), (1, 1), (1, 1), 1, "fp16", False)
case = ops.Case("conv_bn_act", problem, "relu")
found = {"sound": check.faults(compiler.compile_task(check.tasks(gpu, [case]).popitem()[1]), gpu)}
source = Path(conv_bn_act.__file__).read_text()
for count, before, after in (
    (4, "C: tl.constexpr,", "C,"),  # in other kernels and functions, too
    (1, "STEPS: tl.constexpr = ", "STEPS = "),
    (1, "accumulator = tl.zeros((BLOCK_N, BLOCK_M)", "accumulator = tl.zeros((BLOCK_M, BLOCK_N)"),
    (1, "dot(weight.load([k, step * BLOCK_K]), pixels.T,", "dot(pixels, weight.load([k, step * BLOCK_K]).T,"),
    (1, "_finish(accumulator.T,", "_finish(accumulator,"),
):
    assert source.count(before) == count, before
    source = source.replace(before, after)
path = Path(sys.argv[1])
path.write_text(source)
spec = importlib.util.spec_from_file_location("resnet_fast.kernels.conv_bn_act", path)
planted = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = planted
spec.loader.exec_module(planted)
found["planted"] = check.faults(compiler.compile_task(check.tasks(gpu, [case]).popitem()[1]), gpu)
print(json.dumps(found))
"""


def test_a_length_known_at_run_time_and_pixels_first_serialise_the_products(tmp_path: Path) -> None:
    """The kernel as it was before: C an argument, its pixels reshaped and then HGMMA's A."""
    path = tmp_path / "planted.py"
    found = succeed(f"import sys; sys.argv.append({str(path)!r})\n{_PLANTED}", tmp_path)
    assert found["sound"] == []
    serialised, registers = found["planted"]
    assert "lets each HGMMA wait for the one before" in serialised and "through registers" in registers


_UNORDERED = """
import importlib.util, json, sys
from pathlib import Path
from resnet_fast.kernels import add_act, gpus
from resnet_fast.tuning import compile as check, compiler, ops

source, path = Path(add_act.__file__).read_text(), Path(sys.argv[1])
wait = "    wait_for_earlier_kernels()\\n"
assert source.count(wait) == 2
case = ops.Case("add_act", add_act.Problem(4096, "fp16"), "relu")
found = {}
for name, instead in (
    ("sound", wait),
    ("left out", ""),
    ("behind a store", "    tl.store(out, tl.load(x))\\n" + wait),
    ("of some programs", "    if tl.program_id(0) > 0:\\n    " + wait),
):
    path.write_text(source.replace(wait, instead))
    spec = importlib.util.spec_from_file_location("resnet_fast.kernels.add_act", path)
    sys.modules[spec.name] = planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    for gpu in map(gpus.known, ("a100", "h100", "b200")):
        task = check.tasks(gpu, [case]).popitem()[1]
        found[f"{name}, {gpu.name}"] = check.faults(compiler.compile_task(task), gpu)
    kernel = compiler.launch(task)
    plain = kernel.kernel.warmup(*kernel.args, grid=kernel.grid, **kernel.options)
    found[f"{name}, one after the other"] = compiler._resources(plain).waits
print(json.dumps(found))
"""


def test_a_kernel_that_does_not_wait_for_the_one_before_is_a_fault(tmp_path: Path) -> None:
    """Left out, behind a write or in some programs only; without early launches nothing waits, nor on older GPUs."""
    path = tmp_path / "planted.py"
    found = succeed(f"import sys; sys.argv.append({str(path)!r})\n{_UNORDERED}", tmp_path)
    said = {"sound": [], "left out": ["never waits for it"]}
    for name in ("sound", "left out", "behind a store", "of some programs"):
        wanted = said.get(name, ["may touch memory before it waits for it"])
        for gpu in ("h100", "b200"):
            assert [fault.rpartition(", and ")[2] for fault in found[f"{name}, {gpu}"]] == wanted, (name, gpu)
        assert found[f"{name}, a100"] == [] and found[f"{name}, one after the other"] == "", name


#: Instructions of PTX before the wait, and what the machine code's wait is then.
_BEFORE = {
    "": "first",
    "add.u32 r, n, 1;": "first",
    "mov.u32 r, %tid.x;": "first",
    "st.shared.u32 [sm], n;": "first",
    "prefetch.tensormap [a];": "first",
    "@c bra BEFORE; add.u32 n, n, n; BEFORE:": "first",
    "@c bra BEHIND;": "late",
    "@c ret;": "late",
    "ld.u32 r, [a];": "late",
    "st.u32 [a], n;": "late",
    "ld.global.u32 r, [b];": "late",
    "st.global.u32 [b], n;": "late",
    "atom.global.add.u32 r, [b], n;": "late",
    "red.global.add.u32 [b], n;": "late",
    "atom.add.u32 r, [a], n;": "late",
    "prefetch.global.L2 [b];": "late",
    "cp.async.cg.shared.global [sm], [b], 16;": "late",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [sm], [b], 64, [barrier];": "late",
    "cp.async.bulk.global.shared::cta.bulk_group [b], [sm], 64;": "late",
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [b], [sm], 64;": "late",
    "cp.async.bulk.prefetch.L2.global [b], 64;": "late",
    "cp.async.bulk.prefetch.tensor.2d.L2.global.tile [a, {n, n}];": "late",
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [sm], [a, {n, n}], [barrier];":
        "late",
    "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [a, {n, n}], [sm];": "late",
}  # fmt: skip

_PTX = """
.version 8.6
.target {target}
.address_size 64
.visible .entry kernel(.param .u64 first, .param .u64 second, .param .u32 number)
{{
  .reg .u64 a, b; .reg .u32 r, n; .reg .pred c;
  .shared .align 128 .b8 sm[1024]; .shared .align 8 .b64 barrier;
  ld.param.u64 a, [first]; ld.param.u64 b, [second]; ld.param.u32 n, [number];
  cvta.to.global.u64 b, b;
  setp.gt.u32 c, n, 5; mov.u32 r, n;
  {before}
  griddepcontrol.wait;
  BEHIND: st.global.u32 [b+64], r; st.global.u32 [b+128], n;
  ret;
}}
"""


@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_what_stands_before_the_wait_in_machine_code(target: str, tmp_path: Path) -> None:
    """Each instruction that touches memory, as the assembler writes it."""
    from triton import knobs

    ptxas = knobs.nvidia.ptxas_blackwell if target == "sm_100a" else knobs.nvidia.ptxas
    source, made = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    found = {}
    for before in _BEFORE:
        source.write_text(_PTX.format(target=target, before=before))
        subprocess.run([ptxas.path, f"-arch={target}", source, "-o", made], check=True)
        found[before] = compiler.read_code(made.read_bytes()).waits
    assert found == _BEFORE
    source.write_text(_PTX.format(target=target, before="").replace("griddepcontrol.wait;", ""))
    subprocess.run([ptxas.path, f"-arch={target}", source, "-o", made], check=True)
    assert compiler.read_code(made.read_bytes()).waits == ""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return succeed(_COMPILED, tmp_path_factory.mktemp("compiled"))


def test_compiled_for_three_architectures(compiled: Any) -> None:
    matrix = {(name, precision): resources["matrix"] for name, precision, resources, _, _ in compiled["made"]}
    assert matrix == {
        ("a100", "fp16"): "HMMA", ("a100", "fp32"): "FFMA",
        ("h100", "fp16"): "HGMMA", ("h100", "fp32"): "FFMA",
        ("b200", "fp16"): "UTCHMMA", ("b200", "fp32"): "FFMA",
    }  # fmt: skip
    for _, _, resources, faults, error in compiled["made"]:
        assert faults == [] and error == ""
        assert 16 <= resources["registers"] <= 255 and resources["threads"] >= 128 and resources["shared"] > 0


def test_instructions_agree_with_the_disassembler(compiled: Any) -> None:
    """The opcodes are NVIDIA's to change: its own disassembler says what they are called."""
    for disassembled, ours in compiled["names"]:
        assert ours == disassembled and "FFMA" in ours


def test_equal_keys_where_the_compiler_sees_no_difference(compiled: Any) -> None:
    first, more_images, fewer_channels, odd_channels = compiled["keys"]
    assert first == more_images == fewer_channels != odd_channels


def test_every_launch_of_a_case_is_compiled(compiled: Any) -> None:
    several = compiled["several"]
    assert several["kernels"] == [
        ["batch_norm_act._slice_moments", 0], ["batch_norm_act._merge_moments", 1], ["batch_norm_act._slice_sums", 0],
        ["batch_norm_act._merge_sums", 1], ["batch_norm_act._apply", 0],
    ]  # fmt: skip
    assert several["again"] and several["tasks"] == [0, 1]
    assert several["merging"] == ["FFMA", "", []]


def test_the_training_options_of_a_convolution_compile_as_well(compiled: Any) -> None:
    assert compiled["raw"] == [["_boxes", []], ["_gather", []]]


def test_a_failure_to_compile_is_a_fault(compiled: Any) -> None:
    (fault,) = compiled["odd"]
    assert fault.startswith("does not compile: ")


_COMMAND = """
import contextlib, io, json, sys
from pathlib import Path

def main():
    from resnet_fast.kernels import conv_bn_act as kernel
    from resnet_fast.tuning import compile as check, compiler, ops, shapes

    table = Path(sys.argv[1])
    problem = kernel.Problem(8, 14, 14, 64, 256, (1, 1), (1, 1), (0, 0), (1, 1), 1, "fp16", False)
    shapes.problems = lambda *given, **more: (ops.Case("conv_bn_act", problem, "relu"),)
    check.table_tasks = lambda gpu, folder: ({}, [])
    check.table_path = lambda: table

    def run(*arguments):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = check.main([*arguments, "--jobs", "1"])
        return status, printed.getvalue()

    answers = {"missing": run("--check", "--arch", "90")}  # in a worker process, as in earnest
    compiler.Compiler.run = lambda self, tasks: map(compiler.compile_task, tasks)  # quicker
    answers["written"] = run("--write")
    answers["equal"] = run("--check", "--arch", "90")
    text = table.read_text()
    row = next(line for line in text.splitlines() if ",sm_90," in line)
    cells = row.split(",")
    table.write_text(text.replace(row, ",".join([*cells[:5], "7", *cells[6:]])))
    answers["changed"] = run("--check", "--arch", "90")
    version = cells[0]
    table.write_text(text.replace(f"{version},sm_", "0.1,sm_"))
    answers["other version"] = run("--check", "--arch", "90")
    answers["one more version"] = run("--write", "--arch", "90")
    answers["versions"] = sorted({line.partition(",")[0] for line in table.read_text().splitlines()[2:]} - {version})
    table.write_text(text.replace(f"{version},sm_", "0.1,sm_"))
    kernel.heuristic = lambda problem, gpu: kernel.Config(256, 256, 64, 4, 2, False)
    answers["spill, other version"] = run("--check", "--arch", "90")
    print(json.dumps([answers, cells[5]]))

if __name__ == "__main__":
    main()
"""


_CACHE_KEYS = """
import importlib, json, pkgutil
from triton.runtime.jit import JITFunction
from resnet_fast import kernels
from resnet_fast.kernels import _launch

functions = {}
for module in pkgutil.iter_modules(kernels.__path__):
    for value in vars(importlib.import_module(f"resnet_fast.kernels.{module.name}")).values():
        if isinstance(value, JITFunction):
            functions[f"{value.__module__}.{value.__name__}"] = value

def keys(order):
    for function in functions.values():
        function.hash, function.used_global_vals = None, {}
    for name in order:
        _launch.settle(functions[name])
    return {name: functions[name].cache_key for name in sorted(functions)}

print(json.dumps([keys(functions), keys(reversed(functions))]))
"""


def test_a_kernels_key_in_the_cache_does_not_depend_on_what_was_compiled_before(tmp_path: Path) -> None:
    """Or another process, such as `make launches` after `make kernels`, would compile it anew."""
    forth, back = succeed(_CACHE_KEYS, tmp_path)
    assert len(forth) > 40 and forth == back


@pytest.mark.slow
def test_the_command_fails_on_a_planted_spill_and_on_a_changed_row(tmp_path: Path) -> None:
    """One launch in place of the networks', once absurdly large."""
    script = tmp_path / "planted.py"
    script.write_text(_COMMAND)
    table = tmp_path / "resources.csv"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, script, table], capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    answers, registers = json.loads(ran.stdout.splitlines()[-1])
    status, printed = answers["missing"]
    assert status == 1 and f"there is no {table}" in printed, printed
    status, printed = answers["written"]
    assert status == 0 and "3 rows written" in printed, printed
    status, printed = answers["equal"]
    assert status == 0 and "all well" in printed, printed
    status, printed = answers["changed"]
    assert status == 1 and f"registers 7 -> {registers}" in printed, printed
    status, printed = answers["other version"]
    assert status == 0 and "rows of sm_90 are not compared: the table has none of Triton" in printed, printed
    status, printed = answers["one more version"]
    assert status == 0 and "1 rows written" in printed and answers["versions"] == ["0.1"], printed
    status, printed = answers["spill, other version"]
    assert status == 1 and "WRONG sm_90 conv_bn_act" in printed and "spills registers" in printed, printed
