// The identity branch of one row of a tile: the packets of its pixels that are this block's share.
#pragma once

#include "gates.cuh"
#include "packet.cuh"
#include "tiling.h"

namespace mambaout_kernels::cuda {

// The packets (pixel, packet of the share), in the order of threads.
class IdentityShare {
 public:
  // `packets` per pixel in all, of which this is part `group` of `groups`, at `pixels` pixels.
  __device__ __forceinline__ IdentityShare(int packets, int group, int groups, int pixels)
      : first_(static_cast<std::int64_t>(packets) * group / groups),
        packets_(static_cast<std::int64_t>(packets) * (group + 1) / groups - first_),
        count_(pixels * packets_),
        reciprocal_(packets_ > 1 ? 0xffffffffu / packets_ + 1 : 0) {}

  __device__ __forceinline__ int count() const { return count_; }
  // index < 2^32 / packets
  __device__ __forceinline__ int pixel(int index) const {
    return packets_ > 1 ? static_cast<int>(__umulhi(index, reciprocal_)) : index;
  }
  __device__ __forceinline__ int packet(int index, int pixel) const { return first_ + index - pixel * packets_; }

 private:
  int first_, packets_, count_;
  unsigned reciprocal_;
};

// Where one packet lies, from the first pixel of the tile's row, in elements; the same in every row.
struct IdentityPlace {
  int u, dy, y;  // u: of g, and of i with D more; y: with pixels D apart

  template <int kChannels>
  __device__ __forceinline__ static IdentityPlace of(const IdentityShare& share, int index, int u_pitch, int dy_pitch,
                                                     int D) {
    const int pixel = share.pixel(index), d = share.packet(index, pixel) * kChannels;
    return {pixel * u_pitch + d, pixel * dy_pitch + d, pixel * D + d};
  }
};

// y = act(g) * i for up to kBatch packets of this thread, loaded early and used late.
template <typename T, bool kAligned, int kBatch>
struct IdentityForward {
  using P = Packet<T, kAligned>;
  P g[kBatch], i[kBatch];

  // at(b) is the place of packet b; those with u < 0 are not there. u, y: at the first pixel of the tile's row.
  template <typename At>
  __device__ __forceinline__ void load(At at, const T* u, int D) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const IdentityPlace place = at(b);
      if (place.u < 0) continue;
      g[b] = P::load(u + place.u);
      i[b] = P::load(u + D + place.u);
    }
  }
  template <typename Gate, typename At>
  __device__ __forceinline__ void finish(Gate gate, At at, T* y) const {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const IdentityPlace place = at(b);
      if (place.u >= 0) gated(gate, g[b], i[b]).store(y + place.y);
    }
  }
};

// dg = dy * i * act'(g) and di = dy * act(g), likewise.
template <typename T, bool kAligned, int kBatch>
struct IdentityBackward {
  using P = Packet<T, kAligned>;
  P g[kBatch], i[kBatch], dy[kBatch];

  template <typename At>
  __device__ __forceinline__ void load(At at, const T* u, const T* dy_row, int D) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const IdentityPlace place = at(b);
      if (place.u < 0) continue;
      g[b] = P::load(u + place.u);
      i[b] = P::load(u + D + place.u);
      dy[b] = P::load(dy_row + place.dy);
    }
  }
  template <typename Gate, typename At>
  __device__ __forceinline__ void finish(Gate gate, At at, T* du, int D) const {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const IdentityPlace place = at(b);
      if (place.u < 0) continue;
      P dg{}, di{};
      gated_gradients(gate, g[b], i[b], dy[b], dg, di);
      dg.store(du + place.y);
      di.store(du + D + place.y);
    }
  }
};

}  // namespace mambaout_kernels::cuda
