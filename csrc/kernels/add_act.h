// add_act: out = act(x + y) and its gradient, over `count` elements that lie densely in memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "precision.h"

namespace resnet_fast {

// Added in float32, rounded once. x and y may be out. Any alignment; 16-byte accesses where all three allow it.
cudaError_t add_act(const void* x, const void* y, void* out, std::int64_t count, Precision precision, bool relu,
                    cudaStream_t stream);

// out = grad where not output <= 0 (so where output is NaN too), else 0: the gradient for x and for y.
cudaError_t add_act_backward(const void* grad, const void* output, void* out, std::int64_t count, Precision precision,
                             cudaStream_t stream);

}  // namespace resnet_fast
