// add_act: out = act(x + y) and its gradient over flat vectors. Strides, shapes and copies are the op's business.
//
// Floor: three passes over the tensor, two read and one written, forward and backward alike: 3 * count * itemsize bytes
// over the memory's bandwidth. One addition per element is nothing beside that.
//
// Tile: a block of 256 threads owns 512 packs of 16 bytes that lie side by side, so neighbouring threads touch
// neighbouring packs; a thread has both its packs of both tensors on their way before it computes (64 bytes; 128 KB for
// a full multiprocessor, several times what the latency of memory asks for). The grid is exact: no thread loops.
// What is left behind the last whole pack, fewer elements than a pack holds, is one element each for the first threads
// of the grid. Vectors that do not all start at a multiple of 16 bytes go through the same kernel with packs of one.
//
// Trap: x and y may be out, so nothing here is __restrict__, and every load of a thread stands before its stores.
#include "kernels/add_act.h"

#include "launch.cuh"
#include "numeric.cuh"

namespace resnet_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 2;  // per thread

// act(x + y), rounded once.
template <bool RELU>
struct Add {
  template <typename T>
  __device__ T operator()(T x, T y) const {
    const float sum = to_float(x) + to_float(y);
    return from_float<T>(RELU ? relu(sum) : sum);
  }
};

// The bits of grad where the ReLU was open. NaN is not <= 0, so the gradient passes it, as in torch.
struct PassWhereOpen {
  template <typename T>
  __device__ T operator()(T grad, T output) const {
    return to_float(output) <= 0.0f ? from_float<T>(0.0f) : grad;
  }
};

template <typename T, int SIZE, typename Function>
__global__ void __launch_bounds__(kThreads) elementwise(const T* a, const T* b, T* out, std::int64_t count) {
  const Function function{};
  const std::int64_t packs = count / SIZE;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * (kPacks * kThreads) + threadIdx.x;
  Pack<T, SIZE> from_a[kPacks], from_b[kPacks];
  bool valid[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const std::int64_t pack = first + i * kThreads;
    valid[i] = ptx::inside(pack, packs);
    if (!valid[i]) continue;
    from_a[i] = load_pack<T, SIZE>(a + pack * SIZE);
    from_b[i] = load_pack<T, SIZE>(b + pack * SIZE);
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (!valid[i]) continue;
    Pack<T, SIZE> result;
#pragma unroll
    for (int j = 0; j < SIZE; ++j) result.values[j] = function(from_a[i].values[j], from_b[i].values[j]);
    store_pack(out + (first + i * kThreads) * SIZE, result);
  }
  if constexpr (SIZE > 1) {
    const std::int64_t rest = packs * SIZE + static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (ptx::inside(rest, count)) out[rest] = function(a[rest], b[rest]);
  }
}

template <typename Function, typename T>
cudaError_t launch_elementwise(const void* a, const void* b, void* out, std::int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  constexpr int size = Pack<T>::size;
  const bool wide = aligned_to_16(a, b, out);
  const std::int64_t blocks = ceil_div(count, std::int64_t{kPacks} * kThreads * (wide ? size : 1));
  return launch(wide ? elementwise<T, size, Function> : elementwise<T, 1, Function>, blocks, kThreads, 0, stream,
                static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(out), count);
}

template <typename Function>
cudaError_t launch_as(Precision precision, const void* a, const void* b, void* out, std::int64_t count,
                      cudaStream_t stream) {
  switch (precision) {
    case Precision::fp16:
      return launch_elementwise<Function, __half>(a, b, out, count, stream);
    case Precision::bf16:
      return launch_elementwise<Function, __nv_bfloat16>(a, b, out, count, stream);
    case Precision::tf32:
    case Precision::fp32:
      return launch_elementwise<Function, float>(a, b, out, count, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t add_act(const void* x, const void* y, void* out, std::int64_t count, Precision precision, bool relu,
                    cudaStream_t stream) {
  return relu ? launch_as<Add<true>>(precision, x, y, out, count, stream)
              : launch_as<Add<false>>(precision, x, y, out, count, stream);
}

cudaError_t add_act_backward(const void* grad, const void* output, void* out, std::int64_t count, Precision precision,
                             cudaStream_t stream) {
  return launch_as<PassWhereOpen>(precision, grad, output, out, count, stream);
}

}  // namespace resnet_fast
