"""conv_bn_act on each kind of kernel, of Triton's both forms: what is the same for all; values, layouts, gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fast as rf
from resnet_fast import backends, ops
from tests.cuda_device import doubled
from tests.kernel_kinds import DTYPES, KINDS, LAYOUTS, Kind
from tests.numerics import assert_obeys_error_rule
from tests.ops.test_conv_bn_act import plain, problem
from tests.triton_device import FORMS
from tests.triton_device import kernels as of_triton

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OP = torch.ops.resnet_fast.conv_bn_act.default


@pytest.fixture(
    params=[
        *(pytest.param(form, marks=pytest.mark.triton) for form in FORMS),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ]
)
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    """A kind of kernels, of Triton with launches as for a GPU with a copy engine and one without."""
    found = KINDS.get(request.param) or replace(KINDS["triton"], kernels=functools.partial(of_triton, request.param))
    with found.kernels():
        yield found


def narrow(kind: Kind, arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments in ``dtype``, scale and shift in float32, and x and weight as the kernels multiply them."""
    cast = {
        name: t if t is None else t.float() if name in ("scale", "shift") else t.to(dtype)
        for name, t in arguments.items()
    }
    return kind.as_multiplied(cast, "x", "weight")


def judge(ours: Tensor, given: dict[str, Any], **options: Any) -> Tensor:
    """Hold a result to the error rule, beside torch's layers on the CPU."""
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert_obeys_error_rule(ours.cpu(), plain(**given, **options), plain(**doubled(given), **options), str(options))
    return ours.cpu()


def check(
    kind: Kind,
    arguments: dict[str, Any],
    dtype: torch.dtype,
    launched: list[str],
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    **options: Any,
) -> Tensor:
    """The op on a kernel and torch's layers in ``dtype`` on the same rounded inputs, under the error rule.

    ``layout`` moves images and weights about in memory, and changes no value.
    """
    given = narrow(kind, arguments, dtype)
    there = {name: layout(t) if t is not None and t.dim() == 4 else t for name, t in kind.put(given).items()}
    assert all(
        t is None or torch.equal(t.nan_to_num(), given[name].nan_to_num().to(kind.device)) for name, t in there.items()
    )
    launched.clear()
    ours = rf.ops.conv_bn_act(**there, **options)
    assert len(launched) == (ours.numel() > 0) and ours.device.type == kind.device
    return judge(ours, given, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("c", [8, 17, 32])
def test_batches(kind: Kind, dtype: torch.dtype, n: int, c: int, launched: list[str]) -> None:
    given = problem(n, c, 10, 6, 40, 3, residual=(5, 3))
    assert check(kind, given, dtype, launched, stride=2, padding=1).shape == (n, 40, 5, 3)


def test_windows_that_are_not_square(kind: Kind, launched: list[str]) -> None:
    given = problem(1, 8, 6, 9, 8, 1)
    given["weight"] = torch.randn(8, 8, 3, 5, dtype=torch.float64) / 11
    check(kind, given, torch.float16, launched, padding=(1, 2), stride=(1, 2))


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("dtype", "c", "kernel"),
    [
        *((dtype, 16, kernel) for dtype in DTYPES for kernel in (1, 3)),
        (torch.float32, 8, 3),
        (torch.bfloat16, 5, 1),
    ],
)
def test_residual_orders(
    kind: Kind, dtype: torch.dtype, c: int, kernel: int, after: bool, activation: str, launched: list[str]
) -> None:
    given = problem(2, c, 13, 9, 32, kernel, residual=(13, 9))
    options = {"padding": kernel // 2, "activation": activation, "residual_after_activation": after}
    check(kind, given, dtype, launched, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("c", "kernel"), [(16, 3), (16, 1), (17, 3), (64, 1), (3, 3)])
def test_nan_and_infinities_pass_as_in_torch(
    kind: Kind, dtype: torch.dtype, c: int, kernel: int, launched: list[str]
) -> None:
    given = problem(2, c, 9, 12, 16, kernel, residual=(9, 12))
    given["x"][0, 0, 0, 0] = float("nan")
    given["x"][1, 1, 4, 4] = float("inf")
    given["x"][1, 2, 8, 11] = float("-inf")
    given["residual"][0, 3, 8, 8] = float("nan")
    if dtype is torch.bfloat16 and c % 2 and kernel == 3:
        # torch itself lets NaN spread to a neighbour there; float32 on the same values says where it belongs.
        rounded = narrow(kind, given, dtype)
        ours = rf.ops.conv_bn_act(**kind.put(rounded), padding=1).cpu()
        want = plain(**{name: t.float() for name, t in rounded.items()}, padding=1)
        assert torch.equal(ours.isnan(), want.isnan()) and torch.equal(ours.isposinf(), want.isposinf())
        return
    y = check(kind, given, dtype, launched, padding=kernel // 2)
    assert y.isnan().any() and y.isinf().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(kind: Kind, dtype: torch.dtype, layout: str, launched: list[str]) -> None:
    """However the tensors lie, the answer is the same; where their addresses allow no vectors, by another kernel."""
    given = problem(2, 16, 6, 10, 16, 3, residual=(6, 10))
    check(kind, given, dtype, launched, LAYOUTS[layout], padding=1)
    assert kind.name != "cuda" or ("masked" in launched[0]) == (layout == "odd address")


def test_expanded_inputs(kind: Kind, launched: list[str]) -> None:
    there = kind.put(narrow(kind, problem(2, 8, 4, 5, 8, 3, residual=(4, 5)), torch.float16))
    there["x"] = there["x"][:1, :, :1, :1].expand(2, 8, 4, 5)
    there["residual"] = there["residual"][:, :1, :, :1].expand(2, 8, 4, 5)
    there["scale"], there["shift"] = there["scale"][:1].expand(8), there["shift"].repeat_interleave(2)[::2]
    ours = rf.ops.conv_bn_act(**there, padding=1)
    judge(ours, {name: t.cpu().contiguous() for name, t in there.items()}, padding=1)
    assert len(launched) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_in_float32_beside_narrower_images(kind: Kind, dtype: torch.dtype, launched: list[str]) -> None:
    given = narrow(kind, problem(2, 8, 5, 4, 16, 3), dtype)
    wide = problem(2, 8, 5, 4, 16, 3)["weight"].float()
    ours = rf.ops.conv_bn_act(**kind.put(given | {"weight": wide}), padding=1)
    judge(ours, given | {"weight": wide.to(dtype)}, padding=1)
    assert len(launched) == 1


# --- gradients, tracing


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_are_the_references(kind: Kind, dtype: torch.dtype, late: bool) -> None:
    given = narrow(kind, problem(2, 8, 5, 6, 8, 3, residual=(5, 6)), dtype)
    gradients = []
    for backend in (kind.name, "reference"):
        leaves = {name: t.clone().requires_grad_() for name, t in kind.put(given).items()}
        with backends.use(backend):
            y = rf.ops.conv_bn_act(**leaves, padding=1, residual_after_activation=late)
            (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum().backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, ours in gradients[0].items():
        theirs = gradients[1][name]
        assert ours is not None and theirs is not None and ours.dtype is theirs.dtype
        relative = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert relative <= (1e-5 if dtype is torch.float32 else 2e-3), (name, float(relative))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(kind: Kind, dtype: torch.dtype) -> None:
    given = narrow(kind, problem(1, 8, 4, 5, 8, 3, residual=(4, 5)), dtype)
    inputs = tuple(t.requires_grad_() for t in kind.put(given).values())
    torch.library.opcheck(OP, (*inputs, [1, 1], [1, 1], [1, 1], 1, "relu", False))


def test_compiled_with_gradients(kind: Kind, launched: list[str]) -> None:
    x, weight, scale, shift, _ = kind.put(narrow(kind, problem(1, 8, 4, 5, 8, 3), torch.float32)).values()

    def block(x: Tensor) -> Tensor:
        y = rf.ops.conv_bn_act(x, weight, scale, shift, padding=1)
        return rf.ops.conv_bn_act(y, weight, scale, shift, y, padding=1).square().sum()

    results = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        run(leaf).backward()
        results.append(leaf.grad)
    assert len(launched) == 4 and torch.allclose(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n", "c", "size"), [(3, 16, 4), (4, 32, 8)])
def test_same_bits_whatever_else_is_in_the_batch(kind: Kind, n: int, c: int, size: int) -> None:
    given = kind.put(narrow(kind, problem(n, c, size, size, c, 3), torch.float16))
    other = torch.cat([given["x"][:1], torch.randn_like(given["x"][1:])])
    whole = rf.ops.conv_bn_act(**given, padding=1)
    mixed = rf.ops.conv_bn_act(**{**given, "x": other}, padding=1)
    assert torch.equal(whole[0], mixed[0])


# --- bound, and what no kernel computes


@pytest.mark.parametrize("late", [False, True])
def test_bound(kind: Kind, late: bool, launched: list[str]) -> None:
    given = narrow(kind, problem(2, 8, 5, 4, 16, 3, residual=(5, 4)), torch.float16)
    x, weight, scale, shift, residual = kind.put(given).values()
    options = {"padding": (1, 1), "residual_after_activation": late}
    conv = ops.ALL["conv_bn_act"].bind(weight.float(), scale, shift, dtype=torch.float16, **options)
    assert conv.backend == kind.name and conv.backend_for(x.to("meta"), residual.to("meta")) == kind.name
    kept = residual.clone()
    ours = conv(x, residual, overwrite_residual=True)
    packed = conv.kept["read"][0]
    assert packed.dtype is torch.float16 and packed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(residual, kept) or ours.data_ptr() == residual.data_ptr()
    assert conv(x[:0]).shape == (0, 16, 5, 4)
    assert torch.equal(conv(x, residual.copy_(kept)), ours) and conv.kept["read"][0] is packed
    assert len(launched) == 2
    judge(ours, given, **options)


def test_float64_falls_back_and_says_so(kind: Kind, monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    given = kind.put(problem(1, 4, 5, 5, 4, 1))
    said = "kernels compute float32, float16 and bfloat16, not float64; the plain torch reference runs"
    with pytest.warns(backends.FallbackWarning, match=said):
        y = rf.ops.conv_bn_act(**given)
    torch.testing.assert_close(y, plain(**given))
    assert launched == [] and [what for what, _ in backends.fallbacks()] == ["conv_bn_act"]


@pytest.mark.parametrize("window", [(3, 0), (0, 3)])
def test_a_window_of_nothing_is_refused_before_any_kernel(
    kind: Kind, window: tuple[int, int], launched: list[str]
) -> None:
    given = kind.put(narrow(kind, problem(1, 8, 4, 4, 8, 3), torch.float16))
    given["weight"] = torch.ones(8, 8, *window, dtype=torch.float16, device=kind.device)
    with pytest.raises(ValueError, match="weight's window is"):
        rf.ops.conv_bn_act(**given)
    assert launched == []
