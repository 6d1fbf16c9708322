"""Random models: layers of some forty kinds, and a forward of random Python, compared with their snapshots.

    python -m tests.graph.random_models --count 20000 [--first 0] [--seconds 3600]

Each number is a model. Of one whose snapshot differs, number, source and difference are shown; the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.graph.selfcheck import rounded
from resnet_fast.graph.snapshot import PartlyOptimizedModule
from tests.networks import Lambda, conv_bn, leaves, randomise

# isort: split
from torchvision.ops import FrozenBatchNorm2d

C = 8  # channels of every value, whose height and width are the image's, so that any two can be added


class Doubling(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Plain(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class Residual(nn.Module):
    """A block as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(C, C, 3, 1, 1, bias=False), nn.BatchNorm2d(C), nn.ReLU(True)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, 1, 1, bias=False), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Conv2d(C, 2, 1), nn.ReLU(), nn.Conv2d(2, C, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(F.adaptive_avg_pool2d(x, 1))


class Counted(nn.Module):
    """Counts its calls in a buffer, and says so in its result."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


def _hooked() -> nn.Module:
    conv = nn.Conv2d(C, C, 1)
    conv.register_forward_hook(lambda module, args, result: result + args[0])
    return conv


def _replaced() -> nn.Module:
    conv = nn.Conv2d(C, C, 1)
    conv.forward = lambda x: F.conv2d(x, conv.weight.abs(), conv.bias)  # type: ignore[method-assign]
    return conv


def _pruned() -> nn.Module:
    with torch.no_grad():  # else deepcopy refuses its weight until the first forward
        return torch.nn.utils.prune.l1_unstructured(nn.Conv2d(C, C, 3, padding=1), "weight", 0.5)


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Conv2d(C, C, 3, padding=1, bias=False),
    "1x1": lambda: nn.Conv2d(C, C, 1),
    "depthwise": lambda: nn.Conv2d(C, C, 3, padding=1, groups=C),
    "grouped": lambda: nn.Conv2d(C, C, 3, padding=1, groups=2, bias=False),
    "dilated": lambda: nn.Conv2d(C, C, 3, padding=2, dilation=2),
    "circular": lambda: nn.Conv2d(C, C, 3, padding=1, padding_mode="circular"),
    "same": lambda: nn.Conv2d(C, C, (4, 3), padding="same"),
    "flat": lambda: nn.Conv2d(C, C, (1, 5), padding=(0, 2)),
    "transposed": lambda: nn.ConvTranspose2d(C, C, 3, padding=1),
    "doubling": lambda: Doubling(C, C, 1),
    "weight norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(C, C, 1)),
    "pruned": _pruned,
    "hooked": _hooked,
    "replaced": _replaced,
}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(C),
    "not affine": lambda: nn.BatchNorm2d(C, affine=False, eps=1e-3),
    "own statistics": lambda: nn.BatchNorm2d(C, track_running_stats=False),
    "frozen": lambda: FrozenBatchNorm2d(C),
    "subclass": lambda: Plain(C),
    "group norm": lambda: nn.GroupNorm(2, C),
    "instance norm": lambda: nn.InstanceNorm2d(C),
    "layer norm": lambda: Lambda(lambda self, x: self.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), n=nn.LayerNorm(C)),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "leaky": lambda: nn.LeakyReLU(0.1, inplace=True),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "prelu": lambda: nn.PReLU(C),
    "sigmoid": nn.Sigmoid,
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "dropout": lambda: nn.Dropout2d(0.3),
    "max pool": lambda: nn.MaxPool2d(3, 1, 1),
    "avg pool": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "gate": Gate,
    "residual": Residual,
    "sequence": lambda: nn.Sequential(*conv_bn(C), nn.ReLU(inplace=True)),
    "shuffle": lambda: nn.ChannelShuffle(2),
    "pixels": lambda: nn.Sequential(nn.Conv2d(C, 4 * C, 1), nn.PixelShuffle(2), nn.AvgPool2d(2)),
    "lines": lambda: Lambda(lambda self, x: self.c(x.flatten(2)).view_as(x), c=nn.Conv1d(C, C, 3, padding=1)),
    "counted": Counted,
}
KINDS = {"c": CONVOLUTIONS, "n": NORMS, "r": ACTIVATIONS, "o": OTHERS}

STATEMENTS = (
    # {y} becomes a new value; {a}, {b} are values; {c}, {n}, {r}, {o} are layers of the kinds above, {l} one of any
    # kind; {s} is a size, {f} a factor. Frequent statements are listed twice.
    "{y} = {l}({a})",
    "{y} = {l}({a})",
    "{y} = {n}({c}({a}))",
    "{y} = {r}({n}({c}({a})))",
    "{y} = {r}({n}({c}({a})) + {b})",
    "{y} = {c}({a})\n{y} += {b}\n{y} = F.relu({y}, inplace=True)",
    "{y} = {c}({a})\n{y} = {n}({y}).relu_()",
    "{y} = {c}({a})\nfor layer in ({n}, {r}):\n    {y} = layer({y})",
    "{y} = {a} + {b}",
    "{y} = torch.add({a}, {b}, alpha={f})",
    "{y} = {a} - {b} * {f}",
    "{y} = F.relu({a})",
    "{y} = {a}.relu_()",
    "{y} = {a}.clone()",
    "{y} = {a}.contiguous(memory_format=torch.channels_last)",
    "{a} += {b}\n{y} = {a}",
    "{y} = {a}.mul_({f})",
    "{y} = {a}.clamp(min=-1, max=None)",
    "{a}[:, ::2] = 0\n{y} = {a}",
    "{a}[:, 1] = {b}[:, 2]\n{y} = {a}",
    "{a}[:, :3].add_({f})\n{y} = {a}",
    "{y} = {a}\n{y}[0].zero_()",
    "view = {a}.view(len({a}), -1)\nview.mul_({f})\n{y} = view.view({a}.shape) + {a}",
    "{y} = {a}.transpose(2, 3).relu().transpose(2, 3)",
    "{y} = {a}.detach().add_({f})",
    "first, second = {a}.chunk(2, 1)\n{y} = torch.cat([second.relu(), first], 1)",
    "{y} = {c}(torch.cat([{a}, {b}], 1)[:, ::2])",
    "{y} = torch.stack([{a}, {b}]).amax(0)",
    "{y} = {a} * {b}.mean((2, 3), keepdim=True).sigmoid()",
    "{y} = {a} * {a}.size(-1) ** -0.5",
    "{y} = {a}.flatten(2).softmax(-1).view_as({a})",
    "{y} = F.interpolate({c}(F.avg_pool2d({a}, 2)), size={a}.shape[-2:])",
    "{y} = F.interpolate({c}({a}[..., ::2, ::2]), size=(x.size(2), x.size(3)), mode='bilinear')",
    "{y} = F.pad({a}, (1, 1, 1, 1))\n{y} = {c}({y})[..., 1:-1, 1:-1]",
    "{y} = {c}({a}) if {a}.shape[-1] > {s} else {a}",
    "{y} = {n}({c}({a})) if x.shape[2] == x.shape[3] else {c}({a})",
    "{y} = {r}({a}) if len(x) > 1 else {a}",
    "{y} = {c}({a}) if flag else {n}({a})",
    "if isinstance({l}, nn.Conv2d):\n    {y} = {r}({a})\nelse:\n    {y} = {a} * scale",
    "if {a}.mean() > {f}:\n    {y} = {r}({c}({a}))\nelse:\n    {y} = {a} * 2",
    "{y} = {a} * scale",
    "{y} = {a}\nfor _ in range(2):\n    {y} = {n}({c}({y}))",
    "{y} = torch.cat([{c}(image[None]) for image in {a}])",
    "{y} = {a}\nfor index in range({a}.shape[0]):\n    {y} = {y} + index",
    "{y} = {{'k': {a}, 'j': {b}}}['k' if x.dim() == 4 else 'j']",
    "{y} = (lambda v, layer={c}: layer(v))({a})",
    "{y} = [layer({a}) for layer in ({c}, {r})][-1]",
    "{y} = getattr(self, 'missing', {c})({a})",
    "try:\n    {y} = {c}({a}[:, :3])\nexcept RuntimeError:\n    {y} = {n}({a})",
    "with torch.no_grad():\n    {y} = {r}({c}({a}))",
    "with torch.autocast('cpu', enabled=False):\n    {y} = {n}({c}({a}))",
    "torch._assert({a}.dim() == 4, 'maps')\n{y} = {c}({a})",
    "batch, channels, height, width = {a}.shape\n{y} = {c}({a}).reshape(batch, channels, height, width)",
    "self.kept = {a}\n{y} = {c}(self.kept)",
    "{y} = {a}.new_tensor([{f}] * 8).view(8, 1, 1) + {a}",
    "{y} = {a} + torch.arange({a}.shape[-1]) / 8",
    "{y} = F.conv2d({a}, self.weight - self.weight.mean((1, 2, 3), keepdim=True), padding=1)",
    "{y} = F.batch_norm({a}, self.mean, self.var, training=False)",
    "{y} = {a}.half().float()",
    "{y} = {a}.double().mul({f}).to({a}.dtype)",
    "if extra is not None:\n    {a} = {a} + extra\n{y} = {a}",
    "@torch.no_grad()\ndef inner(v):\n    return {r}({c}(v))\n{y} = inner({a})",
    "if (height := x.shape[2]) % 2:\n    {y} = {c}({a})\nelse:\n    {y} = {a} + height",
)

RESULTS = (
    "{a}",
    "{a}",
    "({a}, {b})",
    "[{a}, {b}, {a}]",
    "{{'out': {a}, 'aux': {b}}}",
    "collections.OrderedDict(z={a}, y=[{b}])",
    "Pair({a}, {b})",
    "Output({a}, ({b},))",
    "{a}.mean((2, 3))",
    "({a}, x)",
    "({a}, None, 3, 'text')",
    "torch.aminmax({a}, dim=1)",
    "{a} if flag else {{'scores': {b}}}",
    "({a}, {a}.shape[-1])",
    "self.head({a}.mean((2, 3)))",
)


class Pair(NamedTuple):
    """A result in place of a tuple."""

    logits: Tensor
    features: Tensor


@dataclasses.dataclass
class Output:
    """A result as many libraries return."""

    logits: Tensor
    features: tuple[Tensor, ...] = ()


def model_of(draw: random.Random, most: int = 10) -> tuple[nn.Module, str]:
    """Return a random model in eval mode, and the source of its forward."""
    layers: dict[str, nn.Module] = {}
    values, body = ["x"], []

    def layer(kind: str) -> str:
        names = [name for name in layers if kind in (name[0], "l")]
        if names and draw.random() < 0.15:  # used a second time
            return f"self.{draw.choice(names)}"
        kind = draw.choice("ccnro") if kind == "l" else kind
        made = draw.choice(list(KINDS[kind].values()))()
        layers[f"{kind}{len(layers)}"] = made
        return f"self.{kind}{len(layers) - 1}"

    for step in range(draw.randint(1, most)):
        recent = values[-4:]
        a, b = draw.choice(recent), draw.choice(recent)
        template = draw.choice(STATEMENTS)
        names = {kind: layer(kind) for kind in "cnrol" if f"{{{kind}}}" in template}
        y = f"v{step}"
        filled = template.format(a=a, b=b, y=y, s=draw.choice((8, 11, 12)), f=draw.choice((0.5, 1.5, -0.25)), **names)
        body += filled.splitlines()
        values.append(y)
    result = draw.choice(RESULTS).format(a=values[-1], b=draw.choice(values[-4:]))
    source = "\n    ".join(["def forward(self, x, scale=1.5, flag=False, *, extra=None):", *body, f"return {result}"])
    space: dict[str, Any] = {}
    exec(source, {"torch": torch, "F": F, "nn": nn, "collections": collections, "Pair": Pair, "Output": Output}, space)
    model: nn.Module = type("Written", (nn.Module,), {"forward": space["forward"]})()
    for name, made in layers.items():
        model.add_module(name, made)
    model.register_buffer("mean", torch.linspace(-0.1, 0.1, C))
    model.register_buffer("var", torch.linspace(0.9, 1.1, C))
    model.weight = nn.Parameter(torch.randn(C, C, 3, 3) * 0.1)
    model.head = nn.Linear(C, 5)
    return randomise(model), source


def difference(model: nn.Module, draw: random.Random, check: bool) -> tuple[str, rf.graph.OptimizedModule | None]:
    """Return what differs between a model and its snapshot, "" if nothing does, and the snapshot.

    Both are called with images of several sizes, with flags and factors, each on a copy of the images. What they write
    into those must be the same, unless the report says that it is left out; results that are one tensor must be one. A
    call that fails must fail in both. Models in parts get no channels_last images: a part gives channels_last maps for
    them, which code that takes a ``view`` of circular padding's, always contiguous, does not expect.
    """
    example = torch.randn(draw.choice((1, 2)), C, 8, draw.choice((8, 12)))
    twin = copy.deepcopy(model)
    try:
        with torch.no_grad():
            copy.deepcopy(model)(example.clone())
    except Exception:
        return "", None  # no model at all
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = rf.optimize(model, example_inputs=example, check=check)
        writes = any("into the caller's tensor" in note for note in fast.report().notes)
        options: dict[str, Any]
        for shape in ((1, 8, 8), (2, 8, 12), (3, 11, 9)):
            for options in ({}, draw.choice(({"flag": True}, {"scale": 0.5}, {"extra": 1.0}))):
                x = torch.randn(shape[0], C, *shape[1:])
                if draw.random() < 0.3 and not isinstance(fast, PartlyOptimizedModule):
                    x = x.contiguous(memory_format=torch.channels_last)
                ours, theirs = (_outcome(each, x, options, writes) for each in (fast, twin))
                if _unlike(ours, theirs) and (
                    found := _unlike(ours, theirs, _roundings(twin, x, options, writes, theirs[1]))
                ):
                    return f"{found} for {list(x.shape)} and {options}", fast
    return "", fast


def _outcome(model: nn.Module, x: Tensor, options: dict[str, Any], writes: bool) -> tuple[Any, list[Tensor]]:
    """Return the result, or the class of the exception, its tensors, and the image unless ``writes``."""
    x = x.clone()
    try:
        with torch.no_grad():
            result = model(x, **options)
    except Exception as error:
        return type(error), [x]
    return result, [*leaves(result), *([] if writes else [x])]


def _roundings(
    model: nn.Module, x: Tensor, options: dict[str, Any], writes: bool, expected: list[Tensor]
) -> list[float]:
    """Return how far a model's own tensors change if the image is rounded otherwise: all there is of some, as of the
    mean of an instance norm in half precision."""
    furthest = [0.0] * len(expected)
    for other in rounded(x, torch.float32):
        for index, (a, b) in enumerate(zip(_outcome(model, other, options, writes)[1], expected, strict=False)):
            if a.shape == b.shape:
                furthest[index] = max(furthest[index], _apart(a, b))
    return furthest


def _apart(a: Tensor, b: Tensor) -> float:
    return (_finite(a) - _finite(b)).norm().item()


def _finite(value: Tensor) -> Tensor:
    return torch.where(value.isfinite(), value, 0).double()


def _unlike(
    ours: tuple[Any, list[Tensor]], theirs: tuple[Any, list[Tensor]], roundings: Sequence[float] | None = None
) -> str:
    """Return what is unlike in two outcomes; tensors may be four times as far apart as ``roundings`` says."""
    if isinstance(theirs[0], type) or isinstance(ours[0], type):
        return "" if ours[0] is theirs[0] else f"{ours[0]} in place of {theirs[0]}"
    structures = [torch.utils._pytree.tree_structure(result) for result, _ in (ours, theirs)]
    if type(ours[0]) is not type(theirs[0]) or (structures[0] != structures[1] and not isinstance(ours[0], Output)):
        return f"{structures[0]} in place of {structures[1]}"
    one = [[[a is b for a in tensors[:-1]] for b in tensors[:-1]] for _, tensors in (ours, theirs)]
    if any(
        theirs_is and not ours_is for rows in zip(*one, strict=True) for ours_is, theirs_is in zip(*rows, strict=True)
    ):
        return "results that are one tensor are several"
    for index, (a, b) in enumerate(zip(ours[1], theirs[1], strict=True)):
        if a.shape != b.shape or a.dtype is not b.dtype:
            return f"tensor {index}: {a.dtype} {list(a.shape)} in place of {b.dtype} {list(b.shape)}"
        if a.is_floating_point() and not torch.equal(a.isfinite(), b.isfinite()):
            return f"tensor {index}: other values are finite"
        length, own = _finite(b).norm().item(), 0.0 if roundings is None else roundings[index]
        if _apart(a, b) > max(1e-4 * (length + 1e-2), 4 * own):
            return f"tensor {index}: differs by {_apart(a, b) / (length + 1e-9):.1e}"
    return ""


def examine(number: int, most: int = 10) -> tuple[str, str, rf.graph.OptimizedModule | None]:
    """Return what differs for the model of that number, its source, and its snapshot."""
    draw = random.Random(number)
    torch.manual_seed(number)
    model, source = model_of(draw, most)
    try:
        found, fast = difference(model, draw, check=number % 4 == 0)
    except Exception:
        found, fast = traceback.format_exc(), None
    return found, source, fast


def main() -> None:
    """Examine models, and show those whose snapshots differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="number of models")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after that time")
    given = parser.parse_args()
    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    began = time.monotonic()
    for number in track(range(given.first, given.first + given.count), "models", disable=not sys.stderr.isatty()):
        found, source, fast = examine(number)
        if found:
            print(f"--- {number}\n{source}\n{found}", flush=True)
        name = "no model" if fast is None and not found else type(fast).__name__
        counts[f"{name}, {'different' if found else 'equal'}"] += 1
        if time.monotonic() - began > given.seconds:
            break
    print(*(f"{count} {name}" for name, count in sorted(counts.items())), sep="\n")
    sys.exit(any("different" in name for name in counts))


if __name__ == "__main__":
    main()
