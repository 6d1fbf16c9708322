"""``resnet_fast.exportable``: programs of torch's own operators; and modules of programs given to optimize."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import resnet_fast as rf
from tests.networks import Lambda, conv_bn, randomise
from tests.numerics import assert_obeys_error_rule_in_the_median

ANY = {0: Dim("batch"), 2: Dim("height", min=16, max=512), 3: Dim("width", min=16, max=512)}


class Small(nn.Module):
    """A stem, a projected and a plain block of our kind, and a head: every op of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        resnet = rf.models.ResNet(rf.models.Bottleneck, [1, 1, 1, 1], num_classes=7)
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.avgpool, self.fc = resnet.layer1, resnet.avgpool, nn.Linear(256, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


@pytest.fixture
def small() -> Any:
    return randomise(Small())


def ours(program: Any) -> set[str]:
    """Return which of this package's ops a program calls."""
    return {str(node.target) for node in program.graph.nodes if "resnet_fast" in str(node.target)}


def operators(program: Any) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


X, ODD = images(2, 3, 32, 32), images(3, 3, 45, 37)


def obeys(result: Tensor, model: nn.Module, x: Tensor) -> None:
    assert_obeys_error_rule_in_the_median([(result, *answers(model, x))])


def answers(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what plain torch answers in float32 and in float64."""
    with torch.no_grad(), rf.backends.use("reference"):
        return model(x), copy.deepcopy(model).double()(x.double())


@pytest.mark.parametrize("make", [lambda model: model, rf.optimize], ids=["live", "snapshot"])
def test_programs_call_torchs_operators_alone(make: Callable[[Any], Any], small: Any) -> None:
    plain = rf.exportable(make(small))
    program = torch.export.export(plain, (X,), dynamic_shapes={"x": ANY})
    assert not ours(program)
    for x in (X, ODD, images(1, 3, 16, 97)):
        obeys(program.module()(x).detach(), small, x)
        obeys(plain(x).detach(), small, x)


def test_a_snapshots_program_has_its_norms_folded_in(small: Any) -> None:
    program = torch.export.export(rf.exportable(rf.optimize(small)), (X,))
    assert operators(program) == {
        f"aten.{name}" for name in (
            "conv2d.default", "relu.default", "max_pool2d.default", "add.Tensor", "adaptive_avg_pool2d.default",
            "flatten.using_ints", "linear.default",
        )
    }  # fmt: skip
    assert sum(node.target is torch.ops.aten.conv2d.default for node in program.graph.nodes) == 5


def test_a_live_copy_keeps_names_and_parameters(small: Any) -> None:
    plain = rf.exportable(small)
    assert list(plain.state_dict()) == list(small.state_dict())
    assert all(a is b for a, b in zip(plain.parameters(), small.parameters(), strict=True))
    assert "forward" not in small.layer1[0].__dict__
    assert ours(torch.export.export(small, (X,)))  # as ever


def test_within_the_reference_live_models_export_as_torchs_operators(small: Any) -> None:
    with rf.backends.use("reference"):
        program = torch.export.export(small, (X,), dynamic_shapes={"x": ANY})
        assert not ours(program)
        obeys(program.module()(ODD).detach(), small, ODD)
    with rf.backends.use("onednn"):
        assert ours(torch.export.export(small, (X,)))


def test_strict_mode_exports_too() -> None:
    model = randomise(conv_bn_models())
    for each in (model, rf.optimize(model)):
        program = torch.export.export(rf.exportable(each), (X,), strict=True)
        assert not ours(program)
        obeys(program.module()(X).detach(), model, X)


def conv_bn_models() -> nn.Module:
    return nn.Sequential(rf.nn.ConvBNAct2d(3, 8, 3), rf.nn.BNAct2d(8), rf.nn.FrozenBatchNorm2d(8))


def test_training_mode_stays_torchs() -> None:
    model = conv_bn_models().train()
    program = torch.export.export(rf.exportable(model), (X,))
    assert not ours(program)
    other = copy.deepcopy(model)
    torch.testing.assert_close(program.module()(X), other(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_snapshots_dtype_is_kept(dtype: torch.dtype, small: Any) -> None:
    fast = rf.optimize(small, dtype=dtype)
    plain = rf.exportable(fast)
    program = torch.export.export(plain, (X,), dynamic_shapes={"x": {0: Dim("batch")}})
    assert not ours(program) and program.module()(X).dtype is torch.float32
    assert {p.dtype for p in plain.parameters()} == {dtype}
    error, allowed = ((each - small(X)).norm().item() for each in (program.module()(X), fast(X)))
    assert error <= 2 * allowed + 1e-4


def test_bottleneck_tails_and_ceil_pools_are_written_out() -> None:
    model = randomise(
        rf.models.ResNet(rf.models.Bottleneck, [2, 1, 1, 1], num_classes=5, stride_in_1x1=True, unpadded_pool=True)
    )
    fast = rf.optimize(
        model, dtype=torch.float16, gpu="h100", example_inputs=torch.empty(128, 3, 224, 224, device="meta")
    )
    assert any(row.fused.startswith("bottleneck_tail") for row in fast.report().rows)
    plain = rf.exportable(fast).float()
    plain._dtypes = torch.float32, torch.float32
    x = images(2, 3, 64, 96)
    with torch.no_grad():
        assert (plain(x) - model(x)).norm() < 1e-2 * model(x).norm()  # weights are rounded to float16
    assert not ours(torch.export.export(plain, (x,)))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 8), conv_bn(3, 8)

    def forward(self, rgb: Tensor, depth: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
        return {"sum": self.a(rgb) + self.b(depth) * scale, "first": self.a(rgb).relu()}


def test_arguments_and_results_keep_their_form() -> None:
    model = randomise(Named())
    fast = rf.optimize(model, example_inputs=(X, X))
    batch = {0: Dim("batch")}
    program = torch.export.export(
        rf.exportable(fast), (X,), {"depth": X.clone()}, dynamic_shapes={"rgb": batch, "depth": batch}
    )
    assert not operators(program) & {"aten.to.dtype", "aten.resolve_neg.default"}
    found = program.module()(ODD[:, :, :32, :32], depth=X[:1].expand(3, -1, -1, -1))
    wanted = model(ODD[:, :, :32, :32], X[:1].expand(3, -1, -1, -1))
    assert not ours(program) and list(found) == list(wanted)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-5)


def test_a_model_that_holds_live_layers_and_a_snapshot(small: Any) -> None:
    fast = rf.optimize(nn.Sequential(conv_bn(3, 4)).eval())
    model = Lambda(lambda self, x: self.live(self.fast(x)), live=rf.nn.ConvBNAct2d(4, 4, 3), fast=fast).eval()
    program = torch.export.export(rf.exportable(model), (X,))
    assert not ours(program)
    torch.testing.assert_close(program.module()(X), model(X), rtol=1e-4, atol=1e-5)
    assert type(model.fast) is type(fast)


def test_a_network_that_is_fused_in_parts() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.block(x)
        with torch.autocast("cpu", torch.bfloat16):
            return self.last(y)

    model = randomise(Lambda(forward, block=nn.Sequential(conv_bn(3, 4), nn.ReLU()), last=nn.Conv2d(4, 4, 1)))
    with pytest.warns(UserWarning, match="parts of it are fused"):
        fast = rf.optimize(model)
    program = torch.export.export(rf.exportable(fast), (X,))
    assert not ours(program)
    torch.testing.assert_close(program.module()(X), model(X), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("make", [lambda model: model, rf.optimize], ids=["live", "snapshot"])
def test_copies_pickle_and_trace(make: Callable[[Any], Any], small: Any) -> None:
    plain = rf.exportable(make(small))
    for each in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain)), torch.jit.trace(plain, X)):
        obeys(each(X).detach(), small, X)
    assert not any("resnet_fast" in str(node.target) for node in torch.fx.symbolic_trace(plain).graph.nodes)


def test_errors_name_the_switch(small: Any) -> None:
    fast = rf.optimize(small)
    for way in (
        lambda: torch.export.export(fast, (X,)),
        lambda: torch.jit.trace(fast, X),
        lambda: torch.jit.script(fast),
    ):
        with pytest.raises(Exception, match=r"export resnet_fast\.exportable\(snapshot\)") as caught:
            way()
        assert "original model" in str(caught.value)
    with pytest.raises(TypeError, match=r"exportable: model must be a .*, got function"):
        rf.exportable(lambda x: x)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ other runtimes


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda model: model, rf.optimize], ids=["live", "snapshot"])
def test_onnx_runtime_reads_it(make: Callable[[Any], Any], small: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = torch.export.export(rf.exportable(make(small)), (X,), dynamic_shapes={"x": ANY})
    torch.onnx.export(program, (), tmp_path / "model.onnx", external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for x in (X, ODD):
        (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(result), small(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda model: model, rf.optimize], ids=["live", "snapshot"])
def test_openvino_reads_it(make: Callable[[Any], Any], small: Any) -> None:
    openvino = pytest.importorskip("openvino")
    program = torch.export.export(rf.exportable(make(small)), (X,), dynamic_shapes={"x": ANY})
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}  # else bfloat16 if the CPU has it
    run = openvino.compile_model(openvino.convert_model(program), "CPU", options)
    for x in (X, ODD):
        torch.testing.assert_close(torch.from_numpy(run(x.numpy())[0]), small(x).detach(), rtol=1e-4, atol=1e-5)


_LOADED = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
for x, wanted in torch.load(sys.argv[2]):
    torch.testing.assert_close(run(x), wanted, rtol=1e-4, atol=1e-5)
assert "resnet_fast" not in sys.modules
"""


class Both(nn.Module):
    """The live model and its snapshot in one program, because compiling one takes half as long as two."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.live, self.snapshot = rf.exportable(model), rf.exportable(rf.optimize(model))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.live(x), self.snapshot(x)])


@pytest.mark.slow
def test_aotinductor_runs_them_without_this_package(small: Any, tmp_path: Path) -> None:
    program = torch.export.export(Both(small), (X,), dynamic_shapes={"x": ANY})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.save([(x, small(x).detach().repeat(2, 1)) for x in (X, ODD)], tmp_path / "cases.pt")
    arguments = [sys.executable, "-c", _LOADED, package, str(tmp_path / "cases.pt")]
    subprocess.run(arguments, check=True, cwd=tmp_path, timeout=300)


@pytest.mark.slow
def test_a_saved_program_loads_without_this_package(small: Any, tmp_path: Path) -> None:
    torch.export.save(torch.export.export(rf.exportable(rf.optimize(small)), (X,)), tmp_path / "model.pt2")
    torch.save([(X, small(X).detach())], tmp_path / "cases.pt")
    code = _LOADED.replace("torch._inductor.aoti_load_package(sys.argv[1])", "torch.export.load(sys.argv[1]).module()")
    arguments = [sys.executable, "-c", code, str(tmp_path / "model.pt2"), str(tmp_path / "cases.pt")]
    subprocess.run(arguments, check=True, cwd=tmp_path, timeout=300)


# ------------------------------------------------------------------------------------------- programs given to optimize


@pytest.mark.parametrize("size", [None, Dim.DYNAMIC])
def test_the_module_of_a_program_is_fused(size: Any, small: Any) -> None:
    plain = rf.exportable(small)
    module = torch.export.export(plain, (X,), dynamic_shapes=None if size is None else ({0: size, 2: size, 3: size},))
    fast = rf.optimize(module.module(), example_inputs=X)
    report = fast.report()
    assert len(report.fused) == len(report.rows) and not any("hook" in note for note in report.notes)
    # Few numbers of few layers: their errors may cancel in one of the networks.
    for like in (X,) if size is None else (X, ODD):
        drawn = [like, *(torch.randn(like.shape) for _ in range(4))]
        assert_obeys_error_rule_in_the_median([(fast(x), *answers(small, x)) for x in drawn])
    if size is None:
        with pytest.raises(AssertionError, match="Guard failed"):  # the program's own words
            fast(ODD)


def test_sizes_that_programs_compute_with_stay_open() -> None:
    model = randomise(Lambda(lambda self, x: self.block(x).mean((2, 3)).view(x.shape[0], -1, 2), block=conv_bn(3, 4)))
    module = torch.export.export(model, (X,), dynamic_shapes={"x": {0: Dim.DYNAMIC}}).module()
    fast = rf.optimize(module, example_inputs=X)
    assert fast.report().fused
    obeys(fast(images(5, 3, 32, 32)), model, images(5, 3, 32, 32))


def test_writes_in_place_of_programs_are_understood() -> None:
    acts = (nn.ReLU6(inplace=True), nn.SiLU(inplace=True), nn.Dropout(inplace=True))
    model = randomise(nn.Sequential(*(layer for act in acts for layer in (conv_bn(3), act))))
    fast = rf.optimize(torch.export.export(model, (X,)).module(), example_inputs=X)
    obeys(fast(X), model, X)
    assert sum(row.fused.startswith("conv_bn_act") for row in fast.report().rows) == 6


def test_live_programs_keep_their_ops(small: Any) -> None:
    saved = io.BytesIO()
    torch.export.save(torch.export.export(small, (X,)), saved)
    saved.seek(0)
    program = torch.export.load(saved)
    assert ours(program)
    obeys(program.module()(X).detach(), small, X)
