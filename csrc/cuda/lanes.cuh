// Values of neighbouring channels in one thread, as fp32, and their storage types.
#pragma once

#include "platform.cuh"

namespace mambaout_kernels::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

template <typename T>
struct PairOf;
template <>
struct PairOf<float> {
  using type = float2;
};
template <>
struct PairOf<__half> {
  using type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

__device__ __forceinline__ float2 pair_to_float(float2 x) { return x; }
__device__ __forceinline__ float2 pair_to_float(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float2 pair_to_float(__nv_bfloat162 x) { return __bfloat1622float2(x); }

template <typename T>
__device__ __forceinline__ typename PairOf<T>::type pair_from_float(float2 x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float22half2_rn(x);
  } else {
    return __float22bfloat162_rn(x);
  }
}

// kLanes (1 or 2) neighbouring channels.
template <int kLanes>
struct Lanes;

template <>
struct Lanes<1> {
  float x;

  __device__ __forceinline__ static Lanes zero() { return {0.0f}; }
  template <typename T>
  __device__ __forceinline__ static Lanes load(const T* from) {
    return {to_float(*from)};
  }
  template <typename T>
  __device__ __forceinline__ void store(T* to) const {
    *to = from_float<T>(x);
  }
  template <typename F>
  __device__ __forceinline__ Lanes map(F f) const {
    return {f(x)};
  }
};

template <>
struct Lanes<2> {
  float2 x;

  __device__ __forceinline__ static Lanes zero() { return {make_float2(0.0f, 0.0f)}; }
  template <typename T>
  __device__ __forceinline__ static Lanes load(const T* from) {
    return {pair_to_float(*reinterpret_cast<const typename PairOf<T>::type*>(from))};
  }
  template <typename T>
  __device__ __forceinline__ void store(T* to) const {
    *reinterpret_cast<typename PairOf<T>::type*>(to) = pair_from_float<T>(x);
  }
  template <typename F>
  __device__ __forceinline__ Lanes map(F f) const {
    return {make_float2(f(x.x), f(x.y))};
  }
};

__device__ __forceinline__ Lanes<1> fma(Lanes<1> a, Lanes<1> b, Lanes<1> c) { return {__fmaf_rn(a.x, b.x, c.x)}; }
__device__ __forceinline__ Lanes<2> fma(Lanes<2> a, Lanes<2> b, Lanes<2> c) { return {fma_pair(a.x, b.x, c.x)}; }
__device__ __forceinline__ Lanes<1> operator*(Lanes<1> a, Lanes<1> b) { return {a.x * b.x}; }
__device__ __forceinline__ Lanes<2> operator*(Lanes<2> a, Lanes<2> b) {
  return {make_float2(a.x.x * b.x.x, a.x.y * b.x.y)};
}

}  // namespace mambaout_kernels::cuda
