// Sites, fibers, the scheduler, delayed copies and launches. A fiber runs until it has to wait for other threads; who
// runs next is decided by an order of the threads drawn from the seed, in the manner of probabilistic concurrency
// testing (Burckhardt et al. 2010): always the first that can, with the order drawn anew now and then. Against
// schedules that pick uniformly at every step, this lets threads run far ahead of others, which is what shows a missing
// barrier.
#include "emulator.h"

#include <cuda_runtime.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "build_info.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

const char* resnet_fast::cuda_compiler_version() { return "emulated"; }

namespace emulator {

CachedSite cached_sites[kCachedSites];

namespace {

constexpr std::size_t kStackBytes = 256 * 1024;  // a report of the sanitizer takes place on it
// Limits of capability 8.0, which cudaDeviceGetAttribute reports.
constexpr std::size_t kMostSharedMemory = 163 * 1024, kUnaskedSharedMemory = 48 * 1024;
constexpr int kMostThreads = 1024;

// --- sites

std::deque<Site> sites;
struct {
  std::string file;
  unsigned line = 0, column = 0;
} disabled;

bool is_disabled(const Site& site) {
  return site.line == disabled.line && site.column == disabled.column && site.file == disabled.file;
}

// --- state of the running block

struct Copy {
  void* to;
  unsigned char from[16];
  std::size_t bytes;
  int group;
  bool arrived;
};

enum class State { runnable, at_barrier, at_collective, exited };

struct Thread {
  // Where it goes on: a fiber that never ran in `start`, otherwise in `resume`.
  ucontext_t start;
  void* resume[5];
  bool started = false;
  void* stack = nullptr;

  int index, rank;
  uint3 position;
  State state;
  const Site* where;
  void* payload;
  bool predicate;
  Count count;
  std::vector<Copy> copies;
  int groups;
};

std::mt19937_64 random_bits;
std::vector<std::unique_ptr<Thread>> threads;  // of the largest block so far
int block_threads;
Thread* self;
void* resume_launch[5];  // where the launch goes on when the block's threads are done
const Launch* current;
std::string failure;  // of the current launch
std::string last_failure;

unsigned char* shared;
int alive, at_barrier;
const Site* barrier;  // where those at_barrier wait

// Counted, because looking at all lanes whenever one arrives would take most of the time.
struct Warp {
  int exited, at_collective;
  const Site* where;  // all at_collective wait at the same place
};
std::array<Warp, kMostThreads / 32> warps;

std::vector<Thread*> order;                 // by rank
std::uint64_t runnable[kMostThreads / 64];  // a bit for each rank
bool uniform;
int steps_to_new_order, steps_between_orders;
unsigned late_copies;  // of 256

int draw(int bound) { return static_cast<int>(random_bits() % static_cast<unsigned>(bound)); }

void set_state(Thread& thread, State state) {
  thread.state = state;
  const std::uint64_t bit = std::uint64_t{1} << thread.rank % 64;
  if (state == State::runnable) {
    runnable[thread.rank / 64] |= bit;
  } else {
    runnable[thread.rank / 64] &= ~bit;
  }
}

// Warps in random order, and the lanes of each.
void draw_order() {
  const int warps = (block_threads + 31) / 32;
  std::vector<int> warp(warps);
  std::iota(warp.begin(), warp.end(), 0);
  std::shuffle(warp.begin(), warp.end(), random_bits);
  order.clear();
  for (const int w : warp) {
    const auto first = order.insert(order.end(), std::min(32, block_threads - 32 * w), nullptr);
    for (auto it = first; it != order.end(); ++it) *it = threads[32 * w + (it - first)].get();
    std::shuffle(first, order.end(), random_bits);
  }
  std::fill(std::begin(runnable), std::end(runnable), 0);
  for (int rank = 0; rank < block_threads; ++rank) {
    order[rank]->rank = rank;
    set_state(*order[rank], order[rank]->state);
  }
}

// The thread that runs next, null if none can.
Thread* choose() {
  if (--steps_to_new_order == 0) {
    draw_order();
    steps_to_new_order = steps_between_orders;
  }
  const int words = (block_threads + 63) / 64, start = uniform ? draw(block_threads) : 0;
  for (int i = 0; i <= words; ++i) {  // the first word again at the end, for the bits before `start`
    const int word = (start / 64 + i) % words;
    const std::uint64_t bits = runnable[word] & (i == 0 ? ~std::uint64_t{0} << start % 64 : ~std::uint64_t{0});
    if (bits != 0) return order[64 * word + std::countr_zero(bits)];
  }
  return nullptr;
}

// --- fibers. What changes stacks is not instrumented: the sanitizer would take the jump for the end of the frames.

#define EMULATOR_CHANGES_STACKS __attribute__((noinline, no_sanitize("address")))

[[noreturn]] EMULATOR_CHANGES_STACKS void jump(void** to) { __builtin_longjmp(to, 1); }

[[noreturn]] EMULATOR_CHANGES_STACKS void enter(Thread& thread) {
  self = &thread;
  threadIdx = thread.position;
  if (thread.started) jump(thread.resume);
  thread.started = true;
  setcontext(&thread.start);
  std::abort();
}

// Leaves for `next`, or for the launch if that is null; returns when somebody comes back to `from`.
EMULATOR_CHANGES_STACKS void leave(void** from, Thread* next) {
  if (__builtin_setjmp(from) != 0) return;
  if (next != nullptr) enter(*next);
  jump(resume_launch);
}

std::string place(const Site& site) { return std::string(site.file) + ":" + std::to_string(site.line); }

// Who waits where, as "31 threads wait at the barrier a.cu:12 (0-30); 1 has exited (31)".
std::string waiting() {
  std::map<std::string, std::vector<int>> groups;
  for (int i = 0; i < block_threads; ++i) {
    const Thread& thread = *threads[i];
    const bool waits = thread.state == State::at_barrier || thread.state == State::at_collective;
    groups[waits ? std::string("waiting at the ") + thread.where->kind + " " + place(*thread.where)
                 : (thread.state == State::exited ? "exited" : "running")]
        .push_back(i);
  }
  std::string text;
  for (const auto& [what, members] : groups) {
    text += (text.empty() ? "" : "; ") + std::to_string(members.size()) + " " + what + " (thread " +
            std::to_string(members.front()) + (members.size() > 1 ? ", ..." : "") + ")";
  }
  return text;
}

[[noreturn]] void end_launch(const std::string& problem) {
  failure = problem;
  for (const auto& thread : threads) thread->started = false;  // their stacks are abandoned
  jump(resume_launch);
}

// Lets others run until this thread can go on.
void yield() {
  Thread* next = choose();
  if (next == self) return;
  if (next == nullptr && alive > 0) end_launch("deadlock: " + waiting());
  leave(self->resume, next);
}

void release_barrier() {
  Count count{0, at_barrier};
  for (int i = 0; i < block_threads; ++i)
    count.truths += threads[i]->state == State::at_barrier && threads[i]->predicate;
  for (int i = 0; i < block_threads; ++i) {
    if (threads[i]->state != State::at_barrier) continue;
    threads[i]->count = count;
    set_state(*threads[i], State::runnable);
  }
  at_barrier = 0;
}

void arrive(Copy& copy) {
  if (!copy.arrived) memcpy(copy.to, copy.from, copy.bytes);
  copy.arrived = true;
}

void exit_thread() {
  if (!self->copies.empty()) {
    // Where a wait was switched off, its absence is to show in the results.
    if (disabled.line == 0) end_launch("thread " + std::to_string(self->index) + " exited with copies on their way");
    for (Copy& copy : self->copies) arrive(copy);
  }
  set_state(*self, State::exited);
  --alive;
  ++warps[self->index / 32].exited;
  if (at_barrier > 0) fail(*barrier, ("a barrier without all threads: " + waiting()).c_str());
  yield();
}

void thread_main() {
  for (;;) {  // once for every block
    current->run(current->closure);
    exit_thread();
  }
}

void prepare(Thread& thread, int index) {
  thread.index = index;
  const auto i = static_cast<unsigned>(index);
  thread.position = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  thread.state = State::runnable;
  thread.copies.clear();
  thread.groups = 0;
  if (thread.started) return;
  if (thread.stack == nullptr) {
    thread.stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (thread.stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(thread.stack, 4096, PROT_NONE);
  }
  getcontext(&thread.start);
  // Tops at different offsets, or all stacks would share the same few sets of the cache.
  const std::size_t offset = static_cast<std::size_t>(index) * 1088 % 32768;
  thread.start.uc_stack.ss_sp = thread.stack;
  thread.start.uc_stack.ss_size = kStackBytes - offset;
  makecontext(&thread.start, thread_main, 0);
}

void run_block() {
  memset(shared, 0xff, current->shared_bytes);
  for (int i = 0; i < block_threads; ++i) prepare(*threads[i], i);
  alive = block_threads;
  at_barrier = 0;
  warps.fill({});
  uniform = draw(4) == 0;
  steps_between_orders = 1 << (6 + 3 * draw(3));
  steps_to_new_order = draw(2) == 0 ? -1 : 1 + draw(steps_between_orders);
  late_copies = std::array<unsigned, 4>{256, 256, 128, 0}[draw(4)];
  draw_order();
  leave(resume_launch, choose());
}

}  // namespace

Site& find_site(const char* kind, const Location& where, CachedSite& slot) {
  const auto found = std::find_if(sites.begin(), sites.end(), [&](const Site& site) {
    return site.line == where.line() && site.column == where.column() && strcmp(site.file, where.file_name()) == 0;
  });
  slot.key = __builtin_bit_cast(const void*, where);
  if (found != sites.end()) {
    slot.site = &*found;
  } else {
    slot.site = &sites.emplace_back(Site{kind, where.file_name(), where.line(), where.column(), 0, 0, 0, false});
    slot.site->disabled = is_disabled(*slot.site);
  }
  return *slot.site;
}

void fail(const Site& site, const char* problem) {
  end_launch(place(site) + ": " + problem + " (block " + std::to_string(blockIdx.x) + ", thread " +
             std::to_string(self->index) + ")");
}

Count block_barrier(Site& site, bool predicate) {
  if (alive < block_threads) fail(site, ("a barrier without all threads: " + waiting()).c_str());
  if (at_barrier == 0) barrier = &site;
  if (barrier != &site) fail(site, ("not the barrier at which others wait: " + waiting()).c_str());
  self->where = &site;
  self->predicate = predicate;
  set_state(*self, State::at_barrier);
  if (++at_barrier == block_threads) release_barrier();
  yield();
  return self->count;
}

void warp_collective(Site& site, unsigned mask, void* payload, Exchange exchange) {
  if (mask != 0xffffffffu) fail(site, "the mask does not name all lanes");
  const int first = self->index / 32 * 32;
  if (first + 32 > block_threads) fail(site, "the warp has fewer than 32 threads");
  Warp& warp = warps[first / 32];
  for (int i = 0; warp.exited > 0; ++i) {
    if (threads[first + i]->state == State::exited)
      fail(site, ("lane " + std::to_string(i) + " of the warp has exited").c_str());
  }
  for (int i = 0; warp.at_collective > 0 && warp.where != &site; ++i) {
    if (threads[first + i]->state == State::at_collective)
      fail(site, ("lane " + std::to_string(i) + " of the warp is at " + place(*warp.where)).c_str());
  }
  self->where = warp.where = &site;
  self->payload = payload;
  set_state(*self, State::at_collective);
  if (++warp.at_collective == 32) {
    void* payloads[32];
    for (int i = 0; i < 32; ++i) payloads[i] = threads[first + i]->payload;
    exchange(payloads);
    for (int i = 0; i < 32; ++i) set_state(*threads[first + i], State::runnable);
    warp.at_collective = 0;
  }
  yield();
}

void copy_later(const Site& site, void* to, const void* from, int bytes) {
  const auto size = static_cast<std::size_t>(bytes);
  check_shared(site, to, size, size);
  if (reinterpret_cast<std::uintptr_t>(from) % size != 0) fail(site, "the copy's source is not aligned to its size");
  memset(to, 0xff, size);
  Copy copy{to, {}, size, self->groups, false};
  if (from != nullptr) memcpy(copy.from, from, size);
  if (random_bits() % 256 >= late_copies) arrive(copy);
  self->copies.push_back(copy);
}

void commit_copies() { ++self->groups; }

void wait_for_copies(int pending_groups) {
  std::vector<Copy>& copies = self->copies;
  const auto arrives = [&](const Copy& copy) { return copy.group < self->groups - pending_groups; };
  const auto end = std::find_if_not(copies.begin(), copies.end(), arrives);
  std::for_each(copies.begin(), end, arrive);
  copies.erase(copies.begin(), end);
}

unsigned char* shared_memory() { return shared; }

void check_shared(const Site& site, const void* address, std::size_t bytes, std::size_t alignment) {
  const auto at = reinterpret_cast<std::uintptr_t>(address), begin = reinterpret_cast<std::uintptr_t>(shared);
  if (at < begin || at + bytes > begin + current->shared_bytes) fail(site, "the address is outside shared memory");
  if (at % alignment != 0) fail(site, "the address in shared memory is misaligned");
}

int lane() { return self->index % 32; }

// --- launches

namespace {
std::map<const void*, std::size_t> asked_shared_memory;
int last_error = cudaSuccess;
}  // namespace

int launch(const Launch& what) {
  const auto refuse = [](cudaError error) { return last_error = error; };
  const std::uint64_t in_block = std::uint64_t{what.block[0]} * what.block[1] * what.block[2];
  if (in_block == 0 || in_block > kMostThreads) return refuse(cudaErrorInvalidConfiguration);
  for (int i = 0; i < 3; ++i) {
    if (what.grid[i] == 0 || what.grid[i] > (i == 0 ? 0x7fffffffu : 0xffffu))
      return refuse(cudaErrorInvalidConfiguration);
  }
  const auto asked = asked_shared_memory.find(what.kernel);
  if (what.shared_bytes > (asked == asked_shared_memory.end() ? kUnaskedSharedMemory : asked->second)) {
    return refuse(cudaErrorInvalidValue);
  }

  current = &what;
  block_threads = static_cast<int>(in_block);
  blockDim = dim3(what.block[0], what.block[1], what.block[2]);
  gridDim = dim3(what.grid[0], what.grid[1], what.grid[2]);
  while (threads.size() < in_block) threads.push_back(std::make_unique<Thread>());
  // The end is exact under the sanitizer: the byte behind it is poisoned.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, what.shared_bytes) != 0) return refuse(cudaErrorMemoryAllocation);
  shared = static_cast<unsigned char*>(memory);

  std::vector<std::uint64_t> blocks(std::uint64_t{gridDim.x} * gridDim.y * gridDim.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), random_bits);
  failure.clear();
  for (const std::uint64_t block : blocks) {
    blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
                static_cast<unsigned>(block / gridDim.x / gridDim.y)};
    run_block();
    if (!failure.empty()) break;
  }
  std::free(memory);
  if (failure.empty()) return cudaSuccess;
  last_failure = failure;
  return refuse(cudaErrorLaunchFailure);
}

}  // namespace emulator

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<std::size_t>(value) > emulator::kMostSharedMemory) {
    emulator::last_error = cudaErrorInvalidValue;
    return cudaErrorInvalidValue;
  }
  std::size_t& asked = emulator::asked_shared_memory[kernel];
  asked = std::max(emulator::kUnaskedSharedMemory, static_cast<std::size_t>(value));
  return cudaSuccess;
}

cudaError_t cudaPeekAtLastError() { return static_cast<cudaError_t>(emulator::last_error); }
cudaError_t cudaGetLastError() { return static_cast<cudaError_t>(std::exchange(emulator::last_error, cudaSuccess)); }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
  }
  return "unknown";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return emulator::last_failure.c_str();
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return cudaGetErrorName(error);
  }
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// Few multiprocessors, so that small problems already take more blocks than fit.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 3;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulator::kMostSharedMemory;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
  memset(memory, value, bytes);
  return cudaSuccess;
}

// --- for the tests, through ctypes

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

EMULATOR_EXPORT void emulator_seed(std::uint64_t seed) { emulator::random_bits.seed(seed); }

// Line 0: nothing is switched off.
EMULATOR_EXPORT void emulator_disable(const char* file, unsigned line, unsigned column) {
  emulator::disabled = {file, line, column};
  for (emulator::Site& site : emulator::sites) site.disabled = emulator::is_disabled(site);
}

EMULATOR_EXPORT void emulator_forget_counts() {
  for (emulator::Site& site : emulator::sites) site.count = site.phases = site.conflicts = 0;
}

// A line for every place reached: kind, file, line, column, count, phases, conflicts. Valid until the next call.
EMULATOR_EXPORT const char* emulator_sites() {
  static std::string text;
  text.clear();
  for (const emulator::Site& site : emulator::sites) {
    if (site.count == 0) continue;
    text += std::string(site.kind) + "\t" + site.file;
    for (const std::uint64_t number :
         {std::uint64_t{site.line}, std::uint64_t{site.column}, site.count, site.phases, site.conflicts}) {
      text += "\t" + std::to_string(number);
    }
    text += "\n";
  }
  return text.c_str();
}
