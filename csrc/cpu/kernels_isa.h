// The kernels, on whatever Vector the including source has chosen. Everything here has internal linkage, and no
// template of the standard library is used: what is compiled for one instruction set must never be linked into code
// for another.
#pragma once

#include "kernels_direct.h"
#include "kernels_winograd.h"

namespace {

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
#endif

template <typename Value>
inline void convert_run(const Conversion&, const Value* from, Value* to, Index count, Vector&) {
  for (Index i = 0; i < count; ++i) {
    to[i] = from[i];
  }
}

// Pixels of three planes, as most images have; in vectors, which the compiler finds for this number.
template <typename Value>
inline void interleave(const Value* a, const Value* b, const Value* c, Value* __restrict to, Index count) {
  for (Index i = 0; i < count; ++i) {
    to[3 * i] = a[i];
    to[3 * i + 1] = b[i];
    to[3 * i + 2] = c[i];
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
    constexpr Index most = 64, planes = 3;
    From taken[planes][most];
    [[maybe_unused]] To made[planes][most];
    const To* rows[planes] = {};
    for (Index first = 0; first < of.w; first += most) {
      const Index count = least(most, of.w - first);
      for (Index c = 0; c < of.c; ++c) {
        const From* plane = from + first * of.stride_w + c * of.stride_c;
        const Index here = c % planes;
        if (of.stride_w != 1) {
          for (Index x = 0; x < count; ++x) {
            taken[here][x] = plane[x * of.stride_w];
          }
          plane = taken[here];
        }
        if constexpr (same<From, To>) {
          rows[here] = plane;
        } else {
          convert_run(of, plane, made[here], count, check);
          rows[here] = made[here];
        }
        if (of.c != planes || of.out_pixel != planes) {
          for (Index x = 0; x < count; ++x) {
            to[(first + x) * of.out_pixel + c] = rows[here][x];
          }
        } else if (here == planes - 1) {
          interleave(rows[0], rows[1], rows[2], to + first * planes, count);
        }
      }
    }
  }
  if (!finite(check)) {
    __atomic_store_n(of.infinite, true, __ATOMIC_RELAXED);
  }
}

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
                       1,
                       false,
                       direct<Plain<Value>>,
                       winograd_transform<Value>,
                       winograd<Value>,
                       max_pool<Value>,
                       average<Value>,
                       add_maps<Value>,
                       convert<Value, Value>};

#ifdef __AVX512F__
// For images or outputs of uint8.
template <typename Form>
constexpr Kernels made_in_steps{kind<typename Form::Image>,
                                kind<typename Form::Result>,
                                static_cast<int>(Form::word),
                                lanes,
                                tile_rows,
                                panel_width,
                                1,
                                false,
                                direct<Form>,
                                nullptr,
                                nullptr,
                                same<typename Form::Image, typename Form::Result> ? max_pool<Uint8> : nullptr,
                                nullptr,
                                nullptr,
                                convert<typename Form::Image, typename Form::Result>};
#endif

}  // namespace
