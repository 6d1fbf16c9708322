// conv_bn_act for capability 8.0 and up, float multiplied as tf32: the vector kernel's tiles. Instantiations only.
#include "kernels/conv_bn_act_sm80.cuh"

namespace resnet_fast::sm80 {
namespace {

using T = float;

const ConvBnActRegistration registrations[] = {
    ConvBnActRegistration(vector_kernel<VectorTile<T, 128, 128, 16, 5, 2, 2, 2>>()),
    ConvBnActRegistration(vector_kernel<VectorTile<T, 128, 64, 16, 5, 4, 1, 3>>()),
    ConvBnActRegistration(vector_kernel<VectorTile<T, 64, 128, 16, 5, 2, 2, 3>>()),
    ConvBnActRegistration(vector_kernel<VectorTile<T, 64, 64, 32, 4, 2, 2, 3>>()),
    ConvBnActRegistration(vector_kernel<VectorTile<T, 64, 32, 32, 4, 2, 2, 4>>()),
    ConvBnActRegistration(vector_kernel<VectorTile<T, 32, 64, 32, 4, 2, 2, 4>>()),
    ConvBnActRegistration(vector_kernel<VectorTile<T, 128, 32, 32, 3, 4, 1, 3>>()),
    ConvBnActRegistration(vector_kernel<VectorTile<T, 128, 16, 32, 3, 4, 1, 4>>()),
};

}  // namespace
}  // namespace resnet_fast::sm80
