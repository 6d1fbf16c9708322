// Compiled by nvcc only, so that the version reported is the compiler's own word and not the build system's.
#include "build_info.h"

#define RESNET_FAST_STRING_OF(x) #x
#define RESNET_FAST_STRING(x) RESNET_FAST_STRING_OF(x)
#define RESNET_FAST_CUDA_VERSION __CUDACC_VER_MAJOR__.__CUDACC_VER_MINOR__.__CUDACC_VER_BUILD__

namespace resnet_fast {

const char* cuda_compiler_version() { return RESNET_FAST_STRING(RESNET_FAST_CUDA_VERSION); }

}  // namespace resnet_fast
