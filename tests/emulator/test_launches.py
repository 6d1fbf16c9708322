"""Launches on a driver without a GPU: those of networks are within all limits, and each limit is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.emulator import driver

pytestmark = pytest.mark.skipif(bool(driver.unavailable()), reason=driver.unavailable())


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process whose Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=600, check=False
    )


def succeed(function: Callable[[], Any]) -> Any:
    """Return what a function of this file returns there, as JSON."""
    code = f"import json; from {__name__} import {function.__name__} as f; print(json.dumps(f()))"
    ran = run("-c", code)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "options",
    [
        "--models resnet18 --batches 1 --precisions bf16 --inference",
        "--models resnet50 --batches 128 --precisions fp16 --inference",
        "--models resnet50 --batches 1 --precisions int8 --inference",
    ],
)
def test_no_launch_of_a_network_is_refused(options: str) -> None:
    """A part of ``make launches``, whose kernels may have to be compiled here."""
    ran = run("-m", "tests.emulator.launches", *options.split())
    assert ran.returncode == 0 and "no violation" in ran.stdout, ran.stdout + ran.stderr[-3000:]
    print(ran.stdout)


def planted() -> dict[str, str]:
    """Return what the driver says of a launch with one fault each."""
    import copy
    import dataclasses

    import torch
    import triton

    from resnet_fast.kernels import _launch, conv_bn_act, gpus
    from resnet_fast.tuning import ops
    from tests.emulator.launches import fault, launches, tensors

    fake, gpu = driver.Driver(), gpus.known("h100")
    problem = conv_bn_act.Problem(2, 8, 8, 64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, "fp16", False)
    case = ops.Case("conv_bn_act", problem, "relu")
    (good,) = launches(case, conv_bn_act.heuristic(problem, gpu))

    def descriptor(**changes: Any) -> Any:
        """The launch with another descriptor of x, as nothing checks that behind TensorDescriptor's constructor."""
        made = copy.copy(good.args[0])
        for name, value in changes.items():
            setattr(made, name, value)
        return dataclasses.replace(good, args=(made, *good.args[1:]))

    x = good.args[0]
    beside = torch.empty(x.base.numel() + 8, dtype=x.base.dtype)
    said = {
        "nothing": fault(fake, good),
        "address": fault(fake, descriptor(base=beside[1:])),
        "stride": fault(fake, descriptor(strides=[*x.strides[:2], x.strides[2] + 4, 1])),
        "strides": fault(fake, descriptor(strides=[*x.strides[:2], x.strides[2] * 3, 1])),
        "dimension": fault(fake, descriptor(shape=[2**33, *x.shape[1:]])),
        "no dimension": fault(fake, descriptor(shape=[0, *x.shape[1:]])),
        "beyond the tensor": fault(fake, descriptor(shape=[x.shape[0] + 1, *x.shape[1:]])),
        "grid": fault(fake, dataclasses.replace(good, grid=(1, 70_000))),
        "no grid": fault(fake, dataclasses.replace(good, grid=(0,))),
    }

    def attempt(name: str, function: Callable[[], Any]) -> None:
        try:
            function()
            said[name] = ""
        except Exception as error:
            said[name] = str(error).splitlines()[0]

    utils = triton.runtime.driver.active.utils
    fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor  # Triton 3.6

    def encode(box: list[int], swizzle: int = 0) -> None:
        fill(x.base.data_ptr(), swizzle, 2, 6, box, [512, 1024], [1024, 1], 0)

    attempt("a box", lambda: encode([256, 256]))
    attempt("box", lambda: encode([512, 64]))
    attempt("inner box", lambda: encode([8, 4]))
    attempt("swizzle", lambda: encode([8, 128], 3))

    def without_scale() -> None:
        with fake.memory(each for each in tensors(good) if each is not good.args[2]):
            good()

    attempt("pointer", without_scale)
    kernel = good.compile()
    warps, clusters, _ = kernel.packed_metadata
    for name, metadata in {"shared memory": (warps, clusters, 300_000), "threads": (2 * warps, clusters, 0)}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "packed_metadata", metadata)
            said[name] = fault(fake, good)
    cubin = bytearray(kernel.kernel)
    attempt("cubin", lambda: utils.load_binary("_boxes", bytes(cubin), 0, 0))
    attempt("name", lambda: utils.load_binary("_squares", bytes(cubin), 0, 0))
    attempt("no cubin", lambda: utils.load_binary("_boxes", b"x" * len(cubin), 0, 0))
    cubin[48:50] = bytes([80, 80])  # e_flags
    attempt("another GPU's cubin", lambda: utils.load_binary("_boxes", bytes(cubin), 0, 0))
    with fake.refusing("_boxes", 700):
        said["an error of before"] = fault(fake, good)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESNET_FAST_PDL", "0")
        said["one after the other"] = fault(fake, good)
        patch.delenv("RESNET_FAST_PDL")
        patch.setattr(_launch, "_driver_version", lambda: 12020)
        said["an old driver"] = fault(fake, good)
        # The same kernel, which does not wait, launched early.
        patch.setattr(good.compile().run, "launch_pdl", True)
        said["no wait"] = fault(fake, good)
    said["nothing again"] = fault(fake, good)
    return said


SAID = {
    "nothing": "",
    "address": "a tensor map's global address 0x* is no multiple of 16 bytes",
    "stride": "stride 0 of a tensor map is 136 bytes, it must be a multiple of 16 below 2^40",
    "strides": "stride 1 of a tensor map is 1024 bytes, it must be 8 or more of the 384 before",
    "dimension": "dimension 3 of a tensor map has 8589934592 elements, it must have 1 to 2^32",
    "no dimension": "dimension 3 of a tensor map has 0 elements",
    "beyond the tensor": "a tensor map covers 24576 bytes from 0x* on, and no memory of the device does",
    "grid": "_boxes: the grid is 1 x 70000 x 1, at most",
    "no grid": "_boxes: nothing was launched",
    "a box": "",
    "box": "the box of a tensor map has 512 elements in dimension 1, it must have 1 to 256",
    "inner box": "the inner box of a tensor map has 8 bytes, no multiple of 16",
    "swizzle": "the inner box of a tensor map has 256 bytes, its swizzle at most 128",
    "pointer": "cannot be accessed from Triton",
    "shared memory": "_boxes: 300000 bytes of dynamic shared memory, opted in were",
    "threads": "_boxes: a block has 256 threads, the kernel is compiled for 128",
    "cubin": "",
    "name": "the cubin has no kernel _squares",
    "no cubin": "the module is no cubin",
    "another GPU's cubin": "the cubin is of capability 80, the GPU of 90",
    "an error of before": "an illegal memory access was encountered",
    "one after the other": "_boxes: it starts when the kernel before is over",
    "an old driver": "_boxes: it starts when the kernel before is over",
    "no wait": "_boxes: it may start before the kernel before it is over, and never waits for it",
    "nothing again": "",
}


def test_each_limit_is_one_and_says_so() -> None:
    import re

    said = succeed(planted)
    assert list(said) == list(SAID)
    for name, words in SAID.items():
        pattern = re.escape(words).replace(r"0x\*", "0x[0-9a-f]+")
        assert re.search(pattern if words else "^$", said[name]), f"{name}: {said[name]}"


def refused() -> dict[str, Any]:
    """Return what becomes of launches that fail in the words of Triton itself, as ``auto`` would make them on a GPU."""
    import warnings

    import torch

    from resnet_fast import backends
    from resnet_fast.backends import triton
    from resnet_fast.ops.conv_bn_act import OP, Arguments

    fake, said = driver.Driver(), {}
    for n, (name, code) in enumerate(
        {"launched": 0, "invalid": 1, "resources": 701, "illegal address": 700}.items(), 1
    ):
        a = Arguments(
            torch.randn(n, 64, 8, 8, dtype=torch.float16).contiguous(memory_format=torch.channels_last),
            torch.randn(64, 64, 3, 3, dtype=torch.float16),
            torch.ones(64),
            torch.ones(64),
        )
        with fake.refusing("_boxes" if code else "", code), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            before = fake.launches
            try:
                ways = [OP.by_kernel((triton,), a) is not None for _ in range(2)]
            except RuntimeError as error:
                ways = [str(error)]
        said[name] = [ways, fake.launches - before, [str(each.message) for each in warned]]
    said["recorded"] = list(backends.fallbacks().values())
    return said


def test_a_refused_launch_has_another_way_and_a_broken_context_has_none() -> None:
    said = succeed(refused)
    assert said["launched"] == [[True, True], 2, []]
    for name, words in {"invalid": "invalid argument", "resources": "too many resources requested for launch"}.items():
        ways, launches, (warning,) = said[name]
        assert ways == [False, False] and launches == 0
        assert f"cannot be launched ({words}); the plain torch reference runs instead" in warning
    assert said["illegal address"] == [["Triton Error [CUDA]: an illegal memory access was encountered"], 0, []]
    assert said["recorded"] == [2, 2]


def repeated() -> dict[str, list[bool]]:
    """Return, for launches made again on other tensors: was the short way taken, and is it to the bit the long one?"""
    import torch

    from resnet_fast.backends import triton
    from resnet_fast.kernels import add_act, conv_bn_act, gpus, head

    fake, gpu, device = driver.Driver(), gpus.known("h100"), torch.device("cpu")
    half, last = torch.float16, torch.channels_last

    def image(*shape: int, dtype: torch.dtype = half) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, memory_format=last)

    def conv(c: int, k: int, size: int, stride: int, residual: bool, **changes: Any) -> Any:
        dtype = changes.pop("dtype", half)
        pad = size // 2
        precision = "fp16" if dtype is half else "fp32"
        geometry = ((size, size), (stride, stride), (pad, pad), (1, 1), 1)
        problem = conv_bn_act.Problem(2, 14, 14, c, k, *geometry, precision, residual)

        def tensors() -> list[Any]:
            out = image(2, k, *problem.output, dtype=dtype)
            vectors = torch.empty(k), torch.empty(k)
            rest = torch.empty_like(out) if residual else None
            return [image(2, c, 14, 14, dtype=dtype), image(k, c, size, size, dtype=dtype), *vectors, rest, out]

        return conv_bn_act, problem, tensors, "launch", {"activation": "relu", **changes}

    def classifier(bias: bool) -> Any:
        def tensors() -> list[Any]:
            vector = torch.empty(24, dtype=half) if bias else None
            return [image(2, 64, 7, 7), torch.empty(24, 64, dtype=half), vector, torch.empty(2, 24, dtype=half)]

        return head, head.Problem(2, 7, 7, 64, 24, "fp16"), tensors, "launch", {}

    def added(function: str, **form: Any) -> Any:
        return (
            add_act,
            add_act.Problem(4096, "fp16"),
            lambda: [torch.empty(4096, dtype=half) for _ in "xyz"],
            function,
            form,
        )

    def shared(function: str) -> Any:
        """A layer whose tiles have several shares, by two launches."""
        geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
        problem = conv_bn_act.Problem(1, 7, 7, 512, 512, *geometry, "fp16", False)
        config = conv_bn_act.choose(problem, gpu)

        def tensors() -> list[Any]:
            sums = torch.empty(conv_bn_act.sums_shape(problem, config))
            if function == "launch_shares":
                return [image(1, 512, 7, 7), image(512, 512, 3, 3), sums]
            return [sums, torch.empty(512), torch.empty(512), image(1, 512, 7, 7), image(1, 512, 7, 7)]

        return conv_bn_act, problem, tensors, function, {"activation": "relu"} if function == "launch_sum" else {}

    cases = {
        "boxes": conv(64, 64, 3, 1, False),
        "residual": conv(64, 128, 1, 1, True),
        "residual behind": conv(64, 128, 1, 1, True, residual_after_activation=True, activation="none"),
        "stride 2": conv(64, 64, 3, 2, False),
        "gather": conv(17, 24, 3, 1, True),
        "shares": shared("launch_shares"),
        "their sum": shared("launch_sum"),
        "float32": conv(64, 32, 1, 1, False, dtype=torch.float32),
        "head": classifier(True),
        "head without a bias": classifier(False),
        "add_act": added("launch", activation="relu"),
        "its backward": added("launch_backward"),
    }
    found = {}
    with triton.assume(gpu):
        for name, (kernel, problem, tensors, function, form) in cases.items():

            def launch(
                given: list[Any],
                kernel: Any = kernel,
                problem: Any = problem,
                function: str = function,
                form: Any = form,
            ) -> None:
                triton.launch(kernel.NAME, problem, device, *given, function=function, **form)

            def compared(given: list[Any], short: bool, kernel: Any = kernel, problem: Any = problem,
                         function: str = function, form: Any = form, launch: Any = launch) -> list[bool]:  # fmt: skip
                long, calls = getattr(kernel, function), []
                with fake.recorded() as expected:
                    long(*given, problem, kernel.choose(problem, gpu), **form)()
                with pytest.MonkeyPatch.context() as patch, fake.recorded() as ours:
                    patch.setattr(kernel, function, lambda *a, **k: calls.append(1) or long(*a, **k))
                    launch(given)
                return [bool(calls) is not short, ours == expected and len(ours[0]) > 0]

            launch(tensors())
            found[name] = [*compared(tensors(), True), *compared(tensors(), True)]
            fake.stream = 7
            found[name + ", another stream"] = compared(given := tensors(), True)
            fake.stream = 0
            if function == "launch_shares":
                continue  # the op gives it none that is not aligned
            odd = torch.empty(given[0].numel() + 8, dtype=given[0].dtype)[1:][: given[0].numel()]
            odd = odd.as_strided(given[0].shape, given[0].stride())
            found[name + ", unaligned"] = [*compared([odd, *given[1:]], False), *compared(given, True)]
        import triton as language

        with pytest.MonkeyPatch.context() as patch:
            watched: list[object] = []
            hooks = language.knobs.runtime
            patch.setattr(hooks.launch_enter_hook, "calls", [watched.append])
            launch(given)
        found["watched"] = [len(watched) == 1]
        triton._ready.clear()
        kernel, problem, tensors, function, form = cases["add_act"]
        same = torch.empty(4096, dtype=half)
        for _ in range(3):  # a tensor that is given twice says nothing of two
            triton.launch(kernel.NAME, problem, device, same, same, torch.empty_like(same), **form)
        found["twice"] = [not triton._ready]
        import weakref

        kernel, problem, tensors, function, form = cases["residual"]
        given = tensors()
        for each in (given, given):
            triton.launch(kernel.NAME, problem, device, *each, **form)
        kept = [weakref.ref(each) for each in given]
        del given, each
        found["nothing is kept"] = [bool(triton._ready), *(reference() is None for reference in kept)]
    return found


def test_a_launch_made_again_is_to_the_bit_the_launch_of_triton() -> None:
    wrong = {name: seen for name, seen in succeed(repeated).items() if not all(seen)}
    assert not wrong
