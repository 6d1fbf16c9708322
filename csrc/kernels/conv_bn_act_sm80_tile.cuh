// What the two implicit-GEMM kernels for capability 8.0 and up share: the arguments, the swizzle, and the product of
// one tile in shared memory on the matrix units. How the tile gets there is conv_bn_act_sm80.cuh's and
// conv_bn_act_sm80_masked.cuh's business.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/conv_bn_act.h"
#include "numeric.cuh"
#include "ptx.cuh"

namespace resnet_fast::sm80 {

// Division of 0 <= dividend < 2^31 by a divisor known at launch: with multiplier = ceil(2^(31 + shift) / divisor) and
// 2^shift >= divisor the error stays below one unit of the quotient (Granlund & Montgomery, PLDI 1994).
struct Divisor {
  std::uint32_t value, multiplier, shift;

  __device__ __forceinline__ int quotient(int dividend) const {
    const std::uint64_t product = static_cast<std::uint64_t>(static_cast<std::uint32_t>(dividend)) * multiplier;
    return static_cast<int>(product >> (31 + shift));
  }
};

inline Divisor make_divisor(int value) {
  std::uint32_t shift = 0;
  while ((std::uint64_t{1} << shift) < static_cast<std::uint64_t>(value)) ++shift;
  const std::uint64_t one = std::uint64_t{1} << (31 + shift);
  const auto divisor = static_cast<std::uint64_t>(value);
  return {static_cast<std::uint32_t>(value), static_cast<std::uint32_t>((one + divisor - 1) / divisor), shift};
}

// A problem as a kernel sees it. Channels of a group: group_c in, group_k out.
struct Arguments {
  const void* x;
  const void* weight;
  const float* scale;
  const float* shift;
  const void* residual;
  void* out;
  std::int64_t pixels;  // N P Q
  int h, w, c, k, r, s;
  int p, q;
  int group_c, group_k;
  int depth;  // R S C / groups, the length of one dot product
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  // Blocks: `columns` of them share a tile of pixels, group_columns for each group.
  Divisor columns, group_columns;
  Divisor image;     // P Q
  Divisor row;       // Q
  Divisor channels;  // group_c
  Divisor taps;      // S
  bool pointwise;    // 1x1, stride 1, no padding: pixel m of the output is pixel m of x
  bool relu;
  bool residual_after_activation;
};

inline std::int64_t pixels(const ConvBnAct& conv) { return std::int64_t{conv.n} * conv.p * conv.q; }

inline std::int64_t depth(const ConvBnAct& conv) { return std::int64_t{conv.r} * conv.s * (conv.c / conv.groups); }

inline Arguments make_arguments(const ConvBnAct& conv, int block_n) {
  Arguments a{};
  a.x = conv.x;
  a.weight = conv.weight;
  a.scale = conv.scale;
  a.shift = conv.shift;
  a.residual = conv.residual;
  a.out = conv.out;
  a.pixels = pixels(conv);
  a.h = conv.h;
  a.w = conv.w;
  a.c = conv.c;
  a.k = conv.k;
  a.r = conv.r;
  a.s = conv.s;
  a.p = conv.p;
  a.q = conv.q;
  a.group_c = conv.c / conv.groups;
  a.group_k = conv.k / conv.groups;
  a.depth = static_cast<int>(depth(conv));
  a.stride_h = conv.stride_h;
  a.stride_w = conv.stride_w;
  a.pad_h = conv.pad_h;
  a.pad_w = conv.pad_w;
  a.dilation_h = conv.dilation_h;
  a.dilation_w = conv.dilation_w;
  const int group_columns = (a.group_k + block_n - 1) / block_n;
  a.group_columns = make_divisor(group_columns);
  a.columns = make_divisor(group_columns * conv.groups);
  a.image = make_divisor(static_cast<int>(std::int64_t{conv.p} * conv.q > INT_MAX ? INT_MAX : conv.p * conv.q));
  a.row = make_divisor(conv.q);
  a.channels = make_divisor(a.group_c > 0 ? a.group_c : 1);
  a.taps = make_divisor(conv.s);
  a.pointwise = conv.r == 1 && conv.s == 1 && conv.stride_h == 1 && conv.stride_w == 1 && conv.pad_h == 0 &&
                conv.pad_w == 0 && conv.p == conv.h && conv.q == conv.w;
  a.relu = conv.relu;
  a.residual_after_activation = conv.residual_after_activation;
  return a;
}

// Which pixels and which output channels of which group a block computes. Neighbouring blocks share the pixels.
struct Place {
  std::int64_t pixel;
  int group, k;  // k counts within the group

  __device__ __forceinline__ Place(const Arguments& a, int block, int block_m, int block_n) {
    const int tile = a.columns.quotient(block);
    const int column = block - tile * static_cast<int>(a.columns.value);
    group = a.group_columns.quotient(column);
    k = (column - group * static_cast<int>(a.group_columns.value)) * block_n;
    pixel = static_cast<std::int64_t>(tile) * block_m;
  }
};

// scale, shift, residual and ReLU in float32. No residual is not a residual of zeros, which would turn -0 into 0.
__device__ __forceinline__ float finish(float sum, float scale, float shift, float residual, const Arguments& a) {
  float value = fmaf(sum, scale, shift);
  const bool added = a.residual != nullptr;
  if (added && !a.residual_after_activation) value += residual;
  if (a.relu) value = relu(value);
  if (added && a.residual_after_activation) value += residual;
  return value;
}

// Where the 16-byte unit `unit` of row `row` lies within its row of UNITS units. Eight consecutive rows at one unit,
// and eight consecutive units of rows in turn, fall into different banks: what ldmatrix and 16-byte stores need.
template <int UNITS>
__device__ __forceinline__ int swizzled(int row, int unit) {
  static_assert(UNITS == 2 || UNITS == 4 || UNITS % 8 == 0);
  constexpr int most = UNITS < 8 ? UNITS : 8;
  return unit ^ (row / (8 / most) % most);
}

// Two neighbouring elements: a matrix instruction's output in one row, moved by one instruction.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T values[2];
};

template <typename T>
__device__ __forceinline__ Pair<T> load_pair(const T* from) {
  return *reinterpret_cast<const Pair<T>*>(from);
}

template <typename T>
__device__ __forceinline__ void store_pair(T* to, const Pair<T>& pair) {
  *reinterpret_cast<Pair<T>*>(to) = pair;
}

// A block of threads computing [BLOCK_M pixels, BLOCK_N channels], in steps of BLOCK_K of the dot product, with WARPS_M
// x WARPS_N warps. T is the stored type; float is multiplied as tf32. The rows of both operands lie one after another
// in shared memory, BLOCK_K elements each, swizzled, those of x first.
template <typename T, int BLOCK_M, int BLOCK_N, int BLOCK_K, int WARPS_M, int WARPS_N>
struct Tile {
  using Element = T;
  static constexpr int block_m = BLOCK_M, block_n = BLOCK_N, block_k = BLOCK_K;
  static constexpr int threads = 32 * WARPS_M * WARPS_N;
  static constexpr int unit = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes
  static constexpr int row_bytes = BLOCK_K * static_cast<int>(sizeof(T));
  static constexpr int units = row_bytes / 16;  // of a row
  static constexpr int steps = units / 2;       // of the matrix instruction, which takes 32 bytes of each row
  static constexpr int warp_m = BLOCK_M / WARPS_M, warp_n = BLOCK_N / WARPS_N;
  static constexpr int mmas_m = warp_m / 16, mmas_n = warp_n / 8;
  static constexpr int stage_bytes = (BLOCK_M + BLOCK_N) * row_bytes;
  static_assert(row_bytes == 64 || row_bytes == 128);
  static_assert(warp_m % 16 == 0 && warp_n % 16 == 0);

  using Sums = float[mmas_m][mmas_n][4];

  struct Fragments {
    std::uint32_t a[mmas_m][4];
    std::uint32_t b[mmas_n][2];
  };

  // Where a thread's warp stands in the tile, and what its lane reads.
  struct Lane {
    int m, n;                // first pixel and channel of the warp
    int group, pair;         // lane / 4 and lane % 4, as the matrix instruction names its outputs
    int a_offset, b_offset;  // bytes, from the start of a stage
    int a_unit, b_unit;      // swizzled unit of step 0, in bytes

    __device__ __forceinline__ explicit Lane(int thread) {
      const int warp = thread / 32, lane = thread % 32;
      m = warp % WARPS_M * warp_m;
      n = warp / WARPS_M * warp_n;
      group = lane / 4;
      pair = lane % 4;
      // x: matrices (rows 0-7, 8-15) of the first unit, then of the second. Weight: both units of rows 0-7, then of
      // 8-15.
      const int a_row = m + lane % 16;
      const int b_row = n + lane / 16 * 8 + lane % 8;
      a_offset = a_row * row_bytes;
      b_offset = (BLOCK_M + b_row) * row_bytes;
      a_unit = swizzled<units>(a_row, lane / 16) * 16;
      b_unit = swizzled<units>(b_row, lane / 8 % 2) * 16;
    }
  };

  // The operands of one matrix step. A step further is the unit index xor twice the step: it is even, the swizzle a
  // xor.
  static __device__ __forceinline__ void load(Fragments& to, const unsigned char* stage, const Lane& lane, int step) {
    const unsigned char* const a = stage + lane.a_offset + (lane.a_unit ^ (step * 32));
    const unsigned char* const b = stage + lane.b_offset + (lane.b_unit ^ (step * 32));
#pragma unroll
    for (int i = 0; i < mmas_m; ++i) ptx::ldmatrix_x4(to.a[i], a + i * 16 * row_bytes);
#pragma unroll
    for (int j = 0; j < mmas_n; j += 2) {
      std::uint32_t both[4];
      ptx::ldmatrix_x4(both, b + j * 8 * row_bytes);
      to.b[j][0] = both[0];
      to.b[j][1] = both[1];
      to.b[j + 1][0] = both[2];
      to.b[j + 1][1] = both[3];
    }
  }

  static __device__ __forceinline__ void multiply(Sums& sums, Fragments& of) {
    // tf32: the matrix units would cut the low bits off, an error twice as large and of one sign.
    constexpr bool round = sizeof(T) == 4;
#pragma unroll
    for (int j = 0; j < mmas_n; ++j) {
      if constexpr (round) {
#pragma unroll
        for (std::uint32_t& bits : of.b[j]) bits = ptx::to_tf32(bits);
      }
#pragma unroll
      for (int i = 0; i < mmas_m; ++i) {
        if constexpr (round) {
          if (j == 0) {
#pragma unroll
            for (std::uint32_t& bits : of.a[i]) bits = ptx::to_tf32(bits);
          }
        }
        ptx::mma<T>(sums[i][j], of.a[i], of.b[j]);
      }
    }
  }
};

inline const char* precision_name(Precision precision) {
  switch (precision) {
    case Precision::fp16:
      return "fp16";
    case Precision::bf16:
      return "bf16";
    case Precision::tf32:
      return "tf32";
    case Precision::fp32:
      break;
  }
  return "fp32";
}

template <typename T>
inline constexpr Precision precision_of = Precision::tf32;
template <>
inline constexpr Precision precision_of<__half> = Precision::fp16;
template <>
inline constexpr Precision precision_of<__nv_bfloat16> = Precision::bf16;

// What no kernel of ours computes, "" if there is nothing.
inline std::string unsupported_anywhere(const ConvBnAct& conv, Precision precision) {
  if (conv.precision != precision) {
    return std::string("it computes ") + precision_name(precision) + ", the problem is in " +
           precision_name(conv.precision);
  }
  if (conv.r < 1 || conv.s < 1) return "a window without taps";
  if (depth(conv) > INT_MAX / 2) return "the weight of one output channel has more than 2^30 elements";
  return "";
}

// What the module lists of a kernel on tile V; `form` and `more` stand in its name before and behind the tile.
template <class V>
ConvBnActKernel described(const std::string& form, const std::string& more, decltype(ConvBnActKernel::unsupported) why,
                          decltype(ConvBnActKernel::launch) launch) {
  constexpr Precision precision = precision_of<typename V::Element>;
  return {.name = std::string("sm80_") + precision_name(precision) + "_" + form + std::to_string(V::block_m) + "x" +
                  std::to_string(V::block_n) + "x" + std::to_string(V::block_k) + more,
          .algorithm = "implicit_gemm",
          .least_capability = 80,
          .most_capability = 9999,
          .precision = precision,
          .block_m = V::block_m,
          .block_n = V::block_n,
          .block_k = V::block_k,
          .stages = V::stages,
          .threads = V::threads,
          .shared_bytes = V::shared_bytes,
          .unsupported = why,
          .workspace = [](const ConvBnAct&) { return std::size_t{0}; },
          .launch = launch};
}

}  // namespace resnet_fast::sm80
