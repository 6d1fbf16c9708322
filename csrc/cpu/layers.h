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

// What blocking is made for.
struct Machine {
  const Kernels* kernels;
  Index l2;  // bytes of a core's second-level cache
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
  // weight [k, c / groups, r, s] dense, bias [k], float32 for images of bfloat16 too. The choices are fixed here, so
  // that no plan computes one layer in two ways.
  Convolution(const Machine& machine, const float* weight, const float* bias, Index k, Index c, Index groups,
              const Window& window, Choices choices = {});

  const Machine& machine() const { return machine_; }
  Index channels() const { return c_; }
  Index out_channels() const { return k_; }
  const Window& window() const { return window_; }
  Index groups() const { return groups_; }

  // Output height or width; 0 if the window does not fit.
  Index out_height(Index h) const;
  Index out_width(Index w) const;

  // As the choices say, if this layer may be computed so; else by the size. F(4x4) is for weights only with which its
  // rounding errors are small enough, whatever the choices say.
  Algorithm choose(Index h, Index w) const;
  bool winograd_possible() const;
  // Whether a vector holds several groups: as many channels in as out, 1, 2, 4 or 8, and fewer than it has.
  bool narrow_groups() const;
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
  const float* filters(int m) const;

  Machine machine_;
  Window window_;
  Index k_, c_, groups_;
  Floats weights_, bias_;
  Choices choices_;
  bool winograd4_chosen_ = false;  // over F(2x2), if nothing was measured
  mutable std::mutex mutex_;
  mutable Floats filters2_, filters4_;
};

// Floats of `transformed`, if it is shared.
Index winograd_transformed(const Winograd& layer);

}  // namespace resnet_fast::cpu
