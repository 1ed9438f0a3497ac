// The gates' part of the split backward (split_backward.h), all D channels of a pixel alike. With s = concat(i, conv):
//   dg = dy * s * act'(g);   e = dy * act(g)
// e of the identity channels is di; that of the conv channels takes the place of s.
//
// A packet of 16 bytes is read and written by one thread, so that nothing else orders them. A block takes a number of
// whole pixels; neighbouring threads, neighbouring packets.
#pragma once

#include "gates.cuh"
#include "packet.cuh"

namespace mambaout_kernels::cuda {

template <typename T>
struct GateBackwardArgs {
  int pixels;  // N * H * W
  int D, C;
  int block_pixels;     // of a block
  unsigned reciprocal;  // 2^32 / packets of a pixel, rounded up; 0 where a block has one pixel
  Act act;
  const T* u;  // (pixels, 2D), u_pitch elements apart
  int u_pitch;
  const T* dy;  // (pixels, D), dy_pitch elements apart
  int dy_pitch;
  T* du;  // (pixels, 2D)
  T* e;   // (pixels, C): s, then e
};

constexpr int kGateThreads = 256, kGateBatch = 2;            // packets that a thread loads before it computes
constexpr int kGatePackets = 2 * kGateThreads * kGateBatch;  // of a block, if not of a single pixel

template <typename T>
__global__ void __launch_bounds__(kGateThreads, 4) gate_backward_kernel(const GateBackwardArgs<T> args) {
  using P = Packet<T, true>;
  const int D = args.D, identity = D - args.C, packets = D / P::kChannels;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * args.block_pixels;
  const int pixels = static_cast<int>(min(static_cast<std::int64_t>(args.block_pixels), args.pixels - first));
  const int count = pixels * packets;
  // The pixel (from the block's first) and the first channel of a packet.
  const auto pixel_of = [&](int index) {
    return packets > 1 ? static_cast<int>(__umulhi(index, args.reciprocal)) : index;
  };
  const auto channel_of = [&](int index, int pixel) { return (index - pixel * packets) * P::kChannels; };
  const auto at = [](auto* tensor, int pixel, int pitch) { return tensor + static_cast<std::int64_t>(pixel) * pitch; };
  const T* const u = args.u + first * args.u_pitch;
  const T* const dy_first = args.dy + first * args.dy_pitch;
  T* const du = args.du + first * (2 * D);
  T* const e = args.e + first * args.C - identity;  // at channel `identity`, the first of the convolution

  with_gate<T>(args.act, [&](auto gate) {
#pragma unroll 1
    for (int begin = threadIdx.x; begin < count; begin += kGateThreads * kGateBatch) {
      P g[kGateBatch], s[kGateBatch], dy[kGateBatch];
#pragma unroll
      for (int b = 0; b < kGateBatch; ++b) {
        const int index = begin + b * kGateThreads;
        if (index >= count) continue;
        const int pixel = pixel_of(index), d = channel_of(index, pixel);
        const T* const from = at(u, pixel, args.u_pitch) + d;
        g[b] = P::load(from);
        dy[b] = P::load(at(dy_first, pixel, args.dy_pitch) + d);
        s[b] = P::load_written(d < identity ? from + D : at(e, pixel, args.C) + d);
      }
#pragma unroll
      for (int b = 0; b < kGateBatch; ++b) {
        const int index = begin + b * kGateThreads;
        if (index >= count) continue;
        const int pixel = pixel_of(index), d = channel_of(index, pixel);
        P dg{}, ds{};
        gated_gradients(gate, g[b], s[b], dy[b], dg, ds);
        T* const to = at(du, pixel, 2 * D) + d;
        dg.store(to);
        ds.store(d < identity ? to + D : at(e, pixel, args.C) + d);
      }
    }
  });
}

}  // namespace mambaout_kernels::cuda
