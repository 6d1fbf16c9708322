"""Where public training scripts keep a ResNet in a file: each layout is found, or refused by what is wrong with it.

The tensors are of any shape here; that they fit is `load_into`'s affair.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import pathlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import resnet_fast.models as models
from resnet_fast.models import checkpoint
from tests.models.test_weights import same

State = dict[str, Tensor]


def drawn(seed: int) -> State:
    """A ResNet-18's names, with small tensors."""
    with torch.device("meta"):
        names = models.resnet18().state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, *([3] if name == "fc.weight" else []), generator=generator) for name in names}


STATE, OTHER = drawn(0), drawn(1)
TRUNK = {name: tensor for name, tensor in STATE.items() if not name.startswith("fc.")}
CLASSIFIER = {name: tensor for name, tensor in STATE.items() if name.startswith("fc.")}
ARGUMENTS = argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs"), when=datetime.datetime(2020, 1, 1))


def under(prefix: str, state: State = STATE) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def moved(old: str, new: str, state: State = STATE) -> State:
    return {new + name.removeprefix(old) if name.startswith(old) else name: of for name, of in state.items()}


class Averaged(nn.Module):
    """What a class of somebody's own saves beside the tensors."""


LAYOUTS: dict[str, Any] = {
    "state_dict": STATE,
    "pytorch/examples": {"epoch": 1, "arch": "resnet18", "state_dict": under("module."), "best": torch.tensor(7.0)},
    "PyTorch's tutorial": {"epoch": 1, "model_state_dict": STATE, "optimizer_state_dict": {"state": {0: OTHER}}},
    "pytorch-cifar": {"net": under("module."), "acc": 93.2},
    "torchvision's references": {"model": STATE, "optimizer": {}, "epoch": 1, "args": ARGUMENTS},
    "timm": {"state_dict": STATE, "args": ARGUMENTS, "amp_scaler": {"scale": 65536.0}, "metric": np.float64(71.2)},
    "state_dict_ema alone": {"state_dict_ema": STATE},
    "AveragedModel": {"n_averaged": torch.tensor(3), **under("module.")},
    "mmengine's average alone": {"ema_state_dict": {"steps": torch.tensor(3), **under("module.")}},
    "Lightning": {"state_dict": under("model."), "hparams_name": "kwargs", "hyper_parameters": {"lr": 0.1}},
    "Lightning, compiled": {"state_dict": under("model._orig_mod."), "callbacks": {"best": {"score": torch.ones(())}}},
    "compiled": under("_orig_mod."),
    "compiled, DataParallel": {"state_dict": under("module._orig_mod.")},
    "layers compiled one by one": moved("layer1.", "layer1._orig_mod."),
    "FSDP and checkpointing": moved("layer2.0.", "_fsdp_wrapped_module.layer2.0._checkpoint_wrapped_module."),
    "DeepSpeed": {"module": STATE, "buffer_names": ["bn1.running_mean"], "param_shapes": [{"a": torch.Size([2])}]},
    "Composer": {"state": {"model": under("module."), "optimizers": {"SGD": {}}}, "rng": [{"cuda": torch.ones(2)}]},
    "OpenMMLab": {
        "meta": {"time": "now"},
        "state_dict": {**under("backbone.", TRUNK), **under("head.", CLASSIFIER)},
        "message_hub": {"log_scalars": {"train/lr": np.arange(3.0)}},
    },
    "pretrainedmodels": moved("fc.", "last_linear."),
    "vissl": {"classy_state_dict": {"base_model": {"model": {"trunk": {"_model": STATE}}}}},
    "ignite": {"model": STATE, "optimizer": {"state": {}, "param_groups": [{"params": [0]}]}, "trainer": {"epoch": 1}},
    "catalyst": {"model_state_dict": STATE, "criterion_state_dict": {"weight": torch.ones(3)}, "stage": "train"},
    "fastai": {"model": STATE, "opt": {"state": [{"grad_avg": torch.ones(2)}], "hypers": [{"lr": 0.1}]}},
    "encoder": {"network": under("encoder.")},
    "a default dictionary": collections.defaultdict(dict, {"weights": STATE}),
    "an own class beside it": {"params": STATE, "callback": Averaged(), "type": Averaged, "f": nn.functional.relu},
    "parameters": {name: nn.Parameter(tensor) for name, tensor in STATE.items()},
    "the model twice, shared": {"model": {**under("module.model."), **under("module.attacker.model.")}},
    "a network and its trunk": {"model": STATE, "trunk": TRUNK},
    "no counters": {name: tensor for name, tensor in STATE.items() if not name.endswith("num_batches_tracked")},
}  # fmt: skip


OLD, PROTOCOL_5 = {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 5}
FORMATS = [(name, {}) for name in LAYOUTS] + [
    (name, options)
    for name in ("timm", "OpenMMLab", "a default dictionary", "an own class beside it", "parameters")
    for options in (OLD, PROTOCOL_5)
]


@pytest.mark.parametrize(("name", "options"), FORMATS)
def test_layout(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.save(LAYOUTS[name], tmp_path / "w", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checkpoint.read_checkpoint(tmp_path / "w")
    expected = {name: of for name, of in STATE.items() if not name.endswith("batches_tracked") or name in found}
    assert same(found, expected)
    assert len(found) == (102 if name == "no counters" else 122)


def transformers_names(state: State) -> State:
    """As ResNetForImageClassification of transformers has them."""
    kinds = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}

    def name(of: str) -> str:
        parts = of.split(".")
        if parts[0] == "fc":
            return f"classifier.1.{parts[1]}"
        if parts[0] in ("conv1", "bn1"):
            return f"resnet.embedder.embedder.{kinds[parts[0][:-1]]}.{parts[1]}"
        start = f"resnet.encoder.stages.{int(parts[0][5]) - 1}.layers.{parts[1]}"
        if parts[2] == "downsample":
            return f"{start}.shortcut.{kinds[parts[3]]}.{parts[4]}"
        return f"{start}.layer.{int(parts[2][-1]) - 1}.{kinds[parts[2][:-1]]}.{parts[3]}"

    return {name(of): tensor for of, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_names_of_transformers(prefix: str, tmp_path: Path) -> None:
    """A bottleneck's names, too; where the stride is a config.json says."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    with torch.device("meta"):
        names = models.resnet50().state_dict()
    state = {name: torch.tensor([float(number)]) for number, name in enumerate(names)}
    save_file(under(prefix, transformers_names(state)), tmp_path / "model.safetensors", {"format": "pt"})
    found, metadata = checkpoint.read_with_metadata(tmp_path / "model.safetensors")
    assert same(found, state) and metadata == {"format": "pt"}

    told = {"model_type": "resnet", "hidden_act": "relu", "downsample_in_bottleneck": True}
    arch = {"arch": "resnet50"}  # what transformers' configuration is of, if it does not say otherwise
    for content, says in ((told, arch | {"stride_in_1x1": "true"}), (told | {"downsample_in_bottleneck": False}, arch),
                             (told | {"model_type": "vit"}, {}), ([], {})):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert checkpoint.read_with_metadata(tmp_path / "model.safetensors")[1] == {"format": "pt"} | says
    for change in ({"hidden_act": "gelu"}, {"downsample_in_first_stage": True}):
        (tmp_path / "config.json").write_text(json.dumps(told | change))
        with pytest.raises(models.WeightsError, match=r"config\.json next to it has a stride in the first stage"):
            checkpoint.read_checkpoint(tmp_path / "model.safetensors")


def test_averages(tmp_path: Path) -> None:
    """The network is taken, a warning says how to have the average, and that is so had."""
    path = tmp_path / "w.pth"
    for content, plain, average in (
        ({"state_dict": STATE, "state_dict_ema": OTHER}, "state_dict", "state_dict_ema"),
        ({"model": STATE, "model_ema": {"n_averaged": torch.tensor(1), **under("module.", OTHER)}}, "model",
         "model_ema.module"),
        ({"ema_model": OTHER, "online_network": STATE}, "online_network", "ema_model"),
        ({**under("ema.", OTHER), **under("net.")}, "net", "ema"),
    ):  # fmt: skip
        torch.save(content, path)
        with warnings.catch_warnings(record=True) as caught:
            assert same(checkpoint.read_checkpoint(path), STATE)
        assert [str(warning.message) for warning in caught] == [
            f"{path}: {plain!r} is taken; it also holds {average!r}, which FILE:{average} takes"
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for part in (average, average.split(".")[0]):
                assert same(checkpoint.read_checkpoint(f"{path}:{part}"), OTHER)
            assert same(checkpoint.read_checkpoint(f"{path}:{plain}"), STATE)
    torch.save({"state_dict": STATE, "state_dict_ema": STATE}, path)  # the same memory
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(checkpoint.read_checkpoint(path), STATE)


SIAMESE = {**under("module.encoder_q."), **under("module.encoder_k.", OTHER), "module.queue": torch.ones(2)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"student": STATE, "teacher": OTHER},
         r"holds 2 ResNets \('student', 'teacher'\); say which one by FILE:student$"),
        ({"state_dict": SIAMESE}, r"holds 2 ResNets \('state_dict.module.encoder_q', 'state_dict.module.encoder_k'\)"),
        ({"model": STATE, "best_model": OTHER}, "holds 2 ResNets"),
        ({"state_dict": {**under("model."), "loss.weight": torch.ones(2)}},
         r"holds a ResNet under 'state_dict.model' and 1 further tensors \(loss.weight\); if the ResNet alone is "
         r"meant, say FILE:state_dict\.model$"),
        ({"0.mean": torch.ones(3), "0.std": torch.ones(3), **under("1.")}, r"2 further tensors \(0.mean, 0.std\)"),
        ({**under("backbone.", TRUNK), "head.weight": torch.ones(2, 3)}, r"1 further tensors \(head.weight\)"),
        ({**under("backbone.0.body.", TRUNK), "transformer.weight": torch.ones(1)}, "under 'backbone.0.body'"),
        ({**under("rgb."), **under("depth.", {name: 2 * tensor for name, tensor in TRUNK.items()})}, "holds 2 ResNets"),
        ({**STATE, "_orig_mod.fc.bias": torch.ones(2)}, "has 'fc.bias' twice, with and without a prefix"),
        ({**STATE, "embedder.embedder.convolution.weight": torch.ones(2)},
         "has 'conv1.weight' by two names, 'conv1.weight' and 'embedder"),
        ({str(i): under("net.") for i in range(17)}, "holds more than 16 ResNets"),
        ({**STATE, "epoch": 3}, "entry 'epoch' is a int"),
        ({"fc.weight": torch.ones(1), "epoch": 3}, "entry 'epoch' is a int"),
        ({3: torch.ones(1)}, "entry '3'"),
        ({"fc.bias": torch.ones(1), "_orig_mod.fc.bias": torch.ones(1)}, "'fc.bias' twice"),
        ({}, "no tensors"),
        ([1, 2], "holds a list"),
        ({**STATE, "extra": Averaged()}, r"refused: contains code, .*entry 'extra' is a \S+\.Averaged"),
        ({"generator": {"a": torch.ones(1)}, "critic": {"b": torch.ones(1)}}, "tensors in 2 places .* FILE:generator$"),
    ],
)  # fmt: skip
def test_unclear(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(content, path)
    with pytest.raises(models.WeightsError, match=message) as caught:
        checkpoint.read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": SIAMESE}, path)
    assert same(checkpoint.read_checkpoint(f"{path}:encoder_k"), OTHER)
    assert same(checkpoint.read_checkpoint(f"{path}:state_dict.module.encoder_q"), STATE)
    with pytest.raises(models.WeightsError, match=r"has no ResNet under 'encoder'; there are 'state_dict\.module\.enc"):
        checkpoint.read_checkpoint(f"{path}:encoder")
    with pytest.raises(models.WeightsError, match="holds 2 ResNets"):
        checkpoint.read_checkpoint(f"{path}:state_dict")
    with pytest.raises(FileNotFoundError, match=r"no\.pth:encoder_k: no such weights file"):
        checkpoint.read_checkpoint(f"{tmp_path}/no.pth:encoder_k")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(models.WeightsError, match="does not fit resnet18"):
        models.resnet18(weights="w.pth:encoder_k")
    torch.save({"generator": {"a": torch.ones(1)}, "critic": {"b": torch.zeros(1)}}, path)
    assert same(checkpoint.read_checkpoint(f"{path}:critic"), {"b": torch.zeros(1)})
    path.rename(f"{path}:x")
    assert checkpoint.file_and_part(Path(f"{path}:x")) == (Path(f"{path}:x"), None)


def test_same_names_other_network(tmp_path: Path) -> None:
    """timm's anti-aliased networks, and OpenMMLab's with the stride in the first 1x1."""
    path = tmp_path / "w.pth"
    for arch in ("resnet18", "tv_resnet50", "blurry"):
        torch.save({"arch": arch, "state_dict": STATE}, path)
        assert checkpoint.read_with_metadata(path)[1] == {}
    for arch in ("resnetblur50", "resnetaa50", "seresnetaa50"):
        torch.save({"arch": arch, "state_dict": STATE}, path)
        with pytest.raises(models.WeightsError, match=f"weights are of '{arch}', whose anti-aliasing"):
            checkpoint.read_checkpoint(path)
    state = under("backbone.", TRUNK) | under("head.", CLASSIFIER)
    for style, strides in (("caffe", {"stride_in_1x1": "true"}), ("pytorch", {})):
        for key, text in (("cfg", f"backbone=dict(depth=50, style='{style}')"), ("config", f"{{'style': '{style}'}}")):
            torch.save({"meta": {key: text}, "state_dict": state}, path)
            assert checkpoint.read_with_metadata(path)[1] == strides


@pytest.mark.parametrize(
    ("state", "whose"),
    [
        ({"backbone.bottom_up.stem.conv1.weight": torch.ones(1)}, "detectron2's"),
        (moved("conv1.", "conv1.0."), r"those of a deep stem \(resnet50d, ResNetV1c or V1d\)"),
        ({**STATE, "layer1.0.se.fc1.weight": torch.ones(1)}, r"those of a network with attention \(SE-ResNet\)"),
        ({"conv1_w": torch.ones(1)}, "Caffe2's"),
        ({"res2a_branch2a.weight": torch.ones(1)}, "Caffe's: resnet_fast.caffe has that network"),
        ({"0.4.0.conv1.weight": torch.ones(1), "1.8.weight": torch.ones(1)}, "fastai's"),
        ({"cls_token": torch.ones(1)}, "a vision transformer's"),
    ],
)
def test_names_of_other_networks(state: State, whose: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(models.WeightsError, match=f"does not fit resnet18 with 122 entries; its names are {whose}.*: "):
        models.resnet18(weights=tmp_path / "w.pth")


def test_a_backbone_lacks_its_classifier(tmp_path: Path) -> None:
    """Of self-supervised training: nothing is filled in at random."""
    for content in (under("module.", TRUNK), {"student": under("module.backbone.", TRUNK)},
                    under("encoder.", TRUNK) | {"encoder.fc.0.weight": torch.ones(2, 2)}):  # fmt: skip
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(models.WeightsError, match=r"2 missing \(fc.weight, fc.bias\)"):
            models.resnet18(weights=tmp_path / "w.pth")


def test_checkpoint_of_an_interrupted_run(tmp_path: Path) -> None:
    """`train imagenet`'s own: the network; the average by its name."""
    from resnet_fast.training import checkpoint as training

    torch.manual_seed(0)
    model = models.resnet18(num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    average = AveragedModel(models.resnet18(num_classes=3))
    tensors = {"sums": torch.ones(2)}
    path = tmp_path / "checkpoint.safetensors"
    read: Callable[[str], State] = lambda part: models.resnet18(weights=f"{path}{part}").state_dict()  # noqa: E731
    for with_average in (False, True):
        if with_average:
            tensors |= {f"ema.{name}": tensor for name, tensor in average.state_dict().items()}
        optimizer.step()
        training.save(path, model=model.state_dict(), optimizer=optimizer.state_dict(), state={}, tensors=tensors)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if with_average else "error")
            assert same(read(""), model.state_dict())
    assert same(read(":ema"), average.module.state_dict())
    assert checkpoint.read_with_metadata(f"{path}:ema")[1] == {}


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.safetensors", "w"])
def test_content_decides_and_not_the_suffix(name: str, tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    for write in (lambda path: save_file(STATE, path), lambda path: torch.save(STATE, path),
                  lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False)):  # fmt: skip
        write(tmp_path / name)
        assert same(checkpoint.read_checkpoint(tmp_path / name), STATE)
    (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(20))
    with pytest.raises(models.WeightsError, match="an HDF5 file; safetensors, or what torch"):
        checkpoint.read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("content", [
    {"a\x1b\n" + "b" * 1000: {"x": torch.ones(1)}, "c": {"x": torch.ones(1)}},
    {"a\x1b\n" + "b" * 1000: torch.ones(1), "module.a\x1b\n" + "b" * 1000: torch.ones(1)},
    {"a\x1b\n" + "b" * 1000: STATE, "c": OTHER},
    {**STATE, "a\x1b\n" + "b" * 1000: torch.ones(1)},
])  # fmt: skip
def test_names_of_a_file_are_shown_on_one_line(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(content, path)
    with pytest.raises(checkpoint.WeightsError) as caught:
        models.resnet18(weights=path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500
