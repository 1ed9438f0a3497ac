// Multiply-adds on registers alone, as many independent ones as hide their latency. Needs a vec_*.h before it.
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

// Of 32 or 16 registers; latency times throughput is 8 to 12 on the processors there are.
constexpr int kPeakSums = Vec::kLanes == 16 ? 24 : 12;

inline float folded(const Vec (&sums)[kPeakSums]) {
  Vec total = sums[0];
  for (int r = 1; r < kPeakSums; ++r) total = total + sums[r];
  float lanes[Vec::kLanes];
  store(lanes, total);
  return lanes[0];
}

// The sum is what is multiplied: a product of constants would be taken out of the loop where there is no fused
// multiply-add. It tends to 2, far from what is slow or infinite.
[[gnu::noinline]] inline float peak_fp32(std::int64_t passes) {
  Vec sums[kPeakSums];
  const Vec factor = broadcast(0.5f), term = broadcast(1.0f);
#pragma GCC unroll 24
  for (int r = 0; r < kPeakSums; ++r) sums[r] = broadcast(static_cast<float>(r));
  for (std::int64_t pass = 0; pass < passes; ++pass) {
#pragma GCC unroll 24
    for (int r = 0; r < kPeakSums; ++r) sums[r] = fma(sums[r], factor, term);
  }
  return folded(sums);
}
constexpr PeakKernel kPeakFp32{kPeakSums * Vec::kLanes * 2, peak_fp32};

#ifdef __AVX512BF16__
[[gnu::noinline]] inline float peak_bf16(std::int64_t passes) {
  Vec sums[kPeakSums];
  const auto left = (__m512bh)_mm512_set1_epi32(0x3f803f80), right = (__m512bh)_mm512_set1_epi32(0x2e802e80);
#pragma GCC unroll 24
  for (int r = 0; r < kPeakSums; ++r) sums[r] = broadcast(static_cast<float>(r));
  for (std::int64_t pass = 0; pass < passes; ++pass) {
#pragma GCC unroll 24
    for (int r = 0; r < kPeakSums; ++r) sums[r].v = _mm512_dpbf16_ps(sums[r].v, left, right);
  }
  return folded(sums);
}
constexpr PeakKernel kPeakBf16{kPeakSums * Vec::kLanes * 4, peak_bf16};
#endif

}  // namespace
}  // namespace mambaout_kernels::cpu
