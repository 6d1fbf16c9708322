#include "memory.h"

#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace resnet_fast::cpu {

void* allocate(std::size_t bytes) {
  constexpr std::size_t huge = 2 << 20;
  const std::size_t alignment = bytes >= huge ? huge : 64;
  const std::size_t whole = (bytes + alignment - 1) / alignment * alignment;
  if (whole < bytes) {
    throw std::bad_alloc();
  }
  void* memory = std::aligned_alloc(alignment, whole == 0 ? alignment : whole);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
#ifdef MADV_HUGEPAGE
  if (alignment == huge) {
    madvise(memory, whole, MADV_HUGEPAGE);  // a wish; it may be refused
  }
#endif
  return memory;
}

}  // namespace resnet_fast::cpu
