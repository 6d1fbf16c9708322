"""Pieces of kernels that several files use inside theirs."""

import triton
import triton.language as tl

#: Triton's interpreter (TRITON_INTERPRET=1) keeps bfloat16 as bits and would multiply those.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

#: Whether the interpreter rounds what is multiplied as tf32, as a GPU's kernels do. Tests set it.
_ROUNDS_TF32 = tl.constexpr(False)


@tl.core.extern
def _launched_early(_semantic=None):
    """Whether the kernel is compiled to be launched while the one before it still runs."""
    return tl.constexpr(bool(getattr(_semantic.builder.options, "launch_pdl", False)))


@triton.jit
def wait_for_earlier_kernels():
    """The first statement of every kernel: what earlier kernels write is there from now on, and they read no more.

    With programmatic dependent launch the blocks of a kernel start while the last blocks of the one before still run.
    That one has waited likewise, so all before it are over, too. From here on the next kernel may start, and wait.
    """
    if not _INTERPRETED and _launched_early():
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def relu(x):
    """max(x, 0) of a float32 tile; NaN stays NaN, which a plain maximum would turn into 0."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b with float32 accumulation; ``PRECISION`` ("tf32", "ieee") matters for float32 operands.

    Matrix units cut the bits off that tf32 has no room for, an error 2.6 times that of rounding and of one sign, and
    Triton hands them float32 as it is. So both operands are rounded here.
    """
    if _INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    if PRECISION == "tf32" and a.dtype == tl.float32:
        a = _nearest_tf32(a)
        b = _nearest_tf32(b)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def dot_float8(a, b, accumulator):
    """accumulator + a @ b of float8 (e4m3), whose sums are added in float32 after 128 products at most.

    Hopper's matrix units keep 13 bits of fraction of float8's sums, beside the largest of them. The sum is written out,
    since Triton forgets ``max_num_imprecise_acc`` of a product whose first operand comes through registers.
    """
    if _INTERPRETED:  # which takes NaN for 480
        return accumulator + tl.dot(real(a), real(b), input_precision="ieee")
    return accumulator + tl.dot(a, b, max_num_imprecise_acc=min(a.shape[1], 128))


@triton.jit
def real(x):
    """A tile in float32; the interpreter takes float8's NaN for 480."""
    if _INTERPRETED and x.dtype == tl.float8e4nv:
        bits = x.to(tl.uint8, bitcast=True).to(tl.int32)
        places = bits & 127
        small = places.to(tl.float32) * 0.001953125  # steps of 2 ** -9 below 2 ** -6
        normal = ((places << 20) + 0x3C000000).to(tl.float32, bitcast=True)
        size = tl.where(places < 8, small, tl.where(places == 127, float("nan"), normal))
        return tl.where(bits > 127, -size, size)
    return x.to(tl.float32)


@triton.jit
def _nearest_tf32(x):
    """float32 rounded to tf32's 10 bits of fraction, to nearest and ties away from 0, as cuBLAS and cuDNN round."""
    if _INTERPRETED:  # which runs no PTX
        if _ROUNDS_TF32:
            nearest = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
            return tl.where(x != x, x, nearest.to(tl.float32, bitcast=True))
        return x
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def rounded(y, dtype: tl.constexpr):
    """A float32 tile in ``dtype``, rounded to nearest even as the hardware does; the interpreter cuts bits off.

    What is beyond float8's 448, infinity too, becomes that; NaN stays NaN.
    """
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = y.to(tl.uint32, bitcast=True)
        nearest = tl.where(y != y, 0x7FC00000, bits + (0x7FFF + ((bits >> 16) & 1)))
        return (nearest >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    if dtype == tl.float8e4nv:
        y = tl.clamp(y, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        if _INTERPRETED:
            bits = tl.abs(y).to(tl.int32, bitcast=True)
            normal = ((bits + (0x7FFFF + ((bits >> 20) & 1))) >> 20) - 0x3C0
            small = (tl.abs(y) * 512 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # steps, rounded to even
            size = tl.where(y != y, 127, tl.where(bits < 0x3C800000, small, normal))
            sign = tl.where(y.to(tl.int32, bitcast=True) < 0, 128, 0)
            return (size + sign).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return y.to(dtype)
