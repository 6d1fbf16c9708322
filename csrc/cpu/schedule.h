// A plan for images of given shapes: how each layer is divided, which images run together, and where results lie.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "plan.h"

namespace resnet_fast::cpu {

// Layers run for all images of a batch, or for a few images after the other, through several layers: as many as keep
// what a layer reads and writes near the processor. Results that only these layers need lie in memory for so many.
class Schedule {
 public:
  Schedule(const Plan& plan, const std::vector<Image>& inputs, int threads);

  bool fits(const std::vector<Image>& inputs, int threads) const;
  Index arena_floats() const { return arena_floats_; }
  // False if there was a number that uint8 should have held. Adds to `seconds`, if given, what each layer took.
  bool run(const Plan& plan, const std::vector<Image>& inputs, const std::vector<std::byte*>& outputs, float* arena,
           std::vector<double>* seconds) const;
  std::vector<std::string> algorithms() const;

 private:
  // A layer for one number of images.
  struct Step {
    Algorithm algorithm = Algorithm::direct;
    Direct direct{};
    Winograd winograd{};
    Pool pool{};
    Conversion conversion{};
    Index scratch = 0;
    Index temporary = -1;  // of transformed images
  };
  // Layers [first, last), `parts` times with a part of the images each: as many as the last has, or one more.
  struct Segment {
    std::size_t first, last;
    Index parts;
  };
  struct Value {
    Shape shape{};
    Index pixel = 0;        // elements from one pixel to the next
    Index offset = -1;      // in the arena, in floats; -1 if it is an output, or an input as it is given
    Index image_bytes = 0;  // from one image to the next, there and in an output
    bool whole = false;     // there for all images, not for those of one part
    bool output = false;
  };
  struct Addresses;

  void describe_values(const Plan& plan, const std::vector<Image>& inputs);
  void divide(const Plan& plan, const std::vector<Image>& inputs);
  void place(const Plan& plan);
  Step step(const Plan& plan, std::size_t layer, const Shape& from, const Shape& to) const;
  void check_addresses(const Plan& plan, const std::vector<Image>& inputs,
                       const std::vector<std::byte*>& outputs) const;
  // A value's images in a part of a segment, in one of those with one more if `larger`.
  Shape part_of(const Shape& shape, const Segment& segment, bool larger) const;

  int threads_;
  std::vector<Shape> given_;
  std::vector<bool> dense_;
  std::vector<Value> values_;
  std::vector<Segment> segments_;
  std::vector<Step> steps_[2];  // for parts of as many images as the last has, and of one more
  Index arena_floats_ = 0;
};

}  // namespace resnet_fast::cpu
