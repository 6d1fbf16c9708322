// What the CUDA part of this library was compiled with. Not for what the machine has: that is found at run time.
#pragma once

namespace resnet_fast {

// nvcc's version, as "13.0.88".
const char* cuda_compiler_version();

}  // namespace resnet_fast
