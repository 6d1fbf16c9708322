// head: out[n, k] = sum over c of mean over pixels of x[n, pixel, c] * weight[k, c] + bias[k], on sm_80 and up.
//
// Floor: x and the weights read once from memory; the arithmetic is nothing.
//
// Tile: a block of 32 warps owns 1 to 8 images by 16 to 512 outputs and walks over the channels in slices, whose means
// it holds in shared memory:
//
//   pool:     the warps share out (image, step), a step being 64 bytes of channels. Lane 4 g + t sums 16 bytes of them,
//             pack t, over the pixels g, g + 8, ...; the eight lanes of a pack then add up and keep a channel each.
//   product:  a warp has 16 outputs, and of the slice every so many steps if others have the same outputs. Lane 4 g + t
//             reads pack t of the weights' rows g and g + 8. With outputs as the rows, eight images cost matrix units
//             as much as one.
//
// The warps' sums meet in shared memory and are added in a fixed order. Nothing passes between blocks, so each block of
// outputs pools its images anew, from the level-2 cache; what blocks fetch from there bounds the kernel (choose_tile).
//
// The means are rounded to the type of the weights, as torch's own pool and the Triton kernel do; float32 is multiplied
// by plain multiply-adds, under tf32 too.
//
// Traps
// - Blocks of the same images must run at the same time, or their pixels come from memory again: outputs vary fastest.
// - Channels behind the last are zeros in the means and in the weights, since either may be NaN on the other side.
#include "kernels/head.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "launch.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace resnet_fast {
namespace {

constexpr int kWarps = 32;
constexpr int kThreads = 32 * kWarps;
constexpr int kImages = 8;      // most of a block; columns of ptx::mma
constexpr int kRows = 16;       // outputs of a warp; rows of ptx::mma
constexpr int kLaneGroups = 8;  // of four lanes
constexpr int kSteps = 64;      // of a slice

// Loads of a lane that are on their way at once, where there are as many: pixels of the pool (7x7 are 6 for each of the
// eight groups and one more), steps of the product, of two rows each. Elements one by one are several loads anyway, for
// which more would not leave enough registers.
template <bool ALIGNED>
constexpr int kPixels = ALIGNED ? 6 : 1;
template <bool ALIGNED>
constexpr int kUnrolled = ALIGNED ? 2 : 1;

template <typename T>
constexpr int kStep = 4 * Pack<T>::size;  // channels
// From an image's means to the next: an odd number of steps, so that two images lie in different halves of the banks.
template <typename T>
constexpr int kPitch = (kSteps + 1) * kStep<T>;

constexpr std::size_t kSharedBytes = kImages * (kSteps + 1) * 64;
constexpr int kSums = kRows * kImages;  // of a warp
static_assert(kWarps * kSums * sizeof(float) <= kSharedBytes && kSharedBytes <= kUnaskedSharedMemory);

struct Tile {
  int images, outputs;
};

struct Lane {
  int group, pack;
};

// 16 bytes of a row, of which `from` is at `channel`, itself inside; zeros for channels behind the last. They stay
// words until they are used: as two-byte elements the compiler would hold each in a register of its own.
template <bool ALIGNED, typename T>
__device__ __forceinline__ uint4 load_channels(const T* from, int channel, int c) {
  if constexpr (ALIGNED) {
    return *reinterpret_cast<const uint4*>(from);
  } else {
    Pack<T> pack{};
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) {
      if (ptx::inside(channel + i, c)) pack.values[i] = from[i];
    }
    uint4 words;
    memcpy(&words, &pack, sizeof(words));
    return words;
  }
}

template <typename T>
__device__ __forceinline__ Pack<T> pack_of(const uint4& words) {
  Pack<T> pack;
  memcpy(&pack, &words, sizeof(words));
  return pack;
}

// Adds `values` of the eight lanes with the same pack; returns the total of values[group % SIZE].
template <int SIZE>
__device__ __forceinline__ float total_of_groups(float (&values)[SIZE], int group) {
#pragma unroll
  for (int half = SIZE / 2; half > 0; half /= 2) {
    const bool upper = (group & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? values[i + half] : values[i];
      const float given = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, given, 4 * half);
    }
  }
#pragma unroll
  for (int apart = SIZE; apart < kLaneGroups; apart *= 2) {
    values[0] += __shfl_xor_sync(0xffffffffu, values[0], 4 * apart);
  }
  return values[0];
}

// The means of the block's images from first_image on, over `steps` steps of channels from first_channel on.
template <typename T, bool ALIGNED>
__device__ __forceinline__ void pool(const Head& a, int images, int first_image, int first_channel, int steps,
                                     Lane lane, T* means) {
  constexpr int size = Pack<T>::size;
  const T* x = static_cast<const T*>(a.x);
  for (int index = static_cast<int>(threadIdx.x) / 32; index < images * steps; index += kWarps) {
    const int image = index / steps, offset = index % steps * kStep<T> + lane.pack * size;
    const int channel = first_channel + offset;
    const bool valid = ptx::inside(first_image + image, a.n) && ptx::inside(channel, a.c);
    const T* from = x + (valid ? static_cast<std::int64_t>(first_image + image) * a.pixels * a.c + channel : 0);
    float sums[size] = {};
    const auto add = [&]<int COUNT>(int pixel) {
      uint4 words[COUNT];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        words[i] =
            load_channels<ALIGNED>(from + static_cast<std::int64_t>(pixel + i * kLaneGroups) * a.c, channel, a.c);
      }
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const Pack<T> pack = pack_of<T>(words[i]);
#pragma unroll
        for (int j = 0; j < size; ++j) sums[j] += to_float(pack.values[j]);
      }
    };
    int pixel = lane.group;
    for (; ptx::inside(pixel + (kPixels<ALIGNED> - 1) * kLaneGroups, a.pixels);
         pixel += kPixels<ALIGNED> * kLaneGroups) {
      add.template operator()<kPixels<ALIGNED>>(pixel);
    }
#pragma unroll 1
    for (; ptx::inside(pixel, a.pixels); pixel += kLaneGroups) add.template operator()<1>(pixel);
    const int kept = offset + lane.group % size;
    const float mean = total_of_groups(sums, lane.group) / static_cast<float>(a.pixels);
    means[image * kPitch<T> + kept] = from_float<T>(ptx::inside(first_channel + kept, a.c) ? mean : 0.0f);
  }
}

// What a warp adds up: 16 outputs by 8 images, in the end as ptx::mma lays out its d.
template <typename T>
struct Sums {
  float d[4] = {};

  // `means` are image 0's, of this lane's pack. Columns of no image are what memory held: no other column sees them.
  __device__ __forceinline__ void add(const uint4& row, const uint4& row_8, const T* means, int, Lane lane) {
    const uint4 mean = *reinterpret_cast<const uint4*>(means + lane.group * kPitch<T>);
    // In which order a product takes its channels is free, so a lane's are eight neighbours rather than four pairs.
    ptx::mma<T>(d, {row.x, row_8.x, row.y, row_8.y}, {mean.x, mean.y});
    ptx::mma<T>(d, {row.z, row_8.z, row.w, row_8.w}, {mean.z, mean.w});
  }
  __device__ __forceinline__ void finish(Lane) {}
};

template <>
struct Sums<float> {
  float d[4];
  float partial[2][kImages] = {};  // rows group and group + 8, over this lane's channels

  __device__ __forceinline__ void add(const uint4& row, const uint4& row_8, const float* means, int images, Lane) {
    const Pack<float> weights = pack_of<float>(row), weights_8 = pack_of<float>(row_8);
#pragma unroll
    for (int image = 0; image < kImages; ++image) {
      if (image >= images) break;
      const Pack<float> mean = load_pack(means + image * kPitch<float>);
#pragma unroll
      for (int i = 0; i < Pack<float>::size; ++i) {
        partial[0][image] += weights.values[i] * mean.values[i];
        partial[1][image] += weights_8.values[i] * mean.values[i];
      }
    }
  }
  __device__ __forceinline__ void finish(Lane lane) {
#pragma unroll
    for (int image = 0; image < kImages; ++image) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float total = partial[row][image];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        if (image / 2 == lane.pack) d[2 * row + image % 2] = total;
      }
    }
  }
};

template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads) pool_and_multiply(const Head a, const Tile tile) {
  constexpr int size = Pack<T>::size;
  T* means = ptx::shared_memory<T>();            // [kImages][kPitch]
  float* sums_of = ptx::shared_memory<float>();  // afterwards: [kWarps][kImages][kRows]

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const Lane lane{thread % 32 / 4, thread % 4};
  const int tiles = (a.k - 1) / tile.outputs + 1;
  const int first_image = static_cast<int>(blockIdx.x) / tiles * tile.images;
  const int first_output = static_cast<int>(blockIdx.x) % tiles * tile.outputs;

  const int row_tiles = tile.outputs / kRows, splits = kWarps / row_tiles;
  const int output = first_output + warp % row_tiles * kRows + lane.group;
  // Outputs behind the last are computed with the first one's weights and not stored.
  const T* weight = static_cast<const T*>(a.weight);
  const T* row = weight + (ptx::inside(output, a.k) ? static_cast<std::int64_t>(output) * a.c : 0);
  const T* row_8 = weight + (ptx::inside(output + 8, a.k) ? static_cast<std::int64_t>(output + 8) * a.c : 0);

  Sums<T> sums;
  for (int first = 0; first < a.c; first += kSteps * kStep<T>) {
    const int steps = min(kSteps, (a.c - first - 1) / kStep<T> + 1);
    pool<T, ALIGNED>(a, tile.images, first_image, first, steps, lane, means);
    __syncthreads();
    const auto multiply = [&]<int COUNT>(int step) {
      uint4 words[COUNT][2];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const int channel = first + (step + i * splits) * kStep<T> + lane.pack * size;
        const bool valid = ptx::inside(channel, a.c);
        words[i][0] = load_channels<ALIGNED>(row + (valid ? channel : 0), channel, a.c);
        words[i][1] = load_channels<ALIGNED>(row_8 + (valid ? channel : 0), channel, a.c);
        if (!valid) words[i][0] = words[i][1] = uint4{};
      }
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const T* mean = means + (step + i * splits) * kStep<T> + lane.pack * size;
        sums.add(words[i][0], words[i][1], mean, tile.images, lane);
      }
    };
    int step = warp / row_tiles;
    for (; step + (kUnrolled<ALIGNED> - 1) * splits < steps; step += kUnrolled<ALIGNED> * splits) {
      multiply.template operator()<kUnrolled<ALIGNED>>(step);
    }
    for (; step < steps; step += splits) multiply.template operator()<1>(step);
    __syncthreads();
  }
  sums.finish(lane);

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int image = 2 * lane.pack + i % 2;
    sums_of[warp * kSums + image * kRows + lane.group + i / 2 * 8] = sums.d[i];
  }
  __syncthreads();
  for (int index = thread; index < tile.images * tile.outputs; index += kThreads) {
    const int image = index / tile.outputs, of_tile = index % tile.outputs;
    if (!ptx::inside(first_image + image, a.n) || !ptx::inside(first_output + of_tile, a.k)) continue;
    const float* from = sums_of + of_tile / kRows * kSums + image * kRows + of_tile % kRows;
    float y = 0.0f;
    for (int split = 0; split < splits; ++split) y += from[split * row_tiles * kSums];
    if (a.bias != nullptr) y += a.bias[first_output + of_tile];
    static_cast<T*>(a.out)[static_cast<std::int64_t>(first_image + image) * a.k + first_output + of_tile] =
        from_float<T>(y);
  }
}

// The tile whose launch should take the least time, which is that of the rows, of pixels and of weights, that blocks
// fetch from the level-2 cache. A multiprocessor gets 64 bytes a cycle from there, and all of them together about half
// as much each.
Tile choose_tile(const Head& a, int multiprocessors) {
  Tile best{};
  double least = std::numeric_limits<double>::infinity();
  for (int images = 1; images <= kImages; images *= 2) {
    for (int outputs = kRows; outputs <= kRows * kWarps; outputs *= 2) {
      const std::int64_t blocks = ceil_div(a.n, images) * ceil_div(a.k, outputs);
      const std::int64_t busiest = ceil_div(blocks, multiprocessors);
      const std::int64_t rows = static_cast<std::int64_t>(images) * a.pixels + outputs;
      const double time = static_cast<double>(rows) * std::max(busiest * multiprocessors, 2 * blocks);
      if (time < least) {
        least = time;
        best = {images, outputs};
      }
    }
  }
  return best;
}

template <typename T>
cudaError_t launch_head(const Head& a, int multiprocessors, cudaStream_t stream) {
  const Tile tile = choose_tile(a, multiprocessors);
  const std::int64_t blocks = ceil_div(a.n, tile.images) * ceil_div(a.k, tile.outputs);
  const bool aligned = a.c % Pack<T>::size == 0 && aligned_to_16(a.x, a.weight);
  return launch(aligned ? pool_and_multiply<T, true> : pool_and_multiply<T, false>, blocks, kThreads, kSharedBytes,
                stream, a, tile);
}

}  // namespace

std::size_t head_workspace(int, int, int, int, Precision, int) { return 0; }

cudaError_t head(const Head& a, int multiprocessors, cudaStream_t stream) {
  if (a.n == 0 || a.k == 0) return cudaSuccess;
  switch (a.precision) {
    case Precision::fp16:
      return launch_head<__half>(a, multiprocessors, stream);
    case Precision::bf16:
      return launch_head<__nv_bfloat16>(a, multiprocessors, stream);
    case Precision::tf32:
    case Precision::fp32:
      return launch_head<float>(a, multiprocessors, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace resnet_fast
