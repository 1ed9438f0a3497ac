// One task of out = a * b^T with k contiguous in both factors: dot products of vectors of terms. Nothing is packed:
// weights that are used once are read once, at the speed of memory. Needs activations.h and loops.h before it.
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

// The sums of kM rows of a and kN of b, with the bias. Prefetches b `prefetch_distance` elements further on.
template <int kM, int kN, typename Element>
[[gnu::noinline]] void gemm_nt_tile(const GemmNtCall& call, std::int64_t m, std::int64_t n,
                                    std::int64_t prefetch_distance) {
  constexpr int L = Vec::kLanes;
  const float* a = call.a + m * call.lda;
  const Element* b = static_cast<const Element*>(call.b) + n * call.ldb;
  Vec sums[kM][kN];
#pragma GCC unroll 8
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kN; ++j) sums[i][j] = broadcast(0.0f);
  }
  const auto add = [&](const auto& load_at) {
    Vec right[kN];
#pragma GCC unroll 8
    for (int j = 0; j < kN; ++j) right[j] = load_at(b + j * call.ldb);
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) {
      const Vec left = load_at(a + i * call.lda);
#pragma GCC unroll 8
      for (int j = 0; j < kN; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
    }
  };
  std::int64_t k = 0;
  for (; k + L <= call.K; k += L) {
    if (k * sizeof(Element) % 64 == 0) {
#pragma GCC unroll 8
      for (int j = 0; j < kN; ++j) __builtin_prefetch(b + j * call.ldb + k + prefetch_distance, 0, 2);
    }
    add([&](const auto* from) { return load(from + k); });
  }
  const int rest = static_cast<int>(call.K - k);
  if (rest > 0) add([&](const auto* from) { return load_first(from + k, rest); });
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN; ++j) {
      const float bias = call.bias == nullptr ? 0.0f : call.bias[n + j];
      call.out[(m + i) * call.N + n + j] = sum_of_lanes(sums[i][j]) + bias;
    }
  }
}

template <int kN, typename Element>
inline void gemm_nt_rows(const GemmNtCall& call, std::int64_t n) {
  const std::int64_t prefetch_distance = n + 2 * kN <= call.N ? kN * call.ldb : 0;
  std::int64_t m = 0;
  for (; m + 4 <= call.M; m += 4) gemm_nt_tile<4, kN, Element>(call, m, n, m == 0 ? prefetch_distance : 0);
  for (; m < call.M; ++m) gemm_nt_tile<1, kN, Element>(call, m, n, m == 0 ? prefetch_distance : 0);
}

// kWide rows of b at a time: enough accumulators to hide FMA latency for a single row of a.
template <typename Element>
inline void gemm_nt_columns(const GemmNtTask& task) {
  constexpr int kWide = Vec::kLanes == 16 ? 4 : 2;
  std::int64_t n = task.n0;
  for (; n + kWide <= task.n1; n += kWide) gemm_nt_rows<kWide, Element>(*task.call, n);
  for (; n < task.n1; ++n) gemm_nt_rows<1, Element>(*task.call, n);
}

template <Act act>
void activate_columns(const GemmNtTask& task) {
  for (std::int64_t m = 0; m < task.call->M; ++m) {
    float* row = task.call->out + m * task.call->N + task.n0;
    for_each_vectors<Vec>(task.n1 - task.n0, [&](std::int64_t n, auto count, int lanes) {
      constexpr int kCount = decltype(count)::value;
      store_array(row + n, GateOf<act, float>::value(load_array<kCount, Vec>(row + n, lanes)), lanes);
    });
  }
}

inline void run_gemm_nt(const GemmNtTask& task) {
  task.call->b_dtype == DType::kBFloat16 ? gemm_nt_columns<BFloat16>(task) : gemm_nt_columns<float>(task);
  switch (task.call->act) {
    case Act::kGelu: return activate_columns<Act::kGelu>(task);
    case Act::kGeluTanh: return activate_columns<Act::kGeluTanh>(task);
    case Act::kSilu: return activate_columns<Act::kSilu>(task);
    case Act::kIdentity: return;
  }
}

}  // namespace
}  // namespace mambaout_kernels::cpu
