"""Models of resnet_fast made from networks and checkpoints of torchvision, timm and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import resnet_fast as rf

from .calls import fused_ops, used

tv = pytest.importorskip("torchvision").models

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}


def timms(name: str = "resnet18", **kwargs: Any) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, **kwargs)


def transformers(kind: str = "ResNetForImageClassification", **config: Any) -> nn.Module:
    library = pytest.importorskip("transformers")
    return getattr(library, kind)(library.ResNetConfig(**{**BASIC, **config}))


def frozen() -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return tv.resnet18(norm_layer=FrozenBatchNorm2d)


def with_head() -> nn.Module:
    model = tv.resnet18()
    model.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(512, 9), nn.BatchNorm1d(9))
    return model


def other_eps() -> nn.Module:
    model = tv.resnet18()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 0.1, 0.3
    return model


def bottlenecks(**kwargs: Any) -> nn.Module:
    return tv.ResNet(tv.resnet.Bottleneck, [1, 2, 1, 2], **kwargs)


def same(y: Any) -> Tensor:
    return y


TAKEN: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[Any], Tensor]]] = {
    "18": (tv.resnet18, rf.from_torchvision, same),
    "classes": (lambda: tv.resnet18(num_classes=3), rf.from_torchvision, same),
    "dilated": (lambda: bottlenecks(replace_stride_with_dilation=(False, True, True)), rf.from_torchvision, same),
    "dilated, one block": (
        lambda: tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=(False, False, True)),
        rf.from_torchvision,
        same,
    ),
    "resnext": (lambda: bottlenecks(groups=32, width_per_group=4), rf.from_torchvision, same),
    "wide": (lambda: bottlenecks(width_per_group=128), rf.from_torchvision, same),
    "50": (tv.resnet50, rf.from_torchvision, same),
    "frozen": (frozen, rf.from_torchvision, same),
    "any head": (with_head, rf.from_torchvision, same),
    "eps": (other_eps, rf.from_torchvision, same),
    "timm": (timms, rf.from_timm, same),
    "timm 26, dilated": (lambda: timms("resnet26", num_classes=4, output_stride=8), rf.from_timm, same),
    "timm gray, fast pool": (lambda: timms(in_chans=1, global_pool="fast"), rf.from_timm, same),
    "timm without head": (lambda: timms(num_classes=0), rf.from_timm, same),
    "transformers": (lambda: transformers(num_labels=3), rf.from_transformers, lambda y: y.logits),
    "v1": (
        lambda: transformers(
            layer_type="bottleneck",
            hidden_sizes=[256, 512, 1024, 2048],
            depths=[1, 1, 1, 2],
            downsample_in_bottleneck=True,
        ),
        rf.from_transformers,
        lambda y: y.logits,
    ),
    "no labels": (lambda: transformers(num_labels=0), rf.from_transformers, lambda y: y.logits),
    "trunk": (lambda: transformers("ResNetModel"), rf.from_transformers, lambda y: y.pooler_output.flatten(1)),
}


@pytest.mark.parametrize("case", TAKEN)
def test_networks(case: str) -> None:
    make, convert, answer = TAKEN[case]
    theirs = used(make()).eval()
    ours = convert(theirs)
    assert type(ours) is rf.models.resnet.ResNet and not ours.training
    x = X[:, : theirs.get_submodule("conv1").weight.shape[1]] if hasattr(theirs, "conv1") else X
    with torch.no_grad():
        expected = answer(theirs.double()(x.double()))
        error = float((answer(theirs.float()(x)) - expected).norm())
        found = ours(x)
    assert float((found - expected).norm()) <= 2 * error + 1e-6 * float(expected.norm())
    counts = fused_ops(ours, x)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in ours.modules())
    assert counts["stem"] == 1 and counts["conv_bn_act"] == convolutions - 1


def test_what_is_kept() -> None:
    theirs = tv.resnet18(num_classes=4).to(torch.float64, memory_format=torch.channels_last)
    theirs.train()
    theirs.layer1.eval()
    theirs.layer2.requires_grad_(False)
    theirs.layer3[0].conv1.weight = theirs.layer3[0].conv2.weight  # shared, though no ResNet has such shapes
    theirs.layer3[1].conv1.weight = theirs.layer3[1].conv2.weight
    theirs.layer3[0].conv1 = nn.Conv2d(128, 256, 3, 2, 1, bias=False).double()
    ours = rf.from_torchvision(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.layer3[1].conv1.weight is ours.layer3[1].conv2.weight
    layers = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        if not list(module.children()):
            assert module.training == layers[name].training or isinstance(module, nn.ReLU), name
    for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert found is not expected and torch.equal(found, expected) and found.dtype == torch.float64, name
        assert found.requires_grad == expected.requires_grad and found.stride() == expected.stride(), name
    with torch.no_grad():
        ours.fc.weight.zero_()
    assert bool(theirs.fc.weight.any())
    assert all(value.is_meta for value in rf.from_torchvision(tv.resnet18().to("meta")).parameters())


def test_training_goes_on() -> None:
    """Gradients and running statistics are torchvision's."""
    theirs = used(tv.resnet18(num_classes=3)).double()
    ours = rf.from_torchvision(theirs)
    for model in (theirs, ours):
        model(X.double()).square().sum().backward()
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-8, atol=1e-10)
    for found, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


def change(path: str, value: Any) -> Callable[[nn.Module], Any]:
    def apply(model: nn.Module) -> None:
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, value)

    return apply


class _Conv(nn.Conv2d):
    pass


CHANGES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "hook": (lambda m: m.layer1.register_forward_hook(lambda *args: None), "layer1 has hooks"),
    "pre-hook": (lambda m: m.fc.register_forward_pre_hook(lambda *args: None), "fc has hooks"),
    "backward hook": (lambda m: m.bn1.register_full_backward_hook(lambda *args: None), "bn1 has hooks"),
    "forward": (lambda m: setattr(m, "forward", lambda x: x), "the network has a forward of its own"),
    "block": (lambda m: setattr(m.layer2[0], "forward", lambda x: x), "layer2.0 has a forward of its own"),
    "compiled": (lambda m: m.layer1[0].compile(), "layer1.0 was compiled"),
    "subclass": (change("layer1.0.conv1", _Conv(64, 64, 3, padding=1, bias=False)), "layer1.0.conv1 is _Conv"),
    "stride": (change("layer2.0.conv1.stride", (1, 1)), "layer2.0.conv1 has stride"),
    "last stride": (
        lambda m: (change("layer4.0.conv1.stride", 1)(m), change("layer4.0.downsample.0.stride", 1)(m)),
        r"layer4.0.conv1 has stride \(1, 1\)",
    ),
    "padding": (change("layer1.0.conv2.padding", (0, 0)), r"layer1.0.conv2 has padding \(0, 0\)"),
    "same": (change("layer1.0.conv2.padding", "same"), "layer1.0.conv2 has padding same"),
    "reflection": (change("layer1.0.conv2.padding_mode", "reflect"), "has padding_mode reflect"),
    "kernel": (change("conv1", nn.Conv2d(3, 64, 5, 2, 2, bias=False)), r"conv1 has kernel_size \(5, 5\)"),
    "bias": (change("layer1.0.conv2", nn.Conv2d(64, 64, 3, padding=1)), "layer1.0.conv2 has bias True"),
    "pool": (change("maxpool", nn.MaxPool2d(2)), r"maxpool has kernel_size \(2, 2\)"),
    "no pool": (change("maxpool", nn.Identity()), "it has no layer that is maxpool"),
    "average": (change("avgpool", nn.AdaptiveAvgPool2d(2)), r"avgpool has output_size \(2, 2\)"),
    "maximum": (change("avgpool", nn.AdaptiveMaxPool2d(1)), "avgpool is AdaptiveMaxPool2d"),
    "activation": (change("layer3.1.relu", nn.SiLU()), "layer3.1.relu is SiLU"),
    "norm": (change("layer3.1.bn1", nn.GroupNorm(32, 256)), "layer3.1.bn1 is GroupNorm"),
    "no norm": (change("layer3.1.bn1", nn.Identity()), "it has no layer that is layer3.1.bn1"),
    "no statistics": (
        change("layer3.1.bn1", nn.BatchNorm2d(256, track_running_stats=False)),
        "layer3.1.bn1 has running statistics False",
    ),
    "one more": (lambda m: m.layer1[0].add_module("se", nn.Sigmoid()), "layer1.0.se is Sigmoid, which"),
    "another block": (lambda m: m.layer1.append(nn.ReLU()), "layer1.2 is ReLU"),
    "fewer stages": (change("layer4", nn.Sequential()), "it has not four stages"),
    "pruned": (lambda m: prune.l1_unstructured(m.layer1[0].conv1, "weight", 0.5), "layer1.0.conv1 has hooks"),
    "parametrization": (lambda m: parametrizations.weight_norm(m.layer1[0].conv1), "layer1.0.conv1 is Param"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_changed_networks_are_refused(case: str) -> None:
    model = tv.resnet18()
    apply, message = CHANGES[case]
    apply(model)
    with pytest.raises(ValueError, match=f"^from_torchvision: .*{message}.*rf.optimize.* takes the network") as caught:
        rf.from_torchvision(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "owner", [nn.Conv2d, nn.BatchNorm2d, tv.resnet.BasicBlock, tv.ResNet], ids=lambda x: x.__name__
)
def test_patched_classes_are_refused(owner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tv.resnet18()
    original = owner.forward
    monkeypatch.setattr(owner, "forward", lambda self, x: original(self, x))
    with pytest.raises(ValueError, match=f"is a {owner.__name__}, of which somebody replaced forward"):
        rf.from_torchvision(model)


def test_own_classes_are_refused() -> None:
    class Mine(tv.ResNet):  # type: ignore[misc, name-defined]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    with pytest.raises(TypeError, match=r"got a tests\..*Mine; rf.optimize\(model\) takes networks as they are"):
        rf.from_torchvision(Mine(tv.resnet.BasicBlock, [1, 1, 1, 1]))
    with pytest.raises(TypeError, match=r"got a torch\.nn\..*DataParallel; pass its \.module"):
        rf.from_torchvision(nn.DataParallel(tv.resnet18()))
    with pytest.raises(TypeError, match=r"SqueezeNet; rf\.optimize"):
        rf.from_torchvision(tv.squeezenet1_1())
    with pytest.raises(TypeError, match="expected a module, a state_dict or a path, got int"):
        rf.from_torchvision(50)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet26d", {}, "conv1.0 is Conv2d"),
        ("resnet50", {"avg_down": True}, "layer2.0.downsample.0 is AvgPool2d|layer1.0.downsample.1 is Conv2d"),
        ("resnetaa50", {}, "maxpool is AvgPool2d"),
        ("resnetblur18", {}, "maxpool.0 is MaxPool2d"),
        ("seresnet18", {}, "layer1.0.se is SEModule"),
        ("resnet18", {"drop_rate": 0.1}, "drop_rate is 0.1"),
        ("resnet18", {"drop_path_rate": 0.1}, "drop_path.drop_prob is 0.0"),
        ("resnet18", {"drop_block_rate": 0.1}, "drop_block.drop_prob is 0.1"),
        ("resnet18", {"act_layer": "silu"}, "act1 is SiLU"),
        ("resnet18", {"global_pool": "max"}, "global_pool.pool is AdaptiveMaxPool2d"),
        ("resnet18", {"global_pool": "", "num_classes": 0}, "it has no layer that is avgpool"),
        ("resnet18", {"norm_layer": "groupnorm"}, "bn1 is GroupNorm"),
        ("resnet18", {"output_stride": 16}, "dilation must be 1"),
    ],
)
def test_timms_other_networks_are_refused(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^from_timm: .*(?:{message}).*rf.optimize"):
        rf.from_timm(timms(name, **kwargs))


def test_timms_switches() -> None:
    model = timms(drop_path_rate=0.1)
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    rf.from_timm(model)
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match="grad_checkpointing is on"):
        rf.from_timm(model)
    wrapped = timms("resnet18_fast") if pytest.importorskip("timm").is_model("resnet18_fast") else tv.resnet18()
    with pytest.raises(TypeError, match=r"expected a timm\.models\.resnet\.ResNet"):
        rf.from_timm(wrapped)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "gelu"}, "embedder.activation is GELUActivation"),
        ({"downsample_in_first_stage": True}, r"shortcut\.convolution is Conv2d, which"),
        ({"hidden_sizes": [16, 32, 64, 128]}, r"shortcut\.convolution is Conv2d, which"),
        ({"embedding_size": 32}, "embedder.convolution has out_channels 32, a ResNet of resnet_fast has 64"),
        ({"hidden_sizes": [64, 128], "depths": [1, 1]}, "it has not four stages"),
    ],
)
def test_other_networks_of_transformers_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^from_transformers: .*(?:{message})"):
        rf.from_transformers(transformers(**config))


def test_activations_inside_a_block_of_transformers() -> None:
    """The last layer of a block has none, the others must have one."""
    model = transformers()
    model.resnet.encoder.stages[0].layers[0].layer[0].activation = nn.Identity()  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match=r"layer\.0\.activation is Identity, a ResNet of resnet_fast has ReLU"):
        rf.from_transformers(model)
    with pytest.raises(TypeError, match="ResNetBackbone"):
        rf.from_transformers(transformers("ResNetBackbone"))


def test_state_dicts_and_files(tmp_path: Path) -> None:
    """Architecture, groups, width and classes are read off the names and shapes."""
    grouped = tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4)
    for theirs in (tv.resnet18(num_classes=7), grouped):
        used(theirs).eval()
        torch.save(
            {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "a.pth"
        )
        for source in (
            theirs.state_dict(),
            {"model": theirs.state_dict()},
            tmp_path / "a.pth",
            str(tmp_path / "a.pth"),
        ):
            ours = rf.from_torchvision(source)
            assert ours.training
            with torch.no_grad():
                torch.testing.assert_close(ours.eval()(X), theirs(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(rf.models.WeightsError, match="holds no ResNet of four stages"):
        rf.from_torchvision(tv.squeezenet1_1().state_dict())
    with pytest.raises(rf.models.WeightsError, match=r"missing \(fc.weight, fc.bias\)"):
        rf.from_torchvision({k: v for k, v in tv.resnet18().state_dict().items() if not k.startswith("fc.")})
    narrow = {
        name: value[: max(1, len(value) // 2)] for name, value in tv.resnet18().state_dict().items() if value.dim()
    }
    for state in (narrow, {name: value[:0] for name, value in narrow.items()}):
        with pytest.raises(rf.models.WeightsError, match=r"^state_dict"):
            rf.from_torchvision(state)
    with pytest.raises(FileNotFoundError):
        rf.from_torchvision(tmp_path / "none.pth")
    with pytest.raises(rf.models.WeightsError, match=r"a directory without model\.safetensors or pytorch_model\.bin"):
        rf.from_torchvision(tmp_path)


def test_folders_of_transformers(tmp_path: Path) -> None:
    theirs = used(transformers(num_labels=2, id2label={0: "cat", 1: "dog"})).eval()
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    processor = {"crop_pct": 0.875, "size": {"shortest_edge": 192}, "resample": 3, "image_mean": [0.4, 0.5, 0.6],
                 "image_std": [0.1, 0.2, 0.3], "do_resize": True, "do_rescale": True}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with torch.no_grad():
        expected = theirs(X).logits
        for ours in (rf.from_transformers(tmp_path), rf.resnet18(weights=tmp_path)):
            torch.testing.assert_close(ours.eval()(X), expected, rtol=1e-4, atol=1e-5)
    assert rf.models.categories(tmp_path) == ("cat", "dog")
    found = rf.models.preprocessing(tmp_path)
    assert (found.crop_size, found.resize_size, found.interpolation) == (192, int(192 / 0.875), "bicubic")
    assert found.mean == (0.4, 0.5, 0.6) and found.std == (0.1, 0.2, 0.3)
    with pytest.raises(rf.models.WeightsError, match="weights of resnet18, not of resnet34"):
        rf.resnet34(weights=tmp_path)
    central = {
        "image_processor_type": "BitImageProcessor",
        "do_center_crop": True,
        "crop_size": {"height": 96, "width": 96},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | central))
    found = rf.models.preprocessing(tmp_path)  # of a processor that knows no crop_pct
    assert (found.crop_size, found.resize_size) == (96, 192)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | {"size": 384}))
    with pytest.warns(UserWarning, match="resizes to a square of 384 pixels"):
        assert rf.models.preprocessing(tmp_path) == rf.models.Preprocessing()


def test_strides_of_a_folder_of_transformers(tmp_path: Path) -> None:
    theirs = used(transformers(layer_type="bottleneck", hidden_sizes=[256, 512, 1024, 2048], depths=[1, 1, 1, 1],
                               downsample_in_bottleneck=True)).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    with torch.no_grad():
        torch.testing.assert_close(rf.from_transformers(tmp_path).eval()(X), theirs(X).logits, rtol=1e-4, atol=1e-5)


def timms_folder(folder: Path, **changes: Any) -> nn.Module:
    model = used(tv.resnet18(num_classes=2)).eval()
    save_file(model.state_dict(), folder / "model.safetensors")
    pretrained = {"input_size": [3, 160, 160], "crop_pct": 0.95, "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5],
                  "std": [0.2, 0.2, 0.2]}  # fmt: skip
    config = {"architecture": "resnet18", "num_classes": 2, "global_pool": "avg", "pretrained_cfg": pretrained}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return model


def test_folders_of_timm(tmp_path: Path) -> None:
    theirs = timms_folder(tmp_path, label_names=["cat", "dog"])
    with torch.no_grad():
        torch.testing.assert_close(rf.from_timm(tmp_path).eval()(X), theirs(X), rtol=1e-4, atol=1e-5)
    assert rf.models.categories(tmp_path) == ("cat", "dog")
    found = rf.models.preprocessing(tmp_path)
    assert (found.crop_size, found.resize_size, found.mean) == (160, 168, (0.5, 0.5, 0.5))
    for changes, message in (
        ({"architecture": "resnetblur18"}, "calls its network 'resnetblur18'"),
        ({"model_args": {"aa_layer": "avg"}}, "model_args"),
        ({"model_args": {"output_stride": 8}}, "model_args"),
        ({"model_args": 3}, "model_args"),
        ({"global_pool": ["max"]}, "global_pool"),
    ):
        timms_folder(tmp_path, **changes)
        for read in (rf.from_timm, rf.models.read_checkpoint):
            with pytest.raises(rf.models.WeightsError, match=message):
                read(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "[1]", "null", "[" * 100_000, "{", '{"model_type": 3}', '{"architecture": 3, "pretrained_cfg": {}}',
     '{"a": NaN}', '{"architecture": "resnet18", "pretrained_cfg": []}'],
)  # fmt: skip
def test_configurations_of_others(content: str, tmp_path: Path) -> None:
    """What is not such a configuration is nobody's: any program may write a config.json."""
    timms_folder(tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert len(rf.models.read_checkpoint(tmp_path)) == 122
    assert rf.models.preprocessing(tmp_path) == rf.models.Preprocessing()


@pytest.mark.parametrize(
    "pretrained",
    [{}, {"input_size": [3, 10]}, {"input_size": [3, 9, 8]}, {"input_size": [3, 9, 9], "crop_pct": 0},
     {"input_size": [3, 9, 9], "mean": "x", "std": [1, 1, 1]},
     {"input_size": [3, 1e9, 1e9], "mean": [0, 0, 0], "std": [1, 1, 1]},
     {"input_size": [3, 9, 9], "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "cubic"}],
)  # fmt: skip
def test_preprocessing_that_is_not_ours(pretrained: dict[str, Any], tmp_path: Path) -> None:
    timms_folder(tmp_path, pretrained_cfg=pretrained)
    if pretrained:
        with pytest.warns(UserWarning, match=r"config.json: its preprocessing is not followed"):
            assert rf.models.preprocessing(tmp_path) == rf.models.Preprocessing()
    else:
        assert rf.models.preprocessing(tmp_path) == rf.models.Preprocessing()
