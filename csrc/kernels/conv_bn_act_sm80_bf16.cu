// conv_bn_act for capability 8.0 and up, bfloat16: the vector kernel's tiles. Instantiations only.
#include "kernels/conv_bn_act_sm80.cuh"

namespace resnet_fast::sm80 {
namespace {

using T = __nv_bfloat16;

const ConvBnActRegistration registrations[] = {
    ConvBnActRegistration(vector_kernel<VectorTile<T, 128, 128, 32, 4, 2, 2, 2>>()),
    ConvBnActRegistration(vector_kernel<VectorTile<T, 256, 64, 32, 4, 4, 2, 1>>()),
    ConvBnActRegistration(vector_kernel<VectorTile<T, 128, 64, 32, 4, 2, 2, 3>>()),
    ConvBnActRegistration(vector_kernel<VectorTile<T, 64, 128, 32, 4, 2, 2, 3>>()),
    ConvBnActRegistration(vector_kernel<VectorTile<T, 64, 64, 64, 4, 2, 2, 3>>()),
    ConvBnActRegistration(vector_kernel<VectorTile<T, 64, 32, 64, 4, 2, 2, 4>>()),
    ConvBnActRegistration(vector_kernel<VectorTile<T, 32, 64, 64, 4, 2, 2, 4>>()),
    ConvBnActRegistration(vector_kernel<VectorTile<T, 128, 32, 64, 3, 4, 1, 3>>()),
    ConvBnActRegistration(vector_kernel<VectorTile<T, 128, 16, 64, 3, 4, 1, 4>>()),
};

}  // namespace
}  // namespace resnet_fast::sm80
