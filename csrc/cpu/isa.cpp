#include "isa.h"

#include <atomic>
#include <initializer_list>

#if defined(MAMBAOUT_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace mambaout_kernels::cpu {
namespace {

enum class Amx { kGranted, kNotInProcessor, kRefused };

#if defined(MAMBAOUT_X86)
// Linux grants the memory for tiles to a process that asks before it uses them, and refuses where a signal stack is too
// small for them; forked processes have what their parent was granted.
Amx request_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0) {
    return Amx::kNotInProcessor;
  }
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? Amx::kGranted : Amx::kRefused;
#else
  return Amx::kRefused;
#endif
}
#else
Amx request_amx() { return Amx::kNotInProcessor; }
#endif

Amx amx() {
  static const Amx answer = request_amx();
  return answer;
}

// vdpbf16ps: on Zen twice the rate of FMAs, on Intel's processors half of it.
bool fast_bf16_pairs() {
#if defined(MAMBAOUT_X86)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

Isa best_isa() {
  if (supported(Isa::kAmxBf16)) return Isa::kAmxBf16;
  if (supported(Isa::kAvx512Bf16) && fast_bf16_pairs()) return Isa::kAvx512Bf16;
  for (const Isa isa : {Isa::kAvx512, Isa::kAvx2}) {
    if (supported(isa)) return isa;
  }
  return Isa::kPortable;
}

const char* reason_of(Isa best) {
  if (best == Isa::kAmxBf16) return "";
  if (amx() == Amx::kRefused) return "the system does not let this process use AMX";
  if (best == Isa::kAvx512 && supported(Isa::kAvx512Bf16)) {
    return "on this processor avx512_bf16 multiplies at half the rate of fp32";
  }
  return "the processor has no better";
}

const Isa g_best = best_isa();
std::atomic<Isa> g_isa{g_best};

}  // namespace

bool compiled(Isa isa) {
  if (isa == Isa::kPortable) return true;
#if defined(MAMBAOUT_EMULATED_AMX)
  if (isa == Isa::kAmxBf16) return true;
#endif
#if defined(MAMBAOUT_X86)
  return isa > Isa::kPortable && isa <= Isa::kAmxBf16;
#else
  return false;
#endif
}

bool supported(Isa isa) {
  if (!compiled(isa)) return false;
#if defined(MAMBAOUT_X86)
  __builtin_cpu_init();
  if (isa == Isa::kPortable) return true;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return false;
  if (isa == Isa::kAvx2) return true;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return false;
  }
  if (isa == Isa::kAvx512) return true;
  if (!__builtin_cpu_supports("avx512bf16")) return false;
  return isa == Isa::kAvx512Bf16 || amx() == Amx::kGranted;
#else
  return true;
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmxBf16: return "amx_bf16";
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

const char* isa_reason() { return reason_of(g_best); }

}  // namespace mambaout_kernels::cpu
