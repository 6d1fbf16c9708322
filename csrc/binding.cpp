// The Python module resnet_fast._C. It passes pointers, sizes and a stream on to the launchers and turns their errors
// into exceptions: it includes no torch header, so one build serves every torch. Arguments are checked in Python, by
// the ops; launchers live in csrc/kernels/, the choice between them in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include "compiler.h"

#ifdef RESNET_FAST_CUDA
#include "build_info.h"
#include "kernels/add_act.h"
#include "kernels/batch_norm_act.h"
#include "kernels/conv_bn_act.h"
#include "kernels/head.h"
#include "kernels/stem.h"
#endif

namespace py = pybind11;
using namespace py::literals;

namespace {

// For what launches: with a full queue it waits, possibly for another Python thread.
using without_gil = py::call_guard<py::gil_scoped_release>;

std::string cuda_version() {
#ifdef RESNET_FAST_CUDA
  return resnet_fast::cuda_compiler_version();
#else
  return "";
#endif
}

// RESNET_FAST_ARCHS is CMake's list ("80,90a", its separator changed to a comma) and empty without CUDA.
py::list architectures() {
  py::list archs;
  std::istringstream list(RESNET_FAST_ARCHS);
  for (std::string arch; std::getline(list, arch, ',');) archs.append(arch);
  return archs;
}

// Raised with every change to what the functions take or mean, as in resnet_fast/backends/cuda.py: the module in a
// checkout may be older than the Python files beside it.
constexpr int kInterface = 1;

py::dict build_info() {
  py::dict info;
  info["interface"] = kInterface;
  info["compiler"] = resnet_fast::compiler();
#ifdef _MSVC_LANG
  info["cxx_standard"] = _MSVC_LANG;
#else
  info["cxx_standard"] = __cplusplus;
#endif
  info["cuda"] = cuda_version();
  info["archs"] = architectures();
#ifdef RESNET_FAST_EMULATED
  info["emulated"] = true;  // launches run on the CPU: the tests' build
#else
  info["emulated"] = false;
#endif
  return info;
}

#ifdef RESNET_FAST_CUDA

using namespace resnet_fast;

// Becomes _C.CudaError, a RuntimeError.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// --- structs of arguments as parameters of Python functions

// Whether two tuples of references are to the same objects.
template <typename... A, typename... B>
constexpr bool same(std::tuple<A&...> a, std::tuple<B&...> b) {
  return [&]<std::size_t... I>(std::index_sequence<I...>) {
    return ((static_cast<const void*>(&std::get<I>(a)) == static_cast<const void*>(&std::get<I>(b))) && ...);
  }(std::index_sequence_for<A...>());
}

// Fields<Struct> has the names of a struct's fields and references to them. A list that is not the struct's, in its
// order, does not compile.
template <typename Struct>
struct Fields;
#define RESNET_FAST_FIELDS(Struct, ...)                       \
  template <>                                                 \
  struct Fields<Struct> : Struct {                            \
    static constexpr const char* names = #__VA_ARGS__;        \
    constexpr auto values() { return std::tie(__VA_ARGS__); } \
  };                                                          \
  static_assert([] {                                          \
    Fields<Struct> arguments{};                               \
    auto& [__VA_ARGS__] = static_cast<Struct&>(arguments);    \
    return same(std::tie(__VA_ARGS__), arguments.values());   \
  }())

RESNET_FAST_FIELDS(ConvBnAct, x, weight, scale, shift, residual, out, n, h, w, c, k, r, s, p, q, stride_h, stride_w,
                   pad_h, pad_w, dilation_h, dilation_w, groups, precision, relu, residual_after_activation, workspace);
RESNET_FAST_FIELDS(BatchNormStatistics, x, mean, invstd, running_mean, running_var, rows, c, eps, momentum, precision,
                   workspace);
RESNET_FAST_FIELDS(BatchNormApply, x, mean, invstd, gamma, beta, residual, out, rows, c, relu, precision);
RESNET_FAST_FIELDS(BatchNormReduce, grad, x, output, mean, invstd, sum_grad, sum_grad_xhat, rows, c, precision,
                   workspace);
RESNET_FAST_FIELDS(BatchNormBackward, grad, x, output, mean, invstd, gamma, sum_grad, sum_grad_xhat, grad_x,
                   grad_residual, rows, c, precision);
RESNET_FAST_FIELDS(Stem, x, stride_n, stride_c, stride_h, stride_w, bytes, normalisation, weight, scale, shift, out, n,
                   c, h, w, k, conv_h, conv_w, pooled_h, pooled_w, ceil_mode, precision);
RESNET_FAST_FIELDS(Head, x, weight, bias, out, n, pixels, c, k, precision, workspace);

template <typename T>
concept Spread = requires { Fields<std::remove_cvref_t<T>>::names; };

// Values<T>::Types is a tuple of what a C++ parameter of type T becomes in Python: the fields of a struct, else itself.
template <typename T>
struct Values {
  using Types = std::tuple<T>;
};
template <Spread T>
struct Values<T> {
  template <typename... Field>
  static std::tuple<Field...> copied(std::tuple<Field&...>);
  using Types = decltype(copied(Fields<std::remove_cvref_t<T>>().values()));
};

constexpr std::string_view kPrecisions[] = {"fp16", "bf16", "tf32", "fp32"};  // in the order of Precision

constexpr std::string_view name_of(Precision precision) { return kPrecisions[static_cast<int>(precision)]; }

// How Python passes a T: a pointer as an address, a precision by its name.
template <typename T>
using Passed = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t,
                                  std::conditional_t<std::is_same_v<T, Precision>, const std::string&, T>>;

template <typename T>
T taken(Passed<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else if constexpr (std::is_same_v<T, Precision>) {
    for (const Precision each : {Precision::fp16, Precision::bf16, Precision::tf32, Precision::fp32}) {
      if (value == name_of(each)) return each;
    }
    throw py::value_error("precision is '" + value + "'; it must be one of 'fp16', 'bf16', 'tf32', 'fp32'");
  } else {
    return value;
  }
}

// A parameter of type T, made of what Python passed from the argument `First` on.
template <typename T, std::size_t First, typename Tuple>
decltype(auto) parameter(const Tuple& passed) {
  if constexpr (Spread<T>) {
    using Types = typename Values<T>::Types;
    Fields<std::remove_cvref_t<T>> arguments;
    [fields = arguments.values(), &passed]<std::size_t... I>(std::index_sequence<I...>) {
      ((std::get<I>(fields) = taken<std::tuple_element_t<I, Types>>(std::get<First + I>(passed))), ...);
    }(std::make_index_sequence<std::tuple_size_v<Types>>());
    return arguments;
  } else {
    return taken<T>(std::get<First>(passed));
  }
}

// Defines a Python function with the parameters of `function`, a struct's fields in its place. `names` are those of the
// parameters, "*" the struct's.
template <typename Result, typename... Parameter, typename... Options>
void define(py::module_& m, const char* name, const char* doc, std::string names, Result (*function)(Parameter...),
            const Options&... options) {
  using All = decltype(std::tuple_cat(std::declval<typename Values<Parameter>::Types>()...));
  static constexpr std::array sizes{std::tuple_size_v<typename Values<Parameter>::Types>...};
  const auto spread = [&]<typename T>(std::type_identity<T>) {
    if constexpr (Spread<T>) names.replace(names.find('*'), 1, Fields<std::remove_cvref_t<T>>::names);
  };
  (spread(std::type_identity<Parameter>()), ...);
  std::array<std::string, std::tuple_size_v<All>> list;
  std::istringstream words(names);
  for (std::string& word : list) std::getline(words >> std::ws, word, ',');
  [&]<typename... Value, std::size_t... I, std::size_t... P>(std::tuple<Value...>*, std::index_sequence<I...>,
                                                             std::index_sequence<P...>) {
    const auto called = [function](Passed<Value>... value) {
      const auto passed = std::tie(value...);
      return function(
          parameter<Parameter, std::accumulate(sizes.begin(), sizes.begin() + P, std::size_t{0})>(passed)...);
    };
    m.def(name, called, doc, py::arg(list[I].c_str())..., options...);
  }(static_cast<All*>(nullptr), std::make_index_sequence<std::tuple_size_v<All>>(),
    std::index_sequence_for<Parameter...>());
}

// --- the functions

// Throws where a launch did not get onto its stream: which op, on what (a stream of values), and CUDA's own words.
template <typename... Values>
void check(cudaError_t error, std::string_view op, const Values&... what) {
  if (error == cudaSuccess) return;
  std::ostringstream message;
  message << op << " [";
  ((message << what), ...);
  message << "]: " << cudaGetErrorString(error) << " (" << cudaGetErrorName(error) << ")";
  throw CudaError(message.str());
}

const ConvBnActKernel& conv_bn_act_kernel(const std::string& name) {
  for (const ConvBnActKernel& kernel : conv_bn_act_kernels()) {
    if (kernel.name == name) return kernel;
  }
  throw py::value_error("conv_bn_act: this build has no kernel '" + name +
                        "'; conv_bn_act_kernels() lists what it has");
}

py::list list_conv_bn_act_kernels() {
  py::list kernels;
  for (const ConvBnActKernel& kernel : conv_bn_act_kernels()) {
    kernels.append(py::dict(
        "name"_a = kernel.name, "algorithm"_a = kernel.algorithm, "least_capability"_a = kernel.least_capability,
        "most_capability"_a = kernel.most_capability, "precision"_a = name_of(kernel.precision),
        "block_m"_a = kernel.block_m, "block_n"_a = kernel.block_n, "block_k"_a = kernel.block_k,
        "stages"_a = kernel.stages, "threads"_a = kernel.threads, "shared_bytes"_a = kernel.shared_bytes));
  }
  return kernels;
}

void conv_bn_act(const std::string& name, const ConvBnAct& a, cudaStream_t stream) {
  const ConvBnActKernel& kernel = conv_bn_act_kernel(name);
  if (const std::string reason = kernel.unsupported(a); !reason.empty()) {
    throw py::value_error("conv_bn_act: kernel '" + kernel.name + "' does not compute this problem: " + reason);
  }
  check(kernel.launch(a, stream), "conv_bn_act", name, ", ", name_of(a.precision), " x [", a.n, ", ", a.c, ", ", a.h,
        ", ", a.w, "], weight [", a.k, ", ", a.c / a.groups, ", ", a.r, ", ", a.s, "], stride ", a.stride_h, "x",
        a.stride_w, ", padding ", a.pad_h, "x", a.pad_w, ", dilation ", a.dilation_h, "x", a.dilation_w, ", groups ",
        a.groups);
}

void bind_conv_bn_act(py::module_& m) {
  m.def("conv_bn_act_kernels", &list_conv_bn_act_kernels,
        "Every compiled convolution kernel as a dict: name, algorithm, least_capability, most_capability, precision, "
        "block_m, block_n, block_k, stages, threads, shared_bytes.");
  define(
      m, "conv_bn_act_unsupported", "Why the kernel cannot compute the problem (shapes and pointers), '' if it can.",
      "kernel, *",
      +[](const std::string& name, const ConvBnAct& a) { return conv_bn_act_kernel(name).unsupported(a); });
  define(
      m, "conv_bn_act_workspace", "Bytes of workspace, aligned to 256, that the launch needs.", "kernel, *",
      +[](const std::string& name, const ConvBnAct& a) { return conv_bn_act_kernel(name).workspace(a); });
  define(m, "conv_bn_act", "Put the kernel on the stream of the current device.", "kernel, *, stream", &conv_bn_act,
         without_gil());
}

void bind_add_act(py::module_& m) {
  define(
      m, "add_act", "out = act(x + y) over count elements.", "x, y, out, count, precision, relu, stream",
      +[](const void* x, const void* y, void* out, std::int64_t count, Precision precision, bool relu,
          cudaStream_t stream) {
        check(add_act(x, y, out, count, precision, relu, stream), "add_act", count, " elements, ", name_of(precision));
      },
      without_gil());
  define(
      m, "add_act_backward", "out = grad where not output <= 0, else 0, over count elements.",
      "grad, output, out, count, precision, stream",
      +[](const void* grad, const void* output, void* out, std::int64_t count, Precision precision,
          cudaStream_t stream) {
        check(add_act_backward(grad, output, out, count, precision, stream), "add_act_backward", count, " elements, ",
              name_of(precision));
      },
      without_gil());
}

// A step of batch_norm_act, over [rows, c].
template <typename Arguments, cudaError_t (*launch)(const Arguments&, cudaStream_t)>
void define_step(py::module_& m, const std::string& step, const char* doc) {
  static const std::string op = "batch_norm_act " + step;
  define(
      m, ("batch_norm_act_" + step).c_str(), doc, "*, stream",
      +[](const Arguments& a, cudaStream_t stream) {
        check(launch(a, stream), op, name_of(a.precision), " x [", a.rows, ", ", a.c, "]");
      },
      without_gil());
}

void bind_batch_norm_act(py::module_& m) {
  define(m, "batch_norm_act_workspace", "Bytes of workspace, aligned to 16, that statistics and reduce need.",
         "rows, c, precision", &batch_norm_act_workspace);
  define_step<BatchNormStatistics, batch_norm_act_statistics>(
      m, "statistics", "mean and invstd of [rows, c], and the running statistics updated.");
  define_step<BatchNormApply, batch_norm_act_apply>(m, "apply",
                                                    "out = act((x - mean) * invstd * gamma + beta + residual).");
  define_step<BatchNormReduce, batch_norm_act_reduce>(
      m, "reduce", "Sums over rows of g and of g * (x - mean) * invstd, g being grad where the ReLU was open.");
  define_step<BatchNormBackward, batch_norm_act_backward>(m, "backward",
                                                          "Gradients for x and the residual from the sums.");
}

void bind_stem(py::module_& m) {
  define(m, "stem_shared_bytes",
         "Dynamic shared memory of a block of the kernel for c channels (3 or 4) and pooled_h rows (7 or 3), else 0.",
         "precision, c, pooled_h", &stem_shared_bytes);
  define(
      m, "stem", "Convolution 7x7/2 + scale, shift + ReLU + max-pool 3x3/2.", "*, stream",
      +[](const Stem& a, cudaStream_t stream) {
        check(stem(a, stream), "stem", name_of(a.precision), " x [", a.n, ", ", a.c, ", ", a.h, ", ", a.w, "], ", a.k,
              " output channels");
      },
      without_gil());
}

void bind_head(py::module_& m) {
  define(m, "head_workspace", "Bytes of workspace, aligned to 16, that the launch needs.",
         "n, pixels, c, k, precision, multiprocessors", &head_workspace);
  define(
      m, "head", "Mean over pixels, times weight, plus bias.", "*, multiprocessors, stream",
      +[](const Head& a, int multiprocessors, cudaStream_t stream) {
        check(head(a, multiprocessors, stream), "head", name_of(a.precision), " x [", a.n, ", ", a.c, ", ", a.pixels,
              " pixels], ", a.k, " outputs");
      },
      without_gil());
}

#endif  // RESNET_FAST_CUDA

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of resnet_fast. Pointers are ints, 0 for none; a launch goes onto the given stream.";
  m.def(
      "build_info", &build_info,
      "What this module was built with, as a dict: compiler (str), cxx_standard (int, as __cplusplus), cuda (the CUDA "
      "compiler's version, '' without CUDA), archs (list of str, CUDA architectures as CMake names them) and emulated "
      "(bool, whether launches run on the CPU, as in the tests' build).");
#ifdef RESNET_FAST_CUDA
  py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
  bind_conv_bn_act(m);
  bind_add_act(m);
  bind_batch_norm_act(m);
  bind_stem(m);
  bind_head(m);
#endif
}
