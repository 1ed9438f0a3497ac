// act(x) and act'(x) on vectors. Needs a vec_*.h before it.
//
// gelu and its tanh form are looked up as piecewise polynomials (activation_tables.h);
// silu = x / (1 + exp(-x)).
#pragma once

#include "../gated_dwconv.h"
#include "activation_tables.h"

namespace mambaout_kernels::cpu {
namespace {

// A table of fit_activation_tables.py at a >= 0; 0 beyond its limit, and where a is NaN.
template <typename Table>
inline Vec piecewise(Vec a) {
  const Vec clamped = min(a, broadcast(Table::kLimit));
  const Rounded piece = round(clamped * broadcast(Table::kInverseWidth));
  const Vec offset = fma(piece.value, broadcast(-Table::kWidth), clamped);
  Vec result = lookup(Table::kCoefficients[Table::kDegree], piece.index);
#pragma GCC unroll 16
  for (int power = Table::kDegree - 1; power >= 0; --power) {
    result = fma(result, offset, lookup(Table::kCoefficients[power], piece.index));
  }
  return select_less(a, broadcast(Table::kLimit), result, broadcast(0.0f));
}

// As PyTorch has it: NaN at NaN and at -Inf, Inf at Inf.
template <typename Table>
inline Vec value_from(Vec x) {
  const Vec zero = broadcast(0.0f), a = max(zero - x, min(x, broadcast(Table::kLimit)));
  return max(zero, x) - a * piecewise<Table>(a);
}
template <typename Table>
inline Vec slope_from(Vec x) {
  const Vec p = piecewise<Table>(abs(x));
  return fma(x, broadcast(0.0f), select_less(x, broadcast(0.0f), p, broadcast(1.0f) - p));
}

// 1 / (1 + exp(-x)); 0 below -88, where the exponential leaves fp32.
inline Vec sigmoid(Vec x) {
  const Vec y = max(min(broadcast(0.0f) - x, broadcast(88.0f)), broadcast(-88.0f));
  const Rounded n = round(y * broadcast(1.44269504f));
  // ln 2 in two parts: n times the first is exact
  const Vec r = fma(n.value, broadcast(-1.428606765e-6f), fma(n.value, broadcast(-0.693145752f), y));
  Vec p = broadcast(1.0f / 5040);
  p = fma(p, r, broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  const Vec result = broadcast(1.0f) / fma(p, power_of_two(n), broadcast(1.0f));
  return select_less(x, broadcast(-88.0f), broadcast(0.0f), result);
}

// kHalf: the result is rounded to bf16 or fp16; the tables of lower degree are 20 times finer than that rounding or
// more.
template <Act act, bool kHalf>
struct Gate;

template <>
struct Gate<Act::kGelu, false> {
  static Vec value(Vec x) { return value_from<GeluValue<kPieces>>(x); }
  static Vec slope(Vec x) { return slope_from<GeluSlope<kPieces>>(x); }
};
template <>
struct Gate<Act::kGelu, true> {
  static Vec value(Vec x) { return value_from<GeluValueHalf<kPieces>>(x); }
  static Vec slope(Vec x) { return slope_from<GeluSlopeHalf<kPieces>>(x); }
};
template <>
struct Gate<Act::kGeluTanh, false> {
  static Vec value(Vec x) { return value_from<GeluTanhValue<kPieces>>(x); }
  static Vec slope(Vec x) { return slope_from<GeluTanhSlope<kPieces>>(x); }
};
template <>
struct Gate<Act::kGeluTanh, true> {
  static Vec value(Vec x) { return value_from<GeluTanhValueHalf<kPieces>>(x); }
  static Vec slope(Vec x) { return slope_from<GeluTanhSlopeHalf<kPieces>>(x); }
};

template <bool kHalf>
struct Gate<Act::kSilu, kHalf> {
  static Vec value(Vec x) { return x * sigmoid(x); }
  static Vec slope(Vec x) {
    const Vec s = sigmoid(x);
    return fma(x * s, broadcast(1.0f) - s, s);
  }
};

template <bool kHalf>
struct Gate<Act::kIdentity, kHalf> {
  template <typename V>
  static V value(V x) {
    return x;
  }
  template <typename V>
  static V slope(V) {
    return broadcast(static_cast<typename V::Scalar>(1));
  }
};

}  // namespace
}  // namespace mambaout_kernels::cpu
