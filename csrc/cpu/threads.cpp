#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "memory.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif
#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

namespace resnet_fast::cpu {
namespace {

void relax() {
#ifdef __x86_64__
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// About 50 microseconds: longer than from one layer to the next, much less than a time slice.
constexpr int spins = 1500;

// A thread that the system stops while it holds an item keeps all others waiting until it runs again, which on a
// shared processor is a time slice, or as long as several layers. So each offers its processor between two items before
// its own slice ends, if somebody else wants it; if nobody does, it goes on in less than a microsecond.
class Turn {
 public:
  void begin() { began_ = std::chrono::steady_clock::now(); }
  void offer() {
    if (std::chrono::steady_clock::now() - began_ > std::chrono::milliseconds(2)) {
      std::this_thread::yield();
      begin();
    }
  }

 private:
  std::chrono::steady_clock::time_point began_{};
};

thread_local Turn turn;

// The processor that runs this thread; -1 if the system does not say.
int processor() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

class Scratch {
 public:
  float* reserve(Index floats) {
    if (floats > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<float*>(allocate(static_cast<std::size_t>(floats) * sizeof(float))));
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<float, Free> memory_;
  Index size_ = 0;
};

// The next item of a range: the job's number in the upper half, the item in the lower one. An item is taken by raising
// it, which fails if the job has changed meanwhile. So nobody waits for a thread that was late.
struct alignas(64) Range {
  std::atomic<std::uint64_t> ticket{0};
};

constexpr Index most_ranges = 64;
constexpr std::uint64_t none = 0xffffffffu;  // a ticket of no item

// One job at a time. Each thread has a range of the items, and helps others when it has done them. A layer's items are
// in the order of its pixels: so a thread finds in its own cache what it wrote for the layer before.
struct Shared {
  Range ranges[most_ranges];
  std::atomic<Index> count{0};  // of ranges
  std::atomic<Index> done{0};
  std::atomic<Index> items{0};
  std::atomic<Work> work{nullptr};
  std::atomic<const void*> context{nullptr};
  std::atomic<Index> scratch_floats{0};
  std::atomic<int> threads{1};     // that may take items of this job
  std::atomic<int> processor{-1};  // the caller's
  std::atomic<std::uint32_t> wake{0};
  std::atomic<int> sleepers{0};
  std::atomic<std::uint32_t> finished{0};  // raised when a job's last item is done
  std::atomic<bool> caller_sleeps{false};
};

constexpr int most_workers = 64;

// Of a thread: whether it sleeps, and where it may run.
struct Worker {
#ifdef __linux__
  std::mutex mutex;  // of all below
  bool sleeps = false, sent_away = false;
  pthread_t thread{};
  cpu_set_t allowed{}, sent{};  // before it was sent away, and then
#endif
};

struct Threads {
  Shared shared;
  Worker workers[most_workers];  // by their numbers, from 1 on
  std::mutex mutex;
  int started = 0;  // workers, by whoever holds the mutex
  Scratch scratch;  // the caller's
};

Threads* everyone = nullptr;
std::once_flag made;

// A child of fork() has none of the parent's threads: it starts its own.
void forget() { everyone = new Threads; }

Threads& the_threads() {
  std::call_once(made, [] {
    everyone = new Threads;  // never destroyed: its threads end with the process
    pthread_atfork(nullptr, nullptr, forget);
  });
  return *everyone;
}

enum class Taken { all, last, stopped };

// Takes items of job `number` from a range until none is left: then all, or the last one of the job. Stops at another
// job, and if there is no memory.
Taken take(Shared& shared, std::uint32_t number, Index index, float* (*reserve)(Scratch&, Index), Scratch& scratch) {
  std::atomic<std::uint64_t>& next = shared.ranges[index].ticket;
  for (;;) {
    turn.offer();
    std::uint64_t ticket = next.load(std::memory_order_acquire);
    for (;;) {
      if (static_cast<std::uint32_t>(ticket >> 32) != number) {
        return Taken::stopped;
      }
      const Index items = shared.items.load(std::memory_order_acquire);
      const Index count = shared.count.load(std::memory_order_acquire);
      if (static_cast<Index>(ticket & none) >= items * (index + 1) / std::max<Index>(count, 1)) {
        return Taken::all;
      }
      const Work work = shared.work.load(std::memory_order_acquire);
      const void* context = shared.context.load(std::memory_order_acquire);
      const Index floats = shared.scratch_floats.load(std::memory_order_acquire);
      float* memory = reserve(scratch, floats);
      if (memory == nullptr && floats != 0) {
        return Taken::stopped;  // the caller does it
      }
      if (!next.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
        continue;
      }
      // Only now it is sure that what was read belongs to this job.
      work(context, static_cast<Index>(ticket & none), memory);
      if (shared.done.fetch_add(1, std::memory_order_acq_rel) + 1 == items) {
        return Taken::last;
      }
      break;
    }
  }
}

// As thread `index`, takes items of its own range, then of the others; whether the last of all was done here.
bool take_all(Shared& shared, std::uint32_t number, Index index, float* (*reserve)(Scratch&, Index), Scratch& scratch) {
  const Index count = std::max<Index>(shared.count.load(std::memory_order_acquire), 1);  // if it is another job's, so
  for (Index i = 0; i < count; ++i) {                                                    // are all tickets
    const Taken taken = take(shared, number, (index + i) % count, reserve, scratch);
    if (taken != Taken::all) {
      return taken == Taken::last;
    }
  }
  return false;
}

float* reserve_or_null(Scratch& scratch, Index floats) {
  try {
    return scratch.reserve(floats);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

// A thread that wakes may do so on the processor of its caller, and if the system knows of no cache that processors
// share, it leaves both there for tens of milliseconds. So the caller sends threads that sleep away before it wakes
// them, a thread that finds itself there goes away, and both may go anywhere afterwards.
#ifdef __linux__
// The processors that are allowed but one; whether there are enough of them for threads of their own.
bool without(int processor, int threads, const cpu_set_t& allowed, cpu_set_t& others) {
  others = allowed;
  if (processor >= 0 && processor < CPU_SETSIZE) {
    CPU_CLR(processor, &others);
  }
  return CPU_COUNT(&others) < CPU_COUNT(&allowed) && CPU_COUNT(&others) >= threads - 1;
}
#endif

void send_away([[maybe_unused]] Threads& own, [[maybe_unused]] int threads) {
#ifdef __linux__
  const int mine = processor();
  for (int i = 1; i < std::min(threads, most_workers); ++i) {
    Worker& worker = own.workers[i];
    const std::lock_guard<std::mutex> lock(worker.mutex);
    worker.sent_away =
        worker.sent_away ||
        (worker.sleeps && pthread_getaffinity_np(worker.thread, sizeof worker.allowed, &worker.allowed) == 0 &&
         without(mine, threads, worker.allowed, worker.sent) &&
         pthread_setaffinity_np(worker.thread, sizeof worker.sent, &worker.sent) == 0);
  }
#endif
}

// Of the thread that calls it.
void leave([[maybe_unused]] int occupied, [[maybe_unused]] int threads) {
#ifdef __linux__
  cpu_set_t allowed, others;
  if (occupied >= 0 && processor() == occupied && sched_getaffinity(0, sizeof allowed, &allowed) == 0 &&
      without(occupied, threads, allowed, others) && sched_setaffinity(0, sizeof others, &others) == 0) {
    sched_setaffinity(0, sizeof allowed, &allowed);
  }
#endif
}

void fall_asleep([[maybe_unused]] Worker* worker) {
#ifdef __linux__
  if (worker != nullptr) {
    const std::lock_guard<std::mutex> lock(worker->mutex);
    worker->thread = pthread_self();
    worker->sleeps = true;
  }
#endif
}

void awake([[maybe_unused]] Worker* worker) {
#ifdef __linux__
  if (worker != nullptr) {
    const std::lock_guard<std::mutex> lock(worker->mutex);
    worker->sleeps = false;
    cpu_set_t now;  // somebody else may have said meanwhile where it is to run
    if (worker->sent_away && sched_getaffinity(0, sizeof now, &now) == 0 && CPU_EQUAL(&now, &worker->sent)) {
      sched_setaffinity(0, sizeof worker->allowed, &worker->allowed);
    }
    worker->sent_away = false;
  }
#endif
}

void serve(Threads* own, int index) {
  Shared& shared = own->shared;
  Worker* const worker = index < most_workers ? &own->workers[index] : nullptr;
  Scratch scratch;
  std::uint32_t seen = 0;
  for (;;) {
    std::uint32_t number = seen;
    for (int i = 0; i < spins && number == seen; ++i) {
      relax();
      number = shared.wake.load(std::memory_order_acquire);
    }
    if (number == seen) {
      fall_asleep(worker);
      shared.sleepers.fetch_add(1, std::memory_order_seq_cst);
      shared.wake.wait(seen, std::memory_order_seq_cst);
      shared.sleepers.fetch_sub(1, std::memory_order_seq_cst);
      awake(worker);
      turn.begin();
      number = shared.wake.load(std::memory_order_acquire);
      if (number == seen) {
        continue;
      }
    }
    seen = number;
    const int threads = shared.threads.load(std::memory_order_relaxed);
    if (index >= threads) {
      continue;
    }
    leave(shared.processor.load(std::memory_order_relaxed), threads);
    if (take_all(shared, number, index, reserve_or_null, scratch)) {
      shared.finished.store(number, std::memory_order_seq_cst);
      if (shared.caller_sleeps.load(std::memory_order_seq_cst)) {
        shared.finished.notify_all();
      }
    }
  }
}

void alone(Index items, Index scratch_floats, Work work, const void* context) {
  thread_local Scratch scratch;
  float* memory = scratch.reserve(scratch_floats);
  for (Index item = 0; item < items; ++item) {
    work(context, item, memory);
  }
}

}  // namespace

Team::Team(int threads) : threads_(std::max(threads, 1)), owner_(threads_ > 1 && the_threads().mutex.try_lock()) {
  if (!owner_) {
    return;
  }
  turn.begin();
  Threads& own = the_threads();
  try {
    for (; own.started < threads_ - 1; ++own.started) {
      std::thread(serve, &own, own.started + 1).detach();
    }
  } catch (const std::exception&) {  // no more threads or memory are to be had: the threads that there are will do
  }
}

Team::~Team() {
  if (owner_) {
    the_threads().mutex.unlock();
  }
}

void Team::run(Index items, Index scratch_floats, Work work, const void* context) {
  if (!owner_ || items <= 1) {
    alone(items, scratch_floats, work, context);
    return;
  }
  Threads& own = the_threads();
  Shared& shared = own.shared;
  own.scratch.reserve(scratch_floats);
  const std::uint64_t number = ((shared.ranges[0].ticket.load(std::memory_order_relaxed) >> 32) + 1) & none;
  const Index count = std::min<Index>({threads_, items, most_ranges});
  // Nobody takes items of the last job any more, so a thread that reads these values too early fails at the ticket:
  // released and acquired, none of them is seen before the ticket is.
  for (Index i = 0; i < std::max(count, shared.count.load(std::memory_order_relaxed)); ++i) {
    shared.ranges[i].ticket.store(number << 32 | none, std::memory_order_seq_cst);
  }
  shared.count.store(count, std::memory_order_release);
  shared.items.store(items, std::memory_order_release);
  shared.work.store(work, std::memory_order_release);
  shared.context.store(context, std::memory_order_release);
  shared.scratch_floats.store(scratch_floats, std::memory_order_release);
  shared.threads.store(threads_, std::memory_order_relaxed);
  shared.processor.store(processor(), std::memory_order_relaxed);
  shared.done.store(0, std::memory_order_relaxed);
  for (Index i = 0; i < count; ++i) {
    shared.ranges[i].ticket.store(number << 32 | static_cast<std::uint64_t>(items * i / count),
                                  std::memory_order_release);
  }
  if (shared.sleepers.load(std::memory_order_relaxed) > 0) {
    send_away(own, threads_);
  }
  shared.wake.store(static_cast<std::uint32_t>(number), std::memory_order_seq_cst);
  if (shared.sleepers.load(std::memory_order_seq_cst) > 0) {
    shared.wake.notify_all();
  }
  if (take_all(shared, static_cast<std::uint32_t>(number), 0, reserve_or_null, own.scratch)) {
    return;
  }
  for (int i = 0; i < spins; ++i) {
    if (shared.done.load(std::memory_order_acquire) == items) {
      return;
    }
    relax();
  }
  shared.caller_sleeps.store(true, std::memory_order_seq_cst);
  for (;;) {
    const std::uint32_t seen = shared.finished.load(std::memory_order_seq_cst);
    if (seen == number || shared.done.load(std::memory_order_acquire) == items) {
      break;
    }
    shared.finished.wait(seen, std::memory_order_seq_cst);
  }
  shared.caller_sleeps.store(false, std::memory_order_relaxed);
}

}  // namespace resnet_fast::cpu
