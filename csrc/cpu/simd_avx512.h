// 16 floats in a 512-bit register, for the sources compiled with AVX-512.
#pragma once

#pragma GCC diagnostic push
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own _mm512_undefined_ps
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace {

constexpr int lanes = 16;
constexpr int tile_rows = 14;  // 28 sums, 2 weights and a broadcast value are 31 of 32 registers
using Vector = __m512;

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector broadcast(float value) { return _mm512_set1_ps(value); }
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector a) { _mm512_storeu_ps(to, a); }
inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
inline Vector load(const float* from, int count) { return _mm512_maskz_loadu_ps(first(count), from); }
inline void store(float* to, Vector a, int count) { _mm512_mask_storeu_ps(to, first(count), a); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
// max(0, a), and NaN for NaN: the instruction returns its second operand if one is NaN.
inline Vector relu(Vector a) { return _mm512_max_ps(zero(), a); }
// The larger one, and NaN if either is NaN.
inline Vector larger(Vector a, Vector b) {
  return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
// Elements by their numbers.
using Numbers = __m512i;
inline Numbers numbers(const int* from) { return _mm512_loadu_si512(from); }
inline Vector permute(Vector a, Numbers order) { return _mm512_permutexvar_ps(order, a); }
// Whether every element is a number: a difference to itself that is not 0 is that of NaN or infinity.
inline bool finite(Vector a) { return _mm512_cmp_ps_mask(_mm512_sub_ps(a, a), zero(), _CMP_NEQ_UQ) == 0; }

}  // namespace
