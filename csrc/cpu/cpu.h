// What this processor has, and which of the module's instruction sets runs on it. Found once per process, by CPUID and
// what the operating system saves of the registers, never from the machine that compiled this.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace resnet_fast::cpu {

// The instruction sets that kernels are compiled for, each in a file of its own (isa_<name>.cpp). A later one includes
// the earlier ones.
enum class Isa { portable, avx2, avx512, avx512_vnni, avx512_bf16, amx };

inline constexpr std::array<std::string_view, 6> kIsaNames{"portable",    "avx2",        "avx512",
                                                           "avx512_vnni", "avx512_bf16", "amx"};

constexpr std::string_view name_of(Isa isa) { return kIsaNames[static_cast<std::size_t>(isa)]; }

// Instructions that both the processor and the operating system support.
struct Features {
  bool avx2 = false;
  bool fma = false;
  bool f16c = false;
  bool avx_vnni = false;
  bool avx512 = false;  // F, BW, DQ and VL together
  bool avx512_bf16 = false;
  bool avx512_vnni = false;
  bool amx_bf16 = false;  // and Linux has granted this process the tiles
  bool amx_int8 = false;
};

// Bytes of the caches that a core sees, of which the level 3 is shared by `l3_threads` hardware threads; 0 for a cache
// that is not there. Unknown sizes are those of a small machine: 32 KiB, 512 KiB, none.
struct Caches {
  std::int64_t l1d = 32 << 10;
  std::int64_t l2 = 512 << 10;
  std::int64_t l3 = 0;
  int l3_threads = 1;
};

// The features of this machine, whatever RESNET_FAST_ISA says.
const Features& machine_features();

// What may be used in this process: machine_features() without what isa() rules out.
const Features& features();

const Caches& caches();

// What the processor calls itself, "" if it does not say.
std::string processor();

// The instruction sets in this build, lowest first.
std::span<const Isa> compiled();

// The highest instruction set in `among` that a machine with these features runs.
Isa best(const Features& features, std::span<const Isa> among);

// As best(), or `wanted`, if it is not empty. Throws std::invalid_argument if `wanted` names none, or one that the
// build or the machine lacks.
Isa choose(const Features& features, std::span<const Isa> among, std::string_view wanted);

// The instruction set of this process: choose() for this machine and the environment variable RESNET_FAST_ISA, read at
// the first call. Throws as choose(), at every call.
Isa isa();

}  // namespace resnet_fast::cpu
