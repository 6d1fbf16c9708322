// The Python module resnet_fast._cpu, the CPU engine. It takes pointers, sizes and strides: it includes no torch
// header, so one build serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "compiler.h"
#include "cpu/bind_plan.h"
#include "cpu/cpu.h"

namespace py = pybind11;
using namespace py::literals;
namespace cpu = resnet_fast::cpu;

namespace {

// Raised with every change to what the functions take or mean, as in resnet_fast/backends/cpu.py: the module in a
// checkout may be older than the Python files beside it.
constexpr int kInterface = 5;

py::list names_of(std::span<const cpu::Isa> isas) {
  py::list names;
  for (const cpu::Isa isa : isas) names.append(cpu::name_of(isa));
  return names;
}

py::dict build_info() {
  return py::dict("interface"_a = kInterface, "compiler"_a = resnet_fast::compiler(), "cxx_standard"_a = __cplusplus,
                  "isas"_a = names_of(cpu::compiled()), "sanitizer"_a = RESNET_FAST_SANITIZE);
}

constexpr struct {
  const char* name;
  bool cpu::Features::* field;
} kFeatures[] = {
    {"avx2", &cpu::Features::avx2},
    {"fma", &cpu::Features::fma},
    {"f16c", &cpu::Features::f16c},
    {"avx_vnni", &cpu::Features::avx_vnni},
    {"avx512", &cpu::Features::avx512},
    {"avx512_bf16", &cpu::Features::avx512_bf16},
    {"avx512_vnni", &cpu::Features::avx512_vnni},
    {"amx_bf16", &cpu::Features::amx_bf16},
    {"amx_int8", &cpu::Features::amx_int8},
};

py::dict features(bool of_machine) {
  const cpu::Features& found = of_machine ? cpu::machine_features() : cpu::features();
  py::dict named;
  for (const auto& [name, field] : kFeatures) named[name] = found.*field;
  return named;
}

py::dict caches() {
  const cpu::Caches& found = cpu::caches();
  return py::dict("l1d"_a = found.l1d, "l2"_a = found.l2, "l3"_a = found.l3, "l3_threads"_a = found.l3_threads);
}

// For the tests of the dispatcher, which have one machine only.
std::string choose_isa(const py::dict& given, const std::string& wanted) {
  cpu::Features pretended;
  for (const auto& [name, field] : kFeatures) {
    if (given.contains(name)) pretended.*field = given[name].cast<bool>();
  }
  return std::string(cpu::name_of(cpu::choose(pretended, cpu::compiled(), wanted)));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The CPU engine of resnet_fast. Pointers are ints, 0 for none.";
  m.def("build_info", &build_info,
        "What this module was built with, as a dict: interface (int), compiler (str), cxx_standard (int, as "
        "__cplusplus), isas (list of str, the instruction sets, lowest first) and sanitizer (str, '' for none).");
  m.def(
      "features", &features, "of_machine"_a = false,
      "Instructions that may be used here, as a dict of bool; of_machine: those that RESNET_FAST_ISA rules out, too.");
  m.def(
      "isa", [] { return std::string(cpu::name_of(cpu::isa())); },
      "The instruction set that runs, one of build_info()'s isas. The environment variable RESNET_FAST_ISA, read "
      "once, may lower it; ValueError if it names one that is not there.");
  m.def("choose_isa", &choose_isa, "features"_a, "wanted"_a = "",
        "The instruction set that would run on a machine with these features and this RESNET_FAST_ISA.");
  m.def("caches", &caches, "Bytes of the caches of a core: l1d, l2, l3; l3_threads share the last. 0 for none.");
  m.def("processor", &cpu::processor, "What the processor calls itself, '' if it does not say.");
  cpu::bind_plan(m);
}
