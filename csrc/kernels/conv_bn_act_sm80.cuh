// conv_bn_act for capability 8.0 and up, the vector kernel: an implicit GEMM on mma.sync whose operands travel in
// 16-byte copies. Needs channels in multiples of 16 bytes; conv_bn_act_sm80_masked.cuh computes the rest.
//
// M = N P Q pixels, N = K / groups output channels, depth R S C / groups.
//
// Floor: x, weight and residual read once, out written once, or 2 N P Q K R S C / groups operations, whichever takes
// longer. Blocks that share pixels are neighbours in the grid, so x comes from memory once and then from the level-2
// cache, as the weights do.
//
// Tile: BLOCK_M pixels x BLOCK_N channels, in steps of BLOCK_K of the depth:
//
//   memory ── 16-byte cp.async ──> STAGES stages in shared memory ── ldmatrix ──> registers, twice ── mma ──> sums
//                                   [x: BLOCK_M rows][weight: BLOCK_N rows], 64 or 128 bytes a row, swizzled
//
//   out tile <── scale, shift, residual, ReLU on the sums ──> shared memory ── 16-byte stores ──> memory
//
// The depth is walked flat: 16 bytes lie within one tap, since a group's channels are a multiple of them, so a thread
// keeps one position (r, s, c) for its column of 16 bytes and one position for each of its pixels. Few channels (8 in a
// group) then cost no padding. What lies outside the image are bits of a mask made once per pixel: row tap r in bit r,
// column tap s in bit 16 + s. A load costs two additions and one test.
//
// The residual is loaded as if it were the tiles behind the last one, into stages that are free by then: a layer of
// one or two steps (1x1 with 64 channels) has it on the way before its first product. The tile of out takes its place.
//
// Traps: the stage that iteration t loads into is the one that iteration t - 1 multiplied, so the loads stand behind
// the barrier that ended that iteration. Stages behind the last tile hold stale or no data and are never multiplied.
#pragma once

#include "kernels/conv_bn_act_sm80_tile.cuh"
#include "launch.cuh"

namespace resnet_fast::sm80 {

// Taps as bits: row r in bit r, column s in bit 16 + s. Rows behind the last are shifted into the columns; by then the
// depth is at its end.
inline constexpr int kMostTaps = 15;  // in one direction; bit 15, or 31, is the one behind the last
inline constexpr std::uint32_t kRows = 0xffff, kColumns = 0xffff0000, kFirstColumn = 0x10000, kFirstTap = 0x10001;

template <typename T, int BLOCK_M, int BLOCK_N, int BLOCK_K, int STAGES, int WARPS_M, int WARPS_N, int BLOCKS>
struct VectorTile : Tile<T, BLOCK_M, BLOCK_N, BLOCK_K, WARPS_M, WARPS_N> {
  using Base = Tile<T, BLOCK_M, BLOCK_N, BLOCK_K, WARPS_M, WARPS_N>;
  static constexpr int stages = STAGES;
  static constexpr int scale_offset = STAGES * Base::stage_bytes;
  static constexpr int shared_bytes = scale_offset + 2 * BLOCK_N * static_cast<int>(sizeof(float));

  static constexpr int blocks = BLOCKS;  // at once on a multiprocessor: bounds the registers

  // Loads: thread t takes unit t % units of row t / units, and every load_rows-th row from there.
  static constexpr int load_rows = Base::threads / Base::units;
  static constexpr int a_loads = BLOCK_M / load_rows, b_loads = BLOCK_N / load_rows;
  static_assert(load_rows % 8 == 0, "the swizzle is to be the same in every row of a thread");
  static_assert(a_loads * load_rows == BLOCK_M && b_loads * load_rows == BLOCK_N);

  // The tile of out (and of the residual) lies in `slices` stages, slice_rows pixels in each.
  static constexpr int out_units = BLOCK_N / Base::unit;  // of 16 bytes, in a row
  static constexpr int out_row_bytes = out_units * 16;
  static constexpr int least_slices = (BLOCK_M * out_row_bytes + Base::stage_bytes - 1) / Base::stage_bytes;
  static constexpr int slices = least_slices <= 2 ? least_slices : 4;
  static constexpr int slice_rows = BLOCK_M / slices;
  static constexpr int out_rows = Base::threads / out_units;  // that all threads move at once
  static_assert(slices <= STAGES - 1, "the residual needs a stage for each slice while the last tile is multiplied");
  static_assert(slice_rows % 16 == 0 && slice_rows % out_rows == 0 && slice_rows * out_row_bytes <= Base::stage_bytes);

  // Two columns of a matrix instruction's output are 4 bytes, or 8 in float: then two units go together, so that the
  // four rows that one half of a warp touches fall into different banks.
  static __device__ __forceinline__ int out_offset(int row, int unit) {
    if constexpr (sizeof(T) == 4) {
      constexpr int pairs = out_units / 2;
      constexpr int most = pairs < 4 ? pairs : 4;
      return row * out_row_bytes + (unit ^ (row / (4 / most) % most * 2)) * 16;
    } else {
      return row * out_row_bytes + swizzled<out_units>(row, unit) * 16;
    }
  }
};

// Distances in units of 16 bytes.
struct Steps {
  int channels, depth;  // of a group's tap, of the whole dot product
  int pixel;            // from one pixel of x to the next
  // From behind the last channel of a tap to the next tap: in its row, and over the end of a row on top of that.
  int next_column, next_row;
  std::uint32_t behind_columns;  // the bit of column tap S
};

template <class V>
__global__ void __launch_bounds__(V::threads, V::blocks) conv_bn_act(const Arguments a, const Steps steps) {
  using T = typename V::Element;
  unsigned char* const shared = ptx::shared_memory<unsigned char>();
  float* const factors = reinterpret_cast<float*>(shared + V::scale_offset);  // scale, then shift
  const int thread = static_cast<int>(threadIdx.x);
  const Place place(a, static_cast<int>(blockIdx.x), V::block_m, V::block_n);
  const int first_k = place.group * a.group_k + place.k;  // among all channels

  // The part of the loads that is this thread's.
  const int load_unit = thread % V::units, load_row = thread / V::units;
  const int load_offset = load_row * V::row_bytes + swizzled<V::units>(load_row, load_unit) * 16;

  // Positions in x and weight count units of 16 bytes: 32 bits reach 16 GiB, and as far again outside of x.
  int pixel[V::a_loads];               // of tap (0, 0), channel 0 of the group; outside of x where the padding is
  std::uint32_t in_image[V::a_loads];  // bit r and bit 16 + s: tap r is in a row, tap s in a column of the image
#pragma unroll
  for (int i = 0; i < V::a_loads; ++i) {
    const std::int64_t m = place.pixel + load_row + i * V::load_rows;
    int position = static_cast<int>(m);  // of the pixel in x
    std::uint32_t mask = kFirstTap;
    if (!a.pointwise) {
      const int n = a.image.quotient(static_cast<int>(m));
      const int rest = static_cast<int>(m) - n * static_cast<int>(a.image.value);
      const int p = a.row.quotient(rest);
      const int q = rest - p * static_cast<int>(a.row.value);
      const int h = p * a.stride_h - a.pad_h, w = q * a.stride_w - a.pad_w;
      position = (n * a.h + h) * a.w + w;
      mask = 0;
#pragma unroll 1  // unrolled, these two loops would be a third of the kernel's code
      for (int r = 0; r < a.r; ++r) mask |= static_cast<std::uint32_t>(ptx::inside(h + r * a.dilation_h, a.h)) << r;
#pragma unroll 1
      for (int s = 0; s < a.s; ++s) {
        mask |= static_cast<std::uint32_t>(ptx::inside(w + s * a.dilation_w, a.w)) << (16 + s);
      }
    }
    pixel[i] = position * steps.pixel + place.group * steps.channels;
    in_image[i] = ptx::inside(m, a.pixels) ? mask : 0;
  }
  std::uint32_t has_channel = 0;  // bit i: there is an output channel for weight row i of this thread
#pragma unroll
  for (int i = 0; i < V::b_loads; ++i) {
    has_channel |= static_cast<std::uint32_t>(ptx::inside(place.k + load_row + i * V::load_rows, a.group_k)) << i;
  }

  // The position of this thread's unit: `depth` in the flat dot product, `c` in the channels of a tap, `x_offset`
  // behind a pixel's position.
  int depth = load_unit, c = load_unit, x_offset = load_unit;
  std::uint32_t tap = kFirstTap;  // bit r and bit 16 + s
  const int weight_offset = (first_k + load_row) * steps.depth;
  const auto carry = [&] {  // c behind the last channel: go on with the next taps
    while (c >= steps.channels) {
      c -= steps.channels;
      x_offset += steps.next_column;
      tap += tap & kColumns;
      if ((tap & kColumns) == steps.behind_columns) {
        tap = (tap & kRows) << 1 | kFirstColumn;
        x_offset += steps.next_row;
      }
    }
  };
  carry();

  // What this thread moves of the tile of out and of the residual.
  const int out_unit = thread % V::out_units, out_row = thread / V::out_units;
  const bool has_out_channel = ptx::inside(place.k + out_unit * V::unit, a.group_k);
  const std::int64_t out_offset = (place.pixel + out_row) * a.k + first_k + out_unit * V::unit;

  const int tiles = (a.depth + V::block_k - 1) / V::block_k;
  int write_stage = 0;
  // Starts the copies of a tile or, behind the last, of a slice of the residual.
  const auto start_copies = [&](int tile) {
    unsigned char* const stage = shared + write_stage * V::stage_bytes;
    if (tile < tiles) {
      const bool in_depth = ptx::inside(depth, steps.depth);
#pragma unroll
      for (int i = 0; i < V::a_loads; ++i) {
        ptx::cp_async<16>(stage + load_offset + i * V::load_rows * V::row_bytes,
                          static_cast<const T*>(a.x) + static_cast<std::int64_t>(pixel[i] + x_offset) * V::unit,
                          in_depth && (in_image[i] & tap) == tap);
      }
#pragma unroll
      for (int i = 0; i < V::b_loads; ++i) {
        ptx::cp_async<16>(
            stage + load_offset + (V::block_m + i * V::load_rows) * V::row_bytes,
            static_cast<const T*>(a.weight) +
                static_cast<std::int64_t>(weight_offset + i * V::load_rows * steps.depth + depth) * V::unit,
            in_depth && (has_channel >> i & 1) != 0);
      }
      depth += V::units;
      c += V::units;
      x_offset += V::units;
      carry();
    } else if (a.residual != nullptr && tile < tiles + V::slices) {
      const int slice_row = (tile - tiles) * V::slice_rows;
      const T* const residual = static_cast<const T*>(a.residual) + out_offset;
#pragma unroll 1  // unrolled, its addresses would take registers from the main loop
      for (int i = 0; i < V::slice_rows / V::out_rows; ++i) {
        const int row = slice_row + i * V::out_rows;
        ptx::cp_async<16>(stage + V::out_offset(out_row + i * V::out_rows, out_unit),
                          residual + static_cast<std::int64_t>(row) * a.k,
                          has_out_channel && ptx::inside(place.pixel + out_row + row, a.pixels));
      }
    }
    write_stage = write_stage + 1 == V::stages ? 0 : write_stage + 1;
    ptx::cp_async_commit();
  };

  // Four bytes each, since the vectors may be slices. They belong to the first tile's group.
  for (int i = thread; i < 2 * V::block_n; i += V::threads) {
    const int column = i % V::block_n;
    ptx::cp_async<4>(factors + i, (i < V::block_n ? a.scale : a.shift) + first_k + column,
                     ptx::inside(place.k + column, a.group_k));
  }
#pragma unroll 1
  for (int i = 0; i < V::stages - 1; ++i) start_copies(i);

  const typename V::Lane lane(thread);
  typename V::Sums sums = {};
  typename V::Fragments fragments[2];
  ptx::cp_async_wait<V::stages - 2>();
  __syncthreads();
  int read_stage = 0;
  V::load(fragments[0], shared, lane, 0);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
    for (int step = 0; step < V::steps; ++step) {
      if (step + 1 < V::steps) {
        V::load(fragments[(step + 1) % 2], shared + read_stage * V::stage_bytes, lane, step + 1);
      } else if (tile + 1 < tiles) {
        ptx::cp_async_wait<V::stages - 2>();
        __syncthreads();  // everybody's copies of the next tile are there, and this tile has been read
        read_stage = read_stage + 1 == V::stages ? 0 : read_stage + 1;
        V::load(fragments[0], shared + read_stage * V::stage_bytes, lane, 0);
      }
      if (step == 0) start_copies(tile + V::stages - 1);
      V::multiply(sums, fragments[step % 2]);
    }
  }

  // Slice i of the residual, and of out, is in the stage of tile tiles + i, which the last tile does not use.
  if (a.residual != nullptr) {
    ptx::cp_async_wait<0>();
    __syncthreads();
  }
  const auto slice = [&](int i) { return shared + (tiles + i) % V::stages * V::stage_bytes; };
#pragma unroll
  for (int i = 0; i < V::mmas_m; ++i) {
    const int row = lane.m + i * 16 + lane.group;
    unsigned char* const rows = slice(row / V::slice_rows);
#pragma unroll
    for (int j = 0; j < V::mmas_n; ++j) {
      const int column = lane.n + j * 8 + lane.pair * 2;
      const float scale[2] = {factors[column], factors[column + 1]};
      const float shift[2] = {factors[V::block_n + column], factors[V::block_n + column + 1]};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* const to = reinterpret_cast<T*>(rows + V::out_offset(row % V::slice_rows + half * 8, column / V::unit)) +
                      column % V::unit;
        Pair<T> pair{};
        if (a.residual != nullptr) pair = load_pair(to);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          pair.values[e] =
              from_float<T>(finish(sums[i][j][half * 2 + e], scale[e], shift[e], to_float(pair.values[e]), a));
        }
        store_pair(to, pair);
      }
    }
  }
  __syncthreads();
  T* const out = static_cast<T*>(a.out) + out_offset;
#pragma unroll
  for (int row = 0; row < V::block_m; row += V::out_rows) {
    if (has_out_channel && ptx::inside(place.pixel + out_row + row, a.pixels)) {
      const unsigned char* const from =
          slice(row / V::slice_rows) + V::out_offset(out_row + row % V::slice_rows, out_unit);
      *reinterpret_cast<uint4*>(out + static_cast<std::int64_t>(row) * a.k) = *reinterpret_cast<const uint4*>(from);
    }
  }
}

template <class V>
std::string unsupported(const ConvBnAct& conv) {
  if (std::string reason = unsupported_anywhere(conv, precision_of<typename V::Element>); !reason.empty()) {
    return reason;
  }
  const int group_c = conv.c / conv.groups, group_k = conv.k / conv.groups;
  const std::string multiple = std::to_string(V::unit);
  if (group_c == 0 || group_c % V::unit != 0) {
    return std::to_string(group_c) + " input channels in a group; it needs a multiple of " + multiple;
  }
  if (group_k % V::unit != 0) {
    return std::to_string(group_k) + " output channels in a group; it needs a multiple of " + multiple;
  }
  if (conv.r > kMostTaps || conv.s > kMostTaps) {
    return "a window of " + std::to_string(conv.r) + "x" + std::to_string(conv.s) + "; it takes up to " +
           std::to_string(kMostTaps) + " each way";
  }
  if (std::int64_t{conv.n} * conv.h * conv.w * conv.c / V::unit > INT_MAX / 2 ||
      conv.k * depth(conv) / V::unit > INT_MAX / 2) {
    return "x or weight has 16 GiB or more";
  }
  const std::int64_t padded = (conv.h + std::int64_t{2} * conv.pad_h) * (conv.w + std::int64_t{2} * conv.pad_w);
  if (padded > INT_MAX / 2 / std::max(conv.c / V::unit, 1)) return "a padded image of 16 GiB or more";
  if (pixels(conv) > INT_MAX - V::block_m) return "2^31 output pixels or more";
  for (const void* pointer : {conv.x, conv.weight, conv.residual, static_cast<const void*>(conv.out)}) {
    if (reinterpret_cast<std::uintptr_t>(pointer) % 16 != 0) return "a tensor that is not aligned to 16 bytes";
  }
  return "";
}

template <class V>
cudaError_t launch_conv(const ConvBnAct& conv, cudaStream_t stream) {
  if (pixels(conv) == 0 || conv.k == 0) return cudaSuccess;
  const Arguments a = make_arguments(conv, V::block_n);
  const int channels = a.group_c / V::unit, pixel = a.c / V::unit;
  const Steps steps{channels,
                    a.depth / V::unit,
                    pixel,
                    a.dilation_w * pixel - channels,
                    (a.dilation_h * a.w - a.s * a.dilation_w) * pixel,
                    std::uint32_t{1} << (16 + a.s)};
  const std::int64_t blocks = ceil_div(a.pixels, V::block_m) * a.columns.value;
  return launch(conv_bn_act<V>, blocks, V::threads, V::shared_bytes, stream, a, steps);
}

template <class V>
ConvBnActKernel vector_kernel() {
  return described<V>("", std::string("_") + std::to_string(V::stages), unsupported<V>, launch_conv<V>);
}

}  // namespace resnet_fast::sm80
