// stem: convolution 7x7 stride 2 padding 3 + scale, shift + ReLU + max-pool 3x3 stride 2, in one kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "precision.h"

namespace resnet_fast {

inline constexpr int kStemMostChannels = 4;

struct Stem {
  const void* x;                                        // c channels of n images, h x w; of the output's type, or bytes
  std::int64_t stride_n, stride_c, stride_h, stride_w;  // of x, in elements
  bool bytes;                  // x is uint8: value = byte * factor[c] + summand[c], rounded to the type
  const float* normalisation;  // [2, c]: factor, summand; null unless bytes
  // [k, 4, 4, 16] in the output's type: tap (r, s) of channel i is weight[(r + 1) / 2][(s + 1) / 2][((r + 1) % 2 * 2 +
  // (s + 1) % 2) * c + i], the rest zeros: the 7x7 stride 2 seen as 4x4 stride 1 over 2x2 squares of pixels. Aligned to
  // 16 bytes.
  const void* weight;
  const float* scale;  // [k]
  const float* shift;  // [k]
  void* out;           // [n, pooled_h, pooled_w, k], dense
  int n, c, h, w, k;
  int conv_h, conv_w;      // size of the convolution's output
  int pooled_h, pooled_w;  // size of the pool's
  bool ceil_mode;          // false: the pool is padded by 1; true: not padded, windows may reach over the far edges
  Precision precision;     // fp16, bf16, tf32
};

// cudaErrorNotSupported if c > kStemMostChannels or the precision is fp32, cudaErrorInvalidValue if the weight is not
// aligned.
cudaError_t stem(const Stem&, cudaStream_t stream);

// Dynamic shared memory of a block of the kernel for c = 3 or 4 channels that makes pooled_h (7 or 3) rows; 0 if there
// is no such kernel.
std::size_t stem_shared_bytes(Precision precision, int c, int pooled_h);

}  // namespace resnet_fast
