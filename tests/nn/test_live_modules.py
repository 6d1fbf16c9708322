"""The models are ordinary modules: whatever one does to their parameters or hooks shows at the very next forward."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast as rf
from tests.nn.twins import Edit, close, randomise, same_gradients, twins
from tests.numerics import assert_obeys_error_rule

pytestmark = pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning")


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

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))  # raises what they raise
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
