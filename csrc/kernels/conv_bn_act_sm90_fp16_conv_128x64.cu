// conv_bn_act on sm_90a: convolution in fp16, 128 pixels by 64 output channels. Nothing else.
#include "kernels/conv_bn_act_sm90.cuh"

namespace resnet_fast {
namespace {
const ConvBnActRegistration registration(sm90::kernel<sm90::Conv<Precision::fp16, 128, 64, 64, 1, 4, 2>>());
}  // namespace
}  // namespace resnet_fast
