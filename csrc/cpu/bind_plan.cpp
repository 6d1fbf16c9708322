#include "bind_plan.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "cpu.h"
#include "execute.h"
#include "plan.h"

namespace py = pybind11;
using namespace py::literals;

namespace resnet_fast::cpu {
namespace {

// What a layer reads and writes is near in this many times a core's second-level cache.
constexpr Index near_caches = 4;

using Pair = std::array<Index, 2>;
using Four = std::array<Index, 4>;

Element element_of(const std::string& dtype) {
  for (const Element element : {Element::float32, Element::bfloat16, Element::uint8}) {
    if (dtype == name_of(element)) {
      return element;
    }
  }
  throw std::invalid_argument("dtype must be float32, bfloat16 or uint8, got '" + dtype + "'");
}

Machine machine_for(const std::string& dtype, const std::string& out_dtype) {
  const Kernels* kernels = kernels_for(element_of(dtype), element_of(out_dtype.empty() ? dtype : out_dtype));
  if (kernels == nullptr) {
    throw std::invalid_argument("this instruction set has no kernels from " + dtype + " to " +
                                (out_dtype.empty() ? dtype : out_dtype));
  }
  return {kernels, static_cast<Index>(caches().l2)};
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

constexpr std::array<const char*, 4> algorithm_names{"auto", "direct", "winograd2", "winograd4"};

Algorithm algorithm_of(const std::string& name) {
  for (std::size_t i = 0; i < algorithm_names.size(); ++i) {
    if (name == algorithm_names[i]) {
      return static_cast<Algorithm>(i);
    }
  }
  throw std::invalid_argument("algorithm must be auto, direct, winograd2 or winograd4, got '" + name + "'");
}

void check_address(std::uintptr_t address, const std::string& name) {
  if (address == 0) {
    throw std::invalid_argument(name + " has the address 0");
  }
}

void check_threads(int threads) {
  if (threads < 1 || threads > 1024) {
    throw std::invalid_argument("threads must be from 1 to 1024, got " + std::to_string(threads));
  }
}

std::string text(const Pair& pair) { return "(" + std::to_string(pair[0]) + ", " + std::to_string(pair[1]) + ")"; }

Window window_of(const std::string& what, Pair kernel, Pair stride, Pair padding, Pair dilation) {
  constexpr Index most = 1 << 20;  // with which no sum of these and an image's size overflows
  const auto check = [&](const std::string& name, const Pair& pair, Index least) {
    if (std::min(pair[0], pair[1]) < least || std::max(pair[0], pair[1]) > most) {
      throw std::invalid_argument(name + " of " + what + " must be from " + std::to_string(least) + " to " +
                                  std::to_string(most) + ", got " + text(pair));
    }
  };
  check("kernel", kernel, 1);
  check("stride", stride, 1);
  check("padding", padding, 0);
  check("dilation", dilation, 1);
  return {kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
}

Window pooling_window_of(Pair kernel, Pair stride, Pair padding, Pair dilation) {
  const Window window = window_of("a pooling", kernel, stride, padding, dilation);
  for (int i = 0; i < 2; ++i) {
    if (padding[i] > (dilation[i] * (kernel[i] - 1) + 1) / 2) {
      throw std::invalid_argument("padding of a pooling must be at most half of its window, got " + text(padding));
    }
  }
  return window;
}

// (scale, zero point)
using Stored = std::pair<double, int>;

Affine affine_of(const Stored& stored) {
  if (!(stored.first > 0) || stored.second < 0 || stored.second > 255) {
    throw std::invalid_argument("scales must be positive and zero points from 0 to 255, got " +
                                std::to_string(stored.first) + " and " + std::to_string(stored.second));
  }
  return {static_cast<float>(stored.first), stored.second};
}

std::shared_ptr<Convolution> make_convolution(std::uintptr_t weight, std::uintptr_t bias, Index k, Index c,
                                              Index groups, Pair kernel, Pair stride, Pair padding, Pair dilation,
                                              const std::string& dtype,
                                              const std::vector<std::tuple<Index, Index, std::string>>& choices,
                                              const std::string& out_dtype, std::uintptr_t weight_scale, Stored x,
                                              Stored out, std::optional<Stored> residual, int largest) {
  if (k <= 0 || c <= 0 || groups <= 0 || k % groups != 0 || c % groups != 0) {
    throw std::invalid_argument("a convolution of " + std::to_string(c) + " to " + std::to_string(k) +
                                " channels cannot have " + std::to_string(groups) + " groups");
  }
  const Window window = window_of("a convolution", kernel, stride, padding, dilation);
  check_address(weight, "weight");
  check_address(bias, "bias");
  const Machine machine = machine_for(dtype, out_dtype);
  Quantization quantization{pointer<const float>(weight_scale), affine_of(x), affine_of(out), {}, false, largest};
  if (residual) {
    quantization.residual = affine_of(*residual);
    quantization.residual_stored = true;
  }
  const bool reads = machine.kernels->element == Element::uint8,
             writes = machine.kernels->out_element == Element::uint8;
  if (reads) {
    check_address(weight_scale, "weight_scale");
    constexpr Index most = 0x7fffffff / (255 * 127);  // products that are added up in 32 bits
    if (c / groups * window.r * window.s > most) {
      throw std::invalid_argument("a convolution of uint8 must sum at most " + std::to_string(most) + " products");
    }
  }
  Choices measured;
  for (const auto& [h, w, name] : choices) {
    const Algorithm algorithm = algorithm_of(name);
    if (algorithm != Algorithm::automatic) {
      measured[{h, w}] = algorithm;
    }
  }
  py::gil_scoped_release without_gil;
  return std::make_shared<Convolution>(machine, pointer<const float>(weight), pointer<const float>(bias), k, c, groups,
                                       window, std::move(measured), reads || writes ? &quantization : nullptr);
}

bool run_convolution(const Convolution& layer, std::uintptr_t x, Index n, Index h, Index w, std::uintptr_t residual,
                     std::uintptr_t out, bool relu, bool residual_after_relu, int threads, const std::string& algorithm,
                     const std::string& residual_dtype) {
  const Algorithm asked = algorithm_of(algorithm);
  if (n < 0 || h <= 0 || w <= 0 || layer.out_height(h) <= 0 || layer.out_width(w) <= 0) {
    throw std::invalid_argument("an image of " + std::to_string(h) + "x" + std::to_string(w) +
                                " pixels is too small for the convolution");
  }
  if (asked != Algorithm::automatic && asked != Algorithm::direct && !layer.winograd_possible()) {
    throw std::invalid_argument("Winograd's filtering is for 3x3 windows of stride 1 without groups");
  }
  check_threads(threads);
  const Element out_element = layer.machine().kernels->out_element;
  layer.check_residual(residual != 0, residual_dtype.empty() ? out_element : element_of(residual_dtype),
                       relu && residual_after_relu);
  if (n == 0) {
    return true;
  }
  check_address(x, "x");
  check_address(out, "out");
  Epilogue epilogue{};
  epilogue.residual = pointer<const void>(residual);
  epilogue.relu = relu;
  epilogue.residual_after_relu = residual_after_relu;
  py::gil_scoped_release without_gil;
  return execute(layer, asked, pointer<const void>(x), n, h, w, epilogue, pointer<void>(out), threads);
}

// (address, shape [n, c, h, w], strides)
using Given = std::tuple<std::uintptr_t, Four, Four>;

std::vector<Image> images_of(const std::vector<Given>& inputs) {
  std::vector<Image> images;
  for (const auto& [data, shape, strides] : inputs) {
    images.push_back({pointer<const std::byte>(data), shape[0], shape[1], shape[2], shape[3], strides[0], strides[1],
                      strides[2], strides[3]});
  }
  return images;
}

std::vector<std::byte*> pointers_of(const std::vector<std::uintptr_t>& addresses) {
  std::vector<std::byte*> found;
  for (const std::uintptr_t address : addresses) {
    found.push_back(pointer<std::byte>(address));
  }
  return found;
}

std::vector<Four> shapes_of(const Plan& plan, const std::vector<Given>& inputs) {
  std::vector<Four> found;
  for (const Shape& shape : plan.shapes(images_of(inputs))) {
    found.push_back({shape.n, shape.c, shape.h, shape.w});
  }
  return found;
}

}  // namespace

void bind_plan(py::module_& m) {
  py::class_<Convolution, std::shared_ptr<Convolution>>(
      m, "Convolution", "A convolution's folded weight and bias, packed for this machine.")
      .def(
          py::init(&make_convolution), "weight"_a, "bias"_a, "k"_a, "c"_a, "groups"_a, "kernel"_a, "stride"_a,
          "padding"_a, "dilation"_a, "dtype"_a = "float32", "choices"_a = py::tuple(), "out_dtype"_a = "",
          "weight_scale"_a = 0, "x"_a = Stored{1, 0}, "out"_a = Stored{1, 0}, "residual"_a = py::none(),
          "largest"_a = 255,
          "weight: address of [k, c / groups, r, s] float32, dense; bias: of [k]. Both are read once. dtype: of images "
          "and outputs, float32, bfloat16 or uint8; weights are rounded to it. choices: (h, w, algorithm), what "
          "computes images of this size; those that cannot compute this layer, or not exactly enough, count for "
          "nothing. out_dtype: of outputs if another. For uint8: weights are integers from -127 to 127, weight_scale "
          "the address of [k] float32; x, out and residual are (scale, zero point), residual None if there is none in "
          "uint8; largest: of stored outputs.")
      .def("run", &run_convolution, "x"_a, "n"_a, "h"_a, "w"_a, "residual"_a, "out"_a, "relu"_a,
           "residual_after_relu"_a, "threads"_a, "algorithm"_a = "auto", "residual_dtype"_a = "",
           "Compute act(conv(x) + bias + residual): x [n, h, w, c], residual (0 for none, of out's dtype or uint8) and "
           "out [n, p, q, k], dense. False if there was NaN or infinity that uint8 should have held.")
      .def(
          "shape",
          [](const Convolution& layer, Index n, Index h, Index w) {
            return Four{n, layer.out_channels(), layer.out_height(h), layer.out_width(w)};
          },
          "n"_a, "h"_a, "w"_a, "Of the output for images of this size: [n, k, p, q].")
      .def(
          "algorithm",
          [](const Convolution& layer, Index h, Index w) {
            return algorithm_names[static_cast<std::size_t>(layer.choose(h, w))];
          },
          "h"_a, "w"_a, "What computes images of this size: direct, winograd2 or winograd4.")
      .def_property_readonly("bytes", &Convolution::bytes, "Of the packed weights, those made so far.");

  py::class_<Plan>(m, "Plan", "A network as one call. Values are numbered in the order in which they are made.")
      .def(py::init([](Index near) {
             if (near < 0 || near > Index{1} << 50) {
               throw std::invalid_argument(
                   "plan: near must be bytes, at most 2^50, or 0 for what suits this machine, got " +
                   std::to_string(near));
             }
             return std::make_unique<Plan>(near == 0 ? near_caches * static_cast<Index>(caches().l2) : near);
           }),
           "near"_a = 0,
           "near: bytes of values a thread that a layer finds fast, 0 for what suits this machine. As many images of a "
           "batch run together through the first layers.")
      .def(
          "input",
          [](Plan& plan, Index channels, const std::string& dtype) { return plan.input(channels, element_of(dtype)); },
          "channels"_a, "dtype"_a = "float32")
      .def(
          "convolution",
          [](Plan& plan, int x, std::shared_ptr<Convolution> layer, int residual, bool relu, bool residual_after_relu,
             const std::string& algorithm) {
            return plan.convolution(x, std::move(layer), residual, relu, residual_after_relu, algorithm_of(algorithm));
          },
          "x"_a, "layer"_a.none(false), "residual"_a, "relu"_a, "residual_after_relu"_a, "algorithm"_a = "auto",
          "residual: a value, or -1.")
      .def(
          "max_pool",
          [](Plan& plan, int x, Pair kernel, Pair stride, Pair padding, Pair dilation, bool ceil_mode) {
            return plan.max_pool(x, pooling_window_of(kernel, stride, padding, dilation), ceil_mode);
          },
          "x"_a, "kernel"_a, "stride"_a, "padding"_a, "dilation"_a, "ceil_mode"_a)
      .def("average", &Plan::average, "x"_a, "The mean of all pixels: [n, c, 1, 1].")
      .def("add", &Plan::add, "a"_a, "b"_a, "relu"_a)
      .def(
          "quantize",
          [](Plan& plan, int x, const Stored& stored, int largest) {
            return plan.quantize(x, affine_of(stored), largest);
          },
          "x"_a, "stored"_a, "largest"_a, "From float32 to uint8.")
      .def(
          "dequantize", [](Plan& plan, int x, const Stored& stored) { return plan.dequantize(x, affine_of(stored)); },
          "x"_a, "stored"_a, "From uint8 to float32.")
      .def("output", &Plan::output, "value"_a)
      .def("shapes", &shapes_of, "inputs"_a,
           "Shapes [n, c, h, w] of the outputs for inputs (address, shape, strides); addresses are not used.")
      .def(
          "run",
          [](const Plan& plan, const std::vector<Given>& inputs, const std::vector<std::uintptr_t>& outputs,
             int threads, Index piece) {
            check_threads(threads);
            const std::vector<Image> images = images_of(inputs);
            const std::vector<std::byte*> results = pointers_of(outputs);
            py::gil_scoped_release without_gil;
            return plan.run(images, results, threads, piece);
          },
          "inputs"_a, "outputs"_a, "threads"_a, "piece"_a = 0,
          "Compute. inputs: (address, shape [n, c, h, w], strides) of their dtypes; outputs: addresses of "
          "[n, h, w, c]. False, and the outputs mean nothing, if there was NaN or infinity that uint8 should have "
          "held.")
      .def(
          "profile",
          [](const Plan& plan, const std::vector<Given>& inputs, const std::vector<std::uintptr_t>& outputs,
             int threads) {
            check_threads(threads);
            const std::vector<Image> images = images_of(inputs);
            const std::vector<std::byte*> results = pointers_of(outputs);
            py::gil_scoped_release without_gil;
            return plan.profile(images, results, threads);
          },
          "inputs"_a, "outputs"_a, "threads"_a, "As run; the seconds of each value.")
      .def(
          "algorithms",
          [](const Plan& plan, const std::vector<Given>& inputs, int threads) {
            check_threads(threads);
            return plan.algorithms(images_of(inputs), threads);
          },
          "inputs"_a, "threads"_a, "What each value is computed by, for inputs of these sizes.")
      .def_property_readonly("arena_bytes", &Plan::arena_bytes, "Memory that is kept between runs.");
}

}  // namespace resnet_fast::cpu
