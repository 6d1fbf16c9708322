// A team of threads that take work items in any order, for one caller at a time.
#pragma once

#include "kernels.h"

namespace resnet_fast::cpu {

using Work = void (*)(const void* context, Index item, float* scratch);

// The team, held for several runs in a row, as those of a network's layers are. If another thread of the process holds
// it at the time, the caller does its items alone.
class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Calls work(context, item, scratch) for every item of [0, items), on at most `threads` threads with the caller's own
  // among them, and returns when all are done. `scratch` is memory of the thread's own, of `scratch_floats` floats; its
  // content is undefined. Items are taken one by one, so that a core that is busy with something else takes fewer;
  // whoever has nothing to do spins shortly, then sleeps. Throws std::bad_alloc before any item begins.
  void run(Index items, Index scratch_floats, Work work, const void* context);

 private:
  int threads_;
  bool owner_;
};

}  // namespace resnet_fast::cpu
