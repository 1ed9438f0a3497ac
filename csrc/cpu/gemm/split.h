// An fp32 as a sum of bf16: with three parts, of all its bits (8 + 8 + 8). Everything here is local to the file that
// includes it, for translation units of different instruction sets must not share inline functions.
#pragma once

#include <cstdint>

#include "../simd/element_types.h"

namespace mambaout_kernels::cpu {
namespace {

// Nothing from here on is rounded as usual: beyond the largest bf16, and Inf and NaN.
constexpr float kSplitLimit = 1.7014118e38f;  // 2^127

inline float float_of(BFloat16 x) { return __builtin_bit_cast(float, static_cast<std::uint32_t>(x.bits) << 16); }
inline BFloat16 nearest_bfloat16(float x) {  // ties to even; NaN stays NaN
  const auto bits = __builtin_bit_cast(std::uint32_t, x);
  return {static_cast<std::uint16_t>(x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// part(p) is where part p goes. Each is what is left, to nearest; Inf and NaN are their first part alone. The first of
// several is cut where it would be rounded to infinity.
template <typename Part>
inline void split(float x, int parts, const Part& part) {
  for (int p = 0; p < parts; ++p) {
    BFloat16 nearest = nearest_bfloat16(x);
    const bool finite = __builtin_fabsf(x) <= 3.4028235e38f;
    if (parts > 1 && finite && __builtin_isinf(float_of(nearest))) --nearest.bits;
    *part(p) = nearest;
    x = finite ? x - float_of(nearest) : 0.0f;
  }
}

// The sum of the parts. The last ones first: no sum is rounded.
template <typename Part>
inline float joined(int parts, const Part& part) {
  float x = float_of(*part(parts - 1));
  for (int p = parts - 2; p >= 0; --p) x += float_of(*part(p));
  return x;
}

}  // namespace
}  // namespace mambaout_kernels::cpu
