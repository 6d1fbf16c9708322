// 16 floats in a 512-bit register, for the sources compiled with AVX-512.
#pragma once

#pragma GCC diagnostic push
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own _mm512_undefined_ps
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "kernels.h"

namespace {

using resnet_fast::cpu::Bfloat16;
using resnet_fast::cpu::Uint8;

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
inline Vector widen(__m256i a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)); }
inline Vector load(const Bfloat16* from) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
inline Vector load(const Bfloat16* from, int count) { return widen(_mm256_maskz_loadu_epi16(first(count), from)); }
inline __m256i upper_halves(__m512i a) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16)); }
// To the nearest one, to even if two are as near.
inline __m256i rounded(Vector a) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a));
#else
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(1 << 22));
  return upper_halves(_mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet));
#endif
}
inline void store(Bfloat16* to, Vector a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded(a)); }
inline void store(Bfloat16* to, Vector a, int count) { _mm256_mask_storeu_epi16(to, first(count), rounded(a)); }
// What is bfloat16 already, numbers that are subnormal too.
inline void store_exact(Bfloat16* to, Vector a, int count) {
  _mm256_mask_storeu_epi16(to, first(count), upper_halves(_mm512_castps_si512(a)));
}
inline Vector from_integers(__m512i a) { return _mm512_cvtepi32_ps(a); }
inline Vector widen(__m128i a) { return from_integers(_mm512_cvtepu8_epi32(a)); }
inline Vector load(const Uint8* from) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
inline Vector load(const Uint8* from, int count) { return widen(_mm_maskz_loadu_epi8(first(count), from)); }
// The integers that are nearest, the even ones if two are as near, plus `zero`: 0 to 255.
inline __m128i lowest_bytes(Vector a, int zero) {
  return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(zero)));
}
inline void store_steps(Uint8* to, Vector a, int zero) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), lowest_bytes(a, zero));
}
inline void store_steps(Uint8* to, Vector a, int zero, int count) {
  _mm_mask_storeu_epi8(to, first(count), lowest_bytes(a, zero));
}
// Two vectors of two rows each, in steps without the zero point, as the 32 bytes of each row.
struct Limits {
  __m512i zero, low, high;  // 16 bits, 8 bits, 8 bits
};
inline Limits limits_of(int zero, int low, int high) {
  return {_mm512_set1_epi16(static_cast<short>(zero)), _mm512_set1_epi8(static_cast<char>(low)),
          _mm512_set1_epi8(static_cast<char>(high))};
}
inline void store_steps(Uint8* row, Uint8* other_row, const Vector (&a)[2], const Vector (&b)[2],
                        const Limits& limits) {
  const __m512i one = _mm512_packs_epi32(_mm512_cvtps_epi32(a[0]), _mm512_cvtps_epi32(a[1]));
  const __m512i other = _mm512_packs_epi32(_mm512_cvtps_epi32(b[0]), _mm512_cvtps_epi32(b[1]));
  __m512i bytes = _mm512_packus_epi16(_mm512_adds_epi16(one, limits.zero), _mm512_adds_epi16(other, limits.zero));
  bytes = _mm512_min_epu8(_mm512_max_epu8(bytes, limits.low), limits.high);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  bytes = _mm512_permutexvar_epi32(order, bytes);  // packing goes by 128 bits
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm512_castsi512_si256(bytes));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(other_row), _mm512_extracti64x4_epi64(bytes, 1));
}
// 64 bytes as they are.
inline __mmask64 first_bytes(int count) { return count == 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1; }
inline __m512i load_bytes(const Uint8* from, int count) { return _mm512_maskz_loadu_epi8(first_bytes(count), from); }
inline void store_exact(Uint8* to, __m512i a, int count) { _mm512_mask_storeu_epi8(to, first_bytes(count), a); }
inline __m512i larger(__m512i a, __m512i b) { return _mm512_max_epu8(a, b); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#ifdef __AVX512BF16__
// c + a * b of the elements' lower and upper halves.
inline Vector multiply_add_pairs(Vector a, Vector b, Vector c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif
#ifdef __AVX512VNNI__
// c + a * b of four uint8 and four int8 each, as integers.
inline Vector multiply_add_quads(Vector a, Vector b, Vector c) {
  return _mm512_castsi512_ps(
      _mm512_dpbusd_epi32(_mm512_castps_si512(c), _mm512_castps_si512(a), _mm512_castps_si512(b)));
}
#endif
inline Vector first_of(Vector a, int count) { return _mm512_maskz_mov_ps(first(count), a); }
inline Vector from_integers(Vector a) { return from_integers(_mm512_castps_si512(a)); }
inline Vector smaller(Vector a, Vector b) { return _mm512_min_ps(a, b); }
// Of NaN, the limit.
inline Vector limited(Vector a, Vector low, Vector high) { return _mm512_min_ps(_mm512_max_ps(a, low), high); }
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
