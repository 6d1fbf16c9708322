// A team of threads that take work items in any order, for one caller at a time.
#pragma once

#include "kernels.h"

namespace resnet_fast::cpu {

// Calls work(context, item, scratch) for every item of [0, items), on at most `threads` threads with the caller's own
// among them, and returns when all are done. `scratch` is memory of the thread's own, of `scratch_floats` floats; its
// content is undefined. If another thread of the process is in here at the time, the caller does its items alone.
//
// Items are taken one by one, so that a core that is busy with something else takes fewer; whoever has nothing to do
// spins shortly, then sleeps. Throws std::bad_alloc before any item begins.
using Work = void (*)(const void* context, Index item, float* scratch);
void run(int threads, Index items, Index scratch_floats, Work work, const void* context);

// Holds the team for several runs in a row, as those of a network's layers are.
class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  void run(Index items, Index scratch_floats, Work work, const void* context);

 private:
  int threads_;
  bool owner_;
};

// The number of threads that wait for work, for info.
int sleeping_threads();

}  // namespace resnet_fast::cpu
