// One task of a matrix product whose factors both have their terms in a row: dot products of vectors of terms. Nothing
// is brought into another order, so that weights used once are read once, as fast as memory gives them. Needs a vec_*.h
// before it.
#pragma once

#include "matmul_kernels.h"

namespace mambaout_kernels::cpu {
namespace {

// out[m][n] for kM rows of a and kN of b; `ahead` elements further on in b's rows is what comes next.
template <int kM, int kN>
[[gnu::noinline]] void dot_tile(const MatmulCall& call, std::int64_t m, std::int64_t n, std::int64_t ahead) {
  constexpr int L = Vec::kLanes;
  const float *a = call.a + m * call.a_m, *b = call.b + n * call.b_n;
  Vec sums[kM][kN];
#pragma GCC unroll 8
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kN; ++j) sums[i][j] = broadcast(0.0f);
  }
  const auto add = [&](const auto& load_at) {
    Vec right[kN];
#pragma GCC unroll 8
    for (int j = 0; j < kN; ++j) right[j] = load_at(b + j * call.b_n);
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) {
      const Vec left = load_at(a + i * call.a_m);
#pragma GCC unroll 8
      for (int j = 0; j < kN; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
    }
  };
  std::int64_t k = 0;
  for (; k + L <= call.K; k += L) {
    if (k * sizeof(float) % 64 == 0) {
#pragma GCC unroll 8
      for (int j = 0; j < kN; ++j) __builtin_prefetch(b + j * call.b_n + k + ahead, 0, 2);
    }
    add([&](const float* from) { return load(from + k); });
  }
  const int rest = static_cast<int>(call.K - k);
  if (rest > 0) add([&](const float* from) { return load_first(from + k, rest); });
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN; ++j) {
      const float bias = call.bias == nullptr ? 0.0f : call.bias[n + j];
      call.out[(m + i) * call.N + n + j] = sum_of_lanes(sums[i][j]) + bias;
    }
  }
}

template <int kN>
inline void dot_rows(const MatmulTask& task, std::int64_t n) {
  const MatmulCall& call = *task.call;
  const std::int64_t ahead = n + 2 * kN <= call.N ? kN * call.b_n : 0;
  std::int64_t m = task.m0;
  for (; m + 4 <= task.m1; m += 4) dot_tile<4, kN>(call, m, n, m == task.m0 ? ahead : 0);
  for (; m < task.m1; ++m) dot_tile<1, kN>(call, m, n, m == task.m0 ? ahead : 0);
}

// Rows of b at a time: as many sums as the multipliers have in the making, for a single row of a.
inline void run_dots(const MatmulTask& task) {
  constexpr int kWide = Vec::kLanes == 16 ? 4 : 2;
  std::int64_t n = task.n0;
  for (; n + kWide <= task.n1; n += kWide) dot_rows<kWide>(task, n);
  for (; n < task.n1; ++n) dot_rows<1>(task, n);
}

}  // namespace
}  // namespace mambaout_kernels::cpu
