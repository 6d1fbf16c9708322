#include "cpu/cpu.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace resnet_fast::cpu {
namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

// All zero for a leaf that the processor does not have.
Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers r;
  if (__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d) == 0) return {};
  return r;
}

constexpr bool bit(std::uint64_t word, int at) { return (word >> at & 1) != 0; }

// Which registers the operating system saves (XCR0). Only where CPUID says OSXSAVE.
std::uint64_t saved_registers() {
  unsigned low = 0;
  unsigned high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return std::uint64_t{high} << 32 | low;
}

// Asks for the registers of tiles, which Linux gives to processes that do; other systems give them to all.
bool tiles_granted() {
#ifdef __linux__
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return true;
#endif
}

Features detect() {
  Features f;
  const Registers one = cpuid(1);
  if (!bit(one.c, 27)) return f;  // OSXSAVE
  const std::uint64_t saved = saved_registers();
  const bool ymm = (saved & 0x6) == 0x6;            // SSE and AVX state
  const bool zmm = ymm && (saved & 0xe0) == 0xe0;   // mask registers and both parts of ZMM
  const bool tiles = (saved & 0x60000) == 0x60000;  // AMX configuration and data
  const Registers seven = cpuid(7);
  const Registers seven_one = cpuid(7, 1);
  f.avx2 = ymm && bit(one.c, 28) && bit(seven.b, 5);
  f.fma = ymm && bit(one.c, 12);
  f.f16c = ymm && bit(one.c, 29);
  f.avx_vnni = f.avx2 && bit(seven_one.a, 4);
  f.avx512 = zmm && bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31);
  f.avx512_bf16 = f.avx512 && bit(seven_one.a, 5);
  f.avx512_vnni = f.avx512 && bit(seven.c, 11);
  if (tiles && bit(seven.d, 24) && tiles_granted()) {
    f.amx_bf16 = bit(seven.d, 22);
    f.amx_int8 = bit(seven.d, 25);
  }
#ifdef RESNET_FAST_EMULATED_TILES
  f.amx_bf16 = f.amx_int8 = f.avx512_bf16 && f.avx512_vnni;
#endif
  return f;
}

// Intel's leaf 4, or AMD's of the same layout. Not sysconf: what the C library says of level 3 has changed.
Caches measure() {
  Caches found;
  for (const unsigned leaf : {0x4U, 0x8000001dU}) {
    bool any = false;
    for (unsigned index = 0; index < 16; ++index) {
      const Registers r = cpuid(leaf, index);
      const unsigned type = r.a & 0x1f;
      if (type == 0) break;
      if (type == 2) continue;  // instructions only
      const std::int64_t bytes =
          (std::int64_t{r.b >> 22} + 1) * ((r.b >> 12 & 0x3ff) + 1) * ((r.b & 0xfff) + 1) * (std::int64_t{r.c} + 1);
      any = true;
      switch (r.a >> 5 & 0x7) {
        case 1:
          found.l1d = bytes;
          break;
        case 2:
          found.l2 = bytes;
          break;
        case 3:
          found.l3 = bytes;
          found.l3_threads = static_cast<int>(r.a >> 14 & 0xfff) + 1;
          break;
        default:
          break;
      }
    }
    if (any) break;
  }
  return found;
}

std::string brand() {
  if (cpuid(0x80000000U).a < 0x80000004U) return "";
  std::string name;
  for (unsigned leaf = 0x80000002U; leaf <= 0x80000004U; ++leaf) {
    const Registers r = cpuid(leaf);
    for (const unsigned word : {r.a, r.b, r.c, r.d}) {
      for (int shift = 0; shift < 32; shift += 8) name += static_cast<char>(word >> shift & 0x7f);
    }
  }
  return name.substr(0, name.find('\0'));
}

#else

std::string brand() { return ""; }

Features detect() { return {}; }

Caches measure() {
  Caches found;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const auto take = [](std::int64_t& size, int name) {
    if (const long bytes = sysconf(name); bytes > 0) size = bytes;
  };
  take(found.l1d, _SC_LEVEL1_DCACHE_SIZE);
  take(found.l2, _SC_LEVEL2_CACHE_SIZE);
  take(found.l3, _SC_LEVEL3_CACHE_SIZE);
  if (const long threads = sysconf(_SC_NPROCESSORS_CONF); threads > 0) found.l3_threads = static_cast<int>(threads);
#endif
  return found;
}

#endif

constexpr Isa kCompiled[] = {
    Isa::portable,
#ifdef RESNET_FAST_AVX2
    Isa::avx2,
#endif
#ifdef RESNET_FAST_AVX512
    Isa::avx512,
#endif
#ifdef RESNET_FAST_AVX512_VNNI
    Isa::avx512_vnni,
#endif
#ifdef RESNET_FAST_AVX512_BF16
    Isa::avx512_bf16,
#endif
#ifdef RESNET_FAST_AMX
    Isa::amx,
#endif
};

bool runs(Isa isa, const Features& f) {
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return f.avx2 && f.fma;
    case Isa::avx512:
      return f.avx2 && f.fma && f.avx512;
    case Isa::avx512_vnni:
      return runs(Isa::avx512, f) && f.avx512_vnni;
    case Isa::avx512_bf16:
      return runs(Isa::avx512_vnni, f) && f.avx512_bf16;
    case Isa::amx:
      return runs(Isa::avx512_bf16, f) && f.amx_bf16 && f.amx_int8;
  }
  return false;
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::string listed(std::span<const Isa> isas) {
  std::string text;
  for (const Isa isa : isas) text.append(text.empty() ? "'" : ", '").append(name_of(isa)).append("'");
  return text;
}

}  // namespace

const Features& machine_features() {
  static const Features found = detect();
  return found;
}

std::string processor() { return brand(); }

const Caches& caches() {
  static const Caches found = measure();
  return found;
}

std::span<const Isa> compiled() { return kCompiled; }

Isa best(const Features& features, std::span<const Isa> among) {
  Isa found = Isa::portable;
  for (const Isa isa : among) {
    if (isa > found && runs(isa, features)) found = isa;
  }
  return found;
}

Isa choose(const Features& features, std::span<const Isa> among, std::string_view wanted) {
  if (wanted.empty()) return best(features, among);
  const std::string was = "RESNET_FAST_ISA is '" + std::string(wanted) + "'";
  const auto* const named = std::find(kIsaNames.begin(), kIsaNames.end(), wanted);
  if (named == kIsaNames.end()) {
    throw std::invalid_argument(
        was +
        "; it must be one of 'portable', 'avx2', 'avx512', 'avx512_vnni', 'avx512_bf16', 'amx', or empty for the best");
  }
  const Isa isa = static_cast<Isa>(named - kIsaNames.begin());
  if (std::find(among.begin(), among.end(), isa) == among.end()) {
    throw std::invalid_argument(was + ", which this build does not have; it has " + listed(among));
  }
  if (!runs(isa, features)) {
    throw std::invalid_argument(was + ", which this processor does not run; '" +
                                std::string(name_of(best(features, among))) + "' is the highest that it runs");
  }
  return isa;
}

Isa isa() {
  static const Isa chosen = choose(machine_features(), compiled(), environment("RESNET_FAST_ISA"));
  return chosen;
}

const Features& features() {
  static const Features usable = [] {
    Features f;
    const Features& machine = machine_features();
    if (isa() >= Isa::avx2) {
      f = machine;
      if (isa() < Isa::avx512) {
        f.avx512 = false;
      }
      if (isa() < Isa::avx512_vnni) {
        f.avx512_vnni = false;
      }
      if (isa() < Isa::avx512_bf16) {
        f.avx512_bf16 = false;
      }
      if (isa() < Isa::amx) {
        f.amx_bf16 = f.amx_int8 = false;
      }
    }
    return f;
  }();
  return usable;
}

}  // namespace resnet_fast::cpu
