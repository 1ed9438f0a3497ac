// Measures the peak multiply-adds per second of the calling thread.
#include <algorithm>
#include <chrono>

#include "../select_kernels.h"
#include "arguments.h"
#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

constexpr std::int64_t kPasses = 4096;  // between two readings of the clock: 10 us and more

}  // namespace

double fma_flops(DType compute_dtype, double seconds) {
  using Clock = std::chrono::steady_clock;
  const PeakKernel* kernel = select_kernels<PeakKernel>(compute_dtype);
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
