// conv_bn_act on sm_90a: convolution in bf16, 64 pixels by 64 output channels. Nothing else.
#include "kernels/conv_bn_act_sm90.cuh"

namespace resnet_fast {
namespace {
const ConvBnActRegistration registration(sm90::kernel<sm90::Conv<Precision::bf16, 64, 64, 64, 1, 6, 2>>());
}  // namespace
}  // namespace resnet_fast
