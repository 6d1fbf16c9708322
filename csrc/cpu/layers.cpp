#include "layers.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "memory.h"

namespace resnet_fast::cpu {
namespace {

// Output channels that the packed weights of `k` channels have room for: panels, the last one of half the width if
// that is enough.
Index padded(Index k, const Kernels& kernels) {
  const Index rest = k % kernels.panel_width;
  return k - rest + (rest == 0 ? 0 : rest <= kernels.lanes ? kernels.lanes : kernels.panel_width);
}

// The nearest bfloat16, the even one if two are as near.
std::uint16_t to_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<std::uint16_t>(std::isnan(value) ? bits >> 16 | 1 << 6 : (bits + (bits >> 16 & 1) + 0x7fff) >> 16);
}

float round_to(Element element, float value) {
  if (element == Element::bfloat16) {
    const std::uint32_t bits = std::uint32_t{to_bfloat16(value)} << 16;
    std::memcpy(&value, &bits, sizeof value);
  }
  return value;
}

// Two bfloat16 as the word that holds them.
float pair(float first, float second) {
  const std::uint16_t halves[2] = {to_bfloat16(first), to_bfloat16(second)};
  float word;
  std::memcpy(&word, halves, sizeof word);
  return word;
}

// Four integers as the word that holds them.
float quadruple(const float (&values)[4]) {
  std::int8_t bytes[4];
  for (int i = 0; i < 4; ++i) {
    bytes[i] = static_cast<std::int8_t>(values[i]);
  }
  float word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

float element_of(float word, const Kernels& kernels, Index which) {
  if (kernels.word_elements == 1) {
    return word;
  }
  std::uint16_t halves[2];
  std::memcpy(halves, &word, sizeof word);
  const std::uint32_t bits = std::uint32_t{halves[which]} << 16;
  std::memcpy(&word, &bits, sizeof word);
  return word;
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

// [n][3]: g -> G g of F(m, 3), by Cook and Toom, with the points of kernels_winograd.h.
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

// Whether F(4x4) with these filters [k, c, 3, 3] is expected to lose at most twice what the sum in order, as torch
// takes it, loses, and one rounding more. For images of independent values both are sums of independent roundings: of
// each partial sum there, here of each position's products, enlarged as the outputs enlarge them. Measured errors are
// within a fifth of these for such images and up to 1.5 times the ratio after ReLU, which the margin is for. What fails
// has few channels (fewer than about 56), filters most of whose weights are 0, or sums of neighbours that do not
// alternate.
bool winograd4_obeys_error_rule(const float* weight, Index k, Index c) {
  // Per position, squared and for one direction: B^T's rows, and the mean of A^T's column.
  constexpr double p = 25.0 / 64, q = 9.0 / 4;  // the points' squares
  const auto outputs = [](double x) { return (1 + x + x * x + x * x * x) / 4; };
  const double at_ends = (1 + (p + q) * (p + q) + p * p * q * q) / 4;
  const double at_p = outputs(p) * (1 + p) * (1 + q * q), at_q = outputs(q) * (1 + q) * (1 + p * p);
  const double gain[6] = {at_ends, at_p, at_p, at_q, at_q, at_ends};
  const std::vector<double> g = filter_transform(4);
  double form[3][3] = {};  // G^T diag(gain) G
  for (int i = 0; i < 18; ++i) {
    for (int b = 0; b < 3; ++b) {
      form[i % 3][b] += g[i] * gain[i / 3] * g[i / 3 * 3 + b];
    }
  }
  double energy = 0, in_order = 0, enlarged = 0;
  for (Index channel = 0; channel < k; ++channel) {
    const float* filters = weight + channel * c * 9;
    double sum = 0;
    for (Index i = 0; i < 9 * c; ++i) {
      const double tap = filters[i % c * 9 + i / c];
      if (tap != 0) {
        in_order += sum == 0 ? 0 : sum + tap * tap;  // the first one is not rounded
        sum += tap * tap;
      }
    }
    energy += sum;
    for (const float* f = filters; f < filters + c * 9; f += 9) {
      double half[3][3];
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
          half[i][j] = form[i][0] * f[j] + form[i][1] * f[3 + j] + form[i][2] * f[6 + j];
        }
      }
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
          enlarged += (half[i][0] * form[0][j] + half[i][1] * form[1][j] + half[i][2] * form[2][j]) * f[3 * i + j];
        }
      }
    }
  }
  constexpr double rounding = 0.41, margin = 0.65;  // the error of one, as part of the largest
  const double length = std::min<double>(static_cast<double>(c), winograd_partial_sum);
  const double roundings = length / 2 + static_cast<double>(c) / length / 2 + 4;  // 4: of image, filter and outputs
  const double ours = rounding * std::sqrt(enlarged / energy * roundings);
  return ours <= margin * (2 * rounding * std::sqrt(in_order / energy) + 1);
}

constexpr Index least_block = 4;              // tiles
constexpr Index winograd4_limit = 512 * 256;  // input channels times output channels

}  // namespace

void Floats::Free::operator()(float* memory) const { std::free(memory); }

Floats::Floats(Index count)
    : memory_(static_cast<float*>(allocate(static_cast<std::size_t>(count) * sizeof(float)))), size_(count) {}

Convolution::Convolution(const Machine& machine, const float* weight, const float* bias, Index k, Index c, Index groups,
                         const Window& window, Choices choices, const Quantization* quantization)
    : machine_(machine), window_(window), k_(k), c_(c), groups_(groups), bias_(k) {
  const Kernels& kernels = *machine_.kernels;
  const Element element = kernels.element;
  const Index group_c = c / groups, group_k = k / groups, taps = window.r * window.s, depth = taps * group_c;
  if (narrow_groups()) {
    const Index lanes = kernels.lanes;
    weights_ = Floats(quotient(k, lanes) * lanes * depth);
    float* to = weights_.data();
    for (Index first = 0; first < k; first += lanes) {
      for (Index i = 0; i < depth; ++i) {
        for (Index channel = first; channel < first + lanes; ++channel) {
          *to++ =
              channel < k ? round_to(element, weight[(channel * group_c + i % group_c) * taps + i / group_c]) : 0.0f;
        }
      }
    }
    std::memcpy(bias_.data(), bias, static_cast<std::size_t>(k) * sizeof(float));
    return;
  }
  const Index group_words = padded(group_k, kernels) * runs() * words();
  weights_ = Floats(groups * group_words);
  for (Index group = 0; group < groups; ++group) {
    const float* from = weight + group * group_k * depth;
    const auto at = [&](Index channel, Index run, Index i) {
      const Index j = run * length() + i;
      return i < length() ? from[(channel * group_c + j % group_c) * taps + j / group_c] : 0.0f;
    };
    pack(group_k, runs() * words(), kernels, weights_.data() + group * group_words, [&](Index channel, Index word) {
      const Index run = word / words(), i = word % words();
      if (kernels.word_elements == 4) {
        return quadruple({at(channel, run, 4 * i), at(channel, run, 4 * i + 1), at(channel, run, 4 * i + 2),
                          at(channel, run, 4 * i + 3)});
      }
      return kernels.word_elements == 2 ? pair(at(channel, run, 2 * i), at(channel, run, 2 * i + 1))
                                        : round_to(element, at(channel, run, i));
    });
  }
  std::memcpy(bias_.data(), bias, static_cast<std::size_t>(k) * sizeof(float));
  if (quantization != nullptr) {
    quantize(weight, *quantization);
  }
  const auto is_winograd4 = [](const auto& choice) { return choice.second == Algorithm::winograd4; };
  const bool worthwhile = winograd_worthwhile() && c * k < winograd4_limit;
  const bool measured = winograd_possible() && std::any_of(choices.begin(), choices.end(), is_winograd4);
  // Next to the rounding of a bfloat16, that of float32's transforms is nothing.
  const bool allowed =
      (worthwhile || measured) && (element == Element::bfloat16 || winograd4_obeys_error_rule(weight, k, c));
  winograd4_chosen_ = worthwhile && allowed;
  std::erase_if(choices, [&](const auto& choice) {
    return (choice.second != Algorithm::direct && !winograd_possible()) || (is_winograd4(choice) && !allowed);
  });
  choices_ = std::move(choices);
}

// Makes of the bias what Steps say it is, and the scales.
void Convolution::quantize(const float* weight, const Quantization& of) {
  const Kernels& kernels = *machine_.kernels;
  const bool reads = kernels.element == Element::uint8, writes = kernels.out_element == Element::uint8;
  const Index depth = window_.r * window_.s * (c_ / groups_);
  const double step = writes ? static_cast<double>(of.out.scale) : 1;
  residual_stored_ = of.residual_stored;
  scale_ = Floats(k_);
  constexpr double largest_product = 255.0 * 127;
  const double largest_scale = reads ? of.x.scale * *std::max_element(of.weight_scale, of.weight_scale + k_) / step : 1;
  // With larger scales the bias, which is rounded, would be off by more than 1/300 of a step.
  steps_.short_sums = !kernels.tiles && reads && writes && static_cast<double>(depth) * largest_product < 0x1p22 &&
                      largest_scale <= 0x1p-9;
  double most = 0;
  for (Index k = 0; k < k_; ++k) {
    const double unit = reads ? static_cast<double>(of.x.scale) * static_cast<double>(of.weight_scale[k]) : 1;
    double real = static_cast<double>(bias_.data()[k]);
    if (reads && of.x.zero != 0) {
      double sum = 0;
      for (Index i = 0; i < depth; ++i) {
        sum += static_cast<double>(weight[k * depth + i]);
      }
      real -= unit * sum * of.x.zero;
    }
    if (residual_stored_) {
      real -= static_cast<double>(of.residual.scale) * of.residual.zero;
    }
    const float scale = static_cast<float>(unit / step);
    most = std::max(most, std::abs(real / step) + static_cast<double>(depth) * largest_product * unit / step);
    scale_.data()[k] = scale;
    bias_.data()[k] =
        static_cast<float>(real / step - (steps_.short_sums ? static_cast<double>(steps_start) * scale : 0));
  }
  steps_.scale = scale_.data();
  steps_.residual_scale = static_cast<float>(static_cast<double>(of.residual.scale) / step);
  steps_.bounded = reads && most + 255 * static_cast<double>(steps_.residual_scale) < 0x1p30;
  steps_.low = static_cast<float>(-of.out.zero);
  steps_.high = static_cast<float>(of.largest - of.out.zero);
  steps_.zero = of.out.zero;
  steps_.padding = static_cast<std::uint32_t>(of.x.zero) * 0x01010101U;
}

void Convolution::check_residual(bool given, Element element, bool after_relu) const {
  const Element out = machine_.kernels->out_element;
  if (given && element != (residual_stored_ ? Element::uint8 : out)) {
    throw std::invalid_argument("a residual of another kind than the convolution adds");
  }
  if (residual_stored_ ? !given : given && out == Element::uint8) {
    throw std::invalid_argument(given ? "the convolution was made without a residual in uint8"
                                      : "the convolution was made for a residual in uint8");
  }
  if (residual_stored_ && after_relu) {  // whose zero point is in the bias, in front of the ReLU
    throw std::invalid_argument("a residual in uint8 is added in front of the ReLU");
  }
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
  return machine_.kernels->winograd != nullptr && window_.r == 3 && window_.s == 3 && window_.stride_h == 1 &&
         window_.stride_w == 1 && window_.dilation_h == 1 && window_.dilation_w == 1 && groups_ == 1;
}

bool Convolution::narrow_groups() const {
  const Index channels = c_ / groups_;
  return machine_.kernels->winograd != nullptr && groups_ > 1 && channels == k_ / groups_ &&
         channels < machine_.kernels->lanes && (channels == 1 || channels == 2 || channels == 4 || channels == 8);
}

bool Convolution::merged() const {
  return groups_ == 1 && window_.dilation_w == 1 && window_.s > 1 &&
         window_.s * c_ <= chunk * machine_.kernels->word_elements;
}

Index Convolution::runs() const { return merged() ? window_.r : window_.r * window_.s; }
Index Convolution::length() const { return merged() ? window_.s * c_ : c_ / groups_; }
Index Convolution::words() const {
  const Kernels& kernels = *machine_.kernels;
  return quotient(length(), kernels.word_elements * kernels.run_words) * kernels.run_words;
}

bool Convolution::recomputes() const {
  const Kernels& kernels = *machine_.kernels;
  const bool looks_behind =
      kernels.element == Element::bfloat16 || (kernels.tiles && kernels.element != Element::uint8);
  return looks_behind && length() % (kernels.word_elements * kernels.run_words) != 0;
}

bool Convolution::winograd_worthwhile() const { return winograd_possible() && c_ >= 32 && k_ >= 32; }

Algorithm Convolution::choose(Index h, Index w) const {
  const auto measured = choices_.find({h, w});
  if (measured != choices_.end()) {
    return measured->second;
  }
  // Pairs of bfloat16 are multiplied at twice the rate of the floats that F(2x2) saves 5/9 of.
  const Kernels& kernels = *machine_.kernels;
  if (!winograd_worthwhile() || kernels.tiles || (kernels.word_elements == 2 && !winograd4_chosen_)) {
    return Algorithm::direct;
  }
  // Not by the batch, so that an image gives the same bits in any batch; and, if nothing was measured, a layer has one
  // kind of filters, whatever the size of its images: those of 4x4 are four times the weights, and large ones are not
  // in the cache when they are read.
  const int m = winograd4_chosen_ ? 4 : 2;
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
            const Index run = (t * c_ + c) / length(), i = (t * c_ + c) % length();
            const Index word = first * runs() * words() + (run * words() + i / kernels.word_elements) * columns + j;
            taps[t / 3][t % 3] = element_of(weights_.data()[word], kernels, i % kernels.word_elements);
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

// For the layer's tiles_per_block. Returns the bytes that an item reads.
Index Convolution::set_reading(Direct& d) const {
  const Kernels& kernels = *machine_.kernels;
  const Index word_bytes = sizeof(float), element = word_bytes / kernels.word_elements, c = c_ / groups_;
  const Index pixels = d.tiles_per_block * kernels.tile_rows;
  const bool pointwise = window_.r == 1 && window_.s == 1 && window_.pad_h == 0 && window_.pad_w == 0;
  const bool whole = length() % kernels.word_elements == 0;
  const bool as_they_are = bytes_of(kernels.element) * kernels.word_elements == word_bytes;
  d.checked = false;
  d.copied_floats = 0;
  if (pointwise && whole && as_they_are) {
    d.reading = Reading::image;
    return pixels * c * element;
  }
  d.by_rows = pixels <= d.q;
  const Index columns = (std::min(pixels, d.q) - 1) * window_.stride_w + (window_.s - 1) * window_.dilation_w + 1;
  const Index height = (window_.r - 1) * window_.dilation_h + 1;  // of a window, in lines
  // Pixels that are copied if the item begins with a row.
  const Index in_lines = ((quotient(pixels, d.q) - 1) * window_.stride_h + height) * columns;
  d.reading = in_lines <= pixels * window_.r * window_.s ? Reading::lines : Reading::windows;
  if (d.reading == Reading::windows) {
    d.window_distance = runs() * words() + 16;
    d.copied_floats = pixels * d.window_distance;
    return d.copied_floats * word_bytes;
  }
  d.checked = recomputes();
  d.line_pixel = c * element >= 512 && c * element % 512 == 0 ? c + 64 / element : c;
  d.line_distance = quotient(columns * d.line_pixel * element + word_bytes, 64) * 64 / element;
  // Rows of outputs, and how many images' they may be.
  const Index rows = std::min(d.in.n * d.p, quotient(pixels, d.q) + 1);
  const Index pieces = d.by_rows ? rows : quotient(rows, d.p) + 1;
  const Index lines = (rows - (d.by_rows ? pieces : 0)) * window_.stride_h + pieces * height;
  d.copied_floats = quotient(lines * d.line_distance * element, word_bytes);
  return d.copied_floats * word_bytes;
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
  d.epilogue.residual_element = residual_stored_ ? Element::uint8 : kernels.out_element;
  d.epilogue.steps = steps_;
  d.out_pixel = k_;
  d.run_words = kernels.run_words;
  d.narrow_groups = narrow_groups();
  if (d.narrow_groups) {
    d.items = in.n * d.p;
    return d;
  }
  d.merged = merged();
  if (kernels.tiles) {
    divide_tiles(d, threads);
    return d;
  }
  const Index pixels = in.n * d.p * d.q;
  d.tiles = quotient(pixels, kernels.tile_rows);
  d.panels = quotient(k_ / groups_, kernels.panel_width);
  // What a block reads fills at most half of the cache; there are items enough for threads of unequal speed.
  d.tiles_per_block = largest_block;
  while (d.tiles_per_block > 1 && set_reading(d) > machine_.l2 / 2) {
    --d.tiles_per_block;
  }
  const Index wanted = 4 * threads;
  // Smaller blocks first: each split copies the same lines again. But a block reads its panels once, for all tiles.
  d.tiles_per_block = std::min(d.tiles_per_block, std::max(quotient(d.tiles * groups_, wanted), least_block));
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
  set_reading(d);
  return d;
}

Index window_words(const Direct& d, const Kernels& kernels) {
  const Index runs = d.merged ? d.window.r : d.window.r * d.window.s;
  const Index length = d.merged ? d.window.s * d.in.c : d.in.c / d.groups;
  return runs * quotient(length, kernels.word_elements * kernels.run_words) * kernels.run_words;
}

Index direct_scratch(const Direct& d, const Kernels& kernels) {
  if (d.narrow_groups) {
    return 0;
  }
  if (kernels.tiles) {
    return tiles_scratch(d, kernels);
  }
  const Index window = d.checked ? window_words(d, kernels) : 0;
  return window_floats(d.tiles_per_block * kernels.tile_rows) + d.copied_floats + window;
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
  return transformed + positions * w.tiles_per_block * kernels.panel_width + window_words(w.direct, kernels);
}

Index Convolution::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return (weights_.size() + bias_.size() + scale_.size() + filters2_.size() + filters4_.size()) * Index{sizeof(float)};
}

}  // namespace resnet_fast::cpu
