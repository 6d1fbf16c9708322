"""Caffe networks against OpenCV's Caffe importer: the published ResNets, small networks, and pooling windows.

OpenCV is an independent reading of the same files. Where it is known not to follow Caffe, a test says how it differs.
Every comparison has a Net of its own, since OpenCV fuses layers and reuses memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

import resnet_fast as rf
from resnet_fast import caffe
from resnet_fast.caffe import definition as d
from tests.caffe import files as caffe_files
from tests.caffe.test_layers import windows

cv2 = pytest.importorskip("cv2", reason="needs OpenCV: pip install 'opencv-python-headless>=4.10,<5'")


if hasattr(cv2, "setLogLevel"):  # OpenCV before 4.13
    cv2.setLogLevel(0)
else:
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

LIMIT = 1e-5
"""Of the largest absolute value of a blob: what its elements may differ by."""


def opencv(files: Sequence[str], net: caffe.Net, inputs: dict[str, Tensor], blobs: Sequence[str]) -> dict[str, Tensor]:
    """The blobs as a fresh Net of OpenCV computes them from ``files``, with its defaults."""
    theirs = cv2.dnn.readNetFromCaffe(*files)
    for name, value in inputs.items():
        theirs.setInput(value.numpy(), name)
    # By the name of the layer that writes it last OpenCV knows a blob.
    writers = [[layer for layer in net.definition.layers if name in layer.tops][-1] for name in blobs]
    found = theirs.forwardAndRetrieve([layer.name for layer in writers])  # of each layer all its tops
    return {
        name: torch.from_numpy(np.array(values[layer.tops.index(name) if layer.type != "Split" else 0]))
        for name, layer, values in zip(blobs, writers, found, strict=True)
    }


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    assert theirs.isfinite().all() and theirs.std() > 1e-4 * theirs.abs().max(), f"{what}: nothing to compare with"
    ratio = ((ours.detach() - theirs).abs().max() / theirs.abs().max()).item()
    assert ratio <= LIMIT, f"{what}: differs by {ratio:.2e} of the largest value"


# ------------------------------------------------------------------------------------------------------------- ResNets

INNER = (
    "res2a_branch1",
    "res2a",
    "res2c",
    "res3a_branch1",
    "res3a",
    "res4a_branch1",
    "res4a",
    "res5a",
    "res5b",
    "res5c",
)
"""Blobs that the optimized network has too, since more than one layer reads them or none is fused across them."""

MIDDLE = {50: ("res3d", "res4f"), 101: ("res3b3", "res4b22"), 152: ("res3b7", "res4b35")}
"""The last blocks of the stages whose blocks have other names at other depths."""

DEPTHS = (50, 101, 152)


@pytest.fixture(scope="module", params=DEPTHS, ids=[f"ResNet-{depth}" for depth in DEPTHS])
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, caffe.Net, Tensor, dict[str, Tensor]]:
    """A depth, the network as loaded from its files, an image, and OpenCV's blobs."""
    depth = request.param
    files = caffe_files.write(tmp_path_factory.mktemp("caffe"), caffe_files.resnet(depth))
    net = caffe.load(*files)
    x = caffe_files.image(1, 3, 224, 224)
    blobs = ("conv1", "pool1", "res2a_branch2b", *INNER, *MIDDLE[depth], "pool5", "fc1000", "prob")
    return depth, net, x, opencv(files, net, {"data": x}, blobs)


def test_resnet_layer_by_layer(published: tuple[int, caffe.Net, Tensor, dict[str, Tensor]]) -> None:
    _, net, x, theirs = published
    with torch.no_grad():
        ours = net.blobs(x, theirs)
    for name, blob in ours.items():
        assert_close(blob, theirs[name], name)


def test_resnet_optimized(published: tuple[int, caffe.Net, Tensor, dict[str, Tensor]]) -> None:
    depth, net, x, theirs = published
    names = (*INNER, *MIDDLE[depth], "fc1000")
    watched = rf.optimize(net.features([*names, "prob"]), example_inputs=x)
    ours = watched(x)
    for name in names:
        assert_close(ours[name], theirs[name], name)
    assert_close(ours["prob"], theirs["prob"], "prob")
    assert [row.name for row in watched.report().not_fused] == ["prob"]
    ops = {row.fused for row in watched.report().fused}
    assert len([op for op in ops if op.startswith(("conv_bn_act ", "stem "))]) == {50: 53, 101: 104, 152: 155}[depth]
    assert {"stem conv1", "head pool5"} <= ops


@pytest.mark.parametrize("name", ["conv1", "pool1", "res2a_branch2b"])
def test_resnet_optimized_up_to_a_blob(published: tuple[int, caffe.Net, Tensor, dict[str, Tensor]], name: str) -> None:
    _, net, x, theirs = published
    part = rf.optimize(net.features([name]), example_inputs=x)
    assert_close(part(x), theirs[name], name)


def test_other_sizes_and_batches(tmp_path: Path) -> None:
    """The first stages of ResNet-50: at odd sizes the unpadded pool's last windows are cut."""
    whole = caffe.parse_prototxt(caffe.deploy_prototxt(50))
    end = [layer.name for layer in whole.layers].index("res3a_relu") + 1
    net = caffe_files.network(d.Definition("stages", whole.inputs, whole.layers[:end]))
    files, fast = caffe_files.write(tmp_path, net), rf.optimize(net)
    for shape in ((1, 3, 61, 45), (3, 3, 64, 96), (2, 3, 35, 131)):
        x = caffe_files.image(*shape)
        theirs = opencv(files, net, {"data": x}, ["conv1", "pool1", "res2c", "res3a"])
        with torch.no_grad():
            ours = net.blobs(x, theirs)
            for name in theirs:
                assert_close(ours[name], theirs[name], f"{name} at {shape}")
            assert_close(fast(x), theirs["res3a"], f"optimized at {shape}")


# ------------------------------------------------------------------------------------------------------ small networks

CONSTANT = ("one", "nine")
"""Blobs with one number everywhere, which say little."""

UNLIKE_CAFFE = {
    "scale from the back": "OpenCV refuses a negative axis of Scale",
    "scale by one number": "OpenCV refuses a parameter without axes",
    "scale by a line": "OpenCV has no blobs of one axis, it makes a column of the second bottom",
    "transposed": "OpenCV does not read `transpose`",
    "squeeze and excitation": "OpenCV takes Axpy for a batch of one alone, and scales the third bottom, not the second",
    "axpy of columns": "the same",
    "prelu of one slope": "OpenCV refuses a parameter without axes",
    "response of all channels": "OpenCV does not read `k`",
    "deconvolution with holes": "OpenCV does not read a Deconvolution's `dilation`",
    "shape of an image": "OpenCV refuses a negative axis of Reshape",
    "shape to the end": "OpenCV refuses a negative axis of Reshape",
}
"""Networks that OpenCV does not run as Caffe does; test_layers.py has them too."""


@pytest.mark.parametrize("name", [name for name in caffe_files.GRAPHS if name not in UNLIKE_CAFFE])
def test_small_networks(name: str, tmp_path: Path) -> None:
    net = caffe_files.network(caffe_files.GRAPHS[name])
    files, inputs = caffe_files.write(tmp_path, net), caffe_files.feeds(net)
    blobs = [blob for blob in net.blob_names if blob not in inputs and blob not in CONSTANT]
    theirs = opencv(files, net, inputs, blobs)
    loaded = caffe.load(*files)
    ours = loaded.blobs(inputs, blobs)
    for blob in blobs:
        assert_close(ours[blob], theirs[blob], blob)
    outputs = net.definition.outputs
    if len(inputs) == 1 and len(outputs) == 1:
        assert_close(rf.optimize(loaded)(inputs["data"]), theirs[outputs[0]], "optimized")


@pytest.mark.parametrize("name", UNLIKE_CAFFE)
def test_where_opencv_does_not_follow_caffe(name: str, tmp_path: Path) -> None:
    """If OpenCV learns it, the network belongs to those above."""
    net = caffe_files.network(caffe_files.GRAPHS[name])
    files, inputs = caffe_files.write(tmp_path, net), caffe_files.feeds(net)
    try:
        theirs = opencv(files, net, inputs, net.definition.outputs)
    except cv2.error:
        return
    ours = net.blobs(inputs, theirs)
    assert any(theirs[name].shape != ours[name].shape or not torch.allclose(theirs[name], ours[name]) for name in ours)


def test_axpy_with_its_bottoms_exchanged(tmp_path: Path) -> None:
    """What OpenCV takes for Axpy is Caffe's layer with the second and the third bottom in each other's place."""
    net = caffe_files.network(caffe_files.GRAPHS["squeeze and excitation"])
    inputs = caffe_files.feeds(net, batch=1)
    prototxt, caffemodel = caffe_files.write(tmp_path, net)
    text = Path(prototxt).read_text()
    swapped = text.replace('bottom: "a"\n  bottom: "data"', 'bottom: "data"\n  bottom: "a"')
    assert swapped != text
    (tmp_path / "swapped.prototxt").write_text(swapped)
    theirs = opencv((str(tmp_path / "swapped.prototxt"), caffemodel), net, inputs, ["up", "sum"])
    ours = net.blobs(inputs, theirs)
    for blob in theirs:
        assert_close(ours[blob], theirs[blob], blob)


def test_a_factor_of_zero_and_one_in_a_large_batch(tmp_path: Path) -> None:
    net = caffe_files.network(caffe_files.GRAPHS["norm first"])
    x = caffe_files.image(5, 6, 9, 4)
    for number, factor in enumerate((0.0, 1.0)):
        net.layer("norm").factor.fill_(factor)
        files = caffe_files.write(tmp_path, net, f"net{number}")
        ours, theirs = net.blobs(x, ["norm", "a"]), opencv(files, net, {"data": x}, ["norm", "a"])
        for blob in ours:
            assert_close(ours[blob], theirs[blob], f"{blob}, factor {factor}")


# ------------------------------------------------------------------------------------------------------------- pooling


@given(windows())
@settings(max_examples=200, deadline=None)
def test_pooling(case: tuple[d.Pooling, tuple[int, int]]) -> None:
    """All windows but those of :func:`opencv_differs`."""
    p, size = case
    assume(opencv_differs(p, size) == "")
    x = caffe_files.image(2, 3, *size)
    net = caffe.Net(caffe_files.definition({"data": tuple(x.shape)}, ("pool", p, "data"))).eval()
    ours, theirs = net(x), opencv_pool(p, x)
    assert ours.shape == theirs.shape
    # One rounding per element of a window, of numbers that are below 6.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("p", "size", "difference"),
    [
        (d.Pooling("MAX", (1, 1), (2, 2)), (4, 4), "a window beyond the image is 0"),
        (d.Pooling("MAX", (2, 2), (3, 3), (0, 1)), (6, 9), "drops windows by each side's own padding"),
        (d.Pooling("AVE", (4, 3), (2, 4), (3, 0)), (2, 12), "drops windows by each side's own padding"),
        (d.Pooling("MAX", (6, 6), (3, 4)), (13, 4), "no window larger than image and padding"),
        (d.Pooling("AVE", (4, 7), (2, 4), (1, 0)), (1, 4), "no window larger than image and padding"),
    ],
)
def test_where_opencv_pools_otherwise(p: d.Pooling, size: tuple[int, int], difference: str) -> None:
    """That :func:`opencv_differs` is right, and excludes no window in vain."""
    assert opencv_differs(p, size) == difference
    x = caffe_files.image(2, 3, *size)
    ours = caffe.Net(caffe_files.definition({"data": tuple(x.shape)}, ("pool", p, "data")))(x)
    assert np.array_equal(ours.numpy(), caffe_files.pooled(p, x.numpy())) or p.method == "AVE"
    try:
        theirs = opencv_pool(p, x)
    except cv2.error:
        assert difference == "no window larger than image and padding"
        return
    if difference == "a window beyond the image is 0":
        assert theirs.shape == ours.shape
        beyond = ours == torch.finfo(ours.dtype).min
        assert beyond.any() and (theirs[beyond] == 0).all() and torch.equal(theirs[~beyond], ours[~beyond])
    else:
        assert theirs.shape[2] > ours.shape[2] or theirs.shape[3] > ours.shape[3]


def opencv_differs(p: d.Pooling, size: tuple[int, int]) -> str:
    """How OpenCV pools otherwise than Caffe; empty if it does not.

    - Where there are gaps between windows (stride above kernel) and no padding, the last window may lie wholly beyond
      the image. A maximum begins at the lowest number in Caffe, and at 0 in OpenCV.
    - Caffe drops a last window that begins beyond image and padding if there is padding on any side, OpenCV if there is
      some on that side.
    - Caffe rounds up the number of windows even when one is larger than image and padding; OpenCV refuses that.
    """
    if p.kernel is None:
        return ""
    sides = list(zip(size, p.kernel, p.stride, p.padding, strict=True))
    if any(kernel > length + 2 * pad for length, kernel, _, pad in sides):
        return "no window larger than image and padding"
    for length, kernel, stride, pad in sides:
        steps = length + 2 * pad - kernel
        last = -(-steps // stride) * stride if p.round_mode == "CEIL" else steps // stride * stride
        if pad == 0 and last >= length:
            if any(p.padding):
                return "drops windows by each side's own padding"
            if p.method == "MAX":
                return "a window beyond the image is 0"
    return ""


def opencv_pool(p: d.Pooling, x: Tensor) -> Tensor:
    """One pooling layer. OpenCV's own name of ``round_mode: FLOOR`` is ``ceil_mode: false``."""
    text = caffe.emit_prototxt(caffe_files.definition({"data": tuple(x.shape)}, ("pool", p, "data")))
    theirs = cv2.dnn.readNetFromCaffe(
        np.frombuffer(text.replace("round_mode: FLOOR", "ceil_mode: false").encode(), np.uint8)
    )
    theirs.setInput(x.numpy())
    return torch.from_numpy(np.array(theirs.forward()))
