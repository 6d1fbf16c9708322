"""The small residual network: layers, initial values and padding as TensorFlow's original has them, fused or not."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.benchmarking.peers import plain
from resnet_fast.models import ResidualNetwork
from resnet_fast.models.residual_network import MaxPool2dSame
from resnet_fast.nn.conv_act import conv_act, same_padding
from tests.networks import watch_ops
from tests.numerics import assert_obeys_error_rule

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning"),
]
BLOCKS = [(128, 32), (256, 64), (512, 128), (1024, 256)]


@pytest.fixture(scope="module")
def lively() -> ResidualNetwork:
    """With weights large enough that every layer shows in the answer; not to be changed."""
    torch.manual_seed(0)
    model = rf.residual_network().eval()
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        scale = math.sqrt(1.5 / fan_in) if "weight" in name else 0.1
        parameter.data = torch.randn_like(parameter) * scale
    return model


@pytest.fixture
def network(lively: ResidualNetwork) -> ResidualNetwork:
    return copy.deepcopy(lively)


# --- an implementation that shares no line with the package's


def tensorflow_starts(size: int, kernel: int, stride: int) -> list[int]:
    """Where each SAME window begins, in the padding or in the image, by TensorFlow's documentation."""
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    return [output * stride - total // 2 for output in range(outputs)]


def tensorflow_windows(size: int, kernel: int, stride: int) -> list[list[int]]:
    """Which pixels each SAME window sees, padding left out."""
    starts = tensorflow_starts(size, kernel, stride)
    return [[i for i in range(start, start + kernel) if 0 <= i < size] for start in starts]


def tensorflow_pool(x: Tensor) -> Tensor:
    rows, columns = (tensorflow_windows(size, 3, 2) for size in x.shape[2:])
    pooled = [[x[:, :, row][:, :, :, column].flatten(2).max(2).values for column in columns] for row in rows]
    return torch.stack([torch.stack(line, -1) for line in pooled], -2)


def tensorflow_conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """A SAME convolution as sums over windows: slow, float64, no padding function."""
    kernel = weight.shape[-1]
    around = x.new_zeros(*x.shape[:2], *(size + 2 * kernel for size in x.shape[2:]))  # more than any padding
    around[:, :, kernel:-kernel, kernel:-kernel] = x
    rows, columns = (tensorflow_starts(size, kernel, stride) for size in x.shape[2:])
    lines = []
    for row in rows:
        windows = [around[:, :, row + kernel :, column + kernel :][:, :, :kernel, :kernel] for column in columns]
        lines.append(torch.stack([torch.einsum("ncij,kcij->nk", w, weight) + bias for w in windows], -1))
    return torch.stack(lines, -2)


def reference(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The whole network in float64, written from its description."""
    s = {name: tensor.double() for name, tensor in state.items()}
    x = tensorflow_conv(x.double(), s["conv1.weight"], s["conv1.bias"], 2).clamp(min=0)
    x = F.conv2d(tensorflow_pool(x), s["conv2.weight"], s["conv2.bias"])
    for block in range(4):
        for repeat in range(3):
            y = x
            for name, padding in (("conv_in", 0), ("conv_bottleneck", 1), ("conv_out", 0)):
                key = f"block_{block}.repeat_{repeat}.{name}"
                y = F.conv2d(y, s[f"{key}.weight"], s[f"{key}.bias"], padding=padding).clamp(min=0)
            x = y + x
        if block < 3:
            x = F.conv2d(x, s[f"block_{block}.conv_upscale.weight"])
    return x.mean((2, 3)) @ s["linear.weight"].T


# --- the description


def test_parameters_and_which_have_a_bias() -> None:
    for outputs, channels in ((10, 1), (7, 3)):
        model = rf.residual_network(outputs, channels)
        count = 64 * (49 * channels + 1) + 128 * (64 + 1) + 1024 * outputs
        for filters, b in BLOCKS:
            count += 3 * (b * (filters + 1) + b * (9 * b + 1) + filters * (b + 1))
        count += 128 * 256 + 256 * 512 + 512 * 1024
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        without = {name for name, module in model.named_modules() if getattr(module, "bias", 0) is None}
        assert without == {"linear", *(f"block_{i}.conv_upscale" for i in range(3))}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert len(rf.models.list_models()) == 10


def test_initial_values() -> None:
    """A normal cut at two sigma has a standard deviation of 0.8796 sigma."""
    torch.manual_seed(3)
    model = rf.residual_network()
    drawn = {name: parameter.detach() for name, parameter in model.named_parameters() if name != "linear.weight"}
    everything = torch.cat([tensor.flatten() for tensor in drawn.values()]).double()
    error = 0.02 / math.sqrt(everything.numel())
    assert everything.abs().max() <= 0.04 and (everything.abs() > 0.039).any()
    assert abs(everything.mean()) < 5 * error and abs(everything.std() - 0.02 * 0.87963) < 5 * error
    biases = torch.cat([tensor for name, tensor in drawn.items() if name.endswith("bias")])
    assert abs(biases.std() - 0.0176) < 5 * 0.02 / math.sqrt(len(biases)) and biases.abs().max() > 0.038
    linear = model.linear.weight.detach()
    assert abs(linear.std() - 0.02) < 5 * 0.02 / math.sqrt(linear.numel()) and linear.abs().max() > 0.05
    torch.manual_seed(3)
    again = rf.residual_network()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("size", range(1, 33))
def test_same_padding_by_its_definition(size: int) -> None:
    for kernel, stride in ((7, 2), (3, 2), (3, 1), (1, 1), (5, 3)):
        windows = tensorflow_windows(size, kernel, stride)
        before, after = same_padding(size, kernel, stride)
        padded = [0] * before + [1] * size + [0] * after
        found = [sum(padded[start : start + kernel]) for start in range(0, len(padded) - kernel + 1, stride)]
        assert found == [len(window) for window in windows]
    assert (same_padding(28, 7, 2), same_padding(14, 3, 2)) == ((2, 3), (0, 1))


@pytest.mark.parametrize("size", [(14, 14), (13, 14), (14, 13), (7, 5), (1, 1), (2, 1), (3, 8)])
def test_pool_padding_never_wins_and_nan_does(size: tuple[int, int]) -> None:
    x = -1 - torch.rand(2, 3, *size)  # all negative: a padding of zeros would win
    assert torch.equal(MaxPool2dSame(3, 2)(x), tensorflow_pool(x))
    x[0, 0, -1, -1] = math.nan
    x[1, 1, 0, 0] = -math.inf
    assert torch.equal(MaxPool2dSame(3, 2)(x).isnan(), tensorflow_pool(x).isnan())
    assert MaxPool2dSame(3, 2)(x)[0, 0, -1, -1].isnan()


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((28, 28), torch.float32),
        ((27, 27), torch.bfloat16),
        ((9, 12), torch.float32),
        ((9, 12), torch.bfloat16),
        ((1, 2), torch.float32),
    ],
)
def test_answers_obey_the_error_rule(network: ResidualNetwork, size: tuple[int, int], dtype: torch.dtype) -> None:
    model = network.to(dtype)
    x = torch.randn(2, 1, *size).to(dtype)
    exact = reference(model.state_dict(), x)
    layers = plain(model)
    assert list(layers.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        ordinary = layers(x)
        assert_obeys_error_rule(ordinary, ordinary, exact)
        assert (ordinary - exact).norm() < 0.05 * exact.norm()  # or the rule would judge by a wrong reference
        assert_obeys_error_rule(model(x), ordinary, exact, "without gradients")
        assert_obeys_error_rule(rf.optimize(model)(x), ordinary, exact, "optimize")
    assert_obeys_error_rule(model(x).detach(), ordinary, exact, "with gradients")


def test_gradients(network: ResidualNetwork) -> None:
    x = torch.randn(2, 1, 15, 14)
    direction = torch.randn(2, 10)

    def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        (model(x) * direction.to(x.dtype)).sum().backward()
        return {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}

    ours = gradients(network, x)
    layers, wide = plain(network), plain(network).double()
    theirs, exact = gradients(layers, x), gradients(wide, x.double())
    assert set(ours) == set(theirs) and len(ours) == 81
    for name in ours:
        assert_obeys_error_rule(ours[name], theirs[name], exact[name], name)


# --- images


def test_flat_images(network: ResidualNetwork) -> None:
    x = torch.rand(3, 784)
    assert torch.equal(network(x), network(x.view(3, 1, 28, 28)))
    assert network(torch.rand(0, 784)).shape == network(torch.rand(0, 1, 28, 28)).shape == (0, 10)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.rand(2, 783), ValueError, r"square, \[N, D \* D\]; got \[2, 783\]"),
        (torch.rand(2, 0), ValueError, "square"),
        (torch.rand(2, 3, 28, 28), ValueError, r"shape \[N, 1, H, W\]"),
        (torch.rand(2, 28, 28), ValueError, "unsqueeze"),
        (torch.rand(2, 1, 0, 28), ValueError, "at least 1x1"),
        (torch.zeros(2, 784, dtype=torch.uint8), TypeError, "uint8"),
        (torch.rand(2, 784).double(), TypeError, "float64"),
        ([[0.5] * 784], TypeError, "list"),
    ],
)
def test_wrong_images(network: ResidualNetwork, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        network(x)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="flat batch"):
        rf.residual_network(in_channels=3)(torch.rand(2, 784))
    for arguments in ({"num_outputs": 0}, {"in_channels": -1}, {"num_outputs": 2.0}, {"num_outputs": True}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} is"):
            rf.residual_network(**arguments)


# --- what decides between the op and the layers


def test_the_op_runs_exactly_where_no_gradient_is_wanted(
    network: ResidualNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = watch_ops(monkeypatch)
    x = torch.rand(1, 1, 8, 8)
    convolutions = 2 + 36 + 3
    with torch.no_grad():
        network(x)
    assert [name for name, _ in ran].count("conv_bn_act") == convolutions
    network(x)
    assert [name for name, _ in ran].count("conv_bn_act") == convolutions
    network.requires_grad_(False)(x)
    assert [name for name, _ in ran].count("conv_bn_act") == 2 * convolutions
    network(x.requires_grad_())
    assert [name for name, _ in ran].count("conv_bn_act") == 2 * convolutions


def test_edits_show_at_once(network: ResidualNetwork) -> None:
    x = torch.rand(2, 1, 12, 12)
    with torch.no_grad():
        before = network(x)
        network.block_1.repeat_0.conv_out.bias.data.add_(0.5)
        network.block_2.repeat_1.conv_in.weight[3] *= 2
        after = network(x)
        exact = reference(network.state_dict(), x)
        assert_obeys_error_rule(after, plain(network)(x), exact)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["conv1", "relu", "pool", "conv2", "block_0", "block_1.repeat_2",
                                  "block_2.repeat_0.conv_out", "block_2.repeat_0.relu", "block_2.conv_upscale",
                                  "avgpool", "linear"])  # fmt: skip
def test_hooks_fire_and_count(network: ResidualNetwork, name: str) -> None:
    x = torch.rand(2, 1, 12, 12)
    seen: list[Tensor] = []
    module = network.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, out: seen.append(out.detach().clone()))
    with torch.no_grad():
        answer = network(x)
    fired = len(seen)
    assert fired == (3 if name == "block_2.repeat_0.relu" else 1)
    handle.remove()
    module.register_forward_hook(lambda m, args, out: out * 2)
    with torch.no_grad():
        assert (network(x) - answer).abs().max() > 1e-4
    assert len(seen) == fired


class Doubling(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "layer",
    [Doubling(8, 4, 3), nn.Conv2d(8, 4, 3, padding_mode="reflect", padding=1), nn.Conv2d(8, 4, 3, padding="same")],
)
@pytest.mark.parametrize("act", [nn.LeakyReLU(), nn.ReLU(), None])
def test_layers_that_cannot_be_fused_run_as_they_are(layer: nn.Module, act: nn.Module | None) -> None:
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        expected = layer(x) if act is None else act(layer(x))
        assert torch.equal(conv_act(x, layer, act, residual=expected), expected + expected)


def test_torch_func_and_autocast(network: ResidualNetwork) -> None:
    x = torch.rand(2, 1, 8, 8)
    _, tangent = torch.func.jvp(network, (x,), (torch.ones_like(x),))
    step = 1e-3
    with torch.no_grad():
        difference = (network.double()(x.double() + step) - network(x.double() - step)) / (2 * step)
        assert (tangent - difference).norm() < 1e-2 * difference.norm()
        network.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fast = network(x)
        assert fast.dtype is torch.bfloat16
        assert (fast - network(x)).norm() < 0.05 * network(x).norm()


# --- torch's own tools


def test_optimize_fuses_everything_but_padding_and_pool(network: ResidualNetwork) -> None:
    optimized = rf.optimize(network)
    rows = optimized.report().rows
    assert [row.kind for row in rows if not row.fused] == ["pad", "max_pool2d"]
    x = torch.rand(2, 1, 28, 28)
    x[0, 0, 3, 3], x[1, 0, 5, 5] = math.nan, math.inf
    with torch.no_grad():
        ordinary = plain(network)(x)
    assert torch.equal(optimized(x).isnan(), ordinary.isnan()) and ordinary.isnan().any()
    rows_of_pixels = torch.rand(2, 784)  # which the network takes too: its own code runs
    with torch.no_grad():
        assert torch.equal(optimized(rows_of_pixels), network(rows_of_pixels))
    with pytest.raises(ValueError, match=r"\[N, 1, H, W\], got torch.float32 of shape \[2, 3, 28, 28\]"):
        optimized(torch.rand(2, 3, 28, 28))


@pytest.mark.parametrize("grad", [True, False])
def test_compile_without_a_break(network: ResidualNetwork, grad: bool) -> None:
    x = torch.rand(2, 1, 12, 12) if grad else torch.rand(2, 144)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=not grad)
    with torch.set_grad_enabled(grad):
        assert torch.allclose(compiled(x), network(x), rtol=1e-4, atol=1e-5)


def test_export(network: ResidualNetwork) -> None:
    x = torch.rand(2, 1, 12, 12)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},))
        more = torch.rand(5, 1, 12, 12)
        assert torch.allclose(program.module()(more), network(more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: _through_a_file(m)]
)
def test_copies_are_independent(network: ResidualNetwork, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    x = torch.rand(2, 1, 12, 12)
    with torch.no_grad():
        answer = network(x)
        twin = duplicate(network)
        assert torch.equal(twin(x), answer)
        twin.conv2.weight.mul_(2)
        assert torch.equal(network(x), answer) and not torch.equal(twin(x), answer)


def _through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = rf.residual_network().eval()
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin
