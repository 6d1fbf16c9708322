// conv_bn_act on sm_90a: 1x1 convolution in bf16 as a matrix product, 128 pixels by 64 output channels. Nothing else.
#include "kernels/conv_bn_act_sm90.cuh"

namespace resnet_fast {
namespace {
const ConvBnActRegistration registration(sm90::kernel<sm90::Gemm<Precision::bf16, 128, 64, 64, 1>>());
}  // namespace
}  // namespace resnet_fast
