#include "layers.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "memory.h"

namespace resnet_fast::cpu {
namespace {

Index quotient(Index a, Index b) { return (a + b - 1) / b; }

// Output channels that the packed weights of `k` channels have room for: panels, the last one of half the width if
// that is enough.
Index padded(Index k, const Kernels& kernels) {
  const Index rest = k % kernels.panel_width;
  return k - rest + (rest == 0 ? 0 : rest <= kernels.lanes ? kernels.lanes : kernels.panel_width);
}

// Writes value(channel, depth) as [panels][depth][panel_width], with zeros for channels that there are not.
template <typename Value>
void pack(Index k, Index depth, const Kernels& kernels, float* to, Value value) {
  for (Index first = 0; first < padded(k, kernels); first += kernels.panel_width) {
    const Index width = std::min<Index>(kernels.panel_width, padded(k, kernels) - first);
    for (Index i = 0; i < depth; ++i) {
      for (Index j = 0; j < width; ++j) {
        *to++ = first + j < k ? value(first + j, i) : 0.0f;
      }
    }
  }
}

// [n][3]: g -> G g of F(m, 3), by Cook and Toom, with the points of kernels_isa.h.
std::vector<double> filter_transform(int m) {
  const std::vector<double> points =
      m == 4 ? std::vector<double>{0, 0.625, -0.625, 1.5, -1.5} : std::vector<double>{0, 1, -1};
  std::vector<double> g;
  for (std::size_t i = 0; i < points.size(); ++i) {
    double scale = 1;
    for (std::size_t j = 0; j < points.size(); ++j) {
      scale *= i == j ? 1 : points[i] - points[j];
    }
    g.insert(g.end(), {1 / scale, points[i] / scale, points[i] * points[i] / scale});
  }
  g.insert(g.end(), {0, 0, 1});
  return g;
}

constexpr Index largest_block = 16;           // tiles
constexpr Index winograd4_limit = 512 * 256;  // input channels times output channels

}  // namespace

void Floats::Free::operator()(float* memory) const { std::free(memory); }

Floats::Floats(Index count)
    : memory_(static_cast<float*>(allocate(static_cast<std::size_t>(count) * sizeof(float)))), size_(count) {}

Convolution::Convolution(const Machine& machine, const float* weight, const float* bias, Index k, Index c, Index groups,
                         const Window& window)
    : machine_(machine), window_(window), k_(k), c_(c), groups_(groups), bias_(k) {
  const Kernels& kernels = *machine_.kernels;
  const Index group_c = c / groups, group_k = k / groups, taps = window.r * window.s, depth = taps * group_c;
  weights_ = Floats(groups * padded(group_k, kernels) * depth);
  for (Index group = 0; group < groups; ++group) {
    const float* from = weight + group * group_k * depth;
    pack(group_k, depth, kernels, weights_.data() + group * padded(group_k, kernels) * depth,
         [&](Index channel, Index i) { return from[(channel * group_c + i % group_c) * taps + i / group_c]; });
  }
  std::memcpy(bias_.data(), bias, static_cast<std::size_t>(k) * sizeof(float));
}

Index windows(Index size, Index kernel, Index stride, Index pad, Index dilation) {
  const Index room = size + 2 * pad - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

Index Convolution::out_height(Index h) const {
  return windows(h, window_.r, window_.stride_h, window_.pad_h, window_.dilation_h);
}

Index Convolution::out_width(Index w) const {
  return windows(w, window_.s, window_.stride_w, window_.pad_w, window_.dilation_w);
}

bool Convolution::winograd_possible() const {
  return window_.r == 3 && window_.s == 3 && window_.stride_h == 1 && window_.stride_w == 1 &&
         window_.dilation_h == 1 && window_.dilation_w == 1 && groups_ == 1;
}

Algorithm Convolution::choose(Index h, Index w) const {
  if (!winograd_possible() || c_ < 32 || k_ < 32) {
    return Algorithm::direct;
  }
  // Not by the batch, so that an image gives the same bits in any batch; and a layer has one kind of filters, whatever
  // the size of its images: those of 4x4 are four times the weights, and large ones are not in the cache when they are
  // read.
  const int m = c_ * k_ < winograd4_limit ? 4 : 2;
  const Index p = out_height(h), q = out_width(w), tiles = quotient(p, m) * quotient(q, m);
  const bool full = 2 * p * q >= tiles * m * m;  // or most of a tile lies outside the image
  return tiles < 4 || !full ? Algorithm::direct : m == 4 ? Algorithm::winograd4 : Algorithm::winograd2;
}

const float* Convolution::filters(int m) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  Floats& filters = m == 4 ? filters4_ : filters2_;
  if (filters.data() == nullptr) {
    const Kernels& kernels = *machine_.kernels;
    const std::vector<double> g = filter_transform(m);
    const int n = m + 2;
    const Index all = padded(k_, kernels);
    Floats made(n * n * all * c_);
    const Index width = kernels.panel_width;
    for (Index first = 0; first < all; first += width) {
      const Index columns = std::min(width, all - first);
      for (Index c = 0; c < c_; ++c) {
        for (Index j = 0; j < columns; ++j) {
          double taps[3][3];
          for (int t = 0; t < 9; ++t) {
            taps[t / 3][t % 3] = weights_.data()[(first * 9 * c_) + (t * c_ + c) * columns + j];
          }
          double half[6][3];
          for (int i = 0; i < n; ++i) {
            for (int s = 0; s < 3; ++s) {
              half[i][s] = g[3 * i] * taps[0][s] + g[3 * i + 1] * taps[1][s] + g[3 * i + 2] * taps[2][s];
            }
          }
          for (int y = 0; y < n; ++y) {
            for (int x = 0; x < n; ++x) {
              const double value = g[3 * x] * half[y][0] + g[3 * x + 1] * half[y][1] + g[3 * x + 2] * half[y][2];
              made.data()[(first * n * n + (y * n + x) * columns) * c_ + c * columns + j] = static_cast<float>(value);
            }
          }
        }
      }
    }
    filters = std::move(made);
  }
  return filters.data();
}

Direct Convolution::direct(const Map& in, int threads) const {
  const Kernels& kernels = *machine_.kernels;
  Direct d{};
  d.in = in;
  d.window = window_;
  d.groups = groups_;
  d.p = out_height(in.h);
  d.q = out_width(in.w);
  d.k = k_;
  d.weights = weights_.data();
  d.epilogue.bias = bias_.data();
  d.out_pixel = k_;
  const Index group_c = c_ / groups_;
  d.merged = groups_ == 1 && in.pixel == c_ && window_.dilation_w == 1 && window_.s > 1 && window_.s * group_c <= chunk;
  const Index pixels = in.n * d.p * d.q;
  d.tiles = quotient(pixels, kernels.tile_rows);
  const Index runs = d.merged ? window_.r : window_.r * window_.s;
  const Index length = d.merged ? window_.s * c_ : group_c;
  const Index tile_bytes = runs * quotient(length, chunk) * kernels.tile_rows * chunk_stride * Index{sizeof(float)};
  d.panels = quotient(k_ / groups_, kernels.panel_width);
  // A block's gathered pixels fill at most half of the cache; there are items enough for threads of unequal speed.
  d.tiles_per_block = std::clamp<Index>(machine_.l2 / 2 / tile_bytes, 1, largest_block);
  const Index wanted = 4 * threads;
  d.blocks = quotient(d.tiles, d.tiles_per_block);
  d.splits = 1;
  if (d.blocks * groups_ < wanted) {
    d.splits = std::min(d.panels, quotient(wanted, d.blocks * groups_));
  }
  d.panels_per_item = quotient(d.panels, d.splits);
  d.splits = quotient(d.panels, d.panels_per_item);
  d.tiles_per_block = quotient(d.tiles, d.blocks);
  d.blocks = quotient(d.tiles, d.tiles_per_block);
  d.items = d.blocks * d.splits * groups_;
  return d;
}

Index direct_scratch(const Direct& d, const Kernels& kernels) {
  const Index runs = d.merged ? d.window.r : d.window.r * d.window.s;
  const Index length = d.merged ? d.window.s * d.in.c : d.in.c / d.groups;
  return d.tiles_per_block * runs * quotient(length, chunk) * kernels.tile_rows * chunk_stride;
}

Winograd Convolution::winograd(int m, const Map& in, int threads) const {
  const Kernels& kernels = *machine_.kernels;
  Winograd w{};
  w.m = m;
  w.direct = direct(in, threads);
  w.filters = filters(m);
  w.tiles_y = quotient(w.direct.p, m);
  w.tiles_x = quotient(w.direct.q, m);
  w.tiles = in.n * w.tiles_y * w.tiles_x;
  w.panels = quotient(k_, kernels.panel_width);
  const Index positions = (m + 2) * (m + 2);
  const Index tile_bytes =
      positions * (quotient(c_, chunk) * chunk_stride + kernels.panel_width) * Index{sizeof(float)};
  // A block's transforms and products fill most of the cache: each block reads all filters once. If that makes few
  // blocks, threads share the transforms and divide the output channels, or take smaller blocks if filters are small.
  const Index rows = kernels.tile_rows;
  w.tiles_per_block = std::max<Index>(machine_.l2 * 7 / 8 / tile_bytes, 8);
  if (w.tiles_per_block > rows && w.tiles > w.tiles_per_block) {
    w.tiles_per_block = w.tiles_per_block / rows * rows;
  }
  w.blocks = quotient(w.tiles, w.tiles_per_block);
  const Index wanted = 4 * threads;
  const Index filter_bytes = positions * c_ * k_ * Index{sizeof(float)};
  if (w.blocks < wanted && filter_bytes <= 4 * machine_.l2) {
    w.tiles_per_block = std::max(quotient(w.tiles, wanted), std::min(w.tiles_per_block, rows));
    w.blocks = quotient(w.tiles, w.tiles_per_block);
  }
  w.shared = w.blocks < 2 * threads;
  w.splits = w.shared ? std::min(w.panels, quotient(wanted, w.blocks)) : 1;
  w.panels_per_item = quotient(w.panels, w.splits);
  w.splits = quotient(w.panels, w.panels_per_item);
  w.tiles_per_block = quotient(w.tiles, w.blocks);
  w.blocks = quotient(w.tiles, w.tiles_per_block);
  w.transform_items = w.shared ? w.blocks * quotient(c_, chunk) : 0;
  w.items = w.blocks * w.splits;
  return w;
}

Index winograd_transformed(const Winograd& w) {
  return w.blocks * (w.m + 2) * (w.m + 2) * quotient(w.direct.in.c, chunk) * w.tiles_per_block * chunk_stride;
}

Index winograd_scratch(const Winograd& w, const Kernels& kernels) {
  const Index positions = (w.m + 2) * (w.m + 2);
  const Index transformed =
      w.shared ? 0 : positions * quotient(w.direct.in.c, chunk) * w.tiles_per_block * chunk_stride;
  const Index fallback = 9 * quotient(w.direct.in.c, chunk) * chunk_stride;
  return transformed + positions * w.tiles_per_block * kernels.panel_width + fallback;
}

Index Convolution::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return (weights_.size() + bias_.size() + filters2_.size() + filters4_.size()) * Index{sizeof(float)};
}

}  // namespace resnet_fast::cpu
