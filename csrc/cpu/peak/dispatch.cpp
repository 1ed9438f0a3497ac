// How many multiply-adds the calling thread does in a second.
#include <algorithm>
#include <chrono>

#include "../select_kernels.h"
#include "arguments.h"
#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

constexpr std::int64_t kPasses = 4096;  // between two looks at the clock: 10 us and more

}  // namespace

double fma_flops(DType multiplied, double seconds) {
  using Clock = std::chrono::steady_clock;
  const PeakKernel* kernel = select_kernels<PeakKernel>(multiplied);
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
