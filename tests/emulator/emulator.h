// Threads of a CUDA block as fibers on one CPU thread: what the headers in include/ need of the scheduler. Blocks run
// one after the other. Not a simulator: no timing, and no memory model beyond the delay of cp.async.
//
// Every call of a barrier, a warp collective, cp_async_wait or ptx::inside names its place through a default argument.
// A place (Site) counts how often it was reached and can be switched off, which is how a test asks whether it matters.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace emulator {

using Location = std::source_location;

struct Site {
  const char* kind;  // "barrier", "syncwarp", "wait", "inside"; "collective" and "copy" are never switched off
  const char* file;
  unsigned line, column;
  std::uint64_t count;
  std::uint64_t phases, conflicts;  // of an ldmatrix: 8-row reads, and how many more bank cycles they took
  bool disabled;
};

// A source_location is a pointer to a constant of its own for every call in the source; that pointer is the key.
struct CachedSite {
  const void* key;
  Site* site;
};
inline constexpr std::size_t kCachedSites = 4096;
extern CachedSite cached_sites[kCachedSites];
Site& find_site(const char* kind, const Location& where, CachedSite& slot);

// The place's record, one more visit counted.
inline Site& visit(const char* kind, const Location& where) {
  static_assert(sizeof(where) == sizeof(const void*));
  const void* key = __builtin_bit_cast(const void*, where);
  CachedSite& slot = cached_sites[(reinterpret_cast<std::uintptr_t>(key) >> 4) % kCachedSites];
  Site& site = slot.key == key ? *slot.site : find_site(kind, where, slot);
  ++site.count;
  return site;
}

// Ends the launch, which returns cudaErrorLaunchFailure; cudaGetErrorString then has these words and the thread's.
[[noreturn]] void fail(const Site& site, const char* problem);

// Waits for all threads of the block. Returns how many of them passed a true predicate.
struct Count {
  int truths, threads;
};
Count block_barrier(Site& site, bool predicate = false);

// Waits until all 32 lanes of the warp are at this place; `exchange` then runs once, over the lanes' payloads.
using Exchange = void (*)(void* const (&payloads)[32]);
void warp_collective(Site& site, unsigned mask, void* payload, Exchange exchange);

// A copy of 4, 8 or 16 bytes whose destination is poisoned now and filled later; zeros where `from` is null.
void copy_later(const Site& site, void* to, const void* from, int bytes);
void commit_copies();
void wait_for_copies(int pending_groups);

unsigned char* shared_memory();
// Fails unless the bytes are shared memory, aligned to `alignment`.
void check_shared(const Site& site, const void* address, std::size_t bytes, std::size_t alignment);
int lane();

// What cudaLaunchKernelEx makes of a kernel and its arguments: `run(closure)` is one thread's work.
struct Launch {
  unsigned grid[3], block[3];
  std::size_t shared_bytes;
  const void* kernel;
  void (*run)(void* closure);
  void* closure;
};
int launch(const Launch& launch);  // a cudaError_t

}  // namespace emulator
