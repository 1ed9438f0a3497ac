// act(x) and act'(x) in fp32, without branches, one channel or a pair at a time.
//
// gelu(x) = max(x, 0) - |x| * Phi(-|x|), and Phi(-|x|) is 2 to the power of a polynomial: one exponential, no
// cancellation in the negative tail. At +Inf, -Inf and NaN: as PyTorch, +Inf, NaN and NaN.
#pragma once

#include "gate_tables.h"
#include "lanes.cuh"

namespace mambaout_kernels::cuda {

constexpr float kLog2E = 1.44269502f, kLog2ERest = 1.92596303e-8f;  // together log2(e)
constexpr float kLn2 = 0.693147182f;
constexpr float kTanhScale = 0.797884561f;  // sqrt(2 / pi)
constexpr float kTanhCubic = 0.044715f;
constexpr float kNormalScale = 0.398942280f;  // 1 / sqrt(2 pi)
constexpr float kTailEnd = 15.0f;             // Phi(-15) is 0 in fp32, and x - 0 is x

template <int kLanes>
struct ValueAndSlope {
  Lanes<kLanes> value, slope;
};

// Phi(-a), a >= 0.
template <typename Table, int kLanes>
__device__ __forceinline__ Lanes<kLanes> normal_tail(Lanes<kLanes> a) {
  Lanes<kLanes> power = a.map([](float) { return Table::factor(Table::kDegree); });
#pragma unroll
  for (int i = Table::kDegree - 1; i >= 0; --i) {
    power = fma(power, a, a.map([i](float) { return Table::factor(i); }));
  }
  return power.map([](float p) { return exp2_fast(p); });
}

// |x|, but at most kTailEnd for x > 0, so that gelu(Inf) is Inf.
__device__ __forceinline__ float tail_argument(float x) { return max_nan(-x, min_nan(x, kTailEnd)); }

// 1 / (1 + power), power >= 0. In fp32 with a step of Newton's, which at infinity would yield NaN: hence the limit,
// above which the reciprocal is 0.
template <typename Table>
__device__ __forceinline__ float reciprocal_of_sum(float power) {
  if constexpr (std::is_same_v<Table, Float32Tail>) {
    const float d = 1.0f + min_nan(power, 0x1p127f), r = reciprocal_fast(d);
    return __fmaf_rn(r, __fmaf_rn(-d, r, 1.0f), r);
  } else {
    return reciprocal_fast(1.0f + power);
  }
}
// exp(-x). In fp32 with what rounding takes from the power of two.
template <typename Table>
__device__ __forceinline__ float exp_minus(float x) {
  const float power = -kLog2E * x, result = exp2_fast(power);
  if constexpr (std::is_same_v<Table, Float32Tail>) {
    const float lost = __fmaf_rn(-kLog2E, x, -power);
    return fabsf(power) < 126.0f ? __fmaf_rn(result, kLn2 * __fmaf_rn(-kLog2ERest, x, lost), result) : result;
  } else {
    return result;
  }
}
template <typename Table>
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal_of_sum<Table>(exp_minus<Table>(x));
}
// x * sigmoid(z) and sigmoid(z) * (1 + x * (1 - sigmoid(z)) * dz), without cancellation in 1 - sigmoid(z).
template <typename Table>
struct SigmoidGate {
  float value, slope;

  __device__ __forceinline__ SigmoidGate(float x, float z, float dz) {
    const float power = exp_minus<Table>(z), s = reciprocal_of_sum<Table>(power);
    const float rest = min_nan(power, 0x1p126f) * s;  // 1 - s; where s is 0 it does not matter, but must be finite
    value = x * s;
    slope = __fmaf_rn(value * rest, dz, s);
  }
};

template <Act act, typename Table>
struct Gate;

template <typename Table>
struct Gate<Act::kGelu, Table> {
  template <int kLanes>
  __device__ __forceinline__ static Lanes<kLanes> value(Lanes<kLanes> x) {
    const Lanes<kLanes> a = x.map(tail_argument), tail = normal_tail<Table>(a);
    const Lanes<kLanes> minus_a = a.map([](float v) { return -v; });
    return fma(minus_a, tail, x.map([](float v) { return max_nan(v, 0.0f); }));
  }
  template <int kLanes>
  __device__ __forceinline__ static ValueAndSlope<kLanes> both(Lanes<kLanes> x) {
    const Lanes<kLanes> a = x.map(tail_argument), tail = normal_tail<Table>(a);
    const Lanes<kLanes> below = zip(x, tail, [](float v, float t) { return v > 0.0f ? 1.0f - t : t; });  // Phi(x)
    const Lanes<kLanes> density = x.map([](float v) { return exp2_fast((-0.5f * kLog2E * v) * v); });
    const Lanes<kLanes> minus_a = a.map([](float v) { return -v; });
    return {fma(minus_a, tail, x.map([](float v) { return max_nan(v, 0.0f); })),
            fma(x.map([](float v) { return kNormalScale * v; }), density, below)};
  }
};

template <typename Table>
struct Gate<Act::kGeluTanh, Table> {
  __device__ __forceinline__ static float twice_inner(float x) {
    return 2.0f * kTanhScale * x * __fmaf_rn(kTanhCubic * x, x, 1.0f);
  }
  template <int kLanes>
  __device__ __forceinline__ static Lanes<kLanes> value(Lanes<kLanes> x) {
    return x.map([](float v) { return v * sigmoid<Table>(twice_inner(v)); });
  }
  __device__ __forceinline__ static SigmoidGate<Table> both_of(float x) {
    return {x, twice_inner(x), 2.0f * kTanhScale * __fmaf_rn(3.0f * kTanhCubic * x, x, 1.0f)};
  }
  template <int kLanes>
  __device__ __forceinline__ static ValueAndSlope<kLanes> both(Lanes<kLanes> x) {
    return {x.map([](float v) { return both_of(v).value; }), x.map([](float v) { return both_of(v).slope; })};
  }
};

template <typename Table>
struct Gate<Act::kSilu, Table> {
  template <int kLanes>
  __device__ __forceinline__ static Lanes<kLanes> value(Lanes<kLanes> x) {
    return x.map([](float v) { return v * sigmoid<Table>(v); });
  }
  template <int kLanes>
  __device__ __forceinline__ static ValueAndSlope<kLanes> both(Lanes<kLanes> x) {
    return {x.map([](float v) { return SigmoidGate<Table>(v, v, 1.0f).value; }),
            x.map([](float v) { return SigmoidGate<Table>(v, v, 1.0f).slope; })};
  }
};

template <typename Table>
struct Gate<Act::kIdentity, Table> {
  template <int kLanes>
  __device__ __forceinline__ static Lanes<kLanes> value(Lanes<kLanes> x) {
    return x;
  }
  template <int kLanes>
  __device__ __forceinline__ static ValueAndSlope<kLanes> both(Lanes<kLanes> x) {
    return {x, x.map([](float) { return 1.0f; })};
  }
};

template <typename T>
struct TableOf {
  using type = LowPrecisionTail;
};
template <>
struct TableOf<float> {
  using type = Float32Tail;
};

// Runs f with the gate of `act`, which is the same in every thread of a launch.
template <typename T, typename F>
__device__ __forceinline__ void with_gate(Act act, F f) {
  using Table = typename TableOf<T>::type;
  switch (act) {
    case Act::kGelu: f(Gate<Act::kGelu, Table>{}); break;
    case Act::kGeluTanh: f(Gate<Act::kGeluTanh, Table>{}); break;
    case Act::kSilu: f(Gate<Act::kSilu, Table>{}); break;
    case Act::kIdentity: f(Gate<Act::kIdentity, Table>{}); break;
  }
}

}  // namespace mambaout_kernels::cuda
