// The boundary between the hand-written kernels and the machine: every PTX instruction behind a named function, and
// with them the two things that a test without a GPU has to watch, shared memory and bounds checks. No kernel has
// inline assembly, `extern __shared__` or a static __shared__ array of its own.
//
// tests/emulator/include/ptx.cuh implements the same functions for threads that are fibers on a CPU. A function
// added here is added there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace resnet_fast::ptx {

// The block's dynamic shared memory, aligned to 128 bytes.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// Whether 0 <= index < size. Every bounds check of a kernel goes through here, so that a test can switch off each one.
__device__ __forceinline__ bool inside(int index, int size) {
  return static_cast<unsigned>(index) < static_cast<unsigned>(size);
}
__device__ __forceinline__ bool inside(std::int64_t index, std::int64_t size) {
  return static_cast<std::uint64_t>(index) < static_cast<std::uint64_t>(size);
}

__device__ __forceinline__ std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of BYTES (4, 8 or 16) bytes, aligned to as many; zeros arrive instead, and `global` is not read, where
// not `valid`. The bytes are there for this thread after cp_async_wait, for others after a barrier behind that. 16-byte
// copies bypass the level-1 cache.
template <int BYTES>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  const int source_bytes = valid ? BYTES : 0;
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(BYTES),
                 "r"(source_bytes)
                 : "memory");
  }
}

// Closes this thread's current group of copies (an empty one too).
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's groups are still on their way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lane 8 i + j names row j of matrix i (16 bytes, aligned to 16); lane l receives
// the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each. For 32-bit elements the rows have four of them.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a * b for a [16, K] (rows), b [K, 8] (columns), d [16, 8]; K is 16 for two-byte types and 8 for float (as tf32).
// Fragments as the PTX manual has them for mma.m16n8k16 and mma.m16n8k8: with group = lane / 4 and t = lane % 4,
//   d[0], d[1]: row group, columns 2 t and 2 t + 1; d[2], d[3]: row group + 8.
//   a: {(group, 2 t..), (group + 8, 2 t..), (group, 2 t + 8..), (group + 8, 2 t + 8..)}, two elements each; for tf32
//      {(group, t), (group + 8, t), (group, t + 4), (group + 8, t + 4)}, one each.
//   b: {(2 t.., group), (2 t + 8.., group)}; for tf32 {(t, group), (t + 4, group)}.
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const std::uint32_t (&a)[4],
                                                   const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma<float>(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The float whose bits are `value`, rounded to tf32 (nearest, ties away from zero); mma<float> would cut the bits off.
__device__ __forceinline__ std::uint32_t to_tf32(std::uint32_t value) {
  std::uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(value)));
  return rounded;
}

// max(a, b), NaN where either is one; fmaxf drops NaN.
__device__ __forceinline__ float max_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// max_nan of two values at once, those of a two-byte type side by side in a word.
template <typename T>
__device__ __forceinline__ std::uint32_t max_nan_pairs(std::uint32_t a, std::uint32_t b);

template <>
__device__ __forceinline__ std::uint32_t max_nan_pairs<__half>(std::uint32_t a, std::uint32_t b) {
  std::uint32_t larger;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

template <>
__device__ __forceinline__ std::uint32_t max_nan_pairs<__nv_bfloat16>(std::uint32_t a, std::uint32_t b) {
  std::uint32_t larger;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

}  // namespace resnet_fast::ptx
