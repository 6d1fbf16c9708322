"""The proof that no NaN can reach a ReLU: what it covers, what it leaves to guards, and that answers are torch's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast import backends
from resnet_fast.graph import OptimizedModule, finite, optimize
from tests.networks import Lambda, conv_bn, randomise

EXAMPLE = torch.empty(1, 4, 12, 12)


def blocks(count: int, gain: float = 1.0) -> nn.Module:
    """Residual blocks whose weights multiply magnitudes by about ``gain`` each."""

    def forward(self: Any, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = (block(x) + x).relu()
        return x

    model = Lambda(
        forward, blocks=nn.ModuleList(nn.Sequential(*conv_bn(), nn.ReLU(), *conv_bn()) for _ in range(count))
    )
    randomise(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= gain**0.5
    return model


def guards(fused: OptimizedModule) -> int:
    return sum(node.target == "resnet_fast_guard" for node in fused.graph_module.graph.nodes)


def proved(fused: OptimizedModule) -> list[bool]:
    return [module.no_nan for module in fused.graph_module.modules() if getattr(module, "op", "") == "conv_bn_act"]


needs_onednn = pytest.mark.skipif(bool(backends.available()["onednn"]), reason=backends.available()["onednn"])


def test_the_bound_covers_every_term() -> None:
    assert finite._after(2.0, 1.0, [3.0]) >= 7.0
    assert finite._after(2.0, 1.0, [3.0, 5.0]) >= 12.0


@pytest.fixture(autouse=True)
def without_the_engine() -> Iterator[None]:
    """Only oneDNN's ReLU needs a proof."""
    with backends.use("auto" if backends.available()["onednn"] else "onednn"):
        yield


@needs_onednn
def test_few_guards_prove_many_layers() -> None:
    fused = optimize(blocks(4), example_inputs=EXAMPLE)
    assert proved(fused) == [True] * 8
    assert guards(fused) == 1
    deep = optimize(blocks(40, 10.0), example_inputs=EXAMPLE)
    assert proved(deep) == [True] * 80
    assert 2 <= guards(deep) <= 20
    assert not any(proved(optimize(blocks(1), example_inputs=EXAMPLE, backend="reference")))
    assert not any(proved(optimize(blocks(1), example_inputs=EXAMPLE, dtype=torch.float64)))


@needs_onednn
def test_an_average_that_divides_by_one_is_a_sum() -> None:
    """Larger than what it reads, so that what overflows behind it must not count as proved."""
    model = Lambda(
        lambda self, x: self.c(self.b(F.avg_pool2d(self.a(x).relu(), 64, 64, 0, False, True, 1))).relu(),
        a=nn.Conv2d(1, 2, 1, bias=False),
        b=nn.Conv2d(2, 2, 1, bias=False),
        c=nn.Conv2d(2, 1, 1, bias=False),
    )
    with torch.no_grad():
        model.a.weight.fill_(8e21)
        model.b.weight.copy_((4e7 * torch.eye(2)).view(2, 2, 1, 1))
        model.c.weight.copy_(torch.tensor([1.0, -1.0]).view(1, 2, 1, 1))
    x = torch.full((1, 1, 64, 64), 2.0**20)
    assert model.eval()(x).isnan().all()
    assert optimize(model, example_inputs=x)(x).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gain", [1.0, 1e8, 1e18])
def test_what_is_not_finite_comes_out_as_in_torch(gain: float, dtype: torch.dtype) -> None:
    """Whatever overflows and wherever: NaN and infinities are where plain torch has them."""
    model = blocks(6, gain)
    fused = optimize(model, example_inputs=EXAMPLE, dtype=dtype)
    plain = copy.deepcopy(model).to(dtype)
    for value in (1.0, 1e5, 1e9, 1e30, 3e38, torch.inf, -torch.inf, torch.nan):
        x = torch.randn(3, 4, 9, 8)
        x[0, 1, 2, 3] = value
        x[1] *= min(value, 3e38) if value > 0 else 1.0
        x = x.to(dtype).float()
        with torch.no_grad():
            expected = plain(x.to(dtype))
        actual = fused(x).to(dtype)
        if dtype is torch.float32 or gain == 1.0:
            assert torch.equal(actual.isnan(), expected.isnan()), value
            assert torch.equal(actual.isinf(), expected.isinf()), value
        both = torch.isfinite(expected) & torch.isfinite(actual)
        assert (actual - expected)[both].double().norm() <= 0.1 * expected[both].double().norm() + 1e-30, value


@needs_onednn
def test_weights_that_are_not_finite_prove_nothing() -> None:
    model = blocks(3)
    with torch.no_grad():
        model.blocks[1][0].weight[0, 0, 0, 0] = float("inf")
        model.blocks[2][1].bias[1] = float("nan")
    fused = optimize(model, example_inputs=EXAMPLE)
    assert proved(fused)[2] is False
    assert proved(fused)[4] is False
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(fused(x).isnan(), model(x).isnan())


@needs_onednn
def test_loaded_constants_are_proved_anew() -> None:
    fused, other = (optimize(blocks(6, gain), example_inputs=EXAMPLE) for gain in (1.0, 1e8))
    before = guards(fused)
    fused.load_state_dict(other.state_dict())
    assert not any(proved(fused))
    x = torch.full((1, 4, 8, 8), 1e30)
    fused(x)
    assert guards(fused) == guards(other) > before
    assert torch.equal(fused(x).isnan(), other(x).isnan())
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert proved(copied) == proved(other)
        assert torch.equal(copied(x).isnan(), other(x).isnan())


@needs_onednn
def test_graphs_that_write_in_place_prove_nothing() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        z = self.b(y).relu()
        z[:, 0] = float("nan")
        return self.c(z).relu()

    fused = check_nan(Lambda(forward, a=conv_bn(), b=conv_bn(), c=conv_bn()))
    assert proved(fused) == [False] * 3


def check_nan(model: nn.Module) -> OptimizedModule:
    randomise(model)
    fused = optimize(model, example_inputs=EXAMPLE)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        assert torch.equal(fused(x).isnan(), model(x).isnan())
    return fused


@needs_onednn
def test_unknown_layers_are_measured_behind() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.log(self.a(x).relu() - 1)  # NaN and -inf
        return self.b(self.c(y).relu()).relu()

    fused = check_nan(Lambda(forward, a=conv_bn(), b=conv_bn(), c=conv_bn()))
    assert proved(fused) == [True] * 3
    assert guards(fused) == 2


def same_nan(model: nn.Module, fused: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected, actual = model(x), fused(x)
    assert expected.isnan().any(), "the case must make NaN in plain torch"
    assert torch.equal(actual.isnan(), expected.isnan())


def signs(channels: int) -> nn.Conv2d:
    """A convolution that subtracts its second half of channels from the first."""
    conv = nn.Conv2d(channels, 2, 1, bias=False)
    with torch.no_grad():
        conv.weight.fill_(1.0)[:, channels // 2 :] = -1.0
    return conv


def test_a_window_in_the_padding_is_minus_infinity() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 2, 1), nn.ReLU(), nn.MaxPool2d(2, 1, padding=1, dilation=3), signs(2), nn.ReLU()
    ).eval()
    x = torch.rand(1, 2, 2, 2)
    same_nan(model, optimize(model, example_inputs=x), x)


def test_an_average_may_overflow_while_it_adds() -> None:
    first = nn.Conv2d(1, 4, 1, bias=False)
    with torch.no_grad():
        first.weight.fill_(5e29)
    model = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(2), signs(4), nn.ReLU()).eval()
    x = torch.full((1, 1, 128, 128), 1e6)
    same_nan(model, optimize(model, example_inputs=x), x)


@pytest.mark.parametrize("way", ["itself", "parent", "graph module", "unexpected key", "apply"])
def test_the_proof_does_not_outlive_the_constants(way: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), signs(2), nn.ReLU()).eval()
    x = torch.full((1, 1, 4, 4), 30.0)
    fused = optimize(model, example_inputs=x)
    fused(x)
    huge = copy.deepcopy(model)
    with torch.no_grad():
        huge[0].weight.fill_(1e38)
    state = optimize(huge, example_inputs=x).state_dict()
    if way == "itself":
        fused.load_state_dict(state)
    elif way == "parent":
        nn.Sequential(fused).load_state_dict({f"0.{key}": value for key, value in state.items()})
    elif way == "graph module":
        fused.graph_module.load_state_dict({key.partition(".")[2]: value for key, value in state.items()})
    elif way == "unexpected key":
        with pytest.raises(RuntimeError, match="other"):
            fused.load_state_dict({**state, "other": torch.zeros(1)})
    else:
        fused._apply(lambda t: t.clone().fill_(1e38) if t.dim() == 4 and t.shape[1] == 1 else t)
    same_nan(huge, fused, x)
