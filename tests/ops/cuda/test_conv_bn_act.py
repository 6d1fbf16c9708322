"""conv_bn_act on the CUDA kernels, through the op and prepared: values, layouts, gradients, what is not computed.

The kernels' own cases are in tests/emulator/; here is what lies between them and the op's arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fast as rf
from resnet_fast import backends, ops
from resnet_fast.backends import cuda, triton
from resnet_fast.roofline.measure import tf32
from tests.cuda_device import (
    DEVICE,
    DTYPES,
    as_multiplied,
    assert_obeys_error_rule,
    doubled,
    kernels,
    on_device,
    watch,
)
from tests.ops.test_conv_bn_act import plain, problem

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("poisoned_memory")]

OP = torch.ops.resnet_fast.conv_bn_act.default


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched."""
    return watch(monkeypatch)


def narrow(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments in ``dtype``, scale and shift in float32, and x and weight such as tf32 holds exactly."""
    cast = {
        name: t if t is None else t.float() if name in ("scale", "shift") else t.to(dtype)
        for name, t in arguments.items()
    }
    return as_multiplied(cast, "x", "weight")


def check(
    arguments: dict[str, Any],
    dtype: torch.dtype,
    launched: list[str],
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    **options: Any,
) -> Tensor:
    """The op on a CUDA kernel and torch's layers in ``dtype`` on the same rounded inputs, under the error rule.

    ``layout`` moves images and weights about in memory, and changes no value.
    """
    given = narrow(arguments, dtype)
    there = {name: layout(t) if t is not None and t.dim() == 4 else t for name, t in on_device(given).items()}
    assert all(
        t is None or torch.equal(t.nan_to_num(), given[name].nan_to_num().to(DEVICE)) for name, t in there.items()
    )
    launched.clear()
    with kernels():
        ours = rf.ops.conv_bn_act(**there, **options)
    assert len(launched) == (ours.numel() > 0), launched
    assert ours.device.type == DEVICE and ours.is_contiguous(memory_format=torch.channels_last)
    ours = ours.cpu()
    assert_obeys_error_rule(ours, plain(**given, **options), plain(**doubled(given), **options), f"{dtype} {options}")
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("c", "size", "kernel"), [(64, (7, 7), 1), (16, (5, 9), 3), (3, (9, 7), 7), (17, (4, 5), 3)])
def test_values(dtype: torch.dtype, c: int, size: tuple[int, int], kernel: int, launched: list[str]) -> None:
    check(problem(2, c, *size, 24, kernel), dtype, launched, padding=kernel // 2)
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "tf32"}[dtype]
    assert precision in launched[0] and ("masked" in launched[0]) == (c % 8 > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_batches(dtype: torch.dtype, n: int, launched: list[str]) -> None:
    given = problem(n, 8, 6, 4, 16, 3, residual=(3, 2))
    assert check(given, dtype, launched, stride=2, padding=1).shape == (n, 16, 3, 2)


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("dtype", "c", "kernel"), [(torch.float16, 16, 1), (torch.float32, 8, 3), (torch.bfloat16, 5, 1)]
)
def test_residual_orders(
    dtype: torch.dtype, c: int, kernel: int, after: bool, activation: str, launched: list[str]
) -> None:
    given = problem(2, c, 5, 4, 8, kernel, residual=(5, 4))
    options = {"padding": kernel // 2, "activation": activation, "residual_after_activation": after}
    check(given, dtype, launched, **options)


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({"stride": 2, "padding": 1}, 3),
        ({"stride": 2}, 1),
        ({"stride": (2, 1), "padding": (1, 0)}, 3),
        ({"stride": (1, 3), "padding": (0, 2)}, 3),
        ({"dilation": (1, 2), "padding": (0, 2)}, 3),
        ({"dilation": (2, 1), "padding": (2, 1), "stride": 2}, 3),
        ({"padding": 2}, 1),
        ({"groups": 2, "padding": 1}, 3),
        ({"groups": 16, "padding": 1}, 3),
        ({"groups": 4}, 1),
    ],
    ids=str,
)
def test_geometry(options: dict[str, Any], kernel: int, launched: list[str]) -> None:
    given = problem(1, 16, 7, 6, 32, kernel, groups=options.get("groups", 1))
    check(given, torch.float16, launched, **options)


def test_windows_that_are_not_square(launched: list[str]) -> None:
    given = problem(1, 8, 6, 9, 8, 1)
    given["weight"] = torch.randn(8, 8, 3, 5, dtype=torch.float64) / 11
    check(given, torch.float16, launched, padding=(1, 2), stride=(1, 2))


@pytest.mark.parametrize("c", [16, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nan_and_infinities_pass_as_in_torch(dtype: torch.dtype, c: int, launched: list[str]) -> None:
    given = problem(2, c, 6, 5, 8, 3, residual=(6, 5))
    given["x"][0, 0, 0, 0] = float("nan")
    given["x"][1, 1, 3, 3] = float("inf")
    given["x"][1, 2, 5, 4] = float("-inf")
    given["residual"][0, 3, 5, 4] = float("nan")
    y = check(given, dtype, launched, padding=1)
    assert y.isnan().any() and y.isinf().any()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
    "every other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "odd address": lambda t: (
        torch.cat([t.flatten()[:1], t.permute(0, 2, 3, 1).flatten()])[1:]
        .view(t.shape[0], *t.shape[2:], t.shape[1])
        .permute(0, 3, 1, 2)
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_any_strides(dtype: torch.dtype, layout: str, launched: list[str]) -> None:
    """However the tensors lie, the answer is the same; where their addresses allow no vectors, by another kernel."""
    given = problem(2, 16, 4, 5, 16, 3, residual=(4, 5))
    check(given, dtype, launched, LAYOUTS[layout], padding=1)
    assert ("masked" in launched[0]) == (layout == "odd address")


@pytest.mark.parametrize("odd", ["x", "weight", "residual"])
def test_one_address_that_allows_no_vectors(odd: str, launched: list[str]) -> None:
    given = narrow(problem(1, 16, 4, 5, 16, 3, residual=(4, 5)), torch.float16)
    there = on_device(given)
    there[odd] = LAYOUTS["odd address"](there[odd])
    with kernels():
        ours = rf.ops.conv_bn_act(**there, padding=1).cpu()
    assert "masked" in launched[0]
    assert_obeys_error_rule(ours, plain(**given, padding=1), plain(**doubled(given), padding=1))


def test_expanded_inputs(launched: list[str]) -> None:
    given = narrow(problem(2, 8, 4, 5, 8, 3, residual=(4, 5)), torch.float16)
    there = on_device(given)
    there["x"] = there["x"][:1, :, :1, :1].expand(2, 8, 4, 5)
    there["residual"] = there["residual"][:, :1, :, :1].expand(2, 8, 4, 5)
    there["scale"], there["shift"] = there["scale"][:1].expand(8), there["shift"].repeat_interleave(2)[::2]
    with kernels():
        ours = rf.ops.conv_bn_act(**there, padding=1).cpu()
    given = {name: t.cpu().contiguous() for name, t in there.items()}
    assert_obeys_error_rule(ours, plain(**given, padding=1), plain(**doubled(given), padding=1))
    assert len(launched) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_in_float32_beside_narrower_images(dtype: torch.dtype, launched: list[str]) -> None:
    given = narrow(problem(2, 8, 5, 4, 16, 3), dtype)
    wide = problem(2, 8, 5, 4, 16, 3)["weight"].float()
    with kernels():
        ours = rf.ops.conv_bn_act(**on_device({**given, "weight": wide}), padding=1).cpu()
    rounded = given | {"weight": wide.to(dtype)}
    assert_obeys_error_rule(ours, plain(**rounded, padding=1), plain(**doubled(rounded), padding=1))
    assert len(launched) == 1


# --- gradients, tracing


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_are_the_references(dtype: torch.dtype, late: bool) -> None:
    given = narrow(problem(2, 8, 5, 6, 8, 3, residual=(5, 6)), dtype)
    gradients = []
    for backend in ("cuda", "reference"):
        leaves = {name: t.requires_grad_() for name, t in on_device({n: t.clone() for n, t in given.items()}).items()}
        with kernels(), backends.use(backend):
            y = rf.ops.conv_bn_act(**leaves, padding=1, residual_after_activation=late)
            (y.float() * torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape)).sum().backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, ours in gradients[0].items():
        theirs = gradients[1][name]
        assert ours is not None and theirs is not None and ours.dtype is theirs.dtype
        relative = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert relative <= (1e-5 if dtype is torch.float32 else 2e-3), (name, float(relative))


def test_opcheck() -> None:
    given = narrow(problem(1, 8, 4, 5, 8, 3, residual=(4, 5)), torch.float16)
    inputs = tuple(t.requires_grad_() for t in on_device(given).values())
    with kernels():
        torch.library.opcheck(OP, (*inputs, [1, 1], [1, 1], [1, 1], 1, "relu", False))


def test_compiled_with_gradients(launched: list[str]) -> None:
    given = narrow(problem(1, 8, 4, 5, 8, 3), torch.float32)

    def block(x: Tensor) -> Tensor:
        constants = (weight, scale, shift)
        y = rf.ops.conv_bn_act(x, *constants, padding=1)
        return rf.ops.conv_bn_act(y, *constants, y, padding=1).square().sum()

    x, weight, scale, shift, _ = on_device(given).values()
    results = []
    with kernels():
        for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
            leaf = x.clone().requires_grad_()
            run(leaf).backward()
            results.append(leaf.grad)
    assert len(launched) == 4 and torch.allclose(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_same_bits_whatever_else_is_in_the_batch() -> None:
    given = on_device(narrow(problem(3, 16, 4, 4, 16, 3), torch.float16))
    other = torch.cat([given["x"][:1], torch.randn_like(given["x"][1:])])
    with kernels():
        whole = rf.ops.conv_bn_act(**given, padding=1)
        mixed = rf.ops.conv_bn_act(**{**given, "x": other}, padding=1)
    assert torch.equal(whole[0], mixed[0])


# --- prepared, and what no kernel computes


@pytest.mark.parametrize("late", [False, True])
def test_prepared(late: bool, launched: list[str]) -> None:
    given = narrow(problem(2, 8, 5, 4, 16, 3, residual=(5, 4)), torch.float16)
    x, weight, scale, shift, residual = on_device(given).values()
    options = {"padding": (1, 1), "residual_after_activation": late}
    with kernels():
        conv = ops.ALL["conv_bn_act"].bind(weight.float(), scale, shift, dtype=torch.float16, **options)
        assert conv.backend == "cuda" and conv.backend_for(x.to("meta"), residual.to("meta")) == "cuda"
        kept = residual.clone()
        ours = conv(x, residual, overwrite_residual=True)
        packed = conv.kept["read"][0]
        assert packed.dtype is torch.float16 and packed.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(residual, kept) or ours.data_ptr() == residual.data_ptr()
        assert conv(x[:0]).shape == (0, 16, 5, 4)
        assert torch.equal(conv(x, residual.copy_(kept)), ours) and conv.kept["read"][0] is packed
        assert len(launched) == 2
    assert_obeys_error_rule(ours.cpu(), plain(**given, **options), plain(**doubled(given), **options))


def test_prepared_for_cuda_alone_whatever_the_process_runs(launched: list[str]) -> None:
    x, weight, scale, shift, _ = on_device(narrow(problem(1, 8, 3, 4, 8, 1), torch.float16)).values()
    with kernels():
        conv = ops.ALL["conv_bn_act"].bind(weight, scale, shift, dtype=torch.float16, backend="cuda")
        with backends.use("reference"):
            conv(x)
            assert len(launched) == 1
            rf.ops.conv_bn_act(x, weight, scale, shift)
    assert len(launched) == 1


def test_float64_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    given = on_device(problem(1, 4, 5, 5, 4, 1))
    said = "the CUDA kernels compute float32, float16 and bfloat16, not float64; the plain torch reference runs"
    with kernels(), pytest.warns(backends.FallbackWarning, match=said):
        y = rf.ops.conv_bn_act(**given)
    torch.testing.assert_close(y, plain(**given))
    assert launched == [] and [what for what, _ in backends.fallbacks()] == ["conv_bn_act"]


def test_float32_is_not_rounded_to_tf32_unasked(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    given = on_device({n: t if t is None else t.float() for n, t in problem(2, 16, 5, 5, 16, 3).items()})
    said = "no CUDA convolution for this GPU computes float32 without tf32"
    with kernels(), tf32(False):
        with pytest.warns(backends.FallbackWarning, match=said):
            y = rf.ops.conv_bn_act(**given, padding=1)
        conv = ops.ALL["conv_bn_act"].bind(given["weight"], given["scale"], given["shift"], padding=(1, 1))
        assert conv.backend_for(given["x"].to("meta")) == "reference"
    exact = plain(**doubled(given), padding=1)
    assert launched == [] and float((y.double() - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("window", [(3, 0), (0, 3)])
def test_a_window_of_nothing_is_refused_before_any_kernel(window: tuple[int, int], launched: list[str]) -> None:
    given = on_device(narrow(problem(1, 8, 4, 4, 8, 3), torch.float16))
    given["weight"] = torch.ones(8, 8, *window, dtype=torch.float16, device=DEVICE)
    with kernels(), pytest.raises(ValueError, match="weight's window is"):
        rf.ops.conv_bn_act(**given)
    assert launched == []


def test_a_launch_that_fails_is_an_error_with_the_shape() -> None:
    given = on_device(narrow(problem(1, 8, 4, 4, 8, 3), torch.float16))
    given = {name: t if t is None or t.dim() == 1 else t.contiguous(memory_format=torch.channels_last)
             for name, t in given.items()}  # fmt: skip
    out = torch.empty(1, 8, 2, 2, dtype=torch.float16, device=DEVICE).contiguous(memory_format=torch.channels_last)
    described = _described(given)
    with kernels():
        with pytest.raises((ValueError, RuntimeError), match="no_such_kernel"):
            cuda.conv_bn_act("no_such_kernel", **given, out=out, problem=described)
        other, _ = cuda.supporting(described, triton.gpu_of(given["x"].device))
        wrong = next(each.name for each in cuda.native().kernels if each.precision == "bf16")  # type: ignore[union-attr]
        assert wrong not in {each.name for each in other}
        with pytest.raises((ValueError, RuntimeError), match="bf16"):
            cuda.conv_bn_act(wrong, **given, out=out, problem=described)


def _described(given: dict[str, Any]) -> Any:
    op = ops.ALL["conv_bn_act"]
    assert op.problem is not None
    return op.problem(op.arguments(**given))
