"""Which kernel runs: by tables of measured times, by what was built, by what the GPU and the addresses allow.

With a module that only says what it has, so nothing is compiled; at the end the ops themselves, on the emulated one.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fast as rf
from resnet_fast import backends, ops
from resnet_fast.backends import cuda, triton
from resnet_fast.kernels import _tables, cuda_choice, gpus
from resnet_fast.kernels.problems import AddAct, ConvBNAct, Head, Stem
from tests.cuda_device import DEVICE, installed, watch

H100, A100 = gpus.known("h100"), gpus.known("a100")
CPU = torch.device("cpu")
WITH = {"torch": "t"}
CONV = ConvBNAct(8, 14, 14, 64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, "fp16", False)
STEM, HEAD, ADD = (
    Stem(8, 224, 224, 3, 64, False, False, "fp16"),
    Head(8, 7, 7, 2048, 1000, "fp16"),
    AddAct(1000, "fp16"),
)


def kernel(name: str, precision: str = "fp16", tile: int = 64, least: int = 80, most: int = 999) -> dict[str, Any]:
    algorithm = "cutlass_conv" if name.startswith("sm90") else "implicit_gemm"
    return {
        "name": name, "algorithm": algorithm, "least_capability": least, "most_capability": most,
        "precision": precision, "block_m": tile, "block_n": tile, "block_k": 32, "stages": 3, "threads": 128,
        "shared_bytes": 50_000,
    }  # fmt: skip


class Fake:
    """A module that lists kernels and says what each one cannot compute; it launches nothing."""

    def __init__(self, archs: tuple[str, ...] = ("80", "90a"), emulated: bool = True) -> None:
        self.archs, self.emulated = archs, emulated

    def build_info(self) -> dict[str, Any]:
        return {"archs": list(self.archs), "cuda": "13.0.88", "emulated": self.emulated}

    def conv_bn_act_kernels(self) -> list[dict[str, Any]]:
        return [
            kernel("sm80_fp16_64x64"), kernel("sm80_fp16_128x128", tile=128), kernel("sm80_fp16_masked_64x16"),
            kernel("sm90_fp16_conv", tile=128, least=90, most=90), kernel("sm80_tf32_64x64", "tf32"),
        ]  # fmt: skip

    def conv_bn_act_unsupported(self, name: str, *fields: Any) -> str:
        pointers = fields[:6]
        if "masked" in name:
            return ""
        return "a tensor that is not aligned to 16 bytes" if any(pointer % 16 for pointer in pointers) else ""


AMONG: dict[str, tuple[backends.Backend, ...]] = {"auto": (triton, cuda), "triton": (triton,), "cuda": (cuda,)}


def chosen(op: str, problem: Any, device: torch.device, among: str, *tensors: Tensor | None) -> tuple[str, str]:
    """The backend and the kernel that :func:`backends.choose` finds, "" for none."""
    choice = backends.choose(op, AMONG[among], problem, device, *tensors)
    return "" if choice.backend is None else choice.backend.NAME, choice.kernel


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder of tables; the package's is empty."""
    monkeypatch.setattr(_tables, "_CHECKED_IN", tmp_path / "none")
    monkeypatch.setenv("RESNET_FAST_TUNED", str(tmp_path))
    monkeypatch.setattr(backends, "_fallbacks", {})
    _tables.forget()
    yield tmp_path
    _tables.forget()


@pytest.fixture
def fake() -> Iterator[None]:
    with cuda.substitute(Fake()), triton.assume(H100):
        yield


def table(folder: Path, op: str, problem: Any, *, triton_ms: Any = None, cuda_ms: Any = None, name: str = "") -> None:
    choices: dict[str, Any] = {}
    if triton_ms is not None:
        choices[op] = {problem.key(): {"ms": triton_ms}}
    if cuda_ms is not None:
        choices[f"{op}.cuda"] = {problem.key(): {"ms": cuda_ms} | ({"kernel": name} if name else {})}
    _tables.write(folder / "h100.json", "h100", WITH, choices)


# --- by the tables


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("triton_ms", "cuda_ms", "runs"),
    [
        (0.2, 0.1, "cuda"),
        (0.1, 0.2, "triton"),
        (0.1, 0.1, "triton"),
        (None, 0.1, "triton"),  # nobody knows what Triton takes
        (0.1, None, "triton"),
        (None, None, "triton"),
        ("0.2", 0.1, "triton"),
        (0.2, -0.1, "triton"),
        (True, 0.1, "triton"),
        (float("inf"), 0.1, "triton"),
    ],
)
def test_by_itself_cuda_runs_where_both_were_measured_and_it_takes_less(
    folder: Path, triton_ms: Any, cuda_ms: Any, runs: str
) -> None:
    for op, problem, name in (
        ("conv_bn_act", CONV, "sm80_fp16_64x64"), ("stem", STEM, ""), ("head", HEAD, ""), ("add_act", ADD, "")
    ):  # fmt: skip
        table(folder, op, problem, triton_ms=triton_ms, cuda_ms=cuda_ms, name=name)
        choice = chosen(op, problem, CPU, "auto")
        assert choice == (("cuda", name or op) if runs == "cuda" else ("triton", ""))
        assert backends.pick(op, AMONG["auto"], problem, CPU).name == runs
        assert chosen(op, problem, CPU, "triton") == ("triton", "")
        assert chosen(op, problem, CPU, "cuda")[0] == "cuda"
    assert backends.fallbacks() == {}


@pytest.mark.usefixtures("fake")
def test_a_time_counts_for_its_problem_gpu_and_kernel_alone(folder: Path) -> None:
    table(folder, "conv_bn_act", CONV, triton_ms=0.2, cuda_ms=0.1, name="sm80_fp16_64x64")
    assert chosen("conv_bn_act", CONV, CPU, "auto")[0] == "cuda"
    for change in ({"n": 9}, {"residual": True}, {"precision": "bf16"}, {"dilation": (2, 2)}, {"h": 15}):
        other = dataclasses.replace(CONV, **change)
        assert chosen("conv_bn_act", other, CPU, "auto") == ("triton", "")
    with triton.assume(A100):
        assert chosen("conv_bn_act", CONV, CPU, "auto") == ("triton", "")
    # A kernel that this build has not: another one's time says nothing.
    table(folder, "conv_bn_act", CONV, triton_ms=0.2, cuda_ms=0.1, name="sm80_fp16_256x256")
    assert chosen("conv_bn_act", CONV, CPU, "auto") == ("triton", "")


@pytest.mark.usefixtures("fake")
def test_addresses_that_the_measured_kernel_cannot_read(folder: Path) -> None:
    table(folder, "conv_bn_act", CONV, triton_ms=0.2, cuda_ms=0.1, name="sm80_fp16_64x64")
    flat = torch.zeros(64, dtype=torch.float16)
    assert cuda.alignment(flat[:8]) >= 16 and cuda.alignment(flat[:8], None, flat[3:]) == 2
    assert chosen("conv_bn_act", CONV, CPU, "auto", flat) == ("cuda", "sm80_fp16_64x64")
    assert chosen("conv_bn_act", CONV, CPU, "auto", flat, flat[1:]) == ("triton", "")
    assert chosen("conv_bn_act", CONV, CPU, "cuda", flat[1:]) == ("cuda", "sm80_fp16_masked_64x16")


@pytest.mark.usefixtures("fake")
def test_of_the_cuda_kernels_the_measured_one_comes_first(folder: Path) -> None:
    assert cuda.kernel("conv_bn_act", CONV, H100) == ("sm90_fp16_conv", "")  # Hopper's own, by the heuristic
    assert cuda.kernel("conv_bn_act", CONV, A100)[0] in ("sm80_fp16_64x64", "sm80_fp16_128x128")
    table(folder, "conv_bn_act", CONV, cuda_ms=3.0, name="sm80_fp16_128x128")
    assert cuda.kernel("conv_bn_act", CONV, H100) == ("sm80_fp16_128x128", "")
    table(folder, "conv_bn_act", CONV, cuda_ms=3.0, name="gone")
    assert cuda.kernel("conv_bn_act", CONV, H100) == ("sm90_fp16_conv", "")
    offered = cuda_choice.candidates(CONV, H100, cuda.supporting(CONV, H100)[0])
    assert next(each.kernel for each in offered) == "sm90_fp16_conv"


@pytest.mark.usefixtures("fake")
def test_what_no_cuda_kernel_computes_is_said_and_recorded() -> None:
    for op, problem, said in (
        ("conv_bn_act", dataclasses.replace(CONV, precision="fp32"), "no CUDA convolution .* float32 without tf32"),
        ("conv_bn_act", dataclasses.replace(CONV, precision="bf16"), "no CUDA convolution for this GPU computes bf16"),
        ("stem", dataclasses.replace(STEM, c=5), "up to 4 channels, x has 5"),
        ("stem", dataclasses.replace(STEM, precision="fp32"), "float32 as tf32 only"),
        ("conv_bn_act", dataclasses.replace(CONV, w=2**31), "count sizes in 32 bits"),
        ("head", dataclasses.replace(HEAD, h=2**16, w=2**15), "count sizes in 32 bits"),
    ):
        assert backends.pick(op, AMONG["cuda"], problem, CPU).name == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert chosen(op, problem, CPU, "auto") == ("triton", "")  # which computes it
        with pytest.warns(backends.FallbackWarning, match=f"{said}.*; the plain torch reference runs instead"):
            assert chosen(op, problem, CPU, "cuda") == ("", "")
    assert len(backends.fallbacks()) == 6


# --- by what there is


@pytest.mark.parametrize(
    ("asked", "no_triton", "no_cuda", "found", "said"),
    [
        ("auto", "", "", "triton cuda", ""),
        ("auto", "no triton", "", "cuda", ""),
        ("auto", "", "not built", "triton", ""),
        ("auto", "no triton", "not built", "", "no triton; not built"),
        ("triton", "", "", "triton", ""),
        ("triton", "no triton", "", "", "no triton"),
        ("cuda", "", "", "cuda", ""),
        ("cuda", "", "not built", "", "not built"),
    ],
)
def test_which_kernels_run(
    asked: str, no_triton: str, no_cuda: str, found: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "unavailable", lambda: no_triton)
    monkeypatch.setattr(cuda, "unavailable", lambda: no_cuda)
    for module in (triton, cuda):
        monkeypatch.setattr(module, "unsupported", lambda dtype, device: "")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        usable = backends.candidates("head", torch.device("cuda", 0), torch.float16, asked)
    assert " ".join(each.NAME for each in usable) == found
    assert [str(each.message) for each in seen] == (
        [f"head: {said}; the plain torch reference runs instead"] if said else []
    )


def test_which_kernels_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(device: str, asked: str = "auto") -> list[str]:
        return [each.NAME for each in backends.candidates("head", torch.device(device), torch.float16, asked)]

    for module in (triton, cuda):
        monkeypatch.setattr(module, "unavailable", lambda: "")
        monkeypatch.setattr(module, "unsupported", lambda dtype, device: "")
    assert names("cuda") == ["triton", "cuda"] and names("cpu") == names("meta") == []
    assert names("cuda", "triton") == ["triton"] and names("cuda", "cuda") == ["cuda"]
    assert names("cuda", "reference") == names("cpu", "onednn") == []
    with pytest.raises(RuntimeError, match="backend 'cuda' runs on cuda tensors, got a tensor on 'cpu'"):
        names("cpu", "cuda")
    with cuda.substitute(Fake()):
        assert names("cpu", "cuda") == ["cuda"]
        monkeypatch.setattr(backends, "selected", "cuda")
        assert names("cpu") == ["cuda"] and names("cpu", "reference") == []


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["80"], (8, 0), True),
        (["80"], (8, 9), True),
        (["80"], (9, 0), True),  # its PTX
        (["80", "90a"], (10, 0), True),
        (["90a"], (9, 0), True),
        (["90a"], (10, 0), True),  # PTX again, of compute_90
        (["90a", "100a"], (8, 0), False),
        (["86"], (8, 0), False),
        (["89", "90a"], (8, 6), False),
        ([], (9, 0), False),
    ],
)
def test_which_gpus_a_build_runs_on(archs: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert cuda.built_for(archs, *capability) is runs


# --- not built


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """There is no module, whatever this checkout has; the cache of what was found is fresh, and afterwards too."""
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    cuda._loaded.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    cuda._loaded.cache_clear()


@pytest.mark.parametrize(
    ("left", "why"),
    [
        ({}, "this copy was not installed by setup.py (pip install -e ., or make native)"),
        ({"built": True}, "it was, but for another Python, or the file is gone (install again)"),
        ({"built": False, "reason": "RESNET_FAST_BUILD=off"}, "RESNET_FAST_BUILD=off"),
        ({"built": False}, "the build gave no reason"),
        ({"built": False, "reason": "ninja ended\nx.cu(3): error: no\n"}, "ninja ended"),
    ],
)
def test_without_a_module_the_builds_reason_is_said(
    left: dict[str, Any], why: str, unbuilt: pytest.MonkeyPatch
) -> None:
    unbuilt.setattr(cuda, "record", lambda: left)
    assert cuda.unavailable() == f"resnet_fast._C is not built: {why}"  # its first line
    with pytest.raises(RuntimeError) as raised:
        backends.use("cuda")
    assert str(raised.value) == f"backends.use: 'cuda' cannot be used here: resnet_fast._C is not built: {why}"
    assert backends.current() == "auto" and backends.available()["cuda"] == cuda.unavailable()
    with pytest.raises(
        RuntimeError, match=r"optimize: backend 'cuda' cannot be used here: resnet_fast\._C is not built"
    ):
        rf.optimize(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)).eval(), backend="cuda")
    with pytest.raises(RuntimeError, match="is not built"):
        cuda.add_act(torch.ones(1), torch.ones(1), torch.ones(1))
    found = rf.info()
    whole = left.get("reason", why) if not left.get("built") else why
    assert found.native == {"built": False, "reason": f"resnet_fast._C is not built: {whole}"}
    assert f"native       resnet_fast._C is not built: {whole}" in str(found)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (ImportError("undefined symbol: f"), "does not load: ImportError: undefined symbol: f"),
        (SimpleNamespace(build_info=lambda: {"archs": [], "cuda": "", "interface": 1}), "was built without CUDA"),
        (SimpleNamespace(build_info=lambda: {"archs": ["80"], "cuda": "13.0"}), "from an older or newer csrc/"),
        (SimpleNamespace(build_info=lambda: {"archs": ["80"], "cuda": "13.0", "interface": 0}), "build it again"),
    ],
)
def test_a_module_that_is_of_no_use(module: Any, said: str, unbuilt: pytest.MonkeyPatch) -> None:
    def load(name: str) -> ModuleType:
        if isinstance(module, Exception):
            raise module
        return module  # type: ignore[no-any-return]

    unbuilt.setattr(cuda.importlib.util, "find_spec", lambda name: SimpleNamespace())
    unbuilt.setattr(cuda.importlib, "import_module", load)
    assert said in cuda.unavailable() and said in rf.info().native["reason"]


def test_asking_does_not_initialize_cuda_and_forcing_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that computes on the CPU must be able to fork; whoever forces CUDA hears of code that is missing."""
    monkeypatch.setattr(cuda, "_loaded", lambda: (cuda.Native(Fake(archs=("90a",), emulated=False)), ""))
    monkeypatch.setattr(cuda, "_no_gpu", lambda: "")
    monkeypatch.setattr(cuda, "_no_code", lambda index: f"no code for GPU {index}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert cuda.unavailable() == "" == backends.available()["cuda"]
    with pytest.raises(RuntimeError, match="'cuda' cannot be used here: no code for GPU 0"):
        backends.use("cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert backends.available()["cuda"] == "no code for GPU 0"
    monkeypatch.setattr(cuda, "_no_code", lambda index: "" if index else "no code for GPU 0")
    assert backends.available()["cuda"] == ""  # the other one will do


def test_info_of_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    with cuda.substitute(Fake(emulated=False)):
        found = rf.info()
    assert found.native == {
        "built": True, "reason": "", "archs": ["80", "90a"], "cuda": "13.0.88", "convolutions": 5, "cutlass": 1,
        "emulated": False,
    }  # fmt: skip
    said = "5 convolution kernels, 1 of them CUTLASS's for Hopper\n"
    assert f"native       resnet_fast._C for 80, 90a, CUDA 13.0.88, {said}" in str(found)
    for_hopper = Fake(archs=("90a",), emulated=False)
    for_hopper.conv_bn_act_kernels = lambda: []  # type: ignore[method-assign]
    with cuda.substitute(for_hopper):
        assert "0 convolution kernels, none of them CUTLASS's for Hopper" in str(rf.info())
    with cuda.substitute(Fake(archs=("80",), emulated=False)):
        assert "CUTLASS" not in str(rf.info())
    cuda._loaded.cache_clear()
    monkeypatch.setattr(cuda, "_loaded", lambda: (cuda.Native(Fake(emulated=False)), ""))
    monkeypatch.setattr(cuda, "record", lambda: {"built": True, "ptx": "80", "sm90": "all", "seconds": 93.5})
    assert rf.info().native["sm90"] == "all"
    assert "for 80, 90a, PTX for newer ones from 80, CUDA 13.0.88, 5 convolution kernels" in str(rf.info())


# --- the ops


@pytest.mark.cuda
@pytest.mark.skipif(bool(triton.unavailable()), reason=triton.unavailable() or "Triton runs")
def test_the_ops_run_what_the_table_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both may run: CUDA is launched for what it was measured to be faster at, else Triton; live and prepared."""
    if DEVICE == "cpu":  # by themselves kernels run on a GPU only
        monkeypatch.setattr(backends, "candidates", lambda *_: (triton, cuda))
        monkeypatch.setattr(backends, "selected", "cuda")  # or CPU tensors ask for no candidates
    launched, device = watch(monkeypatch), torch.device(DEVICE)
    x = torch.randn(1, 8, 4, 4, dtype=torch.float16, device=device)
    weight, one = torch.randn(8, 8, 1, 1, dtype=torch.float16, device=device), torch.ones(8, device=device)
    matrix = torch.randn(3, 8, dtype=torch.float16, device=device)
    with installed():
        gpu = triton.gpu_of(device)
        conv = ConvBNAct(1, 4, 4, 8, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1, "fp16", False)
        pool, add = Head(1, 4, 4, 8, 3, "fp16"), AddAct(128, "fp16")
        name = cuda.kernel("conv_bn_act", conv, gpu)[0]
        fixed = (
            ops.ALL["conv_bn_act"].bind(weight, one, one, dtype=torch.float16),
            ops.ALL["head"].bind(matrix, None, dtype=torch.float16),
        )
        assert [each.backend for each in fixed] == ["auto", "auto"]

        def results() -> list[torch.Tensor]:
            launched.clear()
            y = rf.ops.conv_bn_act(x, weight, one, one)
            return [y, fixed[0](x), rf.ops.head(y, matrix), fixed[1](y), rf.ops.add_act(x, y)]

        by_triton = results()
        assert launched == [] and fixed[0].backend_for(x.to("meta")) == "triton"
        choices: dict[str, Any] = {"conv_bn_act.cuda": {conv.key(): {"kernel": name, "ms": 0.1}}}
        choices |= {"head.cuda": {pool.key(): {"ms": 0.1}}, "add_act.cuda": {add.key(): {"ms": 0.1}}}
        choices |= {op.removesuffix(".cuda"): {key: {"ms": 0.2} for key in found} for op, found in choices.items()}
        _tables.write(folder / f"{gpu.name}.json", gpu.name, WITH, choices)
        by_cuda = results()
        assert launched == [name, name, "head", "head", "add_act"]
        assert [each.backend_for(x.to("meta")) for each in fixed] == ["cuda", "cuda"]
        for ours, theirs in zip(by_cuda, by_triton, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=4e-3, atol=4e-3)
    assert backends.fallbacks() == {}
