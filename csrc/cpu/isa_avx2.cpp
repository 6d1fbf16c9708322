// The kernels for AVX2 and FMA; CMakeLists.txt compiles each of these files with its own flags.
#include "simd_avx2.h"

#include "kernels_isa.h"

namespace resnet_fast::cpu {

const Kernels kernels_avx2[2] = {made<float>, made<Bfloat16>};

}  // namespace resnet_fast::cpu
