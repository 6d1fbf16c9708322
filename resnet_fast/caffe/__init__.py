"""Caffe networks as PyTorch modules: prototxt and caffemodel in and out, with Caffe's arithmetic. No kernel is here.

    net = resnet_fast.caffe.load("deploy.prototxt", "weights.caffemodel")
    net.blobs(x, ["res2a", "pool5"])
    fast = resnet_fast.optimize(net)

Caffe itself is not needed. docs/caffe.md is for someone who has a Caffe pipeline today.
"""

from . import fusing as _fusing  # noqa: F401 - tells optimize about these layers
from .caffemodel import read_mean, write_mean
from .definition import Definition, Input, Layer, Transform
from .errors import CaffeError
from .files import load, save
from .net import Net
from .preprocessing import Preprocessing
from .prototxt import emit as emit_prototxt
from .prototxt import parse as parse_prototxt
from .prototxt import read as read_prototxt
from .resnet import deploy_prototxt, from_state_dict, to_resnet, to_state_dict

__all__ = [
    "CaffeError",
    "Definition",
    "Input",
    "Layer",
    "Net",
    "Preprocessing",
    "Transform",
    "deploy_prototxt",
    "emit_prototxt",
    "from_state_dict",
    "load",
    "parse_prototxt",
    "read_mean",
    "read_prototxt",
    "save",
    "to_resnet",
    "to_state_dict",
    "write_mean",
]
