// act(x) and act'(x) in fp64, lane by lane from libm. Portable unit only.
#pragma once

#include "activations.h"

namespace mambaout_kernels::cpu {
namespace {

constexpr double kInverseSqrt2 = 0.70710678118654752440, kInverseSqrt2Pi = 0.39894228040143267794;
constexpr double kTanhScale = 0.79788456080286535588, kTanhCubic = 0.044715;

template <Act act>
struct GateF64;

template <>
struct GateF64<Act::kGelu> {
  static double cdf(double x) { return 0.5 * (1 + __builtin_erf(x * kInverseSqrt2)); }
  static double value(double x) { return x * cdf(x); }
  static double slope(double x) { return cdf(x) + x * kInverseSqrt2Pi * __builtin_exp(-0.5 * x * x); }
};
template <>
struct GateF64<Act::kGeluTanh> {
  static double tanh(double x) { return __builtin_tanh(kTanhScale * (x + kTanhCubic * x * x * x)); }
  static double value(double x) { return 0.5 * x * (1 + tanh(x)); }
  static double slope(double x) {
    const double t = tanh(x);
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * kTanhScale * (1 + 3 * kTanhCubic * x * x);
  }
};
template <>
struct GateF64<Act::kSilu> {
  static double sigmoid(double x) { return 1 / (1 + __builtin_exp(-x)); }
  static double value(double x) { return x * sigmoid(x); }
  static double slope(double x) {
    const double s = sigmoid(x);
    return s + x * s * (1 - s);
  }
};
template <>
struct GateF64<Act::kIdentity> {
  static double value(double x) { return x; }
  static double slope(double) { return 1; }
};

}  // namespace
}  // namespace mambaout_kernels::cpu
