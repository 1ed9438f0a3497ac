// Values of neighbouring channels in one thread, as fp32, and their storage types.
#pragma once

#include <type_traits>

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
  __device__ __forceinline__ static Lanes load(const T* from);
  template <typename T>
  __device__ __forceinline__ void store(T* to) const;
  template <typename F>
  __device__ __forceinline__ Lanes map(F f) const {
    return {make_float2(f(x.x), f(x.y))};
  }
};

// Two 16-bit elements in a word, the first in its low half; or two 32-bit elements in two words.
template <typename T>
__device__ __forceinline__ Lanes<2> from_bits(unsigned bits) {
  if constexpr (std::is_same_v<T, __half>) {
    return {__half22float2(__halves2half2(__ushort_as_half(static_cast<unsigned short>(bits & 0xffff)),
                                          __ushort_as_half(static_cast<unsigned short>(bits >> 16))))};
  } else {
    return {make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u))};
  }
}
template <typename T>
__device__ __forceinline__ Lanes<2> from_bits(unsigned first, unsigned second) {
  static_assert(sizeof(T) == 4);
  return {make_float2(__uint_as_float(first), __uint_as_float(second))};
}
template <typename T>
__device__ __forceinline__ unsigned to_bits(Lanes<2> value) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __float22half2_rn(value.x);
    return __half_as_ushort(__low2half(pair)) | static_cast<unsigned>(__half_as_ushort(__high2half(pair))) << 16;
  } else {
    const __nv_bfloat162 pair = __float22bfloat162_rn(value.x);
    return __bfloat16_as_ushort(__low2bfloat16(pair)) |
           static_cast<unsigned>(__bfloat16_as_ushort(__high2bfloat16(pair))) << 16;
  }
}

// Products of two pairs of 16-bit elements, each rounded once.
template <typename T>
__device__ __forceinline__ unsigned multiply_bits(unsigned a, unsigned b) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair x, y;
  memcpy(&x, &a, 4);
  memcpy(&y, &b, 4);
  const Pair product = __hmul2(x, y);
  unsigned bits;
  memcpy(&bits, &product, 4);
  return bits;
}

template <typename T>
__device__ __forceinline__ Lanes<2> Lanes<2>::load(const T* from) {
  if constexpr (sizeof(T) == 4) {
    return {*reinterpret_cast<const float2*>(from)};
  } else {
    return from_bits<T>(*reinterpret_cast<const unsigned*>(from));
  }
}
template <typename T>
__device__ __forceinline__ void Lanes<2>::store(T* to) const {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float2*>(to) = x;
  } else {
    *reinterpret_cast<unsigned*>(to) = to_bits<T>(*this);
  }
}

__device__ __forceinline__ Lanes<1> fma(Lanes<1> a, Lanes<1> b, Lanes<1> c) { return {__fmaf_rn(a.x, b.x, c.x)}; }
__device__ __forceinline__ Lanes<2> fma(Lanes<2> a, Lanes<2> b, Lanes<2> c) { return {fma_pair(a.x, b.x, c.x)}; }
__device__ __forceinline__ Lanes<1> operator+(Lanes<1> a, Lanes<1> b) { return {a.x + b.x}; }
__device__ __forceinline__ Lanes<2> operator+(Lanes<2> a, Lanes<2> b) {
  return {make_float2(a.x.x + b.x.x, a.x.y + b.x.y)};
}
__device__ __forceinline__ Lanes<1> operator*(Lanes<1> a, Lanes<1> b) { return {a.x * b.x}; }
__device__ __forceinline__ Lanes<2> operator*(Lanes<2> a, Lanes<2> b) {
  return {make_float2(a.x.x * b.x.x, a.x.y * b.x.y)};
}

template <typename F>
__device__ __forceinline__ Lanes<1> zip(Lanes<1> a, Lanes<1> b, F f) {
  return {f(a.x, b.x)};
}
template <typename F>
__device__ __forceinline__ Lanes<2> zip(Lanes<2> a, Lanes<2> b, F f) {
  return {make_float2(f(a.x.x, b.x.x), f(a.x.y, b.x.y))};
}

}  // namespace mambaout_kernels::cuda
