"""timm's registry and surface, against timm's own networks with the same parameters."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast import models

from .calls import fused_ops, used

timm = pytest.importorskip("timm")
optim = pytest.importorskip("timm.optim")
rf.register_models("timm")

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def pair(arch: str = "resnet18", **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Return timm's network and ours of the same arguments and parameters, in eval mode."""
    theirs = used(timm.create_model(arch, **kwargs)).eval()
    ours = timm.create_model(f"{arch}_fast", **kwargs).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def near(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    if isinstance(expected, Tensor):
        assert found.shape == expected.shape and found.stride() == expected.stride() and found.dtype == expected.dtype
        assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
        return
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        near(one, other, tolerance)


@pytest.mark.parametrize("arch", models.list_models())
def test_entry_points(arch: str) -> None:
    assert timm.is_model(f"{arch}_fast")
    theirs, ours = (timm.create_model(name, num_classes=3, device="meta") for name in (arch, f"{arch}_fast"))
    assert [(name, value.shape) for name, value in ours.state_dict().items()] == [
        (name, value.shape) for name, value in theirs.state_dict().items()
    ]
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    assert ours.feature_info == theirs.feature_info
    for name in ("num_features", "head_hidden_size", "num_classes", "in_chans", "drop_rate"):
        assert getattr(ours, name) == getattr(theirs, name)
    weights = set(timm.list_models(f"{arch}.*", pretrained=True))
    assert {name.replace("_fast", "") for name in timm.list_models(f"{arch}_fast.*", pretrained=True)} == weights
    config = timm.get_pretrained_cfg(f"{arch}_fast.tv_in1k")
    assert config.hf_hub_id == f"timm/{arch}.tv_in1k" and config.architecture == f"{arch}_fast"


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d"])
def test_answers(arch: str) -> None:
    theirs, ours = pair(arch, num_classes=5)
    with torch.no_grad():
        near(ours(X), theirs(X))
        near(ours.forward_features(X), theirs.forward_features(X))
        features = theirs.forward_features(X)
        for pre_logits in (False, True):
            near(
                ours.forward_head(features, pre_logits=pre_logits), theirs.forward_head(features, pre_logits=pre_logits)
            )
        near(ours.to(memory_format=torch.channels_last)(X), theirs(X))
    counts = fused_ops(ours, X)
    assert counts["aten::batch_norm"] == 0 and counts["stem"] == counts["head"] == 1
    assert counts["conv_bn_act"] == sum(isinstance(module, nn.Conv2d) for module in ours.modules()) - 1


@pytest.mark.parametrize(
    "kwargs",
    [
        {"out_indices": (0, 1, 2, 3, 4)},
        {"out_indices": (2, 4)},
        {"out_indices": [0]},
        {"out_indices": (-2,)},
        {"out_indices": 2},
        {"out_indices": (4, 1), "output_stride": 8},
        {"in_chans": 1},
        {"feature_cls": "dict"},
        {"feature_cls": "hook"},
        {"feature_cls": "getter", "out_indices": (1, 2)},
        {"feature_cls": "list", "flatten_sequential": True},
    ],
)
def test_features(kwargs: dict[str, Any]) -> None:
    flat = kwargs.pop("flatten_sequential", False)
    theirs, ours = pair("resnet50" if "output_stride" in kwargs else "resnet18", features_only=True, **kwargs)
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = X[:, : kwargs.get("in_chans", 3)]
    with torch.no_grad():
        found, expected = ours(x), theirs(x)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = found.values(), expected.values()
    near(list(found), list(expected))
    assert flat is False or found


def test_features_are_fused() -> None:
    ours = timm.create_model("resnet18_fast", features_only=True).eval()
    counts = fused_ops(ours, X)
    assert counts["conv_bn_act"] == 20 and counts["aten::batch_norm"] == 0
    counts = fused_ops(timm.create_model("resnet18_fast", features_only=True, out_indices=(1, 4)).eval(), X)
    assert counts["stem"] == 1 and counts["conv_bn_act"] == 19


@pytest.mark.parametrize("indices", [None, 2, [0, 3], [-1], [1]])
@pytest.mark.parametrize("stop_early", [False, True])
def test_intermediates(indices: Any, stop_early: bool) -> None:
    theirs, ours = pair()
    with torch.no_grad():
        for alone in (False, True):
            args = {"indices": indices, "stop_early": stop_early, "intermediates_only": alone}
            near(ours.forward_intermediates(X, **args), theirs.forward_intermediates(X, **args))
        assert ours.prune_intermediate_layers(indices or 5) == theirs.prune_intermediate_layers(indices or 5)
        near(ours(X), theirs(X))
    assert ours.num_features == theirs.num_features
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        ours.forward_intermediates(X, output_fmt="NLC")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_classes": 0},
        {"num_classes": 0, "global_pool": ""},
        {"global_pool": "max"},
        {"global_pool": "catavgmax"},
        {"global_pool": "fast"},
        {"in_chans": 1},
        {"in_chans": 5, "num_classes": 2},
        {"drop_rate": 0.5},
        {"drop_path_rate": 0.3},
        {"act_layer": "relu"},
        {"act_layer": nn.ReLU},
        {"norm_layer": "batchnorm2d"},
        {"output_stride": 32, "avg_down": False, "aa_layer": None},
        {"dtype": torch.float64},
    ],
)
def test_arguments(kwargs: dict[str, Any]) -> None:
    theirs, ours = pair(**kwargs)
    x = torch.randn(2, kwargs.get("in_chans", 3), 64, 64, dtype=kwargs.get("dtype"))
    with torch.no_grad():
        near(ours(x), theirs(x))
        ours.reset_classifier(4, "avg")
        theirs.reset_classifier(4, "avg")
        theirs.fc.load_state_dict(ours.fc.state_dict())
        near(ours(x), theirs(x))
    assert ours.get_classifier() is ours.fc and ours.get_classifier(name_only=True) == "fc" and ours.num_classes == 4
    assert ours.fc.weight.dtype == x.dtype and not ours.fc.training
    assert fused_ops(ours, x)["head"] == 1


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation(output_stride: int) -> None:
    theirs, ours = pair("resnet50", output_stride=output_stride)
    with torch.no_grad():  # the last features alone are the same if another stage is dilated
        near(ours.forward_intermediates(X), theirs.forward_intermediates(X))
    with pytest.raises(NotImplementedError, match="dilation must be 1"):
        timm.create_model("resnet18_fast", output_stride=output_stride)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"aa_layer": "avg"}, "aa_layer must be None for a fast ResNet, got 'avg'; timm's own ResNet has it"),
        ({"stem_type": "deep"}, "stem_type must be ''"),
        ({"avg_down": True}, "avg_down must be False"),
        ({"drop_block_rate": 0.1}, "drop_block_rate must be 0.0"),
        ({"block_args": {"attn_layer": "se"}}, "block_args must be None"),
        ({"act_layer": "silu"}, "act_layer must be ReLU"),
        ({"output_stride": 4}, "output_stride must be 8, 16 or 32, got 4"),
        ({"scriptable": True}, "scriptable must be False"),
    ],
)
def test_other_networks_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        timm.create_model("resnet50_fast", **kwargs)
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="unexpected argument 'widht'"):
        timm.create_model("resnet50_fast", widht=2)


def test_checkpoints(tmp_path: Path) -> None:
    theirs, ours = pair(num_classes=5)
    with torch.no_grad():
        expected = theirs(X)
    path = str(tmp_path / "last.pth.tar")
    torch.save({"state_dict": {f"module.{name}": value for name, value in theirs.state_dict().items()}}, path)
    with torch.no_grad():
        near(timm.create_model("resnet18_fast", num_classes=5, checkpoint_path=path).eval()(X), expected)
        other = timm.create_model("resnet18_fast", num_classes=5).eval()
        assert not timm.models.load_checkpoint(other, path).missing_keys
        near(other(X), expected)
        torch.save(theirs.state_dict(), path)
        overlay = {"file": path, "num_classes": 5}
        args = {"pretrained": True, "pretrained_cfg_overlay": overlay}
        near(timm.create_model("resnet18_fast", **args).eval()(X), expected)
        assert timm.create_model("resnet18_fast.tv_in1k", **args, num_classes=2).eval()(X).shape == (2, 2)
        gray = timm.create_model("resnet18_fast", **args, in_chans=1)
    assert torch.allclose(gray.conv1.weight, theirs.conv1.weight.sum(1, keepdim=True), atol=1e-6)
    assert ours.default_cfg["architecture"] == "resnet18_fast" and ours.pretrained_cfg["crop_pct"] == 0.95


def test_hub_folders(tmp_path: Path) -> None:
    """timm's own way to and from a folder that has the form of a model on the hub."""
    _, ours = pair(num_classes=5)
    timm.models.save_for_hf(ours, str(tmp_path), model_config={"num_classes": 5})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(again) is type(ours)
    with torch.no_grad():
        near(again(X), ours(X))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("features", [False, True])
def test_gradients(checkpointing: bool, features: bool) -> None:
    theirs, ours = pair(
        "resnet18", dtype=torch.float64, **({"features_only": True} if features else {"num_classes": 3})
    )
    results = []
    for model in (theirs, ours):
        model.train()
        model.set_grad_checkpointing(checkpointing)
        outputs = model(X.double())
        outputs = outputs if features else [outputs]
        sum(y.square().mean() for y in outputs).backward()
        results.append([*outputs, *(value.grad for value in model.parameters())])
        if not (features and checkpointing):  # timm checkpoints the layers of the stem too, and not the last stage
            results[-1] += model.buffers()
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_stochastic_depth(arch: str) -> None:
    """The same images lose their branch in train mode; in eval mode nothing is dropped, and all is fused."""
    theirs, ours = pair(arch, drop_path_rate=0.3, num_classes=3)
    assert [m.drop_prob for m in ours.modules() if hasattr(m, "drop_prob")] == [
        m.drop_prob for m in theirs.modules() if hasattr(m, "drop_prob")
    ]
    counts = fused_ops(ours, X)
    assert counts["aten::batch_norm"] == 0
    for model in (theirs, ours):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    with torch.no_grad():
        torch.manual_seed(3)
        expected = theirs(X)
        torch.manual_seed(3)
        near(ours(X), expected)
    for module in ours.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.999999
    with torch.no_grad():
        assert not torch.allclose(ours(X), expected)


def test_dropout() -> None:
    theirs, ours = pair(drop_rate=0.5, num_classes=3)
    for model in (theirs, ours):
        model.global_pool.train()
        model.training = True
    with torch.no_grad():
        torch.manual_seed(3)
        expected = theirs(X)
        torch.manual_seed(3)
        near(ours(X), expected)
        assert not torch.allclose(ours.eval()(X), expected)


def test_head_hooks_fire() -> None:
    _, ours = pair()
    expected = ours(X)
    for name in ("global_pool", "global_pool.flatten", "fc", "act1", "layer2"):
        seen: list[Any] = []
        handle = ours.get_submodule(name).register_forward_hook(lambda *args, seen=seen: seen.append(args[0]))
        near(ours(X).detach(), expected.detach())
        handle.remove()
        assert len(seen) == 1, name


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: pytest.importorskip("timm.utils").ModelEmaV3(model).module,
    ],
)
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    _, ours = pair()
    again = copied(ours).eval()
    with torch.no_grad():
        near(again(X), ours(X))
        again.fc.bias += 1
        assert torch.allclose(again(X), ours(X) + 1, atol=1e-5)


def test_optimize_and_helpers() -> None:
    theirs, ours = pair(num_classes=3)
    with torch.no_grad():
        near(rf.optimize(ours)(X), theirs(X))
        features = timm.create_model("resnet18_fast", features_only=True).eval()
        near(rf.optimize(features)(X), features(X))
    groups = optim.param_groups_layer_decay(ours, layer_decay=0.5)
    assert len(groups) == len(optim.param_groups_layer_decay(theirs, layer_decay=0.5))
    assert ours.group_matcher(coarse=True) == theirs.group_matcher(coarse=True)
    config = pytest.importorskip("timm.data").resolve_data_config({}, model=ours)
    assert config == pytest.importorskip("timm.data").resolve_data_config({}, model=theirs)
    assert timm.create_model("resnet18_fast", memory_efficient=True).layer1[0].memory_efficient is True


def test_first_parameters() -> None:
    """The last BatchNorm of a block begins with zeros, as timm's; `zero_init_last` changes that."""
    for zero in (True, False):
        ours = timm.create_model("resnet50_fast", zero_init_last=zero)
        assert all(bool(block.bn3.weight.eq(0 if zero else 1).all()) for block in ours.layer1)
    torch.testing.assert_close(ours.conv1.weight.std(), torch.tensor((2 / (64 * 49)) ** 0.5), rtol=0.05, atol=0)


def test_images_that_do_not_fit() -> None:
    ours = timm.create_model("resnet18_fast")
    with pytest.raises(ValueError, match="is it NHWC"):
        ours(torch.randn(1, 8, 8, 3))


def test_registering() -> None:
    code = """
import sys
import resnet_fast as rf
assert not {"timm", "torchvision", "transformers", "huggingface_hub"} & sys.modules.keys()
for names in ((), ("keras",)):
    try:
        rf.register_models(*names)
    except ValueError as error:
        print(error)
sys.modules["timm"] = None
try:
    rf.register_models("timm")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    none, keras, missing = done.stdout.splitlines()
    assert none.endswith("'timm', 'torchvision', got none") and keras.endswith("got 'keras'")
    assert "timm cannot be imported" in missing and missing.endswith("pip install timm")
