"""Triton kernels, one file per fused op, and the choice of launches, CUDA's too; nothing but triton is imported.

``problems``, ``cuda_choice``, ``gpus`` and the tables need no triton.

The files lie in kernels/ at the top of a checkout and are imported from there; a wheel has them in this folder.
kernels/ itself has no ``__init__.py``, so that an installed package called ``kernels`` is found before it.
"""

from pathlib import Path

_HERE = Path(__file__).parent
if not (_HERE / "problems.py").is_file():
    __path__.append(str(_HERE.resolve().parents[1] / "kernels"))
