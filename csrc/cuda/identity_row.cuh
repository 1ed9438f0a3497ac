// The identity branch of one row of a tile: the packets of its pixels that are this block's share.
#pragma once

#include "gated_dwconv_cuda.h"
#include "gates.cuh"
#include "packet.cuh"
#include "tiling.h"

namespace mambaout_kernels::cuda {

// Where one packet lies from the first pixel of the tile's row, in one register; or none.
class IdentityPlace {
 public:
  __device__ __forceinline__ IdentityPlace() : bits_(~0u) {}
  __device__ __forceinline__ IdentityPlace(int pixel, int channel)
      : bits_(static_cast<unsigned>(pixel) << kChannelBits | channel) {}

  __device__ __forceinline__ bool exists() const { return bits_ != ~0u; }
  // In elements, of pixels so far apart.
  __device__ __forceinline__ int offset(int pitch) const {
    return static_cast<int>(bits_ >> kChannelBits) * pitch + static_cast<int>(bits_ & ((1u << kChannelBits) - 1));
  }
  __device__ __forceinline__ void keep() { keep_in_register(bits_); }

 private:
  static constexpr int kChannelBits = 21;  // which leaves 11 for the pixel: of a tile, and none of them all ones
  static_assert(kMostChannels < (1 << kChannelBits) - 1);
  unsigned bits_;
};

// The packets of the block, of kChannels each, pixel by pixel, in the order of threads.
template <int kChannels>
class IdentityShare {
 public:
  // Of `channels` per pixel in all this is part `group` of `groups`, at `pixels` pixels.
  __device__ __forceinline__ IdentityShare(int channels, int group, int groups, int pixels)
      : first_(static_cast<std::int64_t>(channels / kChannels) * group / groups),
        packets_(static_cast<std::int64_t>(channels / kChannels) * (group + 1) / groups - first_),
        count_(pixels * packets_),
        reciprocal_(packets_ > 1 ? 0xffffffffu / packets_ + 1 : 0) {}

  __device__ __forceinline__ int count() const { return count_; }
  // index < 2^32 / packets
  __device__ __forceinline__ IdentityPlace place(int index) const {
    if (index >= count_) return {};
    const int pixel = packets_ > 1 ? static_cast<int>(__umulhi(index, reciprocal_)) : index;
    return {pixel, (first_ + index - pixel * packets_) * kChannels};
  }

 private:
  int first_, packets_, count_;
  unsigned reciprocal_;
};

// y = act(g) * i for up to kBatch packets of this thread, loaded early and used late.
template <typename T, bool kAligned, int kBatch>
struct IdentityForward {
  using P = Packet<T, kAligned>;
  P g[kBatch], i[kBatch];

  // at(b) is the place of packet b. u, y: at the first pixel of the tile's row.
  template <typename At>
  __device__ __forceinline__ void load(At at, const T* u, int u_pitch, int D) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const IdentityPlace place = at(b);
      if (!place.exists()) continue;
      g[b] = P::load(u + place.offset(u_pitch));
      i[b] = P::load(u + D + place.offset(u_pitch));
    }
  }
  template <typename Gate, typename At>
  __device__ __forceinline__ void finish(Gate gate, At at, T* y, int y_pitch) const {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const IdentityPlace place = at(b);
      if (place.exists()) gated(gate, g[b], i[b]).store(y + place.offset(y_pitch));
    }
  }
};

// dg = dy * i * act'(g) and di = dy * act(g), likewise.
template <typename T, bool kAligned, int kBatch>
struct IdentityBackward {
  using P = Packet<T, kAligned>;
  P g[kBatch], i[kBatch], dy[kBatch];

  template <typename At>
  __device__ __forceinline__ void load(At at, const T* u, int u_pitch, const T* dy_row, int dy_pitch, int D) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const IdentityPlace place = at(b);
      if (!place.exists()) continue;
      g[b] = P::load(u + place.offset(u_pitch));
      i[b] = P::load(u + D + place.offset(u_pitch));
      dy[b] = P::load(dy_row + place.offset(dy_pitch));
    }
  }
  template <typename Gate, typename At>
  __device__ __forceinline__ void finish(Gate gate, At at, T* du, int D) const {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const IdentityPlace place = at(b);
      if (!place.exists()) continue;
      P dg{}, di{};
      gated_gradients(gate, g[b], i[b], dy[b], dg, di);
      dg.store(du + place.offset(2 * D));
      di.store(du + D + place.offset(2 * D));
    }
  }
};

}  // namespace mambaout_kernels::cuda
