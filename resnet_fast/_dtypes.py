"""The names of precisions: how is multiplied, and the dtype that is stored."""

from __future__ import annotations

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
STORED = {**DTYPES, "int8": torch.int8}
"""With int8, in which only quantized convolutions compute."""
ITEMSIZE = {precision: dtype.itemsize for precision, dtype in STORED.items()}
"""Bytes of one stored value."""
