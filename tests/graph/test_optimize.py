"""``resnet_fast.optimize`` on whole models: parity, the report, errors, and the frozen module's manners."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import resnet_fast
from resnet_fast import backends
from resnet_fast.graph import OptimizedModule, Report, batching, optimize
from tests.graph.test_graph import ops
from tests.networks import assert_same, randomise
from tests.numerics import assert_obeys_error_rule

ARCHITECTURES = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip


def build(name: str, **kwargs: Any) -> nn.Module:
    """torchvision's model with weights that are quick to make, and statistics that keep its activations in range."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(**kwargs)
    model.to_empty(device="cpu")
    noise = torch.rand(1_000_003) * 2 - 1
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                repeated = noise.repeat(-(-module.weight.numel() // noise.numel()))[: module.weight.numel()]
                module.weight.copy_(repeated.view_as(module.weight) * (6 / module.weight[0].numel()) ** 0.5)
                noise = noise.roll(12345)
                if module.bias is not None:
                    module.bias.uniform_(-0.1, 0.1)
            elif isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked.zero_()
    randomise(model)
    for name, module in model.named_modules():
        if name.endswith(("bn3", "bn2")) and isinstance(module, nn.BatchNorm2d):
            module.weight.data.mul_(0.3)  # the trunk's sum over many blocks stays small
    return model


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    torch.manual_seed(0)
    return build("resnet50")


@pytest.fixture(scope="module")
def fused50(resnet50: nn.Module) -> OptimizedModule:
    return optimize(resnet50)


# -------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_architectures(name: str) -> None:
    model, x = build(name), torch.randn(1, 3, 97, 131)
    fused = optimize(model, example_inputs=x)  # checked at this size, with a quarter of the pixels of the usual one
    report = fused.report()
    assert len(report.fused) == len(report.rows)
    assert (report.bytes_after or 0) < (report.bytes_before or 0)
    assert_same(fused, model, x)
    assert_same(fused, model, torch.randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert_same(fused, model, torch.randn(0, 3, 64, 64))


def test_a_batch_larger_than_the_pieces(
    resnet50: nn.Module, fused50: OptimizedModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(5, 3, 64, 64)
    if fused50._in_one_call():  # the engine divides batches itself
        fused50 = optimize(resnet50, backend="onednn", check=False)
    largest = batching.largest_tensor(fused50.graph_module, x)
    assert largest == 4 * 64 * 32 * 32  # the stem's convolution, before its pool
    monkeypatch.setattr(batching, "LARGEST_TENSOR", 2 * largest)
    fused50._pieces.clear()
    assert_same(fused50, resnet50, x)
    assert list(fused50._pieces.values()) == [2]
    fused50._pieces.clear()


def test_our_models(resnet50: nn.Module) -> None:
    models = pytest.importorskip("resnet_fast.models")
    with torch.device("meta"):
        ours = models.resnet50()
    ours.to_empty(device="cpu").load_state_dict(resnet50.state_dict())
    assert resnet_fast.optimize is optimize
    fused = optimize(ours.eval())
    assert len(fused.report().fused) == len(optimize(resnet50).report().rows)
    x = torch.randn(2, 3, 97, 64)
    assert_same(fused, ours, x)
    assert_same(fused, resnet50, x)


def test_inputs_of_any_layout() -> None:
    model = build("resnet18")
    fused50, resnet50 = optimize(model), model
    x = torch.randn(2, 3, 64, 80)
    for variant in (x.transpose(2, 3), x[:, :, ::2, 1:], x[:1].expand(3, -1, -1, -1), x.flip(3)):
        assert_same(fused50, resnet50, variant)


@pytest.mark.parametrize("kwargs", [{"replace_stride_with_dilation": [False, True, True]}, {"num_classes": 7}])
def test_variants(kwargs: dict[str, Any]) -> None:
    model = build("resnet50", **kwargs)
    assert_same(optimize(model), model, torch.randn(2, 3, 65, 64))


def test_frozen_batch_norm() -> None:
    model = build("resnet18")
    frozen = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d).eval()
    frozen.load_state_dict(model.state_dict())
    fused = optimize(frozen)
    assert not fused.report().not_fused
    assert_same(fused, model, torch.randn(2, 3, 64, 64))
    features = create_feature_extractor(frozen, {"layer2": "two"})
    fused = optimize(features)
    assert_same(fused, features, torch.randn(2, 3, 64, 64))
    assert all("conv" in row.fused or "stem" in row.fused for row in fused.report().rows if row.kind == "Conv2d")


def test_feature_extractor(resnet50: nn.Module, poisoned_memory: None) -> None:
    """Block outputs are both returned and used as residuals: they may not be written over."""
    names = ["relu", "layer1.0", "layer1.1", "layer2", "layer3.2.bn2", "layer4", "fc"]
    features = create_feature_extractor(resnet50, names)
    fused = optimize(features)
    x = torch.randn(2, 3, 64, 64)
    assert_same(fused, features, x)
    assert set(fused(x)) == set(names)
    reasons = {row.name: row.reason for row in fused.report().not_fused}
    assert reasons["maxpool"] == "the output of conv1 is used elsewhere too"
    # The ReLU behind this one is in place, so the feature is the activated tensor, and nothing stops the fusion.
    assert torch.equal(fused(x)["layer3.2.bn2"].relu(), fused(x)["layer3.2.bn2"])


def test_feature_pyramid() -> None:
    backbone = torchvision.models.detection.backbone_utils._resnet_fpn_extractor(build("resnet18"), 5)
    backbone.eval()
    fused = optimize(backbone)
    x = torch.randn(2, 3, 64, 96)
    expected, actual = backbone(x), fused(x)  # an OrderedDict, which torch.fx returns as a plain dict
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-5 * value.norm()


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x0_5", "googlenet", "regnet_x_400mf"])
def test_other_families(name: str) -> None:
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    model = randomise(getattr(torchvision.models, name)(**kwargs))
    fused = optimize(model, example_inputs=torch.empty(1, 3, 64, 64))
    convolutions = [row for row in fused.report().rows if row.kind == "Conv2d"]
    assert all(row.fused for row in convolutions)
    assert_same(fused, model, torch.randn(2, 3, 64, 96), 1e-4)


# -------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_obeys_the_error_rule(dtype: torch.dtype) -> None:
    model = build("resnet18")
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        same = copy.deepcopy(model).to(dtype)(x.to(dtype))
    fused = optimize(model, dtype=dtype, example_inputs=x)
    result = fused(x)
    assert result.dtype is torch.float32
    assert_obeys_error_rule(result.to(dtype), same, exact)
    half = optimize(copy.deepcopy(model).to(dtype), example_inputs=x.to(dtype))
    assert half.dtype is dtype
    assert half(x.to(dtype)).dtype is dtype
    assert half(x).dtype is dtype
    assert fused.report().dtype == str(dtype).removeprefix("torch.")


def test_float64_both_ways() -> None:
    model = build("resnet18")
    double = copy.deepcopy(model).double()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = double(x.double())
    wide = optimize(double, example_inputs=x.double())(x.double())
    assert wide.dtype is torch.float64
    assert (wide - exact).norm() <= 1e-12 * exact.norm()
    assert (optimize(model, dtype=torch.float64, example_inputs=x)(x) - exact).norm() <= 1e-6 * exact.norm()
    narrow = optimize(double, dtype=torch.float32, example_inputs=x.double())(x)
    assert narrow.dtype is torch.float64
    assert (narrow - exact).norm() <= 1e-5 * exact.norm()


def test_leftover_layers_are_cast_too() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5)]
    model = randomise(nn.Sequential(*layers))
    x = torch.randn(3, 3, 8, 8)
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float64, 1e-5)):
        fused = optimize(model, dtype=dtype, example_inputs=x)
        assert_same(fused, model, x, tolerance)
        assert not any(parameter.requires_grad for parameter in fused.parameters())


def test_statistics_that_overflow_half() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].running_var.fill_(1e9)
    model[1].running_mean.fill_(1e5)
    x = torch.randn(2, 3, 5, 5)
    assert_same(optimize(model, dtype=torch.float16, example_inputs=x), model, x, 0.01)


# ------------------------------------------------------------------------------------------------------------- report


def test_report_of_resnet50(fused50: OptimizedModule) -> None:
    report = fused50.report()
    assert isinstance(report, Report)
    convolutions = [row for row in report.rows if row.kind == "Conv2d"]
    assert len(convolutions) == 53
    assert all(row.fused.endswith(row.name) for row in convolutions)
    assert {row.fused.split()[0] for row in report.rows} == {"stem", "conv_bn_act", "head"}
    assert sum(row.kind == "add" for row in report.rows) == 16
    assert not report.not_fused
    first = report.rows[0]
    assert (first.name, first.kind, first.shape) == ("conv1", "Conv2d", (1, 64, 112, 112))
    assert first.bytes_before == 4 * (3 * 224 * 224 + 64 * 112 * 112 + 64 * 3 * 49)
    assert first.bytes_after == 4 * (3 * 224 * 224 + 64 * 56 * 56 + 64 * 3 * 49 + 2 * 64)
    tail = next(row for row in report.rows if row.name == "layer1.1.conv3")
    assert tail.bytes_after == 4 * (64 * 56 * 56 + 2 * 256 * 56 * 56 + 64 * 256 + 2 * 256)
    usable = [name for name in backends.ON_CPU if not backends.available()[name]]
    assert first.backend == [*usable, "reference"][0]
    assert report.bytes_before is not None
    assert report.bytes_after is not None
    assert report.bytes_before > 2 * report.bytes_after


def test_report_as_text_and_data(fused50: OptimizedModule) -> None:
    report = fused50.report()
    lines = str(report).splitlines()
    assert len({line.index("Conv2d") for line in lines if "Conv2d" in line}) == 1
    assert "175 of 175 layers fused, 0 not fused" in lines
    assert any(line.startswith("bytes moved: 421.8 MB before") for line in lines)
    data = report.as_dict()
    assert len(data["rows"]) == data["layers"] == 175
    assert data["bytes_before"] == report.bytes_before
    import json

    assert json.loads(json.dumps(data)) == data


def test_several_inputs_with_and_without_an_example() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(self.bn(self.conv(x)) + y)

    model = randomise(Two())
    x, y = torch.randn(2, 1, 3, 6, 6).unbind(0)
    for example in (None, (x, y)):
        fused = optimize(model, example_inputs=example)
        assert len(fused.report().fused) == 4
        assert (fused(x, y) - model(x, y)).abs().max() < 1e-5
        assert (fused(x=x, y=y) - model(x, y)).abs().max() < 1e-5


# -------------------------------------------------------------------------------------------------------------- errors


def test_training_mode_is_refused(resnet50: nn.Module) -> None:
    model = copy.deepcopy(resnet50)
    model.layer2[0].bn1.train()
    with pytest.raises(ValueError, match=r"layer2\.0\.bn1.*model\.eval\(\)"):
        optimize(model)
    model.train()
    with pytest.raises(ValueError, match=r"training mode.*bn1, layer1\.0\.bn1, layer1\.0\.bn2 and 50 more"):
        optimize(model)
    with pytest.raises(ValueError, match=r"training mode; .*model\.eval"):
        optimize(nn.Sequential(nn.Conv2d(3, 3, 1)))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"dtype": torch.int32}, ValueError, "dtype is torch.int32"),
        ({"dtype": "float32"}, ValueError, "dtype is 'float32'"),
        ({"cuda_graphs": "yes"}, ValueError, "cuda_graphs is 'yes'"),
        ({"cuda_graphs": None}, ValueError, "cuda_graphs is None"),
        ({"cuda_graphs": True}, ValueError, "CUDA device, it is on cpu"),
        ({"backend": "fast"}, ValueError, r"backend is 'fast'.*'auto', 'reference', 'cpu', 'onednn'"),
        ({"example_inputs": {"x": 1}}, TypeError, "example_inputs is a dict"),
        ({"example_inputs": 5}, TypeError, "example_inputs is a int"),
        ({"example_inputs": torch.empty(1, 4, 64, 64)}, ValueError, r"does not accept example_inputs \[1x4x64x64"),
        ({"example_inputs": torch.empty(3, 64)}, ValueError, r"does not accept example_inputs \[3x64"),
        ({"example_inputs": ()}, ValueError, "does not accept example_inputs"),
    ],
)
def test_impossible_arguments(
    resnet50: nn.Module, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        optimize(resnet50, **kwargs)
    assert "\n" not in str(caught.value)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: len, "must be a torch.nn.Module, got builtin"),
        (lambda: Uncopyable().eval(), "Uncopyable cannot be copied"),
        (lambda: nn.DataParallel(nn.ReLU()).eval(), r"model\.module"),
        (lambda: torch.jit.script(nn.ReLU()).eval(), "TorchScript"),
        (lambda: torch.compile(nn.ReLU().eval()), "_orig_mod"),
    ],
)
def test_models_that_cannot_be_traced(make: Callable[[], Any], message: str) -> None:
    model = make()
    with pytest.raises(TypeError, match=message) as caught:
        optimize(model)
    assert "\n" not in str(caught.value)


def test_mixed_dtypes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1).double()).eval()
    with pytest.raises(ValueError, match=r"0\.weight is torch.float32, 1\.weight is torch.float64"):
        optimize(model)
    assert optimize(model, dtype=torch.float32)(torch.randn(1, 3, 4, 4)).dtype is torch.float32
    wide_norm = nn.Sequential(nn.Conv2d(3, 3, 1).bfloat16(), nn.BatchNorm2d(3)).eval()
    assert optimize(wide_norm).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "torch.uint8.*normalise"),
        (torch.zeros(3, 8, 8), ValueError, "3-D.*unsqueeze"),
        (torch.zeros(1, 1, 8, 8), ValueError, r"\[N, 3, H, W\], got .*\[1, 1, 8, 8\]"),
        (torch.zeros(1, 8, 8, 3), ValueError, "NHWC"),
        ([1], TypeError, "got list"),
    ],
)
def test_wrong_images(fused50: OptimizedModule, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused50(x)


# ------------------------------------------------------------------------------------------- a frozen module's manners


def test_the_original_is_untouched(resnet50: nn.Module) -> None:
    model = copy.deepcopy(resnet50)
    calls: list[str] = []
    model.layer1[0].register_forward_hook(lambda *_: calls.append("hook"))
    model.layer1[0].conv1.register_forward_pre_hook(lambda *_: calls.append("pre-hook"))
    before = copy.deepcopy(model.state_dict())
    flags = [(name, module.training, getattr(module, "inplace", None)) for name, module in model.named_modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.warns(UserWarning, match=r"hooks are not called.*layer1\.0, layer1\.0\.conv1$"):
        fused = optimize(model)
    calls.clear()
    fused(torch.randn(1, 3, 64, 64))
    assert calls == []
    assert any("layer1.0.conv1" in note for note in fused.report().notes)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert flags == [(n, module.training, getattr(module, "inplace", None)) for n, module in model.named_modules()]
    assert gradients == [parameter.requires_grad for parameter in model.parameters()]
    model(torch.randn(1, 3, 64, 64))
    assert calls == ["pre-hook", "hook"]


def test_the_snapshot_does_not_follow_the_original() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten()))
    fused, x = optimize(model), torch.randn(2, 3, 5, 5)
    before = fused(x).clone()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(fused(x), before)
    torch.manual_seed(1)
    assert torch.equal(fused(x), before)


def test_parametrised_weights_are_written_out() -> None:
    model = nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
        nn.BatchNorm2d(4),
    )
    randomise(model)
    fused = optimize(model)
    assert len(fused.report().fused) == 3
    assert_same(fused, model, torch.randn(2, 3, 8, 8))


def test_it_has_no_training_mode(fused50: OptimizedModule) -> None:
    x = torch.randn(2, 3, 32, 32)
    want = fused50(x)
    assert fused50.eval() is fused50
    parent = nn.Sequential(fused50, nn.Linear(1000, 3)).train()
    nn.functional.cross_entropy(parent(x), torch.tensor([0, 2])).backward()
    assert parent.training and not any(module.training for module in fused50.modules())
    assert torch.equal(fused50(x), want)
    weights = list(fused50.parameters())
    assert weights[0].device.type == "cpu" and not any(weight.requires_grad for weight in weights)
    assert not fused50(torch.randn(1, 3, 32, 32, requires_grad=True)).requires_grad


def test_it_cannot_be_cast(fused50: OptimizedModule) -> None:
    with pytest.raises(RuntimeError, match=r"optimize\(model, dtype=torch.float16\)"):
        fused50.half()
    assert fused50.float() is fused50
    narrow = optimize(nn.Conv2d(3, 4, 3).eval(), dtype=torch.bfloat16)
    narrow.to(torch.bfloat16)
    assert {str(buffer.dtype) for buffer in narrow.parameters()} == {"torch.float32"}
    assert narrow.to("cpu")(torch.randn(1, 3, 5, 5)).shape == (1, 4, 3, 3)


def test_state_dict_round_trip(resnet50: nn.Module, fused50: OptimizedModule) -> None:
    state = fused50.state_dict()
    assert set(state) >= {f"graph_module.conv1.{name}" for name in ("weight", "scale", "shift")}
    assert torch.equal(state["graph_module.conv1.weight"], resnet50.conv1.weight)
    torch.manual_seed(5)
    other = optimize(build("resnet50"))
    x = torch.randn(1, 3, 64, 64)
    assert not torch.equal(other(x), fused50(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), fused50(x))


def test_copies_and_pickles(fused50: OptimizedModule) -> None:
    x = torch.randn(3, 3, 64, 64)
    expected = fused50(x)
    stream = io.BytesIO()
    torch.save(fused50, stream)
    assert stream.tell() < 1.1 * sum(b.numel() * b.element_size() for b in fused50.parameters())
    stream.seek(0)
    for other in (copy.deepcopy(fused50), pickle.loads(pickle.dumps(fused50)), torch.load(stream, weights_only=False)):
        assert torch.equal(other(x), expected)
        assert not other.training
        assert str(other.report()) == str(fused50.report())
        assert ops(other) == ops(fused50)
    deep = copy.deepcopy(fused50)
    next(deep.parameters()).zero_()
    assert torch.equal(fused50(x), expected)


def test_threads(resnet50: nn.Module) -> None:
    fused = optimize(build("resnet18"))
    inputs = [torch.randn(1 + index % 3, 3, 64 + 32 * (index % 2), 64) for index in range(6)]
    expected = [fused(x) for x in inputs]
    fresh = pickle.loads(pickle.dumps(fused))
    failures: list[str] = []

    def work(offset: int) -> None:
        for index in range(len(inputs)):
            position = (index + offset) % len(inputs)
            if not torch.allclose(fresh(inputs[position]), expected[position], rtol=1e-5, atol=1e-5):
                failures.append(f"{offset} {position}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what they raise
    assert not failures


def test_the_same_answer_in_every_batch(fused50: OptimizedModule) -> None:
    x = torch.randn(3, 3, 64, 64)
    together = fused50(x)
    for index in range(3):
        alone = fused50(x[index : index + 1])
        assert (alone - together[index]).norm() <= 1e-5 * alone.norm()
    assert torch.equal(fused50(x), together)


def test_nan_and_infinity_come_through(resnet50: nn.Module, fused50: OptimizedModule) -> None:
    x = torch.randn(3, 3, 64, 64)
    x[0, 0, 5, 5], x[1, 1, 3, 3] = float("nan"), float("inf")
    with torch.no_grad():
        expected = resnet50(x)
    actual = fused50(x)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert actual[0].isnan().all()
    assert actual[2].isfinite().all()


def test_autocast_does_not_change_it(fused50: OptimizedModule) -> None:
    x = torch.randn(1, 3, 64, 64)
    expected = fused50(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused50(x), expected)


def test_backend_is_kept(resnet50: nn.Module) -> None:
    model = build("resnet18")
    x = torch.randn(2, 3, 64, 64)
    reference = optimize(model, backend="reference")
    assert {row.backend for row in reference.report().fused} == {"reference"}
    assert_same(reference, model, x)
    if not backends.available()["onednn"]:
        chosen = optimize(model, backend="onednn")
        assert {row.backend for row in chosen.report().fused} == {"onednn"}
        assert_same(chosen, model, x)


def test_no_warnings(resnet50: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimize(resnet50)(torch.randn(2, 3, 32, 32))


def test_global_state_is_left_alone(fused50: OptimizedModule) -> None:
    model, x = nn.Conv2d(3, 3, 1).eval(), torch.randn(1, 3, 32, 32)
    state = torch.get_rng_state()
    fused50(x)
    optimize(model)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
