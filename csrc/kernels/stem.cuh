// stem on matrix units, sm_80 and up: convolution, scale, shift, ReLU and max-pool in one kernel. Not for more than
// four input channels or plain float32.
//
// The convolution sees 2x2 squares of pixels as positions of 4 C channels, which makes it 4x4 stride 1: tap row r of
// row p reads image row 2 p + r - 3 = 2 (p + r' - 2) + dr with r + 1 = 2 r' + dr. Its product has K = 16 squares of 4 C
// values: 192 for three channels (squares of 12), 256 otherwise (squares padded to 16).
//
// Floor, per image of 3x224x224 in half precision: 0.30 MB read, 0.40 MB written; 0.24 GFLOP, here done 1.5 times (192
// values for 147, and conv pixels on the edges of tiles twice).
//
// Tile of a block, here 7x8 pooled pixels by 64 output channels:
//
//   patch: 18x20 squares          convolution: 15x17 pixels, 4 warps       pooled: 7x8
//   (36x40 pixels, once)          of 64 pixels x 64 channels each          maxima of 3x3, from shared memory
//
// The rows of the product's left operand are addresses inside the patch, so nothing is copied per tap. 16 bytes of a
// square (a chunk) are the unit of ldmatrix; chunk j of all squares lies together as plane j, with a distance of 25
// chunks between rows: eight neighbouring conv pixels, also from one row of 17 to the next, are eight different eighths
// of 128 bytes, and no banks collide. Twelve two-byte values are one and a half chunks; their three planes hold what a
// square and its right neighbour have together, for every square, hence each value twice.
//
// The convolved pixels take the place of weights and patch in shared memory once all warps have read those.
//
// Traps
// - The 4x4 window covers 8x8 pixels, a row and a column too many. Their weights are zeros, and zero times NaN is NaN.
//   So a block whose patch holds a NaN or an infinity computes its tile by plain multiply-adds over the 49 taps.
// - The padding is zero after normalisation, which no byte need be.
// - Conv pixels beyond the convolution's output must not win the maximum. 0 never does behind a ReLU: all pixels are at
//   least 0 or NaN, and every window has one that counts.
// - Padding is multiplied, so an infinite or NaN weight makes NaN where its tap lies in the padding. torch on a CPU
//   does so in float16 and float64, and skips the padding in float32 and bfloat16.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/stem.h"
#include "launch.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace resnet_fast::stem_tile {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = kWarps * 32;
inline constexpr int kOutputs = 64;  // output channels of a block
inline constexpr int kPooledW = 8;   // pooled columns of a block
inline constexpr int kConvW = 2 * kPooledW + 1;
inline constexpr int kPatchW = kConvW + 3;
inline constexpr int kPitch = 25;       // chunks from a patch row to the next: more than kPatchW, and kConvW modulo 8
inline constexpr int kChunkBytes = 16;  // of a row of ldmatrix
inline constexpr int kTaps = 16;        // squares in a window
static_assert(kPitch > kPatchW && kPitch % 8 == kConvW % 8);

// SQUARE: values of a square in the product, 12 (three channels) or 16. POOLED_H: pooled rows of a block.
template <typename T, int SQUARE, int POOLED_H>
struct Tile {
  static constexpr int square = SQUARE;
  static constexpr int pooled_h = POOLED_H;
  static constexpr int conv_h = 2 * POOLED_H + 1;
  static constexpr int pixels = conv_h * kConvW;                              // of the convolution
  static constexpr int m_tiles = (pixels + 16 * kWarps - 1) / (16 * kWarps);  // of 16 pixels, for each warp
  static constexpr int patch_h = conv_h + 3;
  static constexpr int squares = patch_h * kPatchW;

  static constexpr int chunk = kChunkBytes / sizeof(T);                // values
  static constexpr int group_columns = SQUARE % chunk == 0 ? 1 : 2;    // squares that fill whole chunks
  static constexpr int planes = group_columns * SQUARE / chunk;        // chunks of a group
  static constexpr int chunks = kTaps * SQUARE / chunk;                // of the product's K
  static constexpr int weight_piece = SQUARE == 16 ? chunk : 4;        // values that divide a square and a chunk
  static constexpr int weight_row_bytes = (chunks + 1) * kChunkBytes;  // an odd number of chunks: no bank conflicts
  static constexpr int weight_bytes = kOutputs * weight_row_bytes;
  static constexpr int plane_bytes =
      (patch_h * kPitch + 1) * kChunkBytes;  // one chunk before the first, see store_square
  static constexpr int operand_bytes = weight_bytes + planes * plane_bytes;

  static constexpr int staged_pitch = kOutputs + 8;  // values from a conv pixel to the next: no bank conflicts
  static constexpr int staged_bytes = m_tiles * 16 * kWarps * staged_pitch * static_cast<int>(sizeof(T));

  static constexpr int scale_offset = std::max(operand_bytes, staged_bytes);  // [2, kOutputs] float: scale, shift
  static constexpr int shared_bytes = scale_offset + 2 * kOutputs * static_cast<int>(sizeof(float));

  // Blocks on a multiprocessor that the registers are to allow; two-byte operands leave shared memory for more.
  static constexpr int blocks = sizeof(T) == 4 ? 2 : m_tiles < 4 ? 4 : SQUARE == 12 ? 3 : 2;
  // Steps of the product that the compiler may interleave within these registers.
  static constexpr int unrolled = 2;

  __device__ static int square_offset(int row, int column) { return (1 + row * kPitch + column) * kChunkBytes; }
};

// What a block computes.
struct Place {
  int n, p, q, k;  // image, first pooled row and column, first output channel
  int y, x;        // first row and column of the convolution; -1 where the pool's padding begins
};

template <typename Tile>
__device__ __forceinline__ Place place_of(const Stem& a, int tiles_h, int tiles_w, int k_blocks) {
  Place at;
  int rest = static_cast<int>(blockIdx.x);
  at.k = rest % k_blocks * kOutputs;
  rest /= k_blocks;
  at.q = rest % tiles_w * kPooledW;
  rest /= tiles_w;
  at.p = rest % tiles_h * Tile::pooled_h;
  at.n = rest / tiles_h;
  const int padding = a.ceil_mode ? 0 : 1;
  at.y = 2 * at.p - padding;
  at.x = 2 * at.q - padding;
  return at;
}

// What matrix units take: tf32 in place of float, others as they are.
__device__ __forceinline__ __half operand(__half x) { return x; }
__device__ __forceinline__ __nv_bfloat16 operand(__nv_bfloat16 x) { return x; }
__device__ __forceinline__ float operand(float x) { return __uint_as_float(ptx::to_tf32(__float_as_uint(x))); }

// Calls each(row, source, target) for this thread's pieces of the block's weights: the output channel, and where the
// piece begins in the given row of 16 squares of 16 values and in the row of 16 squares of SQUARE.
template <typename Tile, typename Each>
__device__ __forceinline__ void for_each_weight_piece(Each each) {
  constexpr int pieces = Tile::square / Tile::weight_piece;  // of a square
  for (int index = static_cast<int>(threadIdx.x); index < kOutputs * kTaps * pieces; index += kThreads) {
    const int row = index / (kTaps * pieces), piece = index % (kTaps * pieces);
    each(row, piece / pieces * 16 + piece % pieces * Tile::weight_piece, piece * Tile::weight_piece);
  }
}

// Starts the copies of the block's weights.
template <typename T, typename Tile>
__device__ __forceinline__ void start_weights(const Stem& a, const Place& at, unsigned char* weights) {
  const T* from = static_cast<const T*>(a.weight);
  for_each_weight_piece<Tile>([&](int row, int source, int target) {
    const bool valid = ptx::inside(at.k + row, a.k);
    const T* piece = valid ? from + static_cast<std::int64_t>(at.k + row) * (kTaps * 16) + source : from;
    ptx::cp_async<Tile::weight_piece * sizeof(T)>(
        weights + row * Tile::weight_row_bytes + target * static_cast<int>(sizeof(T)), piece, valid);
  });
  ptx::cp_async_commit();
}

// Rounds the weights that this thread has copied itself.
template <typename Tile>
__device__ __forceinline__ void round_weights(unsigned char* weights) {
  for_each_weight_piece<Tile>([&](int row, int, int target) {
    float* piece = reinterpret_cast<float*>(weights + row * Tile::weight_row_bytes) + target;
    Pack<float> pack = load_pack(piece);
#pragma unroll
    for (float& value : pack.values) value = operand(value);
    store_pack(piece, pack);
  });
}

// 8 or 16 bytes to shared memory.
template <typename Raw, typename T>
__device__ __forceinline__ void store_raw(unsigned char* to, const T* values) {
  Raw raw;
  memcpy(&raw, values, sizeof(raw));
  *reinterpret_cast<Raw*>(to) = raw;
}

// One square into the planes.
template <typename T, int SQUARE, typename Tile>
__device__ __forceinline__ void store_square(unsigned char* patch, int row, int column, const T (&values)[SQUARE]) {
  unsigned char* to = patch + Tile::square_offset(row, column);
  if constexpr (Tile::group_columns == 1) {
#pragma unroll
    for (int plane = 0; plane < Tile::planes; ++plane) {
      store_raw<uint4>(to + plane * Tile::plane_bytes, values + plane * Tile::chunk);
    }
  } else {
    // As the left one of two squares and as the right one. Left of column 0 nobody reads, but there is room: the last
    // chunk of the row above, one before the first row.
    unsigned char* left = to - kChunkBytes;
    store_raw<uint4>(to, values);
    store_raw<uint2>(to + Tile::plane_bytes, values + 8);
    store_raw<uint2>(left + Tile::plane_bytes + 8, values);
    store_raw<uint4>(left + 2 * Tile::plane_bytes, values + 4);
  }
}

// How the pixels of three channels lie in memory. Not `any`: two values that are neighbours and aligned are read at
// once, of which a square's row has three; the width is even.
enum class Layout { any, planar, interleaved };

template <typename X>
struct alignas(2 * sizeof(X)) Two {
  X values[2];
};

// of[channel], without an array in memory.
__device__ __forceinline__ float of_channel(const float (&of)[kStemMostChannels], int channel) {
  float value = of[0];
#pragma unroll
  for (int i = 1; i < kStemMostChannels; ++i) value = channel == i ? of[i] : value;
  return value;
}

// The image's pixels around the tile into the patch, zeros beyond the image. X: T, or unsigned char for bytes. Returns
// whether a value of this thread is NaN or infinite.
template <typename T, typename Tile, typename X, Layout LAYOUT>
__device__ __forceinline__ bool load_patch(const Stem& a, const Place& at, unsigned char* patch) {
  constexpr int square_values = Tile::square;
  constexpr int rounds = (Tile::squares + kThreads - 1) / kThreads;
  constexpr bool from_bytes = std::is_same_v<X, unsigned char>;
  const int c = square_values == 12 ? 3 : a.c;
  const int shift = c == 4 ? 2 : c - 1;  // log2(c) where that is used
  const auto pixel_of = [&](int value) { return square_values == 12 ? value / 3 : value >> shift; };

  // All loads first: the latency of memory is paid once.
  X raw[rounds][square_values];
  unsigned valid[rounds];  // bit 2 dr + ds: pixel (dr, ds) of the square is inside the image
  const X* image = static_cast<const X*>(a.x) + at.n * a.stride_n;
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    const int index = round * kThreads + static_cast<int>(threadIdx.x);
    const int y = 2 * (at.y + index / kPatchW - 2), x = 2 * (at.x + index % kPatchW - 2);
    const unsigned columns = (ptx::inside(x, a.w) ? 5u : 0u) | (ptx::inside(x + 1, a.w) ? 10u : 0u);
    const unsigned rows = (ptx::inside(y, a.h) ? 3u : 0u) | (ptx::inside(y + 1, a.h) ? 12u : 0u);
    valid[round] = index < Tile::squares ? columns & rows : 0u;
    const X* square = image + y * a.stride_h + x * a.stride_w;
    if constexpr (LAYOUT == Layout::any) {
#pragma unroll
      for (int value = 0; value < square_values; ++value) {
        const int pixel = pixel_of(value), channel = value - pixel * c;
        raw[round][value] = X(0);
        if (valid[round] >> pixel & 1u) {
          raw[round][value] = square[(pixel >> 1) * a.stride_h + (pixel & 1) * a.stride_w + channel * a.stride_c];
        }
      }
    } else {
      const std::int64_t stride = LAYOUT == Layout::planar ? a.stride_c : 2;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          Two<X> two = {{X(0), X(0)}};
          if (valid[round] >> 2 * row & 1u) {
            two = *reinterpret_cast<const Two<X>*>(square + row * a.stride_h + i * stride);
          }
          const int first = row * 6 + (LAYOUT == Layout::planar ? i : 2 * i);
          raw[round][first] = two.values[0];
          raw[round][first + (LAYOUT == Layout::planar ? 3 : 1)] = two.values[1];
        }
      }
    }
  }

  float factor[kStemMostChannels] = {}, summand[kStemMostChannels] = {};
  if constexpr (from_bytes) {
#pragma unroll
    for (int i = 0; i < kStemMostChannels; ++i) {
      if (i < c) {
        factor[i] = a.normalisation[i];
        summand[i] = a.normalisation[c + i];
      }
    }
  }
  float poison = 0.0f;  // NaN once a value is NaN or infinite
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    const int index = round * kThreads + static_cast<int>(threadIdx.x);
    T values[square_values];
#pragma unroll
    for (int value = 0; value < square_values; ++value) {
      if constexpr (from_bytes) {
        const int pixel = pixel_of(value), channel = value - pixel * c;
        const float normalised =
            fmaf(static_cast<float>(raw[round][value]), of_channel(factor, channel), of_channel(summand, channel));
        values[value] = operand(from_float<T>(valid[round] >> pixel & 1u ? normalised : 0.0f));
      } else {
        values[value] = operand(raw[round][value]);
      }
      poison = fmaf(to_float(values[value]), 0.0f, poison);
    }
    if (index < Tile::squares) store_square<T, square_values, Tile>(patch, index / kPatchW, index % kPatchW, values);
  }
  return poison != 0.0f;
}

template <typename T, typename Tile, typename X>
__device__ __forceinline__ bool load_patch(const Stem& a, const Place& at, Layout layout, unsigned char* patch) {
  if constexpr (Tile::square == 12) {
    if (layout == Layout::interleaved) return load_patch<T, Tile, X, Layout::interleaved>(a, at, patch);
    if constexpr (std::is_same_v<X, T>) {
      if (layout == Layout::planar) return load_patch<T, Tile, X, Layout::planar>(a, at, patch);
    }
  }
  return load_patch<T, Tile, X, Layout::any>(a, at, patch);
}

// The tile by plain multiply-adds over the 49 taps and none more, for patches with NaN or infinities. Slow: several
// conv pixels are computed for each of the windows they are in.
template <typename T, int SQUARE, typename Tile>
__device__ __forceinline__ void exact_tile(const Stem& a, const Place& at, const unsigned char* weights,
                                           const unsigned char* patch, const float* scale) {
  T* out = static_cast<T*>(a.out);
  for (int index = static_cast<int>(threadIdx.x); index < Tile::pooled_h * kPooledW * kOutputs; index += kThreads) {
    const int k = index % kOutputs, q = index / kOutputs % kPooledW, p = index / kOutputs / kPooledW;
    if (!ptx::inside(at.p + p, a.pooled_h) || !ptx::inside(at.q + q, a.pooled_w) || !ptx::inside(at.k + k, a.k)) {
      continue;
    }
    const T* weight = reinterpret_cast<const T*>(weights + k * Tile::weight_row_bytes);
    float largest = 0.0f;
#pragma unroll 1
    for (int position = 0; position < 9 && largest == largest; ++position) {  // NaN stays
      const int y = 2 * p + position / 3, x = 2 * q + position % 3;
      if (!ptx::inside(at.y + y, a.conv_h) || !ptx::inside(at.x + x, a.conv_w)) continue;
      float sum = 0.0f;
#pragma unroll 1
      for (int r = 1; r < 8 && sum == sum; ++r) {
#pragma unroll 1
        for (int s = 1; s < 8; ++s) {
          const unsigned char* square = patch + Tile::square_offset(y + r / 2, x + s / 2);
          for (int i = 0; i < a.c; ++i) {
            const int value = (r % 2 * 2 + s % 2) * a.c + i;
            const T* chunk = reinterpret_cast<const T*>(square + value / Tile::chunk * Tile::plane_bytes);
            sum =
                fmaf(to_float(chunk[value % Tile::chunk]), to_float(weight[(r / 2 * 4 + s / 2) * SQUARE + value]), sum);
          }
        }
      }
      largest = ptx::max_nan(largest, relu(fmaf(sum, scale[k], scale[kOutputs + k])));
    }
    const std::int64_t pixel = (static_cast<std::int64_t>(at.n) * a.pooled_h + at.p + p) * a.pooled_w + at.q + q;
    out[pixel * a.k + at.k + k] = from_float<T>(largest);
  }
}

// The convolution of the warp's m_tiles * 16 pixels. A step of the product takes the same plane of two groups that are
// neighbours, so all that differs between steps are constants.
template <typename T, typename Tile>
__device__ __forceinline__ void convolve(const unsigned char* weights, const unsigned char* patch,
                                         float (&sums)[Tile::m_tiles][kOutputs / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int pixels[Tile::m_tiles];  // where the rows that this lane names for ldmatrix begin in the patch, in bytes
#pragma unroll
  for (int m = 0; m < Tile::m_tiles; ++m) {
    // The rows that fill up the last tile repeat a pixel; nobody reads what becomes of them.
    const int row = (warp * Tile::m_tiles + m) * 16 + lane % 16, pixel = row < Tile::pixels ? row : 0;
    pixels[m] = Tile::square_offset(pixel / kConvW, pixel % kConvW + lane / 16 * Tile::group_columns);
  }
  const unsigned char* weight_row =
      weights + (lane / 16 * 8 + lane % 8) * Tile::weight_row_bytes + lane / 8 % 2 * Tile::planes * kChunkBytes;
#pragma unroll
  for (auto& tile : sums) {
#pragma unroll
    for (auto& fragment : tile) {
#pragma unroll
      for (float& sum : fragment) sum = 0.0f;
    }
  }
// One row of squares at a time; all of them unrolled, the compiler loads ahead more than there are registers for.
#pragma unroll 1
  for (int row = 0; row < 4; ++row) {
#pragma unroll(Tile::unrolled)
    for (int step = 0; step < Tile::chunks / 8; ++step) {
      const int plane = step % Tile::planes, groups = step / Tile::planes * 2;
      std::uint32_t b[kOutputs / 8][2];
#pragma unroll
      for (int pair = 0; pair < kOutputs / 16; ++pair) {
        std::uint32_t four[4];
        ptx::ldmatrix_x4(
            four, weight_row + pair * 16 * Tile::weight_row_bytes + (groups * Tile::planes + plane) * kChunkBytes);
        b[2 * pair][0] = four[0];
        b[2 * pair][1] = four[1];
        b[2 * pair + 1][0] = four[2];
        b[2 * pair + 1][1] = four[3];
      }
#pragma unroll
      for (int m = 0; m < Tile::m_tiles; ++m) {
        std::uint32_t fragment[4];
        ptx::ldmatrix_x4(fragment,
                         patch + pixels[m] + plane * Tile::plane_bytes + groups * Tile::group_columns * kChunkBytes);
#pragma unroll
        for (int column = 0; column < kOutputs / 8; ++column) ptx::mma<T>(sums[m][column], fragment, b[column]);
      }
    }
    patch += kPitch * kChunkBytes;
    weight_row += Tile::chunks / 4 * kChunkBytes;
  }
}

// The maximum of a word's values, each.
template <typename T>
__device__ __forceinline__ std::uint32_t max_words(std::uint32_t a, std::uint32_t b) {
  if constexpr (sizeof(T) == 2) {
    return ptx::max_nan_pairs<T>(a, b);
  } else {
    return __float_as_uint(ptx::max_nan(__uint_as_float(a), __uint_as_float(b)));
  }
}

// Scale, shift and ReLU, rounded: conv pixels [pixels, staged_pitch], zeros where the convolution has none.
template <typename T, typename Tile>
__device__ __forceinline__ void stage(const Stem& a, const Place& at, const float* scale,
                                      const float (&sums)[Tile::m_tiles][kOutputs / 8][4], T* staged) {
  constexpr int words = 2 * sizeof(T) / sizeof(std::uint32_t);  // of two values
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int first_pixel = warp * Tile::m_tiles * 16 + lane / 4;
  bool valid[Tile::m_tiles][2];
#pragma unroll
  for (int m = 0; m < Tile::m_tiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = first_pixel + m * 16 + half * 8;
      valid[m][half] = ptx::inside(at.y + pixel / kConvW, a.conv_h) && ptx::inside(at.x + pixel % kConvW, a.conv_w);
    }
  }
#pragma unroll
  for (int column = 0; column < kOutputs / 8; ++column) {
    const int k = column * 8 + lane % 4 * 2;
    const float scales[2] = {scale[k], scale[k + 1]}, shifts[2] = {scale[kOutputs + k], scale[kOutputs + k + 1]};
#pragma unroll
    for (int m = 0; m < Tile::m_tiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Two<T> two;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          two.values[i] = from_float<T>(fmaf(sums[m][column][half * 2 + i], scales[i], shifts[i]));
        }
        std::uint32_t of_two[words];
        memcpy(of_two, &two, sizeof(two));
#pragma unroll
        for (std::uint32_t& word : of_two) word = valid[m][half] ? max_words<T>(word, 0) : 0;
        T* to = staged + (first_pixel + m * 16 + half * 8) * Tile::staged_pitch + k;
        store_raw<std::conditional_t<words == 1, std::uint32_t, uint2>>(reinterpret_cast<unsigned char*>(to), of_two);
      }
    }
  }
}

// 3x3 stride 2 maxima of the staged pixels into the output.
template <typename T, typename Tile>
__device__ __forceinline__ void pool(const Stem& a, const Place& at, const T* staged) {
  constexpr int packs = kOutputs / Pack<T>::size;
  T* out = static_cast<T*>(a.out);
  const bool whole_packs = a.k % Pack<T>::size == 0 && reinterpret_cast<std::uintptr_t>(out) % 16 == 0;
  for (int index = static_cast<int>(threadIdx.x); index < Tile::pooled_h * kPooledW * packs; index += kThreads) {
    const int within = index % packs * Pack<T>::size, q = index / packs % kPooledW, p = index / packs / kPooledW;
    const int k = at.k + within;
    if (!ptx::inside(at.p + p, a.pooled_h) || !ptx::inside(at.q + q, a.pooled_w) || !ptx::inside(k, a.k)) continue;
    const T* window = staged + (2 * p * kConvW + 2 * q) * Tile::staged_pitch + within;
    std::uint32_t largest[4] = {};
#pragma unroll
    for (int position = 0; position < 9; ++position) {
      const uint4 words =
          *reinterpret_cast<const uint4*>(window + (position / 3 * kConvW + position % 3) * Tile::staged_pitch);
      largest[0] = max_words<T>(largest[0], words.x);
      largest[1] = max_words<T>(largest[1], words.y);
      largest[2] = max_words<T>(largest[2], words.z);
      largest[3] = max_words<T>(largest[3], words.w);
    }
    Pack<T> result;
    memcpy(&result, largest, sizeof(result));
    T* to = out + ((static_cast<std::int64_t>(at.n) * a.pooled_h + at.p + p) * a.pooled_w + at.q + q) * a.k + k;
    if (whole_packs) {
      store_pack(to, result);
    } else {
#pragma unroll
      for (int i = 0; i < Pack<T>::size; ++i) {
        if (ptx::inside(k + i, a.k)) to[i] = result.values[i];
      }
    }
  }
}

template <typename T, int SQUARE, typename Tile>
__global__ void __launch_bounds__(kThreads, Tile::blocks)
    stem_kernel(const __grid_constant__ Stem a, Layout layout, int tiles_h, int tiles_w, int k_blocks) {
  unsigned char* shared = ptx::shared_memory<unsigned char>();
  unsigned char* weights = shared;
  unsigned char* patch = shared + Tile::weight_bytes;
  float* scale = reinterpret_cast<float*>(shared + Tile::scale_offset);
  const Place at = place_of<Tile>(a, tiles_h, tiles_w, k_blocks);

  start_weights<T, Tile>(a, at, weights);
  for (int index = static_cast<int>(threadIdx.x); index < 2 * kOutputs; index += kThreads) {
    const int k = at.k + index % kOutputs;
    scale[index] = ptx::inside(k, a.k) ? (index < kOutputs ? a.scale : a.shift)[k] : 0.0f;
  }
  const bool not_finite =
      a.bytes ? load_patch<T, Tile, unsigned char>(a, at, layout, patch) : load_patch<T, Tile, T>(a, at, layout, patch);
  ptx::cp_async_wait<0>();
  if constexpr (std::is_same_v<T, float>) round_weights<Tile>(weights);
  if (__syncthreads_or(not_finite)) {  // and everything is in shared memory
    exact_tile<T, SQUARE, Tile>(a, at, weights, patch, scale);
    return;
  }

  float sums[Tile::m_tiles][kOutputs / 8][4];
  convolve<T, Tile>(weights, patch, sums);
  __syncthreads();  // all warps have read weights and patch
  T* staged = reinterpret_cast<T*>(shared);
  stage<T, Tile>(a, at, scale, sums, staged);
  __syncthreads();  // all pixels are staged
  pool<T, Tile>(a, at, staged);
}

// Tiles of 7x8 pooled pixels: the 56x56 of an image of 224 are 56 of them, with no waste. Where that makes too few
// blocks for a GPU, tiles of 3x8.
inline constexpr int kPooledH = 7, kFewPooledH = 3;
inline constexpr std::int64_t kEnoughBlocks = 256;

inline Layout layout_of(const Stem& a) {
  const std::size_t size = a.bytes ? 1 : item_size(a.precision);
  const bool even = a.w % 2 == 0 && a.stride_h % 2 == 0 && a.stride_n % 2 == 0 &&
                    reinterpret_cast<std::uintptr_t>(a.x) % (2 * size) == 0;
  if (even && a.stride_c == 1 && a.stride_w == 3) return Layout::interleaved;
  if (even && a.stride_w == 1 && a.stride_c % 2 == 0) return Layout::planar;
  return Layout::any;
}

template <typename T, int SQUARE, int POOLED_H>
cudaError_t launch_tiles(const Stem& a, cudaStream_t stream) {
  using TileOf = Tile<T, SQUARE, POOLED_H>;
  const int tiles_h = static_cast<int>(ceil_div(a.pooled_h, POOLED_H));
  const int tiles_w = static_cast<int>(ceil_div(a.pooled_w, kPooledW));
  const int k_blocks = static_cast<int>(ceil_div(a.k, kOutputs));
  const std::int64_t blocks = static_cast<std::int64_t>(a.n) * tiles_h * tiles_w * k_blocks;
  return launch(stem_kernel<T, SQUARE, TileOf>, blocks, kThreads, TileOf::shared_bytes, stream, a, layout_of(a),
                tiles_h, tiles_w, k_blocks);
}

template <typename T, int SQUARE>
cudaError_t launch_squares(const Stem& a, cudaStream_t stream) {
  const std::int64_t blocks = static_cast<std::int64_t>(a.n) * ceil_div(a.pooled_h, kPooledH) *
                              ceil_div(a.pooled_w, kPooledW) * ceil_div(a.k, kOutputs);
  return blocks >= kEnoughBlocks ? launch_tiles<T, SQUARE, kPooledH>(a, stream)
                                 : launch_tiles<T, SQUARE, kFewPooledH>(a, stream);
}

template <typename T>
cudaError_t launch_stem(const Stem& a, cudaStream_t stream) {
  return a.c == 3 ? launch_squares<T, 12>(a, stream) : launch_squares<T, 16>(a, stream);
}

}  // namespace resnet_fast::stem_tile
