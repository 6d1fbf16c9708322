"""For every op a module with ``cases()``: small problems that together reach every line of its kernels."""
