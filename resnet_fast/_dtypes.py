"""The names of precisions: how is multiplied, and the dtype that is stored."""

from __future__ import annotations

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
ITEMSIZE = {precision: dtype.itemsize for precision, dtype in DTYPES.items()}
"""Bytes of one stored value."""
