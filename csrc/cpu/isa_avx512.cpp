// The kernels for AVX-512; CMakeLists.txt compiles each of these files with its own flags.
#include "simd_avx512.h"

#include "kernels_isa.h"

namespace resnet_fast::cpu {

const Kernels kernels_avx512[2] = {made<float>, made<Bfloat16>};

}  // namespace resnet_fast::cpu
