// How a convolution is divided for matrix tiles (kernels_tiles.h).
#include <algorithm>

#include "layers.h"

namespace resnet_fast::cpu {
namespace {

// What takes time, in cycles of a processor with AMX.
constexpr double tile_product = 16, finished_vector = 4, item_overhead = 2000;
constexpr double copied = 16, read_near = 32, read_far = 8;  // bytes in one

}  // namespace

// Copied lines, for the layer's blocks_y and blocks_x.
void Convolution::set_planes(Direct& d) const {
  const Kernels& kernels = *machine_.kernels;
  const Index element = Index{sizeof(float)} / kernels.word_elements, c = c_ / groups_;
  const Index rows = quotient(d.p, d.blocks_y), columns = quotient(d.q, d.blocks_x);
  const Index height = (window_.r - 1) * window_.dilation_h + 1, width = (window_.s - 1) * window_.dilation_w + 1;
  const Index phases = std::min(window_.stride_h, height) * (d.merged ? 1 : std::min(window_.stride_w, width));
  const Index line_columns = columns - 1 + quotient(width, window_.stride_w);
  // A line's padding on the right is the next one's on the left.
  const bool shared = window_.stride_w == 1 && d.blocks_x == 1;
  d.row_pixels = line_columns - (shared ? std::min(window_.pad_w, width - 1) : 0);
  d.line_pixel = !d.merged && c * element >= 512 && c * element % 512 == 0 ? c + 64 / element : c;
  const Index distance = d.merged ? window_.stride_w * d.line_pixel : d.line_pixel;  // from window to window
  d.line_distance = d.row_pixels * distance;
  const Index lines = rows - 1 + quotient(height, window_.stride_h);
  const Index all = (lines - 1) * d.line_distance + line_columns * distance;
  // Tiles go on behind the last window, by at most their rows and the words of a row.
  const Index line = 64 / element;
  d.plane_distance = quotient(all + tile_side * (distance + kernels.word_elements), line) * line;
  d.copied_floats = phases * d.plane_distance / kernels.word_elements;
}

// The division with which the threads are expected to end the earliest, if one of them takes an item just before the
// others have none left. In all divisions a sum has the same products in the same order, so an image's bits do not
// depend on it.
void Convolution::divide_tiles(Direct& d, int threads) const {
  const Kernels& kernels = *machine_.kernels;
  const Index word_bytes = sizeof(float), element = word_bytes / kernels.word_elements;
  const bool whole = length() * element % (tile_side * word_bytes) == 0;
  const bool pointwise = window_.r == 1 && window_.s == 1 && window_.pad_h == 0 && window_.pad_w == 0 &&
                         window_.stride_h == 1 && window_.stride_w == 1;
  const Index pixels = d.in.n * d.p * d.q;
  const bool as_they_are = bytes_of(kernels.element) == element;
  d.panels = quotient(k_ / groups_, kernels.panel_width);
  d.checked = recomputes();
  d.reading = pointwise && whole && as_they_are && pixels >= tile_side ? Reading::image : Reading::lines;
  d.blocks_x = d.blocks_y = 1;
  d.copied_floats = 0;
  const auto fits = [&] {
    set_planes(d);
    return d.copied_floats * word_bytes <= machine_.l2 / 2;
  };
  if (d.reading == Reading::lines) {
    while (!fits() && d.blocks_y < d.p) {
      d.blocks_y = std::min(2 * d.blocks_y, d.p);
    }
    while (!fits() && d.blocks_x < d.q) {
      d.blocks_x = std::min(2 * d.blocks_x, d.q);
    }
  }
  const Index least_y = d.blocks_y, tiles = quotient(pixels, tile_side);
  const double steps = static_cast<double>(runs() * words() / tile_side);
  const double weight_bytes = static_cast<double>(d.panels * kernels.panel_width * runs() * words() * word_bytes);
  double best = -1;
  Direct chosen = d;
  for (Index splits = 1; splits <= d.panels; ++splits) {
    d.panels_per_item = quotient(d.panels, splits);
    d.splits = quotient(d.panels, d.panels_per_item);
    if (d.splits != splits) {
      continue;
    }
    const double share = weight_bytes / static_cast<double>(splits);
    const Index blocks_there = d.reading == Reading::image ? tiles : d.p;
    const Index most = std::max(least_y, std::min<Index>(blocks_there, 16 * threads));
    for (Index blocks = least_y; blocks <= most; ++blocks) {
      double rows, bytes;
      if (d.reading == Reading::image) {
        d.blocks = blocks;
        rows = static_cast<double>(quotient(tiles, blocks));
        bytes = rows * static_cast<double>(tile_side * length() * element) / read_near;
      } else {
        d.blocks_y = blocks;
        set_planes(d);
        d.blocks = d.in.n * d.blocks_y * d.blocks_x;
        const Index outputs = (quotient(d.p, blocks) - 1) * d.row_pixels + quotient(d.q, d.blocks_x);
        rows = static_cast<double>(quotient(outputs, tile_side));
        bytes = static_cast<double>(d.copied_floats * word_bytes) / copied;
      }
      d.items = d.blocks * d.splits * groups_;
      const double panels = static_cast<double>(d.panels_per_item);
      double item = item_overhead + bytes + rows * panels * (2 * steps * tile_product + 32 * finished_vector);
      if (share > static_cast<double>(machine_.l2) / 2) {
        item += rows / 2 * share / read_far;
      }
      const double far = std::max(share, weight_bytes / threads) / read_far;
      const double all = item * std::max(1.0, static_cast<double>(d.items) / threads);
      const double time = all + far + (threads > 1 && d.items > 1 ? item : 0);
      if (best < 0 || time < best) {
        best = time;
        chosen = d;
      }
    }
  }
  d = chosen;
}

Index tiles_scratch(const Direct& d, const Kernels& kernels) {
  const Index sums = tile_side * kernels.panel_width;
  const Index offsets = window_floats(d.merged ? d.window.r : d.window.r * d.window.s);
  return 4 * sums + offsets + d.copied_floats + (d.checked ? sums + window_words(d, kernels) + offsets : 0);
}

}  // namespace resnet_fast::cpu
