// Scalar conversions of the storage types, for small tensors: weights and their gradients.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../gated_dwconv.h"
#include "element_types.h"

namespace mambaout_kernels::cpu {

inline float bits_to_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline std::uint32_t float_to_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bits_to_float(static_cast<std::uint32_t>(x.bits) << 16); }
inline float widen(Float16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // 2^112 moves the exponent from half's bias to float's, subnormal halves included.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 5.192296858534828e33f));
}

inline void narrow(float x, float* p) { *p = x; }
inline void narrow(double x, double* p) { *p = x; }
inline void narrow(float x, BFloat16* p) {  // to nearest even; NaN stays NaN
  const std::uint32_t bits = float_to_bits(x);
  p->bits = x != x ? 0x7fc0 : static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void narrow(float x, Float16* p) {  // to nearest even; NaN stays NaN
  const std::uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal half: the addition of 0.5 rounds at its last place, 2^-24
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<std::uint16_t>(sign | half);
}

inline std::int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// What a storage type widens to.
template <typename Element>
using AccumulatorOf = decltype(widen(Element{}));

// Calls body with a value of the storage type.
template <typename Body>
inline void with_element_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{});
    case DType::kBFloat16: return body(BFloat16{});
    case DType::kFloat16: return body(Float16{});
    case DType::kFloat64: return body(double{});
  }
}

}  // namespace mambaout_kernels::cpu
