"""The fused ops, one file each: ``ops.<op>`` is the public function, ``torch.ops.resnet_fast.<op>`` the torch op.

``ALL`` has the declarations of the ops that a network for inference is made of, by name.
"""

from typing import Any

from ._op import Op
from .add_act import OP as _ADD_ACT
from .add_act import add_act
from .batch_norm_act import batch_norm_act
from .bottleneck_tail import OP as _BOTTLENECK_TAIL
from .bottleneck_tail import bottleneck_tail
from .conv_bn_act import OP as _CONV_BN_ACT
from .conv_bn_act import conv_bn_act
from .head import OP as _HEAD
from .head import head
from .stem import OP as _STEM
from .stem import stem

ALL: dict[str, Op[Any]] = {op.name: op for op in (_CONV_BN_ACT, _STEM, _HEAD, _ADD_ACT, _BOTTLENECK_TAIL)}

__all__ = ["ALL", "Op", "add_act", "batch_norm_act", "bottleneck_tail", "conv_bn_act", "head", "stem"]
