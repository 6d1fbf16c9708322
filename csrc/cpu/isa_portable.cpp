// The kernels for every processor; CMakeLists.txt compiles each of these files with its own flags.
#include "simd_portable.h"

#include "kernels_isa.h"

namespace resnet_fast::cpu {

const Kernels kernels_portable[2] = {made<float>, made<Bfloat16>};

}  // namespace resnet_fast::cpu
