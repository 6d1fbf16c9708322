"""bottleneck_tail against plain torch layers: values, gradients, layouts, special values, errors, constant weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fast as rf
from resnet_fast import ops
from resnet_fast.ops import bottleneck_tail as public
from tests.numerics import assert_obeys_error_rule
from tests.ops.test_conv_bn_act import plain as plain_conv

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning"),
]

OP = torch.ops.resnet_fast.bottleneck_tail.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VECTORS = ("scale2", "shift2", "scale3", "shift3", "scale_shortcut", "shift_shortcut", "scale1", "shift1")
NAMES = (
    "a", "weight2", "scale2", "shift2", "weight3", "scale3", "shift3", "residual",
    "weight_shortcut", "scale_shortcut", "shift_shortcut", "weight1", "scale1", "shift1",
)  # fmt: skip


def problem(
    n: int = 2,
    mid: int = 8,
    size: tuple[int, int] = (5, 6),
    k: int | None = None,
    *,
    stride: int = 1,
    project: int | None = None,
    shortcut_stride: int | None = None,
    following: int | None = None,
) -> dict[str, Any]:
    """Random float64 arguments; ``project`` is the channels of the projection's input, None for a plain residual."""
    k = 4 * mid if k is None else k
    out = [(side - 1) // stride + 1 for side in size]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    def constants(suffix: str, outputs: int, inputs: int, kernel: int) -> dict[str, Tensor]:
        return {
            f"weight{suffix}": normal(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5,
            f"scale{suffix}": torch.rand(outputs, dtype=torch.float64) + 0.5,
            f"shift{suffix}": normal(outputs),
        }

    shortcut_stride = stride if shortcut_stride is None else shortcut_stride
    # As many pixels as the projection needs, and at a stride above 1 sometimes one that it does not touch.
    source = size if shortcut_stride == stride else [(side - 1) * shortcut_stride + 1 for side in out]
    arguments: dict[str, Any] = {
        "a": normal(n, mid, *size),
        **constants("2", mid, mid, 3),
        **constants("3", k, mid, 1),
        "residual": normal(n, k, *out) if project is None else normal(n, project, *source),
        **({} if project is None else constants("_shortcut", k, project, 1)),
        **({} if following is None else constants("1", following, k, 1)),
        "stride": stride,
    }
    if project is not None:
        arguments["shortcut_stride"] = shortcut_stride
    return arguments


def plain(
    a: Tensor, weight2: Tensor, scale2: Tensor, shift2: Tensor, weight3: Tensor, scale3: Tensor, shift3: Tensor,
    residual: Tensor, weight_shortcut: Tensor | None = None, scale_shortcut: Any = None, shift_shortcut: Any = None,
    weight1: Tensor | None = None, scale1: Any = None, shift1: Any = None, *, stride: Any = 1, shortcut_stride: Any = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The layers of torch, each rounding to a's dtype."""
    b = plain_conv(a, weight2, scale2, shift2, stride=stride, padding=1)
    if weight_shortcut is not None:
        residual = plain_conv(
            residual, weight_shortcut, scale_shortcut, shift_shortcut, stride=shortcut_stride, activation="none"
        )
    y = plain_conv(b, weight3, scale3, shift3, residual)
    return (y,) if weight1 is None else (y, plain_conv(y, weight1, scale1, shift1))


def pair(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments rounded to ``dtype`` (vectors to float32), and the same values in float64."""
    rounded = {
        name: value if not isinstance(value, Tensor) else value.to(torch.float32 if name in VECTORS else dtype)
        for name, value in arguments.items()
    }
    return rounded, {name: v.double() if isinstance(v, Tensor) else v for name, v in rounded.items()}


def check(arguments: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Run the op, its reference, the prepared form and torch's layers on the same inputs; apply the error rule."""
    rounded, exact = in_dtype(arguments, dtype)
    same, want = plain(**rounded), plain(**exact)
    pairs = {name: [value, value] for name, value in rounded.items() if name.endswith("stride")}
    reference = bottleneck_reference(**{**rounded, **pairs})
    data = {name: rounded[name] for name in ("a", "residual")}
    constant = {name: value for name, value in rounded.items() if name not in data}
    frozen = ops.ALL["bottleneck_tail"].bind(**{**constant, **pairs}, dtype=dtype)
    forms = {"op": pair(public(**rounded)), "reference": reference, "prepared": pair(frozen(*data.values()))}
    for form, outputs in forms.items():
        for what, ours, theirs, truth in zip(("y", "following"), outputs, same, want, strict=False):
            assert_obeys_error_rule(ours, theirs, truth, f"{form} {what} {dtype}")
            assert ours.is_contiguous(memory_format=torch.channels_last)
    assert len(forms["op"]) == len(forms["prepared"]) == len(same)
    return forms["op"]


def bottleneck_reference(**arguments: Any) -> tuple[Tensor, ...]:
    op = ops.ALL["bottleneck_tail"]
    y, following = op.reference(op.arguments(**arguments))
    if arguments.get("weight1") is None:
        assert following.shape == (0,) and following.dtype is y.dtype
        return (y,)
    return (y, following)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (13, 29)])
@pytest.mark.parametrize("mid", [1, 17, 64])
@pytest.mark.parametrize("stride", [1, 2])
def test_sizes_and_channels(dtype: torch.dtype, size: tuple[int, int], mid: int, stride: int) -> None:
    # A folded weight's rounding is one for all pixels: the rule's norm needs channels, or it compares two single draws.
    check(problem(2, mid, size, 40, stride=stride), dtype)
    check(problem(1, mid, size, 40, stride=stride, project=mid + 3, following=24), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("project", [None, 16])
@pytest.mark.parametrize("following", [None, 24])
def test_batches(dtype: torch.dtype, n: int, project: int | None, following: int | None) -> None:
    y, *more = check(problem(n, 8, (9, 8), stride=2, project=project, following=following), dtype)
    assert y.shape == (n, 32, 5, 4)
    assert [list(t.shape) for t in more] == ([] if following is None else [[n, 24, 5, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stride", "shortcut_stride"), [(1, 2), (2, 1), (1, 3)])
def test_the_projection_has_its_own_stride(dtype: torch.dtype, stride: int, shortcut_stride: int) -> None:
    check(problem(2, 8, (7, 9), stride=stride, project=5, shortcut_stride=shortcut_stride), dtype)


def test_strides_per_direction() -> None:
    arguments = problem(1, 4, (7, 9), project=6)
    arguments["stride"] = arguments["shortcut_stride"] = (2, 1)
    rounded, exact = in_dtype(arguments, torch.float32)
    assert_obeys_error_rule(public(**rounded), plain(**rounded)[0], plain(**exact)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_output_only_where_asked_for(dtype: torch.dtype) -> None:
    rounded, _ = in_dtype(problem(), dtype)
    y, following = OP(*(rounded.get(name) for name in NAMES), [1, 1], [1, 1])
    assert following.shape == (0,) and following.dtype is dtype
    assert torch.equal(y, public(**rounded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_composes_the_reference_of_conv_bn_act(dtype: torch.dtype) -> None:
    """To the bit: b and y are rounded where the separate ops round them. Float32 and wider round no projection."""
    op = ops.ALL["conv_bn_act"]

    def conv(*given: Any, **named: Any) -> Tensor:
        return op.reference(op.arguments(*given, **named))

    for project in (None, 6) if dtype is torch.float32 else (None,):
        arguments, _ = in_dtype(problem(2, 8, (9, 9), stride=2, project=project, following=8), dtype)
        get = arguments.get
        b = conv(get("a"), get("weight2"), get("scale2"), get("shift2"), None, (2, 2), (1, 1))
        shortcut = get("residual")
        if project is not None:
            vectors = get("scale_shortcut"), get("shift_shortcut")
            shortcut = conv(shortcut, get("weight_shortcut"), *vectors, None, (2, 2), activation="none")
        y = conv(b, get("weight3"), get("scale3"), get("shift3"), shortcut)
        following = conv(y, get("weight1"), get("scale1"), get("shift1"))
        pairs = {name: [2, 2] for name in ("stride", "shortcut_stride")}
        ours = bottleneck_reference(**{**arguments, **pairs})
        assert torch.equal(ours[0], y) and torch.equal(ours[1], following)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("project", [None, 8])
def test_any_strides(dtype: torch.dtype, project: int | None) -> None:
    """NCHW, channels_last, sliced, transposed and expanded inputs and residuals give the same bits."""
    arguments, _ = in_dtype(problem(2, 8, (6, 10), project=project, following=8), dtype)
    want = public(**arguments)

    def wide(t: Tensor) -> Tensor:
        return torch.cat([t, t], 3)[..., : t.shape[3]]

    def turned(t: Tensor) -> Tensor:
        return t.transpose(2, 3).contiguous().transpose(2, 3)

    for form in (Tensor.contiguous, lambda t: t.contiguous(memory_format=torch.channels_last), wide, turned):
        changed = {name: form(t) if isinstance(t, Tensor) and t.dim() == 4 else t for name, t in arguments.items()}
        for got, expected in zip(public(**changed), want, strict=True):
            assert torch.equal(got, expected) and got.stride() == expected.stride()
    for name in ("a", "residual"):
        arguments[name] = arguments[name][:1, :, :1, :1].expand(arguments[name].shape)
    dense = {name: t.contiguous() if isinstance(t, Tensor) else t for name, t in arguments.items()}
    for got, expected in zip(public(**arguments), public(**dense), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("project", [None, 8])
def test_the_residual_is_left_alone(project: int | None) -> None:
    arguments, _ = in_dtype(problem(project=project), torch.float32)
    kept = arguments["residual"] = arguments["residual"].contiguous(memory_format=torch.channels_last)
    before = kept.clone()
    public(**arguments)
    constant = {n: v for n, v in arguments.items() if n not in ("a", "residual") and isinstance(v, Tensor)}
    ops.ALL["bottleneck_tail"].bind(**constant)(arguments["a"], kept)
    assert torch.equal(kept, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("project", [None, 8])
def test_nan_and_infinities_pass_as_in_torch(dtype: torch.dtype, project: int | None) -> None:
    arguments = problem(1, 8, (16, 16), project=project, following=8)
    arguments["a"][0, 0, 1, 1] = float("nan")
    arguments["a"][0, 1, 5, 5] = float("inf")
    arguments["residual"][0, 3, 12, 0] = float("nan")
    arguments["residual"][0, 3, 0, 12] = float("-inf")
    y, following = check(arguments, dtype)
    assert y.isnan().any() and following.isnan().any() and y.isfinite().any() and following.isfinite().any()


def leaves(arguments: dict[str, Any]) -> list[Tensor | None]:
    return [None if (t := arguments.get(name)) is None else t.clone().requires_grad_() for name in NAMES]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("project", [None, 3])
@pytest.mark.parametrize("following", [None, 5])
def test_opcheck_in_full(stride: int, project: int | None, following: int | None) -> None:
    arguments, _ = in_dtype(
        problem(2, 4, (5, 7), 6, stride=stride, project=project, following=following), torch.float32
    )
    torch.library.opcheck(OP, (*leaves(arguments), [stride, stride], [stride, stride]))


def test_opcheck_empty_and_bfloat16() -> None:
    empty, _ = in_dtype(problem(0, 4, (5, 7), 6, project=3, following=5), torch.float32)
    torch.library.opcheck(OP, (*leaves(empty), [1, 1], [1, 1]))
    narrow, _ = in_dtype(problem(1, 4, (5, 7), 6, following=5), torch.bfloat16)
    torch.library.opcheck(OP, (*leaves(narrow), [1, 1], [1, 1]))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("project", [None, 2])
@pytest.mark.parametrize("following", [None, 3])
def test_gradcheck(stride: int, project: int | None, following: int | None) -> None:
    arguments = problem(2, 2, (3, 4), 3, stride=stride, project=project, following=following)
    names = [name for name in NAMES if name in arguments]
    options = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
    assert torch.autograd.gradcheck(
        lambda *values: public(**dict(zip(names, values, strict=True)), **options),
        [arguments[name].requires_grad_() for name in names],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("project", [None, 48])
@pytest.mark.parametrize("read", ["y", "following", "both"])
def test_gradients_against_the_layers(dtype: torch.dtype, project: int | None, read: str) -> None:
    arguments = problem(2, 32, (9, 9), stride=2, project=project, following=64)
    if dtype is torch.bfloat16:
        # A ReLU that opens on one side only changes a gradient by far more than rounding does. So each channel is well
        # on one side of zero; which elements are open within a channel is what float32 and gradcheck look at.
        for name, least in (("shift2", 8), ("shift3", 60), ("shift1", 400)):
            arguments[name] = arguments[name] + arguments[name].sign() * least
    grads = [torch.randn(2, c, 5, 5, dtype=torch.float64) for c in (128, 64)]
    names = [name for name in NAMES if name in arguments]

    def gradients(run: Any, double: bool) -> dict[str, Tensor | None]:
        rounded, exact = in_dtype(arguments, dtype)
        given = exact if double else rounded
        for name in names:
            given[name] = given[name].requires_grad_()
        outputs = run(**given)
        kept = {"y": [0], "following": [1], "both": [0, 1]}[read]
        torch.autograd.backward([outputs[i] for i in kept], [grads[i].to(dtype).to(outputs[i].dtype) for i in kept])
        return {name: given[name].grad for name in names}

    ours, same, exact = gradients(public, False), gradients(plain, False), gradients(plain, True)
    for name in names:
        theirs, truth = same[name], exact[name]
        if theirs is None or truth is None:
            assert read == "y" and name in ("weight1", "scale1", "shift1") and ours[name] is None
        else:
            assert ours[name] is not None
            assert_obeys_error_rule(ours[name], theirs, truth, f"gradient of {name} in {dtype}")


@pytest.mark.parametrize("project", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_only_the_gradients_asked_for(name: str, project: int | None) -> None:
    arguments = problem(1, 2, (4, 4), 4, project=project, following=3)
    if name not in arguments:
        return
    everything = {key: t.clone().requires_grad_() for key, t in arguments.items() if isinstance(t, Tensor)}
    sum(output.sum() for output in public(**{**arguments, **everything})).backward()
    arguments[name].requires_grad_()
    sum(output.sum() for output in public(**arguments)).backward()
    assert [key for key, t in arguments.items() if isinstance(t, Tensor) and t.grad is not None] == [name]
    assert torch.allclose(arguments[name].grad, everything[name].grad)


def test_autocast_casts_the_data_and_folds_in_float32() -> None:
    arguments, exact = in_dtype(problem(1, 16, (9, 9), project=12, following=8), torch.float32)
    names = [name for name in NAMES if name in arguments]
    want = plain(**exact)
    with torch.autocast("cpu", torch.bfloat16):
        ours = public(**arguments)
        same = plain(**arguments)
        half = {name: t.half() if name.startswith("weight") else t for name, t in arguments.items()}
        from_half = public(**half)
        float64 = public(**exact)
    for got, theirs, truth in zip(ours, same, want, strict=True):
        assert got.dtype is torch.bfloat16
        assert_obeys_error_rule(got, theirs.bfloat16(), truth)
    assert all(t.dtype is torch.bfloat16 for t in from_half) and all(t.dtype is torch.float64 for t in float64)
    for name in names:
        arguments[name].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, following = public(**arguments)
        (y.float().sum() + following.float().sum()).backward()
    assert all(arguments[name].grad.dtype is torch.float32 for name in names)


def test_forward_mode_and_functional_transforms() -> None:
    """The ops have formulas for the reverse mode only; torch.func sees the plain layers."""
    arguments = problem(2, 2, (4, 4), 4, project=3)
    a = arguments.pop("a")
    _, tangent = torch.func.jvp(lambda t: public(a=t, **arguments), (a,), (torch.ones_like(a),))
    step = 1e-6
    moved = public(a=a + step, **arguments) - public(a=a - step, **arguments)
    assert torch.allclose(tangent, moved / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a": torch.randn(4, 5, 5)}, ValueError, r"a must be 4-D \[N, C, H, W\], got 3-D"),
        ({"residual": torch.randn(4, 5)}, ValueError, r"residual must be 4-D \[N, C, H, W\], got 2-D"),
        ({"a": torch.randint(9, (1, 4, 5, 5))}, TypeError, "a must be a floating point tensor, got torch.int64"),
        ({"a": torch.randn(1, 3, 5, 5)}, ValueError, r"it must be \[K, 3, 3, 3\], since a has 3 channels"),
        ({"residual": torch.randn(1, 6, 5, 5).half()}, TypeError, "residual is torch.float16, a is torch.float32"),
        ({"weight2": torch.randn(4, 4, 1, 1)}, ValueError, r"weight2 has shape \[4, 4, 1, 1\]"),
        ({"weight2": torch.randn(4, 4, 3)}, ValueError, r"weight2 has shape \[4, 4, 3\]"),
        ({"weight2": torch.randn(5, 4, 3, 3), "scale2": torch.rand(5), "shift2": torch.rand(5)}, ValueError,
         "weight2 has 5 output channels, it must have a's 4"),
        ({"weight3": torch.randn(6, 5, 1, 1)}, ValueError, r"weight3 .* since weight2's output has 4 channels"),
        ({"weight3": torch.randn(6, 4, 1, 1).half()}, TypeError, "weight3 is torch.float16, a is torch.float32"),
        ({"scale2": torch.rand(128)}, ValueError, r"scale2 has shape \[128\], weight2 has 4 output channels"),
        ({"shift3": torch.rand(6, 1)}, ValueError, r"shift3 has shape \[6, 1\]"),
        ({"scale3": torch.rand(6).half()}, TypeError, r"scale3 is torch\.float16; it must be torch\.float32"),
        ({"residual": torch.rand(1, 6, 4, 5)}, ValueError, r"residual is \[1, 6, 4, 5\], the output is \[1, 6, 5, 5\]"),
        ({"stride": 0}, ValueError, "stride must be two ints >= 1"),
        ({"stride": (1, 2, 3)}, ValueError, "stride must be an int or two ints"),
        ({"shortcut_stride": (0, 1)}, ValueError, "shortcut_stride must be two ints >= 1"),
        ({"scale_shortcut": torch.rand(6)}, ValueError, "given without weight_shortcut"),
        ({"weight_shortcut": torch.rand(6, 6, 1, 1)}, ValueError, "weight_shortcut needs scale_shortcut and"),
        ({"weight_shortcut": torch.rand(6, 5, 1, 1), "scale_shortcut": torch.rand(6), "shift_shortcut": torch.rand(6)},
         ValueError, r"weight_shortcut .* since residual has 6 channels"),
        ({"weight_shortcut": torch.rand(6, 6, 1, 1), "scale_shortcut": torch.rand(6), "shift_shortcut": torch.rand(6),
          "shortcut_stride": 2}, ValueError, r"projected with stride \[2, 2\] is \[1, 6, 3, 3\], the output is"),
        ({"shift1": torch.rand(6)}, ValueError, "scale1 or shift1 is given without weight1"),
        ({"weight1": torch.rand(3, 6, 1, 1)}, ValueError, "weight1 needs scale1 and shift1"),
        ({"weight1": torch.rand(3, 4, 1, 1), "scale1": torch.rand(3), "shift1": torch.rand(3)}, ValueError,
         r"weight1 has shape \[3, 4, 1, 1\]; it must be \[K, 6, 1, 1\], since weight3's output has 6 channels"),
        ({"weight3": torch.randn(6, 4, 1, 1, device="meta")}, ValueError, "weight3 is on meta, a is on cpu"),
        ({"a": torch.randn(1, 4, 0, 5)}, ValueError, "a is 0x5 pixels"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments, _ = in_dtype(problem(1, 4, (5, 5), 6), torch.float32)
    with pytest.raises(error, match=message):
        public(**{**arguments, **changes})


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("project", [None, 6])
def test_compiles_in_one_graph(dynamic: bool, project: int | None) -> None:
    arguments, _ = in_dtype(problem(2, 4, (9, 9), stride=2, project=project, following=5), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(public, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for got, want in zip(compiled(**arguments), public(**arguments), strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride()


@pytest.mark.parametrize("following", [None, 5])
def test_fake_tensors_have_the_real_strides(following: int | None) -> None:
    from torch._subclasses import FakeTensorMode

    arguments, _ = in_dtype(problem(3, 4, (9, 8), stride=2, project=3, following=following), torch.bfloat16)
    real = pair(public(**arguments))
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
        for got, want in zip(pair(public(**fake)), real, strict=True):
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


@pytest.mark.parametrize("following", [None, 16])
def test_prepared_keeps_its_own_constants(following: int | None) -> None:
    arguments, _ = in_dtype(problem(1, 8, (5, 5), project=4, following=following), torch.float32)
    data = {name: arguments[name] for name in ("a", "residual")}
    constant = {n: v for n, v in arguments.items() if n not in data and isinstance(v, Tensor)}
    frozen = ops.ALL["bottleneck_tail"].bind(**constant, dtype=torch.float32, backend="reference")
    assert frozen.backend == "reference"
    before = [t.clone() for t in pair(frozen(*data.values()))]
    constant["scale3"].mul_(2)
    assert all(torch.equal(x, y) for x, y in zip(pair(frozen(*data.values())), before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("project", [None, 24])
def test_cuda(dtype: torch.dtype, project: int | None) -> None:
    arguments = problem(2, 16, (13, 29), project=project, following=16)
    check({n: v.cuda() if isinstance(v, Tensor) else v for n, v in arguments.items()}, dtype)


def test_it_is_exported() -> None:
    assert rf.ops.bottleneck_tail is public
