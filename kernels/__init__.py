"""Triton kernels, one file per fused op; they import nothing but triton and each other.

This folder is installed as `resnet_fast.kernels` and must never be imported as a top-level package `kernels`.
"""

if __name__ != "resnet_fast.kernels":
    raise ImportError(
        f"this folder is the package resnet_fast.kernels, but it was imported as {__name__!r}: "
        "run `pip install -e .` in the checkout and import resnet_fast.kernels"
    )
