// Sums of the rows of a turned factor, beside its product. Needs simd/loops.h before it.
#pragma once

#include "arguments.h"

namespace mambaout_kernels::cpu {
namespace {

// Adds terms [k0, k0 + depth) of a's rows m0 and on, m contiguous in a.
inline void add_row_sums(const MatmulCall& call, std::int64_t m0, std::int64_t rows, std::int64_t k0,
                         std::int64_t depth, double* row_sums) {
  constexpr int L = Vec::kLanes;
  constexpr std::int64_t kRowSumDepth = 16;  // terms that are added in fp32
  for (std::int64_t m = 0; m < rows; m += L) {
    const int count = static_cast<int>(min(L, rows - m));
    for (std::int64_t k1 = 0; k1 < depth; k1 += kRowSumDepth) {
      Vec sum = broadcast(0.0f);
      for (std::int64_t k = k1; k < min(depth, k1 + kRowSumDepth); ++k) {
        sum = sum + load_first(call.a + m0 + m + (k0 + k) * call.a_k, count);
      }
      float lanes[L];
      store(lanes, sum);
      for (int i = 0; i < count; ++i) row_sums[m + i] += lanes[i];
    }
  }
}

}  // namespace
}  // namespace mambaout_kernels::cpu
