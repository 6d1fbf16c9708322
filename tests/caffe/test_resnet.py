"""Caffe's ResNets: the generated definitions against the published files, conversion to torchvision's keys and back."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.caffe import CaffeError, Net, deploy_prototxt, from_state_dict, prototxt, to_resnet, to_state_dict
from resnet_fast.caffe import definition as d
from resnet_fast.caffe.resnet import deploy_definition
from tests.caffe import files
from tests.numerics import assert_obeys_error_rule

PUBLISHED = os.environ.get("RESNET_FAST_PUBLISHED")
published = pytest.mark.skipif(not PUBLISHED, reason="RESNET_FAST_PUBLISHED names no folder with the published files")
DEPTHS = (50, 101, 152)
DIGESTS = {50: "9ac859827a2b0115", 101: "3eda5de23f96617e", 152: "2086452b3432d985"}
"""Of the published definitions."""
Edit = Callable[[d.Layer], d.Layer]


def digest(definition: d.Definition) -> str:
    """Of names, types, order, bottoms, tops and what layers compute."""
    lines = []
    for layer in definition.layers:
        p = layer.parameters
        told = repr(p) if not isinstance(p, d.BatchNorm) else p.use_global_stats
        lines.append(f"{layer.name} {layer.type} {layer.bottoms} {layer.tops} {told}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@published
@pytest.mark.parametrize("depth", DEPTHS)
def test_generated_is_published(depth: int) -> None:
    """Names, types, order, bottoms, tops and parameters."""
    file = Path(str(PUBLISHED)) / f"ResNet-{depth}-deploy.prototxt"
    assert prototxt.parse(deploy_prototxt(depth)) == prototxt.read(file)
    assert digest(prototxt.read(file)) == DIGESTS[depth]


@pytest.mark.parametrize("depth", DEPTHS)
def test_generated_is_what_it_was(depth: int) -> None:
    """As above, where the published files are not."""
    assert digest(prototxt.parse(deploy_prototxt(depth))) == DIGESTS[depth]


@pytest.mark.parametrize("depth", [18, 0, "50"])
def test_other_depths(depth: Any) -> None:
    with pytest.raises(ValueError, match="one of 50, 101, 152"):
        deploy_prototxt(depth)
    with pytest.raises(ValueError, match="one of 50, 101, 152"):
        from_state_dict({}, depth)


def shaped(definition: d.Definition) -> Net:
    """Without numbers in the large weights: quick."""
    with torch.device("meta"):
        net = Net(definition)
    for module in net.modules():
        if hasattr(module, "variance"):
            module.variance, module.mean, module.factor = (
                torch.ones_like(t, device="cpu") for t in (module.variance, module.mean, module.factor)
            )
        elif getattr(module, "bias", None) is not None:
            module.bias = nn.Parameter(torch.ones_like(module.bias, device="cpu"))
    return net


@pytest.fixture(scope="module")
def net() -> Net:
    return files.resnet(50)


def test_the_same_scores(net: Net) -> None:
    """ResNet-50 under torchvision's keys gives what the Caffe network gives, loaded or by ``to_resnet``."""
    model = rf.resnet50(stride_in_1x1=True, unpadded_pool=True)
    model.load_state_dict(to_state_dict(net))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        scores, made = model.eval()(x), to_resnet(net)
        same = net.blobs(x, ["fc1000"])["fc1000"]
        exact_net = Net(net.definition).eval().double()
        exact_net.load_state_dict(net.state_dict())
        exact = exact_net.blobs(x.double(), ["fc1000"])["fc1000"]
        assert_obeys_error_rule(scores, same, exact, "fc1000")
        assert not made.training
        assert torch.equal(made(x), scores)


def test_statistics_are_rounded_once(net: Net) -> None:
    state = to_state_dict(net)
    layer, conv = net.layer("bn_conv1"), net.layer("conv1")
    mean = layer.mean.double() / layer.factor.double() - conv.bias.detach().double()
    torch.testing.assert_close(state["bn1.running_mean"], mean.float(), rtol=6e-8, atol=0)
    other = net.layer("bn3b_branch2a")
    assert torch.equal(state["layer2.1.bn1.running_var"], (other.variance.double() / other.factor.double()).float())
    with torch.device("meta"):
        expected = rf.resnet50().state_dict()
    assert list(state) == list(expected)
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in expected.items()}
    assert all(value.dtype is expected[key].dtype for key, value in state.items())
    state["conv1.weight"].zero_()
    assert net.layer("conv1").weight.abs().sum() > 0, "copies"


def test_round_trip(net: Net) -> None:
    state = to_state_dict(net)
    back = from_state_dict(state, 50)
    assert not back.training
    assert back.layer("conv1").bias.abs().sum() == 0
    assert back.layer("bn_conv1").factor.item() == 1
    again = to_state_dict(back)
    assert list(again) == list(state)
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("depth", [101, 152])
def test_deeper_ones(depth: int) -> None:
    """Every key has the shape that the model has it in; numbers are ResNet-50's business."""
    with torch.device("meta"):
        state = getattr(rf, f"resnet{depth}")().state_dict()
    found = to_state_dict(shaped(prototxt.parse(deploy_prototxt(depth))))
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in state.items()}
    assert list(found) == list(state)


def changed(edits: dict[str, Edit], image: int = 224, channels: int = 3, classes: int = 1000) -> d.Definition:
    definition = deploy_definition(50, classes)
    layers = tuple(edits.get(layer.name, lambda layer: layer)(layer) for layer in definition.layers)
    inputs = (d.Input("data", (1, channels, image, image)),)
    return dataclasses.replace(definition, layers=layers, inputs=inputs)


def parameters(**values: Any) -> Edit:
    def edit(layer: d.Layer) -> d.Layer:
        return dataclasses.replace(layer, parameters=dataclasses.replace(layer.parameters, **values))  # type: ignore[type-var]

    return edit


def test_what_may_differ() -> None:
    """Classes and the classifier's name, the size of the input, eps, biases."""
    edits: dict[str, Edit] = {
        "bn2a_branch1": parameters(eps=1e-3),
        "bn2b_branch2a": parameters(eps=0.0, use_global_stats=None),
        "res2c_branch2a": parameters(bias_term=True),
        "fc7": lambda layer: dataclasses.replace(layer, name="dogs", tops=("scores",)),
        "prob": lambda layer: dataclasses.replace(layer, bottoms=("scores",)),
        "pool5": parameters(kernel=(10, 10)),
    }
    state = to_state_dict(shaped(changed(edits, image=320, classes=7)))
    assert state["fc.weight"].shape == (7, 2048)
    assert state["layer1.0.downsample.1.running_var"].unique().item() == pytest.approx(1 + 1e-3 - 1e-5, rel=1e-7)
    assert state["layer1.1.bn1.running_var"].unique().item() == pytest.approx(1 - 1e-5, rel=1e-7)
    assert state["layer1.2.bn1.running_mean"].unique().item() == 0
    without = to_state_dict(shaped(changed({"fc1000": parameters(bias_term=False)})))
    assert without["fc.bias"].shape == (1000,)


def test_factor_of_zero_and_eps() -> None:
    net = shaped(changed({}))
    net.layer("bn_conv1").factor.zero_()
    state = to_state_dict(net)
    assert state["bn1.running_var"].abs().sum() == 0
    assert state["bn1.running_mean"].unique().item() == -1  # nothing but the bias
    net = shaped(changed({"bn2a_branch2a": parameters(eps=0.0)}))
    net.layer("bn2a_branch2a").factor.zero_()
    with pytest.raises(CaffeError, match=r"'bn2a_branch2a'.*negative"):
        to_state_dict(net)


@pytest.mark.parametrize(
    ("edits", "kwargs", "message"),
    [
        ({"res3a_branch2a": parameters(stride=(1, 1)), "res3a_branch2b": parameters(stride=(2, 2))}, {},
         r"'res3a_branch2a' \(Convolution\).*ResNet-50: stride 1, 1, 2, 2 was expected"),
        ({"pool1": parameters(padding=(1, 1))}, {}, r"'pool1'.*padding 1, 1, 0, 0 was expected"),
        ({"pool1": parameters(method="AVE")}, {},
         r"'pool1'.*method 'AVE', 'MAX' was expected; ResNet-50, 101 and 152 as published are what can be converted"),
        ({"conv1_relu": parameters(negative_slope=0.1)}, {}, r"'conv1_relu'.*negative_slope 0.1"),
        ({"bn5c_branch2c": parameters(use_global_stats=False)}, {}, r"'bn5c_branch2c'.*use_global_stats False"),
        ({"bn5c_branch2c": parameters(scale_bias=True)}, {}, r"'bn5c_branch2c'.*scale_bias True, False was expected"),
        ({"res2a": lambda layer: dataclasses.replace(layer, bottoms=layer.bottoms[::-1])}, {}, r"'res2a'.*bottoms"),
        ({}, {"image": 256}, r"'pool5'.*kernel 7, 7 is not all of its input"),
        ({}, {"channels": 1}, r"input is 1x1x224x224"),
    ],
)  # fmt: skip
def test_what_is_no_published_resnet(edits: dict[str, Edit], kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(CaffeError, match=message):
        to_state_dict(shaped(changed(edits, **kwargs)))


def test_more_or_fewer_layers() -> None:
    definition = deploy_definition(50)
    more = dataclasses.replace(
        definition, layers=(*definition.layers, d.Layer("drop", d.Dropout(), ("prob",), ("drop",)))
    )
    with pytest.raises(CaffeError, match=r"'drop'.*no layer behind 'prob'"):
        to_state_dict(shaped(more))
    with pytest.raises(CaffeError, match="ends early: ResNet-50 has a layer 'fc1000'"):
        to_state_dict(shaped(dataclasses.replace(definition, layers=definition.layers[:-2])))


def test_state_dicts_that_do_not_fit() -> None:
    with torch.device("meta"):
        model = rf.resnet50(num_classes=7)
    state: dict[str, Tensor] = {key: torch.zeros(()).expand(value.shape) for key, value in model.state_dict().items()}
    assert from_state_dict(state, 50).definition.layers[-2].name == "fc7"
    for key, value, message in (
        ("layer1.0.bn1.weight", None, "'layer1.0.bn1.weight' is missing"),
        ("layer9.weight", torch.zeros(1), "has no 'layer9.weight'"),
        ("bn1.bias", torch.zeros(65), r"'bn1.bias' is torch.float32 of shape \[65\].*\[64\]"),
        ("bn1.bias", torch.zeros(64, dtype=torch.long), "'bn1.bias' is torch.int64"),
    ):
        edited = {**state, key: value}
        if value is None:
            del edited[key]
        with pytest.raises(CaffeError, match=message):
            from_state_dict(edited, 50)
    with pytest.raises(CaffeError, match=r"'layer3\.6\.conv1\.weight' is missing"):
        from_state_dict(state, 101)


def test_weights_that_say_which_wiring_they_are_for(tmp_path: Any) -> None:
    """Keys and shapes do not tell v1 from v1.5, so the file does, and a model of the other kind refuses it."""
    from safetensors.torch import save_file

    wiring = {"stride_in_1x1": True, "unpadded_pool": True}
    path = str(tmp_path / "w.safetensors")
    state = rf.models.ResNet(rf.models.Bottleneck, (3, 4, 6, 3), num_classes=2).state_dict()
    save_file(state, path, metadata=dict.fromkeys(wiring, "true"))
    with pytest.raises(rf.models.WeightsError, match="made with stride_in_1x1=True, unpadded_pool=True; with another"):
        rf.resnet50(weights=path)
    with pytest.raises(rf.models.WeightsError, match="made with unpadded_pool=True; with another"):
        rf.resnet50(weights=path, stride_in_1x1=True)
    assert rf.resnet50(weights=path, **wiring).layer2[0].conv1.stride == (2, 2)
    save_file(state, path)  # nothing is known: as before
    assert rf.resnet50(weights=path).layer2[0].conv1.stride == (1, 1)
