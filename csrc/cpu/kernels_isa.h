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

// What the elements of an image are in `direct`'s products: pairs of bfloat16 or quadruples of uint8 if they can be
// multiplied, else floats.
template <typename Value>
struct GatheredFrom {
  using Type = float;
};
inline Vector multiply_words(const float*, Vector a, Vector b, Vector c) { return multiply_add(a, b, c); }
#ifdef __AVX512BF16__
template <>
struct GatheredFrom<Bfloat16> {
  using Type = Bfloat16;
};
inline Vector multiply_words(const Bfloat16*, Vector a, Vector b, Vector c) { return multiply_add_pairs(a, b, c); }
#endif
#ifdef __AVX512VNNI__
template <>
struct GatheredFrom<Uint8> {
  using Type = Uint8;
};
inline Vector multiply_words(const Uint8*, Vector a, Vector b, Vector c) { return multiply_add_quads(a, b, c); }
#endif

template <typename One, typename Other>
constexpr bool same = false;
template <typename One>
constexpr bool same<One, One> = true;

// A convolution of images of one kind of element, gathered as another, to outputs of a third.
template <typename From, typename In, typename To>
struct Form {
  using Image = From;
  using Gathered = In;
  using Result = To;
  static constexpr Index word = sizeof(float) / sizeof(In);               // elements of one
  static constexpr bool in_steps = same<From, Uint8> || same<To, Uint8>;  // Steps
  static constexpr bool exact = same<In, Uint8>;                          // sums of integers
};
template <typename Value>
using Plain = Form<Value, typename GatheredFrom<Value>::Type, Value>;

// Where the rows of a product are: at pointers, or chunk_stride words apart.
struct Pointed {
  const char* const* rows;
};
struct Strided {
  const char* first;
};

// Rows of pixels times a panel of weights: `outer` times `inner` runs of `length` words each, cut into chunks.
// Distances are bytes.
template <typename Rows>
struct Product {
  Rows rows;
  Index outer, outer_distance;
  Index inner, inner_distance;
  Index length, chunk_distance;
  const float* weights;  // [outer][inner][length][panel_width]
};

inline float word_at(const char* at) {
  float value;
  __builtin_memcpy(&value, at, sizeof value);
  return value;
}

inline const char* row_of(const Pointed& from, int row) { return from.rows[row]; }
inline const char* row_of(const Strided& from, int row) {
  return from.first + row * chunk_stride * Index{sizeof(float)};
}

// The same rows from an offset on: their pointers are made once for many words.
template <typename Rows, int rows>
struct From {
  From(const Strided& of, Index offset) : first(of.first + offset) {}
  const char* first;
};
template <int rows>
struct From<Pointed, rows> {
  From(const Pointed& of, Index offset) {
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row) {
      at[row] = of.rows[row] + offset;
    }
  }
  const char* at[rows];
};
template <int rows>
inline const char* row_of(const From<Pointed, rows>& from, int row) {
  return from.at[row];
}
template <int rows>
inline const char* row_of(const From<Strided, rows>& from, int row) {
  return row_of(Strided{from.first}, row);
}

template <typename Words, int rows, int vectors, typename Rows>
inline __attribute__((always_inline)) void multiply_chunk(Vector (&sums)[rows][vectors], const Rows& from, Index offset,
                                                          const float* weights, Index length) {
  for (const Index end = offset + length * Index{sizeof(float)}; offset < end; offset += Index{sizeof(float)}) {
    Vector weight[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      weight[v] = load(weights + v * lanes);
    }
    weights += vectors * lanes;
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row) {
      const Vector value = broadcast(word_at(row_of(from, row) + offset));
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        sums[row][v] = multiply_words(static_cast<const Words*>(nullptr), value, weight[v], sums[row][v]);
      }
    }
  }
}

// Words that are added up in registers before their sum is added to the total: a long sum loses the least if it is a
// sum of short ones.
constexpr Index partial_sum = 128, unlimited = -1;

// `part` words are added up by one call, and a chunk is a multiple of it.
template <typename Words, int rows, int vectors, Index part, Index most, typename Rows>
inline __attribute__((always_inline)) void multiply(Vector (&sums)[rows][vectors], const Product<Rows>& product,
                                                    Vector start = zero()) {
  float totals[rows * vectors * lanes];
  asm("" : "=m"(totals));  // for the compiler, which does not see that they are written before they are read
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      sums[row][v] = start;
    }
  }
  const float* weights = product.weights;
  Index summed = 0;
  bool parts = false;
  for (Index outer = 0; outer < product.outer; ++outer) {
    for (Index inner = 0; inner < product.inner; ++inner) {
      const Index begin = outer * product.outer_distance + inner * product.inner_distance;
      for (Index at = 0; at < product.length; at += part) {
        if (most != unlimited && summed >= most) {
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
        const Index offset = begin + at / chunk * product.chunk_distance + at % chunk * Index{sizeof(float)};
        if (length == part) {
          multiply_chunk<Words>(sums, From<Rows, rows>(product.rows, offset), 0, weights, part);
        } else {
          multiply_chunk<Words>(sums, product.rows, offset, weights, length);
        }
        weights += length * vectors * lanes;
        summed += length;
      }
    }
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

template <typename Value>
inline Vector finish(Vector sum, Vector bias, const Value* residual, int count, const Epilogue& epilogue) {
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

template <typename Value>
inline const Value* residual_at(const Epilogue& epilogue, Index pixel, Index channel) {
  const Value* residual = static_cast<const Value*>(epilogue.residual);
  return residual == nullptr ? nullptr : residual + pixel * epilogue.residual_pixel + channel;
}

// The same if it may be of bytes.
template <typename Value>
inline const void* residual_of_any(const Epilogue& epilogue, Index pixel, Index channel) {
  return epilogue.residual_element == Element::uint8
             ? static_cast<const void*>(residual_at<Uint8>(epilogue, pixel, channel))
             : static_cast<const void*>(residual_at<Value>(epilogue, pixel, channel));
}

// Where the results of a product go: pixels `pixel` elements apart, `columns` channels from channel 0 of `bias`,
// `scale` and `out` on.
template <typename Value>
struct Target {
  Value* out;
  Index pixel;
  const void* residual;
  const float *bias, *scale;
  int columns;
  bool* infinite = nullptr;  // set, unless null, if a sum is no finite number
};

inline Vector load_some(const float* from, int count) { return count == lanes ? load(from) : load(from, count); }

// A vector of channels of each row.
template <typename Value, int rows, int vectors>
inline __attribute__((always_inline)) void finish_rows(Vector (&sums)[rows][vectors], int v, int count,
                                                       const Epilogue& epilogue, const Target<Value>& target,
                                                       Vector bias) {
  const Value* residual = static_cast<const Value*>(target.residual);
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row) {
    const Value* from = residual == nullptr ? nullptr : residual + row * epilogue.residual_pixel + v * lanes;
    const Vector value = finish(sums[row][v], bias, from, count, epilogue);
    Value* to = target.out + row * target.pixel + v * lanes;
    if (count == lanes) {
      store(to, value);
    } else {
      store(to, value, count);
    }
  }
}

#ifdef __AVX512F__  // the least that has forms of uint8
// A vector of channels of each row, in steps of the output (kernels.h, Steps).
template <typename Form, int rows, int vectors>
inline __attribute__((always_inline)) void finish_steps(Vector (&sums)[rows][vectors], int v, int count,
                                                        const Epilogue& epilogue,
                                                        const Target<typename Form::Result>& target, Vector bias,
                                                        Vector scale, Index residual_row) {
  using Value = typename Form::Result;
  const Steps& steps = epilogue.steps;
  const char* const residuals = static_cast<const char*>(target.residual);
  const Vector residual_scale = broadcast(steps.residual_scale);
  const Vector low = broadcast(steps.low), high = broadcast(steps.high);
  const bool relu_first = epilogue.relu && epilogue.residual_after_relu && residuals != nullptr;
  Vector check = zero();
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row) {
    const Vector sum = Form::exact && !steps.short_sums ? from_integers(sums[row][v]) : sums[row][v];
    Vector value = multiply_add(sum, scale, bias);
    value = relu_first ? relu(value) : value;
    if (residuals != nullptr) {
      const char* residual = residuals + row * residual_row;
      if (same<Value, Uint8> || epilogue.residual_element == Element::uint8) {
        const Uint8* from = reinterpret_cast<const Uint8*>(residual) + v * lanes;
        value = multiply_add(count == lanes ? load(from) : load(from, count), residual_scale, value);
      } else {
        value = add(value, load_some(reinterpret_cast<const float*>(residual) + v * lanes, count));
      }
    }
    Value* to = target.out + row * target.pixel + v * lanes;
    if constexpr (same<Value, Uint8>) {
      if constexpr (!Form::exact) {
        value = epilogue.relu ? relu(value) : value;  // of minus infinity, a number
        check = add(check, subtract(value, value));
      }
      value = limited(value, low, high);
      count == lanes ? store_steps(to, value, steps.zero) : store_steps(to, value, steps.zero, count);
    } else {
      value = epilogue.relu && !relu_first ? relu(value) : value;
      count == lanes ? store(to, value) : store(to, value, count);
    }
  }
  if (!finite(check)) {
    __atomic_store_n(steps.infinite, true, __ATOMIC_RELAXED);
  }
}

// All 32 channels of each row, from integers to bytes.
template <bool short_sums, int rows>
inline __attribute__((always_inline)) void finish_bytes(Vector (&sums)[rows][2], const Epilogue& epilogue,
                                                        const Target<Uint8>& target) {
  const Steps& steps = epilogue.steps;
  const Uint8* residual = static_cast<const Uint8*>(target.residual);
  const Vector scale[2] = {load(target.scale), load(target.scale + lanes)};
  const Vector bias[2] = {load(target.bias), load(target.bias + lanes)};
  const Vector residual_scale = broadcast(steps.residual_scale), high = broadcast(steps.high);
  const bool bounded = steps.bounded;
  const Limits limits =
      limits_of(steps.zero, steps.zero + static_cast<int>(steps.low), steps.zero + static_cast<int>(steps.high));
#pragma GCC unroll 16
  for (int row = 0; row < rows; row += 2) {
    Vector values[2][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int at = row + i < rows ? row + i : row;
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const Vector sum = short_sums ? sums[at][v] : from_integers(sums[at][v]);
        values[i][v] = multiply_add(sum, scale[v], bias[v]);
        if (residual != nullptr) {
          const Vector other = load(residual + at * epilogue.residual_pixel + v * lanes);
          values[i][v] = multiply_add(other, residual_scale, values[i][v]);
        }
        values[i][v] = bounded ? values[i][v] : smaller(values[i][v], high);
      }
    }
    Uint8* to = target.out + row * target.pixel;
    store_steps(to, row + 1 < rows ? to + target.pixel : to, values[0], values[1], limits);
  }
}
#endif

template <int rows, int vectors>
inline bool all_finite(const Vector (&sums)[rows][vectors]) {
  Vector check = zero();
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      check = add(check, subtract(sums[row][v], sums[row][v]));
    }
  }
  return finite(check);
}

template <typename Form, int rows, int vectors>
void product_finished(const Product<Pointed>& product, const Epilogue& epilogue,
                      const Target<typename Form::Result>& target) {
  using Value = typename Form::Result;
  Vector sums[rows][vectors];
  const bool bytes = Form::in_steps && epilogue.residual_element == Element::uint8;
  const Index residual_row = epilogue.residual_pixel * (bytes ? 1 : Index{sizeof(Value)});
  const char* const residuals = static_cast<const char*>(target.residual);
  if (residuals != nullptr) {  // it was written long ago
    const Index width = vectors * lanes * (bytes ? 1 : Index{sizeof(Value)});
    for (int row = 0; row < rows; ++row) {
      for (Index at = 0; at < width; at += 64) {
        __builtin_prefetch(residuals + row * residual_row + at);
      }
    }
  }
  // What float32 loses in a sum is nothing beside the rounding to fewer bits.
  constexpr Index most = sizeof(Value) == sizeof(float) && !Form::exact ? partial_sum : unlimited;
  const float start = Form::exact && epilogue.steps.short_sums ? steps_start : 0;
  multiply<typename Form::Gathered, rows, vectors, chunk, most>(sums, product, broadcast(start));
  if constexpr (same<typename Form::Gathered, Bfloat16> && !Form::in_steps) {
    if (target.infinite != nullptr) {
      *target.infinite = !all_finite(sums);
    }
  }
#ifdef __AVX512F__
  if constexpr (Form::exact && same<Value, Uint8> && vectors == 2) {
    if (target.columns == 2 * lanes) {
      return epilogue.steps.short_sums ? finish_bytes<true>(sums, epilogue, target)
                                       : finish_bytes<false>(sums, epilogue, target);
    }
  }
#endif
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const int count = target.columns - v * lanes < lanes ? target.columns - v * lanes : lanes;
    if (count <= 0) {
      break;
    }
    const Vector bias = load_some(target.bias + v * lanes, count);
#ifdef __AVX512F__
    if constexpr (Form::in_steps) {
      const Vector scale = load_some(target.scale + v * lanes, count);
      finish_steps<Form>(sums, v, count, epilogue, target, bias, scale, residual_row);
    } else
#endif
    {
      finish_rows<Value>(sums, v, count, epilogue, target, bias);
    }
  }
}

template <int rows, int vectors>
void product_stored(const Product<Strided>& product, float* out) {
  Vector sums[rows][vectors];
  multiply<float, rows, vectors, winograd_partial_sum, winograd_partial_sum>(sums, product);
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      store(out + row * panel_width + v * lanes, sums[row][v]);
    }
  }
}

template <typename Value>
using Finished = void (*)(const Product<Pointed>&, const Epilogue&, const Target<Value>&);
using Stored = void (*)(const Product<Strided>&, float*);

template <int... rows>
struct Rows {};
template <int count, int... rows>
struct Counted : Counted<count - 1, count, rows...> {};
template <int... rows>
struct Counted<0, rows...> {
  using Type = Rows<rows...>;
};

template <typename Form, int vectors, int... rows>
inline void run_finished(Rows<rows...>, Index count, const Product<Pointed>& product, const Epilogue& epilogue,
                         const Target<typename Form::Result>& target) {
  static constexpr Finished<typename Form::Result> functions[] = {product_finished<Form, rows, vectors>...};
  functions[count - 1](product, epilogue, target);
}

template <int vectors, int... rows>
inline void run_stored(Rows<rows...>, Index count, const Product<Strided>& product, float* out) {
  static constexpr Stored functions[] = {product_stored<rows, vectors>...};
  functions[count - 1](product, out);
}

using AllRows = Counted<tile_rows>::Type;

// ---- direct

template <typename Value>
inline void copy(float* to, const Value* from, Index count) {
  Index i = 0;
  for (; i + lanes <= count; i += lanes) {
    store(to + i, load(from + i));
  }
  if (i < count) {
    store(to + i, load(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
  }
}

// Elements as words, the last one filled up.
template <typename Value>
inline void copy_words(Value* to, const Value* from, Index count) {
  constexpr Index word = sizeof(float) / sizeof(Value);
  copy(reinterpret_cast<float*>(to), reinterpret_cast<const float*>(from), count / word);
  for (Index i = count / word * word; i < quotient(count, word) * word; ++i) {
    to[i] = i < count ? from[i] : Value{0};
  }
}
inline void copy(Bfloat16* to, const Bfloat16* from, Index count) { copy_words(to, from, count); }
inline void copy(Uint8* to, const Uint8* from, Index count) { copy_words(to, from, count); }
#ifdef __AVX512BF16__
inline void copy(Bfloat16* to, const float* from, Index count) {
  Index i = 0;
  for (; i + lanes <= count; i += lanes) {
    store(to + i, load(from + i));
  }
  if (i < count) {
    store(to + i, load(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
    to[count] = {0};  // the rest of a word, or what the next copy or the padding writes
  }
}
#endif
// Between words of padding: what follows the last element is 0, or stays what it is.
template <typename Value, typename From>
inline void copy_part(Value* to, const From* from, Index count) {
  copy(to, from, count);
}
inline void copy_part(Uint8* to, const Uint8* from, Index count) {
  for (Index i = 0; i < count; ++i) {
    to[i] = from[i];
  }
}

// Elements from any one on; `with` has one value, or 0, in all of them.
template <typename Value>
inline void fill_elements(Value* to, Vector with, Index count) {
  float word[lanes];
  store(word, with);
  Value value;
  __builtin_memcpy(&value, word, sizeof value);
  for (Index i = 0; i < count; ++i) {
    to[i] = value;
  }
}

inline void fill(float* to, Vector with, Index count) {
  Index i = 0;
  for (; i + lanes <= count; i += lanes) {
    store(to + i, with);
  }
  if (i < count) {
    store(to + i, with, static_cast<int>(count - i));
  }
}

struct Runs {
  Index count, length;  // words of one run
};

template <typename Form>
inline Runs runs_of(const Direct& d) {
  const Index c = d.in.c / d.groups;
  return {d.merged ? d.window.r : d.window.r * d.window.s, quotient(d.merged ? d.window.s * c : c, Form::word)};
}

// A word of what lies outside the image, for each element of a vector.
template <typename Form>
inline Vector padding_of(const Direct& d) {
  if constexpr (Form::exact) {
    return broadcast(__builtin_bit_cast(float, d.epilogue.steps.padding));
  }
  return zero();
}

// What the filter sees around one pixel of the output, run by run.
template <typename Form>
inline void gather(const Direct& d, Index group, Index pixel, float* row) {
  using Value = typename Form::Image;
  using Gathered = typename Form::Gathered;
  const Window& window = d.window;
  const Index c = d.in.c / d.groups;
  const Vector padding = padding_of<Form>(d);
  const Index x = pixel % d.q;
  const Index y = pixel / d.q % d.p;
  const Index image = pixel / (d.q * d.p);
  const Value* from = static_cast<const Value*>(d.x) + image * d.in.h * d.in.w * d.in.pixel + group * c;
  const Index top = y * window.stride_h - window.pad_h;
  const Index left = x * window.stride_w - window.pad_w;
  const Runs runs = runs_of<Form>(d);
  for (Index r = 0; r < window.r; ++r) {
    const Index in_y = top + r * window.dilation_h;
    const bool outside = in_y < 0 || in_y >= d.in.h;
    const Value* line = from + in_y * d.in.w * d.in.pixel;
    if (d.merged) {
      const Index begin = most(0, -left);
      const Index end = least(window.s, d.in.w - left);
      if (outside || end <= begin) {
        fill(row, padding, runs.length);
      } else if (begin == 0 && end == window.s) {
        copy(reinterpret_cast<Gathered*>(row), line + left * d.in.pixel, window.s * c);
      } else {
        fill(row, padding, runs.length);
        copy_part(reinterpret_cast<Gathered*>(row) + begin * c, line + (left + begin) * d.in.pixel, (end - begin) * c);
      }
      row += runs.length;
      continue;
    }
    for (Index s = 0; s < window.s; ++s) {
      const Index in_x = left + s * window.dilation_w;
      if (outside || in_x < 0 || in_x >= d.in.w) {
        fill(row, padding, runs.length);
      } else {
        copy(reinterpret_cast<Gathered*>(row), line + in_x * d.in.pixel, c);
      }
      row += runs.length;
    }
  }
}

// Where the image's pixels are that the output's pixels [first, last) of a 1x1 convolution read.
template <typename Value>
void point_at_pixels(const Direct& d, const Value* image, Index first, Index last, const char** windows) {
  const Index step = d.window.stride_w * d.in.pixel;
  Index x = first % d.q, row = first / d.q;
  while (first < last) {
    const Index y = row / d.p * d.in.h + row % d.p * d.window.stride_h;
    const Value* from = image + y * d.in.w * d.in.pixel + x * step;
    for (; x < d.q && first < last; ++x, ++first, from += step) {
      *windows++ = reinterpret_cast<const char*>(from);
    }
    x = 0;
    ++row;
  }
}

// The rows of the image around the output's pixels [first, last), with their padding, at `to`; and where each of these
// pixels' windows begins there.
template <typename Form>
void copy_lines(const Direct& d, Index group, Index first, Index last, float* to, const char** windows) {
  using Value = typename Form::Image;
  using Gathered = typename Form::Gathered;
  const Window& window = d.window;
  const Index c = d.in.c / d.groups;
  const Vector padding = padding_of<Form>(d);
  const Index begin = first / d.q, end = (last - 1) / d.q + 1;  // rows of the outputs, of all images
  const Index line_words = d.line_distance / Form::word;
  Index pixel = first;
  for (Index row = begin; row < end;) {
    const Index image = row / d.p, y = row % d.p, rows = d.by_rows ? 1 : least(d.p - y, end - row);
    const Index left = d.by_rows && row == begin ? first % d.q : 0;
    const Index right = d.by_rows && row == end - 1 ? (last - 1) % d.q + 1 : d.q;
    const Index columns = (right - 1 - left) * window.stride_w + (window.s - 1) * window.dilation_w + 1;
    const Index from_column = left * window.stride_w - window.pad_w;
    const Index inside = most(0, -from_column), outside = most(inside, least(columns, d.in.w - from_column));
    const Index top = y * window.stride_h - window.pad_h;
    const Index lines = (rows - 1) * window.stride_h + (window.r - 1) * window.dilation_h + 1;
    const Gathered* line = reinterpret_cast<const Gathered*>(to);
    for (Index i = row; i < row + rows; ++i, line += window.stride_h * d.line_distance) {
      for (; pixel < least(last, (i + 1) * d.q); ++pixel) {
        const Index column = (pixel - i * d.q - left) * window.stride_w;
        *windows++ = reinterpret_cast<const char*>(line + column * d.line_pixel);
      }
    }
    for (Index i = 0; i < lines; ++i, to += line_words) {
      const Index in_y = top + i;
      if (in_y < 0 || in_y >= d.in.h || outside == inside) {
        fill(to, padding, quotient(columns * d.line_pixel + Form::word, Form::word));
        continue;
      }
      const Value* from = static_cast<const Value*>(d.x) +
                          ((image * d.in.h + in_y) * d.in.w + from_column + inside) * d.in.pixel + group * c;
      Gathered* copied = reinterpret_cast<Gathered*>(to);
      fill_elements(copied, padding, inside * d.line_pixel);
      if (d.in.pixel == d.line_pixel && d.groups == 1) {
        copy(copied + inside * d.line_pixel, from, (outside - inside) * d.line_pixel);
      } else {
        for (Index x = inside; x < outside; ++x, from += d.in.pixel) {
          copy(copied + x * d.line_pixel, from, c);
        }
      }
      // Behind the image, and what is read beyond the last window; copies may have ended with a whole word.
      fill_elements(copied + outside * d.line_pixel, padding, (columns - outside) * d.line_pixel + Form::word);
    }
    row += rows;
  }
}

// One panel of output channels for tiles of pixels.
template <typename Form>
struct Panel {
  using Value = typename Form::Result;
  using Gathered = typename Form::Gathered;

  Panel(const Direct& d, Reading reading, Index group, Index panel) : epilogue(d.epilogue) {
    const Index k = d.k / d.groups, rest = k % panel_width;
    const Index first_channel = panel * panel_width;
    const Index columns = least(panel_width, k - first_channel);
    const Runs runs = runs_of<Form>(d);
    const Index depth = runs.count * runs.length;
    const Index padded = k - rest + (rest == 0 ? 0 : rest <= lanes ? lanes : panel_width);
    constexpr Index word_bytes = sizeof(float);
    channel = group * k + first_channel;
    narrow = columns <= lanes;
    product.outer = d.window.r;
    product.inner = d.merged ? 1 : d.window.s;
    product.length = runs.length;
    product.chunk_distance = chunk * word_bytes;
    product.weights = d.weights + (group * padded + first_channel) * depth;
    product.inner_distance = runs.length * word_bytes;
    product.outer_distance = product.inner * product.inner_distance;
    if (reading == Reading::lines) {
      product.outer_distance = d.window.dilation_h * d.line_distance * Index{sizeof(Gathered)};
      product.inner_distance = d.window.dilation_w * d.line_pixel * Index{sizeof(Gathered)};
    }
    target.pixel = d.out_pixel;
    target.bias = epilogue.bias + channel;
    target.scale = Form::in_steps ? epilogue.steps.scale + channel : nullptr;
    target.columns = static_cast<int>(columns);
    out = static_cast<Value*>(d.out) + channel;
  }

  // For `rows` pixels from `pixel` on, whose windows begin at these places.
  inline void multiply(Index pixel, Index rows, const char* const* windows) {
    product.rows.rows = windows;
    target.out = out + pixel * target.pixel;
    target.residual = residual_of_any<Value>(epilogue, pixel, channel);
    if (narrow) {
      run_finished<Form, 1>(AllRows{}, rows, product, epilogue, target);
    } else {
      run_finished<Form, 2>(AllRows{}, rows, product, epilogue, target);
    }
  }

  const Epilogue& epilogue;
  Product<Pointed> product;
  Target<Value> target;
  Value* out;
  Index channel;
  bool narrow;
};

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

template <typename Value>
struct GroupedRow {
  const Value* from;     // the image's first pixel, at the vector's first channel
  const float* weights;  // [r][s][group][lanes]
  const float* bias;
  const Value* residual;  // at the row's first pixel
  Value* out;
  Index top;  // the input row that the filter's first one meets
  int count;  // channels of the vector
};

// `rows` pixels of a row of the output from `x` on. If `whole`, no filter column is outside the image.
template <int group, int rows, bool whole, typename Value>
inline void grouped_pixels(const Direct& d, const GroupedRow<Value>& row, const Numbers (&orders)[group], Index x) {
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
      const Value* from = row.from + (in_y * d.in.w + in_x) * d.in.pixel;
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
  const Vector bias = load_some(row.bias, row.count);
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    const Value* residual = row.residual == nullptr ? nullptr : row.residual + (x + i) * d.epilogue.residual_pixel;
    const Vector value = finish(sums[i], bias, residual, row.count, d.epilogue);
    Value* to = row.out + (x + i) * d.out_pixel;
    if (row.count == lanes) {
      store(to, value);
    } else {
      store(to, value, row.count);
    }
  }
}

// A row of the output.
template <typename Value, int group>
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
    const GroupedRow<Value> row{static_cast<const Value*>(d.x) + image * d.in.h * d.in.w * d.in.pixel + channel,
                                d.weights + channel * window.r * window.s * group,
                                d.epilogue.bias + channel,
                                residual_at<Value>(d.epilogue, pixel, channel),
                                static_cast<Value*>(d.out) + pixel * d.out_pixel + channel,
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

template <typename Value>
void grouped(const Direct& d, Index item) {
  switch (d.k / d.groups) {
    case 1:
      return grouped_row<Value, 1>(d, item);
    case 2:
      return grouped_row<Value, 2>(d, item);
    case 4:
      return grouped_row<Value, 4>(d, item);
    default:
      return grouped_row<Value, 8>(d, item);
  }
}

// One panel of output channels for the output's pixels [first, last), each window by itself.
template <typename Form>
void multiply_alone(const Direct& d, Index group, Index panel, Index first, Index last, float* scratch) {
  const char* const window = reinterpret_cast<const char*>(scratch);
  Panel<Form> of(d, Reading::windows, group, panel);
  for (Index pixel = first; pixel < last; ++pixel) {
    gather<Form>(d, group, pixel, scratch);
    of.multiply(pixel, 1, &window);
  }
}

template <typename Form>
void direct(const Direct& d, Index item, float* scratch) {
  if constexpr (!Form::in_steps) {
    if (d.narrow_groups) {
      return grouped<typename Form::Result>(d, item);
    }
  }
  const Index block = item % d.blocks;  // next to each other: a thread keeps the panels of its splits
  const Index split = item / d.blocks % d.splits;
  const Index group = item / d.blocks / d.splits;
  const Index pixels = d.in.n * d.p * d.q;
  const Index first_tile = block * d.tiles_per_block;
  const Index last_tile = least(first_tile + d.tiles_per_block, d.tiles);
  const Index first = pixels * first_tile / d.tiles, last = pixels * last_tile / d.tiles;
  const char** windows = reinterpret_cast<const char**>(scratch);
  scratch += window_floats(d.tiles_per_block * tile_rows);
  if (d.reading == Reading::image) {
    const typename Form::Image* image = static_cast<const typename Form::Image*>(d.x);
    point_at_pixels(d, image + group * (d.in.c / d.groups), first, last, windows);
  } else if (d.reading == Reading::lines) {
    copy_lines<Form>(d, group, first, last, scratch, windows);
  } else {
    float* to = scratch;
    for (Index pixel = first; pixel < last; ++pixel, to += d.window_distance) {
      windows[pixel - first] = reinterpret_cast<const char*>(to);
      gather<Form>(d, group, pixel, to);
    }
  }
  Index ends[largest_block];  // of tiles
  for (Index tile = first_tile; tile < last_tile; ++tile) {
    ends[tile - first_tile] = pixels * (tile + 1) / d.tiles;
  }
  const Index last_panel = least((split + 1) * d.panels_per_item, d.panels);
  for (Index panel = split * d.panels_per_item; panel < last_panel; ++panel) {
    Panel<Form> of(d, d.reading, group, panel);
    bool infinite = false;
    if (d.checked) {
      of.target.infinite = &infinite;
    }
    Index pixel = first;
    for (Index tile = 0; tile < last_tile - first_tile; ++tile) {
      of.multiply(pixel, ends[tile] - pixel, windows + (pixel - first));
      if (infinite) {
        multiply_alone<Form>(d, group, panel, pixel, ends[tile], scratch + d.copied_floats);
        infinite = false;
      }
      pixel = ends[tile];
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

// The outputs of one tile's panel from its products, [position][tiles][panel_width]; whether all were numbers.
template <typename Value, int m>
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
    const Vector bias = load_some(d.epilogue.bias + channel, count);
    Vector check = zero();
    for (int i = 0; i < m && at.y + i < d.p; ++i) {
      Vector y[m];
      Transform<m>::output(half[i], y);
      for (int j = 0; j < m && at.x + j < d.q; ++j) {
        check = add(check, subtract(y[j], y[j]));
        const Index pixel = (at.image * d.p + at.y + i) * d.q + at.x + j;
        const Value* residual = residual_at<Value>(d.epilogue, pixel, channel);
        const Vector value = finish(y[j], bias, residual, count, d.epilogue);
        Value* to = static_cast<Value*>(d.out) + pixel * d.out_pixel + channel;
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

// ---- the rest

inline void store_exact(float* to, Vector a, int count) { count == lanes ? store(to, a) : store(to, a, count); }

// How the channels of a pixel are compared: floats.
template <typename Value>
struct Compared {
  static constexpr int width = lanes;
  static Vector least() { return broadcast(-__builtin_inff()); }
  static Vector load_first(const Value* from, int count) { return count == lanes ? load(from) : load(from, count); }
};

#ifdef __AVX512F__
template <>
struct Compared<Uint8> {
  static constexpr int width = 64;
  static __m512i least() { return _mm512_setzero_si512(); }
  static __m512i load_first(const Uint8* from, int count) { return load_bytes(from, count); }
};
#endif

template <typename Value>
void max_pool(const Pool& pool, Index item) {
  using Compare = Compared<Value>;
  const Window& window = pool.window;
  const Index image = item / pool.p, y = item % pool.p;
  const Index top = y * window.stride_h - window.pad_h;
  for (Index x = 0; x < pool.q; ++x) {
    const Index left = x * window.stride_w - window.pad_w;
    Value* to = static_cast<Value*>(pool.out) + (item * pool.q + x) * pool.out_pixel;
    for (Index c = 0; c < pool.in.c; c += Compare::width) {
      const int count = static_cast<int>(least(Compare::width, pool.in.c - c));
      auto best = Compare::least();
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
          const Value* from =
              static_cast<const Value*>(pool.x) + ((image * pool.in.h + in_y) * pool.in.w + in_x) * pool.in.pixel + c;
          best = larger(best, Compare::load_first(from, count));
        }
      }
      store_exact(to + c, best, count);
    }
  }
}

// The sum of pixels' channels, by halves: one sum after the other would lose with the number of pixels.
template <typename Value>
Vector sum_of(const Value* from, Index pixel, Index pixels, int count) {
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

template <typename Value>
void average(const void* x, const Map& in, void* out, Index item) {
  const Index pixels = in.h * in.w;
  const Value* image = static_cast<const Value*>(x) + item * pixels * in.pixel;
  Value* to = static_cast<Value*>(out) + item * in.c;
  const Vector divisor = broadcast(static_cast<float>(pixels));
  for (Index c = 0; c < in.c; c += lanes) {
    const int count = static_cast<int>(least(lanes, in.c - c));
    store(to + c, sum_of(image + c, in.pixel, pixels, count) / divisor, count);
  }
}

template <typename Value>
void add_maps(const void* a, const void* b, void* out, Index first, Index last, bool with_relu) {
  const Value *one = static_cast<const Value*>(a), *other = static_cast<const Value*>(b);
  Value* to = static_cast<Value*>(out);
  for (Index i = first; i < last; i += lanes) {
    const int here = static_cast<int>(least(lanes, last - i));
    const Vector sum =
        here == lanes ? add(load(one + i), load(other + i)) : add(load(one + i, here), load(other + i, here));
    const Vector value = with_relu ? relu(sum) : sum;
    if (here == lanes) {
      store(to + i, value);
    } else {
      store(to + i, value, here);
    }
  }
}

#ifdef __AVX512F__
// As Conversion says, elements that lie next to each other. Adds to `check` what is not 0 if one is no number.
template <typename From, typename To>
inline void convert_run(const Conversion& of, const From* from, To* to, Index count, Vector& check) {
  const Vector low = broadcast(static_cast<float>(-of.zero)),
               high = broadcast(static_cast<float>(of.largest - of.zero));
  for (Index i = 0; i < count; i += lanes) {
    const int here = static_cast<int>(least(lanes, count - i));
    const Vector value = here == lanes ? load(from + i) : load(from + i, here);
    if constexpr (same<To, Uint8>) {
      check = add(check, subtract(value, value));
      const Vector steps = limited(multiply(value, broadcast(1 / of.scale)), low, high);
      here == lanes ? store_steps(to + i, steps, of.zero) : store_steps(to + i, steps, of.zero, here);
    } else {
      store(to + i, multiply(add(value, low), broadcast(of.scale)), here);
    }
  }
}

template <typename From, typename To>
void convert(const Conversion& of, Index item) {
  const From* from = static_cast<const From*>(of.x) + item / of.h * of.stride_n + item % of.h * of.stride_h;
  To* to = static_cast<To*>(of.out) + item * of.w * of.out_pixel;
  Vector check = zero();
  if (of.stride_c == 1 || of.c == 1) {
    const bool dense = of.stride_w == of.c && of.out_pixel == of.c;
    const Index pixels = dense ? 1 : of.w, each = dense ? of.w * of.c : of.c;
    for (Index x = 0; x < pixels; ++x) {
      convert_run(of, from + x * of.stride_w, to + x * of.out_pixel, each, check);
    }
  } else {
    constexpr Index most = 64;
    From taken[most];
    To made[most];
    for (Index first = 0; first < of.w; first += most) {
      const Index count = least(most, of.w - first);
      for (Index c = 0; c < of.c; ++c) {
        const From* plane = from + first * of.stride_w + c * of.stride_c;
        if (of.stride_w != 1) {
          for (Index x = 0; x < count; ++x) {
            taken[x] = plane[x * of.stride_w];
          }
          plane = taken;
        }
        convert_run(of, plane, made, count, check);
        for (Index x = 0; x < count; ++x) {
          to[(first + x) * of.out_pixel + c] = made[x];
        }
      }
    }
  }
  if (!finite(check)) {
    __atomic_store_n(of.infinite, true, __ATOMIC_RELAXED);
  }
}
#endif

template <typename Value>
constexpr Element kind = same<Value, float>      ? Element::float32
                         : same<Value, Bfloat16> ? Element::bfloat16
                                                 : Element::uint8;

template <typename Value>
constexpr Kernels made{kind<Value>,
                       kind<Value>,
                       static_cast<int>(Plain<Value>::word),
                       lanes,
                       tile_rows,
                       panel_width,
                       direct<Plain<Value>>,
                       winograd_transform<Value>,
                       winograd<Value>,
                       max_pool<Value>,
                       average<Value>,
                       add_maps<Value>,
                       nullptr};

#ifdef __AVX512F__
// For images or outputs of uint8.
template <typename Form>
constexpr Kernels made_in_steps{
    kind<typename Form::Image>,
    kind<typename Form::Result>,
    static_cast<int>(Form::word),
    lanes,
    tile_rows,
    panel_width,
    direct<Form>,
    nullptr,
    nullptr,
    same<typename Form::Image, typename Form::Result> ? max_pool<Uint8> : nullptr,
    nullptr,
    nullptr,
    same<typename Form::Image, typename Form::Result> ? nullptr : convert<typename Form::Image, typename Form::Result>};
#endif

}  // namespace
