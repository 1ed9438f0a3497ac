// LayerNorm of pixels. Needs simd/loops.h before it.
#pragma once

#include "gemm/left_factor.h"

namespace mambaout_kernels::cpu {
namespace {

// to[0 .. padded) = layer_norm(from[0 .. dim)), zero beyond dim, for kCount pixels side by side, whose independent
// chains of operations hide each other's latency.
template <int kCount, typename From, typename To>
void norm_pixels(const From* from, std::int64_t from_step, std::int64_t dim, std::int64_t padded, float eps,
                 const float* weight, const float* bias, To to, std::int64_t to_step) {
  constexpr int L = Vec::kLanes;
  const auto load_all = [&](std::int64_t d, int lanes) {
    return map<kCount>([&](int i) { return load_lanes<Vec>(from + i * from_step + d, lanes); });
  };
  const auto mean_of = [&](const VecArray<Vec, kCount>& sums) {
    return map<kCount>([&](int i) { return sum_of_lanes(sums.vec[i]) / static_cast<float>(dim); });
  };
  const auto zeros = map<kCount>([](int) { return broadcast(0.0f); });
  const auto share = broadcast(1.0f / static_cast<float>(dim));  // of each channel in the mean: no sum overflows
  auto shares = zeros;
  for_each_vector<L>(dim, [&](std::int64_t d, int lanes) { shares = fma(load_all(d, lanes), share, shares); });
  const auto mean = map<kCount>([&](int i) { return broadcast(sum_of_lanes(shares.vec[i])); });
  // The rounding error of the mean, which is the mean of x - mean, is subtracted too. Otherwise a pixel of equal
  // channels, whose norm is zero, would give that error times 1 / sqrt(eps).
  auto squares = zeros, rest = zeros;
  float ones[L];
  for (int i = 0; i < L; ++i) ones[i] = 1.0f;
  for_each_vector<L>(dim, [&](std::int64_t d, int lanes) {
    const auto centred = (load_all(d, lanes) - mean) * load_lanes<Vec>(ones, lanes);
    squares = fma(centred, centred, squares);
    rest = rest + centred;
  });
  const auto offsets = mean_of(rest), means_of_squares = mean_of(squares);
  const auto off = map<kCount>([&](int i) { return broadcast(offsets.vec[i]); });
  const auto scale = map<kCount>([&](int i) {
    const float error = offsets.vec[i] * offsets.vec[i];
    // Inf - Inf would be NaN, where a variance of Inf makes the norm 0.
    const float variance = means_of_squares.vec[i] - (error > __FLT_MAX__ ? __FLT_MAX__ : error);
    return broadcast(1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + eps));
  });
  for_each_vector<L>(dim, [&](std::int64_t d, int lanes) {
    const auto normed = fma((load_all(d, lanes) - mean - off) * scale, load(weight + d), load(bias + d));
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) store_lanes(to + (i * to_step + d), normed.vec[i], lanes);
  });
  if (dim == padded) return;
  for (int i = 0; i < kCount; ++i) clear(to + (i * to_step + dim), padded - dim);
}

// Calls body(Constant<count>, index), Vec::kUnroll at a time.
template <typename Body>
inline void for_each_unrolled(std::int64_t count, const Body& body) {
  std::int64_t i = 0;
  for (; i + Vec::kUnroll <= count; i += Vec::kUnroll) body(Constant<Vec::kUnroll>{}, i);
  if constexpr (Vec::kUnroll > 1) {
    for (; i < count; ++i) body(Constant<1>{}, i);
  }
}

}  // namespace
}  // namespace mambaout_kernels::cpu
