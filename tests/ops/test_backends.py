"""Choosing a backend, and saying so when something slower runs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import resnet_fast as rf
from resnet_fast import backends
from resnet_fast.backends import FallbackWarning, cpu, onednn, packing


@pytest.fixture
def no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"x": torch.randn(1, 4, 5, 5).to(dtype), "weight": torch.randn(4, 4, 1, 1).to(dtype),
            "scale": torch.ones(4), "shift": torch.zeros(4)}  # fmt: skip


def test_use_is_a_call_and_a_context_manager() -> None:
    assert backends.current() == "auto"
    with backends.use("reference"):
        assert backends.current() == "reference"
        with backends.use("onednn"):
            assert backends.current() == "onednn"
        assert backends.current() == "reference"
    assert backends.current() == "auto"
    backends.use("reference")
    assert backends.current() == "reference"
    backends.use("auto")
    assert backends.current() == "auto"


def test_use_really_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    a, calls = arguments(), []
    real = onednn.conv
    monkeypatch.setattr(onednn, "conv", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    with backends.use("reference"):
        rf.ops.conv_bn_act(**a)
    assert not calls
    with backends.use("onednn"):
        rf.ops.conv_bn_act(**a)
    assert calls


def test_use_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'cudnn'; choose one of \['auto', 'reference'"):
        backends.use("cudnn")
    monkeypatch.setattr(onednn, "_probe", lambda: "this torch build has no oneDNN")
    with pytest.raises(RuntimeError, match="'onednn' cannot be used here: this torch build has no oneDNN"):
        backends.use("onednn")
    assert backends.current() == "auto"


@pytest.mark.usefixtures("no_record")
def test_a_fallback_warns_once_and_is_listed() -> None:
    a = arguments(torch.float16)
    with pytest.warns(FallbackWarning, match="float16; the plain torch reference runs"):
        rf.ops.conv_bn_act(**a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rf.ops.conv_bn_act(**a)
    ((what, reason),) = backends.fallbacks()
    assert what == "conv_bn_act" and "float16" in reason
    assert reason in str(rf.info()) and "2 times" in str(rf.info())


@pytest.mark.usefixtures("no_record")
def test_onednn_switched_off_by_the_user_is_respected_and_reported() -> None:
    with backends.use("onednn"), torch.backends.mkldnn.flags(enabled=False):
        assert backends.available()["onednn"] == "torch.backends.mkldnn.enabled is False"
        with pytest.warns(FallbackWarning, match="enabled is False"):
            rf.ops.conv_bn_act(**arguments())
    assert backends.available()["onednn"] == ""


@pytest.mark.usefixtures("no_record")
def test_a_torch_without_the_private_functions_falls_back_visibly(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> dict[str, Any]:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_convolution_pointwise'")

    monkeypatch.setattr(cpu, "_loaded", lambda: (None, "not built"))  # the engine would do without them
    monkeypatch.setattr(onednn, "_functions", gone)
    monkeypatch.setattr(packing, "_runs", {})
    onednn._verify.cache_clear()
    try:
        assert "does not offer oneDNN's fused functions" in onednn.unavailable()
        with pytest.warns(FallbackWarning, match="_convolution_pointwise"):
            y = rf.ops.conv_bn_act(**(a := arguments()))
        assert torch.allclose(y, torch.conv2d(a["x"], a["weight"]).relu(), atol=1e-5)
    finally:
        onednn._verify.cache_clear()


def test_wrong_numbers_disqualify_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = onednn._functions()
    broken = {**real, "conv_sum": lambda x, other, *rest: real["conv"](x, *rest[:6], "none", [], "")}
    monkeypatch.setattr(onednn, "_functions", lambda: broken)
    onednn._verify.cache_clear()
    try:
        assert "convolution + sum gives wrong numbers" in onednn.unavailable()
    finally:
        onednn._verify.cache_clear()


def test_info_is_complete_and_serialisable() -> None:
    import json

    report = rf.info()
    assert json.loads(json.dumps(report.as_dict()))["torch"] == torch.__version__
    for word in ("torch", "onednn", "reference", "threads", rf.__version__):
        assert word in str(report)


@pytest.mark.parametrize("state", ["float64 by default", "meta by default", "autocast", "fake tensors"])
def test_the_callers_modes_do_not_disqualify_it(state: str) -> None:
    from torch._subclasses import FakeTensorMode

    contexts = {
        "meta by default": torch.device("meta"),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "fake tensors": FakeTensorMode(),
    }
    onednn._verify.cache_clear()
    if state == "float64 by default":
        torch.set_default_dtype(torch.float64)
        try:
            assert onednn.unavailable() == ""
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        with contexts[state]:
            assert onednn.unavailable() == ""


def test_a_failure_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    onednn._verify.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(onednn, "_functions", lambda: {})
        assert onednn.unavailable() != ""
    assert onednn.unavailable() == ""
