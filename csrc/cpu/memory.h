// Memory for the engine.
#pragma once

#include <cstddef>

namespace resnet_fast::cpu {

// At an address that is a multiple of 64 bytes, in huge pages if the system has them and it is large: weights are
// read from one end to the other, and small pages cost a lookup each. Freed by std::free. Throws std::bad_alloc.
void* allocate(std::size_t bytes);

}  // namespace resnet_fast::cpu
