"""The models are ordinary modules: whatever one does to their parameters or hooks shows at the very next forward."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast as rf
from resnet_fast.nn import pristine
from tests.networks import watch_ops
from tests.numerics import assert_obeys_error_rule

pytestmark = pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning")


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """BN statistics and affine parameters as of a trained network, so that a wrong fold shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            for name, low, high in (("running_mean", -0.2, 0.2), ("running_var", 0.5, 1.5), ("weight", 0.5, 1.0),
                                    ("bias", -0.2, 0.2)):  # fmt: skip
                tensor = getattr(module, name)
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model


def twins(name: str = "resnet50", **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Our model and torchvision's with the same parameters, in eval mode."""
    theirs = randomise(getattr(torchvision.models, name)(**kwargs)).eval()
    ours = getattr(rf, name)(**kwargs).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm())


@pytest.fixture(params=["resnet18", "resnet50"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    return twins(request.param)


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 64, 96)


Edit = Callable[[nn.Module], Any]
EDITS: dict[str, Edit] = {
    "one weight": lambda m: m.layer1[0].conv1.weight.data.view(-1)[0].add_(3),
    "one weight, no_grad": lambda m: _no_grad(lambda: m.layer2[0].conv2.weight[0, 0].add_(1)),
    "one running_var": lambda m: m.layer2[0].bn1.running_var[5].mul_(4),
    "one running_mean": lambda m: m.bn1.running_mean[5].add_(1),
    "one bias": lambda m: _no_grad(lambda: m.layer3[0].bn2.bias[1].add_(1)),
    "the stem": lambda m: _no_grad(lambda: m.conv1.weight.mul_(1.1)),
    "an averaged model's copy through .data": lambda m: [p.data.mul_(0.9) for p in m.parameters()],
    "a filter": lambda m: m.layer4[1].conv1.weight.data[3].neg_(),
    "a channel of the images": lambda m: m.conv1.weight.data[:, 1].zero_(),
    "all input channels but one": lambda m: m.layer4[1].conv2.weight.data[:, 1:].zero_(),
    "the centre taps, by numpy": lambda m: m.layer1[0].conv2.weight.detach().numpy()[:, :, 1, 1].fill(0),
    "all taps but one": lambda m: m.layer3[0].conv2.weight.data[:, :, 1:, 1:].zero_(),
    "two filters swapped": lambda m: _swap(m.layer2[0].conv1.weight.data),
    "two input channels swapped": lambda m: _swap(m.layer2[0].conv2.weight.data.transpose(0, 1)),
    "all signs": lambda m: m.layer2[1].conv1.weight.data.neg_(),
    "all exponents, by numpy": lambda m: np.multiply(a := m.layer4[0].conv1.weight.detach().numpy(), 2, out=a),
    "a transposed kernel": lambda m: m.layer1[1].conv2.weight.data.copy_(m.layer1[1].conv2.weight.data.mT.clone()),
    "one bit": lambda m: m.layer1[0].conv2.weight.data.view(torch.int32)[0, 0, 1, 1].bitwise_xor_(1 << 29),
    "through a view": lambda m: m.layer3[1].conv1.weight.detach().view(-1)[5::7].mul_(3),
    "another process, in shared memory": lambda m: _elsewhere(m.share_memory().layer1[0].conv1.weight),
    "another process, a running mean": lambda m: _elsewhere(m.share_memory().layer1[0].bn1.running_mean),
    "the classifier": lambda m: _no_grad(lambda: m.fc.weight[3].zero_()),
    "eps": lambda m: setattr(m.layer1[0].bn1, "eps", 0.1),
    "a parameter replaced": lambda m: setattr(
        m.layer1[0].conv2, "weight", nn.Parameter(m.layer1[0].conv2.weight.detach() * 2)
    ),
    "a shortcut's weight": lambda m: _no_grad(lambda: m.layer2[0].downsample[0].weight.mul_(2)),
}


def _swap(weight: Tensor) -> None:
    weight[:2] = weight[:2].flip(0).clone()


def _elsewhere(tensor: Tensor) -> None:
    values = tensor.detach().numpy()
    process = multiprocessing.get_context("fork").Process(target=np.multiply, args=(values, 3), kwargs={"out": values})
    process.start()
    process.join()


def _no_grad(edit: Callable[[], Any]) -> None:
    with torch.no_grad():
        edit()


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_shows_at_the_next_forward(pair: tuple[nn.Module, nn.Module], image: Tensor, edit: str) -> None:
    ours, theirs = pair
    with torch.no_grad():
        before = ours(image)
        assert close(before, theirs(image))
    for model in pair:
        EDITS[edit](model)
    with torch.no_grad():
        after = ours(image)
        assert not torch.equal(before, after), "the edit did not change the answer"
        assert close(after, theirs(image))


def test_load_state_dict_after_a_forward(pair: tuple[nn.Module, nn.Module], image: Tensor) -> None:
    ours, theirs = pair
    with torch.no_grad():
        ours(image)
        randomise(theirs, seed=7)
        ours.load_state_dict(theirs.state_dict())
        assert close(ours(image), theirs(image))
        ours.load_state_dict({k: v.clone() for k, v in theirs.state_dict().items()}, assign=True)
        assert close(ours(image), theirs(image))


def test_dtypes_and_memory_formats(pair: tuple[nn.Module, nn.Module], image: Tensor) -> None:
    ours, theirs = pair
    exact_model = copy.deepcopy(theirs).double()
    with torch.no_grad():
        ours(image)
        for model in pair:
            model.to(memory_format=torch.channels_last)
        assert close(ours(image), theirs(image))
        assert close(ours(image.contiguous(memory_format=torch.channels_last)), theirs(image))
        exact = exact_model(image.double())
        assert ours.double()(image.double()).dtype is torch.float64
        assert close(ours(image.double()), exact, 1e-12)
        ours.float()
        assert close(ours(image), theirs(image))
        # torch's float16 convolutions are very slow on a CPU: one model is enough.
        for dtype in (torch.bfloat16, torch.float16)[: 2 if len(ours.layer1) == 2 else 1]:
            mine, other = copy.deepcopy(ours).to(dtype), copy.deepcopy(theirs).to(dtype)
            small = image[:1, :, :32, :32].to(dtype)
            reference = copy.deepcopy(other).double()(small.double())
            assert_obeys_error_rule(mine(small), other(small), reference, f"model in {dtype}")


def test_half_keeps_wide_statistics(image: Tensor) -> None:
    """BN is folded in float32 even for a half model: a variance of 60000 and eps must not meet in half."""
    ours, theirs = twins("resnet18")
    for model in (ours, theirs):
        model.bn1.running_var.fill_(60000.0)
        model.bn1.weight.data.fill_(250.0)
    exact = copy.deepcopy(theirs).half().double()
    small = image[:1, :, :32, :32].half()
    with torch.no_grad():
        assert_obeys_error_rule(ours.half()(small), theirs.half()(small), exact(small.double()))


def test_copies_and_files(pair: tuple[nn.Module, nn.Module], image: Tensor) -> None:
    ours, _ = pair
    with torch.no_grad():
        want = ours(image)
        copied = copy.deepcopy(ours)
        copied.layer1[0].conv1.weight.mul_(2)
        assert torch.equal(ours(image), want) and not torch.equal(copied(image), want)
        assert torch.equal(pickle.loads(pickle.dumps(ours))(image), want)
        for what in (ours, ours.state_dict()):
            buffer = io.BytesIO()
            torch.save(what, buffer)
            buffer.seek(0)
            if what is ours:
                loaded = torch.load(buffer, weights_only=False)
            else:
                blocks = [len(getattr(ours, f"layer{i}")) for i in (1, 2, 3, 4)]
                loaded = type(ours)(type(ours.layer1[0]), blocks).eval()
                loaded.load_state_dict(torch.load(buffer, weights_only=True))
            assert torch.equal(loaded(image), want)


INNER = ["conv1", "bn1", "relu", "maxpool", "layer1.0.conv1", "layer1.0.bn2", "layer2.0.relu", "layer2.0.downsample",
         "layer2.0.downsample.0", "layer2.0.downsample.1", "layer4.1.bn2", "layer3", "layer3.1", "avgpool",
         "fc"]  # fmt: skip


@pytest.mark.parametrize("name", INNER)
def test_hooks_fire_with_torchs_values(pair: tuple[nn.Module, nn.Module], image: Tensor, name: str) -> None:
    seen: list[list[tuple[str, Tensor]]] = []
    for model in pair:
        calls: list[tuple[str, Tensor]] = []
        inner = model.get_submodule(name)
        handles = [
            inner.register_forward_pre_hook(lambda m, args, c=calls: c.append(("in", args[0].clone()))),
            inner.register_forward_hook(lambda m, args, out, c=calls: c.append(("out", out.clone()))),
        ]
        with torch.no_grad():
            answer = model(image)
        for handle in handles:
            handle.remove()
        count = len(calls)
        with torch.no_grad():
            assert close(model(image), answer)
        assert len(calls) == count, "a removed hook still fires"
        seen.append([*calls, ("answer", answer)])
    ours, theirs = seen
    assert [kind for kind, _ in ours] == [kind for kind, _ in theirs] and len(ours) >= 3
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert close(a, b)


def test_a_hook_that_changes_the_output_counts(image: Tensor) -> None:
    ours, theirs = twins("resnet18")
    for model in (ours, theirs):
        model.layer2[0].bn1.register_forward_hook(lambda m, args, out: out * 2)
    with torch.no_grad():
        assert close(ours(image), theirs(image))


def test_backward_and_global_hooks_and_replaced_forwards(image: Tensor) -> None:
    ours, theirs = twins("resnet18")
    grads: list[Tensor] = []
    for model in (ours, theirs):
        handle = model.layer1[0].conv2.register_full_backward_hook(lambda m, gi, go: grads.append(go[0].clone()))
        model(image).sum().backward()
        handle.remove()
    assert len(grads) == 2 and close(*grads, 1e-4)
    called: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, o: called.append(type(m).__name__))
    try:
        ours(image)
    finally:
        handle.remove()
    assert called.count("BatchNorm2d") == 20
    ours.layer1[0].conv1.forward = lambda x: torch.zeros(x.shape)
    theirs.layer1[0].conv1.forward = ours.layer1[0].conv1.forward
    with torch.no_grad():
        assert close(ours(image), theirs(image))


def test_parametrized_and_subclassed_layers_run_as_they_are(image: Tensor) -> None:
    class Doubling(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    class Noisy(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    ours, theirs = twins("resnet18")
    for model in (ours, theirs):
        torch.nn.utils.parametrize.register_parametrization(model.layer1[0].conv1, "weight", Doubling())
        noisy = Noisy(128).eval()
        noisy.load_state_dict(model.layer2[0].bn1.state_dict())
        model.layer2[0].bn1 = noisy
    with torch.no_grad():
        assert close(ours(image), theirs(image))


def test_symbolic_trace_equals_torchvisions_graph(pair: tuple[nn.Module, nn.Module], image: Tensor) -> None:
    ours, theirs = (torch.fx.symbolic_trace(model) for model in pair)
    assert sorted(str(n.target) for n in ours.graph.nodes) == sorted(str(n.target) for n in theirs.graph.nodes)
    with torch.no_grad():
        assert close(ours(image), theirs(image))


def test_feature_extraction(pair: tuple[nn.Module, nn.Module], image: Tensor) -> None:
    for a, b in zip(*(get_graph_node_names(model) for model in pair), strict=True):
        assert sorted(a) == sorted(b)
    nodes = {"layer1.0.relu_1": "a", "layer2": "b", "layer3.1.add": "c", "avgpool": "d", "flatten": "e"}
    ours, theirs = (create_feature_extractor(model, nodes) for model in pair)
    with torch.no_grad():
        a, b = ours(image), theirs(image)
    assert list(a) == list(b) == ["a", "b", "c", "d", "e"]
    assert all(close(a[k], b[k]) for k in a)


def test_intermediate_layer_getter_and_fpn(pair: tuple[nn.Module, nn.Module], image: Tensor) -> None:
    layers = {"layer1": "0", "layer4": "3"}
    with torch.no_grad():
        a, b = (IntermediateLayerGetter(model, layers)(image) for model in pair)
        assert all(close(a[k], b[k]) for k in ("0", "3"))
        ours, theirs = (_resnet_fpn_extractor(model, trainable_layers=3) for model in pair)
        ours.load_state_dict(theirs.state_dict())
        a, b = ours(image), theirs(image)
    assert list(a) == list(b) and all(close(a[k], b[k]) for k in a)


def test_compiles_in_one_graph(image: Tensor) -> None:
    ours, theirs = twins("resnet18")
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert close(compiled(image), theirs(image))
        ours.layer1[0].conv1.weight.mul_(1.5)
        theirs.layer1[0].conv1.weight.mul_(1.5)
        assert close(compiled(image), theirs(image))
    compiled(image).sum().backward()
    theirs(image).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert close(a.grad, b.grad, 1e-3), name
    for model in (ours, theirs):
        model.train().zero_grad()
    assert close(compiled(image), theirs(image), 1e-4)


def test_compiles_with_inductor(image: Tensor) -> None:
    ours, theirs = twins("resnet18")
    torch._dynamo.reset()
    with torch.no_grad():
        assert close(torch.compile(ours, fullgraph=True)(image), theirs(image))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_batch_and_odd_sizes(strict: bool) -> None:
    ours, theirs = twins("resnet18" if strict else "resnet50")
    # From 33 pixels on: at 32 and below the last feature map is 1x1, and torch's own strides specialise on that.
    dynamic = {"x": {0: torch.export.Dim("n", min=1, max=64), 2: torch.export.Dim("h", min=33, max=999),
                     3: torch.export.Dim("w", min=33, max=999)}}  # fmt: skip
    program = torch.export.export(ours, (torch.randn(2, 3, 65, 97),), dynamic_shapes=dynamic, strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert "resnet_fast.conv_bn_act.default" in targets and "resnet_fast.stem.default" in targets
    with torch.no_grad():
        for shape in ((1, 3, 64, 64), (3, 3, 33, 71), (5, 3, 97, 131)):
            x = torch.randn(shape)
            assert close(program.module()(x), theirs(x))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    with torch.no_grad():
        assert close(torch.export.load(buffer).module()(x), theirs(x))


def test_trace_and_onnx_see_plain_layers(image: Tensor) -> None:
    ours, theirs = twins("resnet18")
    with torch.no_grad():
        traced = torch.jit.trace(ours, image)
        assert "resnet_fast::" not in str(traced.inlined_graph)
        assert close(traced(image), theirs(image))


def test_two_threads_at_once(pair: tuple[nn.Module, nn.Module], image: Tensor) -> None:
    ours, _ = pair
    images = [image, image[:1, :, :40, :50].clone(), torch.randn(3, 3, 33, 64)]
    wrong: list[str] = []
    with torch.no_grad():
        wanted = [pair[1](x) for x in images]

    def work(offset: int) -> None:
        with torch.no_grad():
            for i in range(6):
                k = (i + offset) % 3
                if not close(ours(images[k]), wanted[k]):
                    wrong.append(f"thread {offset}, image {k}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_autocast_bfloat16(pair: tuple[nn.Module, nn.Module], image: Tensor) -> None:
    ours, theirs = pair
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(image.double())
        with torch.autocast("cpu", torch.bfloat16):
            a, b = ours(image), theirs(image)
    assert_obeys_error_rule(a, b, exact, "autocast")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_special_values_reach_the_answer_as_in_torch(value: float) -> None:
    ours, theirs = twins("resnet18")
    x = torch.randn(3, 3, 64, 64)
    x[1, 2, 30, 30] = value
    with torch.no_grad():
        a, b = ours(x), theirs(x)
    assert torch.equal(a.isnan(), b.isnan()) and a[1].isnan().any()
    assert close(a[0], b[0]) and close(a[2], b[2])


def test_frozen_batch_norm_in_train_mode_is_fused_and_trains(image: Tensor) -> None:
    ours, theirs = twins("resnet18", norm_layer=FrozenBatchNorm2d)
    assert ours.train()(image).grad_fn.name() == "GeneratedBackwardFor_resnet_fast_head_defaultBackward"
    same_gradients(ours.train(), theirs.train(), image)


def same_gradients(ours: nn.Module, theirs: nn.Module, image: Tensor) -> None:
    """In float64, where a ReLU that two roundings open and close differently cannot blur the comparison.

    The gradients of each op in float32 and bfloat16 are held to the error rule in the ops' own tests.
    """
    inputs = [image.double().requires_grad_() for _ in range(2)]
    for model, x in zip((ours.double(), theirs.double()), inputs, strict=True):
        model(x).square().sum().backward()
    assert close(inputs[0].grad, inputs[1].grad, 1e-11)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or close(p.grad, q.grad, 1e-11), name


def test_eval_mode_with_gradients(image: Tensor) -> None:
    same_gradients(*twins("resnet18"), image)


def test_eval_mode_with_some_parameters_frozen(image: Tensor) -> None:
    ours, theirs = twins("resnet50")
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layer3" in name or "bn2.weight" in name)
    same_gradients(ours, theirs, image)


def test_function_transforms_and_forward_mode(image: Tensor) -> None:
    ours, theirs = twins("resnet18")
    small, direction = image[:, :, :33, :40], torch.randn(2, 3, 33, 40)
    results = []
    for model in (ours, theirs):
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(p: dict[str, Tensor], x: Tensor, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, p, (x,)).square().sum()

        tangent = torch.func.jvp(model, (small,), (direction,))[1]
        per_image = torch.func.vmap(lambda x, m=model: m(x[None])[0])(small)
        gradient = torch.func.grad(loss)(parameters, small)["layer2.0.conv1.weight"]
        with torch.autograd.forward_ad.dual_level(), torch.no_grad():
            dual = model(torch.autograd.forward_ad.make_dual(small, direction))
            other = torch.autograd.forward_ad.unpack_dual(dual).tangent
        results.append((tangent.detach(), per_image.detach(), gradient, other))
    for a, b in zip(*results, strict=True):
        assert b.abs().sum() > 0 and close(a, b, 1e-4)


@pytest.mark.parametrize("op", ["conv_bn_act", "add_act", "stem", "head"])
def test_ops_under_forward_mode(op: str) -> None:
    x = torch.randn(1, 4, 16, 16)
    others = {
        "conv_bn_act": (torch.randn(5, 4, 3, 3), torch.rand(5), torch.randn(5)),
        "add_act": (torch.randn_like(x),),
        "stem": (torch.randn(5, 4, 7, 7), torch.rand(5), torch.randn(5)),
        "head": (torch.randn(5, 4), torch.randn(5)),
    }[op]
    run = getattr(rf.ops, op)
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(lambda t: run(t, *others), (x,), (direction,))
    step = 1e-3
    exact = [run(x.double() + sign * step * direction.double(), *(t.double() for t in others)) for sign in (1, -1)]
    assert close(tangent, (exact[0] - exact[1]) / (2 * step), 0.05)


@pytest.mark.parametrize(("mine", "given"), [(torch.float32, torch.float64), (torch.float32, torch.bfloat16),
                                             (torch.float64, torch.float32)])  # fmt: skip
def test_an_image_of_another_dtype_is_refused_clearly(mine: torch.dtype, given: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"the image is {given}, the model's parameters are {mine}"):
        rf.resnet18().eval().to(mine)(torch.zeros(1, 3, 33, 33, dtype=given))


def test_conv_bn_act_2d() -> None:
    module = rf.nn.ConvBNAct2d(4, 6, 3, stride=2, bias=True)
    assert list(module.state_dict())[:3] == ["conv.weight", "conv.bias", "bn.weight"]
    randomise(module)
    x, residual = torch.randn(2, 4, 9, 9), torch.randn(2, 6, 5, 5)
    for training in (True, False):
        module.train(training)
        plain = copy.deepcopy(module)
        want = torch.relu(plain.bn(plain.conv(x)) + residual)
        assert close(module(x, residual), want)
    assert (rf.nn.ConvBNAct2d(4, 6, 1, activation=False).eval()(x) < 0).any()
    with pytest.raises(ValueError, match="kernel_size 2 is even"):
        rf.nn.ConvBNAct2d(4, 6, 2)


def test_batch_norm_variants_fold_exactly() -> None:
    for kwargs in ({}, {"affine": False}, {"eps": 0.3}, {"track_running_stats": False}, {"momentum": None}):
        module = rf.nn.ConvBNAct2d(4, 6, 3, norm_layer=lambda c, k=kwargs: nn.BatchNorm2d(c, **k))
        module.train()(torch.randn(4, 4, 9, 9) * 3 + 1)
        module.eval()
        x = torch.randn(2, 4, 9, 9)
        assert close(module(x), torch.relu(module.bn(module.conv(x)))), kwargs


# --- whatever else somebody does to torch's layers


def small_twins(**kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """A small ResNet of ours and torchvision's with the same parameters, in eval mode."""
    theirs = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5, **kwargs)
    ours = rf.models.ResNet(rf.models.BasicBlock, [1, 1, 1, 1], num_classes=5, **kwargs)
    ours.load_state_dict(randomise(theirs).state_dict())
    return ours.eval(), theirs.eval()


def _scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs) * 0.9


REPLACED = [
    (nn.BatchNorm2d, "forward"), (nn.modules.batchnorm._BatchNorm, "forward"), (nn.BatchNorm2d, "_call_impl"),
    (nn.Conv2d, "forward"), (nn.Conv2d, "_conv_forward"), (nn.Conv2d, "__call__"), (nn.ReLU, "forward"),
    (nn.MaxPool2d, "forward"), (nn.AdaptiveAvgPool2d, "forward"), (nn.Linear, "forward"), (nn.Sequential, "forward"),
    (F, "conv2d"), (F, "batch_norm"), (F, "relu"), (F, "max_pool2d"), (F, "adaptive_avg_pool2d"), (F, "linear"),
    (torch, "batch_norm"), (torch, "relu_"), (torch, "max_pool2d"), (torch._C._nn, "adaptive_avg_pool2d"),
    (torch, "flatten"),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), REPLACED, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_functions_of_torchs_that_were_replaced(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live models and snapshots call what stands there now, and are fused again when it is put back."""
    ours, theirs = small_twins()
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        before = theirs(x)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, _scaled(getattr(owner, name)))
            want = theirs(x)
            assert not close(before, want, 1e-2), "the replacement changes nothing"
            assert close(ours(x), want)
            if (owner, name) != (torch, "flatten"):  # it is in the model's own forward, which is traced
                assert close(rf.optimize(theirs)(x), want)
        assert close(ours(x), before)


INSTANCES: dict[str, Edit] = {
    "_conv_forward": lambda m: setattr(m.conv1, "_conv_forward", _scaled(m.conv1._conv_forward)),
    "the stem's forward": lambda m: setattr(m.bn1, "forward", _scaled(m.bn1.forward)),
    "_call_impl": lambda m: setattr(m.layer1[0].bn1, "_call_impl", _scaled(m.layer1[0].bn1._call_impl)),
    "_check_input_dim": lambda m: setattr(m.layer2[0].bn1, "_check_input_dim", lambda x: x.mul_(0.9)),
    "a shortcut's norm": lambda m: setattr(m.layer2[0].downsample, "forward", _scaled(m.layer2[0].downsample.forward)),
    "compile": lambda m: setattr(m.layer1[0].conv2, "_compiled_call_impl", _scaled(m.layer1[0].conv2._call_impl)),
    "the classifier": lambda m: setattr(m.fc, "forward", _scaled(m.fc.forward)),
    "the pool": lambda m: setattr(m.avgpool, "_slow_forward", None) or setattr(m.avgpool, "forward", _half_pool),
}


def _half_pool(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True) / 2


@pytest.mark.parametrize("change", INSTANCES)
def test_methods_of_one_layer_that_were_replaced(change: str) -> None:
    ours, theirs = small_twins()
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        before = theirs(x)
        for model in (ours, theirs):
            INSTANCES[change](model)
        want = theirs(x)
        assert not close(before, want, 1e-3), "the replacement changes nothing"
        assert close(ours(x), want)


def test_a_replaced_module_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As profilers do it for every module of the process."""
    ours, theirs = small_twins()
    x = torch.randn(1, 3, 40, 40)
    seen: list[str] = []
    call = nn.Module.__call__

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(self).__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", noted)
    counts = []
    for model in (ours, theirs):
        seen.clear()
        model(x)
        counts.append(sorted(seen))
    assert counts[0] == counts[1] and counts[0].count("Conv2d") == 12


class _Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_modes_see_torchs_own_calls(training: bool) -> None:
    """A function mode sees every layer, a FlopCounterMode counts what it counts for torchvision's model."""
    x = torch.randn(2, 3, 40, 40)
    called, flops = [], []
    for model in small_twins():
        model.train(training)
        with _Counting() as mode:
            model(x)
        called.append({name: n for name, n in mode.calls.items() if name in ("conv2d", "batch_norm", "relu", "linear")})
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        flops.append(counter.get_total_flops())
    assert called[0] == called[1] and called[0]["conv2d"] == 12
    assert flops[0] == flops[1] > 0


def test_a_mode_that_changes_results_counts() -> None:
    class Doubling(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            return out * 2 if func is torch.conv2d else out

    ours, theirs = small_twins()
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        before = theirs(x)
        with Doubling():
            want = theirs(x)
            assert close(ours(x), want) and not close(want, before, 1e-2)
        assert close(ours(x), before)


@pytest.mark.parametrize("training", [False, True])
def test_a_default_device_changes_nothing(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a function mode too, but only of calls that make tensors: the models stay fused."""
    ours, theirs = (model.double() for model in small_twins())
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    ran = watch_ops(monkeypatch)
    with torch.device("meta"):
        got, want = (model.train(training)(x) for model in (ours, theirs))
        counted = [name for name, _ in ran if name in ("conv_bn_act", "head")]
        assert got.device.type == "cpu" and close(got, want) and len(counted) == (1 if training else 12)
        for out in (got, want):
            out.square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert close(p.grad, q.grad, 1e-10), name


class _Scaled(Tensor):
    """A weight stored as a tensor and a factor, as quantised ones are; it knows how torch's layers compute with it."""

    factor: float

    @staticmethod
    def __new__(cls, stored: Tensor, factor: float) -> Any:
        made = Tensor._make_wrapper_subclass(cls, stored.shape, dtype=stored.dtype, device=stored.device)  # type: ignore[attr-defined]
        made.stored, made.factor = stored, factor
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].stored, args[0].factor)
        plain = [a.stored * a.factor if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


SUBCLASSED = ["fc.weight", "fc.bias", "conv1.weight", "layer1.0.conv2.weight", "layer2.0.downsample.0.weight",
              "layer2.0.bn1.weight", "bn1.running_var", "layer3.0.bn2.running_mean"]  # fmt: skip


@pytest.mark.parametrize("name", SUBCLASSED)
def test_weights_that_are_tensor_subclasses(name: str) -> None:
    ours, theirs = small_twins()
    x = torch.randn(2, 3, 40, 40)
    for model in (ours, theirs):
        layer = model.get_submodule(name.rpartition(".")[0])
        last = name.rpartition(".")[2]
        value = _Scaled(getattr(layer, last).detach(), 0.5)
        setattr(layer, last, nn.Parameter(value, requires_grad=False) if last in ("weight", "bias") else value)
    with torch.no_grad():
        assert close(ours(x), theirs(x))


@pytest.mark.parametrize("training", [False, True])
def test_images_that_are_tensor_subclasses(training: bool) -> None:
    """torchvision's images, and a subclass of somebody's that watches every call."""

    class Logged(Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    ours, theirs = (model.train(training) for model in small_twins())
    x = torch.randn(2, 3, 40, 40)
    assert close(ours(tv_tensors.Image(x)), theirs(tv_tensors.Image(x)))
    counts = []
    for model in (ours, theirs):
        Logged.seen.clear()
        out = model(x.as_subclass(Logged))
        assert type(out) is Logged
        counts.append(Counter(name for name in Logged.seen if name in ("conv2d", "batch_norm", "linear", "relu_")))
    assert counts[0] == counts[1] and counts[0]["conv2d"] == 12


def test_why_a_layer_runs_plain_is_recorded() -> None:
    ours, _ = small_twins()
    ours.layer1[0].conv1._conv_forward = ours.layer1[0].conv1._conv_forward
    before = Counter(rf.backends.fallbacks())
    ours(torch.randn(1, 3, 33, 33))
    new = Counter(rf.backends.fallbacks()) - before
    assert any("_conv_forward of a Conv2d" in reason for _, reason in new)


class _Frozen(nn.Module):
    """A frozen norm of somebody's own, whose eps is for show: the statistics contain it already."""

    def __init__(self, channels: int, eps: float = 0.5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * self.running_var.rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class _FrozenOurs(rf.nn.FrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _FrozenTheirs(FrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [_Frozen, _FrozenOurs, _FrozenTheirs])
@pytest.mark.parametrize("training", [False, True])
def test_frozen_norms_of_others_run_by_their_own_forward(kind: type[nn.Module], training: bool) -> None:
    """Whatever they are called: nothing is decided by a name."""
    kind = type("FrozenBatchNorm2d", (kind,), {})
    ours, theirs = (model.train(training) for model in small_twins(norm_layer=kind))
    x = torch.randn(2, 3, 40, 40)
    before = Counter(rf.backends.fallbacks())
    with torch.no_grad():
        want = theirs(x)
        assert close(ours(x), want)
        assert close(rf.optimize(theirs.eval())(x), want)
    assert any("FrozenBatchNorm2d" in reason for _, reason in Counter(rf.backends.fallbacks()) - before)


@pytest.mark.parametrize("kind", [rf.nn.FrozenBatchNorm2d, FrozenBatchNorm2d])
def test_known_frozen_norms_with_another_forward(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = small_twins(norm_layer=kind)
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert close(ours(x), theirs(x))
        monkeypatch.setattr(kind, "forward", _scaled(kind.forward))
        want = theirs(x)
        assert close(ours(x), want)
        assert close(rf.optimize(theirs)(x), want)


def _set(layer: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(layer, name, value)


GEOMETRIES: dict[str, Edit] = {
    "stride 1": lambda m: (_set(m.layer4[0].conv1, stride=1), _set(m.layer4[0].downsample[0], stride=1)),
    "stride (1,)": lambda m: (_set(m.layer4[0].conv1, stride=(1,)), _set(m.layer4[0].downsample[0], stride=[1])),
    "a list": lambda m: _set(m.conv1, stride=[2, 2], padding=[3, 3]),
    "padding 1": lambda m: _set(m.layer1[0].conv1, padding=1),
    "same": lambda m: _set(m.layer1[0].conv2, padding="same"),
    "same, dilated": lambda m: _set(m.layer1[0].conv2, padding="same", dilation=2),
    "valid": lambda m: _set(m.conv1, padding="valid"),
    "no padding at the stem": lambda m: _set(m.conv1, padding=0),
    "dilation 2": lambda m: _set(m.layer3[0].conv2, padding=2, dilation=2),
    "same, uneven": lambda m: _set(m.conv1, stride=1, padding="same", weight=nn.Parameter(m.conv1.weight[..., 1:])),
    "a 5x5 stem": lambda m: _set(m.conv1, weight=nn.Parameter(m.conv1.weight[..., 1:-1, 1:-1].detach().clone())),
    "kernel_size of no meaning": lambda m: _set(m.conv1, kernel_size=3),
    "circular": lambda m: _set(m.layer1[0].conv1, padding_mode="circular"),
    "pairs for the pool": lambda m: _set(m.maxpool, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)),
    "an uneven pool": lambda m: _set(m.maxpool, kernel_size=(3, 2), stride=[2, 1], padding=(1, 0), dilation=(1, 2)),
    "the pool's own stride": lambda m: _set(m.maxpool, stride=None),
    "a list of outputs": lambda m: _set(m.avgpool, output_size=[1, 1]),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry_in_any_form(name: str) -> None:
    """Ints, one int for both directions, lists and strings, as torch's layers take them; also for optimize()."""
    ours, theirs = (model.double() for model in small_twins())
    x = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    for model in (ours, theirs):
        GEOMETRIES[name](model)
    with torch.no_grad():
        want = theirs(x)
        assert close(ours(x), want, 1e-12)
        assert close(rf.optimize(theirs)(x), want, 1e-12) and close(rf.optimize(ours)(x), want, 1e-12)
    for lean in (False, True):
        ours.memory_efficient = lean
        ours.train(), theirs.train()
        ours.zero_grad(), theirs.zero_grad()
        same_gradients(ours, theirs, x)


class _First(nn.Module):
    """A first layer that prepares what it is given and calls the convolution on it."""

    def __init__(self, conv: nn.Module, prepare: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.conv, self.prepare = conv, prepare

    def forward(self, x: Any) -> Tensor:
        return self.conv(self.prepare(x))


class _Reading(nn.Conv2d):
    """A subclass of Conv2d that reads bytes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() / 255)


def _reading(conv: Any) -> nn.Module:
    made = _Reading(3, 64, 7, 2, 3, bias=False)
    made.load_state_dict(conv.state_dict())
    return made


def _bytes_before(conv: Any) -> nn.Module:
    conv.register_forward_pre_hook(lambda module, args: (args[0].float() / 255,))
    return conv


def _bytes_inside(conv: Any) -> nn.Module:
    forward = conv._conv_forward
    conv._conv_forward = lambda x, weight, bias: forward(x.float() / 255, weight, bias)
    return conv


_BYTES = torch.arange(2 * 3 * 40 * 40).remainder(251).byte().view(2, 3, 40, 40)
_FLOATS = _BYTES / 255 - 0.5

FIRST: dict[str, tuple[Callable[[Any], nn.Module], Any]] = {
    "4 channels": (lambda conv: nn.Sequential(nn.Conv2d(4, 3, 1), conv), torch.randn(2, 4, 40, 40)),
    "bytes": (lambda conv: _First(conv, lambda x: x.float() / 255), _BYTES),
    "bytes, a subclass": (_reading, _BYTES),
    "bytes, a hook": (_bytes_before, _BYTES),
    "bytes, a replaced method": (_bytes_inside, _BYTES),
    "features": (lambda conv: nn.Identity(), torch.randn(2, 64, 20, 20)),
    "video": (lambda conv: _First(conv, lambda x: x.flatten(0, 1)), _FLOATS[None]),
    "one image": (lambda conv: _First(conv, lambda x: x[None]), _FLOATS[0]),
    "flat": (lambda conv: _First(conv, lambda x: x.unflatten(1, (3, 40, 40))), _FLOATS.flatten(1)),
    "NHWC": (lambda conv: _First(conv, lambda x: x.permute(0, 3, 1, 2)), _FLOATS.permute(0, 2, 3, 1).contiguous()),
    "a dict": (lambda conv: _First(conv, lambda x: x["pixel_values"]), {"pixel_values": _FLOATS}),
    "a list": (lambda conv: _First(conv, torch.stack), list(_FLOATS)),
    "float64": (lambda conv: _First(conv, lambda x: x.float()), _FLOATS.double()),
    "complex": (lambda conv: _First(conv, lambda x: x.abs()), torch.complex(_FLOATS, _FLOATS)),
    "labels": (lambda conv: nn.Sequential(nn.Embedding(7, 64), nn.Unflatten(2, (64, 1)), _Last()), _BYTES[:, 0, 0] % 7),
    "padded by hand": (lambda conv: nn.Sequential(nn.ZeroPad2d(3), _set(conv, padding=0) or conv), _FLOATS),
    "a larger window": (lambda conv: nn.Conv2d(6, 64, 3), torch.randn(2, 6, 40, 40)),
    "grouped": (lambda conv: nn.Conv2d(4, 64, 3, groups=2), torch.randn(2, 4, 40, 40)),
    "in_channels of no meaning": (lambda conv: _set(conv, in_channels=1) or conv, _FLOATS),
}  # fmt: skip


class _Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).expand(-1, -1, -1, 40)


@pytest.mark.parametrize("name", FIRST)
def test_another_first_layer_takes_what_it_takes(name: str) -> None:
    ours, theirs = small_twins()
    change, x = FIRST[name]
    if name == "labels":
        x = x.long()
    for model in (ours, theirs):
        torch.manual_seed(1)
        model.conv1 = change(model.conv1).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert close(ours(x), theirs(x))


def test_a_convolution_in_front_still_says_what_it_takes() -> None:
    model, _ = small_twins()
    for x, said in ((_BYTES, "x.float\\(\\) / 255"), (_FLOATS[0], "x.unsqueeze"), (_FLOATS[:, :2], "\\[N, 3, H, W\\]"),
                    (_FLOATS.permute(0, 2, 3, 1), "NHWC"), ("cat.jpg", "got str")):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=said):
            model(x)
    model.conv1 = nn.Conv2d(4, 64, 3, groups=2)
    with pytest.raises(ValueError, match="\\[N, 4, H, W\\]"):
        model(_FLOATS)


class _Act(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


UNFREEZABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a subclass": (lambda: _Act(8), "_Act"),
    "no statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), "no running statistics"),
    "a hook": (lambda: _hooked(nn.BatchNorm2d(8), "register_forward_hook"), "_forward_hooks"),
    "a hook in front": (lambda: _hooked(nn.BatchNorm2d(8), "register_forward_pre_hook"), "_forward_pre_hooks"),
    "a hook of the gradient": (lambda: _hooked(nn.SyncBatchNorm(8), "register_full_backward_hook"), "_backward_hooks"),
    "a hook of loading": (lambda: _hooked(nn.BatchNorm2d(8), "register_load_state_dict_pre_hook"), "load_state_dict"),
    "pruned": (lambda: prune.l1_unstructured(nn.BatchNorm2d(8), "weight", 2), "_forward_pre_hooks"),
    "parametrized": (
        lambda: torch.nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(8), "weight", nn.Tanh()),
        "ParametrizedBatchNorm2d",
    ),
    "another forward": (lambda: _set(bn := nn.BatchNorm2d(8), forward=bn.forward) or bn, "forward"),
    "lazy": (nn.LazyBatchNorm2d, "LazyBatchNorm2d"),
}


def _hooked(module: nn.Module, register: str) -> nn.Module:
    getattr(module, register)(lambda *args: None)
    return module


@pytest.mark.parametrize("name", UNFREEZABLE)
def test_a_norm_that_cannot_be_frozen_is_an_error(name: str) -> None:
    make, said = UNFREEZABLE[name]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(make()))
    before = list(net.modules())
    with pytest.raises(ValueError, match=f"2.0 cannot be frozen: .*{said}"):
        rf.nn.FrozenBatchNorm2d.convert(net)
    assert list(net.modules()) == before
    with pytest.raises(ValueError, match="the module itself"):
        rf.nn.FrozenBatchNorm2d.convert(make())


def test_a_shared_norm_is_frozen_once() -> None:
    """Under two names of one module, in two modules, and beside others."""
    shared, other = nn.BatchNorm2d(3, eps=0.1), nn.SyncBatchNorm(3, affine=False)
    net = nn.Sequential(shared, nn.Sequential(other, shared), shared, nn.BatchNorm1d(3)).eval()
    net.alias = net[1]
    for norm in (shared, other):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 5, 4)
    want = shared(net[1](shared(x)))
    assert rf.nn.FrozenBatchNorm2d.convert(net) is net
    assert close(net[:3](x), want)
    assert net[0] is net[2] is net[1][1] is net.alias[1] and type(net[0]) is rf.nn.FrozenBatchNorm2d
    assert type(net[1][0]) is rf.nn.FrozenBatchNorm2d and type(net[3]) is nn.BatchNorm1d
    with pytest.raises(ValueError, match="4D input"):
        net[0](x[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kind", "images"),
    [("train", torch.contiguous_format), ("train", torch.channels_last), ("lean", torch.contiguous_format),
     ("eval", torch.contiguous_format), ("frozen", torch.channels_last)],
)  # fmt: skip
def test_gradients_have_the_strides_of_their_weights(
    kind: str, layout: torch.memory_format, images: torch.memory_format
) -> None:
    """Exactly, as DistributedDataParallel wants them; 1x1 and one-channel weights too, whose layout is ambiguous."""
    norm = rf.nn.FrozenBatchNorm2d if kind == "frozen" else nn.BatchNorm2d
    model = rf.models.ResNet(rf.models.Bottleneck, [1, 1, 1, 1], num_classes=5, norm_layer=norm)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model.layer3[0].conv2 = nn.Conv2d(256, 256, 3, 2, 1, groups=256, bias=False)
    model.memory_efficient = kind == "lean"
    model.train(kind != "eval").to(memory_format=layout)
    x = torch.randn(2, 1, 48, 48).contiguous(memory_format=images)
    model(x).square().sum().backward()
    wrong = {
        name: (p.stride(), p.grad.stride()) for name, p in model.named_parameters() if p.grad.stride() != p.stride()
    }
    assert not wrong


def test_feature_extractors_are_saved_and_scripted() -> None:
    ours, _ = small_twins()
    x = torch.randn(1, 3, 40, 40)
    extractor = create_feature_extractor(ours, ["layer2", "flatten"])
    want = extractor(x)
    buffer = io.BytesIO()
    torch.save(extractor, buffer)
    buffer.seek(0)
    for other in (
        pickle.loads(pickle.dumps(extractor)),
        torch.load(buffer, weights_only=False),
        torch.jit.script(extractor),
    ):
        got = other(x)
        assert list(got) == ["layer2", "flatten"] and all(close(got[name], want[name]) for name in got)


PUBLIC: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BasicBlock": (lambda: rf.models.BasicBlock(8, 8), (2, 8, 6, 6)),
    "Bottleneck": (lambda: rf.models.Bottleneck(16, 4), (2, 16, 6, 6)),
    "ResidualNetwork": (rf.residual_network, (2, 1, 20, 20)),
    "FrozenBatchNorm2d": (lambda: rf.nn.FrozenBatchNorm2d(3), (2, 3, 4, 4)),
    "ConvBNAct2d": (lambda: nn.Sequential(rf.nn.ConvBNAct2d(3, 4, 3)), (2, 3, 4, 4)),
    "BNAct2d": (lambda: nn.Sequential(rf.nn.BNAct2d(3)), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_traced_modules_are_saved_and_scripted(name: str) -> None:
    make, shape = PUBLIC[name]
    traced = torch.fx.symbolic_trace(make().eval())
    x = torch.randn(shape)
    assert torch.equal(pickle.loads(pickle.dumps(traced))(x), traced(x))
    assert torch.equal(torch.jit.script(traced)(x), traced(x))


# --- the memory format of feature maps


def _cut(model: nn.Module) -> nn.Module:
    return nn.Sequential(*list(model.children())[:-2]).train(model.training)


class _Viewing(nn.Module):
    """Old code that takes its input for NCHW."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1).mean(2)[..., None, None]


def _maps_of_a_getter(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(IntermediateLayerGetter(model, {"layer1": "a", "layer3": "b"})(x).values())


def _maps_of_hooks(model: nn.Module, x: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, args, out: found.append(out))
        for name in ("layer2", "layer3.0", "avgpool")
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


MAPS: dict[str, Callable[[nn.Module, Tensor], list[Tensor]]] = {
    "cut off": lambda model, x: [_cut(model)(x)],
    "a block": lambda model, x: [model.layer2[0](model.maxpool(model.conv1(x)))],
    "a getter": _maps_of_a_getter,
    "hooks": _maps_of_hooks,
    "an extractor": lambda model, x: list(create_feature_extractor(model, ["layer1", "layer4"])(x).values()),
    "no head": lambda model, x: [_set(model, avgpool=nn.Identity(), fc=nn.Unflatten(1, (512, 2, 3))) or model(x)],
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_feature_maps_have_torchvisions_strides(name: str, training: bool) -> None:
    """NCHW from NCHW images, channels_last from channels_last ones and from models converted to it."""
    for weights in (torch.contiguous_format, torch.channels_last):
        for images in (torch.contiguous_format, torch.channels_last):
            ours, theirs = (model.train(training).to(memory_format=weights) for model in small_twins())
            x = torch.randn(2, 3, 64, 96).contiguous(memory_format=images)
            for a, b in zip(MAPS[name](ours, x), MAPS[name](theirs, x), strict=True):
                assert a.stride() == b.stride() and close(a, b, 1e-4)
                if not training and name == "cut off":
                    assert rf.optimize(_cut(theirs))(x).stride() == b.stride()


@pytest.mark.parametrize("name", ["layer2", "layer4", "avgpool"])
def test_layers_that_view_their_input(name: str) -> None:
    """A layer of somebody's in the middle of a model is given what torch's layers would give it."""
    ours, theirs = small_twins()
    x = torch.randn(2, 3, 64, 96)
    for model in (ours, theirs):
        before = {"layer2": nn.Conv2d(64, 128, 1), "layer4": nn.Conv2d(256, 512, 1), "avgpool": nn.Identity()}[name]
        nn.init.ones_(before.weight) if name != "avgpool" else None
        setattr(model, name, nn.Sequential(_Viewing(), before) if name != "avgpool" else _Viewing())
        if name != "avgpool":
            nn.init.zeros_(before.bias)
    with torch.no_grad():
        assert close(ours(x), theirs(x))


def test_modules_of_ours_answer_in_the_format_of_their_input() -> None:
    norm = nn.BatchNorm2d(8)
    modules = [
        (rf.nn.ConvBNAct2d(8, 8, 3), lambda m, x: m.act(m.bn(m.conv(x)))),
        (rf.nn.ConvBNAct2d(8, 8, 1), lambda m, x: m.act(m.bn(m.conv(x)))),
        (rf.nn.BNAct2d(8), lambda m, x: m.act(m.bn(x))),
        (rf.nn.FrozenBatchNorm2d.convert(norm), lambda m, x: norm.eval()(x)),
    ]
    x = torch.randn(2, 8, 6, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        for module, plain in modules:
            module.to(memory_format=layout).eval()
            nhwc, expanded = x.contiguous(memory_format=torch.channels_last), x[:, :1].expand(-1, 8, -1, -1)
            for given in (x, nhwc, x[:, :, ::2], expanded, x.transpose(2, 3), torch.randn(2, 8, 1, 1)):
                got, want = module(given), plain(module, given)
                assert close(got, want)
                assert want.is_contiguous() <= got.is_contiguous(), type(module)


_BEFORE_THE_IMPORT = """
import functools, torch
from torch import nn
forward, relu = nn.BatchNorm2d.forward, nn.functional.relu
nn.BatchNorm2d.forward = lambda self, x: forward(self, x) * 0.9
nn.functional.relu = functools.wraps(relu)(lambda x, inplace=False: relu(x, inplace) * 0.9)
import resnet_fast as rf
model = rf.models.BasicBlock(8, 8).eval()
x = torch.randn(2, 8, 6, 6)
plain = model.relu(model.bn2(model.conv2(model.relu(model.bn1(model.conv1(x))))) + x)
for got in (model(x), rf.optimize(model)(x)):
    assert torch.allclose(got, plain, atol=1e-6), (got - plain).abs().max()
print("well")
"""


def test_functions_replaced_before_the_import() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _BEFORE_THE_IMPORT], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "well"), done.stderr[-500:]


class _Flattens(nn.Module):
    """As old code does, on what is NCHW in torchvision's networks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        assert torch.isfinite(x.view(x.size(0), -1)).all()
        return self.inner(x)


class _OneImages(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "maxpool", _Flattens(m.maxpool)),
        lambda m: m.maxpool.register_forward_pre_hook(lambda _, args: (args[0].view(-1).view(args[0].shape),)),
        lambda m: setattr(m.layer1[0], "downsample", nn.AdaptiveAvgPool2d(1)),
        lambda m: setattr(m.layer1[0], "downsample", nn.AdaptiveAvgPool2d((None, 1))),
        lambda m: setattr(m.layer1[0], "downsample", _OneImages()),
        lambda m: setattr(m.layer2[0], "downsample", nn.Sequential(m.layer2[0].downsample, nn.AdaptiveMaxPool2d(1))),
    ],
    ids=["pool", "pool's hook", "mean", "column means", "one image's", "projected maximum"],
)
def test_what_torch_adds_and_pools(change: Callable[[nn.Module], Any], lean: bool, training: bool) -> None:
    """A pool of somebody's that flattens, and shortcuts that torch's addition broadcasts."""
    ours, theirs = rf.resnet18(memory_efficient=lean), torchvision.models.resnet18()
    randomise(theirs)
    for model in (ours, theirs):
        change(model)
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(2, 3, 64, 96)
    found = [model.train(training)(x.to(model.fc.weight.dtype)).detach() for model in (ours, theirs, exact)]
    assert_obeys_error_rule(*found)


def test_a_frozen_norm_that_was_replaced_at_the_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's class becomes known when a model first has one, which may be while somebody's patch is in place."""
    norm = FrozenBatchNorm2d(4)
    monkeypatch.delitem(pristine._known, FrozenBatchNorm2d, raising=False)
    forward = FrozenBatchNorm2d.forward
    FrozenBatchNorm2d.forward = lambda self, x: x
    try:
        assert pristine.is_frozen_batch_norm(norm) and pristine.changed(norm)
    finally:
        FrozenBatchNorm2d.forward = forward
    assert pristine.is_frozen_batch_norm(norm) and not pristine.changed(norm)
