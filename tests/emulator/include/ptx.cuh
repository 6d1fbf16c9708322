// The functions of csrc/ptx.cuh, whose comments say what each does, for threads that are fibers on a CPU.
//
// Beyond what the hardware does: misaligned copies and rows are errors, what a copy is going to fill is NaN until it
// arrives, and the order of float32 sums in a matrix product is from the lowest index up.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace resnet_fast::ptx {

using emulator::Location;

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::shared_memory());
}

inline bool inside(int index, int size, Location where = Location::current()) {
  return emulator::visit("inside", where).disabled || static_cast<unsigned>(index) < static_cast<unsigned>(size);
}
inline bool inside(std::int64_t index, std::int64_t size, Location where = Location::current()) {
  return emulator::visit("inside", where).disabled ||
         static_cast<std::uint64_t>(index) < static_cast<std::uint64_t>(size);
}

template <int BYTES>
void cp_async(void* shared, const void* global, bool valid = true, Location where = Location::current()) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulator::copy_later(emulator::visit("copy", where), shared, valid ? global : nullptr, BYTES);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int PENDING>
void cp_async_wait(Location where = Location::current()) {
  if (!emulator::visit("wait", where).disabled) emulator::wait_for_copies(PENDING);
}

namespace detail {

struct Rows {
  emulator::Site* site;
  const void* row;
  std::uint32_t (*to)[4];
};

// Eight rows of 16 bytes are read at once: one cycle if they lie in different eighths of the 128-byte wide memory.
inline void count_bank_conflicts(emulator::Site& site, void* const* payloads) {
  int cycles = 1, rows[8] = {};
  for (int i = 0; i < 8; ++i) {
    const auto row = reinterpret_cast<std::uintptr_t>(static_cast<const Rows*>(payloads[i])->row);
    bool repeated = false;
    for (int j = 0; j < i; ++j)
      repeated |= static_cast<const Rows*>(payloads[i])->row == static_cast<const Rows*>(payloads[j])->row;
    if (!repeated) cycles = std::max(cycles, ++rows[row / 16 % 8]);
  }
  site.phases += 1;
  site.conflicts += static_cast<unsigned>(cycles - 1);
}

inline void exchange_rows(void* const (&payloads)[32]) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    count_bank_conflicts(*static_cast<const Rows*>(payloads[0])->site, payloads + 8 * matrix);
    std::uint16_t elements[8][8];
    for (int i = 0; i < 8; ++i) memcpy(elements[i], static_cast<const Rows*>(payloads[8 * matrix + i])->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = 2 * (lane % 4);
      const std::uint32_t low = elements[i][j], high = elements[i][j + 1];
      (*static_cast<const Rows*>(payloads[lane])->to)[matrix] = low | high << 16;
    }
  }
}

struct Fragments {
  float (*d)[4];
  const std::uint32_t (*a)[4];
  const std::uint32_t (*b)[2];
};

template <typename T>
float element(std::uint32_t word, int half);
template <>
inline float element<__half>(std::uint32_t word, int half) {
  return __half2float({static_cast<std::uint16_t>(word >> 16 * half)});
}
template <>
inline float element<__nv_bfloat16>(std::uint32_t word, int half) {
  return __bfloat162float({static_cast<std::uint16_t>(word >> 16 * half)});
}
template <>
inline float element<float>(std::uint32_t word, int) {
  return __uint_as_float(word & 0xffffe000u);  // tf32: the low 13 bits are not looked at
}

// Touches nothing but these arrays and the lanes' registers, hence no instrumentation, for speed.
template <typename T>
__attribute__((no_sanitize("address", "undefined"))) void multiply(void* const (&payloads)[32]) {
  constexpr int per_word = sizeof(T) == 2 ? 2 : 1, half_k = 4 * per_word;
  float a[16][2 * half_k], b[2 * half_k][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* from = static_cast<const Fragments*>(payloads[lane]);
    const int group = lane / 4, t = lane % 4;
    for (int e = 0; e < per_word; ++e) {
      const int k = per_word * t + e;
      for (int i = 0; i < 4; ++i) a[group + 8 * (i % 2)][k + half_k * (i / 2)] = element<T>((*from->a)[i], e);
      for (int i = 0; i < 2; ++i) b[k + half_k * i][group] = element<T>((*from->b)[i], e);
    }
    for (int i = 0; i < 4; ++i) d[group + 8 * (i / 2)][2 * t + i % 2] = (*from->d)[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 2 * half_k; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      (*static_cast<const Fragments*>(payloads[lane])->d)[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    }
  }
}

}  // namespace detail

inline void ldmatrix_x4(std::uint32_t (&to)[4], const void* row, Location where = Location::current()) {
  emulator::Site& site = emulator::visit("collective", where);
  emulator::check_shared(site, row, 16, 16);
  detail::Rows rows{&site, row, &to};
  emulator::warp_collective(site, 0xffffffffu, &rows, detail::exchange_rows);
}

template <typename T>
void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
         Location where = Location::current()) {
  detail::Fragments fragments{&d, &a, &b};
  emulator::warp_collective(emulator::visit("collective", where), 0xffffffffu, &fragments, detail::multiply<T>);
}

inline std::uint32_t to_tf32(std::uint32_t value) {
  const std::uint32_t magnitude = value & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffffffu;
  return magnitude == 0x7f800000u ? value : (value + 0x1000u) & 0xffffe000u;
}

inline float max_nan(float a, float b) {
  if (a != a || b != b) return __uint_as_float(0x7fffffffu);
  if (a == b) return __uint_as_float(__float_as_uint(a) & __float_as_uint(b));  // +0 is the larger zero
  return a > b ? a : b;
}

template <typename T>
std::uint32_t max_nan_pairs(std::uint32_t a, std::uint32_t b) {
  std::uint32_t larger = 0;
  for (int half = 0; half < 2; ++half) {
    const float value = max_nan(detail::element<T>(a, half), detail::element<T>(b, half));
    T rounded;
    if constexpr (std::is_same_v<T, __half>) {
      rounded = __float2half_rn(value);
    } else {
      rounded = __float2bfloat16_rn(value);
    }
    larger |= static_cast<std::uint32_t>(rounded.bits) << 16 * half;
  }
  return larger;
}

}  // namespace resnet_fast::ptx
