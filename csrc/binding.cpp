// The Python module resnet_fast._C. It binds and checks nothing more than pointers and sizes: it includes no torch
// header, so one build serves every torch. Launchers live in csrc/kernels/, the choice between them in Python.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#ifdef RESNET_FAST_CUDA
#include "build_info.h"
#endif

namespace py = pybind11;

namespace {

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

// RESNET_FAST_ARCHS is CMake's list ("80,90a-real", its separator changed to a comma) and empty without CUDA.
py::list architectures() {
  py::list archs;
  std::istringstream list(RESNET_FAST_ARCHS);
  for (std::string arch; std::getline(list, arch, ',');) archs.append(arch);
  return archs;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
#ifdef _MSVC_LANG
  info["cxx_standard"] = _MSVC_LANG;
#else
  info["cxx_standard"] = __cplusplus;
#endif
  info["cuda"] = cuda_version();
  info["archs"] = architectures();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of resnet_fast.";
  m.def(
      "build_info", &build_info,
      "What this module was built with, as a dict: compiler (str), cxx_standard (int, as __cplusplus), cuda (the CUDA "
      "compiler's version, '' without CUDA) and archs (list of str, CUDA architectures as CMake names them).");
}
