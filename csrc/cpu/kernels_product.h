// Products of pixels and weights in registers, and what is done to their sums. Part of kernels_isa.h.
#pragma once

#include "kernels.h"

namespace {

using namespace resnet_fast::cpu;

constexpr int panel_width = 2 * lanes;

inline Index least(Index a, Index b) { return a < b ? a : b; }
inline Index most(Index a, Index b) { return a > b ? a : b; }
inline Index quotient(Index a, Index b) { return (a + b - 1) / b; }

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

// Weights are asked for so many bytes before their products: in a network they come from memory, and from there no
// processor fetches far enough ahead by itself while it multiplies.
constexpr Index weights_ahead = 4096;

template <typename Words, int rows, int vectors, typename Rows>
inline __attribute__((always_inline)) void multiply_chunk(Vector (&sums)[rows][vectors], const Rows& from, Index offset,
                                                          const float* weights, Index length) {
  for (const Index end = offset + length * Index{sizeof(float)}; offset < end; offset += Index{sizeof(float)}) {
    Vector weight[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      weight[v] = load(weights + v * lanes);
    }
#pragma GCC unroll 4
    for (Index at = 0; at < vectors * lanes * Index{sizeof(float)}; at += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(weights) + weights_ahead + at);
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
        const Vector there = first_of(value, count);  // weights of 0 have made NaN of infinity behind the last channel
        check = add(check, subtract(there, there));
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

// Asks for what is added to `rows` rows of `vectors` vectors: it was written long ago.
template <typename Form, int vectors>
inline void prefetch_residual(const Epilogue& epilogue, const void* residual, Index rows, Index row_bytes) {
  const bool bytes = Form::in_steps && epilogue.residual_element == Element::uint8;
  const Index width = vectors * lanes * (bytes ? 1 : Index{sizeof(typename Form::Result)});
  for (Index row = 0; row < rows; ++row) {
    for (Index at = 0; at < width; at += 64) {
      __builtin_prefetch(static_cast<const char*>(residual) + row * row_bytes + at);
    }
  }
}

// Of a residual, from one pixel to the next.
template <typename Form>
inline Index residual_bytes(const Epilogue& epilogue) {
  const bool bytes = Form::in_steps && epilogue.residual_element == Element::uint8;
  return epilogue.residual_pixel * (bytes ? 1 : Index{sizeof(typename Form::Result)});
}

// Stores what becomes of sums.
template <typename Form, int rows, int vectors>
inline __attribute__((always_inline)) void finish_sums(Vector (&sums)[rows][vectors], const Epilogue& epilogue,
                                                       const Target<typename Form::Result>& target) {
  using Value = typename Form::Result;
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
      finish_steps<Form>(sums, v, count, epilogue, target, bias, scale, residual_bytes<Form>(epilogue));
    } else
#endif
    {
      finish_rows<Value>(sums, v, count, epilogue, target, bias);
    }
  }
}

template <typename Form, int rows, int vectors>
void product_finished(const Product<Pointed>& product, const Epilogue& epilogue,
                      const Target<typename Form::Result>& target) {
  Vector sums[rows][vectors];
  if (target.residual != nullptr) {
    prefetch_residual<Form, vectors>(epilogue, target.residual, rows, residual_bytes<Form>(epilogue));
  }
  // What float32 loses in a sum is nothing beside the rounding to fewer bits.
  constexpr Index most = same<typename Form::Result, float> && !Form::exact ? partial_sum : unlimited;
  const float start = Form::exact && epilogue.steps.short_sums ? steps_start : 0;
  multiply<typename Form::Gathered, rows, vectors, chunk, most>(sums, product, broadcast(start));
  if constexpr (same<typename Form::Gathered, Bfloat16> && !Form::in_steps) {
    if (target.infinite != nullptr) {
      *target.infinite = !all_finite(sums);
    }
  }
  finish_sums<Form>(sums, epilogue, target);
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

}  // namespace
