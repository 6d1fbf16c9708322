// Convolutions as products of matrix tiles: 16 outputs' pixels by 16 channels, 32 of each at a time. Part of
// isa_amx.cpp.
//
// A tile's rows lie at one distance from each other in memory, so what a window sees from one output to the next must,
// too. In an image that 1x1 windows see it does. Else a block's lines are copied with their padding, and, if windows
// are more than one line or column apart, into a plane for each line and column modulo the stride: in a plane, outputs
// are neighbours. At the end of a row of outputs the tiles go on to the next one through the padding between, and what
// they compute there is dropped.
#pragma once

#include "kernels_direct.h"

namespace {

// The outputs of a block, as rows of tiles count them: `rows` of `columns` pixels, `row_pixels` from one to the next.
struct Block {
  Index image, y, x;
  Index rows, columns, row_pixels;
  Index pixel;         // the first one's number in the batch
  Index image_pixels;  // in a row of the outputs
  Index count() const { return (rows - 1) * row_pixels + columns; }
};

inline Block block_of(const Direct& d, Index block) {
  if (d.reading == Reading::image) {
    const Index pixels = d.in.n * d.p * d.q, all = quotient(pixels, tile_side);
    const Index first = all * block / d.blocks * tile_side;
    const Index last = least(all * (block + 1) / d.blocks * tile_side, pixels);
    return {0, 0, 0, 1, last - first, last - first, first, pixels};
  }
  const Index of_x = block % d.blocks_x, of_y = block / d.blocks_x % d.blocks_y,
              image = block / d.blocks_x / d.blocks_y;
  const Index y = d.p * of_y / d.blocks_y, x = d.q * of_x / d.blocks_x;
  const Index rows = d.p * (of_y + 1) / d.blocks_y - y, columns = d.q * (of_x + 1) / d.blocks_x - x;
  return {image, y, x, rows, columns, d.row_pixels, (image * d.p + y) * d.q + x, d.q};
}

// Copies what a block's windows see, `step` columns apart, from column `first` of a line on; `count` of them.
template <typename Form>
inline void copy_line(const Direct& d, const typename Form::Image* line, Index first, Index step, Index count,
                      Vector padding, typename Form::Gathered* to) {
  const Index c = d.in.c / d.groups;
  const Index begin = least(count, first < 0 ? quotient(-first, step) : 0);
  const Index end = line == nullptr ? begin : most(begin, least(count, quotient(d.in.w - first, step)));
  fill_elements(to, padding, begin * d.line_pixel);
  if (step == 1 && d.in.pixel == d.line_pixel && d.groups == 1) {
    copy(to + begin * d.line_pixel, line + (first + begin) * d.in.pixel, (end - begin) * d.line_pixel);
  } else {
    for (Index i = begin; i < end; ++i) {
      copy(to + i * d.line_pixel, line + (first + i * step) * d.in.pixel, c);
    }
  }
  // Copies may have ended with a whole word; a line may go on to where the next one begins.
  fill_elements(to + end * d.line_pixel, padding, most(count * d.line_pixel, d.line_distance) - end * d.line_pixel);
}

template <typename Form>
void copy_planes(const Direct& d, Index group, const Block& block, float* scratch) {
  using Image = typename Form::Image;
  using Gathered = typename Form::Gathered;
  const Window& window = d.window;
  const Vector padding = padding_of<Form>(d);
  const Index height = (window.r - 1) * window.dilation_h + 1, width = (window.s - 1) * window.dilation_w + 1;
  const Index phases_y = least(window.stride_h, height), phases_x = d.merged ? 1 : least(window.stride_w, width);
  const Index left = block.x * window.stride_w - window.pad_w;
  Gathered* plane = reinterpret_cast<Gathered*>(scratch);
  for (Index phase_y = 0; phase_y < phases_y; ++phase_y) {
    const Index lines = block.rows - 1 + quotient(height - phase_y, window.stride_h);
    for (Index phase_x = 0; phase_x < phases_x; ++phase_x, plane += d.plane_distance) {
      const Index step = d.merged ? 1 : window.stride_w;
      const Index count = d.merged ? (block.columns - 1) * window.stride_w + width
                                   : block.columns - 1 + quotient(width - phase_x, step);
      Gathered* to = plane;
      for (Index i = 0; i < lines; ++i, to += d.line_distance) {
        const Index in_y = (block.y + i) * window.stride_h + phase_y - window.pad_h;
        const Image* line = nullptr;
        if (in_y >= 0 && in_y < d.in.h) {
          line = static_cast<const Image*>(d.x) + (block.image * d.in.h + in_y) * d.in.w * d.in.pixel +
                 group * (d.in.c / d.groups);
        }
        copy_line<Form>(d, line, left + phase_x, step, count, padding, to);
      }
      // Behind the last window a tile goes on to the end of its row, there by weights of 0.
      to += count * d.line_pixel - d.line_distance;
      fill_elements(to, padding, tile_side * Form::word);
    }
  }
}

// Bytes from where an output's window begins to its runs.
template <typename Form>
inline void set_offsets(const Direct& d, Index* offsets) {
  constexpr Index element = sizeof(typename Form::Gathered);
  const Window& window = d.window;
  const Index width = (window.s - 1) * window.dilation_w + 1;
  const Index phases_x = d.merged ? 1 : least(window.stride_w, width);
  for (Index r = 0; r < window.r; ++r) {
    const Index y = r * window.dilation_h;
    const Index line = y % window.stride_h * phases_x * d.plane_distance + y / window.stride_h * d.line_distance;
    for (Index s = 0; s < (d.merged ? 1 : window.s); ++s) {
      const Index x = s * window.dilation_w;
      *offsets++ = (line + x % window.stride_w * d.plane_distance + x / window.stride_w * d.line_pixel) * element;
    }
  }
}

// Rows of pixels, runs of them, and a panel of weights.
struct TileProduct {
  Index distance;        // bytes from one output's window to the next one's
  const Index* offsets;  // of runs
  Index runs, steps;     // a step: the words of a tile's row
  const float* weights;
};

constexpr Index sums_distance = 2 * tile_side;  // floats from one output's sums to the next one's

// The sums of `high` times 16 outputs and `wide` times 16 channels. Tiles are multiplied for so long that between any
// two steps there is time for a call of `beside`.
template <typename Words, int high, int wide, bool cold, typename Beside>
inline void multiply_tiles(Tiles& tiles, const char* const (&rows)[2], const TileProduct& product, float* sums,
                           Beside& beside) {
  constexpr Index row_bytes = tile_side * sizeof(float), weight_bytes = wide * row_bytes;
  const Words* const words = nullptr;
  tiles.clear<0>();
  if (wide == 2) tiles.clear<1>();
  if (high == 2) tiles.clear<2>();
  if (high == 2 && wide == 2) tiles.clear<3>();
  const char* weights = reinterpret_cast<const char*>(product.weights);
  for (Index run = 0; run < product.runs; ++run) {
    const Index offset = product.offsets[run];
    const char *one = rows[0] + offset, *other = rows[1] + offset;
    for (Index step = 0; step < product.steps; ++step) {
      tiles.load<4>(one, product.distance);
      tiles.load<6>(weights, weight_bytes);
      if (high == 2) tiles.load<5>(other, product.distance);
      if (wide == 2) tiles.load<7>(weights + row_bytes, weight_bytes);
      if (cold) {
#pragma GCC unroll 32
        for (int i = 0; i < wide * tile_side; ++i) {
          __builtin_prefetch(weights + 2 * tile_side * weight_bytes + i * row_bytes);
        }
      }
      tiles.multiply<0, 4, 6>(words);
      if (high == 2) tiles.multiply<2, 5, 6>(words);
      if (wide == 2) tiles.multiply<1, 4, 7>(words);
      if (high == 2 && wide == 2) tiles.multiply<3, 5, 7>(words);
      weights += tile_side * weight_bytes;
      one += row_bytes;
      other += row_bytes;
      beside();
    }
  }
  constexpr Index bytes = sums_distance * sizeof(float);
  tiles.store<0>(sums, bytes);
  if (wide == 2) tiles.store<1>(sums + tile_side, bytes);
  if (high == 2) tiles.store<2>(sums + tile_side * sums_distance, bytes);
  if (high == 2 && wide == 2) tiles.store<3>(sums + tile_side * sums_distance + tile_side, bytes);
}

template <typename Form, int rows, int vectors>
void finish_stored(const float* from, const Epilogue& epilogue, const Target<typename Form::Result>& target) {
  Vector sums[rows][vectors];
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      sums[row][v] = load(from + row * sums_distance + v * lanes);
    }
  }
  if constexpr (!Form::exact) {
    if (target.infinite != nullptr && !all_finite(sums)) {
      *target.infinite = true;
      return;
    }
  }
  finish_sums<Form>(sums, epilogue, target);
}

template <typename Value>
using FinishedStored = void (*)(const float*, const Epilogue&, const Target<Value>&);

template <typename Form, int vectors, int... rows>
inline void run_finish_stored(Rows<rows...>, Index count, const float* from, const Epilogue& epilogue,
                              const Target<typename Form::Result>& target) {
  static constexpr FinishedStored<typename Form::Result> functions[] = {finish_stored<Form, rows, vectors>...};
  functions[count - 1](from, epilogue, target);
}

constexpr Index finished_rows = 8;  // at once

// A panel of output channels, and those after it.
template <typename Form>
struct TilePanel {
  using Value = typename Form::Result;
  using Words = typename Form::Gathered;

  TilePanel() = default;
  TilePanel(const Direct& d, Index group, Index panel) {
    const Panel<Form> of(d, Reading::windows, group, panel);
    const Runs runs = runs_of<Form>(d);
    target = of.target;
    out = of.out;
    channel = of.channel;
    narrow = of.narrow;
    weights = of.product.weights;
    weight_floats = runs.count * runs.length * panel_width;
    last = (group + 1) * (d.k / d.groups);
  }

  void advance() {
    weights += weight_floats;
    channel += panel_width;
    out += panel_width;
    target.bias += panel_width;
    target.scale += Form::in_steps ? panel_width : 0;
    target.columns = static_cast<int>(least(panel_width, last - channel));
    narrow = target.columns <= lanes;
  }

  template <bool cold = false, typename Beside>
  void multiply(Tiles& tiles, const char* const (&rows)[2], bool both, TileProduct product, float* sums,
                Beside& beside) const {
    product.weights = weights;
    if (narrow) {
      both ? multiply_tiles<Words, 2, 1, cold>(tiles, rows, product, sums, beside)
           : multiply_tiles<Words, 1, 1, cold>(tiles, rows, product, sums, beside);
    } else {
      both ? multiply_tiles<Words, 2, 2, cold>(tiles, rows, product, sums, beside)
           : multiply_tiles<Words, 1, 2, cold>(tiles, rows, product, sums, beside);
    }
  }

  // Stores at most finished_rows outputs from `pixel` on. If `checked`, none and returns false if a sum is no finite
  // number.
  bool finish(const Epilogue& epilogue, const float* sums, Index pixel, Index count, bool checked) {
    bool infinite = false;
    target.infinite = checked ? &infinite : nullptr;
    target.out = out + pixel * target.pixel;
    target.residual = residual_of_any<Value>(epilogue, pixel, channel);
    if (narrow) {
      run_finish_stored<Form, 1>(typename Counted<finished_rows>::Type{}, count, sums, epilogue, target);
    } else {
      run_finish_stored<Form, 2>(typename Counted<finished_rows>::Type{}, count, sums, epilogue, target);
    }
    return !infinite;
  }

  void prefetch(const Epilogue& epilogue, Index pixel, Index count) const {
    prefetch_residual<Form, 2>(epilogue, residual_of_any<Value>(epilogue, pixel, channel), count,
                               residual_bytes<Form>(epilogue));
  }

  Target<Value> target;
  Value* out;
  Index channel, last;  // of the group, the channel behind its last
  const float* weights;
  Index weight_floats;
  bool narrow;
};

// The outputs of two tiles, in pieces of at most finished_rows that follow each other.
struct Outputs {
  struct Piece {
    Index row;  // of the tiles' sums
    Index pixel, count;
  };

  // Of a block's rows [first, first + 32), that are in tiles of which each begins with a row of its own.
  void set(const Block& block, Index first, const Index (&begin)[2]) {
    count = 0;
    for (int i = 0; i < 2; ++i) {
      const Index from = first + i * tile_side, to = least(from + tile_side, block.count());
      for (Index row = from / block.row_pixels; row < block.rows && row * block.row_pixels < to; ++row) {
        const Index start = row * block.row_pixels, end = least(to, start + block.columns);
        for (Index at = most(from, start); at < end; at += finished_rows) {
          pieces[count++] = {i * tile_side + at - begin[i], block.pixel + row * block.image_pixels + at - start,
                             least(end - at, finished_rows)};
        }
      }
    }
  }

  Piece pieces[2 * tile_side];
  int count = 0;
};

// Sums that are to be stored as outputs.
template <typename Form>
class Unfinished {
 public:
  Unfinished(const Direct& d, float* scratch) : d_(d), sums_{scratch, scratch + 2 * tile_side * sums_distance} {}

  // Where the next sums may be stored.
  float* sums() const { return sums_[turn_]; }

  // Takes what sums() has.
  void add(const TilePanel<Form>& panel, const Outputs& outputs) {
    panel_ = panel;
    outputs_ = &outputs;
    next_ = outputs.pieces;
    end_ = next_ + outputs.count;
    turn_ = 1 - turn_;
  }

  // Finishes some of them.
  void operator()() {
    if (next_ < end_) {
      failed_ = !store(*next_++, d_.checked) || failed_;
    }
  }

  // Finishes all of them. What cannot be, is computed again: each output from a copy of its window, with zeros where a
  // tile sees what is next to it.
  void finish(Tiles& tiles, Index group, float* scratch) {
    while (next_ < end_) {
      (*this)();
    }
    if (failed_) {
      failed_ = false;
      for (const Outputs::Piece* piece = outputs_->pieces; piece < end_; ++piece) {
        if (!store(*piece, true)) {
          multiply_windows(tiles, group, *piece, scratch);
        }
      }
    }
  }

 private:
  bool store(const Outputs::Piece& piece, bool checked) {
    return panel_.finish(d_.epilogue, sums_[1 - turn_] + piece.row * sums_distance, piece.pixel, piece.count, checked);
  }

  void multiply_windows(Tiles& tiles, Index group, const Outputs::Piece& piece, float* scratch) {
    const Runs runs = runs_of<Form>(d_);
    float* window = scratch + tile_side * sums_distance;
    Index* offsets = reinterpret_cast<Index*>(window + runs.count * runs.length);
    for (Index run = 0; run < runs.count; ++run) {
      offsets[run] = run * runs.length * Index{sizeof(float)};
    }
    const char* const at = reinterpret_cast<const char*>(window);
    auto nothing = [] {};
    for (Index pixel = piece.pixel; pixel < piece.pixel + piece.count; ++pixel) {
      gather<Form>(d_, group, pixel, window);
      panel_.multiply(tiles, {at, at}, false, {0, offsets, runs.count, runs.length / tile_side, nullptr}, scratch,
                      nothing);
      panel_.finish(d_.epilogue, scratch, pixel, 1, false);
    }
  }

  const Direct& d_;
  float* sums_[2];
  int turn_ = 0;
  TilePanel<Form> panel_;
  const Outputs* outputs_ = nullptr;
  const Outputs::Piece *next_ = nullptr, *end_ = nullptr;
  bool failed_ = false;
};

template <typename Form>
void tiled(const Direct& d, Index item, float* scratch) {
  if constexpr (!Form::in_steps) {
    if (d.narrow_groups) {
      return grouped<typename Form::Result>(d, item);
    }
  }
  constexpr Index element = sizeof(typename Form::Gathered);
  const Index split = item / d.blocks % d.splits, group = item / d.blocks / d.splits;
  const Block block = block_of(d, item % d.blocks);
  const Runs runs = runs_of<Form>(d);
  Unfinished<Form> unfinished(d, scratch);
  Index* const offsets = reinterpret_cast<Index*>(scratch + 4 * tile_side * sums_distance);
  scratch = reinterpret_cast<float*>(offsets) + window_floats(runs.count);
  set_offsets<Form>(d, offsets);
  const char* first = reinterpret_cast<const char*>(scratch);
  TileProduct product{d.line_pixel * element, offsets, runs.count, runs.length / tile_side, nullptr};
  Index room = block.count() + tile_side;  // rows of tiles that may be read
  if (d.reading == Reading::image) {
    const typename Form::Image* image = static_cast<const typename Form::Image*>(d.x) + group * (d.in.c / d.groups);
    first = reinterpret_cast<const char*>(image + block.pixel * d.in.pixel);
    product.distance = d.in.pixel * element;
    room = block.image_pixels - block.pixel;
  } else {
    copy_planes<Form>(d, group, block, scratch);
    product.distance *= d.merged ? d.window.stride_w : 1;
  }
  float* const windows = scratch + d.copied_floats;
  Tiles tiles;
  const Index first_panel = split * d.panels_per_item, last_panel = least(first_panel + d.panels_per_item, d.panels);
  const TilePanel<Form> panels(d, group, first_panel);
  Outputs pairs[2];  // of tiles: these and those before, whose sums may be unfinished
  for (Index row = 0; row < block.count(); row += 2 * tile_side) {
    const bool both = row + tile_side < block.count();
    // A tile must not read what is behind the image; it begins earlier then.
    const Index begin[2] = {least(row, room - tile_side), least(row + tile_side, room - tile_side)};
    const char* const rows[2] = {first + begin[0] * product.distance, first + begin[1] * product.distance};
    Outputs& outputs = pairs[row / (2 * tile_side) % 2];
    outputs.set(block, row, begin);
    TilePanel<Form> panel = panels;
    for (Index of = first_panel; of < last_panel; ++of, panel.advance()) {
      if (d.epilogue.residual != nullptr) {
        for (int i = 0; i < outputs.count; ++i) {
          panel.prefetch(d.epilogue, outputs.pieces[i].pixel, outputs.pieces[i].count);
        }
      }
      if (row == 0) {
        panel.template multiply<true>(tiles, rows, both, product, unfinished.sums(), unfinished);
      } else {
        panel.multiply(tiles, rows, both, product, unfinished.sums(), unfinished);
      }
      unfinished.finish(tiles, group, windows);
      unfinished.add(panel, outputs);
    }
  }
  unfinished.finish(tiles, group, windows);
}

template <typename Form>
constexpr Kernels with_tiles(Kernels kernels) {
  kernels.run_words = tile_side;
  kernels.tiles = true;
  kernels.direct = tiled<Form>;
  return kernels;
}

}  // namespace
