// 8 floats in a 256-bit register, for the sources compiled with AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace {

using resnet_fast::cpu::Bfloat16;

constexpr int lanes = 8;
constexpr int tile_rows = 6;  // 12 sums, 2 weights and a broadcast value are 15 of 16 registers
using Vector = __m256;

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector broadcast(float value) { return _mm256_set1_ps(value); }
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vector a) { _mm256_storeu_ps(to, a); }
inline __m256i first(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vector load(const float* from, int count) { return _mm256_maskload_ps(from, first(count)); }
inline void store(float* to, Vector a, int count) { _mm256_maskstore_ps(to, first(count), a); }
inline Vector load(const Bfloat16* from) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Vector load(const Bfloat16* from, int count) {
  Bfloat16 all[lanes] = {};
  for (int i = 0; i < count; ++i) {
    all[i] = from[i];
  }
  return load(all);
}
inline __m128i upper_halves(__m256i a) {
  const __m256i halves = _mm256_srli_epi32(a, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
// To the nearest one, to even if two are as near.
inline __m128i rounded(Vector a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(1 << 22));
  const __m256i unordered = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return upper_halves(_mm256_blendv_epi8(up, quiet, unordered));
}
inline void store_halves(Bfloat16* to, __m128i halves) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves); }
inline void store_halves(Bfloat16* to, __m128i halves, int count) {
  Bfloat16 all[lanes];
  store_halves(all, halves);
  for (int i = 0; i < count; ++i) {
    to[i] = all[i];
  }
}
inline void store(Bfloat16* to, Vector a) { store_halves(to, rounded(a)); }
inline void store(Bfloat16* to, Vector a, int count) { store_halves(to, rounded(a), count); }
// What is bfloat16 already.
inline void store_exact(Bfloat16* to, Vector a, int count) {
  const __m128i halves = upper_halves(_mm256_castps_si256(a));
  count == lanes ? store_halves(to, halves) : store_halves(to, halves, count);
}
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
// max(0, a), and NaN for NaN: the instruction returns its second operand if one is NaN.
inline Vector relu(Vector a) { return _mm256_max_ps(zero(), a); }
// The larger one, and NaN if either is NaN.
inline Vector larger(Vector a, Vector b) {
  return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
// Elements by their numbers.
using Numbers = __m256i;
inline Numbers numbers(const int* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline Vector permute(Vector a, Numbers order) { return _mm256_permutevar8x32_ps(a, order); }
// Whether every element is a number: a difference to itself that is not 0 is that of NaN or infinity.
inline bool finite(Vector a) {
  return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_sub_ps(a, a), zero(), _CMP_NEQ_UQ)) == 0;
}

}  // namespace
