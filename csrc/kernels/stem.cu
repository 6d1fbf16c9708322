// stem: which kernel runs. The kernel itself is in stem.cuh.
#include "kernels/stem.cuh"

namespace resnet_fast {

namespace {

template <typename T>
std::size_t shared_bytes(int c, int pooled_h) {
  using namespace stem_tile;
  if (pooled_h == kPooledH) return c == 3 ? Tile<T, 12, kPooledH>::shared_bytes : Tile<T, 16, kPooledH>::shared_bytes;
  if (pooled_h != kFewPooledH) return 0;
  return c == 3 ? Tile<T, 12, kFewPooledH>::shared_bytes : Tile<T, 16, kFewPooledH>::shared_bytes;
}

}  // namespace

std::size_t stem_shared_bytes(Precision precision, int c, int pooled_h) {
  if (precision == Precision::fp32) return 0;
  return precision == Precision::tf32 ? shared_bytes<float>(c, pooled_h) : shared_bytes<__half>(c, pooled_h);
}

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
