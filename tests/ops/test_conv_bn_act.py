"""conv_bn_act against plain torch layers: values, gradients, layouts, special values, caching, errors."""

from __future__ import annotations

import gc
import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast import backends
from resnet_fast.backends import packing
from tests.numerics import assert_obeys_error_rule

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning"),
]

OP = torch.ops.resnet_fast.conv_bn_act.default


def problem(
    n: int, c: int, h: int, w: int, k: int, kernel: int, groups: int = 1, residual: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Random float64 arguments."""
    return {
        "x": torch.randn(n, c, h, w, dtype=torch.float64),
        "weight": torch.randn(k, c // groups, kernel, kernel, dtype=torch.float64) / (c // groups * kernel**2) ** 0.5,
        "scale": torch.rand(k, dtype=torch.float64) + 0.5,
        "shift": torch.randn(k, dtype=torch.float64),
        "residual": None if residual is None else torch.randn(n, k, *residual, dtype=torch.float64),
    }


def plain(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, *,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, activation: str = "relu",
    residual_after_activation: bool = False,
) -> Tensor:  # fmt: skip
    """The layers of torch, each rounding to x's dtype: conv2d, batch_norm, add, relu."""
    y = nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    y = nn.functional.batch_norm(y, zero, one, scale, shift, False, 0.0, 1e-30)
    act = nn.functional.relu if activation == "relu" else (lambda t: t)
    if residual is None:
        return act(y)
    return act(y) + residual if residual_after_activation else act(y + residual)


def check(arguments: dict[str, Any], dtype: torch.dtype, **options: Any) -> Tensor:
    """Run ours and torch's in ``dtype`` on the same rounded inputs and apply the error rule."""
    rounded = {name: None if t is None else t.to(dtype) for name, t in arguments.items()}
    vectors = {name: arguments[name].float() for name in ("scale", "shift")}
    exact_in = {**{k: None if v is None else v.double() for k, v in rounded.items()},
                **{k: v.double() for k, v in vectors.items()}}  # fmt: skip
    ours = rf.ops.conv_bn_act(**{**rounded, **vectors}, **options)
    same = plain(**{**rounded, **vectors}, **options)
    assert_obeys_error_rule(ours, same, plain(**exact_in, **options), f"conv_bn_act {dtype} {options}")
    assert ours.is_contiguous(memory_format=torch.channels_last)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (13, 29), (97, 131)])
@pytest.mark.parametrize("c", [1, 3, 17, 64])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_sizes_and_channels(dtype: torch.dtype, size: tuple[int, int], c: int, kernel: int) -> None:
    if dtype is torch.float16 and size == (97, 131):
        size = (9, 31)  # torch's own float16 convolution takes seconds there
    n = 16 if size == (1, 1) else 2  # the rule compares norms: of a few values these are a matter of luck
    check(problem(n, c, *size, 24, kernel), dtype, padding=kernel // 2, stride=2 if kernel == 7 else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_batches(dtype: torch.dtype, n: int) -> None:
    assert check(problem(n, 17, 9, 9, 33, 3, residual=(5, 5)), dtype, stride=2, padding=1).shape == (n, 33, 5, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_residual_orders(dtype: torch.dtype, activation: str, after: bool, kernel: int) -> None:
    arguments = problem(2, 16, 13, 29, 32, kernel, residual=(13, 29))
    check(arguments, dtype, padding=kernel // 2, activation=activation, residual_after_activation=after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": (2, 1), "padding": (1, 0)},
        {"dilation": 2, "padding": 2},
        {"dilation": (1, 3), "padding": (0, 3), "stride": 2},
        {"groups": 4, "padding": 1},
        {"groups": 16, "padding": 1, "stride": 2},
    ],
)
def test_geometry(dtype: torch.dtype, options: dict[str, Any]) -> None:
    check(problem(2, 16, 13, 29, 32, 3, groups=options.get("groups", 1)), dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(dtype: torch.dtype) -> None:
    """NCHW, channels_last, sliced, transposed and expanded inputs and residuals give the same bits."""
    x = torch.randn(2, 8, 6, 10).to(dtype)
    weight, scale, shift = torch.randn(8, 8, 3, 3).to(dtype), torch.rand(8), torch.randn(8)
    residual = torch.randn(2, 8, 6, 10).to(dtype)
    want = rf.ops.conv_bn_act(x, weight, scale, shift, residual, padding=1)

    def wide(t: Tensor) -> Tensor:
        return torch.cat([t, t], 3)[..., : t.shape[3]]

    def turned(t: Tensor) -> Tensor:
        return t.transpose(2, 3).contiguous().transpose(2, 3)

    for form in (Tensor.contiguous, lambda t: t.contiguous(memory_format=torch.channels_last), wide, turned):
        got = rf.ops.conv_bn_act(form(x), form(weight), scale, shift, form(residual), padding=1)
        assert torch.equal(got, want) and got.stride() == want.stride()
    one = x[:1, :, :1, :1].expand(2, 8, 6, 10)
    got = rf.ops.conv_bn_act(one, weight, scale, shift, one, padding=1)
    assert torch.equal(got, rf.ops.conv_bn_act(one.contiguous(), weight, scale, shift, one.contiguous(), padding=1))


def test_the_residual_is_left_alone() -> None:
    arguments = {name: None if t is None else t.float() for name, t in problem(1, 8, 5, 5, 8, 1, 1, (5, 5)).items()}
    kept = arguments["residual"] = arguments["residual"].contiguous(memory_format=torch.channels_last)
    before = kept.clone()
    rf.ops.conv_bn_act(**arguments)
    assert torch.equal(kept, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("with_residual", [False, True])
def test_nan_and_infinities_pass_as_in_torch(dtype: torch.dtype, kernel: int, with_residual: bool) -> None:
    arguments = problem(1, 16, 9, 9, 16, kernel, residual=(9, 9) if with_residual else None)
    arguments["x"][0, 0, 1, 1] = float("nan")
    arguments["x"][0, 1, 4, 4] = float("inf")
    arguments["x"][0, 2, 7, 7] = float("-inf")
    if with_residual:
        arguments["residual"][0, 3, 8, 0] = float("nan")
        arguments["residual"][0, 3, 0, 8] = float("-inf")
    assert check(arguments, dtype, padding=kernel // 2).isnan().any()


@pytest.mark.parametrize("c", [1, 3, 17])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_nan_stays_in_its_window_for_odd_bfloat16_channels(c: int, kernel: int) -> None:
    """oneDNN alone lets it reach the next pixel; so does torch, hence float32 is what this compares with."""
    arguments = {n: None if t is None else t.float() for n, t in problem(1, c, 14, 14, 8, kernel).items()}
    arguments["x"][0, c - 1, 5, 5], arguments["x"][0, 0, 10, 10] = float("inf"), float("nan")
    arguments["weight"] = arguments["weight"].bfloat16()
    want = rf.ops.conv_bn_act(**{**arguments, "weight": arguments["weight"].float()}, padding=kernel // 2)
    ours = rf.ops.conv_bn_act(**{**arguments, "x": arguments["x"].bfloat16()}, padding=kernel // 2)
    assert torch.equal(ours.isnan(), want.isnan()) and torch.equal(ours.isinf(), want.isinf())


@pytest.mark.parametrize(("k", "groups"), [(6, 3), (16, 2), (12, 12), (12, 4)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_nan_stays_in_its_window_for_bfloat16_groups(k: int, groups: int, kernel: int) -> None:
    """Depthwise, and one or three channels a group with several filters."""
    c = 12 if groups in (4, 12) else groups
    arguments = {n: None if t is None else t.float() for n, t in problem(1, c, 9, 9, k, kernel, groups).items()}
    arguments["x"][0, c - 1, 2, 2], arguments["x"][0, 0, 6, 6] = float("inf"), float("nan")
    arguments["weight"] = arguments["weight"].bfloat16().float()
    options = {"padding": kernel // 2, "groups": groups}
    want = rf.ops.conv_bn_act(**arguments, **options)
    ours = rf.ops.conv_bn_act(**{**arguments, "x": arguments["x"].bfloat16()}, **options)
    assert torch.equal(ours.isnan(), want.isnan()) and torch.equal(ours.isinf(), want.isinf())


def test_negative_zero_and_denormals() -> None:
    tiny = torch.finfo(torch.float32).tiny
    x = torch.tensor([-0.0, 0.0, tiny / 4, -tiny / 4]).view(1, 1, 2, 2)
    one, zero = torch.ones(1), torch.zeros(1)
    ours = rf.ops.conv_bn_act(x, torch.ones(1, 1, 1, 1), one, zero)
    assert torch.equal(ours, x.relu())


def test_opcheck_in_full() -> None:
    def args(**changes: Any) -> tuple[Any, ...]:
        a = {name: t.float() for name, t in problem(2, 4, 7, 9, 6, 3, residual=(4, 5)).items()}
        a.update(changes)
        tensors = [None if t is None else t.requires_grad_() for t in a.values()]
        return (*tensors, [2, 2], [1, 1], [1, 1], 1, "relu", False)

    torch.library.opcheck(OP, args())
    torch.library.opcheck(OP, args(residual=None))
    torch.library.opcheck(OP, (*args()[:9], "relu", True))
    torch.library.opcheck(OP, (*args()[:9], "none", False))
    torch.library.opcheck(OP, args(x=torch.randn(0, 4, 7, 9), residual=torch.randn(0, 6, 4, 5)))
    torch.library.opcheck(OP, args(x=torch.randn(2, 4, 7, 9).bfloat16(), residual=None))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_gradcheck(after: bool, activation: str) -> None:
    arguments = [t.requires_grad_() for t in problem(2, 4, 5, 6, 6, 3, groups=2, residual=(3, 3)).values()]
    assert torch.autograd.gradcheck(
        lambda *a: rf.ops.conv_bn_act(
            *a, stride=2, padding=1, groups=2, activation=activation, residual_after_activation=after
        ),
        arguments,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_against_the_layers(dtype: torch.dtype) -> None:
    arguments = problem(2, 16, 9, 9, 24, 3, residual=(9, 9))
    grad = torch.randn(2, 24, 9, 9, dtype=torch.float64)

    def gradients(run: Any, kind: torch.dtype, vectors: torch.dtype) -> list[Tensor]:
        leaves = {
            name: t.to(dtype if name in ("x", "weight", "residual") else torch.float32)
            .to(vectors if name in ("scale", "shift") else kind).requires_grad_()
            for name, t in arguments.items()
        }  # fmt: skip
        run(**leaves, padding=1).backward(grad.to(dtype).to(kind))
        return [leaf.grad for leaf in leaves.values()]

    ours = gradients(rf.ops.conv_bn_act, dtype, torch.float32)
    same = gradients(plain, dtype, torch.float32)
    exact = gradients(plain, torch.float64, torch.float64)
    for name, a, b, e in zip(arguments, ours, same, exact, strict=True):
        assert_obeys_error_rule(a, b, e, f"gradient of {name} in {dtype}")


def test_only_the_gradients_asked_for() -> None:
    arguments = problem(1, 4, 5, 5, 6, 3)
    arguments["shift"].requires_grad_()
    rf.ops.conv_bn_act(**arguments).sum().backward()
    assert arguments["shift"].grad is not None and arguments["x"].grad is None and arguments["weight"].grad is None


def test_autocast_casts_the_data_and_folds_in_float32() -> None:
    a = {name: t.float() for name, t in problem(1, 16, 9, 9, 16, 3, residual=(9, 9)).items()}
    exact = plain(**{name: t.double() for name, t in a.items()}, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        ours = rf.ops.conv_bn_act(**a, padding=1)
        same = plain(**a, padding=1)
        float64 = rf.ops.conv_bn_act(**problem(1, 4, 5, 5, 4, 3))
    assert float64.dtype is torch.float64
    assert ours.dtype is torch.bfloat16
    assert_obeys_error_rule(ours, same.bfloat16(), exact)
    leaves = {name: t.requires_grad_() for name, t in a.items()}
    with torch.autocast("cpu", torch.bfloat16):
        rf.ops.conv_bn_act(**leaves, padding=1).float().sum().backward()
    assert all(leaf.grad.dtype is torch.float32 for leaf in leaves.values())


class TestPackedWeightsFollowTheParameters:
    """Every change of weight, scale or shift shows at the next call."""

    def fresh(self) -> dict[str, Tensor]:
        return {n: t.float() for n, t in problem(1, 8, 6, 6, 8, 3).items() if t is not None}

    @pytest.mark.parametrize("name", ["weight", "scale", "shift"])
    @pytest.mark.parametrize("through_data", [False, True])
    @pytest.mark.parametrize("hasher", ["xxhash", "hashlib"])
    def test_in_place_edits(self, name: str, through_data: bool, hasher: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if hasher == "hashlib":  # where xxhash is not installed
            monkeypatch.setattr(packing, "_xxhash", None)
        a = self.fresh()
        a["weight"] = a["weight"].contiguous(memory_format=torch.channels_last)
        rf.ops.conv_bn_act(**a)
        (a[name].data if through_data else a[name]).mul_(1.5)
        with backends.use("reference"):
            want = rf.ops.conv_bn_act(**a)
        assert torch.allclose(rf.ops.conv_bn_act(**a), want, rtol=1e-5, atol=1e-5)

    def test_one_element(self) -> None:
        a = self.fresh()
        before = rf.ops.conv_bn_act(**a, activation="none")
        a["weight"][7, 7, 1, 1] += 1
        after = rf.ops.conv_bn_act(**a, activation="none")
        assert not torch.equal(before[:, 7], after[:, 7]) and torch.equal(before[:, :7], after[:, :7])

    def test_a_fused_optimizer_that_counts_no_version(self) -> None:
        a = self.fresh()
        weight = a["weight"] = nn.Parameter(a["weight"])
        with torch.no_grad():
            rf.ops.conv_bn_act(**a)
            weight.grad = torch.zeros_like(weight)
            weight.grad[5, 5, 1, 1] = 3.0
            torch.optim.SGD([weight], lr=1.0, fused=True).step()
            with backends.use("reference"):
                want = rf.ops.conv_bn_act(**a)
            assert torch.allclose(rf.ops.conv_bn_act(**a), want, rtol=1e-5, atol=1e-5)

    def test_memory_reused_for_another_weight(self) -> None:
        """A freed weight's address may come back with version 0: the new weight must not meet the old copy."""
        a = self.fresh()
        for _ in range(20):
            a["weight"] = torch.randn(8, 8, 3, 3)
            with backends.use("reference"):
                want = rf.ops.conv_bn_act(**a)
            assert torch.allclose(rf.ops.conv_bn_act(**a), want, rtol=1e-5, atol=1e-5)

    def test_a_dead_weight_takes_its_packed_copies_along(self) -> None:
        rf.ops.conv_bn_act(**(a := self.fresh()))
        (_, conv), *others = packing._cache[a["weight"].untyped_storage()].values()
        packed = weakref.ref(conv)
        assert not others
        view = a["weight"][:1]  # another tensor on the same memory
        del conv, a, _
        gc.collect()
        assert packed() is not None, "the memory is still somebody's"
        del view
        assert packed() is None

    def test_an_unchanged_weight_stays_packed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another model's optimizer, a new version of the same values, inference mode: no reasons to pack anew."""
        a, packed = self.fresh(), []
        build = packing._pack
        monkeypatch.setattr(packing, "_pack", lambda *given: (packed.append(given), build(*given))[1])
        wide = torch.randn(8, 16, 3, 3)
        for weight in (a["weight"], wide[:, ::2], wide[:, :8].permute(1, 0, 2, 3)):
            a["weight"] = weight
            rf.ops.conv_bn_act(**a)
            packed.clear()
            other = nn.Linear(2, 2)
            other(torch.ones(1, 2)).sum().backward()
            torch.optim.SGD(other.parameters(), lr=0.1).step()
            weight.copy_(weight.clone())
            rf.ops.conv_bn_act(**a)
            with torch.inference_mode():
                rf.ops.conv_bn_act(**a)
            assert not packed
            weight[0, 0, 0, 0] += 1
            rf.ops.conv_bn_act(**a)
            assert len(packed) == 1

    @pytest.mark.parametrize("height", [6, 9])
    def test_an_edit_while_it_is_packed_and_back(self, monkeypatch: pytest.MonkeyPatch, height: int) -> None:
        """As a thread does that swaps in averaged weights to evaluate them, and swaps them out again."""
        a = self.fresh()
        first = a["weight"].clone()
        if height != 6:  # then the weight is known, and packed for another size
            rf.ops.conv_bn_act(**a)
        a["x"] = torch.randn(1, 8, height, 6)
        with backends.use("reference"):
            want = rf.ops.conv_bn_act(**a)
        clone, weight = Tensor.clone, a["weight"]

        def swapped(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
            if tensor is weight:
                weight.data.mul_(2)
            return clone(tensor, *args, **options)

        monkeypatch.setattr(Tensor, "clone", swapped)
        rf.ops.conv_bn_act(**a)
        monkeypatch.undo()
        weight.data.copy_(first)
        for _ in range(2):
            assert torch.allclose(rf.ops.conv_bn_act(**a), want, rtol=1e-5, atol=1e-5)

    def test_a_bank_of_weights_is_bounded(self) -> None:
        a, bank = self.fresh(), torch.randn(10_000)
        for start in range(300):
            a["weight"] = bank[start : start + 576].view(8, 8, 3, 3)
            with backends.use("reference"):
                want = rf.ops.conv_bn_act(**a)
            assert torch.allclose(rf.ops.conv_bn_act(**a), want, rtol=1e-4, atol=1e-4)
        assert len(packing._cache[bank.untyped_storage()]) == 64

    def test_checks_do_not_depend_on_what_came_before(self) -> None:
        a = self.fresh()
        rf.ops.conv_bn_act(**a)
        with pytest.raises(TypeError, match=r"scale is torch\.float16"):
            rf.ops.conv_bn_act(**{**a, "scale": a["scale"].half()})

    def test_two_views_of_one_storage(self) -> None:
        a, both = self.fresh(), torch.randn(2, 8, 8, 3, 3)
        for _ in range(2):
            for weight in both:
                a["weight"] = weight
                with backends.use("reference"):
                    want = rf.ops.conv_bn_act(**a)
                assert torch.allclose(rf.ops.conv_bn_act(**a), want, rtol=1e-5, atol=1e-5)

    def test_inference_tensors_are_never_stale(self) -> None:
        with torch.inference_mode():
            a = {name: t.clone() for name, t in self.fresh().items()}
            before = rf.ops.conv_bn_act(**a, activation="none")
            a["weight"][0, 0, 0, 1] += 1
            assert not torch.equal(before, rf.ops.conv_bn_act(**a, activation="none"))

    def test_many_shapes_share_packed_copies(self) -> None:
        a = self.fresh()
        for h in range(3, 40):
            a["x"] = torch.randn(1, 8, h, 7)
            check({**{n: t.double() for n, t in a.items()}, "residual": None}, torch.float32)

    @pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 4)])
    def test_packed_copies_are_bounded_over_all_sizes(self, kernel: int, stride: int, groups: int) -> None:
        weight, ones, zeros = torch.randn(64, 64 // groups, kernel, kernel), torch.ones(64), torch.zeros(64)
        geometry = ([stride, stride], [kernel // 2] * 2, [1, 1], groups)
        x = torch.randn(1, 64, 3, 3)
        with backends.use("onednn"):
            packed = packing.packed("conv_bn_act", x, torch.float32, weight, ones, zeros, geometry)
        assert packed is not None
        conv, folded = packed
        for i in range(400):
            x = torch.randn(1 + i % 3, 64, 1 + i % 34, 3 + i % 29).contiguous(memory_format=torch.channels_last)
            conv.run(x, folded)
        assert len(conv.layouts.by_layout) <= 2
        assert len(conv.layouts.by_shape) <= 256
        assert all(
            packed in [*map(id, conv.layouts.by_layout.values())] for packed in map(id, conv.layouts.by_shape.values())
        )

    @pytest.mark.parametrize("layouts", [1, 2])
    def test_a_dropped_layout_is_packed_again(self, layouts: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each size of image has a layout of its own here; how many oneDNN wants depends on the processor."""
        number = itertools.count()
        monkeypatch.setattr(packing, "_LAYOUTS_KEPT", layouts)
        monkeypatch.setattr(packing.onednn, "layout", lambda packed: str(next(number)))
        a = self.fresh()
        for h in [3, 4, 5, 3, 5, 4, 4, 3]:
            a["x"] = torch.randn(1, 8, h, 7)
            with backends.use("reference"):
                want = rf.ops.conv_bn_act(**a)
            with backends.use("onednn"):
                assert torch.allclose(rf.ops.conv_bn_act(**a), want, rtol=1e-5, atol=1e-5)
        ((_, conv),) = packing._cache[a["weight"].untyped_storage()].values()
        assert len(conv.layouts.by_layout) == len(conv.layouts.by_shape) == layouts


def test_threads() -> None:
    a = {name: t.float() for name, t in problem(1, 16, 13, 13, 16, 3).items() if t is not None}
    want, wrong = rf.ops.conv_bn_act(**a), []

    def work(_: int) -> None:
        for _ in range(30):
            if not torch.allclose(rf.ops.conv_bn_act(**a), want, rtol=1e-5, atol=1e-5):
                wrong.append(1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what they raise
    assert not wrong


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(4, 5, 5)}, ValueError, r"x must be 4-D \[N, C, H, W\], got 3-D"),
        ({"x": torch.randint(9, (1, 4, 5, 5))}, TypeError, "floating point tensor, got torch.int64"),
        ({"x": torch.randn(1, 3, 5, 5)}, ValueError, "x has 3 channels, weight expects 4"),
        ({"weight": torch.randn(6, 4, 3)}, ValueError, "weight must be 4-D"),
        ({"weight": torch.randn(6, 4, 3, 3).double()}, TypeError, "weight is torch.float64, x is torch.float32"),
        ({"scale": torch.rand(128)}, ValueError, r"scale has shape \[128\], weight has 6 output channels"),
        ({"shift": torch.rand(6, 1)}, ValueError, "shift has shape"),
        ({"scale": torch.rand(6).half()}, TypeError, r"scale is torch\.float16; it must be torch\.float32"),
        ({"residual": torch.rand(1, 6, 5, 5)}, ValueError, r"the output is torch.float32 \[1, 6, 3, 3\]"),
        ({"activation": "gelu"}, ValueError, "activation must be one of"),
        ({"stride": 0}, ValueError, "stride must be two ints >= 1"),
        ({"padding": (1, 2, 3)}, ValueError, "padding must be an int or two ints"),
        ({"groups": 4}, ValueError, "groups is 4; it must divide the 6"),
        ({"x": torch.randn(1, 4, 2, 9)}, ValueError, "a 2x9 image is too small"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    a: dict[str, Any] = {name: t.float() for name, t in problem(1, 4, 5, 5, 6, 3).items() if t is not None}
    with pytest.raises(error, match=message):
        rf.ops.conv_bn_act(**{**a, **changes})


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic: bool) -> None:
    a = {name: t.float() for name, t in problem(2, 4, 9, 9, 6, 3).items() if t is not None}
    torch._dynamo.reset()
    compiled = torch.compile(lambda **k: rf.ops.conv_bn_act(**k, padding=1), fullgraph=True, dynamic=dynamic,
                             backend="aot_eager")  # fmt: skip
    assert torch.equal(compiled(**a), rf.ops.conv_bn_act(**a, padding=1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda(dtype: torch.dtype) -> None:
    arguments = {n: None if t is None else t.cuda() for n, t in problem(2, 16, 13, 29, 32, 3, 1, (13, 29)).items()}
    check(arguments, dtype, padding=1)
