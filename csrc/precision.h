// How values are stored and multiplied, as the Python side names it. Not for what a GPU supports.
#pragma once

#include <cstddef>

namespace resnet_fast {

// fp16, bf16: stored and multiplied so. tf32: stored as float, multiplied on matrix units that take 10 bits of the
// significand. fp32: stored and multiplied as float. Accumulation is float32 everywhere.
enum class Precision { fp16, bf16, tf32, fp32 };

constexpr std::size_t item_size(Precision precision) {
  return precision == Precision::fp16 || precision == Precision::bf16 ? 2 : 4;
}

}  // namespace resnet_fast
