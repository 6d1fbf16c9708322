// batch_norm_act: training BatchNorm + residual + ReLU over [rows, c] (NHWC with rows = N H W), in two passes forward
// (statistics, apply) and two backward (reduce, apply). Statistics and sums in float32, one read of memory each.
// Definitions as torch.nn.functional.batch_norm: Ioffe & Szegedy 2015, arXiv:1502.03167.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "precision.h"

namespace resnet_fast {

// Bytes of workspace, aligned to 16, that statistics and reduce need for [rows, c]. They need no particular contents,
// and no launch leaves anything in them that a later one relies on.
std::size_t batch_norm_act_workspace(std::int64_t rows, int c, Precision precision);

struct BatchNormStatistics {
  const void* x;        // [rows, c]
  float* mean;          // [c], written
  float* invstd;        // [c], written: 1 / sqrt(biased variance + eps)
  float* running_mean;  // [c], updated: (1 - momentum) * old + momentum * mean; or null
  float* running_var;   // [c], updated with the unbiased variance; or null
  std::int64_t rows;
  int c;
  float eps, momentum;
  Precision precision;
  void* workspace;
};
// Right where |mean| >> deviation. Two launches on the stream.
cudaError_t batch_norm_act_statistics(const BatchNormStatistics&, cudaStream_t stream);

struct BatchNormApply {
  const void* x;         // [rows, c]
  const float* mean;     // [c]
  const float* invstd;   // [c]
  const float* gamma;    // [c] or null (ones)
  const float* beta;     // [c] or null (zeros)
  const void* residual;  // [rows, c] or null; added before the activation
  void* out;             // [rows, c], may be x or residual
  std::int64_t rows;
  int c;
  bool relu;
  Precision precision;
};
cudaError_t batch_norm_act_apply(const BatchNormApply&, cudaStream_t stream);

struct BatchNormReduce {
  const void* grad;      // [rows, c], of out
  const void* x;         // [rows, c]
  const void* output;    // [rows, c] of the forward, to see where the ReLU was open; null: no ReLU
  const float* mean;     // [c]
  const float* invstd;   // [c]
  float* sum_grad;       // [c], written: sum of g = grad where the ReLU was open (the gradient of beta)
  float* sum_grad_xhat;  // [c], written: sum of g * (x - mean) * invstd (the gradient of gamma)
  std::int64_t rows;
  int c;
  Precision precision;
  void* workspace;
};
cudaError_t batch_norm_act_reduce(const BatchNormReduce&, cudaStream_t stream);

struct BatchNormBackward {
  const void* grad;            // [rows, c]
  const void* x;               // [rows, c]
  const void* output;          // as above
  const float* mean;           // [c]
  const float* invstd;         // [c]
  const float* gamma;          // [c] or null
  const float* sum_grad;       // [c]; null with frozen statistics: grad_x = g * gamma * invstd then
  const float* sum_grad_xhat;  // [c]; null likewise
  void* grad_x;                // [rows, c], written; or null
  void* grad_residual;         // [rows, c], written: g; or null
  std::int64_t rows;
  int c;
  Precision precision;
};
// grad_x = gamma * invstd * (g - sum_grad / rows - xhat * sum_grad_xhat / rows)
cudaError_t batch_norm_act_backward(const BatchNormBackward&, cudaStream_t stream);

}  // namespace resnet_fast
