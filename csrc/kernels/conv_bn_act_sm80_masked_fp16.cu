// conv_bn_act for capability 8.0 and up, half precision: the masked kernel's tiles. Instantiations only.
#include "kernels/conv_bn_act_sm80_masked.cuh"

namespace resnet_fast::sm80 {
namespace {

using T = __half;

const ConvBnActRegistration registrations[] = {
    ConvBnActRegistration(masked_kernel<MaskedTile<T, 64, 2, 2>>()),
    ConvBnActRegistration(masked_kernel<MaskedTile<T, 16, 4, 1>>()),
};

}  // namespace
}  // namespace resnet_fast::sm80
