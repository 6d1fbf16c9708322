"""Triton kernels, one file per fused op, and the choice of launches, CUDA's too; nothing but triton is imported.

``problems``, ``cuda_choice``, ``gpus`` and the tables need no triton.

This folder is installed as `resnet_fast.kernels` and must never be imported as a top-level package `kernels`.
"""

if __name__ != "resnet_fast.kernels":
    raise ImportError(
        f"this folder is the package resnet_fast.kernels, but it was imported as {__name__!r}: "
        "run `pip install -e .` in the checkout and import resnet_fast.kernels"
    )
