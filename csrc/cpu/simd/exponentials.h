// exp and softplus on a vector or a VecArray, to a few roundings of fp32. Needs a vec_*.h and activations.h before it.
#pragma once

#include "vec_array.h"

namespace mambaout_kernels::cpu {
namespace {

// exp(x). Beyond +-87 as at +-87; NaN stays NaN. Coefficients: fit_exponentials.py.
template <typename X>
[[gnu::always_inline]] inline X exp(const X& x) {
  const X y = max(broadcast(-87.0f), min(broadcast(87.0f), x));
  const auto n = round_product(y, broadcast(1.44269504f));
  const X r =
      fnma(to_float(n), broadcast(0.69314718f), y);  // where ln 2's own rounding shows, exp(x) is large or next to 0
  X q = fma(r, broadcast(1.384364638e-03f), broadcast(8.374161454e-03f));
  q = fma(q, r, broadcast(4.166800245e-02f));
  q = fma(q, r, broadcast(1.666643119e-01f));
  q = fma(q, r, broadcast(4.999999421e-01f));
  q = fma(q, r, broadcast(1.000000032e+00f));
  return times_power_of_two(fma(q, r, broadcast(1.0f)), n);
}

// log(1 + exp(x)); x itself above 20, as PyTorch has it.
template <typename X>
[[gnu::always_inline]] inline X softplus(const X& x) {
  const X z = exp(broadcast(0.0f) - abs(x));
  const X s = z / (z + broadcast(2.0f)), t = s * s, twice = s + s;  // log(1 + z) = 2 atanh(z / (2 + z))
  X q = fma(t, broadcast(1.408916751e-01f), broadcast(1.398030136e-01f));
  q = fma(q, t, broadcast(2.001245514e-01f));
  q = fma(q, t, broadcast(3.333315734e-01f));
  const X both = max(broadcast(0.0f), x) + fma(twice * t, q, twice);
  return select_less(broadcast(20.0f), x, x, both);
}

}  // namespace
}  // namespace mambaout_kernels::cpu
