// The kernels for AMX's tiles of bfloat16 and of 8 bits; CMakeLists.txt compiles each of these files with its own
// flags.
#include "simd_amx.h"

#include "kernels_isa.h"
#include "kernels_tiles.h"

namespace resnet_fast::cpu {

const Kernels kernels_amx[4] = {
    with_tiles<Plain<Bfloat16>>(made<Bfloat16>),
    with_tiles<Form<float, Bfloat16, Uint8>>(made_in_steps<Form<float, Bfloat16, Uint8>>),
    with_tiles<Plain<Uint8>>(made_in_steps<Plain<Uint8>>),
    with_tiles<Form<Uint8, Uint8, float>>(made_in_steps<Form<Uint8, Uint8, float>>),
};

}  // namespace resnet_fast::cpu
