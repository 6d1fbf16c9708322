// conv_bn_act for capability 8.0 and up, the masked kernel: the same product with elements loaded and stored one by
// one, so it computes every problem: any number of channels, any groups, any alignment. Not made to be fast:
// conv_bn_act_sm80.cuh is, where its conditions hold.
//
// Floor: as there; this kernel does not come near it. An element costs a load instruction, a bounds check in each
// direction and a store to shared memory, where the vector kernel moves 16 bytes for as much.
//
// Tile: 64 pixels x BLOCK_N channels in steps of 32 of the depth, which is walked flat over (r, s, c): 3 channels waste
// nothing. Lane l of a warp takes position l of the step for one row after another, so the channels of a pixel are
// read side by side. Tile t + 1 travels in registers while tile t is multiplied; two stages in shared memory.
//
// Trap: a group's sums must not meet another group's values, not even times zero (NaN), so a group of 4 output
// channels uses 4 columns of the 16 of its tile.
#pragma once

#include "kernels/conv_bn_act_sm80_tile.cuh"
#include "launch.cuh"

namespace resnet_fast::sm80 {

// Where a pixel's window begins. h is INT_MIN, in no image whatever the tap, for a pixel behind the last.
struct alignas(16) Window {
  std::int64_t offset;  // of tap (0, 0), channel 0 of the group, from x; outside of x where the padding is
  int h, w;
};

template <typename T, int BLOCK_N, int WARPS_M, int WARPS_N>
struct MaskedTile : Tile<T, 64, BLOCK_N, 32, WARPS_M, WARPS_N> {
  using Base = Tile<T, 64, BLOCK_N, 32, WARPS_M, WARPS_N>;
  static constexpr int stages = 2;
  static constexpr int windows_offset = stages * Base::stage_bytes;
  static constexpr int shared_bytes = windows_offset + Base::block_m * static_cast<int>(sizeof(Window));
  static constexpr int warps = Base::threads / 32;
  static constexpr int a_loads = Base::block_m / warps, b_loads = BLOCK_N / warps;
  static_assert(Base::block_k == 32, "one lane for each position");
};

template <class V>
__global__ void __launch_bounds__(V::threads) conv_bn_act_masked(const Arguments a) {
  using T = typename V::Element;
  unsigned char* const shared = ptx::shared_memory<unsigned char>();
  Window* const windows = reinterpret_cast<Window*>(shared + V::windows_offset);
  const int thread = static_cast<int>(threadIdx.x);
  const Place place(a, static_cast<int>(blockIdx.x), V::block_m, V::block_n);
  const int first_k = place.group * a.group_k + place.k;  // among all channels

  for (int row = thread; row < V::block_m; row += V::threads) {
    const std::int64_t m = place.pixel + row;
    const std::int64_t image = static_cast<std::int64_t>(a.p) * a.q;
    const std::int64_t n = m / image, rest = m - n * image;
    const int p = static_cast<int>(rest / a.q), q = static_cast<int>(rest - static_cast<std::int64_t>(p) * a.q);
    const int h = p * a.stride_h - a.pad_h, w = q * a.stride_w - a.pad_w;
    windows[row] = {((n * a.h + h) * a.w + w) * a.c + place.group * a.group_c, ptx::inside(m, a.pixels) ? h : INT_MIN,
                    w};
  }
  __syncthreads();

  const int warp = thread / 32, position = thread % 32;
  const T* const x = static_cast<const T*>(a.x);
  const T* const weight = static_cast<const T*>(a.weight);
  const int tiles = (a.depth + V::block_k - 1) / V::block_k;
  T a_values[V::a_loads], b_values[V::b_loads];
  const auto fetch = [&](int tile) {
    const int depth = tile * V::block_k + position;
    const bool in_depth = ptx::inside(depth, a.depth);
    const int tap = a.channels.quotient(depth);
    const int r = a.taps.quotient(tap);
    const int h = r * a.dilation_h, w = (tap - r * a.s) * a.dilation_w;
    const std::int64_t offset = (static_cast<std::int64_t>(h) * a.w + w) * a.c + depth - tap * a.group_c;
#pragma unroll
    for (int i = 0; i < V::a_loads; ++i) {
      const Window window = windows[warp + i * V::warps];
      const bool valid = in_depth && ptx::inside(window.h + h, a.h) && ptx::inside(window.w + w, a.w);
      a_values[i] = valid ? x[window.offset + offset] : from_float<T>(0.0f);
    }
#pragma unroll
    for (int i = 0; i < V::b_loads; ++i) {
      const int row = warp + i * V::warps;
      const bool valid = in_depth && ptx::inside(place.k + row, a.group_k);
      b_values[i] = valid ? weight[static_cast<std::int64_t>(first_k + row) * a.depth + depth] : from_float<T>(0.0f);
    }
  };
  const auto store = [&](unsigned char* stage, int row, T value) {
    const int offset = row * V::row_bytes + swizzled<V::units>(row, position / V::unit) * 16;
    reinterpret_cast<T*>(stage + offset)[position % V::unit] = value;
  };

  const typename V::Lane lane(thread);
  typename V::Sums sums = {};
  if (tiles > 0) fetch(0);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    unsigned char* const stage = shared + tile % 2 * V::stage_bytes;
#pragma unroll
    for (int i = 0; i < V::a_loads; ++i) store(stage, warp + i * V::warps, a_values[i]);
#pragma unroll
    for (int i = 0; i < V::b_loads; ++i) store(stage, V::block_m + warp + i * V::warps, b_values[i]);
    __syncthreads();  // also: everybody is done with tile - 1, whose stage the next iteration stores into
    if (tile + 1 < tiles) fetch(tile + 1);
#pragma unroll
    for (int step = 0; step < V::steps; ++step) {
      typename V::Fragments fragments;
      V::load(fragments, stage, lane, step);
      V::multiply(sums, fragments);
    }
  }

  const T* const residual = static_cast<const T*>(a.residual);
  T* const out = static_cast<T*>(a.out);
#pragma unroll
  for (int i = 0; i < V::mmas_m; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t m = place.pixel + lane.m + i * 16 + half * 8 + lane.group;
      const bool has_pixel = ptx::inside(m, a.pixels);
#pragma unroll
      for (int j = 0; j < V::mmas_n; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = lane.n + j * 8 + lane.pair * 2 + e;
          if (has_pixel && ptx::inside(place.k + column, a.group_k)) {
            const int k = first_k + column;
            const std::int64_t at = m * a.k + k;
            const float added = residual != nullptr ? to_float(residual[at]) : 0.0f;
            out[at] = from_float<T>(finish(sums[i][j][half * 2 + e], a.scale[k], a.shift[k], added, a));
          }
        }
      }
    }
  }
}

template <class V>
std::string unsupported_masked(const ConvBnAct& conv) {
  return unsupported_anywhere(conv, precision_of<typename V::Element>);
}

template <class V>
cudaError_t launch_masked(const ConvBnAct& conv, cudaStream_t stream) {
  if (pixels(conv) == 0 || conv.k == 0) return cudaSuccess;
  const Arguments a = make_arguments(conv, V::block_n);
  const std::int64_t blocks = ceil_div(a.pixels, V::block_m) * a.columns.value;
  return launch(conv_bn_act_masked<V>, blocks, V::threads, V::shared_bytes, stream, a);
}

template <class V>
ConvBnActKernel masked_kernel() {
  return described<V>("masked_", "", unsupported_masked<V>, launch_masked<V>);
}

}  // namespace resnet_fast::sm80
