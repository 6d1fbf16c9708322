// Convolutions computed directly. Part of kernels_isa.h.
#pragma once

#include "kernels_product.h"

namespace {

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
  const Index words = quotient(d.merged ? d.window.s * c : c, Form::word);
  return {d.merged ? d.window.r : d.window.r * d.window.s, quotient(words, d.run_words) * d.run_words};
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
  if (d.run_words > 1) {
    fill(row, zero(), runs.count * runs.length);
  }
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

}  // namespace
