"""The messages of Caffe's public format that this package reads and writes, as protobuf classes; parses nothing.

Names and field numbers are those of ``caffe.proto`` (BVLC/caffe, src/caffe/proto); fields that only training needs are
declared so that a file may hold them, and are ignored. The classes live in a descriptor pool of their own, so that they
do not clash with another ``caffe.proto`` in the same process. protobuf is imported when they are first asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from . import kinds as _declared  # noqa: F401 - which fill KINDS
from .errors import CaffeError
from .parameters import KINDS, Message

#: V1LayerParameter.LayerType: a type's number and name there, and its name since Caffe's V2 format.
_V1_TYPES = (
    (0, "NONE", ""), (1, "ACCURACY", "Accuracy"), (2, "BNLL", "BNLL"), (3, "CONCAT", "Concat"),
    (4, "CONVOLUTION", "Convolution"), (5, "DATA", "Data"), (6, "DROPOUT", "Dropout"),
    (7, "EUCLIDEAN_LOSS", "EuclideanLoss"), (8, "FLATTEN", "Flatten"), (9, "HDF5_DATA", "HDF5Data"),
    (10, "HDF5_OUTPUT", "HDF5Output"), (11, "IM2COL", "Im2col"), (12, "IMAGE_DATA", "ImageData"),
    (13, "INFOGAIN_LOSS", "InfogainLoss"), (14, "INNER_PRODUCT", "InnerProduct"), (15, "LRN", "LRN"),
    (16, "MULTINOMIAL_LOGISTIC_LOSS", "MultinomialLogisticLoss"), (17, "POOLING", "Pooling"), (18, "RELU", "ReLU"),
    (19, "SIGMOID", "Sigmoid"), (20, "SOFTMAX", "Softmax"), (21, "SOFTMAX_LOSS", "SoftmaxWithLoss"),
    (22, "SPLIT", "Split"), (23, "TANH", "TanH"), (24, "WINDOW_DATA", "WindowData"), (25, "ELTWISE", "Eltwise"),
    (26, "POWER", "Power"), (27, "SIGMOID_CROSS_ENTROPY_LOSS", "SigmoidCrossEntropyLoss"),
    (28, "HINGE_LOSS", "HingeLoss"), (29, "MEMORY_DATA", "MemoryData"), (30, "ARGMAX", "ArgMax"),
    (31, "THRESHOLD", "Threshold"), (32, "DUMMY_DATA", "DummyData"), (33, "SLICE", "Slice"), (34, "MVN", "MVN"),
    (35, "ABSVAL", "AbsVal"), (36, "SILENCE", "Silence"), (37, "CONTRASTIVE_LOSS", "ContrastiveLoss"),
    (38, "EXP", "Exp"), (39, "DECONVOLUTION", "Deconvolution"),
)  # fmt: skip

#: Layer type numbers of V1LayerParameter, as the names that Caffe's V2 format has for them.
V1_TYPE_NUMBERS = {number: name for number, _, name in _V1_TYPES}

_ENUMS: dict[str, dict[str, int]] = {
    "Phase": {"TRAIN": 0, "TEST": 1},
    "EltwiseOp": {"PROD": 0, "SUM": 1, "MAX": 2},
    "PoolMethod": {"MAX": 0, "AVE": 1, "STOCHASTIC": 2},
    "RoundMode": {"CEIL": 0, "FLOOR": 1},
    "VarianceNorm": {"FAN_IN": 0, "FAN_OUT": 1, "AVERAGE": 2},
    "DimCheckMode": {"STRICT": 0, "PERMISSIVE": 1},
    "Engine": {"DEFAULT": 0, "CAFFE": 1, "CUDNN": 2},
    "NormRegion": {"ACROSS_CHANNELS": 0, "WITHIN_CHANNEL": 1},
    "DB": {"LEVELDB": 0, "LMDB": 1},
    "LayerType": {name: number for number, name, _ in _V1_TYPES},
}

_SCALARS = ("bool", "float", "double", "int32", "int64", "uint32", "string")

#: Data layers, whose tops are inputs here, and what they and Input have; the other layers' are in `kinds`.
_DATA = (
    Message("input_param", "InputParameter", 143, None, "shape 1 BlobShape*"),
    Message(
        "transform_param", "TransformationParameter", 100, 36,
        "scale 1 float 1; mirror 2 bool false; crop_size 3 uint32 0; mean_file 4 string; mean_value 5 float*;"
        "force_color 6 bool false; force_gray 7 bool false",
    ),
    Message(
        "memory_data_param", "MemoryDataParameter", 119, 22,
        "batch_size 1 uint32; channels 2 uint32; height 3 uint32; width 4 uint32",
    ),
    Message(
        "image_data_param", "ImageDataParameter", 115, 15,
        "source 1 string; scale 2 float 1; mean_file 3 string; batch_size 4 uint32 1; crop_size 5 uint32 0;"
        "mirror 6 bool false; rand_skip 7 uint32 0; shuffle 8 bool false; new_height 9 uint32 0; new_width 10 uint32 0;"
        "is_color 11 bool true; root_folder 12 string",
    ),
    Message(
        "data_param", "DataParameter", 107, 11,
        "source 1 string; scale 2 float 1; mean_file 3 string; batch_size 4 uint32; crop_size 5 uint32 0;"
        "mirror 6 bool false; rand_skip 7 uint32 0; backend 8 DB LEVELDB; force_encoded_color 9 bool false;"
        "prefetch 10 uint32 4; threads 11 uint32 0",
    ),
    Message(
        "hdf5_data_param", "HDF5DataParameter", 112, 13, "source 1 string; batch_size 2 uint32; shuffle 3 bool false"
    ),
    Message(
        "dummy_data_param", "DummyDataParameter", 109, 26,
        "data_filler 1 FillerParameter*; num 2 uint32*; channels 3 uint32*; height 4 uint32*; width 5 uint32*;"
        "shape 6 BlobShape*",
    ),
)  # fmt: skip

#: The fields with layers' own parameters.
LAYER_PARAMETERS = {m.field: m for m in (*_DATA, *(k.message for k in KINDS.values() if k.message is not None))}
#: Per message its fields as "name number kind [default]"; * is repeated, + repeated and packed.
_MESSAGES: dict[str, str] = {
    "BlobShape": "dim 1 int64+",
    "FillerParameter": """
        type 1 string constant; value 2 float 0; min 3 float 0; max 4 float 1; mean 5 float 0; std 6 float 1;
        sparse 7 int32 -1; variance_norm 8 VarianceNorm FAN_IN
    """,
    "NetState": "phase 1 Phase TEST; level 2 int32 0; stage 3 string*",
    "NetStateRule": "phase 1 Phase; min_level 2 int32; max_level 3 int32; stage 4 string*; not_stage 5 string*",
    "ParamSpec": "name 1 string; share_mode 2 DimCheckMode; lr_mult 3 float 1; decay_mult 4 float 1",
    "LayerParameter": """
        name 1 string; type 2 string; bottom 3 string*; top 4 string*; loss_weight 5 float*; param 6 ParamSpec*;
        include 8 NetStateRule*; exclude 9 NetStateRule*; phase 10 Phase; propagate_down 11 bool*
    """,
    "V1LayerParameter": """
        bottom 2 string*; top 3 string*; name 4 string; type 5 LayerType; blobs_lr 7 float*; weight_decay 8 float*;
        include 32 NetStateRule*; exclude 33 NetStateRule*; loss_weight 35 float*; param 1001 string*;
        blob_share_mode 1002 DimCheckMode*
    """,
    "NetParameter": """
        name 1 string; layers 2 V1LayerParameter*; input 3 string*; input_dim 4 int32*; force_backward 5 bool false;
        state 6 NetState; debug_info 7 bool false; input_shape 8 BlobShape*; layer 100 LayerParameter*
    """,
}


def build(messages: Mapping[str, str]) -> dict[str, Any]:
    """Return protobuf's classes by name of these messages, whose fields are written as above, in a pool of their own.

    Raises:
        CaffeError: if protobuf is not installed.
    """
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError as error:
        raise CaffeError(
            f"reading and writing prototxt needs the package protobuf: pip install protobuf ({error})"
        ) from error
    file = descriptor_pb2.FileDescriptorProto(name="resnet_fast/caffe.proto", package="caffe", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, description in messages.items():
        message = file.message_type.add(name=name)
        for entry in description.split(";"):
            field_name, number, kind, *default = entry.split()
            field = message.field.add(name=field_name, number=int(number))
            field.label = kinds.LABEL_REPEATED if kind[-1] in "*+" else kinds.LABEL_OPTIONAL
            if kind.endswith("+"):
                field.options.packed = True
            kind = kind.rstrip("*+")
            if kind in _SCALARS:
                field.type = getattr(kinds, f"TYPE_{kind.upper()}")
            elif kind in _ENUMS:  # inside the message, since names of values are unique only there
                field.type, field.type_name = kinds.TYPE_ENUM, f".caffe.{name}.{kind}"
                if all(enum.name != kind for enum in message.enum_type):
                    enum = message.enum_type.add(name=kind)
                    for value, value_number in _ENUMS[kind].items():
                        enum.value.add(name=value, number=value_number)
            else:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".caffe.{kind}"
            if default:
                field.default_value = default[0]
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}")) for name in messages}


@functools.cache
def _classes() -> dict[str, Any]:
    """Return the classes of all messages, with the layers' own parameters at their numbers in either version."""
    own = LAYER_PARAMETERS.values()
    found = {**_MESSAGES, **{m.name: m.fields for m in own}}
    found["LayerParameter"] += "".join(f"; {m.field} {m.number} {m.name}" for m in own)
    found["V1LayerParameter"] += "".join(f"; {m.field} {m.v1} {m.name}" for m in own if m.v1)
    return build({name: description.strip() for name, description in found.items()})


def message(name: str) -> Any:
    """Return a new, empty message of this name, such as ``NetParameter``."""
    return _classes()[name]()
