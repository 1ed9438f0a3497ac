// The launch interface of the matrix products of training: plain data, no torch.
#pragma once

#include <cstdint>

namespace mambaout_kernels {

// out[m][n] = bias[n] + sum_k a(m, k) * b(k, n), fp32;   row_sums[m] = sum_k a(m, k)
struct MatmulCall {
  std::int64_t M, N, K;
  // Elements from one index to the next; one of each pair is 1.
  const float* a;
  std::int64_t a_m, a_k;
  const float* b;
  std::int64_t b_k, b_n;
  const float* bias;  // [N], or null
  float* out;         // [M][N]
  float* row_sums;    // [M], or null; a_m is 1
};

}  // namespace mambaout_kernels
