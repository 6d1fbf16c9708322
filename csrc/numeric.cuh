// Conversions, the ReLU and 16-byte accesses, for every kernel. No arithmetic of an op, nothing of the machine
// (ptx.cuh).
#pragma once

#include <cstdint>
#include <cstring>

#include "ptx.cuh"

namespace resnet_fast {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounded to nearest even; values beyond the type's range become infinite, as in torch.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// max(x, 0) where NaN stays NaN.
__device__ __forceinline__ float relu(float x) { return ptx::max_nan(x, 0.0f); }

// SIZE elements side by side: 16 bytes, moved by one instruction, or a single one for what is not aligned.
template <typename T, int SIZE = 16 / sizeof(T)>
struct alignas(SIZE * sizeof(T)) Pack {
  static_assert(SIZE == 1 || SIZE * sizeof(T) == 16);
  static constexpr int size = SIZE;
  T values[SIZE];
};

// `from` is aligned to the pack.
template <typename T, int SIZE = 16 / sizeof(T)>
__device__ __forceinline__ Pack<T, SIZE> load_pack(const T* from) {
  Pack<T, SIZE> pack;
  if constexpr (SIZE == 1) {
    pack.values[0] = *from;
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    memcpy(&pack, &raw, sizeof(raw));
  }
  return pack;
}

// `to` is aligned to the pack.
template <typename T, int SIZE>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, SIZE>& pack) {
  if constexpr (SIZE == 1) {
    *to = pack.values[0];
  } else {
    uint4 raw;
    memcpy(&raw, &pack, sizeof(raw));
    *reinterpret_cast<uint4*>(to) = raw;
  }
}

// Whether 16-byte accesses may start at all of these; null is no tensor and may.
template <typename... Pointers>
bool aligned_to_16(const Pointers*... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace resnet_fast
