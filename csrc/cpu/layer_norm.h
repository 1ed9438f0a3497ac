// LayerNorm of pixels, written once for every instruction set. Needs kernel_body.h before it.
#pragma once

namespace mambaout_kernels::cpu {
namespace {

// to[0 .. padded) = layer_norm(from[0 .. dim)), zero beyond dim, for kCount pixels side by side: the chain of sums,
// root and products of one is longer than the processor looks ahead.
template <int kCount, typename From, typename To>
void norm_pixels(const From* from, std::int64_t from_step, std::int64_t dim, std::int64_t padded, float eps,
                 const float* weight, const float* bias, To* to, std::int64_t to_step) {
  constexpr int L = Vec::kLanes;
  const auto load_all = [&](std::int64_t d, int lanes) {
    return each<kCount>([&](int i) { return load_lanes<Vec>(from + i * from_step + d, lanes); });
  };
  const auto mean_of = [&](const Several<Vec, kCount>& sums) {
    return each<kCount>([&](int i) { return sum_of_lanes(sums.part[i]) / static_cast<float>(dim); });
  };
  const auto zeros = each<kCount>([](int) { return broadcast(0.0f); });
  auto sum = zeros;
  for_each_vector<L>(dim, [&](std::int64_t d, int lanes) { sum = sum + load_all(d, lanes); });
  const auto means = mean_of(sum);
  const auto mean = each<kCount>([&](int i) { return broadcast(means.part[i]); });
  // The mean is rounded; what it is off by, the mean of x - mean, is taken off again. Without it a pixel whose channels
  // are all alike would be amplified by 1 / sqrt(eps) instead of vanishing.
  auto squares = zeros, rest = zeros;
  float ones[L];
  for (int i = 0; i < L; ++i) ones[i] = 1.0f;
  for_each_vector<L>(dim, [&](std::int64_t d, int lanes) {
    const auto centred = (load_all(d, lanes) - mean) * load_lanes<Vec>(ones, lanes);
    squares = fma(centred, centred, squares);
    rest = rest + centred;
  });
  const auto offsets = mean_of(rest), means_of_squares = mean_of(squares);
  const auto off = each<kCount>([&](int i) { return broadcast(offsets.part[i]); });
  const auto scale = each<kCount>([&](int i) {
    const float variance = means_of_squares.part[i] - offsets.part[i] * offsets.part[i];
    return broadcast(1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + eps));
  });
  for_each_vector<L>(dim, [&](std::int64_t d, int lanes) {
    const auto normed = fma((load_all(d, lanes) - mean - off) * scale, load(weight + d), load(bias + d));
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) store_lanes(to + i * to_step + d, normed.part[i], lanes);
  });
  for (int i = 0; i < kCount; ++i) {
    for (std::int64_t d = dim; d < padded; ++d) to[i * to_step + d] = To{};
  }
}

// Calls body(Constant<count>, index), Vec::kTogether at a time.
template <typename Body>
inline void for_each_together(std::int64_t count, const Body& body) {
  std::int64_t i = 0;
  for (; i + Vec::kTogether <= count; i += Vec::kTogether) body(Constant<Vec::kTogether>{}, i);
  if constexpr (Vec::kTogether > 1) {
    for (; i < count; ++i) body(Constant<1>{}, i);
  }
}

}  // namespace
}  // namespace mambaout_kernels::cpu
