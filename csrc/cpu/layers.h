// Layers: packed weights, which algorithm computes a problem, and in what blocks.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace resnet_fast::cpu {

constexpr Index quotient(Index a, Index b) { return (a + b - 1) / b; }

// What blocking is made for.
struct Machine {
  const Kernels* kernels;
  Index l2;  // bytes of a core's second-level cache
};

// How uint8 stands for real numbers: scale * (stored - zero).
struct Affine {
  float scale = 1;
  int zero = 0;
};

// What a convolution of images or outputs in uint8 has beside weights and bias.
struct Quantization {
  const float* weight_scale = nullptr;  // [k]: weights of images in uint8 are integers of at most 127, times these
  Affine x, out;                        // what is not uint8 counts for nothing
  Affine residual;
  bool residual_stored = false;  // there is a residual, and it is uint8
  int largest = 255;             // of the outputs
};

enum class Algorithm { automatic, direct, winograd2, winograd4 };

// What was measured as the fastest, by the height and width of the images.
using Choices = std::map<std::pair<Index, Index>, Algorithm>;

// Memory for floats, or for as much else, at an address that is a multiple of 64 bytes.
class Floats {
 public:
  Floats() = default;
  explicit Floats(Index count);
  float* data() const { return memory_.get(); }
  Index size() const { return size_; }

 private:
  struct Free {
    void operator()(float* memory) const;
  };
  std::unique_ptr<float, Free> memory_;
  Index size_ = 0;
};

// How many windows fit into a padded row of pixels; 0 if none does.
Index windows(Index size, Index kernel, Index stride, Index pad, Index dilation);

// A convolution's constants, packed for the machine; the Winograd filters are made when they are first asked for.
class Convolution {
 public:
  // weight [k, c / groups, r, s] dense, bias [k], float32 whatever images are. The choices are fixed here, so
  // that no plan computes one layer in two ways.
  Convolution(const Machine& machine, const float* weight, const float* bias, Index k, Index c, Index groups,
              const Window& window, Choices choices = {}, const Quantization* quantization = nullptr);

  const Machine& machine() const { return machine_; }
  Index channels() const { return c_; }
  Index out_channels() const { return k_; }
  const Window& window() const { return window_; }
  Index groups() const { return groups_; }
  // Throws std::invalid_argument if this layer cannot be run with such a residual, or without one.
  void check_residual(bool given, Element element, bool after_relu) const;

  // Output height or width; 0 if the window does not fit.
  Index out_height(Index h) const;
  Index out_width(Index w) const;

  // As the choices say, if this layer may be computed so; else by the size. F(4x4) is for weights only with which its
  // rounding errors are small enough, whatever the choices say.
  Algorithm choose(Index h, Index w) const;
  bool winograd_possible() const;
  // Whether a vector holds several groups: as many channels in as out, 1, 2, 4 or 8, and fewer than it has.
  bool narrow_groups() const;
  // Whether a run of pixels ends within a word, where infinity or NaN behind it, times a weight of 0, would be NaN:
  // outputs that are no finite numbers may be computed again, behind what was stored.
  bool recomputes() const;
  // The layer for images [n, h, w, c] that are dense, with blocking, weights and bias, for the caller to fill in the
  // data and the rest of the epilogue.
  Direct direct(const Map& in, int threads) const;
  Winograd winograd(int m, const Map& in, int threads) const;
  Index bytes() const;

 private:
  bool winograd_worthwhile() const;
  bool merged() const;  // Direct's
  Index runs() const;   // pieces of a window that are contiguous in the image, of `length` elements and `words`
  Index length() const;
  Index words() const;
  Index set_reading(Direct& layer) const;
  void divide_tiles(Direct& layer, int threads) const;
  void set_planes(Direct& layer) const;
  const float* filters(int m) const;
  void quantize(const float* weight, const Quantization& quantization);

  Machine machine_;
  Window window_;
  Index k_, c_, groups_;
  Floats weights_, bias_;
  Floats scale_;  // Steps of what is or becomes uint8
  Steps steps_{};
  bool residual_stored_ = false;
  Choices choices_;
  bool winograd4_chosen_ = false;  // over F(2x2), if nothing was measured
  mutable std::mutex mutex_;
  mutable Floats filters2_, filters4_;
};

// Floats of `transformed`, if it is shared.
Index winograd_transformed(const Winograd& layer);

}  // namespace resnet_fast::cpu
