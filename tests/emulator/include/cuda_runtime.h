// What a kernel finds in CUDA without including anything, for threads that are fibers. A function of CUDA that is
// missing here is one that no kernel has needed yet.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "cuda_runtime_api.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  struct Closure {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_cv_t<Parameters>...> arguments;
  } closure{kernel, {arguments...}};
  const dim3 grid = config->gridDim, block = config->blockDim;
  const auto run = [](void* opaque) {
    const auto* with = static_cast<const Closure*>(opaque);
    std::apply(with->kernel, with->arguments);
  };
  return static_cast<cudaError_t>(emulator::launch({{grid.x, grid.y, grid.z},
                                                    {block.x, block.y, block.z},
                                                    config->dynamicSmemBytes,
                                                    reinterpret_cast<const void*>(kernel),
                                                    run,
                                                    &closure}));
}

// --- waiting for others

inline void __syncthreads(emulator::Location where = emulator::Location::current()) {
  emulator::Site& site = emulator::visit("barrier", where);
  if (!site.disabled) emulator::block_barrier(site);
}
inline int __syncthreads_count(int predicate, emulator::Location where = emulator::Location::current()) {
  emulator::Site& site = emulator::visit("barrier", where);
  return site.disabled ? predicate != 0 : emulator::block_barrier(site, predicate != 0).truths;
}
inline int __syncthreads_or(int predicate, emulator::Location where = emulator::Location::current()) {
  emulator::Site& site = emulator::visit("barrier", where);
  return site.disabled ? predicate != 0 : emulator::block_barrier(site, predicate != 0).truths > 0;
}
inline int __syncthreads_and(int predicate, emulator::Location where = emulator::Location::current()) {
  emulator::Site& site = emulator::visit("barrier", where);
  if (site.disabled) return predicate != 0;
  const emulator::Count count = emulator::block_barrier(site, predicate != 0);
  return count.truths == count.threads;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Location where = emulator::Location::current()) {
  emulator::Site& site = emulator::visit("syncwarp", where);
  if (!site.disabled) emulator::warp_collective(site, mask, nullptr, [](void* const(&)[32]) {});
}

// --- exchange within a warp

namespace emulator {
// `source` is of the lane whose value arrives here; -1: this lane's own.
template <typename T>
T shuffle(unsigned mask, T value, int source, const Location& where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  struct Payload {
    T value, received;
    int source;
  } payload{value, value, source};
  warp_collective(visit("collective", where), mask, &payload, [](void* const(&payloads)[32]) {
    for (void* to : payloads) {
      auto* receiver = static_cast<Payload*>(to);
      if (receiver->source >= 0) receiver->received = static_cast<const Payload*>(payloads[receiver->source])->value;
    }
  });
  return payload.received;
}

inline unsigned ballot(unsigned mask, int predicate, const Location& where) {
  struct Payload {
    bool predicate;
    unsigned ballot;
  } payload{predicate != 0, 0};
  warp_collective(visit("collective", where), mask, &payload, [](void* const(&payloads)[32]) {
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= static_cast<unsigned>(static_cast<const Payload*>(payloads[i])->predicate) << i;
    for (void* to : payloads) static_cast<Payload*>(to)->ballot = all;
  });
  return payload.ballot;
}
}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              emulator::Location where = emulator::Location::current()) {
  return emulator::shuffle(mask, value, (emulator::lane() & -width) | (source & (width - 1)), where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  emulator::Location where = emulator::Location::current()) {
  const int source = emulator::lane() ^ lane_mask;
  return emulator::shuffle(mask, value, source < (emulator::lane() & -width) + width ? source : -1, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulator::Location where = emulator::Location::current()) {
  const int source = emulator::lane() + static_cast<int>(delta);
  return emulator::shuffle(mask, value, source < (emulator::lane() & -width) + width ? source : -1, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 emulator::Location where = emulator::Location::current()) {
  const int source = emulator::lane() - static_cast<int>(delta);
  return emulator::shuffle(mask, value, source >= (emulator::lane() & -width) ? source : -1, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Location where = emulator::Location::current()) {
  return emulator::ballot(mask, predicate, where);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Location where = emulator::Location::current()) {
  return emulator::ballot(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Location where = emulator::Location::current()) {
  return emulator::ballot(mask, predicate, where) == 0xffffffffu;
}

// --- memory

// Fibers change only where they wait, so plain accesses are atomic and ordered.
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T before = *address;
  *address = static_cast<T>(before + value);
  return before;
}
inline unsigned atomicInc(unsigned* address, unsigned largest) {
  const unsigned before = *address;
  *address = before >= largest ? 0 : before + 1;
  return before;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
template <typename T>
T __ldg(const T* address) {
  return *address;
}

// --- arithmetic

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>((std::uint64_t{x} * y) >> 32); }
