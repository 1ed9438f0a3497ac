// What one thread moves between global memory and registers at once: 16 bytes of neighbouring channels, or, where
// something is not aligned to 16 bytes, one channel.
#pragma once

#include "lanes.cuh"

namespace mambaout_kernels::cuda {

template <typename T, bool kAligned>
struct Packet;

template <typename T>
struct Packet<T, true> {
  static constexpr int kChannels = 16 / sizeof(T);
  static constexpr int kPairs = kChannels / 2;
  uint4 bits;

  __device__ __forceinline__ static Packet load(const T* from) { return {load_global_16(from)}; }
  __device__ __forceinline__ static Packet load_written(const T* from) { return {load_written_16(from)}; }
  __device__ __forceinline__ static Packet load_shared(const T* from) {
    return {*reinterpret_cast<const uint4*>(from)};
  }
  __device__ __forceinline__ void store(T* to) const { store_global_16(to, bits); }

  __device__ __forceinline__ Lanes<2> get(int pair) const {
    if constexpr (sizeof(T) == 4) {
      return pair == 0 ? from_bits<T>(bits.x, bits.y) : from_bits<T>(bits.z, bits.w);
    } else {
      return from_bits<T>(pair == 0 ? bits.x : pair == 1 ? bits.y : pair == 2 ? bits.z : bits.w);
    }
  }
  // value * other's, in 16 bits as PyTorch does it: the gate is rounded once more than in fp32, and a third of the
  // instructions around it is saved.
  __device__ __forceinline__ void set_product(int pair, Lanes<2> value, const Packet& other) {
    if constexpr (sizeof(T) == 4) {
      set(pair, value * other.get(pair));
    } else {
      const unsigned factor = pair == 0   ? other.bits.x
                              : pair == 1 ? other.bits.y
                              : pair == 2 ? other.bits.z
                                          : other.bits.w;
      (pair == 0   ? bits.x
       : pair == 1 ? bits.y
       : pair == 2 ? bits.z
                   : bits.w) = multiply_bits<T>(to_bits<T>(value), factor);
    }
  }
  __device__ __forceinline__ void set(int pair, Lanes<2> value) {
    if constexpr (sizeof(T) == 4) {
      (pair == 0 ? bits.x : bits.z) = __float_as_uint(value.x.x);
      (pair == 0 ? bits.y : bits.w) = __float_as_uint(value.x.y);
    } else {
      (pair == 0 ? bits.x : pair == 1 ? bits.y : pair == 2 ? bits.z : bits.w) = to_bits<T>(value);
    }
  }
};

template <typename T>
struct Packet<T, false> {
  static constexpr int kChannels = 1;
  static constexpr int kPairs = 1;
  T element;

  __device__ __forceinline__ static Packet load(const T* from) { return {load_global(from)}; }
  __device__ __forceinline__ void store(T* to) const { *to = element; }
  __device__ __forceinline__ Lanes<1> get(int) const { return {to_float(element)}; }
  __device__ __forceinline__ void set(int, Lanes<1> value) { element = from_float<T>(value.x); }
  __device__ __forceinline__ void set_product(int, Lanes<1> value, const Packet& other) {
    element = from_float<T>(value.x * to_float(other.element));
  }
};

// act(g) * i
template <typename Gate, typename P>
__device__ __forceinline__ P gated(Gate, const P& g, const P& i) {
  P y{};
#pragma unroll
  for (int pair = 0; pair < P::kPairs; ++pair) y.set_product(pair, Gate::value(g.get(pair)), i);
  return y;
}

// dg = dy * i * act'(g) and di = dy * act(g)
template <typename Gate, typename P>
__device__ __forceinline__ void gated_gradients(Gate, const P& g, const P& i, const P& dy, P& dg, P& di) {
#pragma unroll
  for (int pair = 0; pair < P::kPairs; ++pair) {
    const auto both = Gate::both(g.get(pair));
    const auto upstream = dy.get(pair);
    dg.set(pair, upstream * i.get(pair) * both.slope);
    di.set(pair, upstream * both.value);
  }
}

}  // namespace mambaout_kernels::cuda
