"""Each layer of a network as one launch: its floor, Triton's kernel, CUDA's, and torch's way by cuDNN, timed alike.

A training BatchNorm with what is fused to it is two launches (``Pair``), forward and backward each.

No GPU is touched here but through the runner (``resnet_fast.tuning.cuda.CudaRunner``), which judges every answer first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.tuning import ops
from resnet_fast.tuning.ops import Case

CONTESTANTS = ("triton", "cuda", "cudnn")

#: What makes a call that computes a case on given tensors and returns its answer, all that is folded folded before.
Way = Callable[[Case, Mapping[str, Any]], Callable[[], Tensor]]


@dataclass(frozen=True)
class Pair:
    """The two passes of a BatchNorm + residual + ReLU in training, forward or backward.

    Attributes:
        first, second: "statistics" and "apply", or "reduce" and "backward". batch: images.
    """

    first: Case
    second: Case
    batch: int

    @property
    def form(self) -> str:
        return "forward" if self.second.problem.step == "apply" else "backward"

    @property
    def key(self) -> str:
        problem = self.second.problem
        relu = self.second.form == "relu" if self.form == "forward" else problem.relu
        extras = f"{' relu' if relu else ''}{' residual' if problem.residual else ''}"
        return f"{problem.precision} {problem.rows}x{problem.c}{extras}"

    def __str__(self) -> str:
        return f"{self.first.op} ({self.form}) {self.key}"


def pairs(cases: Iterable[Case], batch: int) -> tuple[Pair, ...]:
    """The forward and the backward of every BatchNorm among the cases of a network, each once."""
    norms = [case for case in cases if case.op == "batch_norm_act"]
    firsts = {
        (case.problem.step, case.problem.rows, case.problem.c, case.problem.relu): case
        for case in norms
        if case.problem.step in ("statistics", "reduce")
    }
    found: dict[Pair, None] = {}
    for case in norms:
        of, step = case.problem, {"apply": "statistics", "backward": "reduce"}.get(case.problem.step)
        if step is not None:
            found[Pair(firsts[step, of.rows, of.c, of.relu], case, batch)] = None
    return tuple(found)


def contested(cases: Iterable[Case]) -> tuple[Case, ...]:
    """Those that CUDA and cuDNN have something against, each problem once; gradients and blocks are no layers."""
    found: dict[tuple[str, str], Case] = {}
    for case in cases:
        if case.op in WAYS and case.form != "backward":
            found.setdefault((case.op, case.problem.key()), case)
    return tuple(found.values())


def measure(
    case: Case | Pair, gpu: Any, runner: Any, ways: Mapping[str, Way] | None = None, without_cuda: str = "not measured"
) -> dict[str, Any]:
    """The row of a case: its floor, and for each contestant ``us`` and what ran, or what is ``wrong``, or why ``none``
    ran. Triton's choice is the one in force: the table's, else the heuristic's. CUDA's kernels are not launched, for
    ``without_cuda``; ``measure_cuda`` does it."""
    if isinstance(case, Pair):
        return _measure_pair(case, gpu, runner, without_cuda)
    work = ops.get(case.op).work(case.problem)
    row: dict[str, Any] = {
        "op": case.op, "form": case.form, "problem": case.problem.key(),
        "floor_us": 1e6 * work.floor(gpu, case.problem.precision), "bytes": work.bytes, "flops": work.flops,
    }  # fmt: skip
    times = {"triton": _ours(case, gpu, runner), "cuda": {"none": without_cuda}}
    runner.load(case)
    return row | {"times": times | {"cudnn": _torchs(case, runner, (WAYS if ways is None else ways)[case.op])}}


def _measure_pair(pair: Pair, gpu: Any, runner: Any, without_cuda: str) -> dict[str, Any]:
    both = [ops.get(case.op).work(case.problem) for case in (pair.first, pair.second)]
    floors = [work.floor(gpu, pair.second.problem.precision) for work in both]
    times = {"triton": _together(_ours(case, gpu, runner) for case in (pair.first, pair.second))}
    runner.load(pair.second)
    try:
        with _trying():
            torchs = {"us": 1e6 * runner.seconds_of(lambda tensors: _norm(pair, tensors))}
    except RuntimeError as failure:
        torchs = {"none": " ".join(str(failure).split())[:200]}
    return {
        "op": pair.first.op, "form": pair.form, "problem": pair.key, "floor_us": 1e6 * sum(floors),
        "bytes": sum(work.bytes for work in both), "flops": sum(work.flops for work in both),
        "times": times | {"cuda": {"none": without_cuda}, "cudnn": torchs},
    }  # fmt: skip


def _together(times: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of two launches one behind the other: the sum, or what one of them has in its place."""
    first, second = times
    for one in (first, second):
        if "us" not in one:
            return one
    return {"us": first["us"] + second["us"], "choice": {"first": first["choice"], "second": second["choice"]}}


def measure_cuda(case: Case | Pair, gpu: Any, runner: Any) -> dict[str, Any]:
    """What CUDA's kernel takes for a case of Triton's, by the choice in force, as in a row of ``measure``."""
    if isinstance(case, Pair):
        return _together([measure_cuda(each, gpu, runner) for each in (case.first, case.second)])
    twins = ops.with_cuda([case], gpu)[1:]
    return _ours(twins[0], gpu, runner) if twins else {"none": "no CUDA kernel computes it here"}


def _torchs(case: Case, runner: Any, way: Way) -> dict[str, Any]:
    """The same of torch's way for the loaded case, by the algorithms that cuDNN finds fastest when it tries them."""
    refused: list[RuntimeError] = []

    def run(tensors: Mapping[str, Any]) -> None:
        try:
            answer = way(case, tensors)()
        except RuntimeError as failure:  # a torch without cuDNN, or cuDNN without such a kernel: no wrong answer
            refused.append(failure)
            raise
        tensors["out"].copy_(answer)

    with _trying():
        wrong = runner.wrong_by(run)
        if not wrong:
            try:
                return {"us": 1e6 * runner.seconds_of(lambda given: way(case, given))}
            except RuntimeError as failure:
                refused.append(failure)
    return {"none": " ".join(str(refused[0]).split())[:200]} if refused else {"wrong": wrong}


@contextmanager
def _trying() -> Iterator[None]:
    """cuDNN times its algorithms at the first call of a shape, instead of guessing by heuristics."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _ours(case: Case, gpu: Any, runner: Any) -> dict[str, Any]:
    kernel = ops.get(case.op).kernel
    config = kernel.choose(case.problem, gpu)
    runner.load(case)
    unusable = runner.unusable([config])
    wrong = unusable.get(config, "") or runner.wrong(config)
    return {"wrong": wrong} if wrong else {"us": 1e6 * runner.seconds(config), "choice": kernel.as_fields(config)}


# --- torch's ways


def _conv(case: Case, tensors: Mapping[str, Any]) -> Callable[[], Tensor]:
    """cuDNN's convolution with bias, residual and ReLU in its epilogue; the scale is folded into the weight."""
    problem, x, residual = case.problem, tensors["x"], tensors["residual"]
    weight, bias = _folded(tensors)
    how = (problem.stride, problem.padding, problem.dilation, problem.groups)
    if case.form == "none":
        plain = torch.conv2d
        return lambda: plain(x, weight, bias, *how) if residual is None else plain(x, weight, bias, *how) + residual
    if residual is not None:
        return lambda: torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *how)
    return lambda: torch.cudnn_convolution_relu(x, weight, bias, *how)


def _stem(case: Case, tensors: Mapping[str, Any]) -> Callable[[], Tensor]:
    """The same, and torch's max-pool behind it; bytes are normalised before."""
    x, normalise, ceil_mode = tensors["x"], tensors["normalise"], case.problem.ceil_mode
    weight, bias = _folded(tensors)
    weight = weight.contiguous(memory_format=torch.channels_last)
    if case.form == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        image = x
        if normalise is not None:
            image = (x * normalise[0] + normalise[1]).to(weight.dtype).permute(0, 3, 1, 2)
        image = image.contiguous(memory_format=torch.channels_last)
        y = torch.cudnn_convolution_relu(image, weight, bias, (2, 2), (3, 3), (1, 1), 1)
        return F.max_pool2d(y, 3, 2, 0 if ceil_mode else 1, ceil_mode=ceil_mode)

    return run


def _folded(tensors: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    weight = tensors["weight"]
    scaled = weight.float() * tensors["scale"].view(-1, 1, 1, 1)
    return scaled.to(weight.dtype).contiguous(memory_format=torch.channels_last), tensors["shift"].to(weight.dtype)


def _head(case: Case, tensors: Mapping[str, Any]) -> Callable[[], Tensor]:
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    return lambda: F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias)


def _add(case: Case, tensors: Mapping[str, Any]) -> Callable[[], Tensor]:
    x, y = tensors["x"], tensors["y"]
    return lambda: torch.add(x, y).relu_()


def _norm(pair: Pair, tensors: Mapping[str, Any]) -> Callable[[], object]:
    """torch's BatchNorm by the kernels that it chooses itself, then the addition and the ReLU in place; backward the
    ReLU's gradient, which is the residual's too, then BatchNorm's. On the tensors of the second pass; not judged."""
    problem, x = pair.second.problem, tensors["x"]
    side = math.isqrt(problem.rows // pair.batch)
    if side * side * pair.batch != problem.rows:
        raise ValueError(f"{pair}: {problem.rows} rows are no {pair.batch} square images")

    def image(matrix: Tensor) -> Tensor:
        return matrix.view(pair.batch, side, side, problem.c).permute(0, 3, 1, 2)

    gamma, beta = tensors["gamma"], tensors.get("beta")
    running = torch.zeros_like(gamma), torch.ones_like(gamma)
    norm, norm_backward = torch._batch_norm_impl_index, torch.ops.aten._batch_norm_impl_index_backward.default
    if pair.form == "forward":
        residual = tensors["residual"]

        def forward() -> Tensor:
            y: Tensor = norm(image(x), gamma, beta, *running, True, 0.1, 1e-5, True)[0]
            y = y if residual is None else y.add_(image(residual))
            return y.relu_() if pair.second.form == "relu" else y

        return forward
    beta = torch.zeros_like(gamma)
    _, mean, invstd, reserve, index = norm(image(x), gamma, beta, *running, True, 0.1, 1e-5, True)
    grad, output = tensors["grad"], tensors["y"]

    def backward() -> object:
        g = grad if output is None else torch.ops.aten.threshold_backward.default(grad, output, 0)
        return norm_backward(
            index, image(x), image(g), gamma, *running, mean, invstd, True, 1e-5, [True, True, True], reserve
        )

    return backward


WAYS: dict[str, Way] = {"stem": _stem, "conv_bn_act": _conv, "head": _head, "add_act": _add}


# --- what is shown


def line(row: Mapping[str, Any]) -> str:
    """A row in a line: microseconds, and how many times its floor."""
    parts = [f"floor {row['floor_us']:.2f} us"]
    for who in CONTESTANTS:
        one = row["times"][who]
        if "us" in one:
            parts.append(f"{who} {one['us']:.2f} ({one['us'] / row['floor_us']:.2f}x)")
        else:
            parts.append(f"{who} WRONG: {one['wrong']}" if "wrong" in one else f"{who}: {one['none']}")
    return ", ".join(parts)


def table(data: Mapping[str, Any]) -> str:
    """The result file as Markdown, a table for each batch, with what all layers take that everybody computes."""
    machine = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name in _VERSIONS)
    lines = [f"# ResNet-50, layer by layer: {machine['gpu']}", ""]
    lines += [
        f"Driver {machine['driver']}, nvcc {machine['nvcc'] or 'none'}, {versions}.",
        "Microseconds of one launch, by replays of a CUDA graph over inputs past the level-2 cache.",
        "cuDNN's algorithms are the fastest of those it tries (torch.backends.cudnn.benchmark is True).",
        "batch_norm_act is two launches, in the last column torch's BatchNorm, addition and ReLU.",
        "The commit of each row is in layers.json.",
        "",
    ]
    rows = list(data["rows"].values())
    for batch in dict.fromkeys(row["batch"] for row in rows):
        mine = [row for row in rows if row["batch"] == batch]
        lines += [f"## Batch {batch}", "", "| layer | floor | Triton | CUDA | cuDNN (torch) | CUDA's kernel |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        sums = dict.fromkeys(("floor", *CONTESTANTS), 0.0)
        for row in mine:
            times = [row["times"][who].get("us", math.nan) for who in CONTESTANTS]
            best = min((one for one in times if one == one), default=math.nan)
            shown = [
                f"**{one:.2f}**" if one == best else f"{one:.2f}" if one == one else _why(row["times"][who])
                for who, one in zip(CONTESTANTS, times, strict=True)
            ]
            kernel = row["times"]["cuda"].get("choice", {}).get("kernel", "")
            name = f"{row['op']} {row['problem']}{' (' + row['form'] + ')' if row['form'] else ''}"
            lines.append(f"| {name} | {row['floor_us']:.2f} | {' | '.join(shown)} | {kernel} |")
            if all(one == one for one in times):
                for who, one in zip(sums, (row["floor_us"], *times), strict=True):
                    sums[who] += one
        lines += [f"| sum where all three run | {' | '.join(f'{one:.2f}' for one in sums.values())} | |", ""]
        lines += _reasons(mine)
    return "\n".join(lines)


_NAMES = {"triton": "Triton", "cuda": "CUDA", "cudnn": "cuDNN"}
_VERSIONS = ("torch", "triton", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")


def _reasons(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why cells have no time, each reason once, as a list behind the table."""
    counts: dict[str, int] = {}
    for row in rows:
        for who in CONTESTANTS:
            one = row["times"][who]
            if "us" not in one:
                text = f"{_NAMES[who]}, {_why(one)}: {one.get('wrong') or one['none']}"
                counts[text] = counts.get(text, 0) + 1
    return [*(f"- {text} ({count} of the layers)" for text, count in counts.items()), *([""] if counts else [])]


def _why(one: Mapping[str, Any]) -> str:
    return "wrong" if "wrong" in one else "none"
