"""``quantize(round_image=True)``: the first convolution in int8, too."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import resnet_fast as rf
from resnet_fast.backends import cpu
from resnet_fast.graph.quantize_layers import Convolution, Quantize
from resnet_fast.models.resnet import BasicBlock, ResNet
from tests.graph.test_quantize import Residual, images, made, sqnr
from tests.graph.test_quantize_engine import Compared, calls, counted
from tests.networks import randomise

engine = pytest.mark.skipif(bool(cpu.without_uint8()), reason=cpu.without_uint8() or "-")


def stem() -> nn.Module:
    """A network that begins with the op ``stem``, whose max-pool is on bytes then."""
    return randomise(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7).eval())


def network(kind: str) -> nn.Module:
    return stem() if kind == "stem" else made(Residual())


@pytest.mark.parametrize("kind", ["stem", "conv_bn_act"])
def test_the_first_convolution_becomes_int8(kind: str) -> None:
    model = network(kind)
    plain, fast = (rf.quantize(model, images(size=48), round_image=given) for given in (False, True))
    assert plain.quantization is not None and fast.quantization is not None
    first = fast.quantization.layers[0]
    assert (first.op, first.precision, first.reason) == (kind, "int8", "")
    assert first.alone is not None and first.alone > 30
    assert plain.quantization.layers[0].precision == "float32"
    assert plain.quantization.layers[0].reason == "it reads the image"
    (image,) = (node for node in fast.graph_module.graph.nodes if node.op == "placeholder")
    readers = [fast.graph_module.get_submodule(str(user.target)) for user in image.users]
    assert [type(reader) for reader in readers] == [Quantize]
    x = images(3, size=48)[2]
    with torch.no_grad():
        exact = model(x)
    assert sqnr(exact, fast(x)) > max(25, sqnr(exact, plain(x)) - 3)
    rows = {row.name: row for row in fast.report().rows if row.fused}
    assert rows[first.name].backend == rows[fast.quantization.layers[1].name].backend


@engine
@pytest.mark.parametrize("kind", ["stem", "conv_bn_act"])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "every other column", "expanded"])
def test_images_of_any_strides_are_rounded_in_the_call(kind: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = rf.quantize(network(kind), images(size=48), round_image=True)
    x = torch.randn(2, 3, 37, 42)
    given = {
        "NCHW": lambda: x,
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "every other column": lambda: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
        "expanded": lambda: x[:1, :, :1, :1].expand(2, 3, 37, 42),
    }[layout]()
    counts = counted(monkeypatch, "quantize", "input")
    assert calls(fast) == 1 and fast._in_one_call() and counts == {"quantize": 1, "input": 1}
    compared = Compared(fast.graph_module)
    with torch.no_grad():
        layered = compared.run(given.contiguous())
    assert compared.different <= compared.count // 1000
    torch.testing.assert_close(fast(given), layered.contiguous(), rtol=1e-5, atol=1e-5)
    assert torch.equal(fast(given)[:1], fast(given[:1]))


@pytest.mark.parametrize("kind", ["stem", "conv_bn_act"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_not_rounded(kind: str, value: float) -> None:
    model = network(kind)
    fast = rf.quantize(model, images(size=48), round_image=True)
    x = torch.randn(2, 3, 40, 40)
    x[1, 2, 7, 9] = value
    with torch.no_grad():
        wanted = model(x).isfinite().all(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rf.backends.FallbackWarning)
        found = fast(x).isfinite().all(1)
    assert found.tolist() == wanted.tolist() and bool(wanted[0])


def test_who_keeps_the_first_layer_keeps_it() -> None:
    fast = rf.quantize(stem(), images(size=48), round_image=True, keep_float=["conv1"])
    assert fast.quantization is not None
    assert (fast.quantization.layers[0].precision, fast.quantization.layers[0].reason) == (
        "float32",
        "kept by keep_float",
    )


def test_a_state_dict_has_how_the_image_is_stored() -> None:
    one, other = (rf.quantize(stem(), [batch], round_image=True) for batch in (torch.randn(2, 3, 48, 48), _far()))
    x = torch.randn(1, 3, 48, 48)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    (first,) = (m for m in one.graph_module.modules() if isinstance(m, Convolution) and m.weight.shape[1] == 3)
    assert first.affine("x") is not None and first.affine("out") is not None


def _far() -> Tensor:
    return torch.randn(2, 3, 48, 48) * 3 + 1
