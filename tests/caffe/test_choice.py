"""Which part of a prototxt is read: phase, level and stages, the last layer, the wanted blobs, and the inputs."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import resnet_fast as rf
from resnet_fast import caffe
from resnet_fast.caffe import definition as d
from tests.caffe import files as caffe_files

DETECTOR = """
name: "detector"
input: "data" input_shape { dim: 1 dim: 3 dim: 8 dim: 8 }
input: "im_info" input_shape { dim: 1 dim: 3 }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
        convolution_param { num_output: 4 kernel_size: 3 } }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "side" type: "Convolution" bottom: "data" top: "side"
        convolution_param { num_output: 2 kernel_size: 1 } }
layer { name: "conv2" type: "Convolution" bottom: "conv1" top: "conv2"
        convolution_param { num_output: 5 kernel_size: 3 } }
layer { name: "proposal" type: "Python" bottom: "conv2" bottom: "im_info" top: "rois" python_param { layer: "P" } }
layer { name: "roi_pool" type: "ROIPooling" bottom: "conv2" bottom: "rois" top: "pool" }
layer { name: "score" type: "InnerProduct" bottom: "pool" top: "score" inner_product_param { num_output: 2 } }
layer { name: "odd" type: "Convolution" bottom: "conv2" top: "odd" convolution_param { num_output: 0 magic: 3 } }
"""


def names(definition: d.Definition) -> list[str]:
    return [layer.name for layer in definition.layers]


# ------------------------------------------------------------------------------------------------------ phase and stage


def test_unknown_layers_are_refused_by_name() -> None:
    with pytest.raises(
        caffe.CaffeError, match=r"layer 'proposal' \(Python, line 12\): layers of type 'Python' are not"
    ):
        caffe.parse_prototxt(DETECTOR)


#: Rules, and whether Caffe's Net::StateMeetsRule takes the layer at level 2 and stages a and b.
RULES = {
    "include { stage: 'a' }": True,
    "include { stage: 'a' stage: 'b' }": True,
    "include { stage: 'a' stage: 'c' }": False,
    "include { stage: 'c' } include { stage: 'b' }": True,
    "include { not_stage: 'c' }": True,
    "include { not_stage: 'c' not_stage: 'a' }": False,
    "include { stage: 'a' not_stage: 'b' }": False,
    "exclude { stage: 'a' }": False,
    "exclude { stage: 'c' }": True,
    "exclude { stage: 'a' stage: 'c' }": True,
    "exclude { not_stage: 'c' }": False,
    "include { min_level: 2 }": True,
    "include { min_level: 3 }": False,
    "include { max_level: 2 }": True,
    "include { min_level: -1 max_level: 1 }": False,
    "exclude { min_level: 1 max_level: 3 stage: 'b' }": False,
    "include { phase: TRAIN stage: 'a' }": False,
    "include { phase: TEST min_level: 2 stage: 'b' not_stage: 'x' }": True,
}


@pytest.mark.parametrize("given", ["arguments", "file", "both"])
def test_levels_and_stages(given: str, tmp_path: Path) -> None:
    text = 'input: "data" input_shape { dim: 1 dim: 1 dim: 1 dim: 1 }\n' + "".join(
        f'layer {{ name: "r{i}" type: "ReLU" bottom: "data" top: "r{i}" {rule} }}\n' for i, rule in enumerate(RULES)
    )
    state = {
        "arguments": "",
        "file": "state { level: 2 stage: 'a' stage: 'b' }",
        "both": "state { level: 7 stage: 'a' }",
    }
    (tmp_path / "n.prototxt").write_text(state[given] + text)
    choice: dict[str, Any] = {"arguments": {"level": 2, "stages": ["a", "b"]}, "file": {}}.get(
        given, {"level": 2, "stages": ["b"]}
    )
    net = caffe.load(tmp_path / "n.prototxt", **choice)
    assert names(net.definition) == [f"r{i}" for i, taken in enumerate(RULES.values()) if taken]


def test_a_stage_chooses_what_would_be_refused(tmp_path: Path) -> None:
    """One file for training, validation and deployment."""
    path = tmp_path / "all.prototxt"
    path.write_text("""
layer { name: "train" type: "Data" top: "data" top: "label" include { stage: "train" } }
layer { name: "in" type: "Input" top: "data" include { stage: "deploy" }
        input_param { shape { dim: 2 dim: 3 dim: 4 dim: 4 } } }
layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc" inner_product_param { num_output: 5 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" exclude { stage: "deploy" } }
layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" include { stage: "deploy" } }
""")
    assert names(caffe.load(path, stages=["deploy"]).definition) == ["fc", "prob"]
    with pytest.raises(caffe.CaffeError, match="losses and accuracies"):
        caffe.load(path)


# ------------------------------------------------------------------------------------------------------ upto, features


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The detector, and weights for its convolutions and for layers that are never read."""
    folder = tmp_path_factory.mktemp("detector")
    (folder / "net.prototxt").write_text(DETECTOR)
    net = caffe_files.randomize(caffe.Net(caffe.parse_prototxt(DETECTOR, upto="conv2")))
    stored = [(name, "Convolution", list(net.layer(name).parameters())) for name in ("conv1", "side", "conv2")]
    stored.append(("score", "InnerProduct", [torch.ones(2, 9), torch.ones(2)]))
    caffe_files.write_layers(folder / "net.caffemodel", stored)
    return folder / "net.prototxt", folder / "net.caffemodel"


@pytest.mark.parametrize(
    ("choice", "layers", "outputs"),
    [
        ({"upto": "conv2"}, ["conv1", "relu1", "side", "conv2"], ("side", "conv2")),
        ({"upto": "relu1"}, ["conv1", "relu1"], ("conv1",)),
        ({"upto": "conv1"}, ["conv1"], ("conv1",)),  # the layer of this name, not the last that writes the blob
        ({"upto": "side"}, ["conv1", "relu1", "side"], ("conv1", "side")),
        ({"features": ["conv2"]}, ["conv1", "relu1", "conv2"], ("conv2",)),
        ({"features": ["conv1"]}, ["conv1", "relu1"], ("conv1",)),  # as it is at the end
        ({"features": ["side"]}, ["side"], ("side",)),
        ({"features": ["conv2", "side", "conv1"]}, ["conv1", "relu1", "side", "conv2"], ("conv2", "side", "conv1")),
        ({"features": ["conv1"], "upto": "conv1"}, ["conv1"], ("conv1",)),
        ({"features": ["score"], "inputs": {"pool": (2, 9)}}, ["score"], ("score",)),
        ({"upto": "conv2", "inputs": {"data": (2, 3, 20, 30)}}, ["conv1", "relu1", "side", "conv2"], ("side", "conv2")),
        ({"features": ["conv2"], "inputs": {"conv1": (1, 4, 7, 7)}}, ["relu1", "conv2"], ("conv2",)),
    ],
    ids=str,
)
def test_a_part_of_a_file(
    choice: dict[str, Any], layers: list[str], outputs: tuple[str, ...], files: tuple[Path, Path]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # weights of layers that were left out are no surprise
        net = caffe.load(*files, **choice)
    assert names(net.definition) == layers
    inputs = caffe_files.feeds(net)
    assert len(inputs) == 1
    found = net(inputs)
    blobs = found if isinstance(found, dict) else dict(zip(outputs, [found], strict=True))
    assert tuple(blobs) == outputs
    exact = caffe_files.reference(net, inputs)
    for name, blob in blobs.items():
        torch.testing.assert_close(blob.double(), torch.from_numpy(exact[name]), rtol=1e-5, atol=1e-5)
    if len(outputs) == 1:
        (x,) = inputs.values()
        torch.testing.assert_close(rf.optimize(net)(x), found, rtol=1e-5, atol=1e-5)


def test_left_out_layers_are_those_of_the_file(files: tuple[Path, Path]) -> None:
    """Weights that neither the part nor the rest of the file knows are still told of, and missing ones refused."""
    prototxt, caffemodel = files
    other = prototxt.with_name("other.prototxt")
    other.write_text(re.sub(r'layer { name: "score".*\n', "", DETECTOR))
    with pytest.warns(UserWarning, match="layers that the prototxt does not have: score"):
        caffe.load(other, caffemodel, features=["conv2"])
    other.write_text(DETECTOR.replace('name: "side"', 'name: "aside"'))
    with pytest.raises(caffe.CaffeError, match="holds no weights for 1 of the layers"):
        caffe.load(other, caffemodel, upto="conv2")


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({"upto": "proposal"}, caffe.CaffeError, r"layer 'proposal' \(Python, line 12\)"),
        ({"features": ["rois"]}, caffe.CaffeError, r"layer 'proposal' \(Python, line 12\)"),
        ({"features": ["score"]}, caffe.CaffeError, r"layer 'proposal' \(Python, line 12\)"),
        ({"features": ["odd"]}, caffe.CaffeError, "unknown field 'convolution_param.magic'"),
        (
            {"features": ["conv3"]},
            caffe.CaffeError,
            "features has 'conv3', which is no blob of the network; it has conv",
        ),
        ({"upto": "conv3"}, caffe.CaffeError, "upto is 'conv3', which is no layer or blob of the network; it has conv"),
        ({"inputs": {"conv3": (1,)}}, caffe.CaffeError, "inputs has 'conv3', which is no blob of the network; it has"),
        ({"features": ["data"]}, caffe.CaffeError, "no layers"),
        ({"features": []}, ValueError, "features is empty"),
        ({"features": "conv1"}, TypeError, "features is 'conv1'; a list of names was expected"),
        ({"features": [1]}, TypeError, "a list of names was expected"),
        ({"stages": "deploy"}, TypeError, "stages is 'deploy'; a list of names was expected"),
        ({"level": "1"}, TypeError, "level is '1'; an integer was expected"),
        ({"upto": ["conv1"]}, TypeError, "the name of one layer or blob was expected"),
        ({"phase": "test"}, ValueError, "phase is 'test'; it must be 'TEST' or 'TRAIN'"),
        ({"inputs": [("data", (1,))]}, TypeError, "inputs is a list; a dict of shapes by name was expected"),
        ({"inputs": {"data": "1,3,8,8"}}, TypeError, "is no shape; a tuple of integers was expected"),
        ({"inputs": {"data": (1, 3, 0, 8)}}, caffe.CaffeError, "shape 1x3x0x8; 1 to 32 sizes of at least 1"),
        ({"inputs": {"data": (1, 3, 2**40, 8)}}, caffe.CaffeError, "is too large"),
        ({"inputs": {"data": (1,) * 40}}, caffe.CaffeError, "1 to 32 sizes"),
        ({"upto": "conv2", "inputs": {"data": (1, 3, 2, 2)}}, caffe.CaffeError, "its kernel 3x3 does not fit into 2x2"),
    ],
    ids=str,
)
def test_choices_that_are_none(
    choice: dict[str, Any], error: type[Exception], message: str, files: tuple[Path, Path]
) -> None:
    with pytest.raises(error, match=message) as found:
        caffe.load(files[0], **choice)
    assert "\n" not in str(found.value)


# --------------------------------------------------------------------------------------------------------- data layers

LAST = '\nlayer { name: "p" type: "Pooling" bottom: "data" top: "p" pooling_param { pool: AVE global_pooling: true } }'
SOURCE = 'source: "list" batch_size: 4'
DATA = {
    'layer { name: "d" type: "MemoryData" top: "data" top: "label" memory_data_param { batch_size: 2 channels: 3 '
    "height: 8 width: 6 } }": (2, 3, 8, 6),
    'layers { name: "d" type: MEMORY_DATA top: "data" top: "label" memory_data_param { batch_size: 2 channels: 1 '
    "height: 8 width: 6 } }": (2, 1, 8, 6),
    f'layer {{ name: "d" type: "ImageData" top: "data" top: "label" image_data_param {{ {SOURCE} new_height: 9 '
    "new_width: 7 } }": (4, 3, 9, 7),
    f'layer {{ name: "d" type: "ImageData" top: "data" top: "label" image_data_param {{ {SOURCE} new_height: 9 '
    "new_width: 7 is_color: false } transform_param { crop_size: 5 mirror: true } }": (4, 1, 5, 5),
    'layer { name: "d" type: "ImageData" top: "data" image_data_param { source: "list" crop_size: 6 } }': (1, 3, 6, 6),
    f'layer {{ name: "d" type: "Data" top: "data" top: "label" data_param {{ {SOURCE} backend: LMDB }} '
    "transform_param { crop_size: 5 mean_value: 104 mean_value: 117 mean_value: 123 } }": (4, 3, 5, 5),
    f'layer {{ name: "d" type: "Data" top: "data" data_param {{ {SOURCE} }} '
    "transform_param { crop_size: 5 force_gray: true } }": (4, 1, 5, 5),
    f'layer {{ name: "d" type: "Data" top: "data" data_param {{ {SOURCE} force_encoded_color: true crop_size: 5 }} '
    "transform_param { mean_value: 100 } }": (4, 3, 5, 5),
}


@pytest.mark.parametrize("text", DATA)
def test_data_layers_stand_for_inputs(text: str) -> None:
    """With the shapes that Caffe's layers give their tops; labels that nothing reads need not be given."""
    last = LAST.replace("layer", "layers", 1).replace('"Pooling"', "POOLING") if text.startswith("layers") else LAST
    net = caffe.Net(caffe.parse_prototxt(text + last)).eval()
    assert net.definition.inputs == (d.Input("data", DATA[text]),)
    x = caffe_files.image(*DATA[text])
    torch.testing.assert_close(net(x), x.mean((2, 3), keepdim=True))
    assert caffe.parse_prototxt(caffe.emit_prototxt(net.definition)) == net.definition


def test_labels_that_are_read_are_an_input() -> None:
    text = next(iter(DATA)) + 'layer { name: "r" type: "ReLU" bottom: "label" top: "r" }'
    assert caffe.parse_prototxt(text).inputs == (d.Input("data", (2, 3, 8, 6)), d.Input("label", (2,)))


@pytest.mark.parametrize("kind", ["Data", "HDF5Data", "WindowData", "DummyData", "DenseImageData", "Python"])
def test_inputs_in_place_of_any_layer(kind: str) -> None:
    text = f'layer {{ name: "d" type: "{kind}" top: "data" top: "label" some_param {{ x: 1 }} }}' + LAST
    with pytest.raises(caffe.CaffeError, match=rf"layer 'd' \({kind}, line 1\)"):
        caffe.parse_prototxt(text)
    found = caffe.parse_prototxt(text, inputs={"data": (1, 3, 8, 8)})
    assert found.inputs == (d.Input("data", (1, 3, 8, 8)),)


def test_the_transform_of_a_data_layer() -> None:
    texts = list(DATA)
    assert caffe.parse_prototxt(texts[0] + LAST).inputs[0].transform is None
    found = caffe.parse_prototxt(texts[5] + LAST).inputs[0].transform
    assert found == d.Transform(1.0, (104.0, 117.0, 123.0), "")
    text = texts[0].replace("} }", "} transform_param { scale: 0.5 mean_file: 'm.binaryproto' } }")
    assert caffe.parse_prototxt(text + LAST).inputs[0].transform == d.Transform(0.5, (), "m.binaryproto")
