// The head's pooling and norms, of one image. Needs layer_norm.h before it.
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

// Two passes: the rounding error of the first mean, which grows with the map, is the mean of x - mean, and is added.
template <typename Io>
void mean_of_pixels(const HeadCall& call, std::int64_t n, float* to) {
  const Vec pixels = broadcast(static_cast<float>(call.H * call.W));
  for_each_vectors<Vec>(call.C, [&](std::int64_t c, auto count, int lanes) {
    constexpr int kCount = decltype(count)::value;
    const auto zeros = map<kCount>([](int) { return broadcast(0.0f); });
    const auto mean_without = [&](const auto& offset) {
      auto sum = zeros;
      for (std::int64_t h = 0; h < call.H; ++h) {
        auto of_row = zeros;
        for (std::int64_t w = 0; w < call.W; ++w) {
          of_row = of_row + (load_array<kCount, Vec>(pixel<Io>(call.x, n, h, w) + c, lanes) - offset);
        }
        sum = sum + of_row;
      }
      return sum / pixels;
    };
    const auto mean = mean_without(zeros);
    store_array(to + c, mean + mean_without(mean), lanes);
  });
}

inline void pool_image(const HeadCall& call, std::int64_t n, float* to) {
  call.in_dtype == DType::kBFloat16 ? mean_of_pixels<BFloat16>(call, n, to) : mean_of_pixels<float>(call, n, to);
}

inline void norm_row(float* row, std::int64_t count, float eps, const float* weight, const float* bias) {
  norm_pixels<1>(row, count, count, count, eps, weight, bias, row, count);
}

constexpr HeadKernels kHeadKernels{Vec::kLanes, pool_image, norm_row};

}  // namespace
}  // namespace mambaout_kernels::cpu
