"""Caffe networks on the Triton kernels, on the GPU if there is one: unpadded stem, v1 blocks, the head of one window.

Definitions are made here as data, so that no protobuf is needed.
"""

from __future__ import annotations

import copy

import pytest
import torch

import resnet_fast as rf
from resnet_fast.caffe import definition as d
from resnet_fast.caffe.resnet import deploy_definition
from tests.caffe.files import network
from tests.numerics import assert_obeys_error_rule
from tests.triton_device import DEVICE, FORMS, count_launches, kernels

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory")]


def small() -> d.Definition:
    """A ResNet's stem, a block with a projection and one without, pool, classifier."""
    made: list[d.Layer] = []

    def add(name: str, parameters: d.Parameters, *bottoms: str, top: str = "") -> str:
        made.append(d.Layer(name, parameters, bottoms, (top or name,)))
        return top or name

    def conv(name: str, x: str, outputs: int, kernel: int, stride: int = 1, relu: bool = True) -> str:
        add(name, d.Convolution(outputs, (kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, bias_term=not relu), x)
        add(f"bn_{name}", d.BatchNorm(True), name, top=name)
        add(f"scale_{name}", d.Scale(bias_term=True), name, top=name)
        return add(f"relu_{name}", d.ReLU(), name, top=name) if relu else name

    x = add("pool1", d.Pooling("MAX", (3, 3), (2, 2)), conv("conv1", "data", 16, 7, 2))
    for block, stride in (("a", 2), ("b", 1)):
        shortcut = conv(f"{block}1", x, 32, 1, stride, relu=False) if block == "a" else x
        y = conv(f"{block}2b", conv(f"{block}2a", x, 16, 1, stride), 16, 3)
        x = add(block, d.Eltwise(), shortcut, conv(f"{block}2c", y, 32, 1, relu=False))
        x = add(f"relu_{block}", d.ReLU(), x, top=x)
    x = add("fc", d.InnerProduct(5), add("pool5", d.Pooling("AVE", (5, 4)), x))
    return d.Definition("small", (d.Input("data", (1, 3, 37, 31)),), tuple(made))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_caffe_network(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_launches(monkeypatch, "conv_bn_act", "stem", "head", "add_act")
    net = network(small())
    x = torch.randn(2, 3, 37, 31, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad(), kernels(form):
        exact = copy.deepcopy(net).double()(x.double())
        same = copy.deepcopy(net).to(dtype)(x)
        got = (
            rf.optimize(copy.deepcopy(net).to(DEVICE), check=False, dtype=dtype, backend="triton")(x.to(DEVICE))
            .to(dtype)
            .cpu()
        )
    assert_obeys_error_rule(got, same, exact)
    assert counts == {"stem": 1, "conv_bn_act": 7, "head": 1}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_resnet_50_on_a_gpu(dtype: torch.dtype) -> None:
    net = network(deploy_definition(50)).cuda()
    x = torch.randn(2, 3, 224, 224, device="cuda").to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(net).double().blobs(x.double(), ["fc1000"])["fc1000"]
        same = copy.deepcopy(net).to(dtype).blobs(x, ["fc1000"])["fc1000"]
        got = rf.optimize(net.features(["fc1000"]), check=False, dtype=dtype)(x).to(dtype)
    assert_obeys_error_rule(got, same, exact)
