// Putting a kernel on a stream. Nothing is allocated, nothing waits, and a CUDA graph can capture it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace resnet_fast {

// What a block may use of shared memory without asking.
inline constexpr std::size_t kUnaskedSharedMemory = 48 * 1024;

// Launches `kernel` with grid.x = blocks. The error is that of this launch, cudaSuccess if it is on the stream.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, std::size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (blocks <= 0 || blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (shared_bytes > kUnaskedSharedMemory) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      (void)cudaGetLastError();
      return error;
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) (void)cudaGetLastError();  // it is reported here; the next launch is not to find it
  return error;
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace resnet_fast
