"""The ten models against torchvision's with the same weights: structure, values, gradients, arguments and errors.

Tracing, export, hooks and edits of the parameters are in test_live_modules.py.
BatchNorm statistics and affine parameters are randomised, because fresh ones hide mistakes in the folding.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

import resnet_fast.models as models
from tests.networks import smooth
from tests.numerics import assert_obeys_error_rule

torchvision_models = pytest.importorskip("torchvision.models")

STATE_DICT_ENTRIES = {
    "resnet18": 122,
    "resnet34": 218,
    "resnet50": 320,
    "resnet101": 626,
    "resnet152": 932,
    "resnext50_32x4d": 320,
    "resnext101_32x8d": 626,
    "resnext101_64x4d": 626,
    "wide_resnet50_2": 320,
    "wide_resnet101_2": 626,
}
CHILDREN = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]


def randomise_batch_norm(model: nn.Module, seed: int = 0) -> None:
    """Random statistics and affine parameters; small factors at the end of a block keep 50 blocks in range."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty_like(like).uniform_(low, high, generator=generator)

    with torch.no_grad():
        for name, module in model.named_modules():
            if getattr(module, "running_var", None) is not None:
                last = name.endswith("bn3") or (name.endswith("bn2") and hasattr(model.layer1[0], "conv2"))
                module.running_mean.copy_(uniform(module.running_mean, -0.2, 0.2))
                module.running_var.copy_(uniform(module.running_var, 0.5, 2.0))
                module.weight.copy_(uniform(module.weight, *((0.2, 0.5) if last else (0.7, 1.3))))
                module.bias.copy_(uniform(module.bias, -0.2, 0.2))


@dataclass
class Pair:
    name: str
    ours: nn.Module
    theirs: nn.Module
    same_start: bool = True
    """Whether both had the same parameters when made from the same seed."""


def make_pair(name: str, **config: object) -> Pair:
    torch.manual_seed(0)
    theirs = torchvision_models.get_model(name, **config)
    torch.manual_seed(0)
    ours = models.get_model(name, **config)
    state = ours.state_dict()
    same_start = all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items())
    randomise_batch_norm(theirs)
    ours.load_state_dict(theirs.state_dict())
    return Pair(name, ours.eval(), theirs.eval(), same_start)


@pytest.fixture(scope="module", params=STATE_DICT_ENTRIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    """One pair at a time: pytest runs the tests of one parameter together, and two wide models are a gigabyte."""
    return make_pair(request.param)


@pytest.fixture(scope="module")
def small() -> Pair:
    return make_pair("resnet18")


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


# Structure


def test_state_dict_and_modules_are_torchvisions(pair: Pair) -> None:
    ours, theirs = pair.ours.state_dict(), pair.theirs.state_dict()
    assert list(ours) == list(theirs)
    assert len(ours) == STATE_DICT_ENTRIES[pair.name]
    assert [name for name, _ in pair.ours.named_modules()] == [name for name, _ in pair.theirs.named_modules()]
    assert [name for name, _ in pair.ours.named_children()] == CHILDREN
    for attribute in ("inplanes", "dilation", "groups", "base_width"):
        assert getattr(pair.ours, attribute) == getattr(pair.theirs, attribute)
    assert type(pair.ours.layer1[0]).expansion == type(pair.theirs.layer1[0]).expansion
    assert str(pair.ours) == str(pair.theirs)


def test_same_seed_gives_the_same_initial_parameters(pair: Pair) -> None:
    assert pair.same_start


@pytest.mark.parametrize("name", STATE_DICT_ENTRIES)
def test_signature(name: str) -> None:
    signature = inspect.signature(getattr(models, name))
    reference = inspect.signature(getattr(torchvision_models, name))
    assert [(p.name, p.kind, p.default) for p in signature.parameters.values()] == [
        (p.name, p.kind, p.default) for p in reference.parameters.values()
    ]
    assert models.list_models() == list(STATE_DICT_ENTRIES)


# Values


def check_eval_outputs(pair: Pair, *shape: int) -> None:
    x = images(*shape)
    expected = pair.theirs(x)
    assert expected.isfinite().all()
    for layout in (torch.contiguous_format, torch.channels_last):
        assert relative(pair.ours(x.contiguous(memory_format=layout)), expected) <= 1e-5, layout


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_eval_outputs(pair: Pair, batch: int) -> None:
    check_eval_outputs(pair, batch, 3, 97, 131)


@pytest.mark.parametrize("pair", ["resnet18", "resnet50", "resnext50_32x4d"], indirect=True)
@torch.no_grad()
def test_eval_outputs_of_usual_images(pair: Pair) -> None:
    """Of one network of each kind: the others have more of the same layers."""
    check_eval_outputs(pair, 1, 3, 224, 224)


@torch.no_grad()
def test_empty_batch(pair: Pair) -> None:
    for size in ((224, 224), (97, 131)):
        x = images(0, 3, *size)
        expected = pair.theirs(x)
        for layout in (torch.contiguous_format, torch.channels_last):
            actual = pair.ours(x.contiguous(memory_format=layout))
            assert actual.shape == expected.shape == (0, 1000)
            assert actual.dtype == expected.dtype


def _train_step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """One step's outputs, parameter gradients and BatchNorm buffers; the model is left as it was."""
    before = {key: value.clone() for key, value in model.named_buffers()}
    model.train()
    model.zero_grad(set_to_none=True)
    output = model(x)
    cotangent = images(*output.shape, seed=3).to(output.dtype)
    (output * cotangent).sum().backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        for key, value in model.named_buffers():
            value.copy_(before[key])
    return output.detach(), gradients, buffers


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_train_step(name: str) -> None:
    """Outputs, all parameter gradients and the updated running statistics obey the error rule."""
    made = make_pair(name)
    for model in (made.ours, made.theirs):
        smooth(model).to(memory_format=torch.channels_last)
    x = images(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    ours, theirs = _train_step(made.ours, x), _train_step(made.theirs, x)
    exact = _train_step(made.theirs.double(), x.double())
    assert list(ours[1]) == list(theirs[1]) == [key for key, _ in made.theirs.named_parameters()]
    assert list(ours[2]) == list(theirs[2])
    assert_obeys_error_rule(ours[0], theirs[0], exact[0], "output")
    largest = max(gradient.norm() for gradient in exact[1].values())
    for what, mine, reference, double in (
        ("gradient", ours[1], theirs[1], exact[1]),
        ("buffer", ours[2], theirs[2], exact[2]),
    ):
        for key, value in mine.items():
            if not value.is_floating_point():
                assert torch.equal(value, reference[key]), key
            elif what == "gradient" and double[key].norm() < 1e-10 * largest:
                assert value.norm() <= 1e-4 * largest, key  # a shift that the next norm takes away: rounding alone
            else:
                assert_obeys_error_rule(value, reference[key], double[key], f"{what} of {key}")


@pytest.mark.parametrize("name", STATE_DICT_ENTRIES)
def test_train_step_reaches_every_parameter(name: str) -> None:
    model = models.get_model(name, num_classes=2)
    _, gradients, _ = _train_step(model, images(2, 3, 33, 33))
    assert list(gradients) == [key for key, _ in model.named_parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@torch.no_grad()
def test_children_can_be_called_one_by_one(small: Pair) -> None:
    x = images(1, 3, 97, 131)
    out = x
    for name, child in small.ours.named_children():
        out = torch.flatten(child(out), 1) if name == "avgpool" else child(out)
    assert relative(out, small.theirs(x)) <= 1e-5
    assert torch.equal(small.ours._forward_impl(x), small.ours(x))


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "maxpool", nn.Identity()),
        lambda model: setattr(model, "fc", nn.Identity()),
        lambda model: setattr(model, "fc", nn.Sequential(nn.Dropout(), nn.Linear(512, 10, bias=False))),
        lambda model: setattr(model, "conv1", nn.Conv2d(1, 64, 3, padding=1)),
        lambda model: setattr(model, "avgpool", nn.AdaptiveMaxPool2d(1)),
        lambda model: setattr(model.layer1[0], "relu", nn.SiLU()),
        lambda model: setattr(model, "layer4", nn.Identity()) or setattr(model, "fc", nn.Linear(256, 3)),
    ],
    ids=["no maxpool", "no fc", "other fc", "grey conv1", "max avgpool", "SiLU", "no layer4"],
)
def test_replaced_layers_run(change: Callable[[nn.Module], None]) -> None:
    both = make_pair("resnet18")
    torch.manual_seed(2)
    change(both.theirs)
    torch.manual_seed(2)
    change(both.ours)
    both.ours.eval()
    both.theirs.eval()
    x = images(2, both.ours.conv1.in_channels, 33, 47)
    assert relative(both.ours(x), both.theirs(x)) <= 1e-5


# Arguments


@pytest.mark.parametrize(
    ("name", "dilate"), [("resnet50", (False, True, True)), ("resnext50_32x4d", [True, False, True])]
)
@torch.no_grad()
def test_replace_stride_with_dilation(name: str, dilate: list[bool]) -> None:
    both = make_pair(name, replace_stride_with_dilation=dilate, num_classes=11)
    assert both.ours.dilation == both.theirs.dilation == 4
    x = images(1, 3, 65, 81)
    assert relative(both.ours(x), both.theirs(x)) <= 1e-5
    assert relative(both.ours.layer4[0].conv2.weight, both.theirs.layer4[0].conv2.weight) == 0
    assert both.ours.layer4[1].conv2.dilation == both.theirs.layer4[1].conv2.dilation


def _frozen() -> Callable[..., nn.Module]:
    from torchvision.ops.misc import FrozenBatchNorm2d

    return FrozenBatchNorm2d


class _ScaledBatchNorm(nn.BatchNorm2d):
    """A subclass that computes something else: it must not be taken for a BatchNorm2d."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0.75


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels)


@pytest.mark.parametrize(
    "norm",
    [_frozen, lambda: _ScaledBatchNorm, lambda: _group_norm, lambda: nn.InstanceNorm2d],
    ids=["FrozenBatchNorm2d", "subclass", "GroupNorm", "InstanceNorm2d"],
)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_norm_layer(name: str, norm: Callable[[], Callable[..., nn.Module]]) -> None:
    both = make_pair(name, norm_layer=norm(), num_classes=5)
    assert list(both.ours.state_dict()) == list(both.theirs.state_dict())
    assert both.ours._norm_layer is both.theirs._norm_layer
    x = images(2, 3, 65, 81)
    exact = copy.deepcopy(both.theirs).double()
    for training in (False, True):
        results = [model.train(training)(x.to(model.fc.weight.dtype)) for model in (both.ours, both.theirs, exact)]
        assert relative(results[0].detach(), results[1].detach()) <= 1e-5
    for result in results:
        result.square().sum().backward()
    ours, theirs, wanted = (model.layer2[0].conv2.weight.grad for model in (both.ours, both.theirs, exact))
    # InstanceNorm over a few pixels: torch's own float32 gradient is 2 % off.
    assert relative(ours, wanted) <= 2 * relative(theirs, wanted) + 1e-4


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_residual(name: str, last: str) -> None:
    torch.manual_seed(0)
    ours = models.get_model(name, zero_init_residual=True)
    torch.manual_seed(0)
    theirs = torchvision_models.get_model(name, zero_init_residual=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not getattr(ours.layer1[0], last).weight.any()
    assert ours.layer1[0].bn1.weight.all()
    plain = models.get_model(name, zero_init_residual=True, norm_layer=nn.InstanceNorm2d)
    assert getattr(plain.layer1[0], last).weight is None


def test_groups_and_width() -> None:
    both = make_pair("resnet50", groups=2, width_per_group=32)
    x = images(1, 3, 65, 81)
    with torch.no_grad():
        assert relative(both.ours(x), both.theirs(x)) <= 1e-5


@pytest.mark.parametrize("library", [models, torchvision_models], ids=["ours", "torchvision"])
@pytest.mark.parametrize(
    ("name", "config", "error"),
    [
        ("resnet50", {"replace_stride_with_dilation": [True]}, ValueError),
        ("resnet50", {"replace_stride_with_dilation": [False] * 4}, ValueError),
        ("resnet18", {"groups": 2}, ValueError),
        ("resnet18", {"width_per_group": 128}, ValueError),
        ("resnet34", {"replace_stride_with_dilation": [False, True, False]}, NotImplementedError),
        ("resnext50_32x4d", {"groups": 16}, ValueError),
        ("wide_resnet50_2", {"width_per_group": 64}, ValueError),
        ("resnet18", {"classes": 10}, TypeError),
        ("resnet19", {}, ValueError),
    ],
)
def test_wrong_arguments(library: object, name: str, config: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        library.get_model(name, **config)  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("library", [models, torchvision_models], ids=["ours", "torchvision"])
@pytest.mark.parametrize(
    ("arguments", "keywords", "warned"),
    [
        ((None,), {}, ["positional"]),
        ((None, False), {}, ["positional"]),
        ((False,), {}, ["positional", "deprecated"]),
        ((), {"pretrained": False}, ["pretrained", "deprecated"]),
        ((), {"weights": False}, ["deprecated"]),
        ((), {"weights": None, "progress": False}, []),
    ],
)
def test_old_ways_to_call(library: object, arguments: tuple, keywords: dict, warned: list[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = library.resnet18(*arguments, **keywords, num_classes=2)  # type: ignore[attr-defined]
    assert model.fc.out_features == 2
    assert len(caught) == len(warned)
    assert all(word in str(item.message) for word, item in zip(warned, caught, strict=True))
    assert all(item.category is UserWarning for item in caught)


def test_positional_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="at most weights and progress"):
        models.resnet18(None, True, 10)
    with pytest.raises(TypeError, match="weights both as"):
        models.resnet18(None, weights=None)


# Wrong images


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.zeros(3, 32, 32),
            ValueError,
            r"\[N, 3, H, W\], got 3-D torch.float32 of shape \[3, 32, 32\].*unsqueeze",
        ),
        (torch.zeros(3), ValueError, r"got 1-D"),
        (torch.zeros(2, 1, 32, 32), ValueError, r"got torch.float32 of shape \[2, 1, 32, 32\]"),
        (torch.zeros(2, 32, 32, 3), ValueError, r"NHWC.*permute"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, r"got torch.uint8 .*x\.float\(\) / 255"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), TypeError, r"got torch.int64"),
        ([[1.0]], TypeError, r"got list"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_wrong_images(small: Pair, x: object, error: type[Exception], message: str, training: bool) -> None:
    small.ours.train(training)
    try:
        with pytest.raises(error, match=message) as caught:
            small.ours(x)
    finally:
        small.ours.eval()
    assert "\n" not in str(caught.value)


# torchvision's registry


@pytest.mark.parametrize("name", STATE_DICT_ENTRIES)
def test_torchvisions_registry_takes_the_functions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    api = torchvision_models._api
    builder = getattr(models, name)
    theirs = api.get_model_weights(name)
    assert api.get_model_weights(builder) is theirs is models.get_model_weights(builder)
    monkeypatch.setattr(api, "BUILTIN_MODELS", {})
    assert api.register_model()(builder) is builder
    assert api.list_models() == [name] and api.get_model_builder(name) is builder
    assert api.get_model_weights(name) is theirs


def test_the_weights_of_a_function_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.weights, "_torchvision_models", lambda: None)
    annotation = inspect.signature(models.resnet34).parameters["weights"].annotation
    assert get_args(annotation)[0] is models.get_model_weights("resnet34")
    assert issubclass(get_args(annotation)[0], models.weights.WeightsEnum)
    assert repr(annotation).startswith("ResNet34_Weights | str | ")
    assert pickle.loads(pickle.dumps(models.resnet34)) is models.resnet34
    assert get_type_hints(models.resnet34)["return"] is models.ResNet
