// conv_bn_act on sm_90a: 1x1 convolution in fp16 as a matrix product, 128 pixels by 128 output channels. Nothing else.
#include "kernels/conv_bn_act_sm90.cuh"

namespace resnet_fast {
namespace {
const ConvBnActRegistration registration(sm90::kernel<sm90::Gemm<Precision::fp16, 128, 128, 64, 2>>());
}  // namespace
}  // namespace resnet_fast
