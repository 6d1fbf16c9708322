// The kernels for AVX-512 with products of bfloat16; CMakeLists.txt compiles each of these files with its own flags.
#include "simd_avx512.h"

#include "kernels_isa.h"

namespace resnet_fast::cpu {

const Kernels kernels_avx512_bf16[2] = {made<Bfloat16>, made_in_steps<Form<float, Bfloat16, Uint8>>};

}  // namespace resnet_fast::cpu
