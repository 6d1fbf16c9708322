#include "plan.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "schedule.h"

namespace resnet_fast::cpu {
namespace {

// Images run together as long as what lies between their layers is no larger.
constexpr Index piece_bytes = 128 << 20;
constexpr std::size_t schedules_kept = 16;
constexpr std::size_t arenas_kept = 8;
constexpr Index arena_bytes_kept = 256 << 20;  // together; mapping a larger one takes a few per cent of its run

Index pooled(Index size, Index kernel, Index stride, Index pad, Index dilation, bool ceil_mode) {
  const Index out = windows(size, kernel, stride, pad, dilation);
  if (!ceil_mode || out == 0) {
    return out;
  }
  const bool rest = (size + 2 * pad - dilation * (kernel - 1) - 1) % stride != 0;
  // A window that begins in the padding behind the image is none.
  return rest && out * stride < size + pad ? out + 1 : out;
}

// Sizes with which no product below overflows; no machine has that memory.
void check_size(const Shape& shape) {
  double elements = 1;
  for (const Index size : {shape.n, shape.h, shape.w, shape.c}) {
    elements *= static_cast<double>(size);
  }
  if (elements > 0x1p48) {
    throw std::invalid_argument("plan: a value of " + std::to_string(shape.n) + "x" + std::to_string(shape.c) + "x" +
                                std::to_string(shape.h) + "x" + std::to_string(shape.w) + " is too large");
  }
}

}  // namespace

void Plan::check(int value) const {
  if (value < 0 || value >= static_cast<int>(layers_.size())) {
    throw std::invalid_argument("plan: no value has the number " + std::to_string(value));
  }
}

void Plan::check_open() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) {
    throw std::invalid_argument("plan: it has run, nothing can be added any more");
  }
}

int Plan::add_layer(Layer layer) {
  check_open();
  layers_.push_back(std::move(layer));
  return static_cast<int>(layers_.size()) - 1;
}

int Plan::input(Index channels, Element element) {
  if (kernels_for(element, element) == nullptr) {
    throw std::invalid_argument("plan: this instruction set has no kernels for such values");
  }
  if (channels <= 0) {
    throw std::invalid_argument("plan: an input must have channels, got " + std::to_string(channels));
  }
  Layer layer{Kind::input};
  layer.channels = channels;
  layer.element = element;
  inputs_.push_back(add_layer(std::move(layer)));
  return inputs_.back();
}

int Plan::convolution(int x, std::shared_ptr<const Convolution> convolution, int residual, bool relu,
                      bool residual_after_relu, Algorithm algorithm) {
  check(x);
  if (layers_[x].channels != convolution->channels()) {
    throw std::invalid_argument("plan: a convolution of " + std::to_string(convolution->channels()) +
                                " channels is given " + std::to_string(layers_[x].channels));
  }
  const Kernels& kernels = *convolution->machine().kernels;
  if (kernels.element != layers_[x].element) {
    throw std::invalid_argument(std::string("plan: a convolution of ") + name_of(kernels.element) + " and values of " +
                                name_of(layers_[x].element));
  }
  if (residual != -1) {
    check(residual);
    if (layers_[residual].channels != convolution->out_channels()) {
      throw std::invalid_argument("plan: a residual of " + std::to_string(layers_[residual].channels) +
                                  " channels is added to " + std::to_string(convolution->out_channels()));
    }
  }
  convolution->check_residual(residual != -1, residual == -1 ? kernels.out_element : layers_[residual].element,
                              relu && residual_after_relu);
  if (algorithm != Algorithm::automatic && algorithm != Algorithm::direct && !convolution->winograd_possible()) {
    throw std::invalid_argument("plan: Winograd's filtering is for 3x3 windows of stride 1 without groups");
  }
  Layer layer{Kind::convolution, x, residual};
  layer.channels = convolution->out_channels();
  layer.element = kernels.out_element;
  layer.convolution = std::move(convolution);
  layer.relu = relu;
  layer.residual_after_relu = residual_after_relu;
  layer.algorithm = algorithm;
  return add_layer(std::move(layer));
}

int Plan::max_pool(int x, const Window& window, bool ceil_mode) {
  check(x);
  Layer layer{Kind::max_pool, x};
  layer.channels = layers_[x].channels;
  layer.element = layers_[x].element;
  layer.window = window;
  layer.ceil_mode = ceil_mode;
  return add_layer(std::move(layer));
}

int Plan::average(int x) {
  check(x);
  if (layers_[x].element == Element::uint8) {
    throw std::invalid_argument("plan: the mean of values of uint8");
  }
  Layer layer{Kind::average, x};
  layer.channels = layers_[x].channels;
  layer.element = layers_[x].element;
  return add_layer(std::move(layer));
}

int Plan::add(int a, int b, bool relu) {
  check(a);
  check(b);
  if (layers_[a].channels != layers_[b].channels) {
    throw std::invalid_argument("plan: values of " + std::to_string(layers_[a].channels) + " and " +
                                std::to_string(layers_[b].channels) + " channels are added");
  }
  if (layers_[a].element != layers_[b].element || layers_[a].element == Element::uint8) {
    throw std::invalid_argument(std::string("plan: values of ") + name_of(layers_[a].element) + " and " +
                                name_of(layers_[b].element) + " are added");
  }
  Layer layer{Kind::add, a, b};
  layer.channels = layers_[a].channels;
  layer.element = layers_[a].element;
  layer.relu = relu;
  return add_layer(std::move(layer));
}

int Plan::quantize(int x, Affine stored, int largest) {
  return convert(x, Element::float32, Element::uint8, stored, largest);
}

int Plan::dequantize(int x, Affine stored) { return convert(x, Element::uint8, Element::float32, stored, 255); }

int Plan::convert(int x, Element from, Element to, Affine stored, int largest) {
  check(x);
  if (layers_[x].element != from || kernels_for(from, to) == nullptr) {
    throw std::invalid_argument(std::string("plan: values of ") + name_of(layers_[x].element) + " become " +
                                name_of(to));
  }
  Layer layer{Kind::convert, x};
  layer.channels = layers_[x].channels;
  layer.element = to;
  layer.stored = stored;
  layer.largest = largest;
  return add_layer(std::move(layer));
}

void Plan::output(int value) {
  check(value);
  check_open();
  if (std::find(outputs_.begin(), outputs_.end(), value) != outputs_.end()) {
    throw std::invalid_argument("plan: value " + std::to_string(value) + " is an output already");
  }
  outputs_.push_back(value);
}

std::vector<Shape> Plan::infer(const std::vector<Image>& inputs) const {
  if (inputs.size() != inputs_.size()) {
    throw std::invalid_argument("plan: " + std::to_string(inputs.size()) + " images are given, it takes " +
                                std::to_string(inputs_.size()));
  }
  std::vector<Shape> shapes;
  std::size_t next_input = 0;
  for (const Layer& layer : layers_) {
    if (layer.kind == Kind::input) {
      const Image& image = inputs[next_input++];
      if (image.n < 0) {
        throw std::invalid_argument("plan: a batch of " + std::to_string(image.n) + " images is given");
      }
      if (image.c != layer.channels) {
        throw std::invalid_argument("plan: an image of " + std::to_string(image.c) + " channels is given, it takes " +
                                    std::to_string(layer.channels));
      }
      if (image.h <= 0 || image.w <= 0) {
        throw std::invalid_argument("plan: an image of " + std::to_string(image.h) + "x" + std::to_string(image.w) +
                                    " pixels is given");
      }
      shapes.push_back({image.n, image.h, image.w, image.c});
      check_size(shapes.back());
      continue;
    }
    const Shape from = shapes[layer.a];
    Shape shape{from.n, from.h, from.w, layer.channels};
    if (layer.kind == Kind::convolution) {
      shape.h = layer.convolution->out_height(from.h);
      shape.w = layer.convolution->out_width(from.w);
    } else if (layer.kind == Kind::max_pool) {
      const Window& w = layer.window;
      shape.h = pooled(from.h, w.r, w.stride_h, w.pad_h, w.dilation_h, layer.ceil_mode);
      shape.w = pooled(from.w, w.s, w.stride_w, w.pad_w, w.dilation_w, layer.ceil_mode);
    } else if (layer.kind == Kind::average) {
      shape.h = shape.w = 1;
    }
    if (shape.h <= 0 || shape.w <= 0) {
      throw std::invalid_argument("plan: an image of " + std::to_string(from.h) + "x" + std::to_string(from.w) +
                                  " pixels is too small for a layer");
    }
    const int other = layer.b;
    if (other >= 0 && !(shapes[other] == shape)) {
      throw std::invalid_argument("plan: values of different sizes are added");
    }
    shapes.push_back(shape);
    check_size(shape);
  }
  return shapes;
}

std::vector<Shape> Plan::shapes(const std::vector<Image>& inputs) const {
  const std::vector<Shape> all = infer(inputs);
  std::vector<Shape> found;
  for (const int value : outputs_) {
    found.push_back(all[value]);
  }
  return found;
}

std::shared_ptr<const Schedule> Plan::schedule(const std::vector<Image>& inputs, int threads) const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    for (auto each = schedules_.rbegin(); each != schedules_.rend(); ++each) {
      if ((*each)->fits(inputs, threads)) {
        std::shared_ptr<const Schedule> found = *each;
        std::rotate(std::next(each).base(), each.base(), schedules_.end());
        return found;
      }
    }
  }
  auto made = std::make_shared<const Schedule>(*this, inputs, threads);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (schedules_.size() >= schedules_kept) {
    schedules_.erase(schedules_.begin());
  }
  schedules_.push_back(made);
  return made;
}

namespace {

Floats borrow(std::vector<Floats>& arenas, std::mutex& mutex, Index floats) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!arenas.empty()) {
      Floats last = std::move(arenas.back());
      arenas.pop_back();
      if (last.size() >= floats) {
        return last;
      }
    }
  }
  return Floats(floats);
}

}  // namespace

bool Plan::run(const std::vector<Image>& inputs, const std::vector<std::byte*>& outputs, int threads,
               Index piece) const {
  const Index images = inputs.empty() ? 0 : inputs[0].n;
  const bool alike = std::all_of(inputs.begin(), inputs.end(), [&](const Image& image) { return image.n == images; });
  if (!alike || images < 2) {
    return run_together(inputs, outputs, threads);
  }
  std::vector<Image> one = inputs;
  for (Image& image : one) {
    image.n = 1;
  }
  if (piece <= 0) {
    const Index each = schedule(one, threads)->arena_floats() * Index{sizeof(float)};
    piece = std::max<Index>(1, piece_bytes / std::max<Index>(each, 1));
  }
  const std::vector<Shape> shapes = this->shapes(one);
  const Index pieces = (images + piece - 1) / piece;
  std::vector<Image> part = inputs;
  std::vector<std::byte*> results = outputs;
  bool finite = true;
  for (Index i = 0; finite && i < pieces; ++i) {
    const Index first = images * i / pieces;
    for (std::size_t j = 0; j < inputs.size(); ++j) {
      part[j].n = images * (i + 1) / pieces - first;
      part[j].data = inputs[j].data + first * inputs[j].stride_n * bytes_of(layers_[inputs_[j]].element);
    }
    for (std::size_t j = 0; j < outputs.size(); ++j) {
      results[j] =
          outputs[j] + first * shapes[j].h * shapes[j].w * shapes[j].c * bytes_of(layers_[outputs_[j]].element);
    }
    finite = run_together(part, results, threads);
  }
  return finite;
}

bool Plan::run_together(const std::vector<Image>& inputs, const std::vector<std::byte*>& outputs, int threads) const {
  const std::shared_ptr<const Schedule> made = schedule(inputs, threads);
  Floats arena = borrow(arenas_, mutex_, made->arena_floats());
  const bool finite = made->run(*this, inputs, outputs, arena.data(), nullptr);
  keep(std::move(arena));
  return finite;
}

void Plan::keep(Floats arena) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  Index floats = arena.size();
  for (const Floats& each : arenas_) {
    floats += each.size();
  }
  if (arenas_.size() < arenas_kept && floats * Index{sizeof(float)} <= arena_bytes_kept) {
    arenas_.push_back(std::move(arena));
  }
}

std::vector<double> Plan::profile(const std::vector<Image>& inputs, const std::vector<std::byte*>& outputs,
                                  int threads) const {
  const std::shared_ptr<const Schedule> made = schedule(inputs, threads);
  Floats arena = borrow(arenas_, mutex_, made->arena_floats());
  std::vector<double> seconds;
  made->run(*this, inputs, outputs, arena.data(), &seconds);
  keep(std::move(arena));
  return seconds;
}

std::vector<std::string> Plan::algorithms(const std::vector<Image>& inputs, int threads) const {
  return schedule(inputs, threads)->algorithms();
}

Index Plan::arena_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  Index floats = 0;
  for (const Floats& arena : arenas_) {
    floats += arena.size();
  }
  return floats * Index{sizeof(float)};
}

}  // namespace resnet_fast::cpu
