#include "schedule.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "execute.h"

namespace resnet_fast::cpu {
namespace {

Index aligned(Index floats) { return (floats + 31) / 32 * 32; }

bool dense(const Image& image) {
  const Index row = image.w * image.c;
  return (image.stride_c == 1 || image.c == 1) && (image.stride_w == image.c || image.w == 1) &&
         (image.stride_h == row || image.h == 1) && (image.stride_n == image.h * row || image.n == 1);
}

Index elements(const Shape& shape) { return shape.n * shape.h * shape.w * shape.c; }

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

// How a value that lies dense, or as the image does that it is, is converted.
void set_strides(Conversion& of, Index stride_n, Index stride_h, Index stride_w, Index stride_c) {
  of.stride_n = stride_n;
  of.stride_h = stride_h;
  of.stride_w = stride_w;
  of.stride_c = stride_c;
}

}  // namespace

Schedule::Schedule(const Plan& plan, const std::vector<Image>& inputs, int threads) : threads_(threads) {
  for (const Image& image : inputs) {
    given_.push_back({image.n, image.h, image.w, image.c});
    dense_.push_back(dense(image));
  }
  describe_values(plan, inputs);
  divide(plan, inputs);
  place(plan);
}

void Schedule::describe_values(const Plan& plan, const std::vector<Image>& inputs) {
  const std::vector<Shape> shapes = plan.infer(inputs);
  values_.resize(plan.layers_.size());
  for (const int value : plan.outputs_) {
    values_[value].output = true;
  }
  for (std::size_t i = 0; i < values_.size(); ++i) {
    Value& value = values_[i];
    value.shape = shapes[i];
    value.pixel = shapes[i].c;
    // Pixels of a distance that is a multiple of a page would fall on the same lines of the cache.
    const Index element = bytes_of(plan.layers_[i].element), bytes = value.pixel * element;
    if (plan.layers_[i].kind == Plan::Kind::convolution && bytes >= 512 && bytes % 512 == 0 && !value.output) {
      value.pixel += 64 / element;
    }
  }
  for (std::size_t i = values_.size(); i-- > 0;) {
    const Plan::Layer& layer = plan.layers_[i];
    if (layer.kind == Plan::Kind::add) {  // takes and gives what is dense
      for (const std::size_t value : {i, static_cast<std::size_t>(layer.a), static_cast<std::size_t>(layer.b)}) {
        values_[value].pixel = values_[value].shape.c;
      }
    }
  }
  for (std::size_t i = 0; i < values_.size(); ++i) {
    Value& value = values_[i];
    value.image_bytes = value.shape.h * value.shape.w * value.pixel * bytes_of(plan.layers_[i].element);
  }
}

void Schedule::divide(const Plan& plan, const std::vector<Image>& inputs) {
  const std::size_t count = values_.size();
  const Index images = inputs.empty() ? 0 : inputs[0].n;
  segments_.push_back({0, count, 1});
  if (images < 2 || !std::all_of(inputs.begin(), inputs.end(), [&](const Image& image) { return image.n == images; })) {
    return;
  }
  // Of the layers from here to the end, the one that needs the most memory says how many images run together: so the
  // number only grows, and weights, which are large where images are small, are not read often.
  const Index near = plan.near_ * threads_;
  std::vector<Index> together(count);
  Index least = images;
  for (std::size_t i = count; i-- > 0;) {
    const Plan::Layer& layer = plan.layers_[i];
    Index bytes = values_[i].image_bytes;
    for (const int source : {layer.a, layer.b}) {
      bytes += source < 0 ? 0 : values_[source].image_bytes;
    }
    while (least > 1 && least * bytes > near) {
      least = (least + 1) / 2;
    }
    together[i] = least;
  }
  segments_.clear();
  for (std::size_t i = 0; i < count; ++i) {
    const Index parts = (images + together[i] - 1) / together[i];
    if (segments_.empty() || segments_.back().parts != parts) {
      segments_.push_back({i, i, parts});
    }
    segments_.back().last = i + 1;
  }
}

Shape Schedule::part_of(const Shape& shape, const Segment& segment, bool larger) const {
  Shape part = shape;
  if (segment.parts > 1) {
    part.n = shape.n / segment.parts + (larger ? 1 : 0);
  }
  return part;
}

void Schedule::place(const Plan& plan) {
  const std::size_t count = values_.size();
  std::vector<std::size_t> last(count, count);    // the layer that reads a value last; count if none does
  std::vector<bool> only_converted(count, true);  // which takes any strides
  for (std::size_t i = 0; i < count; ++i) {
    for (const int source : {plan.layers_[i].a, plan.layers_[i].b}) {
      if (source >= 0) {
        last[source] = i;
        only_converted[source] = only_converted[source] && plan.layers_[i].kind == Plan::Kind::convert;
      }
    }
  }
  for (std::vector<Step>& steps : steps_) {
    steps.resize(count);
  }
  std::vector<std::size_t> end = last;  // after which a value's memory is free
  std::vector<bool> placed(count, false);
  std::size_t next_input = 0;
  for (const Segment& segment : segments_) {
    for (std::size_t i = segment.first; i < segment.last; ++i) {
      Value& value = values_[i];
      const bool read_later = last[i] != count && last[i] >= segment.last;
      value.whole = segment.parts == 1 || read_later;
      placed[i] =
          !value.output && (plan.layers_[i].kind != Plan::Kind::input || (!dense_[next_input] && !only_converted[i]));
      next_input += plan.layers_[i].kind == Plan::Kind::input ? 1 : 0;
      end[i] = last[i] == count ? i : last[i];
    }
  }
  for (const Segment& segment : segments_) {
    for (std::size_t i = 0; i < count; ++i) {  // what is there for all images is needed until the last part
      if (segment.parts > 1 && values_[i].whole && segment.first <= end[i] && end[i] < segment.last) {
        end[i] = segment.last - 1;
      }
    }
  }
  // A result is stored on its residual, if nobody reads that later: it is near, and no other memory is fetched.
  std::vector<int> under(count, -1);
  std::vector<bool> covered(count, false);
  for (std::size_t i = 0; i < count; ++i) {
    const Plan::Layer& layer = plan.layers_[i];
    if (layer.kind != Plan::Kind::convolution || layer.b < 0 || layer.b == layer.a) {
      continue;
    }
    const std::size_t residual = static_cast<std::size_t>(layer.b);
    const Value &to = values_[i], &from = values_[residual];
    if (placed[i] && placed[residual] && last[residual] == i && to.whole == from.whole && to.pixel == from.pixel &&
        layer.element == plan.layers_[residual].element && !layer.convolution->recomputes()) {
      under[i] = layer.b;
      covered[residual] = true;
    }
  }
  Space space;
  const auto take = [&](std::size_t i, Index images) {
    if (under[i] >= 0) {
      values_[i].offset = values_[under[i]].offset;
      return;
    }
    const Index floats = (images * values_[i].image_bytes + Index{sizeof(float)} - 1) / Index{sizeof(float)};
    values_[i].offset = space.take(floats);
  };
  for (const Segment& segment : segments_) {
    const bool uneven = segment.parts > 1 && values_[segment.first].shape.n % segment.parts != 0;
    for (std::size_t i = segment.first; i < segment.last; ++i) {  // not where parts before have what only they need
      if (segment.parts > 1 && placed[i] && values_[i].whole) {
        take(i, values_[i].shape.n);
      }
    }
    for (std::size_t i = segment.first; i < segment.last; ++i) {
      const Value& value = values_[i];
      const Plan::Layer& layer = plan.layers_[i];
      if (placed[i] && value.offset < 0) {
        take(i, part_of(value.shape, segment, uneven).n);
      }
      if (layer.kind != Plan::Kind::input && elements(value.shape) != 0) {
        const Shape& from = values_[layer.a].shape;
        Index temporaries[2] = {-1, -1};
        for (const bool larger : {false, true}) {
          const Shape part = part_of(from, segment, larger);
          if (larger && !uneven) {
            continue;
          }
          Step& made = steps_[larger][i];
          made = step(plan, i, part, part_of(value.shape, segment, larger));
          if (made.algorithm != Algorithm::direct && made.winograd.shared) {
            temporaries[larger] = made.temporary = space.take(winograd_transformed(made.winograd));
          }
        }
        for (const Index temporary : temporaries) {
          if (temporary >= 0) {
            space.free(temporary);
          }
        }
      }
      for (std::size_t made = 0; made <= i; ++made) {
        if (placed[made] && end[made] == i && !covered[made]) {
          space.free(values_[made].offset);
        }
      }
    }
  }
  arena_floats_ = space.largest();
}

Schedule::Step Schedule::step(const Plan& plan, std::size_t i, const Shape& from, const Shape& to) const {
  const Plan::Layer& layer = plan.layers_[i];
  const Map in{from.n, from.h, from.w, from.c, values_[layer.a].pixel};
  const Index out_pixel = values_[i].pixel;
  Step step;
  if (layer.kind == Plan::Kind::convolution) {
    const Kernels& kernels = *layer.convolution->machine().kernels;
    step.algorithm = layer.algorithm == Algorithm::automatic ? layer.convolution->choose(in.h, in.w) : layer.algorithm;
    if (step.algorithm == Algorithm::direct) {
      step.direct = layer.convolution->direct(in, threads_);
      step.scratch = direct_scratch(step.direct, kernels);
    } else {
      step.winograd = layer.convolution->winograd(step.algorithm == Algorithm::winograd4 ? 4 : 2, in, threads_);
      step.scratch = winograd_scratch(step.winograd, kernels);
    }
    Direct& direct = step.algorithm == Algorithm::direct ? step.direct : step.winograd.direct;
    direct.epilogue.relu = layer.relu;
    direct.epilogue.residual_after_relu = layer.residual_after_relu;
    direct.epilogue.residual_pixel = layer.b < 0 ? 0 : values_[layer.b].pixel;
    limit(direct.epilogue);
    direct.out_pixel = out_pixel;
  } else if (layer.kind == Plan::Kind::max_pool) {
    step.pool = Pool{nullptr, in, layer.window, to.h, to.w, nullptr, out_pixel, to.n * to.h};
  } else if (layer.kind == Plan::Kind::convert) {
    Conversion& of = step.conversion;
    of = {.n = from.n, .h = from.h, .w = from.w, .c = from.c};
    set_strides(of, from.h * from.w * in.pixel, from.w * in.pixel, in.pixel, 1);
    of.out_pixel = out_pixel;
    of.scale = layer.stored.scale;
    of.zero = layer.stored.zero;
    of.largest = layer.largest;
  }
  return step;
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
    if (outputs[i] == nullptr && values_[plan.outputs_[i]].shape.n != 0) {
      throw std::invalid_argument("plan: an output has the address 0");
    }
  }
}

// Where values lie in one run.
struct Schedule::Addresses {
  Addresses(const Schedule& of, const Plan& plan, const std::vector<Image>& inputs,
            const std::vector<std::byte*>& outputs, float* arena)
      : schedule(of), made(of.values_.size(), nullptr), given(of.values_.size(), nullptr) {
    for (std::size_t i = 0; i < made.size(); ++i) {
      const Index offset = of.values_[i].offset;
      made[i] = offset >= 0 ? reinterpret_cast<std::byte*>(arena + offset) : nullptr;
    }
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      made[plan.outputs_[i]] = outputs[i];
    }
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      given[plan.inputs_[i]] = &inputs[i];
    }
  }

  // Of image `first` and those after it; if the value is not whole, of the part that begins with it.
  std::byte* out(std::size_t value, Index first) const {
    const Value& of = schedule.values_[value];
    return made[value] == nullptr ? nullptr : made[value] + (of.whole || of.output ? first * of.image_bytes : Index{0});
  }
  const std::byte* in(std::size_t value, Index first, Index element) const {
    return made[value] != nullptr ? out(value, first) : given[value]->data + first * given[value]->stride_n * element;
  }
  // An input that is read as it was given, else nothing.
  const Image* as_given(std::size_t value) const { return made[value] == nullptr ? given[value] : nullptr; }

  const Schedule& schedule;
  std::vector<std::byte*> made;
  std::vector<const Image*> given;
};

bool Schedule::run(const Plan& plan, const std::vector<Image>& inputs, const std::vector<std::byte*>& outputs,
                   float* arena, std::vector<double>* seconds) const {
  const auto kernels_of = [](const Plan::Layer& layer) -> const Kernels& {
    return *kernels_for(layer.element, layer.element);
  };
  check_addresses(plan, inputs, outputs);
  const Addresses at(*this, plan, inputs, outputs, arena);
  Team team(threads_);
  bool infinite = false;
  const auto run_layer = [&](std::size_t i, const Segment& segment, Index first, bool larger) {
    const Plan::Layer& layer = plan.layers_[i];
    const Shape shape = part_of(values_[i].shape, segment, larger);
    std::byte* const out = at.out(i, first);
    if (elements(shape) == 0 || (layer.kind == Plan::Kind::input && out == nullptr)) {
      return;
    }
    if (layer.kind == Plan::Kind::input) {
      const Image& image = *at.given[i];
      const Index element = bytes_of(layer.element);
      Conversion copy{.x = image.data + first * image.stride_n * element};
      copy.n = shape.n;
      copy.h = shape.h;
      copy.w = shape.w;
      copy.c = shape.c;
      set_strides(copy, image.stride_n, image.stride_h, image.stride_w, image.stride_c);
      copy.out = out;
      copy.out_pixel = values_[i].pixel;
      execute(team, kernels_of(layer), copy);
      return;
    }
    const Step& step = steps_[larger][i];
    const Plan::Layer& source = plan.layers_[layer.a];
    const std::byte* x = at.in(layer.a, first, bytes_of(source.element));
    const std::byte* other = layer.b < 0 ? nullptr : at.in(layer.b, first, bytes_of(plan.layers_[layer.b].element));
    if (layer.kind == Plan::Kind::convolution) {
      const Kernels& kernels = *layer.convolution->machine().kernels;
      const auto fill = [&](Direct& direct) {
        direct.x = x;
        direct.out = out;
        direct.epilogue.residual = other;
        direct.epilogue.steps.infinite = &infinite;
      };
      if (step.algorithm == Algorithm::direct) {
        Direct direct = step.direct;
        fill(direct);
        execute(team, kernels, direct, step.scratch);
      } else {
        Winograd winograd = step.winograd;
        fill(winograd.direct);
        winograd.transformed = arena + step.temporary;
        execute(team, kernels, winograd, step.scratch);
      }
    } else if (layer.kind == Plan::Kind::max_pool) {
      Pool pool = step.pool;
      pool.x = x;
      pool.out = out;
      execute(team, kernels_of(layer), pool);
    } else if (layer.kind == Plan::Kind::average) {
      const Shape from = part_of(values_[layer.a].shape, segment, larger);
      execute_average(team, kernels_of(layer), x, {from.n, from.h, from.w, from.c, values_[layer.a].pixel}, out);
    } else if (layer.kind == Plan::Kind::convert) {
      Conversion conversion = step.conversion;
      conversion.x = x;
      if (const Image* image = at.as_given(layer.a)) {
        set_strides(conversion, image->stride_n, image->stride_h, image->stride_w, image->stride_c);
      }
      conversion.out = out;
      conversion.infinite = &infinite;
      execute(team, *kernels_for(source.element, layer.element), conversion);
    } else {
      execute_add(team, kernels_of(layer), x, other, out, elements(shape), layer.relu);
    }
  };
  if (seconds != nullptr) {
    seconds->assign(values_.size(), 0);
  }
  auto began = std::chrono::steady_clock::now();
  for (const Segment& segment : segments_) {
    const Index images = values_.empty() ? 0 : values_[0].shape.n;
    for (Index part = 0; part < segment.parts; ++part) {
      // Parts of one image more come first.
      const Index each = images / segment.parts, more = segment.parts > 1 ? images % segment.parts : 0;
      const Index first = segment.parts > 1 ? part * each + std::min(part, more) : 0;
      for (std::size_t i = segment.first; i < segment.last; ++i) {
        run_layer(i, segment, first, part < more);
        if (seconds != nullptr) {
          const auto now = std::chrono::steady_clock::now();
          (*seconds)[i] += std::chrono::duration<double>(now - began).count();
          began = now;
        }
      }
      if (infinite) {
        return false;
      }
    }
  }
  return !infinite;
}

std::vector<std::string> Schedule::algorithms() const {
  std::vector<std::string> found;
  for (const Step& step : steps_[0]) {
    found.emplace_back(step.algorithm == Algorithm::winograd4   ? "winograd 4x4"
                       : step.algorithm == Algorithm::winograd2 ? "winograd 2x2"
                                                                : "direct");
  }
  return found;
}

}  // namespace resnet_fast::cpu
