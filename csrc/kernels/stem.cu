// stem: which kernel runs. The kernel itself is in stem.cuh.
#include "kernels/stem.cuh"

namespace resnet_fast {

cudaError_t stem(const Stem& a, cudaStream_t stream) {
  if (a.c < 1 || a.c > kStemMostChannels || a.precision == Precision::fp32) return cudaErrorNotSupported;
  if (reinterpret_cast<std::uintptr_t>(a.weight) % 16 != 0) return cudaErrorInvalidValue;
  if (a.n == 0 || a.k == 0) return cudaSuccess;
  switch (a.precision) {
    case Precision::fp16:
      return stem_tile::launch_stem<__half>(a, stream);
    case Precision::bf16:
      return stem_tile::launch_stem<__nv_bfloat16>(a, stream);
    default:
      return stem_tile::launch_stem<float>(a, stream);
  }
}

}  // namespace resnet_fast
