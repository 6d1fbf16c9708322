"""Models in train mode against torchvision's: gradients, statistics, autocast, frozen norms, memory, checkpointing."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision import models as torchvision_models
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast as rf
from tests.networks import smooth, watch_ops
from tests.numerics import assert_obeys_error_rule_in_the_median

Found = dict[str, Tensor]


def networks(name: str, kinks: bool = True, **options: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Ours, torchvision's, and torchvision's in float64, with the same parameters; ten classes, channels_last.

    kinks: False for parameters with which rounding errors stay small (``smooth``).
    """
    theirs = getattr(torchvision_models, name)(num_classes=10, **options).to(memory_format=torch.channels_last)
    if not kinks:
        smooth(theirs)
    ours = getattr(rf, name)(num_classes=10, **options).to(memory_format=torch.channels_last)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, copy.deepcopy(theirs).double()


def lean_copy(model: nn.Module) -> nn.Module:
    """The same network with ``memory_efficient``."""
    lean = copy.deepcopy(model)
    lean.memory_efficient = True
    return lean


def batches(count: int, images: int, size: int = 48) -> list[tuple[Tensor, Tensor]]:
    made = [(torch.randn(images, 3, size, size), torch.randint(0, 10, (images,))) for _ in range(count)]
    return [(x.contiguous(memory_format=torch.channels_last), y) for x, y in made]


def train(model: nn.Module, data: list[tuple[Tensor, Tensor]], autocast: bool = False) -> Found:
    """SGD steps; every loss, every gradient of the last step, and the buffers it leaves."""
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    found: Found = {}
    for step, (x, y) in enumerate(data):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(x.to(dtype)), y)
        loss.backward()
        found[f"loss {step}"] = loss.detach().view(1)
        optimizer.step()
    return found | gradients(model) | buffers(model)


def gradients(model: nn.Module) -> Found:
    return {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def buffers(model: nn.Module) -> Found:
    return {name: value.clone() for name, value in model.named_buffers()}


def assert_obeys(ours: Found, theirs: Found, exact: Found) -> None:
    assert_obey_in_the_median([(ours, theirs, exact)])


def assert_obey_in_the_median(draws: list[tuple[Found, Found, Found]]) -> None:
    names = list(draws[0][0])
    for draw in draws:
        for found in draw:
            assert list(found) == names
            # A loss is one number, of which the rule would be a matter of luck: all of them together.
            losses = [found.pop(name) for name in names if name.startswith("loss")]
            if losses:
                found["losses"] = torch.cat(losses)
    norms = [{n: t.norm().item() for n, t in exact.items() if t.is_floating_point()} for _, _, exact in draws]
    for name in draws[0][0]:
        judged = []
        for (ours, theirs, exact), norm in zip(draws, norms, strict=True):
            value, largest = ours[name], max(norm[n] for n in norm if "gradient" in n or "run" in n)
            if name in norm and norm[name] < 1e-10 * largest:
                # Nothing but rounding: a shift in front of a norm that takes it away again has no gradient.
                assert value.norm() <= 1e-4 * largest, name
                judged.append((theirs[name], theirs[name], exact[name]))  # a draw that obeys, by the line above
            elif value.is_floating_point():
                judged.append((value, theirs[name], exact[name]))
            else:
                assert torch.equal(value, theirs[name]), name
        if judged:
            assert_obeys_error_rule_in_the_median(judged, name)


def assert_equal(ours: Found, wanted: Found) -> None:
    assert list(ours) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_three_steps(name: str) -> None:
    """Losses, every gradient and every running statistic."""
    draws = []
    for _ in range(3):
        three, data = networks(name, kinks=False), batches(3, 4, 64)
        ours, theirs, exact = (train(network, data) for network in three)
        draws.append((ours, theirs, exact))
    assert_obey_in_the_median(draws)


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_three_steps_of_memory_efficient_have_the_same_bits(name: str) -> None:
    model = getattr(rf, name)(num_classes=10).to(memory_format=torch.channels_last)
    lean = getattr(rf, name)(num_classes=10, memory_efficient=True).to(memory_format=torch.channels_last)
    lean.load_state_dict(model.state_dict())
    data = batches(3, 4, 64)
    assert_equal(train(lean, data), train(model, data))


def test_one_step_under_autocast() -> None:
    """bfloat16: the distance to float64 is that of torchvision's; what is stored stays float32."""
    draws = []
    for _ in range(3):  # one loss by itself would be a matter of luck
        ours, theirs, exact = networks("resnet18", kinks=False)
        lean, data = lean_copy(ours), batches(1, 8)
        found = train(ours, data, autocast=True)
        assert_equal(train(lean, data, autocast=True), found)
        assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in ours.parameters())
        draws.append((found, train(theirs, data, autocast=True), train(exact, data)))
    assert_obey_in_the_median(draws)


def test_float16_model() -> None:
    """``model.half()`` as a whole, statistics too, which torch rounds at every step."""
    ours, theirs, exact = networks("resnet18")
    data = batches(1, 4, 32)
    for model in (ours, theirs):
        model.bfloat16()
    exact.load_state_dict(ours.state_dict())
    found = [{n: t for n, t in train(model, data).items() if "running" in n} for model in (ours, theirs, exact)]
    assert_obeys(*found)


@pytest.mark.parametrize("lean", [False, True])
def test_gradients_accumulate(lean: bool) -> None:
    """Two backward passes before a step leave the sum of the gradients."""
    model = rf.resnet18(num_classes=10, memory_efficient=lean)
    parts = []
    for x, y in batches(2, 2, 32):
        fresh = copy.deepcopy(model)
        for each in (fresh, model):
            nn.functional.cross_entropy(each(x), y).backward()
        parts.append(gradients(fresh))
        with torch.no_grad():  # the second batch meets the same statistics, which training does not read
            model.load_state_dict(fresh.state_dict())
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, parts[0][name] + parts[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, lean: bool) -> None:
    """The same gradients; the second forward updates the running statistics again, as torchvision's does."""
    ours, theirs, _ = networks("resnet18")
    ours.memory_efficient = lean
    plain = copy.deepcopy(ours)
    ((x, y),) = batches(1, 2, 32)

    def run(model: Any, checkpointed: bool) -> None:
        h = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            h = checkpoint(stage, h, use_reentrant=reentrant) if checkpointed else stage(h)
        nn.functional.cross_entropy(model.fc(model.avgpool(h).flatten(1)), y).backward()

    run(ours, True), run(plain, False), run(theirs, True)
    assert_equal(gradients(ours), gradients(plain))
    again = copy.deepcopy(plain)
    run(again, False)
    for name, value in theirs.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert ours.get_buffer(name) == value
    inside = {name: value for name, value in buffers(ours).items() if "layer" in name}
    assert_equal(inside, {name: value for name, value in buffers(again).items() if "layer" in name})


@pytest.mark.parametrize("lean", [False, True])
def test_a_batch_with_a_nan(lean: bool) -> None:
    """Loss, gradients and statistics are NaN exactly where torchvision's are."""
    ours, theirs, _ = networks("resnet18")
    ours.memory_efficient = lean
    data = batches(1, 3)
    data[0][0][1, 2, 30, 40] = float("nan")
    found, wanted = train(ours, data), train(theirs, data)
    assert any(value.isnan().any() for value in wanted.values())
    for name, value in wanted.items():
        assert torch.equal(found[name].isnan(), value.isnan()), name


# --- memory


def bytes_kept(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """What a forward keeps for its backward: distinct storages, without the model's parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # or its memory would be counted again under another tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_memory_kept_for_the_backward(autocast: bool) -> None:
    """ResNet-50: no more than torchvision keeps, and at most 0.6 of it with ``memory_efficient``."""
    ((x, y),) = batches(1, 2, 224)

    def kept(model: nn.Module) -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return bytes_kept(model, lambda: nn.functional.cross_entropy(model(x), y))

    theirs = kept(torchvision_models.resnet50(num_classes=10))
    assert kept(rf.resnet50(num_classes=10)) <= theirs
    lean = kept(rf.resnet50(num_classes=10, memory_efficient=True))
    assert lean <= 0.6 * theirs, f"{lean / theirs:.3f}"


# --- parts that are frozen


def _eval_norms(model: nn.Module) -> None:
    """The usual way to freeze BatchNorm: eval mode, and no gradients for its parameters."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            for parameter in module.parameters():
                parameter.requires_grad_(False)


def _first_stages(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv1", "bn1", "layer1")))


def _only_betas(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bn" in name and name.endswith("bias"))


def _only_the_classifier(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.fc.requires_grad_(True)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("freeze", "options"),
    [
        (_eval_norms, {}),
        (_first_stages, {}),
        (_only_betas, {}),
        (_only_the_classifier, {}),
        (lambda model: model.eval(), {}),
        (lambda model: None, {"norm_layer": FrozenBatchNorm2d}),
        (_first_stages, {"norm_layer": FrozenBatchNorm2d}),
        (lambda model: None, {"norm_layer": partial(nn.BatchNorm2d, track_running_stats=False)}),
    ],
    ids=["norms", "stages", "betas", "classifier", "eval", "FrozenBatchNorm2d", "frozen stages", "no stats"],
)
def test_frozen_parts(freeze: Callable[[nn.Module], Any], options: dict[str, Any]) -> None:
    """Gradients for exactly what asks for them, of the same values; nothing frozen changes."""
    models = networks("resnet18", kinks=False, **options)
    for model in models:
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                generator = torch.Generator().manual_seed(module.running_var.shape[0])
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
        freeze(model)
    data = batches(1, 4, 48)
    lean = lean_copy(models[0])
    found = train(models[0], data)
    assert_equal(train(lean, data), found)
    assert_obeys(found, train(models[1], data), train(models[2], data))


def test_frozen_norms_run_as_one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """conv_bn_act with gradients, not a convolution and a norm."""
    model = rf.resnet18(num_classes=10, norm_layer=rf.nn.FrozenBatchNorm2d)
    ran = watch_ops(monkeypatch)
    out = model(torch.randn(2, 3, 32, 32))
    assert Counter(name for name, _ in ran) == {"conv_bn_act": 19, "stem": 1, "head": 1}
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- compiled


@pytest.mark.parametrize("lean", [False, True])
def test_compiled_training_step(lean: bool) -> None:
    """``torch.compile(fullgraph=True)`` of forward and loss: the same gradients and statistics."""
    torch._dynamo.reset()
    model = rf.resnet18(num_classes=10, memory_efficient=lean)
    plain = copy.deepcopy(model)
    ((x, y),) = batches(1, 2, 32)

    def loss(network: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(network(x), y)

    loss(plain).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(model).backward()
    assert_equal(gradients(model) | buffers(model), gradients(plain) | buffers(plain))


def test_compiled_memory_efficient_blocks_keep_as_little() -> None:
    """A projection's convolution is not recognised as the one that the backward runs again, and kept."""
    torch._dynamo.reset()
    block = rf.resnet18(memory_efficient=True).layer2[0]
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager_decomp_partition")
    kept = [bytes_kept(block, lambda forward=forward: forward(x)) for forward in (block, compiled)]
    assert kept[1] <= kept[0], kept


@pytest.mark.filterwarnings("ignore::resnet_fast.backends.FallbackWarning")
def test_memory_efficient_blocks_still_show_hooks() -> None:
    """A hook on an inner layer fires, and that block keeps everything; the gradients are right."""
    ours, theirs, exact = networks("resnet18", kinks=False)
    ours.memory_efficient = True
    seen: list[str] = []
    ours.layer2[0].bn1.register_forward_hook(lambda *_: seen.append("bn1"))
    data = batches(1, 4)
    before = sum(rf.backends.fallbacks().values())  # each cause warns once in a process, and others may have had it
    found = train(ours, data)
    assert seen == ["bn1"] and sum(rf.backends.fallbacks().values()) > before
    assert_obeys(found, train(theirs, data), train(exact, data))


def test_memory_efficient_can_be_set_later() -> None:
    """On a model, for every block; models pickled by versions without it have it off."""
    model = rf.resnet18(num_classes=3)
    model.memory_efficient = True
    assert model.layer4[1].memory_efficient and copy.deepcopy(model).memory_efficient
    state = model.__dict__.copy()
    del state["_memory_efficient"]
    old = rf.models.ResNet.__new__(rf.models.ResNet)
    old.__dict__.update(state)
    assert old.memory_efficient is False
    old(torch.randn(2, 3, 32, 32))


def test_memory_efficient_convolutions_of_another_dtype_are_torchs_error() -> None:
    model = rf.resnet18(num_classes=3, memory_efficient=True)
    model.layer1[0].conv2.double()
    with pytest.raises(RuntimeError, match="same"):
        model(torch.randn(2, 3, 32, 32))


def test_statistics_may_be_set_between_forward_and_backward() -> None:
    """DDP copies rank 0's buffers to all ranks before a forward, also to one whose backward is still to come."""
    norm = rf.nn.FrozenBatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    out = norm(x)
    norm.running_mean.add_(1)
    out.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, (1 / torch.tensor(1 + 1e-5).sqrt()).item()))


def test_wrong_ranks_are_torchs_error() -> None:
    for module in (rf.nn.BNAct2d(3), rf.nn.ConvBNAct2d(3, 3, 1)):
        with pytest.raises(ValueError, match="4D"):
            module(torch.randn(3, 4, 4))


_NARROW = """
import torch, resnet_fast as rf
from torch import nn
torch.set_num_threads(1)
for channels in (4, 1):
    shortcut = nn.Sequential(nn.Conv2d(channels, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    block = rf.models.BasicBlock(channels, 8, 2, shortcut)
    for layout in (torch.contiguous_format, torch.channels_last):
        block.to(memory_format=layout)
        for kind in ("plain", "lean", "frozen"):
            block.memory_efficient = kind == "lean"
            block.train(kind != "frozen")
            for i in range(60):
                x = torch.randn(2, channels, 6, 6).contiguous(memory_format=layout if i % 2 else torch.channels_last)
                block(x.requires_grad_()).sum().backward()
print("well")
"""


def test_narrow_projections_do_not_spoil_the_heap() -> None:
    """In a process of its own, with glibc's checks: oneDNN's gradient of such a weight writes where it should not."""
    environment = {**os.environ, "MALLOC_CHECK_": "3"}
    done = subprocess.run([sys.executable, "-c", _NARROW], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "well"), done.stderr[-500:]


def test_pairs_as_sizes() -> None:
    """ConvBNAct2d: each direction of a kernel keeps its size, as Conv2d's padding="same" does."""
    layer = rf.nn.ConvBNAct2d(3, 4, (3, 5), dilation=(2, 1))
    assert layer(torch.randn(2, 3, 9, 11)).shape == (2, 4, 9, 11)
    assert layer.conv.padding == (2, 2)
    with pytest.raises(ValueError, match="even"):
        rf.nn.ConvBNAct2d(3, 4, (3, 2))


def test_a_backward_inside_autocast_computes_as_its_forward_did() -> None:
    """With autocast's rule for ``aten::convolution``, which torch has for CUDA only, on the CPU as well."""

    def rule(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            half = [None if t is None else t.bfloat16() for t in (x, weight, bias)]
            return torch.ops.aten.convolution.default(*half, *rest)

    plain = rf.resnet18(num_classes=10)
    model = lean_copy(plain)
    ((x, y),) = batches(1, 2, 32)
    losses = [nn.functional.cross_entropy(network(x), y) for network in (model, plain)]
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("convolution", rule, "AutocastCPU")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.ops.aten.convolution.default(
                x, model.conv1.weight, None, [2, 2], [3, 3], [1, 1], False, [0, 0], 1
            ).dtype is torch.bfloat16  # fmt: skip
            for loss in losses:
                loss.backward()
    assert_equal(gradients(model), gradients(plain))
