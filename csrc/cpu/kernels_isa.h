// The kernels, on whatever Vector the including source has chosen. Everything here has internal linkage, and no
// template of the standard library is used: what is compiled for one instruction set must never be linked into code
// for another.
#pragma once

#include "kernels.h"

namespace {

using namespace resnet_fast::cpu;

constexpr int panel_width = 2 * lanes;

inline Index least(Index a, Index b) { return a < b ? a : b; }
inline Index most(Index a, Index b) { return a > b ? a : b; }
inline Index quotient(Index a, Index b) { return (a + b - 1) / b; }

// ---- products

// Rows of pixels times a panel of weights: `runs` runs of `length` values each, a run cut into chunks.
struct Product {
  const float* pixels;
  Index chunk_distance;  // floats from one chunk of a row to its next
  Index runs, length;
  const float* weights;  // [runs][length][panel_width]
};

template <int rows, int vectors>
inline __attribute__((always_inline)) void multiply_chunk(Vector (&sums)[rows][vectors], const float* pixels,
                                                          const float* weights, Index length) {
  for (Index c = 0; c < length; ++c) {
    Vector weight[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      weight[v] = load(weights + v * lanes);
    }
    weights += vectors * lanes;
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row) {
      const Vector value = broadcast(pixels[row * chunk_stride + c]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        sums[row][v] = multiply_add(value, weight[v], sums[row][v]);
      }
    }
  }
}

// Values that are added up in registers before their sum is added to the total: a long sum loses the least if it is a
// sum of short ones.
constexpr Index partial_sum = 128;

// `part` values are added up by one call, and a chunk is a multiple of it.
template <int rows, int vectors, Index part, Index most>
inline __attribute__((always_inline)) void multiply(Vector (&sums)[rows][vectors], const Product& product) {
  float totals[rows * vectors * lanes];
  asm("" : "=m"(totals));  // for the compiler, which does not see that they are written before they are read
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      sums[row][v] = zero();
    }
  }
  const float* pixels = product.pixels;
  const float* weights = product.weights;
  Index summed = 0;
  bool parts = false;
  for (Index run = 0; run < product.runs; ++run) {
    for (Index at = 0; at < product.length; at += part) {
      if (summed >= most) {
#pragma GCC unroll 16
        for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            float* total = totals + (row * vectors + v) * lanes;
            store(total, parts ? add(load(total), sums[row][v]) : sums[row][v]);
            sums[row][v] = zero();
          }
        }
        parts = true;
        summed = 0;
      }
      const Index length = least(product.length - at, part);
      const float* from = pixels + at / chunk * product.chunk_distance + at % chunk;
      if (length == part) {
        multiply_chunk<rows, vectors>(sums, from, weights, part);
      } else {
        multiply_chunk<rows, vectors>(sums, from, weights, length);
      }
      weights += length * vectors * lanes;
      summed += length;
    }
    pixels += quotient(product.length, chunk) * product.chunk_distance;
  }
  if (parts) {
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        sums[row][v] = add(load(totals + (row * vectors + v) * lanes), sums[row][v]);
      }
    }
  }
}

inline Vector finish(Vector sum, Vector bias, const float* residual, int count, const Epilogue& epilogue) {
  Vector value = add(sum, bias);
  if (residual == nullptr) {
    return epilogue.relu ? relu(value) : value;
  }
  const Vector other = count == lanes ? load(residual) : load(residual, count);
  if (epilogue.residual_after_relu) {
    return add(epilogue.relu ? relu(value) : value, other);
  }
  value = add(value, other);
  return epilogue.relu ? relu(value) : value;
}

// Where the results of a product go: pixels `pixel` floats apart, `columns` channels from `channel` on.
struct Target {
  float* out;
  Index pixel;
  const float* residual;
  int columns;
};

template <int rows, int vectors>
void product_finished(const Product& product, const Epilogue& epilogue, const float* bias, const Target& target) {
  Vector sums[rows][vectors];
  multiply<rows, vectors, chunk, partial_sum>(sums, product);
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const int count = target.columns - v * lanes < lanes ? target.columns - v * lanes : lanes;
    if (count <= 0) {
      break;
    }
    const Vector shift = count == lanes ? load(bias + v * lanes) : load(bias + v * lanes, count);
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row) {
      const float* residual =
          target.residual == nullptr ? nullptr : target.residual + row * epilogue.residual_pixel + v * lanes;
      const Vector value = finish(sums[row][v], shift, residual, count, epilogue);
      float* to = target.out + row * target.pixel + v * lanes;
      if (count == lanes) {
        store(to, value);
      } else {
        store(to, value, count);
      }
    }
  }
}

template <int rows, int vectors>
void product_stored(const Product& product, float* out) {
  Vector sums[rows][vectors];
  multiply<rows, vectors, winograd_partial_sum, winograd_partial_sum>(sums, product);
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      store(out + row * panel_width + v * lanes, sums[row][v]);
    }
  }
}

using Finished = void (*)(const Product&, const Epilogue&, const float*, const Target&);
using Stored = void (*)(const Product&, float*);

template <int... rows>
struct Rows {};
template <int count, int... rows>
struct Counted : Counted<count - 1, count, rows...> {};
template <int... rows>
struct Counted<0, rows...> {
  using Type = Rows<rows...>;
};

template <int vectors, int... rows>
inline void run_finished(Rows<rows...>, Index count, const Product& product, const Epilogue& epilogue,
                         const float* bias, const Target& target) {
  static constexpr Finished functions[] = {product_finished<rows, vectors>...};
  functions[count - 1](product, epilogue, bias, target);
}

template <int vectors, int... rows>
inline void run_stored(Rows<rows...>, Index count, const Product& product, float* out) {
  static constexpr Stored functions[] = {product_stored<rows, vectors>...};
  functions[count - 1](product, out);
}

using AllRows = Counted<tile_rows>::Type;

// ---- direct

inline void copy(float* to, const float* from, Index count) {
  Index i = 0;
  for (; i + lanes <= count; i += lanes) {
    store(to + i, load(from + i));
  }
  if (i < count) {
    store(to + i, load(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
  }
}

inline void clear(float* to, Index count) {
  Index i = 0;
  for (; i + lanes <= count; i += lanes) {
    store(to + i, zero());
  }
  if (i < count) {
    store(to + i, zero(), static_cast<int>(count - i));
  }
}

// A run of values into the chunks of one row.
inline void scatter(float* row, Index distance, const float* from, Index count) {
  for (; count > 0; count -= chunk, from += chunk, row += distance) {
    copy(row, from, least(count, chunk));
  }
}

inline void scatter_zeros(float* row, Index distance, Index count) {
  for (; count > 0; count -= chunk, row += distance) {
    clear(row, least(count, chunk));
  }
}

struct Runs {
  Index count, length, chunks;  // chunks of one run
};

inline Runs runs_of(const Direct& d) {
  const Index c = d.in.c / d.groups;
  const Runs runs = d.merged ? Runs{d.window.r, d.window.s * c, 0} : Runs{d.window.r * d.window.s, c, 0};
  return {runs.count, runs.length, quotient(runs.length, chunk)};
}

// What the filter sees around one pixel of the output, into a row of chunks.
inline void gather(const Direct& d, Index group, Index pixel, float* row, Index distance) {
  const Window& window = d.window;
  const Index c = d.in.c / d.groups;
  const Index x = pixel % d.q;
  const Index y = pixel / d.q % d.p;
  const Index image = pixel / (d.q * d.p);
  const float* from = d.x + image * d.in.h * d.in.w * d.in.pixel + group * c;
  const Index top = y * window.stride_h - window.pad_h;
  const Index left = x * window.stride_w - window.pad_w;
  const Runs runs = runs_of(d);
  const Index run_distance = runs.chunks * distance;
  for (Index r = 0; r < window.r; ++r) {
    const Index in_y = top + r * window.dilation_h;
    const bool outside = in_y < 0 || in_y >= d.in.h;
    const float* line = from + in_y * d.in.w * d.in.pixel;
    if (d.merged) {
      const Index begin = most(0, -left);
      const Index end = least(window.s, d.in.w - left);
      if (outside || end <= begin) {
        scatter_zeros(row, distance, runs.length);
      } else if (begin == 0 && end == window.s) {
        scatter(row, distance, line + left * d.in.pixel, runs.length);
      } else {  // at most one chunk long, by plan_direct
        clear(row, runs.length);
        copy(row + begin * c, line + (left + begin) * d.in.pixel, (end - begin) * c);
      }
      row += run_distance;
      continue;
    }
    for (Index s = 0; s < window.s; ++s) {
      const Index in_x = left + s * window.dilation_w;
      if (outside || in_x < 0 || in_x >= d.in.w) {
        scatter_zeros(row, distance, c);
      } else {
        scatter(row, distance, line + in_x * d.in.pixel, c);
      }
      row += run_distance;
    }
  }
}

// One panel of output channels for `rows` gathered pixels from `pixel` on.
inline void multiply_panel(const Direct& d, const Runs& runs, Index group, Index panel, Index pixel, Index rows,
                           const float* gathered, Index distance) {
  const Index k = d.k / d.groups;
  const Index first_channel = panel * panel_width;
  const Index columns = least(panel_width, k - first_channel);
  const Index channel = group * k + first_channel;
  const Index depth = runs.count * runs.length;
  const bool narrow = columns <= lanes;
  const Index group_size = (k / panel_width * panel_width + (k % panel_width == 0       ? 0
                                                             : k % panel_width <= lanes ? lanes
                                                                                        : panel_width)) *
                           depth;
  const Product product{gathered, distance, runs.count, runs.length,
                        d.weights + group * group_size + first_channel * depth};
  const Target target{
      d.out + pixel * d.out_pixel + channel, d.out_pixel,
      d.epilogue.residual == nullptr ? nullptr : d.epilogue.residual + pixel * d.epilogue.residual_pixel + channel,
      static_cast<int>(columns)};
  const float* bias = d.epilogue.bias + channel;
  if (narrow) {
    run_finished<1>(AllRows{}, rows, product, d.epilogue, bias, target);
  } else {
    run_finished<2>(AllRows{}, rows, product, d.epilogue, bias, target);
  }
}

// ---- groups narrower than a vector

// For each channel of a vector, the number of its group's j-th channel.
template <int group>
inline Numbers of_group(int j) {
  int order[lanes];
  for (int i = 0; i < lanes; ++i) {
    order[i] = i / group * group + j;
  }
  return numbers(order);
}

struct GroupedRow {
  const float* from;     // the image's first pixel, at the vector's first channel
  const float* weights;  // [r][s][group][lanes]
  const float* bias;
  const float* residual;  // at the row's first pixel
  float* out;
  Index top;  // the input row that the filter's first one meets
  int count;  // channels of the vector
};

// `rows` pixels of a row of the output from `x` on. If `whole`, no filter column is outside the image.
template <int group, int rows, bool whole>
inline void grouped_pixels(const Direct& d, const GroupedRow& row, const Numbers (&orders)[group], Index x) {
  const Window& window = d.window;
  Vector sums[rows];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    sums[i] = zero();
  }
  const Index left = x * window.stride_w - window.pad_w;
  const Index step = window.stride_w * d.in.pixel;
  for (Index r = 0; r < window.r; ++r) {
    const Index in_y = row.top + r * window.dilation_h;
    if (in_y < 0 || in_y >= d.in.h) {
      continue;
    }
    for (Index s = 0; s < window.s; ++s) {
      const Index in_x = left + s * window.dilation_w;
      if (!whole && (in_x < 0 || in_x >= d.in.w)) {
        continue;
      }
      const float* from = row.from + (in_y * d.in.w + in_x) * d.in.pixel;
      const float* weights = row.weights + (r * window.s + s) * group * lanes;
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const Vector value = row.count == lanes ? load(from + i * step) : load(from + i * step, row.count);
#pragma GCC unroll 8
        for (int j = 0; j < group; ++j) {
          const Vector spread = group == 1 ? value : permute(value, orders[j]);
          sums[i] = multiply_add(spread, load(weights + j * lanes), sums[i]);
        }
      }
    }
  }
  const Vector bias = row.count == lanes ? load(row.bias) : load(row.bias, row.count);
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    const float* residual = row.residual == nullptr ? nullptr : row.residual + (x + i) * d.epilogue.residual_pixel;
    const Vector value = finish(sums[i], bias, residual, row.count, d.epilogue);
    float* to = row.out + (x + i) * d.out_pixel;
    if (row.count == lanes) {
      store(to, value);
    } else {
      store(to, value, row.count);
    }
  }
}

// A row of the output.
template <int group>
void grouped_row(const Direct& d, Index item) {
  constexpr int rows = group < 4 ? 8 : 4;
  const Window& window = d.window;
  const Index image = item / d.p, y = item % d.p;
  Numbers orders[group];
  for (int j = 0; j < group; ++j) {
    orders[j] = of_group<group>(j);
  }
  const Index reach = (window.s - 1) * window.dilation_w;
  // Pixels [first, last) see no padding at the sides.
  const Index first = least(quotient(window.pad_w, window.stride_w), d.q);
  const Index room = d.in.w - 1 - reach + window.pad_w;
  const Index last = most(first, room < 0 ? 0 : least(d.q, room / window.stride_w + 1));
  for (Index channel = 0; channel < d.k; channel += lanes) {
    const Index pixel = item * d.q;
    const GroupedRow row{
        d.x + image * d.in.h * d.in.w * d.in.pixel + channel,
        d.weights + channel * window.r * window.s * group,
        d.epilogue.bias + channel,
        d.epilogue.residual == nullptr ? nullptr : d.epilogue.residual + pixel * d.epilogue.residual_pixel + channel,
        d.out + pixel * d.out_pixel + channel,
        y * window.stride_h - window.pad_h,
        static_cast<int>(least(lanes, d.k - channel))};
    Index x = 0;
    for (; x < first; ++x) {
      grouped_pixels<group, 1, false>(d, row, orders, x);
    }
    for (; x + rows <= last; x += rows) {
      grouped_pixels<group, rows, true>(d, row, orders, x);
    }
    for (; x < d.q; ++x) {
      grouped_pixels<group, 1, false>(d, row, orders, x);
    }
  }
}

void grouped(const Direct& d, Index item) {
  switch (d.k / d.groups) {
    case 1:
      return grouped_row<1>(d, item);
    case 2:
      return grouped_row<2>(d, item);
    case 4:
      return grouped_row<4>(d, item);
    default:
      return grouped_row<8>(d, item);
  }
}

void direct(const Direct& d, Index item, float* scratch) {
  if (d.narrow_groups) {
    return grouped(d, item);
  }
  const Index split = item % d.splits;
  const Index block = item / d.splits % d.blocks;
  const Index group = item / d.splits / d.blocks;
  const Runs runs = runs_of(d);
  const Index pixels = d.in.n * d.p * d.q;
  const Index distance = tile_rows * chunk_stride;
  const Index tile_size = runs.count * runs.chunks * distance;
  const Index first_tile = block * d.tiles_per_block;
  const Index last_tile = least(first_tile + d.tiles_per_block, d.tiles);
  for (Index tile = first_tile; tile < last_tile; ++tile) {
    float* row = scratch + (tile - first_tile) * tile_size;
    const Index end = pixels * (tile + 1) / d.tiles;
    for (Index pixel = pixels * tile / d.tiles; pixel < end; ++pixel, row += chunk_stride) {
      gather(d, group, pixel, row, distance);
    }
  }
  const Index last_panel = least((split + 1) * d.panels_per_item, d.panels);
  for (Index panel = split * d.panels_per_item; panel < last_panel; ++panel) {
    for (Index tile = first_tile; tile < last_tile; ++tile) {
      const Index pixel = pixels * tile / d.tiles;
      const Index rows = pixels * (tile + 1) / d.tiles - pixel;
      multiply_panel(d, runs, group, panel, pixel, rows, scratch + (tile - first_tile) * tile_size, distance);
    }
  }
}

// ---- Winograd

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
template <int m>
void transform_tile(const Winograd& w, Index tile, Index first, Index last, float* to, Index position_distance,
                    Index chunk_distance) {
  constexpr int n = m + 2;
  const Direct& d = w.direct;
  const Tile at = tile_at(w, tile);
  const Index top = at.y - d.window.pad_h, left = at.x - d.window.pad_w;
  const Index row_distance = d.in.w * d.in.pixel;
  const float* from = d.x + ((at.image * d.in.h + top) * d.in.w + left) * d.in.pixel;
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
          const float* pixel = from + y * row_distance + x * d.in.pixel + c;
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

// The outputs of one tile's panel from its products, [position][tiles][panel_width]; whether all were numbers.
template <int m>
bool finish_tile(const Winograd& w, Index tile, Index panel, const float* products, Index position_distance) {
  constexpr int n = m + 2;
  const Direct& d = w.direct;
  const Tile at = tile_at(w, tile);
  bool numbers = true;
  for (int v = 0; v < 2; ++v) {
    const Index channel = panel * panel_width + v * lanes;
    const int count = static_cast<int>(least(lanes, d.k - channel));
    if (count <= 0) {
      break;
    }
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
    const Vector bias = count == lanes ? load(d.epilogue.bias + channel) : load(d.epilogue.bias + channel, count);
    Vector check = zero();
    for (int i = 0; i < m && at.y + i < d.p; ++i) {
      Vector y[m];
      Transform<m>::output(half[i], y);
      for (int j = 0; j < m && at.x + j < d.q; ++j) {
        check = add(check, subtract(y[j], y[j]));
        const Index pixel = (at.image * d.p + at.y + i) * d.q + at.x + j;
        const float* residual = d.epilogue.residual == nullptr
                                    ? nullptr
                                    : d.epilogue.residual + pixel * d.epilogue.residual_pixel + channel;
        const Vector value = finish(y[j], bias, residual, count, d.epilogue);
        float* to = d.out + pixel * d.out_pixel + channel;
        if (count == lanes) {
          store(to, value);
        } else {
          store(to, value, count);
        }
      }
    }
    numbers = numbers && finite(check);
  }
  return numbers;
}

// A tile's panel without Winograd, for what is no number or overflows on the way: an infinity would spread.
template <int m>
void compute_tile_directly(const Winograd& w, Index tile, Index panel, float* scratch) {
  const Direct& d = w.direct;
  const Tile at = tile_at(w, tile);
  const Runs runs = runs_of(d);
  for (Index i = 0; i < m && at.y + i < d.p; ++i) {
    for (Index j = 0; j < m && at.x + j < d.q; ++j) {
      const Index pixel = (at.image * d.p + at.y + i) * d.q + at.x + j;
      gather(d, 0, pixel, scratch, chunk_stride);
      multiply_panel(d, runs, 0, panel, pixel, 1, scratch, chunk_stride);
    }
  }
}

inline Index chunks_of(const Winograd& w) { return quotient(w.direct.in.c, chunk); }

template <int m>
void winograd_transform_for(const Winograd& w, Index item) {
  constexpr int positions = (m + 2) * (m + 2);
  const Index chunks = chunks_of(w);
  const Index block = item / chunks, part = item % chunks;
  const Index chunk_distance = w.tiles_per_block * chunk_stride;
  float* to = w.transformed + block * positions * chunks * chunk_distance;
  const Index first = block * w.tiles_per_block, last = least(first + w.tiles_per_block, w.tiles);
  for (Index tile = first; tile < last; ++tile, to += chunk_stride) {
    transform_tile<m>(w, tile, part * chunk, least((part + 1) * chunk, w.direct.in.c), to, chunks * chunk_distance,
                      chunk_distance);
  }
}

void winograd_transform(const Winograd& w, Index item, float*) {
  w.m == 4 ? winograd_transform_for<4>(w, item) : winograd_transform_for<2>(w, item);
}

template <int m>
void winograd_for(const Winograd& w, Index item, float* scratch) {
  constexpr int positions = (m + 2) * (m + 2);
  const Direct& d = w.direct;
  const Index split = item % w.splits, block = item / w.splits;
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
      transform_tile<m>(w, tile, 0, d.in.c, to, position_distance, chunk_distance);
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
        const Product product{transformed + position * position_distance + row * chunk_stride, chunk_distance, 1,
                              d.in.c, filters};
        float* to = products + position * product_distance + row * panel_width;
        if (narrow) {
          run_stored<1>(AllRows{}, rows, product, to);
        } else {
          run_stored<2>(AllRows{}, rows, product, to);
        }
      }
    }
    for (Index tile = first; tile < last; ++tile) {
      if (!finish_tile<m>(w, tile, panel, products + (tile - first) * panel_width, product_distance)) {
        compute_tile_directly<m>(w, tile, panel, scratch);
      }
    }
  }
}

void winograd(const Winograd& w, Index item, float* scratch) {
  w.m == 4 ? winograd_for<4>(w, item, scratch) : winograd_for<2>(w, item, scratch);
}

// ---- the rest

void max_pool(const Pool& pool, Index item) {
  const Window& window = pool.window;
  const Index image = item / pool.p, y = item % pool.p;
  const Index top = y * window.stride_h - window.pad_h;
  for (Index x = 0; x < pool.q; ++x) {
    const Index left = x * window.stride_w - window.pad_w;
    float* to = pool.out + (item * pool.q + x) * pool.out_pixel;
    for (Index c = 0; c < pool.in.c; c += lanes) {
      const int count = static_cast<int>(least(lanes, pool.in.c - c));
      Vector best = broadcast(-__builtin_inff());
      for (Index r = 0; r < window.r; ++r) {
        const Index in_y = top + r * window.dilation_h;
        if (in_y < 0 || in_y >= pool.in.h) {
          continue;
        }
        for (Index s = 0; s < window.s; ++s) {
          const Index in_x = left + s * window.dilation_w;
          if (in_x < 0 || in_x >= pool.in.w) {
            continue;
          }
          const float* from = pool.x + ((image * pool.in.h + in_y) * pool.in.w + in_x) * pool.in.pixel + c;
          best = larger(best, count == lanes ? load(from) : load(from, count));
        }
      }
      if (count == lanes) {
        store(to + c, best);
      } else {
        store(to + c, best, count);
      }
    }
  }
}

// The sum of pixels' channels, by halves: one sum after the other would lose with the number of pixels.
Vector sum_of(const float* from, Index pixel, Index pixels, int count) {
  if (pixels > 16) {
    const Index half = pixels / 2;
    return add(sum_of(from, pixel, half, count), sum_of(from + half * pixel, pixel, pixels - half, count));
  }
  Vector sum = zero();
  for (; pixels > 0; --pixels, from += pixel) {
    sum = add(sum, count == lanes ? load(from) : load(from, count));
  }
  return sum;
}

void average(const float* x, const Map& in, float* out, Index item) {
  const Index pixels = in.h * in.w;
  const float* image = x + item * pixels * in.pixel;
  const Vector divisor = broadcast(static_cast<float>(pixels));
  for (Index c = 0; c < in.c; c += lanes) {
    const int count = static_cast<int>(least(lanes, in.c - c));
    store(out + item * in.c + c, sum_of(image + c, in.pixel, pixels, count) / divisor, count);
  }
}

void add_maps(const float* a, const float* b, float* out, Index count, bool with_relu) {
  for (Index i = 0; i < count; i += lanes) {
    const int here = static_cast<int>(least(lanes, count - i));
    const Vector sum = here == lanes ? add(load(a + i), load(b + i)) : add(load(a + i, here), load(b + i, here));
    const Vector value = with_relu ? relu(sum) : sum;
    if (here == lanes) {
      store(out + i, value);
    } else {
      store(out + i, value, here);
    }
  }
}

constexpr Kernels made{lanes,    tile_rows, panel_width, direct,  winograd_transform,
                       winograd, max_pool,  average,     add_maps};

}  // namespace
