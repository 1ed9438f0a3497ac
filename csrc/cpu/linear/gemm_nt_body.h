// One task of a matrix product whose factors both have their terms in a row: dot products of vectors of terms. Nothing
// is brought into another order, so that weights used once are read once, as fast as memory gives them. Needs a
// vec_*.h, activations.h and kernel_body.h before it.
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

// The sums of kM rows of a and kN of b, with the bias; `ahead` elements further on in b's rows is what comes next.
template <int kM, int kN, typename Element>
[[gnu::noinline]] void dot_tile(const DotsCall& call, std::int64_t m, std::int64_t n, std::int64_t ahead) {
  constexpr int L = Vec::kLanes;
  const float* a = call.a + m * call.a_step;
  const Element* b = static_cast<const Element*>(call.b) + n * call.b_step;
  Vec sums[kM][kN];
#pragma GCC unroll 8
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kN; ++j) sums[i][j] = broadcast(0.0f);
  }
  const auto add = [&](const auto& load_at) {
    Vec right[kN];
#pragma GCC unroll 8
    for (int j = 0; j < kN; ++j) right[j] = load_at(b + j * call.b_step);
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) {
      const Vec left = load_at(a + i * call.a_step);
#pragma GCC unroll 8
      for (int j = 0; j < kN; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
    }
  };
  std::int64_t k = 0;
  for (; k + L <= call.K; k += L) {
    if (k * sizeof(Element) % 64 == 0) {
#pragma GCC unroll 8
      for (int j = 0; j < kN; ++j) __builtin_prefetch(b + j * call.b_step + k + ahead, 0, 2);
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
inline void dot_rows(const DotsCall& call, std::int64_t n) {
  const std::int64_t ahead = n + 2 * kN <= call.N ? kN * call.b_step : 0;
  std::int64_t m = 0;
  for (; m + 4 <= call.M; m += 4) dot_tile<4, kN, Element>(call, m, n, m == 0 ? ahead : 0);
  for (; m < call.M; ++m) dot_tile<1, kN, Element>(call, m, n, m == 0 ? ahead : 0);
}

// Rows of b at a time: as many sums as the multipliers have in the making, for a single row of a.
template <typename Element>
inline void dot_columns(const DotsTask& task) {
  constexpr int kWide = Vec::kLanes == 16 ? 4 : 2;
  std::int64_t n = task.n0;
  for (; n + kWide <= task.n1; n += kWide) dot_rows<kWide, Element>(*task.call, n);
  for (; n < task.n1; ++n) dot_rows<1, Element>(*task.call, n);
}

template <Act act>
void activate_columns(const DotsTask& task) {
  for (std::int64_t m = 0; m < task.call->M; ++m) {
    float* row = task.call->out + m * task.call->N + task.n0;
    for_each_vectors<Vec>(task.n1 - task.n0, [&](std::int64_t n, auto count, int lanes) {
      constexpr int kCount = decltype(count)::value;
      store_several(row + n, GateOf<act, float>::value(load_several<kCount, Vec>(row + n, lanes)), lanes);
    });
  }
}

inline void run_dots(const DotsTask& task) {
  task.call->b_dtype == DType::kBFloat16 ? dot_columns<BFloat16>(task) : dot_columns<float>(task);
  switch (task.call->act) {
    case Act::kGelu: return activate_columns<Act::kGelu>(task);
    case Act::kGeluTanh: return activate_columns<Act::kGeluTanh>(task);
    case Act::kSilu: return activate_columns<Act::kSilu>(task);
    case Act::kIdentity: return;
  }
}

}  // namespace
}  // namespace mambaout_kernels::cpu
