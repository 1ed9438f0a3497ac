// act(x) and act'(x) on a vector or a VecArray. Needs a vec_*.h before it.
//
// gelu and its tanh form are looked up as piecewise polynomials (activation_tables.h);
// silu = x / (1 + exp(-x)).
#pragma once

#include "../../gated_dwconv.h"
#include "activation_tables.h"
#include "vec_array.h"

namespace mambaout_kernels::cpu {
namespace {

// A table of fit_activation_tables.py at a >= 0; 0 beyond its limit, and where a is NaN.
template <typename Table, typename X>
[[gnu::always_inline]] inline X piecewise(const X& a) {
  const X clamped = min(a, broadcast(Table::kLimit));
  const auto piece = round_product(clamped, broadcast(Table::kInverseWidth));
  const X offset = fma(to_float(piece), broadcast(-Table::kWidth), clamped);
  X result = lookup(Table::kCoefficients[Table::kDegree], piece);
#pragma GCC unroll 16
  for (int power = Table::kDegree - 1; power >= 0; --power) {
    result = fma(result, offset, lookup(Table::kCoefficients[power], piece));
  }
  return select_less(a, broadcast(Table::kLimit), result, broadcast(0.0f));
}

// As PyTorch has it: NaN at NaN and at -Inf, Inf at Inf.
template <typename Table, typename X>
[[gnu::always_inline]] inline X value_from(const X& x) {
  const Vec zero = broadcast(0.0f);
  const X a = max(zero - x, min(x, broadcast(Table::kLimit)));
  return fnma(a, piecewise<Table>(a), max(zero, x));
}
template <typename Table, typename X>
[[gnu::always_inline]] inline X slope_from(const X& x) {
  const X p = piecewise<Table>(abs(x));
  return fma(x, broadcast(0.0f), select_less(x, broadcast(0.0f), p, broadcast(1.0f) - p));
}

// 1 / (1 + exp(-x)); 0 below -88, where the exponential leaves fp32.
template <typename X>
[[gnu::always_inline]] inline X sigmoid(const X& x) {
  const X y = max(min(broadcast(0.0f) - x, broadcast(88.0f)), broadcast(-88.0f));
  const auto n = round_product(y, broadcast(1.44269504f));
  // ln 2 in two parts: n times the first is exact
  const X r = fma(to_float(n), broadcast(-1.428606765e-6f), fma(to_float(n), broadcast(-0.693145752f), y));
  X p = fma(r, broadcast(1.0f / 5040), broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  const X result = broadcast(1.0f) / fma(p, power_of_two(n), broadcast(1.0f));
  return select_less(x, broadcast(-88.0f), broadcast(0.0f), result);
}

// kHalf: the result is rounded to bf16 or fp16; the tables of lower degree are 20 times finer than that rounding or
// more.
template <Act act, bool kHalf>
struct Gate;

template <>
struct Gate<Act::kGelu, false> {
  template <typename X>
  [[gnu::always_inline]] static X value(const X& x) {
    return value_from<GeluValue<kPieces>>(x);
  }
  template <typename X>
  [[gnu::always_inline]] static X slope(const X& x) {
    return slope_from<GeluSlope<kPieces>>(x);
  }
};
template <>
struct Gate<Act::kGelu, true> {
  template <typename X>
  [[gnu::always_inline]] static X value(const X& x) {
    return value_from<GeluValueHalf<kPieces>>(x);
  }
  template <typename X>
  [[gnu::always_inline]] static X slope(const X& x) {
    return slope_from<GeluSlopeHalf<kPieces>>(x);
  }
};
template <>
struct Gate<Act::kGeluTanh, false> {
  template <typename X>
  [[gnu::always_inline]] static X value(const X& x) {
    return value_from<GeluTanhValue<kPieces>>(x);
  }
  template <typename X>
  [[gnu::always_inline]] static X slope(const X& x) {
    return slope_from<GeluTanhSlope<kPieces>>(x);
  }
};
template <>
struct Gate<Act::kGeluTanh, true> {
  template <typename X>
  [[gnu::always_inline]] static X value(const X& x) {
    return value_from<GeluTanhValueHalf<kPieces>>(x);
  }
  template <typename X>
  [[gnu::always_inline]] static X slope(const X& x) {
    return slope_from<GeluTanhSlopeHalf<kPieces>>(x);
  }
};

template <bool kHalf>
struct Gate<Act::kSilu, kHalf> {
  template <typename X>
  [[gnu::always_inline]] static X value(const X& x) {
    return x * sigmoid(x);
  }
  template <typename X>
  [[gnu::always_inline]] static X slope(const X& x) {
    const X s = sigmoid(x);
    return fma(x * s, broadcast(1.0f) - s, s);
  }
};

template <bool kHalf>
struct Gate<Act::kIdentity, kHalf> {
  template <typename X>
  [[gnu::always_inline]] static X value(const X& x) {
    return x;
  }
  static Vec slope(Vec) { return broadcast(1.0f); }
  template <int kCount>
  static VecArray<Vec, kCount> slope(const VecArray<Vec, kCount>&) {
    return map<kCount>([](int) { return broadcast(1.0f); });
  }
};

}  // namespace
}  // namespace mambaout_kernels::cpu
