#include "isa.h"

#include <atomic>
#include <initializer_list>

namespace mambaout_kernels::cpu {
namespace {

Isa best_isa() {
  for (const Isa isa : {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2}) {
    if (supported(isa)) return isa;
  }
  return Isa::kPortable;
}
std::atomic<Isa> g_isa{best_isa()};

}  // namespace

bool compiled(Isa isa) {
#ifdef MAMBAOUT_X86
  return isa >= Isa::kPortable && isa <= Isa::kAvx512Bf16;
#else
  return isa == Isa::kPortable;
#endif
}

bool supported(Isa isa) {
  if (!compiled(isa)) return false;
#ifdef MAMBAOUT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512 || isa == Isa::kAvx512Bf16) {
    return (isa == Isa::kAvx512 || __builtin_cpu_supports("avx512bf16")) && avx2 && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
  }
#endif
  return true;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    case Isa::kPortable: return "portable";
  }
  return "unknown";
}

Isa current_isa() { return g_isa.load(std::memory_order_relaxed); }

bool set_isa(Isa isa) {
  if (!supported(isa)) return false;
  g_isa.store(isa, std::memory_order_relaxed);
  return true;
}

}  // namespace mambaout_kernels::cpu
