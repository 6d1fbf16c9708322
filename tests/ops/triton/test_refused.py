"""What the compiler or the driver refuses has another way, said once; an error of an earlier launch has none."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fast as rf
from resnet_fast import backends
from resnet_fast.backends import FallbackWarning, cuda, triton
from resnet_fast.kernels import gpus
from resnet_fast.ops import ALL
from resnet_fast.ops.bottleneck_tail import OP as TAIL
from resnet_fast.ops.conv_bn_act import OP as CONV
from resnet_fast.ops.conv_bn_act import Arguments

batch_norm_act = importlib.import_module("resnet_fast.ops.batch_norm_act")  # whose names are functions' in ops, too
conv_statistics = importlib.import_module("resnet_fast.ops.conv_statistics")

pytestmark = pytest.mark.triton

CUDA = "Triton Error [CUDA]: "
REFUSALS = (
    "invalid argument",
    "too many resources requested for launch",
    "no kernel image is available for execution on the device",
    "Failed to create tensor map descriptor: invalid argument\nelemType=6 rank=4",
)
OTHERS = (
    "an illegal memory access was encountered",
    "unspecified launch failure",
    "misaligned address",
    "out of memory",
    "context is destroyed",
    "operation would make the legacy stream depend on a capturing blocking stream",
)


@pytest.fixture(autouse=True)
def no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    monkeypatch.setattr(triton, "_refused", {})
    monkeypatch.setattr(triton, "_ready", {})


class Refusing:
    """In a kernel's place: every launch raises an error. ``calls``: how many were tried."""

    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def launch() -> None:
            self.calls += 1
            raise self.error

        return launch


def refuse(monkeypatch: pytest.MonkeyPatch, op: str, error: Exception, function: str = "launch") -> Refusing:
    kernel = Refusing(error)
    monkeypatch.setattr(importlib.import_module(f"resnet_fast.kernels.{op}"), function, kernel)
    return kernel


def arguments() -> Arguments:
    return Arguments(torch.randn(1, 16, 5, 5), torch.randn(16, 16, 3, 3), torch.rand(16), torch.randn(16))


def bound(a: Arguments, asked: str = "auto") -> Any:
    """The op on constants as on a GPU, where Triton is a candidate by itself."""
    made = CONV.bind(*a[1:4], backend="triton")
    made.asked = asked
    return made


@pytest.mark.parametrize("words", REFUSALS)
def test_the_reference_runs_instead_and_says_so_once(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = refuse(monkeypatch, "conv_bn_act", RuntimeError(CUDA + words))
    a = arguments()
    op, want = bound(a), CONV.reference(a)
    assert op.backend_for(a.x) == "triton"
    with pytest.warns(FallbackWarning) as said:
        assert torch.equal(op(a.x), want)
    (message,) = (str(each.message) for each in said)
    first = words.splitlines()[0]
    key = CONV.problem(a).key()  # type: ignore[misc]
    assert message == (
        f"conv_bn_act: the Triton kernel for {key} cannot be launched ({first}); the plain torch reference runs instead"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(op(a.x), want)
    assert kernel.calls == 1  # the second time nobody asks the driver again
    assert list(backends.fallbacks().values()) == [2] and key in str(rf.info())
    assert op.backend_for(a.x) == "reference"
    with pytest.warns(FallbackWarning, match="n2 5x5"):  # another problem is tried, and has a record of its own
        op(torch.randn(2, 16, 5, 5))
    assert kernel.calls == 2 and len(backends.fallbacks()) == 2


def test_what_the_compiler_refuses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    for index, error in enumerate(
        (
            OutOfResources(300_000, 232_448, "shared memory"),
            PTXASError("`ptxas` raised SIGSEGV"),
            CompilationError("x = 1", None, "no such thing"),  # type: ignore[arg-type]
            RuntimeError("PassManager::run failed"),
        )
    ):
        refuse(monkeypatch, "conv_bn_act", error)
        a = arguments()
        a = a._replace(x=torch.randn(index + 1, 16, 5, 5))
        with pytest.warns(FallbackWarning, match=f"cannot be launched .{type(error).__name__}: "):
            assert torch.equal(bound(a)(a.x), CONV.reference(a))


@pytest.mark.parametrize("words", OTHERS)
def test_an_error_that_may_be_an_earlier_launchs_is_raised(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = refuse(monkeypatch, "conv_bn_act", RuntimeError(CUDA + words))
    a = arguments()
    for count in (1, 2):
        with pytest.raises(RuntimeError, match=words) as raised:
            bound(a)(a.x)
        assert raised.value is kernel.error and kernel.calls == count and not backends.fallbacks()


@pytest.mark.parametrize(
    "error", [RuntimeError("invalid argument"), ValueError("x"), AssertionError("base"), MemoryError()]
)
def test_an_error_of_our_own_is_raised(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "conv_bn_act", error)
    a = arguments()
    with pytest.raises(type(error)):
        bound(a)(a.x)
    assert not backends.fallbacks()


def test_triton_by_name_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "conv_bn_act", RuntimeError(CUDA + "invalid argument"))
    a = arguments()
    for _ in range(2):
        with pytest.raises(triton.Refused, match=r"n1 5x5 .* cannot be launched \(invalid argument\)"):
            bound(a, "triton")(a.x)
        with backends.use("triton"), pytest.raises(triton.Refused, match="invalid argument"):
            rf.ops.conv_bn_act(*a[:4])
        with backends.use("triton"), pytest.raises(triton.Refused, match="invalid argument"):
            bound(a)(a.x)
    assert bound(a, "triton").backend_for(a.x) == "triton" and not backends.fallbacks()


def test_cudas_kernel_runs_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "conv_bn_act", RuntimeError(CUDA + "invalid argument"))
    a = arguments()
    monkeypatch.setattr(cuda, "faster", lambda *given: "")
    monkeypatch.setattr(cuda, "kernel", lambda *given: ("the kernel", ""))
    monkeypatch.setattr(cuda, "conv_bn_act", lambda kernel, *tensors, **form: tensors[5].fill_(7))
    op = bound(a)
    op.candidates = (triton, cuda)
    with pytest.warns(FallbackWarning, match="CUDA's kernel runs instead"):
        y = op(a.x)
    assert bool((y == 7).all()) and op.backend_for(a.x) == "cuda"


def sample(op: Any, problem: Any) -> Any:
    return op.example(problem, torch.device("cpu"))


@pytest.mark.parametrize("name", ["stem", "head", "add_act"])
def test_every_op_has_a_way_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.kernels.problems import AddAct, Head, Stem

    problems: dict[str, Any] = {
        "stem": Stem(1, 17, 17, 3, 8, False, False, "fp32"), "head": Head(2, 3, 3, 16, 5, "fp32"),
        "add_act": AddAct(64, "fp32"),
    }  # fmt: skip
    refuse(monkeypatch, name, RuntimeError(CUDA + "invalid argument"))
    with pytest.warns(FallbackWarning, match=f"{name}: the Triton kernel for .* the plain torch reference runs"):
        assert ALL[name].by_kernel((triton,), sample(ALL[name], problems[name])) is None


def test_a_tail_is_computed_by_its_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.kernels.problems import BottleneckTail

    problem = BottleneckTail(2, 56, 56, 64, 256, 1, None, 64, "fp32")
    refuse(monkeypatch, "bottleneck_tail", RuntimeError(CUDA + "invalid argument"))
    a = sample(TAIL, problem)
    with triton.assume(gpus.known("h100")), pytest.warns(FallbackWarning, match="its convolutions run one after"):
        found = TAIL.by_kernel((triton,), a)
    for ours, want in zip(found, TAIL.reference(a), strict=True):
        torch.testing.assert_close(ours, want)


def test_training_has_a_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError(CUDA + "invalid argument")
    for step in ("statistics", "apply", "finish"):
        monkeypatch.setattr(
            importlib.import_module("resnet_fast.kernels.batch_norm_act"), step, _several(error, step == "finish")
        )
    x, running = torch.randn(4, 8, 3, 3).contiguous(memory_format=torch.channels_last), torch.zeros(8)
    a = batch_norm_act.Statistics(x, running, running + 1, 0.1, 1e-5, "")
    with pytest.warns(FallbackWarning, match="batch_norm_act: .* the plain torch reference runs instead"):
        assert batch_norm_act.STATISTICS.by_kernel((triton,), a) is None
    assert not running.any()  # nothing was updated twice
    moments = batch_norm_act.Moments(*(torch.ones(8),) * 2, running, running + 1, 36, 0.1, 1e-5)
    with pytest.warns(FallbackWarning, match="8 moments of 36 rows"):
        assert batch_norm_act.FROM_MOMENTS.by_kernel((triton,), moments) is None


def _several(error: Exception, single: bool) -> Any:
    kernel = Refusing(error)
    return kernel if single else lambda *args, **kwargs: (kernel(),)


def test_a_convolution_with_statistics_has_a_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError(CUDA + "invalid argument")
    monkeypatch.setattr(
        importlib.import_module("resnet_fast.kernels.conv_statistics"), "launches", _several(error, False)
    )
    a = sample(conv_statistics.OP, conv_statistics.Problem(
        1, 6, 6, 16, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1, "fp32", False, False
    ))  # fmt: skip
    with pytest.warns(FallbackWarning, match="convolution and statistics run one after the other"):
        found: tuple[Tensor, ...] = conv_statistics.run_kernel(a)
    for ours, want in zip(found, conv_statistics.plain(a), strict=True):
        torch.testing.assert_close(ours, want)
    with backends.use("triton"), pytest.raises(triton.Refused):
        conv_statistics.run_kernel(a)
