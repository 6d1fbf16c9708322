// head: global average pool + fully connected layer in one launch, without atomics on data.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "precision.h"

namespace resnet_fast {

struct Head {
  const void* x;       // [n, pixels, c], dense
  const void* weight;  // [k, c], dense
  const float* bias;   // [k] or null
  void* out;           // [n, k]
  int n, pixels, c, k;
  Precision precision;
  void* workspace;  // head_workspace bytes, aligned to 16; null if that is 0
};

// Bytes; the launch needs no particular contents and leaves nothing behind that a later one relies on.
std::size_t head_workspace(int n, int pixels, int c, int k, Precision precision, int multiprocessors);

cudaError_t head(const Head&, int multiprocessors, cudaStream_t stream);

}  // namespace resnet_fast
