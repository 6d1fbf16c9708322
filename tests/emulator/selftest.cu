// Small kernels that show what the emulator finds: right ones, and the same with one mistake. cases/_selftest.py says
// what each computes, or which words the mistake must bring.
#include <cstring>
#include <map>
#include <string>
#include <string_view>

#include "launch.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace resnet_fast {
namespace {

// --- races. All kernels have the same arguments; a wrong variant is a template argument that is false.

template <bool BARRIER>
__global__ void reverse(const float* in, float* out, int) {
  float* shared = ptx::shared_memory<float>();
  const int i = static_cast<int>(threadIdx.x), last = static_cast<int>(blockDim.x) - 1;
  shared[i] = in[i];
  if constexpr (BARRIER) __syncthreads();
  out[i] = shared[last - i];
}

// One warp writes once, the other reads once: the orders in which the writers come first are right without a barrier.
template <bool BARRIER>
__global__ void one_way(const float* in, float* out, int) {
  float* shared = ptx::shared_memory<float>();
  const int i = static_cast<int>(threadIdx.x);
  if (i < 32) shared[i] = in[i];
  if constexpr (BARRIER) __syncthreads();
  if (i >= 32) out[i - 32] = shared[i - 32];
}

// Values move on by a warp in each step; without the second barrier some are overwritten before they are read.
template <bool BARRIER>
__global__ void rotate(const float* in, float* out, int steps) {
  float* shared = ptx::shared_memory<float>();
  const int i = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  float value = in[i];
  for (int step = 0; step < steps; ++step) {
    shared[i] = value;
    __syncthreads();
    value = shared[(i + 32) % threads];
    if constexpr (BARRIER) __syncthreads();
  }
  out[i] = value;
}

template <bool BARRIER>
__global__ void neighbour_lane(const float* in, float* out, int) {
  float* shared = ptx::shared_memory<float>();
  const int i = static_cast<int>(threadIdx.x);
  shared[i] = in[i];
  if constexpr (BARRIER) __syncwarp();
  out[i] = shared[i ^ 1];
}

__global__ void unwritten(const float* in, float* out, int count) {
  float* shared = ptx::shared_memory<float>();
  const int i = static_cast<int>(threadIdx.x);
  if (ptx::inside(i, count)) shared[i] = in[i];
  __syncthreads();
  out[i] = shared[i];
}

__global__ void first_block_wins(const float*, float* out, int) {
  if (threadIdx.x == 0 && out[0] < 0) out[0] = static_cast<float>(blockIdx.x);
}

// out[i], an integer: when this thread came past, in a count over all.
__global__ void order(const float*, float* out, int steps) {
  auto* tickets = reinterpret_cast<int*>(out);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  for (int step = 0; step < steps; ++step) {
    tickets[1 + i * steps + step] = atomicAdd(tickets, 1);
    if (step % 2 == 0) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
}

// --- copies

enum class Mistake { none, no_wait, no_commit, one_group_early, no_barrier };

// Two groups of copies; thread i writes out what thread i ^ 32 has copied.
template <Mistake MISTAKE>
__global__ void copies(const float* in, float* out, int) {
  float* shared = ptx::shared_memory<float>();
  const int i = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int from = i ^ 32;
  for (int group = 0; group < 2; ++group) {
    ptx::cp_async<16>(shared + 4 * (group * threads + i), in + 4 * (group * threads + i));
    if constexpr (MISTAKE != Mistake::no_commit) ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  for (int group = 0; group < 2; ++group) {
    if (MISTAKE != Mistake::no_barrier) __syncthreads();
    for (int e = 0; e < 4; ++e) out[4 * (group * threads + i) + e] = shared[4 * (group * threads + from) + e];
    if (MISTAKE != Mistake::no_wait && MISTAKE != Mistake::one_group_early) ptx::cp_async_wait<0>();
  }
  if constexpr (MISTAKE == Mistake::one_group_early) ptx::cp_async_wait<0>();
}

// The source of a copy that is not valid is not read.
template <int BYTES>
__global__ void masked_copies(const float* in, float* out, int count) {
  constexpr int values = BYTES / 4;
  float* shared = ptx::shared_memory<float>();
  const int i = static_cast<int>(threadIdx.x);
  const bool valid = ptx::inside(values * i, count);
  ptx::cp_async<BYTES>(shared + values * i, valid ? in + values * i : nullptr, valid);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int e = 0; e < values; ++e) out[values * i + e] = shared[values * i + e];
}

// --- waiting

__global__ void barrier_of_a_few(const float*, float*, int) {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void exit_before_barrier(const float*, float*, int) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}
__global__ void two_barriers(const float*, float*, int) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void barrier_or_shuffle(const float* in, float* out, int) {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
  }
}
__global__ void shuffle_of_some(const float* in, float* out, int) {
  out[threadIdx.x] = __shfl_xor_sync(0x7fffffffu, in[threadIdx.x], 1);
}
__global__ void shuffle_without_one(const float* in, float* out, int) {
  if (threadIdx.x == 31) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
}
__global__ void shuffle_in_branches(const float* in, float* out, int) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 2);
  }
}
__global__ void shuffle_all(const float* in, float* out, int) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
}
__global__ void endless(const float* in, float*, int) {
  while (*static_cast<const volatile float*>(in) == *static_cast<const volatile float*>(in)) {
  }
}

__global__ void warp_functions(const float* in, float* out, int) {
  const int i = static_cast<int>(threadIdx.x);
  const float value = in[i];
  const bool positive = value > 0;
  const float results[] = {
      __shfl_xor_sync(0xffffffffu, value, 5),
      __shfl_sync(0xffffffffu, value, 3),
      __shfl_sync(0xffffffffu, value, i + 1, 8),
      __shfl_down_sync(0xffffffffu, value, 3),
      __shfl_down_sync(0xffffffffu, value, 3, 16),
      __shfl_up_sync(0xffffffffu, value, 2),
      __shfl_up_sync(0xffffffffu, value, 2, 8),
      static_cast<float>(__ballot_sync(0xffffffffu, positive) & 0xffffu),
      static_cast<float>(__any_sync(0xffffffffu, positive)),
      static_cast<float>(__all_sync(0xffffffffu, positive)),
      static_cast<float>(__syncthreads_or(i == 70)),
      static_cast<float>(__syncthreads_or(i == 96)),
      static_cast<float>(__syncthreads_and(i != 70)),
      static_cast<float>(__syncthreads_and(i != 96)),
  };
  for (float result : results) {
    *(out + i) = result;
    out += blockDim.x;
  }
}

// --- memory

__global__ void read_behind(const float* in, float* out, int count) { out[0] = in[count]; }
__global__ void read_before(const float* in, float* out, int) { out[0] = in[-static_cast<int>(blockDim.x)]; }
__global__ void write_behind(const float* in, float* out, int count) { out[count] = in[0]; }
__global__ void copy_from_behind(const float* in, float*, int count) {
  ptx::cp_async<4>(ptx::shared_memory<float>(), in + count);
}
__global__ void copy_to_behind(const float* in, float*, int count) {
  ptx::cp_async<4>(ptx::shared_memory<float>() + count, in);
}
__global__ void shared_write_behind(const float* in, float*, int count) { ptx::shared_memory<float>()[count] = in[0]; }
__global__ void matrix_behind(const float*, float* out, int count) {
  std::uint32_t words[4];
  ptx::ldmatrix_x4(words, ptx::shared_memory<float>() + count - 4 * (threadIdx.x < 31));
  out[0] = __uint_as_float(words[0]);
}
__global__ void matrix_misaligned(const float*, float* out, int) {
  std::uint32_t words[4];
  ptx::ldmatrix_x4(words, ptx::shared_memory<float>() + 2);
  out[0] = __uint_as_float(words[0]);
}
__global__ void vector_misaligned(const float* in, float* out, int) {
  const float4 four = *reinterpret_cast<const float4*>(in + 1);
  out[0] = four.x;
}
__global__ void copy_from_misaligned(const float* in, float*, int) {
  ptx::cp_async<8>(ptx::shared_memory<float>(), in + 1);
}
__global__ void copy_to_misaligned(const float* in, float*, int) {
  ptx::cp_async<16>(ptx::shared_memory<float>() + 2, in);
}
__global__ void array_behind(const float* in, float* out, int count) {
  float registers[4] = {in[0], in[1], in[2], in[3]};
  out[0] = registers[count & 7];
}
__global__ void overflow(const float*, float* out, int count) { out[0] = static_cast<float>(count * (0x7fffffff / 2)); }
__global__ void wide_shift(const float*, float* out, int count) { out[0] = static_cast<float>(1 << count); }
__global__ void null_pointer(const float*, float* out, int) { out[0] = *static_cast<const volatile float*>(nullptr); }

// --- products: out [16, 8] = A [16, K] times B, in [0, 16 K), then B as [8, K]

template <typename T>
__global__ void product(const float* in, float* out, int) {
  constexpr int per_row = 16 / sizeof(T), k = 4 * per_row;  // two steps of a product
  T* a = ptx::shared_memory<T>();
  T* b = a + 16 * k;
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 24 * k; i += 32) a[i] = from_float<T>(in[i]);
  __syncthreads();
  std::uint32_t b_words[4];
  const int matrix = lane / 8, row = lane % 8;
  ptx::ldmatrix_x4(b_words, b + row * k + matrix * per_row);
  float d[4] = {};
  for (int step = 0; step < 2; ++step) {
    std::uint32_t a_words[4];
    ptx::ldmatrix_x4(a_words, a + lane % 16 * k + (2 * step + lane / 16) * per_row);
    ptx::mma<T>(d, a_words, {b_words[2 * step], b_words[2 * step + 1]});
  }
  for (int i = 0; i < 4; ++i) out[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = d[i];
}

// --- numbers: `count` floats in, as many words out

template <typename T>
__global__ void rounded(const float* in, float* out, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    out[i] = to_float(from_float<T>(in[i]));
  }
}
__global__ void rounded_to_tf32(const float* in, float* out, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    out[i] = __uint_as_float(ptx::to_tf32(__float_as_uint(in[i])));
  }
}
// The larger of each value and the one that mirrors it; of pairs, of a value and its two-byte neighbour.
__global__ void larger(const float* in, float* out, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    out[i] = ptx::max_nan(in[i], in[count - 1 - i]);
  }
}
template <typename T>
__global__ void larger_pairs(const float* in, float* out, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count / 2; i += static_cast<int>(blockDim.x)) {
    std::uint32_t words[2];
    for (int side = 0; side < 2; ++side) {
      const int from = side == 0 ? 2 * i : count - 2 - 2 * i;
      const T pair[2] = {from_float<T>(in[from]), from_float<T>(in[from + 1])};
      memcpy(&words[side], pair, 4);
    }
    const std::uint32_t word = ptx::max_nan_pairs<T>(words[0], words[1]);
    T pair[2];
    memcpy(pair, &word, 4);
    for (int e = 0; e < 2; ++e) out[2 * i + e] = to_float(pair[e]);
  }
}

// --- by name

using Start = cudaError_t (*)(const float* in, float* out, int count);

template <auto KERNEL, int THREADS = 32, int SHARED_BYTES = 1024, int BLOCKS = 1>
cudaError_t start(const float* in, float* out, int count) {
  return launch(KERNEL, BLOCKS, THREADS, SHARED_BYTES, nullptr, in, out, count);
}

const std::map<std::string_view, Start> kernels = {
    {"reverse", start<reverse<true>, 128>},
    {"reverse, no barrier", start<reverse<false>, 128>},
    {"one way", start<one_way<true>, 64>},
    {"one way, no barrier", start<one_way<false>, 64>},
    {"rotate", start<rotate<true>, 128>},
    {"rotate, no second barrier", start<rotate<false>, 128>},
    {"neighbour lane", start<neighbour_lane<true>, 64>},
    {"neighbour lane, no syncwarp", start<neighbour_lane<false>, 64>},
    {"unwritten", start<unwritten, 64>},
    {"first block wins", start<first_block_wins, 32, 0, 5>},
    {"order", start<order, 96, 0, 3>},
    {"copies", start<copies<Mistake::none>, 64, 2048>},
    {"copies, no wait", start<copies<Mistake::no_wait>, 64, 2048>},
    {"copies, no commit", start<copies<Mistake::no_commit>, 64, 2048>},
    {"copies, one group early", start<copies<Mistake::one_group_early>, 64, 2048>},
    {"copies, no barrier", start<copies<Mistake::no_barrier>, 64, 2048>},
    {"masked copies of 4", start<masked_copies<4>, 32>},
    {"masked copies of 8", start<masked_copies<8>, 32>},
    {"masked copies of 16", start<masked_copies<16>, 32>},
    {"barrier of a few", start<barrier_of_a_few, 64>},
    {"exit before barrier", start<exit_before_barrier, 64>},
    {"two barriers", start<two_barriers, 64>},
    {"barrier or shuffle", start<barrier_or_shuffle>},
    {"shuffle of some", start<shuffle_of_some>},
    {"shuffle without one", start<shuffle_without_one>},
    {"shuffle in branches", start<shuffle_in_branches>},
    {"shuffle of half a warp", start<shuffle_all, 48>},
    {"endless", start<endless>},
    {"warp functions", start<warp_functions, 96>},
    {"read behind", start<read_behind>},
    {"read before", start<read_before>},
    {"write behind", start<write_behind>},
    {"copy from behind", start<copy_from_behind>},
    {"copy to behind", start<copy_to_behind>},
    {"shared write behind", start<shared_write_behind>},
    {"matrix behind", start<matrix_behind>},
    {"matrix misaligned", start<matrix_misaligned>},
    {"vector misaligned", start<vector_misaligned>},
    {"copy from misaligned", start<copy_from_misaligned>},
    {"copy to misaligned", start<copy_to_misaligned>},
    {"array behind", start<array_behind>},
    {"overflow", start<overflow>},
    {"wide shift", start<wide_shift>},
    {"null pointer", start<null_pointer>},
    {"product of fp16", start<product<__half>, 32, 2048>},
    {"product of bf16", start<product<__nv_bfloat16>, 32, 2048>},
    {"product of tf32", start<product<float>, 32, 2048>},
    {"rounded to fp16", start<rounded<__half>, 64>},
    {"rounded to bf16", start<rounded<__nv_bfloat16>, 64>},
    {"rounded to tf32", start<rounded_to_tf32, 64>},
    {"larger", start<larger, 64>},
    {"larger of fp16 pairs", start<larger_pairs<__half>, 64>},
    {"larger of bf16 pairs", start<larger_pairs<__nv_bfloat16>, 64>},
    {"too many threads", start<shuffle_all, 1025>},
    {"too much shared memory", start<shuffle_all, 32, 163 * 1024 + 1>},
    {"no blocks", start<shuffle_all, 32, 0, 0>},
};

}  // namespace
}  // namespace resnet_fast

// '' or the error's words, valid until the next call.
extern "C" __attribute__((visibility("default"))) const char* selftest(const char* kernel, const float* in, float* out,
                                                                       int count) {
  const auto found = resnet_fast::kernels.find(kernel);
  if (found == resnet_fast::kernels.end()) return "no such kernel";
  const cudaError_t error = found->second(in, out, count);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
