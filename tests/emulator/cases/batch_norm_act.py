"""Cases of batch_norm_act's kernels: a training step and a frozen one through all four, in every precision.

The gradients' references take the ReLU's mask from our own output, so that a value which rounding puts on the other
side of zero is not a difference. Of one number the error rule is luck, so problems of few channels are several, whose
results are held to it together.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from resnet_fast._dtypes import DTYPES
from tests.emulator.cases._tensors import Results, around, case, framed
from tests.emulator.harness import Case

EPS, MOMENTUM = 1e-5, 0.1


@dataclass(frozen=True)
class Problem:
    """x is [rows, c], normal with ``mean`` and ``std``.

    ``frozen`` normalises by the running statistics; without ``affine`` there are no gamma and beta, without ``running``
    no running statistics. ``out`` names the tensor that the output overwrites. ``special`` puts NaN and infinities into
    that tensor; ``framed`` lays NaN around tensors of [rows, c], which then begin ``offset`` elements into their
    buffers.
    """

    rows: int
    c: int
    mean: float = 2.0
    std: float = 1.5
    relu: bool = True
    residual: bool = True
    frozen: bool = False
    affine: bool = True
    running: bool = True
    out: str = "out"
    special: str = ""
    framed: bool = False
    offset: int = 64


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


@functools.cache
def example(problem: Problem, precision: str, seed: int) -> dict[str, Tensor]:
    """Random tensors, whose sums are well away from 0: of one that is not, float32 leaves few digits by any method."""
    generator = torch.Generator().manual_seed(seed)
    rows, c = problem.rows, problem.c
    xhat = normal(generator, rows, c)
    images = {
        "x": xhat * problem.std + problem.mean,
        "residual": normal(generator, rows, c),
        "grad": normal(generator, rows, c) + xhat + 1,
    }
    if problem.special:  # not in every channel; the first row, which is the first slice's shift, has some
        values = images[problem.special].view(-1)
        for i, value in enumerate((float("nan"), float("inf"), -float("inf"), float("inf"), -0.0)):
            values[i * (values.numel() - 1) // 5] = value
    vectors = {
        "gamma": torch.rand(c, generator=generator) + 0.5,
        "beta": normal(generator, c),
        "running_mean": normal(generator, c),
        "running_var": torch.rand(c, generator=generator) + 0.5,
    }
    return {name: t.to(DTYPES[precision]) for name, t in images.items()} | vectors


def forward(problem: Problem, tensors: dict[str, Tensor], wide: bool) -> dict[str, Tensor]:
    """torch's layers in the tensors' dtypes, each rounding, or ``wide`` in float64."""
    t = {name: each.double() if wide else each.clone() for name, each in tensors.items()}
    statistics = (t["running_mean"], t["running_var"]) if problem.running or problem.frozen else (None, None)
    weights = (t["gamma"], t["beta"]) if problem.affine else (torch.ones_like(t["gamma"]), torch.zeros_like(t["beta"]))
    y, mean, invstd = torch.ops.aten.native_batch_norm(t["x"], *weights, *statistics, not problem.frozen, MOMENTUM, EPS)
    if problem.frozen:
        mean, invstd = t["running_mean"], 1 / (t["running_var"] + EPS).sqrt()
    if problem.residual:
        y = y + t["residual"]
    return {
        "mean": mean,
        "invstd": invstd,
        "running_mean": t["running_mean"],
        "running_var": t["running_var"],
        "out": y.relu() if problem.relu else y,
    }


def backward(problem: Problem, tensors: dict[str, Tensor], out: Tensor, wide: bool) -> dict[str, Tensor]:
    """torch's gradients for a ReLU that was open where ``out`` is not <= 0."""
    t = {name: each.double() if wide else each for name, each in tensors.items()}
    g = t["grad"].masked_fill(out <= 0, 0) if problem.relu else t["grad"]
    made = forward(problem, tensors, wide)
    gamma = t["gamma"] if problem.affine else torch.ones_like(t["gamma"])
    grad_x, grad_gamma, grad_beta = torch.ops.aten.native_batch_norm_backward(
        g, t["x"], gamma, t["running_mean"], t["running_var"], made["mean"], made["invstd"], not problem.frozen, EPS,
        [True, True, True],
    )  # fmt: skip
    return {"grad_x": grad_x, "grad_residual": g, "sum_grad": grad_beta, "sum_grad_xhat": grad_gamma}


def run(native: ModuleType, how: str, problem: Problem) -> Results:
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed in range(20, 20 + max(1, 16 // problem.c)):
        for name, *tensors in run_once(native, how, problem, example(problem, how, seed)):
            found.setdefault(name, []).append((tensors[0], tensors[1], tensors[2]))
    for name, each in found.items():
        ours, same_dtype, exact = (torch.cat(parts) for parts in zip(*each, strict=True))
        yield name, ours, same_dtype, exact


def run_once(native: ModuleType, precision: str, problem: Problem, tensors: dict[str, Tensor]) -> Results:
    same_dtype, exact = (forward(problem, tensors, wide) for wide in (False, True))
    rows, c, dtype = problem.rows, problem.c, DTYPES[precision]
    sizes = {"rows": rows, "c": c, "precision": precision, "stream": 0}

    def placed(t: Tensor) -> Tensor:  # a copy that ends its allocation, or lies in NaN
        return framed(t, problem.offset) if problem.framed and t.dim() == 2 else t.clone()

    def empty(*shape: int) -> Tensor:
        return placed(torch.full(shape, float("nan"), dtype=dtype if len(shape) == 2 else torch.float32))

    def workspace() -> Tensor:
        return torch.full((native.batch_norm_act_workspace(rows, c, precision),), 0xFF, dtype=torch.uint8)

    used = {name: placed(t) for name, t in tensors.items()}
    if problem.frozen:
        mean, invstd = used["running_mean"], same_dtype["invstd"]
    else:
        mean, invstd, memory = empty(c), empty(c), workspace()
        native.batch_norm_act_statistics(
            x=used["x"].data_ptr(),
            mean=mean.data_ptr(),
            invstd=invstd.data_ptr(),
            running_mean=used["running_mean"].data_ptr() if problem.running else 0,
            running_var=used["running_var"].data_ptr() if problem.running else 0,
            eps=EPS,
            momentum=MOMENTUM,
            workspace=memory.data_ptr(),
            **sizes,
        )
        ours = {"mean": mean, "invstd": invstd, "running_mean": used["running_mean"]}
        ours["running_var"] = used["running_var"]
        for name, t in ours.items():
            yield name, t, same_dtype[name], exact[name]

    x = used["x"].clone() if problem.out == "x" else used["x"]
    out = {"x": used["x"], "residual": used["residual"], "out": empty(rows, c)}[problem.out]
    gamma = used["gamma"].data_ptr() if problem.affine else 0
    native.batch_norm_act_apply(
        x=used["x"].data_ptr(),
        mean=mean.data_ptr(),
        invstd=invstd.data_ptr(),
        gamma=gamma,
        beta=used["beta"].data_ptr() if problem.affine else 0,
        residual=used["residual"].data_ptr() if problem.residual else 0,
        out=out.data_ptr(),
        relu=problem.relu,
        **sizes,
    )
    yield "out", out, same_dtype["out"], exact["out"]

    same_dtype, exact = (backward(problem, tensors, out, wide) for wide in (False, True))
    x = used["x"] if problem.out != "x" else placed(tensors["x"])
    sums = {"sum_grad": empty(c), "sum_grad_xhat": empty(c)}
    given = {
        "grad": used["grad"].data_ptr(),
        "x": x.data_ptr(),
        "output": out.data_ptr() if problem.relu else 0,
        "mean": mean.data_ptr(),
        "invstd": invstd.data_ptr(),
    }
    pointers = {name: t.data_ptr() for name, t in sums.items()}
    memory = workspace()
    native.batch_norm_act_reduce(**given, **pointers, workspace=memory.data_ptr(), **sizes)
    for name, t in sums.items():
        yield name, t, same_dtype[name], exact[name]

    if problem.frozen:
        pointers = dict.fromkeys(sums, 0)
    grads = {"grad_x": empty(rows, c), "grad_residual": empty(rows, c)}
    wanted = ("grad_x", "grad_residual") if problem.residual else ("grad_x",)
    both = {name: t.data_ptr() if name in wanted else 0 for name, t in grads.items()}
    native.batch_norm_act_backward(**given, gamma=gamma, **pointers, **both, **sizes)
    for name in wanted:
        yield name, grads[name], same_dtype[name], exact[name]
    if problem.residual:  # alone
        alone = empty(rows, c)
        none = {"grad_x": 0, "grad_residual": alone.data_ptr()}
        native.batch_norm_act_backward(**given, gamma=gamma, **pointers, **none, **sizes)
        yield "grad_residual alone", alone, same_dtype["grad_residual"], exact["grad_residual"]
    if problem.framed:
        for name, t in {"out": out, **{name: grads[name] for name in wanted}}.items():
            yield from around(name, t)


def nothing(native: ModuleType) -> Results:
    """No channels: no launch, those pointers are none. No rows, which torch refuses: what batch_norm_act.cu says."""
    assert native.batch_norm_act_workspace(5, 0, "fp16") == native.batch_norm_act_workspace(0, 5, "fp16") == 0
    statistics = {"x": 0, "running_mean": 0, "running_var": 0, "eps": EPS, "momentum": MOMENTUM, "workspace": 0}
    apply = {"x": 0, "gamma": 0, "beta": 0, "residual": 0, "out": 0, "relu": True}
    given = {"grad": 0, "x": 0, "output": 0}
    results = {name: torch.zeros(5) for name in ("mean", "invstd", "sum_grad", "sum_grad_xhat")}
    zeros, ones = torch.zeros(5), torch.ones(5)
    expected = {"mean": float("nan"), "invstd": float("nan"), "sum_grad": 0.0, "sum_grad_xhat": 0.0}
    for c in (0, 5):
        vectors = {name: t.data_ptr() if c else 0 for name, t in results.items()}
        mean = {name: vectors[name] for name in ("mean", "invstd")}
        sums = {name: vectors[name] for name in ("sum_grad", "sum_grad_xhat")}
        sizes = {"rows": 0 if c else 7, "c": c, "precision": "fp16", "stream": 0}
        native.batch_norm_act_statistics(**statistics, **mean, **sizes)
        native.batch_norm_act_apply(**apply, **mean, **sizes)
        finite = {"mean": zeros.data_ptr(), "invstd": ones.data_ptr()} if c else mean
        native.batch_norm_act_reduce(**given, **finite, **sums, workspace=0, **sizes)
        native.batch_norm_act_backward(**given, **mean, gamma=0, **sums, grad_x=0, grad_residual=0, **sizes)
    for name, t in results.items():
        want = torch.full((5,), expected[name])
        yield name, t, want, want.double()


# Of 256 threads, 2 to 256 share a channel; a slice has 32 rows until there are 1056 of them.
GEOMETRY = {
    "1 channel": Problem(77, 1, framed=True, offset=1),
    "3 channels": Problem(65, 3, framed=True, offset=5),
    "7 channels": Problem(101, 7, residual=False),
    "17 channels": Problem(33, 17, framed=True, offset=3),
    "8 channels": Problem(300, 8, framed=True),
    "24 channels": Problem(49, 24, relu=False),
    "64 channels": Problem(130, 64, residual=False, framed=True),
    "64 channels, misaligned": Problem(70, 64, framed=True, offset=63),
    "several columns": Problem(37, 264, framed=True),
    "several columns of odd ones": Problem(34, 67, framed=True, offset=1),
    "1 row": Problem(1, 24),
    "1 row, odd": Problem(1, 5),
    "2 rows": Problem(2, 72),
    "no relu": Problem(49, 40, relu=False, residual=False),
    "no relu, odd": Problem(49, 5, relu=False),
    "not affine": Problem(96, 16, affine=False),
    "not affine, odd": Problem(96, 9, affine=False, running=False),
    "no running statistics": Problem(50, 32, running=False),
    "out is x": Problem(90, 16, out="x"),
    "out is x, odd, no residual": Problem(90, 13, out="x", residual=False),
    "out is residual": Problem(90, 24, out="residual"),
    "mean 100": Problem(400, 16, mean=100.0, std=0.01, relu=False, residual=False),
    "mean 1000 deviations": Problem(400, 16, mean=1000.0, std=1.0, residual=False),
    "mean 1000 deviations, odd": Problem(230, 5, mean=-1000.0, std=1.0),
    "frozen": Problem(61, 48, frozen=True, framed=True),
    "frozen, odd": Problem(61, 11, frozen=True, framed=True, offset=7),
    "frozen, not affine, no relu": Problem(40, 16, frozen=True, affine=False, relu=False),
    "frozen, out is x": Problem(40, 7, frozen=True, residual=False, relu=False, out="x"),
}
SPECIAL = {
    "NaN in x": Problem(70, 40, special="x"),
    "NaN in x, odd": Problem(70, 31, special="x", residual=False),
    "NaN in residual": Problem(45, 24, special="residual"),
    "NaN in grad": Problem(45, 24, special="grad", relu=False),
    "NaN in x, frozen": Problem(45, 24, special="x", frozen=True),
    "NaN in grad, frozen": Problem(45, 9, special="grad", frozen=True),
}


def cases() -> list[Case]:
    made = [Case("nothing", nothing), case(run, "tf32", "tf32", Problem(40, 12))]
    # Of the results of slices a merging thread takes 8 at once, its block 256: the same code in every precision.
    made.append(case(run, "many slices", "fp16", Problem(32 * 300 - 5, 32, residual=False)))
    for precision in ("fp16", "bf16", "fp32"):
        made += [case(run, name, precision, problem) for name, problem in (GEOMETRY | SPECIAL).items()]
    return made
