// The Python module resnet_fast._C. It passes pointers, sizes and a stream on to the launchers and turns their errors
// into exceptions: it includes no torch header, so one build serves every torch. Arguments are checked in Python, by
// the ops; launchers live in csrc/kernels/, the choice between them in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#ifdef RESNET_FAST_CUDA
#include "build_info.h"
#include "kernels/add_act.h"
#include "kernels/batch_norm_act.h"
#include "kernels/conv_bn_act.h"
#include "kernels/head.h"
#include "kernels/stem.h"
#endif

namespace py = pybind11;

namespace {

// For what launches: with a full queue it waits, possibly for another Python thread.
using without_gil = py::call_guard<py::gil_scoped_release>;

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#elif defined(__GNUC__)
  return "GNU " __VERSION__;
#elif defined(_MSC_VER)
  return "MSVC " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

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
  info["compiler"] = compiler();
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

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Precision precision_of(const std::string& name) {
  if (name == "fp16") return Precision::fp16;
  if (name == "bf16") return Precision::bf16;
  if (name == "tf32") return Precision::tf32;
  if (name == "fp32") return Precision::fp32;
  throw py::value_error("precision is '" + name + "'; it must be one of 'fp16', 'bf16', 'tf32', 'fp32'");
}

// Throws where a launch did not get onto its stream: which op, on what (a stream of values), and CUDA's own words.
template <typename... Values>
void check(cudaError_t error, const char* op, const Values&... what) {
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
    static const char* const names[] = {"fp16", "bf16", "tf32", "fp32"};
    py::dict entry;
    entry["name"] = kernel.name;
    entry["algorithm"] = kernel.algorithm;
    entry["least_capability"] = kernel.least_capability;
    entry["most_capability"] = kernel.most_capability;
    entry["precision"] = names[static_cast<int>(kernel.precision)];
    entry["block_m"] = kernel.block_m;
    entry["block_n"] = kernel.block_n;
    entry["block_k"] = kernel.block_k;
    entry["stages"] = kernel.stages;
    entry["threads"] = kernel.threads;
    entry["shared_bytes"] = kernel.shared_bytes;
    kernels.append(entry);
  }
  return kernels;
}

// The three functions of a convolution take the same arguments, and begin with the same struct made of them.
#define RESNET_FAST_CONV_PARAMETERS                                                                                    \
  const std::string &kernel, Address x, Address weight, Address scale, Address shift, Address residual, Address out,   \
      int n, int h, int w, int c, int k, int r, int s, int p, int q, int stride_h, int stride_w, int pad_h, int pad_w, \
      int dilation_h, int dilation_w, int groups, const std::string &precision, bool relu,                             \
      bool residual_after_activation, Address workspace
#define RESNET_FAST_CONV_STRUCT                                                                                    \
  const ConvBnAct problem {                                                                                        \
    pointer<const void>(x), pointer<const void>(weight), pointer<const float>(scale), pointer<const float>(shift), \
        pointer<const void>(residual), pointer<void>(out), n, h, w, c, k, r, s, p, q, stride_h, stride_w, pad_h,   \
        pad_w, dilation_h, dilation_w, groups, precision_of(precision), relu, residual_after_activation,           \
        pointer<void>(workspace)                                                                                   \
  }

std::string conv_bn_act_unsupported(RESNET_FAST_CONV_PARAMETERS) {
  RESNET_FAST_CONV_STRUCT;
  return conv_bn_act_kernel(kernel).unsupported(problem);
}

std::size_t conv_bn_act_workspace(RESNET_FAST_CONV_PARAMETERS) {
  RESNET_FAST_CONV_STRUCT;
  return conv_bn_act_kernel(kernel).workspace(problem);
}

void conv_bn_act(RESNET_FAST_CONV_PARAMETERS, Address stream) {
  RESNET_FAST_CONV_STRUCT;
  const ConvBnActKernel& chosen = conv_bn_act_kernel(kernel);
  if (const std::string reason = chosen.unsupported(problem); !reason.empty()) {
    throw py::value_error("conv_bn_act: kernel '" + kernel + "' does not compute this problem: " + reason);
  }
  check(chosen.launch(problem, pointer<CUstream_st>(stream)), "conv_bn_act", kernel, ", ", precision, " x [", n, ", ",
        c, ", ", h, ", ", w, "], weight [", k, ", ", c / groups, ", ", r, ", ", s, "], stride ", stride_h, "x",
        stride_w, ", padding ", pad_h, "x", pad_w, ", dilation ", dilation_h, "x", dilation_w, ", groups ", groups);
}

void bind_conv_bn_act(py::module_& m) {
  const auto define = [&m](const char* name, auto function, const char* doc, auto... last) {
    m.def(name, function, doc, py::arg("kernel"), py::arg("x"), py::arg("weight"), py::arg("scale"), py::arg("shift"),
          py::arg("residual"), py::arg("out"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c"), py::arg("k"),
          py::arg("r"), py::arg("s"), py::arg("p"), py::arg("q"), py::arg("stride_h"), py::arg("stride_w"),
          py::arg("pad_h"), py::arg("pad_w"), py::arg("dilation_h"), py::arg("dilation_w"), py::arg("groups"),
          py::arg("precision"), py::arg("relu"), py::arg("residual_after_activation"), py::arg("workspace"), last...);
  };
  m.def("conv_bn_act_kernels", &list_conv_bn_act_kernels,
        "Every compiled convolution kernel as a dict: name, algorithm, least_capability, most_capability, precision, "
        "block_m, block_n, block_k, stages, threads, shared_bytes.");
  define("conv_bn_act_unsupported", &conv_bn_act_unsupported,
         "Why the kernel cannot compute the problem (shapes and pointers), '' if it can.");
  define("conv_bn_act_workspace", &conv_bn_act_workspace, "Bytes of workspace, aligned to 256, that the launch needs.");
  define("conv_bn_act", &conv_bn_act, "Put the kernel on the stream of the current device.", py::arg("stream"),
         without_gil());
}

void bind_add_act(py::module_& m) {
  m.def(
      "add_act",
      [](Address x, Address y, Address out, std::int64_t count, const std::string& precision, bool relu,
         Address stream) {
        check(add_act(pointer<const void>(x), pointer<const void>(y), pointer<void>(out), count,
                      precision_of(precision), relu, pointer<CUstream_st>(stream)),
              "add_act", count, " elements, ", precision);
      },
      "out = act(x + y) over count elements.", py::arg("x"), py::arg("y"), py::arg("out"), py::arg("count"),
      py::arg("precision"), py::arg("relu"), py::arg("stream"), without_gil());
  m.def(
      "add_act_backward",
      [](Address grad, Address output, Address out, std::int64_t count, const std::string& precision, Address stream) {
        check(add_act_backward(pointer<const void>(grad), pointer<const void>(output), pointer<void>(out), count,
                               precision_of(precision), pointer<CUstream_st>(stream)),
              "add_act_backward", count, " elements, ", precision);
      },
      "out = grad where not output <= 0, else 0, over count elements.", py::arg("grad"), py::arg("output"),
      py::arg("out"), py::arg("count"), py::arg("precision"), py::arg("stream"), without_gil());
}

void bind_batch_norm_act(py::module_& m) {
  m.def(
      "batch_norm_act_workspace",
      [](std::int64_t rows, int c, const std::string& precision) {
        return batch_norm_act_workspace(rows, c, precision_of(precision));
      },
      "Bytes of workspace, aligned to 16, that statistics and reduce need.", py::arg("rows"), py::arg("c"),
      py::arg("precision"));
  m.def(
      "batch_norm_act_statistics",
      [](Address x, Address mean, Address invstd, Address running_mean, Address running_var, std::int64_t rows, int c,
         float eps, float momentum, const std::string& precision, Address workspace, Address stream) {
        const BatchNormStatistics arguments{pointer<const void>(x),
                                            pointer<float>(mean),
                                            pointer<float>(invstd),
                                            pointer<float>(running_mean),
                                            pointer<float>(running_var),
                                            rows,
                                            c,
                                            eps,
                                            momentum,
                                            precision_of(precision),
                                            pointer<void>(workspace)};
        check(batch_norm_act_statistics(arguments, pointer<CUstream_st>(stream)), "batch_norm_act statistics",
              precision, " x [", rows, ", ", c, "]");
      },
      "mean and invstd of [rows, c], and the running statistics updated.", py::arg("x"), py::arg("mean"),
      py::arg("invstd"), py::arg("running_mean"), py::arg("running_var"), py::arg("rows"), py::arg("c"), py::arg("eps"),
      py::arg("momentum"), py::arg("precision"), py::arg("workspace"), py::arg("stream"), without_gil());
  m.def(
      "batch_norm_act_apply",
      [](Address x, Address mean, Address invstd, Address gamma, Address beta, Address residual, Address out,
         std::int64_t rows, int c, bool relu, const std::string& precision, Address stream) {
        const BatchNormApply arguments{pointer<const void>(x),
                                       pointer<const float>(mean),
                                       pointer<const float>(invstd),
                                       pointer<const float>(gamma),
                                       pointer<const float>(beta),
                                       pointer<const void>(residual),
                                       pointer<void>(out),
                                       rows,
                                       c,
                                       relu,
                                       precision_of(precision)};
        check(batch_norm_act_apply(arguments, pointer<CUstream_st>(stream)), "batch_norm_act apply", precision, " x [",
              rows, ", ", c, "]");
      },
      "out = act((x - mean) * invstd * gamma + beta + residual).", py::arg("x"), py::arg("mean"), py::arg("invstd"),
      py::arg("gamma"), py::arg("beta"), py::arg("residual"), py::arg("out"), py::arg("rows"), py::arg("c"),
      py::arg("relu"), py::arg("precision"), py::arg("stream"), without_gil());
  m.def(
      "batch_norm_act_reduce",
      [](Address grad, Address x, Address output, Address mean, Address invstd, Address sum_grad, Address sum_grad_xhat,
         std::int64_t rows, int c, const std::string& precision, Address workspace, Address stream) {
        const BatchNormReduce arguments{pointer<const void>(grad),
                                        pointer<const void>(x),
                                        pointer<const void>(output),
                                        pointer<const float>(mean),
                                        pointer<const float>(invstd),
                                        pointer<float>(sum_grad),
                                        pointer<float>(sum_grad_xhat),
                                        rows,
                                        c,
                                        precision_of(precision),
                                        pointer<void>(workspace)};
        check(batch_norm_act_reduce(arguments, pointer<CUstream_st>(stream)), "batch_norm_act reduce", precision,
              " x [", rows, ", ", c, "]");
      },
      "Sums over rows of g and of g * (x - mean) * invstd, g being grad where the ReLU was open.", py::arg("grad"),
      py::arg("x"), py::arg("output"), py::arg("mean"), py::arg("invstd"), py::arg("sum_grad"),
      py::arg("sum_grad_xhat"), py::arg("rows"), py::arg("c"), py::arg("precision"), py::arg("workspace"),
      py::arg("stream"), without_gil());
  m.def(
      "batch_norm_act_backward",
      [](Address grad, Address x, Address output, Address mean, Address invstd, Address gamma, Address sum_grad,
         Address sum_grad_xhat, Address grad_x, Address grad_residual, std::int64_t rows, int c,
         const std::string& precision, Address stream) {
        const BatchNormBackward arguments{pointer<const void>(grad),
                                          pointer<const void>(x),
                                          pointer<const void>(output),
                                          pointer<const float>(mean),
                                          pointer<const float>(invstd),
                                          pointer<const float>(gamma),
                                          pointer<const float>(sum_grad),
                                          pointer<const float>(sum_grad_xhat),
                                          pointer<void>(grad_x),
                                          pointer<void>(grad_residual),
                                          rows,
                                          c,
                                          precision_of(precision)};
        check(batch_norm_act_backward(arguments, pointer<CUstream_st>(stream)), "batch_norm_act backward", precision,
              " x [", rows, ", ", c, "]");
      },
      "Gradients for x and the residual from the sums.", py::arg("grad"), py::arg("x"), py::arg("output"),
      py::arg("mean"), py::arg("invstd"), py::arg("gamma"), py::arg("sum_grad"), py::arg("sum_grad_xhat"),
      py::arg("grad_x"), py::arg("grad_residual"), py::arg("rows"), py::arg("c"), py::arg("precision"),
      py::arg("stream"), without_gil());
}

void bind_stem(py::module_& m) {
  m.def(
      "stem_shared_bytes",
      [](const std::string& precision, int c, int pooled_h) {
        return stem_shared_bytes(precision_of(precision), c, pooled_h);
      },
      "Dynamic shared memory of a block of the kernel for c channels (3 or 4) and pooled_h rows (7 or 3), else 0.",
      py::arg("precision"), py::arg("c"), py::arg("pooled_h"));
  m.def(
      "stem",
      [](Address x, std::int64_t stride_n, std::int64_t stride_c, std::int64_t stride_h, std::int64_t stride_w,
         bool bytes, Address normalisation, Address weight, Address scale, Address shift, Address out, int n, int c,
         int h, int w, int k, int conv_h, int conv_w, int pooled_h, int pooled_w, bool ceil_mode,
         const std::string& precision, Address stream) {
        const Stem arguments{pointer<const void>(x),
                             stride_n,
                             stride_c,
                             stride_h,
                             stride_w,
                             bytes,
                             pointer<const float>(normalisation),
                             pointer<const void>(weight),
                             pointer<const float>(scale),
                             pointer<const float>(shift),
                             pointer<void>(out),
                             n,
                             c,
                             h,
                             w,
                             k,
                             conv_h,
                             conv_w,
                             pooled_h,
                             pooled_w,
                             ceil_mode,
                             precision_of(precision)};
        check(stem(arguments, pointer<CUstream_st>(stream)), "stem", precision, " x [", n, ", ", c, ", ", h, ", ", w,
              "], ", k, " output channels");
      },
      "Convolution 7x7/2 + scale, shift + ReLU + max-pool 3x3/2.", py::arg("x"), py::arg("stride_n"),
      py::arg("stride_c"), py::arg("stride_h"), py::arg("stride_w"), py::arg("bytes"), py::arg("normalisation"),
      py::arg("weight"), py::arg("scale"), py::arg("shift"), py::arg("out"), py::arg("n"), py::arg("c"), py::arg("h"),
      py::arg("w"), py::arg("k"), py::arg("conv_h"), py::arg("conv_w"), py::arg("pooled_h"), py::arg("pooled_w"),
      py::arg("ceil_mode"), py::arg("precision"), py::arg("stream"), without_gil());
}

void bind_head(py::module_& m) {
  m.def(
      "head_workspace",
      [](int n, int pixels, int c, int k, const std::string& precision, int multiprocessors) {
        return head_workspace(n, pixels, c, k, precision_of(precision), multiprocessors);
      },
      "Bytes of workspace, aligned to 16, that the launch needs.", py::arg("n"), py::arg("pixels"), py::arg("c"),
      py::arg("k"), py::arg("precision"), py::arg("multiprocessors"));
  m.def(
      "head",
      [](Address x, Address weight, Address bias, Address out, int n, int pixels, int c, int k,
         const std::string& precision, Address workspace, int multiprocessors, Address stream) {
        const Head arguments{pointer<const void>(x),
                             pointer<const void>(weight),
                             pointer<const float>(bias),
                             pointer<void>(out),
                             n,
                             pixels,
                             c,
                             k,
                             precision_of(precision),
                             pointer<void>(workspace)};
        check(head(arguments, multiprocessors, pointer<CUstream_st>(stream)), "head", precision, " x [", n, ", ", c,
              ", ", pixels, " pixels], ", k, " outputs");
      },
      "Mean over pixels, times weight, plus bias.", py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"),
      py::arg("n"), py::arg("pixels"), py::arg("c"), py::arg("k"), py::arg("precision"), py::arg("workspace"),
      py::arg("multiprocessors"), py::arg("stream"), without_gil());
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
