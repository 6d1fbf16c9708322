"""The fused ops, one file each: ``ops.<op>`` is the public function, ``torch.ops.resnet_fast.<op>`` the torch op."""

from .add_act import add_act
from .batch_norm_act import batch_norm_act
from .bottleneck_tail import bottleneck_tail
from .conv_bn_act import conv_bn_act
from .head import head
from .stem import stem

__all__ = ["add_act", "batch_norm_act", "bottleneck_tail", "conv_bn_act", "head", "stem"]
