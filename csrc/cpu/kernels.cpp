#include "kernels.h"

#include "cpu.h"

namespace resnet_fast::cpu {

const Kernels* kernels_for(Element in, Element out) {
#ifdef RESNET_FAST_AMX
  if (isa() >= Isa::amx) {
    for (const Kernels& kernels : kernels_amx) {
      if (kernels.element == in && kernels.out_element == out) {
        return &kernels;
      }
    }
  }
#endif
  if (in == Element::uint8 || out == Element::uint8) {
#ifdef RESNET_FAST_AVX512_BF16
    if (isa() >= Isa::avx512_bf16 && in == Element::float32) {
      return &kernels_avx512_bf16[1];
    }
#endif
#ifdef RESNET_FAST_AVX512_VNNI
    if (isa() >= Isa::avx512_vnni && in != Element::bfloat16 && out != Element::bfloat16) {
      return &kernels_avx512_vnni[in == Element::float32 ? 2 : out == Element::float32 ? 1 : 0];
    }
#endif
    return nullptr;
  }
  if (in != out) {
    return nullptr;
  }
  const auto which = static_cast<std::size_t>(in);
#ifdef RESNET_FAST_AVX512_BF16
  if (isa() >= Isa::avx512_bf16 && in == Element::bfloat16) {
    return &kernels_avx512_bf16[0];
  }
#endif
#ifdef RESNET_FAST_AVX512
  if (isa() >= Isa::avx512) {
    return &kernels_avx512[which];
  }
#endif
#ifdef RESNET_FAST_AVX2
  if (isa() >= Isa::avx2) {
    return &kernels_avx2[which];
  }
#endif
  return &kernels_portable[which];
}

}  // namespace resnet_fast::cpu
