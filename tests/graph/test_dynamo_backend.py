"""``torch.compile(model, backend="resnet_fast")``: answers, gradients, what is fused, and what stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._dynamo.utils import counters

import resnet_fast as rf
from resnet_fast.graph.dynamo import backend
from tests.numerics import assert_obeys_error_rule

FROZEN = (torchvision.ops.FrozenBatchNorm2d, rf.nn.FrozenBatchNorm2d)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model: Any, **options: Any) -> Any:
    """Compile with the rest in eager mode: what is tested is the graph."""
    return torch.compile(model, backend=backend, options={"rest": "eager"}, **options)


def fused(op: str = "conv_bn_act") -> int:
    return counters["resnet_fast"][op]


class Net(nn.Module):
    """A block with a shortcut, between a stem and a head of its own."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), norm(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), norm(16)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(16, 999)

    def features(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        return self.relu(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.features(x), 1), 1))


def drawn(model: nn.Module) -> Any:
    """Give a model statistics and affine parameters as after a training."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            size = len(module.running_var)
            with torch.no_grad():
                module.running_mean.copy_(torch.randn(size, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
                if module.weight is not None:
                    module.weight.copy_(torch.rand(size, generator=generator) + 0.5)
                    module.bias.copy_(torch.randn(size, generator=generator) * 0.1)
    return model


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


X = images(2, 3, 21, 19)


def obeys(ours: Any, model: nn.Module, *inputs: Tensor) -> None:
    """The error rule, against ``model`` in its own dtype and in float64."""
    exact = copy.deepcopy(model).double()(*(each.double() for each in inputs))
    assert_obeys_error_rule(ours, model(*inputs), exact)


def differ(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype is b.dtype
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


# ----------------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inference_obeys_the_error_rule(dtype: torch.dtype) -> None:
    model = drawn(Net().eval()).to(dtype)
    with torch.no_grad():
        obeys(compiled(model, fullgraph=True)(X.to(dtype)), model, X.to(dtype))
    assert (fused(), fused("head")) == (2, 1)


def test_every_layer_of_a_resnet_is_fused() -> None:
    model = drawn(torchvision.models.resnet18().eval())
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        obeys(compiled(model, fullgraph=True)(x), model, x)
    assert (fused("stem"), fused(), fused("head")) == (1, 19, 1)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dynamic", [None, True])
def test_two_compilations_serve_every_batch(train: bool, dynamic: bool | None) -> None:
    model = drawn(Net().train(train)).bfloat16()
    plain = copy.deepcopy(model)
    fast = compiled(model, fullgraph=True, dynamic=dynamic)
    for batch in range(1, 18):
        x = images(batch, 3, 33, 33, dtype=torch.bfloat16)
        assert differ(fast(x), plain(x)) < 0.1
    assert counters["stats"]["unique_graphs"] <= 2


def test_two_compilations_serve_every_batch_of_a_live_model() -> None:
    model = drawn(rf.models.ResNet(rf.models.BasicBlock, [1, 1, 1, 1]).eval())
    fast = compiled(model, fullgraph=True)
    with torch.no_grad():
        for batch in range(1, 18):
            x = images(batch, 3, 32, 32)
            assert differ(fast(x), model(x)) < 1e-4
    assert counters["stats"]["unique_graphs"] <= 2


def test_float32_convolutions_compile_as_often_as_torch_alone() -> None:
    """On a CPU torch's own conv2d takes another way from 16 images on, which Dynamo guards before any backend."""
    model, counts = drawn(Net().eval()), []
    for run in (compiled(model), torch.compile(model, backend="eager")):
        torch._dynamo.reset()
        counters.clear()
        for batch in (1, 2, 15, 16, 17):
            run(images(batch, 3, 33, 33))
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1]


def test_marked_sizes_need_one_compilation() -> None:
    model = drawn(Net().eval())
    fast, x = compiled(model, fullgraph=True), X.clone()
    for dim in (0, 2, 3):
        torch._dynamo.mark_dynamic(x, dim)
    with torch.no_grad():
        for image in (x, images(3, 3, 9, 33), images(5, 3, 40, 17)):
            obeys(fast(image), model, image)
    assert counters["stats"]["unique_graphs"] == 1 and fused() == 2


def _zeroed_filter(model: Any) -> None:
    model.conv1.weight.data[3] = 0


def _numpy(model: Any) -> None:
    model.conv2.weight.detach().numpy()[0, 0, 0, 0] = 7


def _statistics(model: Any) -> None:
    model.bn1.running_var.mul_(3)


def _loaded(model: Any) -> None:
    model.load_state_dict(Net().state_dict())


def _data(model: Any) -> None:
    model.bn2.weight.data = torch.rand(16)


def _eps(model: Any) -> None:
    model.bn1.eps = 0.5


def _new_conv(model: Any) -> None:
    model.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)


def _no_norm(model: Any) -> None:
    model.bn1 = nn.Identity()


def _half(model: Any) -> None:
    model.bfloat16()


@pytest.mark.parametrize(
    "edit",
    [_zeroed_filter, _numpy, _statistics, _loaded, _data, _eps, _new_conv, _no_norm, _half],
)
def test_what_changes_after_compilation_is_seen(edit: Callable[[Any], None]) -> None:
    model = drawn(Net().eval())
    fast = compiled(model, fullgraph=True)
    with torch.no_grad():
        before = fast(X)
        edit(model)
        x = X.to(model.fc.weight.dtype)
        obeys(fast(x), model, x)
        assert differ(fast(x).float(), before) > 1e-4


def test_a_copy_has_parameters_of_its_own() -> None:
    model = drawn(Net().eval())
    fast = compiled(model)
    with torch.no_grad():
        before = fast(X)
        other = copy.deepcopy(fast)
        model.conv1.weight.zero_()
        assert torch.equal(other(X), before) and not torch.equal(fast(X), before)


@pytest.mark.parametrize("of_image", [False, True])
@pytest.mark.parametrize("of_weights", [False, True])
def test_memory_formats_are_torchs(of_image: bool, of_weights: bool) -> None:
    model, last = drawn(Net().eval()), torch.channels_last
    x = X.to(memory_format=last) if of_image else X
    model = model.to(memory_format=last) if of_weights else model
    with torch.no_grad():
        y, wanted = compiled(model.features, fullgraph=True)(x), model.features(x)
    assert fused() == 2 and y.stride() == wanted.stride() and differ(y, wanted) < 1e-5


def test_hooks_run() -> None:
    model = drawn(Net().eval())
    model.bn1.register_forward_hook(lambda module, args, output: output * 2)
    with torch.no_grad():
        obeys(compiled(model, fullgraph=True)(X), model, X)


def test_nan_and_empty_batches() -> None:
    model, x = drawn(Net().eval()), X.clone()
    x[0, 0, 0, 0] = float("nan")
    fast = compiled(model, fullgraph=True)
    with torch.no_grad():
        obeys(fast(x), model, x)
        assert fast(X[:0]).shape == (0, 999)


# ------------------------------------------------------------------------------------------------------------ training


def stepped(run: Any, model: nn.Module, x: Tensor, steps: int = 3) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        run(x).square().mean().backward()
        optimizer.step()
    return dict(model.state_dict())


def _train(model: Any) -> None:
    model.train()


def _evaluate(model: Any) -> None:
    model.eval()


def _freeze_first(model: Any) -> None:
    model.train()
    model.bn1.eval().requires_grad_(False)


def _without_statistics(model: Any) -> None:
    model.bn1, model.bn2 = (nn.BatchNorm2d(16, track_running_stats=False, affine=False) for _ in range(2))


def _average(model: Any) -> None:
    model.bn1.momentum = None


@pytest.mark.parametrize("mode", [_train, _evaluate, _freeze_first, _without_statistics, _average])
def test_training_is_torchs(mode: Callable[[Any], None]) -> None:
    model = drawn(Net()).double()
    mode(model)
    model.double()
    plain = copy.deepcopy(model)
    ours, theirs = stepped(compiled(model), model, X.double()), stepped(plain, plain, X.double())
    assert {name: differ(ours[name], theirs[name]) < 1e-9 for name in ours} == dict.fromkeys(ours, True)
    assert fused() == {_evaluate: 2, _freeze_first: 1}.get(mode, 0)


@pytest.mark.parametrize("norm", FROZEN)
def test_frozen_norms_train_as_torchs(norm: Any) -> None:
    model = drawn(Net(norm)).double()
    plain = copy.deepcopy(model)
    ours, theirs = stepped(compiled(model, fullgraph=True), model, X.double()), stepped(plain, plain, X.double())
    assert {name: differ(ours[name], theirs[name]) < 1e-9 for name in ours} == dict.fromkeys(ours, True)


def test_switching_modes_uses_the_right_statistics() -> None:
    model = drawn(Net().train())
    plain = copy.deepcopy(model)
    fast = compiled(model, fullgraph=True)
    for train in (True, True, False, True, False):
        model.train(train)
        plain.train(train)
        assert differ(fast(X), plain(X)) < 1e-5
    assert all(differ(a.float(), b.float()) < 1e-5 for a, b in zip(model.buffers(), plain.buffers(), strict=True))


def test_second_derivatives() -> None:
    model, x = drawn(Net().eval()).double(), X.double().requires_grad_()
    found = []
    for run in (compiled(model, fullgraph=True), model):
        (gradient,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), model.conv1.weight)[0])
    assert differ(*found) < 1e-10


def test_a_convolution_that_trains_alone_stays_torchs() -> None:
    """Its weight changes at each step, so that a packed copy would be used once."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    fast = compiled(model)
    assert differ(fast(X), model(X)) < 1e-6 and fused() == 0
    with torch.no_grad():
        assert differ(fast(X), model(X)) < 1e-6 and fused() == 2


# ------------------------------------------------------------------------------------ modes, writes, and other programs


def test_autocast_around_and_inside() -> None:
    model = drawn(Net().eval())

    def inside(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            y = model.conv1(x)
        return model.bn1(y), model.bn1(model.conv1(x))

    with torch.no_grad():
        for ours, theirs in zip(compiled(inside, fullgraph=True)(X), inside(X), strict=True):
            assert differ(ours, theirs) < 1e-2
        with torch.autocast("cpu", torch.bfloat16):
            assert differ(compiled(model, fullgraph=True)(X), model(X)) < 2e-2


def test_no_layer_leaves_a_region_without_gradients() -> None:
    model, x = drawn(Net().eval()), X.clone().requires_grad_()

    def partly(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = model.conv1(x)
        return model.bn1(y)

    compiled(partly, fullgraph=True)(x).sum().backward()
    assert x.grad is None and model.conv1.weight.grad is None and model.bn1.weight.grad is not None


def _of_input(m: Any, x: Tensor) -> Any:
    x.relu_()
    y = m.conv1(x)
    x.add_(1)
    y = F.relu_(m.bn1(y))
    x.mul_(2)
    return y, x.sum()


def _through_a_slice(m: Any, x: Tensor) -> Any:
    y = m.relu(m.bn1(m.conv1(x)))
    part = y[:, :4]
    z = m.bn2(m.conv2(y))
    y += 1
    z += y
    part.mul_(2)
    return m.relu(z), y + 0


def _behind_its_reader(m: Any, x: Tensor) -> Any:
    y = m.bn1(m.conv1(x))
    z = m.conv2(y)
    y.mul_(2)
    return m.relu(m.bn2(z) + y)


def _through_a_view(m: Any, x: Tensor) -> Any:
    y = m.relu(m.bn1(m.conv1(x)))
    flat = y.view(-1)
    flat.add_(1)
    return m.bn2(m.conv2(y))


def _the_same_name_again(m: Any, x: Tensor) -> Any:
    y = m.bn1(m.conv1(x))
    z = y
    z.relu_()
    return m.conv2(y), z * 2


def _of_a_weight(m: Any, x: Tensor) -> Any:
    y = m.conv1(x)
    with torch.no_grad():
        m.bn1.running_mean.add_(1)
    return m.bn1(y)


def _returned_with_its_view(m: Any, x: Tensor) -> Any:
    y = m.relu(m.bn1(m.conv1(x)))
    return y, y.view(x.shape[0], -1)


@pytest.mark.parametrize(
    "program",
    [
        _of_input, _through_a_slice, _behind_its_reader, _through_a_view, _the_same_name_again, _of_a_weight,
        _returned_with_its_view,
    ],
)  # fmt: skip
def test_writes_in_place(program: Callable[[Any, Tensor], Any]) -> None:
    model = drawn(Net().eval())
    other = copy.deepcopy(model)
    x, y = X.clone(), X.clone()
    with torch.no_grad():
        ours, theirs = compiled(program, fullgraph=True)(model, x), program(other, y)
    ours, theirs = (each if isinstance(each, tuple) else (each,) for each in (ours, theirs))
    assert all(differ(a, b) < 1e-5 for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(x, y) and torch.equal(model.bn1.running_mean, other.bn1.running_mean)


def test_results_that_share_memory_go_on_doing_so() -> None:
    model = drawn(Net().eval())
    with torch.no_grad():
        y, flat = compiled(_returned_with_its_view, fullgraph=True)(model, X)
    flat.zero_()
    assert not y.any()


def test_graph_breaks_and_whole_numbers() -> None:
    model = drawn(Net().eval())

    def program(x: Tensor, factor: int) -> Tensor:
        y = model.relu(model.bn1(model.conv1(x)))
        torch._dynamo.graph_break()
        return model.relu(model.bn2(model.conv2(y))).view(x.size(0), -1) * factor + x.shape[0]

    fast = compiled(program)
    with torch.no_grad():
        for batch, factor in ((2, 1), (3, 2), (4, 3), (5, 7)):
            x = images(batch, 3, 9, 9)
            assert differ(fast(x, factor), program(x, factor)) < 1e-5
    assert counters["graph_break"] and fused()


def test_functions_with_weights_as_arguments() -> None:
    def program(x: Tensor, weight: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.relu(F.batch_norm(F.conv2d(x, weight, padding="same"), mean, var))

    given = X, images(8, 3, 3, 3), images(8), images(8).abs() + 0.5
    assert differ(compiled(program, fullgraph=True)(*given), program(*given)) < 1e-5
    assert fused() == 1
    assert differ(compiled(program, fullgraph=True, dynamic=True)(*given), program(*given)) < 1e-5


def test_transforms_and_weights_that_are_computed_stay_plain() -> None:
    model = drawn(Net().eval())

    def each(x: Tensor) -> Tensor:
        return torch.vmap(lambda image: model(image[None])[0])(x)

    def standardised(x: Tensor) -> Tensor:
        weight = model.conv1.weight
        return F.conv2d(x, weight - weight.mean((1, 2, 3), keepdim=True))

    with torch.no_grad():
        for program in (each, standardised):
            assert differ(compiled(program)(X), program(X)) < 1e-5
    assert fused() == 0


def test_what_no_op_takes_stays_plain() -> None:
    """Complex images, images without a batch, other ranks, and additions of matrices."""
    conv, volume, fc = nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.Linear(19, 4)
    cases: list[tuple[Any, Tensor]] = [
        (lambda x: F.conv2d(x, x[:, :, :3, :3]), X.to(torch.complex64)),
        (lambda x: F.relu(conv(x)), X[0]),
        (lambda x: F.relu(volume(x)), images(1, 3, 4, 4, 4)),
        (lambda x: F.relu(fc(x) + fc(x.neg())), X),
        (lambda x: F.relu(conv(x)).flatten(1)[:, :19] + F.relu(fc(x[:, 0, 0]) + fc(x[:, 0, 1])).sum(), X),
    ]
    with torch.no_grad():
        for program, x in cases:
            torch.testing.assert_close(compiled(program)(x), program(x), rtol=1e-4, atol=1e-5)


def test_threads_share_a_compiled_model() -> None:
    model = drawn(Net().eval())
    fast = compiled(model)
    wrong: list[float] = []

    def serve(batch: int) -> None:
        with torch.no_grad():
            for seed in range(10):
                x = torch.randn(batch, 3, 21, 19, generator=torch.Generator().manual_seed(seed))
                wrong.append(differ(fast(x), model(x)))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(serve, (1, 2, 3)))  # raises what they raise
    assert len(wrong) == 30 and max(wrong) < 1e-5


def test_live_models_and_snapshots_compile_too() -> None:
    live = drawn(rf.models.ResNet(rf.models.BasicBlock, [1, 1, 1, 1]).eval())
    x = images(2, 3, 48, 48)
    snapshot = rf.optimize(live)
    with torch.no_grad():
        for model in (live, snapshot):
            assert differ(compiled(model, fullgraph=True)(x), live(x)) < 1e-4


# ------------------------------------------------------------------------------------------------- the backend by name


def test_torch_finds_the_backend_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the entry point of pyproject.toml, in the metadata of an installed package."""
    from torch._dynamo.backends import registry

    registry.list_backends()  # which loads torch's own, once
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    group = text.partition('[project.entry-points."torch_dynamo_backends"]')[2]
    entry = group.partition('resnet_fast = "')[2].partition('"')[0]
    info = tmp_path / "installed-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[torch_dynamo_backends]\nresnet_fast = {entry}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("_BACKENDS", "_COMPILER_FNS"):
        known = {key: value for key, value in getattr(registry, name).items() if key != "resnet_fast"}
        monkeypatch.setattr(registry, name, known)
    registry._discover_entrypoint_backends.__wrapped__()
    assert registry.lookup_backend("resnet_fast") is backend
    model = drawn(Net().eval())
    with torch.no_grad():
        obeys(torch.compile(model, backend="resnet_fast", options={"rest": "eager"})(X), model, X)
    assert fused() == 2


def test_options_are_checked() -> None:
    def fails(**options: Any) -> str:
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
            torch.compile(nn.ReLU(), backend=backend, **options)(X)
        return str(caught.value)

    assert "option rest is 'tensorflow'; it must be one of" in fails(options={"rest": "tensorflow"})
    assert "option 'max_autotune' is for inductor" in fails(options={"rest": "eager", "max_autotune": True})
    assert "option 'max_autotun' is none of inductor's" in fails(options={"max_autotun": True})


def test_the_rest_may_go_to_another_backend() -> None:
    model = drawn(Net().eval())
    fast = torch.compile(model, backend=backend, options={"rest": "aot_eager"})
    with torch.no_grad():
        obeys(fast(X), model, X)
    assert fused() == 2


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_the_rest_goes_to_inductor(train: bool) -> None:
    model = drawn(Net().train(train)).double()
    plain = copy.deepcopy(model)
    fast = torch.compile(model, backend=backend, fullgraph=True)
    ours, theirs = stepped(fast, model, X.double(), 2), stepped(plain, plain, X.double(), 2)
    assert {name: differ(ours[name], theirs[name]) < 1e-9 for name in ours} == dict.fromkeys(ours, True)
    assert fused() == (0 if train else 2)
    with torch.no_grad():
        model.eval()
        plain.eval()
        assert differ(fast(X.double()), plain(X.double())) < 1e-9
