// A network as one call: layers in order, their results in one piece of memory that is used again and again.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "layers.h"

namespace resnet_fast::cpu {

// A batch [n, c, h, w] anywhere in memory; strides in elements. Without `data` it is a shape.
struct Image {
  const std::byte* data;
  Index n, c, h, w;
  Index stride_n, stride_c, stride_h, stride_w;
};

struct Shape {
  Index n, h, w, c;
  bool operator==(const Shape&) const = default;
};

class Schedule;

class Plan {
 public:
  // `near`: bytes of values for each thread that a layer finds fast, of which the number of images that run together
  // through the first layers is made.
  explicit Plan(Index near) : near_(near) {}

  // Each adds a layer and returns the number of its result. Throws std::invalid_argument if channels do not fit, and
  // once the plan has run: its schedules would not know the layer.
  int input(Index channels, Element element);
  int convolution(int x, std::shared_ptr<const Convolution> layer, int residual, bool relu, bool residual_after_relu,
                  Algorithm algorithm);
  int max_pool(int x, const Window& window, bool ceil_mode);
  int average(int x);  // over all pixels: [n, 1, 1, c]
  int add(int a, int b, bool relu);
  int quantize(int x, Affine stored, int largest);  // from float32 to uint8
  int dequantize(int x, Affine stored);             // from uint8 to float32
  void output(int value);

  // Shapes of the outputs for images of these shapes. Throws std::invalid_argument if a window does not fit.
  std::vector<Shape> shapes(const std::vector<Image>& inputs) const;

  // Computes the outputs, each [n, h, w, c] dense, at most `piece` images at a time (0: as many as keep close to the
  // processor). Any number of threads may be in here at once. False, and the outputs mean nothing, if there was NaN or
  // infinity that uint8 should have held.
  bool run(const std::vector<Image>& inputs, const std::vector<std::byte*>& outputs, int threads,
           Index piece = 0) const;

  // Seconds of each layer in one run, by itself, in the order in which they were added.
  std::vector<double> profile(const std::vector<Image>& inputs, const std::vector<std::byte*>& outputs,
                              int threads) const;
  // What each layer would run as: "direct", "winograd 4x4", ...
  std::vector<std::string> algorithms(const std::vector<Image>& inputs, int threads) const;

  Index arena_bytes() const;  // that are kept between runs

 private:
  friend class Schedule;
  enum class Kind { input, convolution, max_pool, average, add, convert };
  struct Layer {
    Kind kind;
    int a = -1, b = -1;
    Index channels = 0;
    Element element = Element::float32;  // of the result
    std::shared_ptr<const Convolution> convolution{};
    Algorithm algorithm = Algorithm::automatic;
    bool relu = false, residual_after_relu = false, ceil_mode = false;
    Window window{};
    Affine stored{};  // of a conversion
    int largest = 255;
  };

  int add_layer(Layer layer);
  int convert(int x, Element from, Element to, Affine stored, int largest);
  void check(int value) const;
  void check_open() const;
  std::vector<Shape> infer(const std::vector<Image>& inputs) const;
  bool run_together(const std::vector<Image>& inputs, const std::vector<std::byte*>& outputs, int threads) const;
  std::shared_ptr<const Schedule> schedule(const std::vector<Image>& inputs, int threads) const;
  void keep(Floats arena) const;

  Index near_;
  std::vector<Layer> layers_;
  std::vector<int> inputs_, outputs_;
  mutable std::mutex mutex_;
  mutable bool closed_ = false;
  mutable std::vector<std::shared_ptr<const Schedule>> schedules_;  // the latest last
  mutable std::vector<Floats> arenas_;                              // that nobody uses now
};

}  // namespace resnet_fast::cpu
