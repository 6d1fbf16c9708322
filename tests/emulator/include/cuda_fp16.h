// __half as 16 bits, with the conversions that csrc/ uses. No arithmetic: the kernels do theirs in float.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda_runtime.h"

struct __half {
  std::uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline float __half2float(__half value) {
  // The significand and exponent moved to their places are the value times 2^-112, subnormal ones too.
  const std::uint32_t magnitude = (value.bits & 0x7fffu) << 13, sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t scaled = (value.bits & 0x7c00u) == 0x7c00u
                                   ? magnitude | 0x7f800000u  // infinity, NaN
                                   : std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  return std::bit_cast<float>(scaled | sign);
}

// To nearest, ties to even; what is too large becomes infinite, NaN becomes CUDA's.
inline __half __float2half_rn(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value), magnitude = bits & 0x7fffffffu;
  const std::uint32_t sign = (bits & 0x80000000u) >> 16;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // 65520, halfway to 2^16
  std::uint32_t rounded;
  if (magnitude < 0x38800000u) {  // below 2^-14: the sum's last place is 2^-24, so the addition rounds
    rounded = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    rounded = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | rounded)};
}
inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 value) { return {__half2float(value.x), __half2float(value.y)}; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
