// The choice of an instruction set: for the dispatchers only.
#pragma once

#include "isa.h"

namespace mambaout_kernels::cpu {

// What the best instruction set offers for these dtypes, from the one in use downwards. Every table of kernels has a
// function for each, defined in kernels_<isa>.cpp, which returns null where that one has nothing of its own. Null if
// none has.
template <typename Kernels, typename... DTypes>
const Kernels* select_kernels(DTypes... dtypes) {
  const Kernels* kernels = nullptr;
  [[maybe_unused]] const Isa isa = current_isa();
#if defined(MAMBAOUT_X86) || defined(MAMBAOUT_EMULATED_AMX)
  if (isa == Isa::kAmxBf16) kernels = Kernels::amx_bf16(dtypes...);
#endif
#if defined(MAMBAOUT_X86)
  if (isa == Isa::kAvx512Bf16) kernels = Kernels::avx512_bf16(dtypes...);
  if (kernels == nullptr && isa >= Isa::kAvx512) kernels = Kernels::avx512(dtypes...);
  if (kernels == nullptr && isa >= Isa::kAvx2) kernels = Kernels::avx2(dtypes...);
#endif
  return kernels != nullptr ? kernels : Kernels::portable(dtypes...);
}

}  // namespace mambaout_kernels::cpu
