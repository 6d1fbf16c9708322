// The eight tiles of AMX, of 16 rows of 16 words each; as arrays if RESNET_FAST_EMULATED_TILES is defined, as it is
// for sanitizers, which do not see what instructions for tiles read and write.
#pragma once

#include "simd_avx512.h"

namespace {

using resnet_fast::cpu::Index;
using resnet_fast::cpu::tile_side;

#ifndef RESNET_FAST_EMULATED_TILES

// The tiles' shapes, as the instruction takes them; from here to the end of its scope this thread has the tiles.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) Shapes {
      unsigned char palette = 1, start_row = 0, reserved[14] = {};
      unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    const Shapes shapes;
    static_assert(sizeof(Shapes) == 64);
    asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
  }
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int tile>
  void clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  // `distance`: bytes from one row to the next.
  template <int tile>
  void load(const void* from, Index distance) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(distance), "i"(tile) : "memory");
  }
  template <int tile>
  void store(float* to, Index distance) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(distance), "i"(tile) : "memory");
  }
  // sum[row][column] += the products of the words a[row][i] and b[i][column], for all i.
  template <int sum, int a, int b>
  void multiply(const Bfloat16*) {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
  }
  template <int sum, int a, int b>
  void multiply(const Uint8*) {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
  }
};

#else

class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int tile>
  void clear() {
    for (Vector& row : rows_[tile]) {
      row = zero();
    }
  }
  template <int tile>
  void load(const void* from, Index distance) {
    for (int row = 0; row < tile_side; ++row) {
      rows_[tile][row] = ::load(reinterpret_cast<const float*>(static_cast<const char*>(from) + row * distance));
    }
  }
  template <int tile>
  void store(float* to, Index distance) {
    for (int row = 0; row < tile_side; ++row) {
      ::store(reinterpret_cast<float*>(reinterpret_cast<char*>(to) + row * distance), rows_[tile][row]);
    }
  }
  template <int sum, int a, int b>
  void multiply(const Bfloat16*) {
    multiply_rows<sum, a, b>(multiply_add_pairs);
  }
  template <int sum, int a, int b>
  void multiply(const Uint8*) {
    multiply_rows<sum, a, b>(multiply_add_quads);
  }

 private:
  template <int sum, int a, int b>
  void multiply_rows(Vector (*multiply_words)(Vector, Vector, Vector)) {
    for (int row = 0; row < tile_side; ++row) {
      float words[tile_side];
      ::store(words, rows_[a][row]);
      for (int i = 0; i < tile_side; ++i) {
        rows_[sum][row] = multiply_words(broadcast(words[i]), rows_[b][i], rows_[sum][row]);
      }
    }
  }

  Vector rows_[8][tile_side];
};

#endif

}  // namespace
