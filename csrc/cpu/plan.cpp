#include "plan.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "execute.h"

namespace resnet_fast::cpu {
namespace {

// Images run together as long as what lies between their layers is no larger.
constexpr Index piece_bytes = 128 << 20;
constexpr std::size_t schedules_kept = 16;
constexpr std::size_t arenas_kept = 8;
constexpr Index arena_bytes_kept = 256 << 20;  // together; mapping a larger one takes a few per cent of its run

Index aligned(Index floats) { return (floats + 31) / 32 * 32; }

struct Copy {
  Image image;
  std::byte* out;
};

// `Value` has the size of an element.
template <typename Value>
void copy_row(const void* context, Index item, float*) {
  const Copy& copy = *static_cast<const Copy*>(context);
  const Image& image = copy.image;
  const Value* from =
      reinterpret_cast<const Value*>(image.data) + item / image.h * image.stride_n + item % image.h * image.stride_h;
  Value* to = reinterpret_cast<Value*>(copy.out) + item * image.w * image.c;
  for (Index x = 0; x < image.w; ++x) {
    for (Index c = 0; c < image.c; ++c) {
      *to++ = from[x * image.stride_w + c * image.stride_c];
    }
  }
}

bool dense(const Image& image) {
  const Index row = image.w * image.c;
  return (image.stride_c == 1 || image.c == 1) && (image.stride_w == image.c || image.w == 1) &&
         (image.stride_h == row || image.h == 1) && (image.stride_n == image.h * row || image.n == 1);
}

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

// The layers of a plan for images of given shapes: blocking, and where in the arena each result lies.
class Schedule {
 public:
  Schedule(const Plan& plan, const std::vector<Image>& inputs, int threads);

  bool fits(const std::vector<Image>& inputs, int threads) const;
  Index arena_floats() const { return arena_floats_; }
  bool run(const Plan& plan, const std::vector<Image>& inputs, const std::vector<std::byte*>& outputs, float* arena,
           std::vector<double>* seconds) const;
  std::vector<std::string> algorithms() const;

 private:
  void check_addresses(const Plan& plan, const std::vector<Image>& inputs,
                       const std::vector<std::byte*>& outputs) const;

  struct Step {
    Algorithm algorithm = Algorithm::direct;
    Direct direct{};
    Winograd winograd{};
    Pool pool{};
    Conversion conversion{};
    Index scratch = 0;
    Index offset = -1;     // of the result
    Index temporary = -1;  // of transformed images
    bool copies = false;   // an input that is not dense
  };

  int threads_;
  std::vector<Shape> given_;
  std::vector<bool> dense_;
  std::vector<Shape> shapes_;
  std::vector<Index> pixels_;  // elements from one pixel to the next
  std::vector<Step> steps_;
  Index arena_floats_ = 0;
};

namespace {

// Space of an arena by first fit, with every piece freed once.
class Space {
 public:
  Index take(Index floats) {
    const Index size = aligned(std::max<Index>(floats, 1));
    Index at = 0;
    std::size_t i = 0;
    for (; i < used_.size() && used_[i].first - at < size; ++i) {
      at = used_[i].first + used_[i].second;
    }
    used_.insert(used_.begin() + static_cast<std::ptrdiff_t>(i), {at, size});
    largest_ = std::max(largest_, at + size);
    return at;
  }
  void free(Index at) {
    used_.erase(std::find_if(used_.begin(), used_.end(), [at](const auto& piece) { return piece.first == at; }));
  }
  Index largest() const { return largest_; }

 private:
  std::vector<std::pair<Index, Index>> used_;  // where and how much, in order
  Index largest_ = 0;
};

}  // namespace

Schedule::Schedule(const Plan& plan, const std::vector<Image>& inputs, int threads)
    : threads_(threads), shapes_(plan.infer(inputs)), steps_(plan.layers_.size()) {
  for (const Image& image : inputs) {
    given_.push_back({image.n, image.h, image.w, image.c});
    dense_.push_back(dense(image));
  }
  const auto count = static_cast<int>(plan.layers_.size());
  std::vector<int> last(plan.layers_.size(), -1);
  for (int i = 0; i < count; ++i) {
    for (const int source : {plan.layers_[i].a, plan.layers_[i].b}) {
      if (source >= 0) {
        last[source] = i;
      }
    }
  }
  std::vector<bool> only_converted(plan.layers_.size(), true);  // which takes any strides
  for (const Plan::Layer& layer : plan.layers_) {
    for (const int source : {layer.a, layer.b}) {
      if (source >= 0 && layer.kind != Plan::Kind::convert) {
        only_converted[source] = false;
      }
    }
  }
  std::vector<bool> is_output(plan.layers_.size(), false);
  for (const int value : plan.outputs_) {
    is_output[value] = true;
  }
  // Pixels of a distance that is a multiple of a page would fall on the same lines of the cache.
  pixels_.resize(plan.layers_.size());
  for (int i = 0; i < count; ++i) {
    const Index c = shapes_[i].c, element = bytes_of(plan.layers_[i].element);
    const bool wide = c * element >= 512 && c * element % 512 == 0;
    pixels_[i] = plan.layers_[i].kind == Plan::Kind::convolution && wide && !is_output[i] ? c + 64 / element : c;
  }
  for (int i = count - 1; i >= 0; --i) {
    const Plan::Layer& layer = plan.layers_[i];
    if (layer.kind == Plan::Kind::add) {  // takes and gives what is dense
      pixels_[i] = shapes_[i].c;
      pixels_[layer.a] = shapes_[layer.a].c;
      pixels_[layer.b] = shapes_[layer.b].c;
    }
  }
  Space space;
  std::size_t next_input = 0;
  for (int i = 0; i < count; ++i) {
    const Plan::Layer& layer = plan.layers_[i];
    Step& step = steps_[i];
    const Shape shape = shapes_[i];
    const Index elements = shape.n * shape.h * shape.w * shape.c;
    const Index floats =
        (shape.n * shape.h * shape.w * pixels_[i] * bytes_of(layer.element) + Index{sizeof(float)} - 1) /
        Index{sizeof(float)};
    if (layer.kind == Plan::Kind::input) {
      step.copies = !dense_[next_input++] && !only_converted[i];
      if (step.copies && !is_output[i]) {
        step.offset = space.take(floats);
      }
      continue;
    }
    if (!is_output[i]) {
      step.offset = space.take(floats);
    }
    const Shape from = shapes_[layer.a];
    const Map in{from.n, from.h, from.w, from.c, pixels_[layer.a]};
    if (layer.kind == Plan::Kind::convolution && elements != 0) {
      const Kernels& kernels = *layer.convolution->machine().kernels;
      step.algorithm =
          layer.algorithm == Algorithm::automatic ? layer.convolution->choose(in.h, in.w) : layer.algorithm;
      if (step.algorithm == Algorithm::direct) {
        step.direct = layer.convolution->direct(in, threads);
        step.scratch = direct_scratch(step.direct, kernels);
      } else {
        step.winograd = layer.convolution->winograd(step.algorithm == Algorithm::winograd4 ? 4 : 2, in, threads);
        step.scratch = winograd_scratch(step.winograd, kernels);
        if (step.winograd.shared) {
          step.temporary = space.take(winograd_transformed(step.winograd));
          space.free(step.temporary);
        }
      }
      Direct& direct = step.algorithm == Algorithm::direct ? step.direct : step.winograd.direct;
      direct.epilogue.relu = layer.relu;
      direct.epilogue.residual_after_relu = layer.residual_after_relu;
      direct.epilogue.residual_pixel = layer.b < 0 ? 0 : pixels_[layer.b];
      limit(direct.epilogue);
      direct.out_pixel = pixels_[i];
    } else if (layer.kind == Plan::Kind::max_pool) {
      step.pool = Pool{nullptr, in, layer.window, shape.h, shape.w, nullptr, pixels_[i], shape.n * shape.h};
    } else if (layer.kind == Plan::Kind::convert) {
      Conversion& of = step.conversion;
      of = {.n = from.n, .h = from.h, .w = from.w, .c = from.c};
      of.stride_w = in.pixel;
      of.stride_h = from.w * in.pixel;
      of.stride_n = from.h * of.stride_h;
      of.stride_c = 1;
      of.out_pixel = pixels_[i];
      of.scale = layer.stored.scale;
      of.zero = layer.stored.zero;
      of.largest = layer.largest;
    }
    for (const int source : {layer.a, layer.b}) {
      if (source >= 0 && last[source] == i && steps_[source].offset >= 0) {
        space.free(steps_[source].offset);
        last[source] = count;  // once, also if it is both
      }
    }
    if (last[i] < 0 && step.offset >= 0) {
      space.free(step.offset);
    }
  }
  arena_floats_ = space.largest();
}

bool Schedule::fits(const std::vector<Image>& inputs, int threads) const {
  if (threads != threads_ || inputs.size() != given_.size()) {
    return false;
  }
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const Image& image = inputs[i];
    if (!(given_[i] == Shape{image.n, image.h, image.w, image.c}) || dense_[i] != dense(image)) {
      return false;
    }
  }
  return true;
}

void Schedule::check_addresses(const Plan& plan, const std::vector<Image>& inputs,
                               const std::vector<std::byte*>& outputs) const {
  if (outputs.size() != plan.outputs_.size()) {
    throw std::invalid_argument("plan: " + std::to_string(outputs.size()) + " outputs are given, it makes " +
                                std::to_string(plan.outputs_.size()));
  }
  for (const Image& image : inputs) {
    if (image.data == nullptr && image.n != 0) {
      throw std::invalid_argument("plan: an image has the address 0");
    }
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i] == nullptr && shapes_[plan.outputs_[i]].n != 0) {
      throw std::invalid_argument("plan: an output has the address 0");
    }
  }
}

bool Schedule::run(const Plan& plan, const std::vector<Image>& inputs, const std::vector<std::byte*>& outputs,
                   float* arena, std::vector<double>* seconds) const {
  const auto kernels_of = [](const Plan::Layer& layer) -> const Kernels& {
    return *kernels_for(layer.element, layer.element);
  };
  check_addresses(plan, inputs, outputs);
  const std::size_t count = plan.layers_.size();
  std::vector<const std::byte*> at(count, nullptr);
  std::vector<std::byte*> out(count, nullptr);
  for (std::size_t i = 0; i < count; ++i) {
    out[i] = steps_[i].offset >= 0 ? reinterpret_cast<std::byte*>(arena + steps_[i].offset) : nullptr;
  }
  for (std::size_t i = 0; i < plan.outputs_.size(); ++i) {
    out[plan.outputs_[i]] = outputs[i];
  }
  Team team(threads_);
  std::size_t next_input = 0;
  bool infinite = false;
  auto began = std::chrono::steady_clock::now();
  for (std::size_t i = 0; i < count; ++i) {
    const Plan::Layer& layer = plan.layers_[i];
    const Step& step = steps_[i];
    const Shape shape = shapes_[i];
    const Index elements = shape.n * shape.h * shape.w * shape.c;
    at[i] = out[i];
    if (layer.kind == Plan::Kind::input) {
      const Image& image = inputs[next_input++];
      if (out[i] == nullptr) {
        at[i] = image.data;
      } else if (elements != 0) {
        const Copy copy{image, out[i]};
        const auto copy_row_of = layer.element == Element::float32    ? copy_row<std::uint32_t>
                                 : layer.element == Element::bfloat16 ? copy_row<std::uint16_t>
                                                                      : copy_row<std::uint8_t>;
        team.run(shape.n * shape.h, 0, copy_row_of, &copy);
      }
    } else if (elements == 0) {
      // nothing
    } else if (layer.kind == Plan::Kind::convolution) {
      const Kernels& kernels = *layer.convolution->machine().kernels;
      const std::byte* residual = layer.b < 0 ? nullptr : at[layer.b];
      if (step.algorithm == Algorithm::direct) {
        Direct direct = step.direct;
        direct.x = at[layer.a];
        direct.out = out[i];
        direct.epilogue.residual = residual;
        direct.epilogue.steps.infinite = &infinite;
        execute(team, kernels, direct, step.scratch);
      } else {
        Winograd winograd = step.winograd;
        winograd.direct.x = at[layer.a];
        winograd.direct.out = out[i];
        winograd.direct.epilogue.residual = residual;
        winograd.transformed = arena + step.temporary;
        execute(team, kernels, winograd, step.scratch);
      }
    } else if (layer.kind == Plan::Kind::max_pool) {
      Pool pool = step.pool;
      pool.x = at[layer.a];
      pool.out = out[i];
      execute(team, kernels_of(layer), pool);
    } else if (layer.kind == Plan::Kind::average) {
      const Shape from = shapes_[layer.a];
      execute_average(team, kernels_of(layer), at[layer.a], {from.n, from.h, from.w, from.c, pixels_[layer.a]}, out[i]);
    } else if (layer.kind == Plan::Kind::convert) {
      Conversion conversion = step.conversion;
      conversion.x = at[layer.a];
      if (plan.layers_[layer.a].kind == Plan::Kind::input && out[layer.a] == nullptr) {
        const Image& image = inputs[static_cast<std::size_t>(
            std::find(plan.inputs_.begin(), plan.inputs_.end(), layer.a) - plan.inputs_.begin())];
        conversion.stride_n = image.stride_n;
        conversion.stride_h = image.stride_h;
        conversion.stride_w = image.stride_w;
        conversion.stride_c = image.stride_c;
      }
      conversion.out = out[i];
      conversion.infinite = &infinite;
      execute(team, *kernels_for(plan.layers_[layer.a].element, layer.element), conversion);
    } else {
      execute_add(team, kernels_of(layer), at[layer.a], at[layer.b], out[i], elements, layer.relu);
    }
    if (seconds != nullptr) {
      const auto now = std::chrono::steady_clock::now();
      seconds->push_back(std::chrono::duration<double>(now - began).count());
      began = now;
    }
  }
  return !infinite;
}

std::vector<std::string> Schedule::algorithms() const {
  std::vector<std::string> found;
  for (const Step& step : steps_) {
    found.emplace_back(step.algorithm == Algorithm::winograd4   ? "winograd 4x4"
                       : step.algorithm == Algorithm::winograd2 ? "winograd 2x2"
                                                                : "direct");
  }
  return found;
}

Plan::~Plan() = default;

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
