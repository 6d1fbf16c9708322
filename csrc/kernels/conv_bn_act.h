// conv_bn_act: out = act(conv(x, weight) * scale + shift + residual); the arguments, and the list of kernels built.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <vector>

#include "precision.h"

namespace resnet_fast {

struct ConvBnAct {
  const void* x;         // [n, h, w, c], dense
  const void* weight;    // [k, r, s, c / groups], dense
  const float* scale;    // [k]
  const float* shift;    // [k]
  const void* residual;  // [n, p, q, k], dense, or null
  void* out;             // [n, p, q, k], dense
  int n, h, w, c, k, r, s, p, q;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  Precision precision;
  bool relu;
  bool residual_after_activation;
  void* workspace;  // as many bytes as the kernel's `workspace` says, aligned to 256; null if none
};

// One compiled kernel. Every .cu file with an instantiation makes a ConvBnActRegistration at namespace scope, so the
// list holds what was built and nothing else.
struct ConvBnActKernel {
  std::string name;       // unique, as "sm80_fp16_128x128x32_4" (architecture, precision, tile, stages)
  std::string algorithm;  // "implicit_gemm", "cutlass_conv" or "cutlass_gemm"
  int least_capability;   // of the GPU: 80, or 90 for kernels that run on 9.0 only
  int most_capability;    // 90 for those, else a large number
  Precision precision;
  int block_m, block_n, block_k, stages, threads;
  std::size_t shared_bytes;
  // "" if the kernel computes the problem (shapes and alignment of pointers alike), else what it cannot do.
  std::string (*unsupported)(const ConvBnAct&);
  std::size_t (*workspace)(const ConvBnAct&);  // bytes
  cudaError_t (*launch)(const ConvBnAct&, cudaStream_t);
};

// In order of name.
const std::vector<ConvBnActKernel>& conv_bn_act_kernels();

struct ConvBnActRegistration {
  explicit ConvBnActRegistration(ConvBnActKernel kernel);
};

}  // namespace resnet_fast
