// batch_norm_act: training BatchNorm + residual + ReLU over [rows, c], in passes over memory that a grid has to end
// between: the statistics, then the output; backward two sums a channel, then the gradients. Layouts and copies are the
// op's business. Ioffe & Szegedy 2015, arXiv:1502.03167.
//
// Floor: the bytes of the tensors over the memory's bandwidth. statistics reads x; apply reads x (and the residual) and
// writes out; reduce reads grad, x and output; backward the same and writes grad_x (and grad_residual). Arithmetic is
// 4 to 12 instructions an element, of the 19 that 16-bit elements leave an H100 at 3 TB/s.
//
// Tile: the rows are cut into slices, the channels into columns of up to 32 packs of 16 bytes; a block of 256 threads
// owns one slice of one column. Neighbouring threads have neighbouring packs of a row, so a warp reads 512 bytes that
// lie together (four rows of 64 16-bit channels, or a part of a longer row). A thread keeps to its pack of channels,
// with what belongs to them in registers, and walks down the slice with 2 or 4 rows on their way at once:
//
//            column 0     column 1         thread t: pack t % width, rows t / width + k * lanes, lanes = 256 / width
//   slice 0  [block 0]    [block 1]
//   slice 1  [block 2]    [block 3]
//
// What is not a multiple of 16 bytes, in channels or in addresses, goes through the same kernels with packs of one.
//
// Sums: of a thread's rows in order, of a block's threads as a tree in shared memory, of the slices (their results are
// the workspace) by a second small launch in the same way. The order depends on the sizes alone.
//
// Variance: the sum of squared deviations from the mean, merged by Chan, Golub and LeVeque's formula (1983): four rows
// into a thread's, threads' into a block's, all from d = x - origin, origin being x's first row. Sums of d^2 would need
// a shift near the mean: one that is z deviations away costs a factor of 1 + z^2 in rounding errors, and a row that is
// an outlier is far away. The origin need not be near: it only keeps digits where |mean| >> deviation, and z is at most
// the root of the number of rows. Slices are merged in double, where plain sums have digits enough. An origin that is
// NaN or infinite is taken as 0, so that an infinite x makes the mean infinite rather than NaN.
//
// No rows, which torch refuses: the mean and variance of nothing are NaN, the sums are 0. One row: an unbiased variance
// of 0 / 0, NaN, as in torch.
//
// Trap: out may be x or the residual, so nothing is __restrict__, and a row's loads stand before its stores.
#include "kernels/batch_norm_act.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "launch.cuh"
#include "numeric.cuh"

namespace resnet_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kMostLog2Width = 5;   // of a column, in packs: 512 bytes
constexpr int kBlocks = 1056;       // aimed at: 8 for each multiprocessor of an H100
constexpr int kLeastRows = 32;      // of a slice: the workspace is at most an eighth of 16-bit x
constexpr int kMergedChannels = 8;  // by a block: 64 bytes of each slice's results
constexpr int kMergedRows = 8;      // slices that a thread has on their way

struct Tiling {
  int log2_width;  // of a column, in packs
  int columns;     // of the channels
  int slices;      // of the rows
  std::int64_t slice_rows;
};

// Slices do not depend on `size`, channels per access, since the workspace is not to depend on addresses.
Tiling tiling(std::int64_t rows, int c, Precision precision, int size) {
  const auto columns = [c](int channels) { return static_cast<int>(ceil_div(c, channels)); };
  const int wide_columns = columns((16 << kMostLog2Width) / static_cast<int>(item_size(precision)));
  const std::int64_t most_slices =
      std::clamp<std::int64_t>(ceil_div(rows, kLeastRows), 1, std::max(1, kBlocks / wide_columns));
  const std::int64_t slice_rows = std::max<std::int64_t>(1, ceil_div(rows, most_slices));
  const int log2_width =
      std::min(kMostLog2Width, static_cast<int>(std::bit_width(static_cast<unsigned>(columns(size) - 1))));
  return {log2_width, columns(size << log2_width), static_cast<int>(ceil_div(rows, slice_rows)), slice_rows};
}

// What a thread works on: some channels in every lanes-th row of a slice, which has less than 2^31 rows because a
// tensor of 1056 times that is larger than any memory.
struct Place {
  int slice, rows, lane, lanes, channel, c;
  bool has_channels;
  std::int64_t begin;  // the slice's first row

  __device__ __forceinline__ std::int64_t index(int row) const { return (begin + row) * c + channel; }
};

template <int SIZE>
__device__ __forceinline__ Place place(const Tiling& tiling, std::int64_t rows, int c) {
  const int slice = static_cast<int>(blockIdx.x) / tiling.columns;
  const int column = static_cast<int>(blockIdx.x) % tiling.columns;
  const int thread = static_cast<int>(threadIdx.x), width = 1 << tiling.log2_width;
  const int channel = (column * width + (thread & (width - 1))) * SIZE;
  const std::int64_t begin = slice * tiling.slice_rows;
  return {slice,
          static_cast<int>(min(tiling.slice_rows, rows - begin)),
          thread >> tiling.log2_width,
          kThreads >> tiling.log2_width,
          channel,
          c,
          ptx::inside(channel, c),
          begin};
}

// Calls body(row, valid) for the thread's rows, ROWS at a time: row + i * lanes is one of them if valid[i].
template <int ROWS, typename Body>
__device__ __forceinline__ void for_rows(const Place& at, Body body) {
  if (!at.has_channels) return;
  for (int row = at.lane; ptx::inside(row, at.rows); row += ROWS * at.lanes) {
    bool valid[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) valid[i] = ptx::inside(row + i * at.lanes, at.rows);
    body(row, valid);
  }
}

// The first row once more where one is not valid: loads without a branch leave together, and in fewer registers.
template <typename T, int SIZE, int ROWS>
__device__ __forceinline__ void load_rows(Pack<T, SIZE> (&to)[ROWS], const bool (&valid)[ROWS], const void* from,
                                          const Place& at, int row) {
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    to[i] = load_pack<T, SIZE>(static_cast<const T*>(from) + at.index(valid[i] ? row + i * at.lanes : row));
  }
}

// SIZE channels' values of a vector, aligned as the packs are; `otherwise` where there is no vector.
template <int SIZE>
__device__ __forceinline__ void load_channels(float (&to)[SIZE], const float* from, int channel, float otherwise) {
  constexpr int size = SIZE == 1 ? 1 : 4;
#pragma unroll
  for (int i = 0; i < SIZE; i += size) {
    Pack<float, size> values;
#pragma unroll
    for (int j = 0; j < size; ++j) values.values[j] = otherwise;
    if (from != nullptr) values = load_pack<float, size>(from + channel + i);
#pragma unroll
    for (int j = 0; j < size; ++j) to[i + j] = values.values[j];
  }
}

// Calls merge(mine, theirs, first, half) for two lanes' results, of which the second is `half` lanes behind the first,
// until lane 0 has the result of all. Thread `lane * width + i` of the block is lane `lane`'s i-th.
template <typename Sums, int SIZE, typename Merge>
__device__ __forceinline__ void merge_lanes(Sums (&sums)[SIZE], int lane, int width, Merge merge) {
  Sums* shared = ptx::shared_memory<Sums>() + threadIdx.x;
  for (int half = kThreads / width / 2; half > 0; half /= 2) {
    if (lane / half == 1) {
#pragma unroll
      for (int j = 0; j < SIZE; ++j) shared[j * kThreads] = sums[j];
    }
    __syncthreads();
    if (lane < half) merge(sums, shared + half * width, half);
  }
}
template <typename Sums>
constexpr std::size_t shared_bytes(int size) {
  return sizeof(Sums) * size * kThreads;
}

// Adds the lanes' sums; lane 0 has the result.
template <typename Sums, int SIZE>
__device__ __forceinline__ void sum_lanes(Sums (&sums)[SIZE], int lane, int width) {
  merge_lanes(sums, lane, width, [](Sums(&mine)[SIZE], const Sums* theirs, int) {
#pragma unroll
    for (int j = 0; j < SIZE; ++j) {
      mine[j].x += theirs[j * kThreads].x;
      mine[j].y += theirs[j * kThreads].y;
    }
  });
}

template <typename T>
__device__ __forceinline__ float finite_or_zero(T x) {
  return isfinite(to_float(x)) ? to_float(x) : 0.0f;
}

// Merges sums (x) and squared deviations from their own mean (y): those of `more` rows into those of `n`.
class Merging {
 public:
  __device__ __forceinline__ Merging(int n, int more) {
    if (n == 0 || more == 0) return;
    const float of_mine = static_cast<float>(n), of_theirs = static_cast<float>(more);
    ratio_ = of_theirs / of_mine;
    weight_ = of_mine / (of_theirs * (of_mine + of_theirs));
  }
  __device__ __forceinline__ void operator()(float2& mine, float2 theirs) const {
    const float apart = fmaf(ratio_, mine.x, -theirs.x);
    mine.y = fmaf(weight_ * apart, apart, mine.y + theirs.y);
    mine.x += theirs.x;
  }

 private:
  float ratio_ = 0.0f, weight_ = 0.0f;
};

// --- forward

template <typename T, int SIZE>
__global__ void __launch_bounds__(kThreads) slice_moments(BatchNormStatistics a, Tiling tiling) {
  constexpr int kRows = 4;
  const Place at = place<SIZE>(tiling, a.rows, a.c);
  float origin[SIZE];
  float2 sums[SIZE] = {};
  if (at.has_channels) {
    const Pack<T, SIZE> first = load_pack<T, SIZE>(static_cast<const T*>(a.x) + at.channel);
#pragma unroll
    for (int j = 0; j < SIZE; ++j) origin[j] = finite_or_zero(first.values[j]);
  }
  int n = 0;
  for_rows<kRows>(at, [&](int row, const bool (&valid)[kRows]) {
    Pack<T, SIZE> x[kRows];
    load_rows(x, valid, a.x, at, row);
    if (valid[kRows - 1]) {
      const Merging merging(n, kRows);
#pragma unroll
      for (int j = 0; j < SIZE; ++j) {
        float d[kRows];
        float2 rows = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          d[i] = to_float(x[i].values[j]) - origin[j];
          rows.x += d[i];
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const float deviation = fmaf(-1.0f / kRows, rows.x, d[i]);
          rows.y = fmaf(deviation, deviation, rows.y);
        }
        merging(sums[j], rows);
      }
      n += kRows;
      return;
    }
#pragma unroll
    for (int i = 0; i < kRows - 1; ++i) {
      if (!valid[i]) continue;
      const Merging merging(n, 1);
#pragma unroll
      for (int j = 0; j < SIZE; ++j) merging(sums[j], {to_float(x[i].values[j]) - origin[j], 0.0f});
      ++n;
    }
  });
  merge_lanes(sums, at.lane, 1 << tiling.log2_width, [&](float2(&mine)[SIZE], const float2* theirs, int half) {
    // By now a lane has the rows of all that are a multiple of 2 * half behind it.
    const auto rows_of = [&](int lane) { return (max(at.rows - lane, 0) + 2 * half - 1) / (2 * half); };
    const Merging merging(rows_of(at.lane), rows_of(at.lane + half));
#pragma unroll
    for (int j = 0; j < SIZE; ++j) merging(mine[j], theirs[j * kThreads]);
  });
  if (at.lane > 0 || !at.has_channels) return;
  float2* to = static_cast<float2*>(a.workspace) + static_cast<std::int64_t>(at.slice) * a.c + at.channel;
#pragma unroll
  for (int j = 0; j < SIZE; ++j) to[j] = {sums[j].x / static_cast<float>(at.rows), sums[j].y};
}

// A block of the merging launches has the slices as rows and one channel for each of 8 threads side by side.
__device__ __forceinline__ Place merge_place(const Tiling& tiling, int c) {
  const int thread = static_cast<int>(threadIdx.x);
  const int channel = static_cast<int>(blockIdx.x) * kMergedChannels + thread % kMergedChannels;
  const bool has_channel = ptx::inside(channel, c);
  return {0, tiling.slices, thread / kMergedChannels, kThreads / kMergedChannels, channel, c, has_channel, 0};
}

struct DoubleSums {
  double x, y;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) merge_moments(BatchNormStatistics a, Tiling tiling) {
  const Place at = merge_place(tiling, a.c);
  DoubleSums sums[1] = {};  // of d and of d^2
  for_rows<kMergedRows>(at, [&](int row, const bool (&valid)[kMergedRows]) {
    Pack<float2, 1> of_slice[kMergedRows];
    load_rows(of_slice, valid, a.workspace, at, row);
#pragma unroll
    for (int i = 0; i < kMergedRows; ++i) {
      if (!valid[i]) continue;
      const auto [distance, squares] = of_slice[i].values[0];
      const std::int64_t begin = (row + i * at.lanes) * tiling.slice_rows;
      const double sum = static_cast<double>(min(tiling.slice_rows, a.rows - begin)) * distance;
      sums[0].x += sum;
      sums[0].y += fma(sum, static_cast<double>(distance), static_cast<double>(squares));
    }
  });
  sum_lanes(sums, at.lane, kMergedChannels);
  if (at.lane > 0 || !at.has_channels) return;
  const double n = static_cast<double>(a.rows), distance = sums[0].x / n;
  double m2 = fma(-sums[0].x, distance, sums[0].y);
  if (m2 < 0.0) m2 = 0.0;  // by rounding; NaN stays
  const float origin = at.rows > 0 ? finite_or_zero(static_cast<const T*>(a.x)[at.channel]) : 0.0f;
  const float mean = static_cast<float>(origin + distance);
  const auto update = [&](float* running, float value) {
    if (running == nullptr) return;
    running[at.channel] = fmaf(a.momentum, value, (1.0f - a.momentum) * running[at.channel]);
  };
  a.mean[at.channel] = mean;
  a.invstd[at.channel] = static_cast<float>(1.0 / sqrt(m2 / n + a.eps));
  update(a.running_mean, mean);
  update(a.running_var, static_cast<float>(m2 / (n - 1.0)));
}

template <typename T, int SIZE, bool RESIDUAL>
__global__ void __launch_bounds__(kThreads) apply(BatchNormApply a, Tiling tiling) {
  constexpr int kRows = RESIDUAL ? 2 : 4;
  const Place at = place<SIZE>(tiling, a.rows, a.c);
  float mean[SIZE], scale[SIZE], beta[SIZE];
  if (at.has_channels) {
    float invstd[SIZE];
    load_channels(mean, a.mean, at.channel, 0.0f);
    load_channels(invstd, a.invstd, at.channel, 0.0f);
    load_channels(scale, a.gamma, at.channel, 1.0f);
    load_channels(beta, a.beta, at.channel, 0.0f);
#pragma unroll
    for (int j = 0; j < SIZE; ++j) scale[j] *= invstd[j];
  }
  const float least = a.relu ? 0.0f : -INFINITY;
  for_rows<kRows>(at, [&](int row, const bool (&valid)[kRows]) {
    Pack<T, SIZE> x[kRows], residual[kRows];
    load_rows(x, valid, a.x, at, row);
    if constexpr (RESIDUAL) load_rows(residual, valid, a.residual, at, row);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (!valid[i]) continue;
#pragma unroll
      for (int j = 0; j < SIZE; ++j) {
        float y = fmaf(to_float(x[i].values[j]) - mean[j], scale[j], beta[j]);
        if constexpr (RESIDUAL) y += to_float(residual[i].values[j]);
        x[i].values[j] = from_float<T>(ptx::max_nan(y, least));
      }
      store_pack(static_cast<T*>(a.out) + at.index(row + i * at.lanes), x[i]);
    }
  });
}

// --- backward

// The gradient where the ReLU was open. NaN is not <= 0, so the gradient passes it, as in torch.
__device__ __forceinline__ float pass_where_open(float grad, float output) { return output <= 0.0f ? 0.0f : grad; }

template <typename T, int SIZE, bool RELU>
__global__ void __launch_bounds__(kThreads) slice_sums(BatchNormReduce a, Tiling tiling) {
  constexpr int kRows = 2;
  const Place at = place<SIZE>(tiling, a.rows, a.c);
  float mean[SIZE];
  float2 sums[SIZE] = {};  // of g and of g * (x - mean)
  if (at.has_channels) load_channels(mean, a.mean, at.channel, 0.0f);
  for_rows<kRows>(at, [&](int row, const bool (&valid)[kRows]) {
    Pack<T, SIZE> grad[kRows], x[kRows], output[kRows];
    load_rows(grad, valid, a.grad, at, row);
    load_rows(x, valid, a.x, at, row);
    if constexpr (RELU) load_rows(output, valid, a.output, at, row);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (!valid[i]) continue;
#pragma unroll
      for (int j = 0; j < SIZE; ++j) {
        float g = to_float(grad[i].values[j]);
        if constexpr (RELU) g = pass_where_open(g, to_float(output[i].values[j]));
        sums[j].x += g;
        sums[j].y = fmaf(g, to_float(x[i].values[j]) - mean[j], sums[j].y);
      }
    }
  });
  sum_lanes(sums, at.lane, 1 << tiling.log2_width);
  if (at.lane > 0 || !at.has_channels) return;
  float2* to = static_cast<float2*>(a.workspace) + static_cast<std::int64_t>(at.slice) * a.c + at.channel;
#pragma unroll
  for (int j = 0; j < SIZE; ++j) to[j] = sums[j];
}

__global__ void __launch_bounds__(kThreads) merge_sums(BatchNormReduce a, Tiling tiling) {
  const Place at = merge_place(tiling, a.c);
  float2 sums[1] = {};
  for_rows<kMergedRows>(at, [&](int row, const bool (&valid)[kMergedRows]) {
    Pack<float2, 1> of_slice[kMergedRows];
    load_rows(of_slice, valid, a.workspace, at, row);
#pragma unroll
    for (int i = 0; i < kMergedRows; ++i) {
      if (!valid[i]) continue;
      sums[0].x += of_slice[i].values[0].x;
      sums[0].y += of_slice[i].values[0].y;
    }
  });
  sum_lanes(sums, at.lane, kMergedChannels);
  if (at.lane > 0 || !at.has_channels) return;
  a.sum_grad[at.channel] = sums[0].x;
  a.sum_grad_xhat[at.channel] = sums[0].y * a.invstd[at.channel];
}

// grad_x = scale * (g - offset - (x - mean) * slope), BATCH: with statistics of this batch; else scale * g, without x.
template <typename T, int SIZE, bool RELU, bool BATCH>
__global__ void __launch_bounds__(kThreads) backward(BatchNormBackward a, Tiling tiling) {
  constexpr int kRows = 2;
  const Place at = place<SIZE>(tiling, a.rows, a.c);
  float mean[SIZE], scale[SIZE], shift[SIZE], slope[SIZE];
  if (at.has_channels) {
    float invstd[SIZE];
    load_channels(invstd, a.invstd, at.channel, 0.0f);
    load_channels(scale, a.gamma, at.channel, 1.0f);
    if constexpr (BATCH) {
      load_channels(mean, a.mean, at.channel, 0.0f);
      load_channels(shift, a.sum_grad, at.channel, 0.0f);
      load_channels(slope, a.sum_grad_xhat, at.channel, 0.0f);
    }
    const float per_row = 1.0f / static_cast<float>(a.rows);
#pragma unroll
    for (int j = 0; j < SIZE; ++j) {
      scale[j] *= invstd[j];
      if constexpr (BATCH) {
        shift[j] *= per_row;
        slope[j] *= per_row * invstd[j];
      }
    }
  }
  for_rows<kRows>(at, [&](int row, const bool (&valid)[kRows]) {
    Pack<T, SIZE> grad[kRows], x[kRows], output[kRows];
    load_rows(grad, valid, a.grad, at, row);
    if constexpr (BATCH) load_rows(x, valid, a.x, at, row);
    if constexpr (RELU) load_rows(output, valid, a.output, at, row);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (!valid[i]) continue;
      Pack<T, SIZE> of_x, of_residual;
#pragma unroll
      for (int j = 0; j < SIZE; ++j) {
        float g = to_float(grad[i].values[j]);
        if constexpr (RELU) g = pass_where_open(g, to_float(output[i].values[j]));
        of_residual.values[j] = from_float<T>(g);
        if constexpr (BATCH) g = fmaf(mean[j] - to_float(x[i].values[j]), slope[j], g - shift[j]);
        of_x.values[j] = from_float<T>(scale[j] * g);
      }
      const std::int64_t here = at.index(row + i * at.lanes);
      if (a.grad_x != nullptr) store_pack(static_cast<T*>(a.grad_x) + here, of_x);
      if (a.grad_residual != nullptr) store_pack(static_cast<T*>(a.grad_residual) + here, of_residual);
    }
  });
}

// --- launches

template <typename T, typename Launch>
cudaError_t with_size(int c, bool aligned, Launch launch_as) {
  constexpr int size = Pack<T>::size;
  return aligned && c % size == 0 ? launch_as.template operator()<T, size>() : launch_as.template operator()<T, 1>();
}

// Calls launch_as<T, SIZE>() for the precision and for accesses of SIZE channels.
template <typename Launch>
cudaError_t dispatch(Precision precision, int c, bool aligned, Launch launch_as) {
  switch (precision) {
    case Precision::fp16:
      return with_size<__half>(c, aligned, launch_as);
    case Precision::bf16:
      return with_size<__nv_bfloat16>(c, aligned, launch_as);
    case Precision::tf32:
    case Precision::fp32:
      return with_size<float>(c, aligned, launch_as);
  }
  return cudaErrorInvalidValue;
}

// A kernel with a block for each slice of each column.
template <int SIZE, typename Problem>
cudaError_t launch_slices(void (*kernel)(Problem, Tiling), const Problem& a, std::size_t shared, cudaStream_t stream) {
  const Tiling tiles = tiling(a.rows, a.c, a.precision, SIZE);
  if (tiles.slices == 0) return cudaSuccess;
  const std::int64_t blocks = static_cast<std::int64_t>(tiles.slices) * tiles.columns;
  return launch(kernel, blocks, kThreads, shared, stream, a, tiles);
}

template <typename Sums, typename Problem>
cudaError_t launch_merge(void (*kernel)(Problem, Tiling), const Problem& a, cudaStream_t stream) {
  return launch(kernel, ceil_div(a.c, kMergedChannels), kThreads, shared_bytes<Sums>(1), stream, a,
                tiling(a.rows, a.c, a.precision, 1));
}

}  // namespace

std::size_t batch_norm_act_workspace(std::int64_t rows, int c, Precision precision) {
  if (c == 0) return 0;
  return sizeof(float2) * static_cast<std::size_t>(tiling(rows, c, precision, 1).slices) * c;
}

cudaError_t batch_norm_act_statistics(const BatchNormStatistics& a, cudaStream_t stream) {
  if (a.c == 0) return cudaSuccess;
  return dispatch(a.precision, a.c, aligned_to_16(a.x), [&]<typename T, int SIZE>() {
    const cudaError_t error = launch_slices<SIZE>(slice_moments<T, SIZE>, a, shared_bytes<float2>(SIZE), stream);
    return error == cudaSuccess ? launch_merge<DoubleSums>(merge_moments<T>, a, stream) : error;
  });
}

cudaError_t batch_norm_act_apply(const BatchNormApply& a, cudaStream_t stream) {
  if (a.c == 0) return cudaSuccess;
  const bool aligned = aligned_to_16(a.x, a.residual, a.out, a.mean, a.invstd, a.gamma, a.beta);
  return dispatch(a.precision, a.c, aligned, [&]<typename T, int SIZE>() {
    return launch_slices<SIZE>(a.residual == nullptr ? apply<T, SIZE, false> : apply<T, SIZE, true>, a, 0, stream);
  });
}

cudaError_t batch_norm_act_reduce(const BatchNormReduce& a, cudaStream_t stream) {
  if (a.c == 0) return cudaSuccess;
  const bool aligned = aligned_to_16(a.grad, a.x, a.output, a.mean);
  const cudaError_t error = dispatch(a.precision, a.c, aligned, [&]<typename T, int SIZE>() {
    return launch_slices<SIZE>(a.output == nullptr ? slice_sums<T, SIZE, false> : slice_sums<T, SIZE, true>, a,
                               shared_bytes<float2>(SIZE), stream);
  });
  return error == cudaSuccess ? launch_merge<float2>(merge_sums, a, stream) : error;
}

cudaError_t batch_norm_act_backward(const BatchNormBackward& a, cudaStream_t stream) {
  if (a.c == 0) return cudaSuccess;
  const bool aligned = aligned_to_16(a.grad, a.x, a.output, a.mean, a.invstd, a.gamma, a.sum_grad, a.sum_grad_xhat,
                                     a.grad_x, a.grad_residual);
  const bool batch = a.sum_grad != nullptr && a.grad_x != nullptr;
  return dispatch(a.precision, a.c, aligned, [&]<typename T, int SIZE>() {
    const auto kernel = batch
                            ? (a.output == nullptr ? backward<T, SIZE, false, true> : backward<T, SIZE, true, true>)
                            : (a.output == nullptr ? backward<T, SIZE, false, false> : backward<T, SIZE, true, false>);
    return launch_slices<SIZE>(kernel, a, 0, stream);
  });
}

}  // namespace resnet_fast
