// 4 fp32 or 2 fp64 lanes of the compiler's own vectors, or as many as MAMBAOUT_VECTOR_BYTES hold: any processor.
// Included by one translation unit only.
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.h"

#ifndef MAMBAOUT_VECTOR_BYTES
#define MAMBAOUT_VECTOR_BYTES 16
#endif

namespace mambaout_kernels::cpu {
namespace {

template <typename ScalarType>
struct Lanes {
  using Scalar = ScalarType;
  static constexpr int kLanes = MAMBAOUT_VECTOR_BYTES / sizeof(Scalar);
  static constexpr int kTileW = 7;   // 7 sums, 7 weights, 1 pixel of 16 registers
  static constexpr int kPairW = 0;   // two rows at once do not fit
  static constexpr int kUnroll = 1;  // vectors of gates side by side
  typedef Scalar Vector __attribute__((vector_size(MAMBAOUT_VECTOR_BYTES)));
  Vector v;
};
using Vec = Lanes<float>;
using VecF64 = Lanes<double>;

template <typename S, typename F>
inline Lanes<S> map_lanes(Lanes<S> a, F function) {
  for (int i = 0; i < Lanes<S>::kLanes; ++i) a.v[i] = function(a.v[i]);
  return a;
}

template <typename S>
inline Lanes<S> broadcast(S x) {
  return {typename Lanes<S>::Vector{} + x};
}
template <typename S>
inline Lanes<S> operator+(Lanes<S> a, Lanes<S> b) {
  return {a.v + b.v};
}
template <typename S>
inline Lanes<S> operator-(Lanes<S> a, Lanes<S> b) {
  return {a.v - b.v};
}
template <typename S>
inline Lanes<S> operator*(Lanes<S> a, Lanes<S> b) {
  return {a.v * b.v};
}
template <typename S>
inline Lanes<S> operator/(Lanes<S> a, Lanes<S> b) {
  return {a.v / b.v};
}
template <typename S>
inline Lanes<S> fma(Lanes<S> a, Lanes<S> b, Lanes<S> c) {
  return {a.v * b.v + c.v};
}
template <typename S>
inline Lanes<S> fnma(Lanes<S> a, Lanes<S> b, Lanes<S> c) {  // c - a * b
  return {c.v - a.v * b.v};
}
template <typename S>
inline Lanes<S> select_less(Lanes<S> a, Lanes<S> b, Lanes<S> if_less, Lanes<S> otherwise) {
  return {a.v < b.v ? if_less.v : otherwise.v};
}
// b where either is NaN.
template <typename S>
inline Lanes<S> min(Lanes<S> a, Lanes<S> b) {
  return {a.v < b.v ? a.v : b.v};
}
template <typename S>
inline Lanes<S> max(Lanes<S> a, Lanes<S> b) {
  return {a.v > b.v ? a.v : b.v};
}
inline Vec abs(Vec a) {
  return map_lanes(a, [](float x) { return __builtin_fabsf(x); });
}

typedef std::int32_t IntVector __attribute__((vector_size(MAMBAOUT_VECTOR_BYTES)));

// a * b rounded to an integer: as fp32 and as an integer. |a * b| < 2^22: the addition of 1.5 * 2^23 rounds to nearest
// even.
struct Rounded {
  Vec value;
  IntVector index;
};
inline Rounded round_product(Vec a, Vec b) {
  const Vec magic = broadcast(12582912.0f), value = fma(a, b, magic) - magic;
  return {value, __builtin_convertvector(value.v, IntVector)};
}
inline Vec to_float(Rounded rounded) { return rounded.value; }
// 2^n for n in [-127, 127]; 2^-127 gives 0.
inline Vec power_of_two(Rounded n) {
  const IntVector bits = (n.index + 127) << 23;
  Vec result;
  std::memcpy(&result.v, &bits, sizeof(bits));
  return result;
}
// a * 2^n where that is a normal number.
inline Vec times_power_of_two(Vec a, Rounded n) { return a * power_of_two(n); }
constexpr int kPieces = 8;
inline Vec lookup(const float (&table)[8], Rounded piece) {
  Vec result;
  for (int lane = 0; lane < Vec::kLanes; ++lane) result.v[lane] = table[piece.index[lane] & 7];
  return result;
}

// The vector type that computes on tensors of Element.
template <typename Element>
struct VecOf {
  using type = Vec;
};
template <>
struct VecOf<double> {
  using type = VecF64;
};

template <typename Element>
inline typename VecOf<Element>::type load_first(const Element* p, int n) {
  typename VecOf<Element>::type result = {};
  for (int i = 0; i < n; ++i) result.v[i] = widen(p[i]);
  return result;
}
template <typename Element>
inline typename VecOf<Element>::type load(const Element* p) {
  return load_first(p, VecOf<Element>::type::kLanes);
}
template <typename Element, typename V>
inline void store_first(Element* p, V a, int n) {
  for (int i = 0; i < n; ++i) narrow(a.v[i], p + i);
}
template <typename Element, typename V>
inline void store(Element* p, V a) {
  store_first(p, a, V::kLanes);
}
inline float sum_of_lanes(Vec a) {
  for (int half = Vec::kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  }
  return a.v[0];
}
inline Vec rounded(Vec a, BFloat16) {
  return map_lanes(a, [](float x) {
    BFloat16 nearest;
    narrow(x, &nearest);
    return widen(nearest);
  });
}
// Numbers that bf16 holds: to[2 i] = even[i], to[2 i + 1] = odd[i]
inline void store_interleaved(BFloat16* to, Vec even, Vec odd) {
  for (int i = 0; i < Vec::kLanes; ++i) {
    narrow(even.v[i], to + 2 * i);
    narrow(odd.v[i], to + 2 * i + 1);
  }
}
// Not where one is NaN.
inline bool all_below(Vec a, float limit) {
  for (int i = 0; i < Vec::kLanes; ++i) {
    if (!(a.v[i] < limit)) return false;
  }
  return true;
}
inline Vec load(const float* p) {
  Vec result;
  std::memcpy(&result.v, p, sizeof(result.v));
  return result;
}
inline void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof(a.v)); }
// to[i * to_step + j] = from[j * from_step + i], i and j below the lanes
inline void transpose(const float* from, std::int64_t from_step, float* to, std::int64_t to_step) {
  for (int i = 0; i < Vec::kLanes; ++i) {
    for (int j = 0; j < Vec::kLanes; ++j) to[i * to_step + j] = from[j * from_step + i];
  }
}
template <typename Element, typename V>
inline void stream(Element* p, V a) {
  store(p, a);
}

}  // namespace
}  // namespace mambaout_kernels::cpu
