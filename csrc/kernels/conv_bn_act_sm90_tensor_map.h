// How CUTLASS gets its tensor maps (the descriptors of the copy engine): the driver's encoders, looked up at run time
// so that nothing links with libcuda. Included before any other CUTLASS header. Not a general wrapper of the driver.
//
// CUTLASS calls the encoders through the macro CUTLASS_CUDA_DRIVER_WRAPPER_CALL, looks the function up again for every
// map, and answers a refused one with an assertion, or without assertions with a kernel that runs on an undefined map.
// The macro is replaced here: one lookup per process, and a refusal is kept for the launcher to return.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include "cutlass/kernel_hardware_info.hpp"
// Above everything else of CUTLASS: the macro must be replaced before a function template uses it.
#include "cutlass/cuda_host_adapter.hpp"

namespace resnet_fast::sm90 {

// The first refusal since this was last set to CUDA_SUCCESS, on this thread.
inline thread_local CUresult tensor_map_error = CUDA_SUCCESS;

// The driver's function `name` as of CUDA 12.0, null where there is no driver.
inline void* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
}

template <typename Encoder, typename... Arguments>
CUresult encode(Encoder encoder, Arguments... arguments) {
  const CUresult result = encoder == nullptr ? CUDA_ERROR_NOT_FOUND : encoder(arguments...);
  if (result != CUDA_SUCCESS && tensor_map_error == CUDA_SUCCESS) tensor_map_error = result;
  return CUDA_SUCCESS;
}

// Named as the driver's, since CUTLASS names them so.
template <typename... Arguments>
CUresult cuTensorMapEncodeTiled(Arguments... arguments) {
  static const auto encoder = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(driver_function(__func__));
  return encode(encoder, arguments...);
}
template <typename... Arguments>
CUresult cuTensorMapEncodeIm2col(Arguments... arguments) {
  static const auto encoder = reinterpret_cast<PFN_cuTensorMapEncodeIm2col_v12000>(driver_function(__func__));
  return encode(encoder, arguments...);
}

}  // namespace resnet_fast::sm90

#undef CUTLASS_CUDA_DRIVER_WRAPPER_CALL
#define CUTLASS_CUDA_DRIVER_WRAPPER_CALL(function) ::resnet_fast::sm90::function
