// 3x3 convolutions by Winograd's minimal filtering. Part of kernels_isa.h.
#pragma once

#include "kernels_product.h"

namespace {

// One-dimensional transforms: of n = m + 2 values of an image to as many (B^T), and of n products to m outputs (A^T).
// Points of F(4, 3): 0, +-5/8, +-3/2 and infinity, with which its rounding error is 1.8 times direct convolution's
// rather than 4 times; of F(2, 3): 0, +-1 and infinity. Barabasz et al. 2020, arXiv:1803.10986, on the choice.
template <int m>
struct Transform;

template <>
struct Transform<4> {
  static constexpr int n = 6;
  static constexpr float a = 5.0f / 8, b = 3.0f / 2;

  static inline __attribute__((always_inline)) void image(const Vector (&d)[6], Vector (&t)[6]) {
    const Vector sum = broadcast(-(a * a + b * b)), product = broadcast(a * a * b * b);
    const Vector even_a = multiply_add(broadcast(-b * b), d[2], d[4]);
    const Vector odd_a = multiply_add(broadcast(-b * b), d[1], d[3]);
    const Vector even_b = multiply_add(broadcast(-a * a), d[2], d[4]);
    const Vector odd_b = multiply_add(broadcast(-a * a), d[1], d[3]);
    t[0] = multiply_add(product, d[0], multiply_add(sum, d[2], d[4]));
    t[1] = multiply_add(broadcast(a), odd_a, even_a);
    t[2] = multiply_add(broadcast(-a), odd_a, even_a);
    t[3] = multiply_add(broadcast(b), odd_b, even_b);
    t[4] = multiply_add(broadcast(-b), odd_b, even_b);
    t[5] = multiply_add(product, d[1], multiply_add(sum, d[3], d[5]));
  }

  static inline __attribute__((always_inline)) void output(const Vector (&t)[6], Vector (&y)[4]) {
    const Vector sum_a = add(t[1], t[2]), difference_a = subtract(t[1], t[2]);
    const Vector sum_b = add(t[3], t[4]), difference_b = subtract(t[3], t[4]);
    y[0] = add(t[0], add(sum_a, sum_b));
    y[1] = multiply_add(broadcast(b), difference_b, multiply(broadcast(a), difference_a));
    y[2] = multiply_add(broadcast(b * b), sum_b, multiply(broadcast(a * a), sum_a));
    y[3] = multiply_add(broadcast(b * b * b), difference_b, multiply_add(broadcast(a * a * a), difference_a, t[5]));
  }
};

template <>
struct Transform<2> {
  static constexpr int n = 4;

  static inline __attribute__((always_inline)) void image(const Vector (&d)[4], Vector (&t)[4]) {
    t[0] = subtract(d[2], d[0]);
    t[1] = add(d[1], d[2]);
    t[2] = subtract(d[2], d[1]);
    t[3] = subtract(d[3], d[1]);
  }

  static inline __attribute__((always_inline)) void output(const Vector (&t)[4], Vector (&y)[2]) {
    y[0] = add(t[0], add(t[1], t[2]));
    y[1] = add(subtract(t[1], t[2]), t[3]);
  }
};

// Transforms [rows][columns] of vectors along both directions.
template <int m>
inline __attribute__((always_inline)) void transform_image(Vector (&d)[m + 2][m + 2]) {
  constexpr int n = m + 2;
  for (int x = 0; x < n; ++x) {
    Vector column[n], t[n];
#pragma GCC unroll 6
    for (int y = 0; y < n; ++y) {
      column[y] = d[y][x];
    }
    Transform<m>::image(column, t);
#pragma GCC unroll 6
    for (int y = 0; y < n; ++y) {
      d[y][x] = t[y];
    }
  }
  for (int y = 0; y < n; ++y) {
    Vector t[n];
    Transform<m>::image(d[y], t);
#pragma GCC unroll 6
    for (int x = 0; x < n; ++x) {
      d[y][x] = t[x];
    }
  }
}

struct Tile {
  Index image, y, x;  // its image, and its first output
};

inline Tile tile_at(const Winograd& w, Index tile) {
  const Index per_image = w.tiles_y * w.tiles_x;
  return {tile / per_image, tile % per_image / w.tiles_x * w.m, tile % w.tiles_x * w.m};
}

// The transforms of one tile's channels [first, last), at `to` + position * position_distance + chunk * chunk_distance.
template <typename Value, int m>
void transform_tile(const Winograd& w, Index tile, Index first, Index last, float* to, Index position_distance,
                    Index chunk_distance) {
  constexpr int n = m + 2;
  const Direct& d = w.direct;
  const Tile at = tile_at(w, tile);
  const Index top = at.y - d.window.pad_h, left = at.x - d.window.pad_w;
  const Index row_distance = d.in.w * d.in.pixel;
  const Value* from = static_cast<const Value*>(d.x) + ((at.image * d.in.h + top) * d.in.w + left) * d.in.pixel;
  const bool inside = top >= 0 && left >= 0 && top + n <= d.in.h && left + n <= d.in.w;
  for (Index c = first; c < last; c += lanes) {
    const int count = static_cast<int>(least(lanes, last - c));
    Vector values[n][n];
    if (inside && count == lanes) {
      for (int y = 0; y < n; ++y) {
#pragma GCC unroll 6
        for (int x = 0; x < n; ++x) {
          values[y][x] = load(from + y * row_distance + x * d.in.pixel + c);
        }
      }
    } else {
      for (int y = 0; y < n; ++y) {
        for (int x = 0; x < n; ++x) {
          const bool there = top + y >= 0 && top + y < d.in.h && left + x >= 0 && left + x < d.in.w;
          const Value* pixel = from + y * row_distance + x * d.in.pixel + c;
          values[y][x] = !there ? zero() : count == lanes ? load(pixel) : load(pixel, count);
        }
      }
    }
    transform_image<m>(values);
    float* column = to + c / chunk * chunk_distance + c % chunk;
    for (int y = 0; y < n; ++y) {
#pragma GCC unroll 6
      for (int x = 0; x < n; ++x) {
        store(column + (y * n + x) * position_distance, values[y][x]);
      }
    }
  }
}

// The outputs of one tile's panel from its products, [position][tiles][panel_width]; false, and nothing is stored, if
// one is no finite number. (What is added to them may lie where they are stored.)
template <typename Value, int m>
bool finish_tile(const Winograd& w, Index tile, Index panel, const float* products, Index position_distance) {
  constexpr int n = m + 2;
  const Direct& d = w.direct;
  const Tile at = tile_at(w, tile);
  const Index rows = least(m, d.p - at.y), columns = least(m, d.q - at.x);
  const int vectors = d.k - panel * panel_width > lanes ? 2 : 1;
  Vector outputs[2][m][m], check = zero();
  for (int v = 0; v < vectors; ++v) {
    Vector half[m][n];
    for (int x = 0; x < n; ++x) {
      Vector column[n], y[m];
#pragma GCC unroll 6
      for (int i = 0; i < n; ++i) {
        column[i] = load(products + (i * n + x) * position_distance + v * lanes);
      }
      Transform<m>::output(column, y);
#pragma GCC unroll 4
      for (int i = 0; i < m; ++i) {
        half[i][x] = y[i];
      }
    }
    for (Index i = 0; i < rows; ++i) {
      Transform<m>::output(half[i], outputs[v][i]);
      for (Index j = 0; j < columns; ++j) {
        check = add(check, subtract(outputs[v][i][j], outputs[v][i][j]));
      }
    }
  }
  if (!finite(check)) {
    return false;
  }
  for (int v = 0; v < vectors; ++v) {
    const Index channel = panel * panel_width + v * lanes;
    const int count = static_cast<int>(least(lanes, d.k - channel));
    const Vector bias = load_some(d.epilogue.bias + channel, count);
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < columns; ++j) {
        const Index pixel = (at.image * d.p + at.y + i) * d.q + at.x + j;
        const Value* residual = residual_at<Value>(d.epilogue, pixel, channel);
        const Vector value = finish(outputs[v][i][j], bias, residual, count, d.epilogue);
        Value* to = static_cast<Value*>(d.out) + pixel * d.out_pixel + channel;
        if (count == lanes) {
          store(to, value);
        } else {
          store(to, value, count);
        }
      }
    }
  }
  return true;
}

// A tile's panel without Winograd, for what is no number or overflows on the way: an infinity would spread.
template <typename Value, int m>
void compute_tile_directly(const Winograd& w, Index tile, Index panel, float* scratch) {
  const Direct& d = w.direct;
  const Tile at = tile_at(w, tile);
  for (Index i = 0; i < m && at.y + i < d.p; ++i) {
    const Index pixel = (at.image * d.p + at.y + i) * d.q + at.x;
    multiply_alone<Plain<Value>>(d, 0, panel, pixel, pixel + least(m, d.q - at.x), scratch);
  }
}

inline Index chunks_of(const Winograd& w) { return quotient(w.direct.in.c, chunk); }

template <typename Value, int m>
void winograd_transform_for(const Winograd& w, Index item) {
  constexpr int positions = (m + 2) * (m + 2);
  const Index chunks = chunks_of(w);
  const Index block = item / chunks, part = item % chunks;
  const Index chunk_distance = w.tiles_per_block * chunk_stride;
  float* to = w.transformed + block * positions * chunks * chunk_distance;
  const Index first = block * w.tiles_per_block, last = least(first + w.tiles_per_block, w.tiles);
  for (Index tile = first; tile < last; ++tile, to += chunk_stride) {
    transform_tile<Value, m>(w, tile, part * chunk, least((part + 1) * chunk, w.direct.in.c), to,
                             chunks * chunk_distance, chunk_distance);
  }
}

template <typename Value>
void winograd_transform(const Winograd& w, Index item, float*) {
  w.m == 4 ? winograd_transform_for<Value, 4>(w, item) : winograd_transform_for<Value, 2>(w, item);
}

template <typename Value, int m>
void winograd_for(const Winograd& w, Index item, float* scratch) {
  constexpr int positions = (m + 2) * (m + 2);
  const Direct& d = w.direct;
  const Index block = item % w.blocks, split = item / w.blocks;
  const Index chunks = chunks_of(w);
  const Index chunk_distance = w.tiles_per_block * chunk_stride;
  const Index position_distance = chunks * chunk_distance;
  const Index first = block * w.tiles_per_block, last = least(first + w.tiles_per_block, w.tiles);
  const float* transformed = w.transformed + block * positions * position_distance;
  if (!w.shared) {
    float* to = scratch;
    transformed = scratch;
    scratch += positions * position_distance;
    for (Index tile = first; tile < last; ++tile, to += chunk_stride) {
      transform_tile<Value, m>(w, tile, 0, d.in.c, to, position_distance, chunk_distance);
    }
  }
  float* products = scratch;
  const Index product_distance = w.tiles_per_block * panel_width;
  scratch += positions * product_distance;
  const Index tiles = last - first;
  const Index pieces = quotient(tiles, tile_rows);
  const Index last_panel = least((split + 1) * w.panels_per_item, w.panels);
  for (Index panel = split * w.panels_per_item; panel < last_panel; ++panel) {
    const bool narrow = d.k - panel * panel_width <= lanes;
    const Index width = narrow ? lanes : panel_width;
    for (Index position = 0; position < positions; ++position) {
      const float* filters = w.filters + (panel * positions * panel_width + position * width) * d.in.c;
      for (Index piece = 0; piece < pieces; ++piece) {
        const Index row = tiles * piece / pieces, rows = tiles * (piece + 1) / pieces - row;
        const float* rows_at = transformed + position * position_distance + row * chunk_stride;
        const Product<Strided> product{{reinterpret_cast<const char*>(rows_at)}, 1,      0, 1, 0, d.in.c,
                                       chunk_distance * Index{sizeof(float)},    filters};
        float* to = products + position * product_distance + row * panel_width;
        if (narrow) {
          run_stored<1>(AllRows{}, rows, product, to);
        } else {
          run_stored<2>(AllRows{}, rows, product, to);
        }
      }
    }
    for (Index tile = first; tile < last; ++tile) {
      if (!finish_tile<Value, m>(w, tile, panel, products + (tile - first) * panel_width, product_distance)) {
        compute_tile_directly<Value, m>(w, tile, panel, scratch);
      }
    }
  }
}

template <typename Value>
void winograd(const Winograd& w, Index item, float* scratch) {
  w.m == 4 ? winograd_for<Value, 4>(w, item, scratch) : winograd_for<Value, 2>(w, item, scratch);
}

}  // namespace
