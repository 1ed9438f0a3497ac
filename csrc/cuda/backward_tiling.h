// The backward launch, and the number of partial sums, which must not depend on the device or on alignment.
#pragma once

#include "../gated_dwconv.h"
#include "tiling.h"

namespace mambaout_kernels::cuda {

constexpr int kBackwardStrip = 4, kBackwardGroups = 4;

inline bool has_own_kernel(const GatedDwconvShape& shape) {
  return shape.C == 0 || shape.K == 3 || shape.K == 5 || shape.K == 7;
}

inline Tiling backward_tiling(int N, int H, int W, int C, int identity_packets, int packets_per_block) {
  TilingRequest request;
  request.N = N, request.H = H, request.W = W, request.C = C;
  request.identity_packets = identity_packets;
  request.packets_per_block = packets_per_block;
  request.strip = kBackwardStrip;
  request.max_groups = kBackwardGroups;
  request.multiprocessors = 132;  // of an H100; whatever the device, for the same bits on all
  request.wanted_blocks = 2 * request.multiprocessors;
  request.waves = 2;
  request.most_rows = 1 << 20;
  return choose_tiling(request);
}

inline int generic_kernel_size_slots(std::int64_t pixels) {
  return static_cast<int>(std::clamp<std::int64_t>(pixels / 256, 1, 64));
}

inline int partial_slots(const GatedDwconvShape& shape) {
  if (!has_own_kernel(shape)) return generic_kernel_size_slots(shape.N * shape.H * shape.W);
  const Tiling t = backward_tiling(static_cast<int>(shape.N), static_cast<int>(shape.H), static_cast<int>(shape.W),
                                   static_cast<int>(shape.C), 0, 1);
  return t.w_tiles * t.segments * t.image_groups;
}

}  // namespace mambaout_kernels::cuda
