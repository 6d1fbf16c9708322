"""The names of precisions: how is multiplied, and the dtype that is stored."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
FLOAT8 = torch.float8_e4m3fn
LARGEST_FLOAT8 = 448
QUANTIZED = {"int8": torch.int8, "fp8": FLOAT8}
"""Those of quantized convolutions, by the dtype of their weights."""
STORED = {**DTYPES, **QUANTIZED}
ITEMSIZE = {precision: dtype.itemsize for precision, dtype in STORED.items()}
"""Bytes of one stored value."""


def narrowed(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return y in ``dtype``; what is beyond float8's range becomes its end; some versions of torch make NaN of it."""
    return (y.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8) if dtype is FLOAT8 else y).to(dtype)
