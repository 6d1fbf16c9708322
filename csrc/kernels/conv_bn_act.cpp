#include "kernels/conv_bn_act.h"

#include <algorithm>
#include <utility>

namespace resnet_fast {

namespace {
// A function's static, so that it exists before any registration at namespace scope runs.
std::vector<ConvBnActKernel>& registry() {
  static std::vector<ConvBnActKernel> kernels;
  return kernels;
}
}  // namespace

const std::vector<ConvBnActKernel>& conv_bn_act_kernels() { return registry(); }

ConvBnActRegistration::ConvBnActRegistration(ConvBnActKernel kernel) {
  std::vector<ConvBnActKernel>& kernels = registry();
  const auto later = [](const ConvBnActKernel& a, const ConvBnActKernel& b) { return a.name < b.name; };
  kernels.insert(std::upper_bound(kernels.begin(), kernels.end(), kernel, later), std::move(kernel));
}

}  // namespace resnet_fast
