"""The table of ``make gpu``: its stages, most important first, and the commands that each of them runs.

The first command says whether the kernels are right and how fast they are; what is worth a second one (``--second``)
follows, and what runs only if it is asked for by name.

Every command is one that users have too. Standard library only.
"""

from __future__ import annotations

import importlib.util
import shlex
from dataclasses import dataclass

CLI = ("typer", "rich")
"""What the command line of the package needs."""
ALL = ("fp16", "bf16", "tf32", "fp32")


@dataclass(frozen=True)
class Command:
    """One process of a stage.

    Attributes:
        text: arguments of Python; {to} stands for the device, the folder of the results and the time, {out} for that
            folder alone, {dtypes} for those of ``precisions`` that may be timed. Without any of them the command is
            left out.
        share: of what is left of the stage's time, what this one may take. row: its name in ``tests.json``.
        needs: packages without which it is left out.
    """

    text: str
    precisions: tuple[str, ...] = ALL
    share: float = 1.0
    row: str = ""
    needs: tuple[str, ...] = ()

    def lacking(self) -> str:
        """Return what it needs and this Python has not, in words; empty if nothing."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"there is no {' and no '.join(absent)} here" if absent else ""


@dataclass(frozen=True)
class Stage:
    """One step. ``most`` and ``least``: shares of the budget, what it may take and what is kept free for it while
    earlier ones run. ``timed``: it measures time, which makes no sense for wrong answers. ``judges``: the precisions
    that it finds right or not; before that none of them is timed. ``when``: "first", in the command without options,
    "second", with ``--second``, or "asked", if ``--stages`` names it."""

    name: str
    what: str
    most: float
    least: float
    commands: tuple[Command, ...] = ()
    timed: bool = False
    judges: tuple[str, ...] = ()
    when: str = "first"


def pytest_command(row: str, marks: str, share: float = 1.0) -> Command:
    selected = f"-m {shlex.quote(marks)} tests --ignore=tests/tools --ignore=tests/emulator --ignore=tests/packaging"
    return Command(f"-m pytest -v --tb=short -p no:cacheprovider --maxfail=25 {selected}", share=share, row=row)


def _models(cases: str, peers: str) -> tuple[Command, ...]:
    text = f"-m benchmarks.bench_models --cases {cases} --peers {peers} --case-seconds 1.5 --dtype {{dtypes}} {{to}}"
    return (Command(text, ALL if cases == "others" else ("fp16",)),)


def _tune(*batches: int) -> tuple[Command, ...]:
    """A process for each batch, so that a CUDA kernel which faults costs no other's times."""
    text = "-m resnet_fast tune --batch-size {} --dtype {{dtypes}} --seconds {{seconds}}"
    shares = [1 / (len(batches) - done) for done in range(len(batches))]
    return tuple(
        Command(text.format(batch), ("fp16",), part, needs=CLI) for batch, part in zip(batches, shares, strict=True)
    )


_OPS = "-m benchmarks.bench_ops --batch {batches} --dtype {{dtypes}} {{to}}"
_SMOKE = "-m benchmarks.bench_ops --check --repeats 50 --dtype {dtypes} {to}"
_LAYERS = (
    "-m resnet_fast roofline --arch resnet50 --batch-size {batch} --dtype float16 "
    "--json {{out}}/layers-resnet50-fp16-b{batch}.json"
)
_HALF, _FULL = ("fp16", "bf16"), ("tf32", "fp32")
STAGES = (
    Stage("native", "builds resnet_fast._C into this checkout, for this machine's GPUs", 0.30, 0.05, when="asked"),
    Stage("smoke", "every op in half precision at small shapes: against float64, and 50 times with equal bits", 0.12,
          0.03, (Command(_SMOKE, _HALF),), judges=_HALF),
    Stage("models", "ResNet-50 fp16, batches 128 1 32 256 8, against torch eager", 0.16, 0.05,
          _models("first", "recorded,live,eager"), timed=True),
    Stage("layers", "each launch of ResNet-50 fp16 in a forward, batches 128 and 1, beside its floor", 0.16, 0.04,
          tuple(Command(_LAYERS.format(batch=batch), ("fp16",), share, needs=CLI)
                for batch, share in ((128, 0.5), (1, 1.0))), timed=True),
    Stage("cuda", "the CUDA kernels: ops against float64 at small shapes", 0.06, 0.02, (
        Command("-m benchmarks.bench_ops --check --backend cuda --workers 1 {to}"),
    )),
    Stage("kernels", "each op at ResNet-50's shapes: its floor, Triton, CUDA, cuDNN, plain torch", 0.14,
          0.04, (Command(_OPS.format(batches="128,1"), _HALF, share=2 / 3),
                 Command(_OPS.format(batches="128,1") + " --peers cuda", _HALF)), timed=True),
    Stage("tests", "pytest: the tests of the kernels and those marked gpu", 0.18, 0.05, (
        pytest_command("kernels", "triton", 0.6), pytest_command("cuda", "cuda", 0.5),
        pytest_command("marked gpu", "gpu and not triton and not cuda"),
    )),
    Stage("cudnn", "ResNet-50 fp16 against the cuDNN graph API", 0.06, 0.02, _models("first", "eager,cudnn"),
          timed=True),
    Stage("compiled", "ResNet-50 fp16 against torch.compile max-autotune, frozen, with its own graphs", 0.24,
          0.05, _models("first", "eager,frozen,compile,cudagraphs"), timed=True),
    Stage("smoke32", "the same as smoke in tf32 and float32", 0.06, 0.02, (Command(_SMOKE, _FULL),), judges=_FULL),
    Stage("accuracy", "whole networks against float64", 0.08, 0.02, (
        Command("-m benchmarks.bench_models --check {to}"),
    )),
    Stage("counters", "Nsight Compute on the five launches that lose most to their floors", 0.08, 0.02, (
        Command("-m benchmarks.counters {to}", ("fp16",)),
    ), timed=True),
    Stage("tune", "launch choices for ResNet-50 fp16, Triton's and CUDA's, with what time is left", 0.30, 0.0,
          _tune(128, 1), timed=True),
    Stage("sanitizer", "compute-sanitizer memcheck, racecheck and synccheck on the ops", 0.40, 0.10, when="second"),
    Stage("networks", "ResNet-152 and 18, bf16, tf32, fp32, against torch eager", 0.25, 0.05,
          _models("others", "eager"), timed=True, when="second"),
    Stage("training", "ResNet-50 training steps in bf16 against torch eager and torch.compile", 0.30, 0.05, (
        Command("-m benchmarks.bench_training --dtype {dtypes} --case-seconds 4 {to}", ("bf16",)),
    ), timed=True, when="second"),
    Stage("jax", "ResNet-50 fp16 against JAX/XLA", 0.10, 0.02, _models("first", "eager,jax"), timed=True,
          when="second"),
    Stage("tune-training", "launch choices for ResNet-50's training in bf16", 0.20, 0.0, (
        Command("-m resnet_fast tune --batch-size 128 --dtype {dtypes} --seconds {seconds} --op batch_norm_act "
                "--op conv_statistics", ("bf16",), needs=CLI),
    ), timed=True, when="second"),
)  # fmt: skip
WARM = Stage("warm", "compiles the networks' kernels in the background", 0.30, 0.0, (
    Command("-m benchmarks.bench_models --warm --dtype {dtypes} {to}"),
))  # fmt: skip
"""Runs beside the stages before the first timed one, and is over before it."""


def limit(stage: Stage, later: tuple[Stage, ...], budget: float, left: float) -> float:
    """Seconds that ``stage`` may take with ``left`` seconds to go: what is kept free for ``later`` is not its own."""
    return max(0.0, min(stage.most * budget, left - sum(other.least for other in later) * budget))


_SMALL = "--device cpu --arch resnet18 --image-size 64 --dtype fp32 --batch 4 --out {out}"
REHEARSED = (
    Command("-c \"import resnet_fast.kernels; print('  resnet_fast', resnet_fast.__file__)\"", row="import"),
    Command(pytest_command("", "triton or cuda or gpu").text.replace(" -v ", " --collect-only -q "), row="collect"),
    Command("-m benchmarks.bench_ops --check --repeats 3 --device cpu --workers 1 --dtype fp32 --out {out}",
            row="smoke"),
    Command(f"-m benchmarks.bench_models --check {_SMALL}", row="accuracy"),
    Command(f"-m benchmarks.bench_models --peers eager --case-seconds 0.1 {_SMALL}", row="models", needs=CLI),
    Command("-m benchmarks.bench_ops --device cpu --op add_act --dtype fp32 --batch 1 --out {out}", row="kernels"),
    Command("-m resnet_fast tune --dry-run --gpu h100", row="tune", needs=CLI),
    Command("-m resnet_fast tune --dry-run --gpu h100 --dtype bfloat16 --op batch_norm_act --op conv_statistics",
            row="tune for training", needs=CLI),
    Command(f"-m benchmarks.bench_training --peers eager,ours --case-seconds 0.1 {_SMALL}", row="training"),
    Command("-m resnet_fast.tuning.compile --arch 90 --op add_act", row="compile"),
    Command("-m resnet_fast roofline --gpu h100 --batch-size 128 --dtype float16", row="plan", needs=CLI),
    Command("-m resnet_fast roofline --gpu h200 --estimate", row="estimate", needs=CLI),
    Command("-m benchmarks.counters --device cpu --out {out}", row="counters"),
)  # fmt: skip
"""The same entry points on a CPU: the answers, small networks, what would be tuned, some kernels as machine code."""
