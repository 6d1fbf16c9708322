// Convolutions and plans as Python classes.
#pragma once

#include <pybind11/pybind11.h>

namespace resnet_fast::cpu {

void bind_plan(pybind11::module_& m);

}  // namespace resnet_fast::cpu
