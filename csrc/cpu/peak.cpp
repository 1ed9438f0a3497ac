// How many multiply-adds the calling thread does in a second.
#include <algorithm>
#include <chrono>

#include "gated_cnn_block_cpu.h"
#include "peak_kernels.h"

namespace mambaout_kernels::cpu {
namespace {

constexpr std::int64_t kPasses = 4096;  // between two looks at the clock: 10 us and more

const PeakKernel* kernel_of(DType multiplied) {
#ifdef MAMBAOUT_X86
  const Isa isa = current_isa();
  if (isa == Isa::kAvx512Bf16) {
    const PeakKernel* kernel = peak_avx512_bf16(multiplied);
    return kernel != nullptr ? kernel : peak_avx512(multiplied);
  }
  if (isa == Isa::kAvx512) return peak_avx512(multiplied);
  if (isa == Isa::kAvx2) return peak_avx2(multiplied);
#endif
  return peak_portable(multiplied);
}

}  // namespace

double fma_flops(DType multiplied, double seconds) {
  using Clock = std::chrono::steady_clock;
  const PeakKernel* kernel = kernel_of(multiplied);
  if (kernel == nullptr) return 0.0;
  volatile float result = kernel->run(kPasses);  // the clock rate rises, and pages are there, before time counts
  const auto start = Clock::now();
  double passed = 0.0;
  std::int64_t passes = 0;
  do {
    result = kernel->run(kPasses);
    passes += kPasses;
    passed = std::chrono::duration<double>(Clock::now() - start).count();
  } while (passed < seconds);
  static_cast<void>(result);
  return static_cast<double>(passes) * static_cast<double>(kernel->flops) / passed;
}

}  // namespace mambaout_kernels::cpu
