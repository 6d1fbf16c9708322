// The kernels for AVX-512 with products of 8 bits; CMakeLists.txt compiles each of these files with its own flags.
#include "simd_avx512.h"

#include "kernels_isa.h"

namespace resnet_fast::cpu {

const Kernels kernels_avx512_vnni[3] = {made_in_steps<Plain<Uint8>>, made_in_steps<Form<Uint8, Uint8, float>>,
                                        made_in_steps<Form<float, float, Uint8>>};

}  // namespace resnet_fast::cpu
