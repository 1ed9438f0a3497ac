// The backward in kernels of its own instead of one (backward.cuh), with e = dy * act(g) in memory between them:
//   s = dwconv(c) + bias           depthwise.cuh
//   dg, di, and e in s's place     gate_backward.cuh
//   dc = dwconv(e), flipped        depthwise.cuh
//   dweight, dbias                 weight_gradient.cuh
// It moves 5 D + 6 C elements per pixel where the one kernel moves 5 D and its halos, but each of these kernels has the
// registers for four blocks on a multiprocessor.
#pragma once

#include "depthwise.h"
#include "gated_dwconv_cuda.h"

namespace mambaout_kernels::cuda {

constexpr int kWeightGradientStrip = 7, kWeightGradientGroups = 4;
// Values of s from which on it is chosen: below, four more launches take longer than they save. Measured on an H100.
constexpr std::int64_t kFewestSplitOutputs = 1 << 19;

inline std::int64_t element_bytes(const GatedDwconvShape& shape) { return shape.dtype == DType::kFloat32 ? 4 : 2; }

// Pointers and spacings have to be aligned to 16 bytes besides.
inline bool can_split(const GatedDwconvShape& shape) {
  return shape.C > 0 && shape.K == kDepthwiseKernelSize && shape.D * element_bytes(shape) % 16 == 0 &&
         shape.C * element_bytes(shape) % 16 == 0;
}
inline bool prefers_split(const GatedDwconvShape& shape) {
  return can_split(shape) && shape.N * shape.H * shape.W * shape.C >= kFewestSplitOutputs;
}

// Of the weight gradient: the same for every device, for the same bits on all.
inline Tiling weight_gradient_tiling(const GatedDwconvShape& shape) {
  TilingRequest request{};
  request.N = static_cast<int>(shape.N), request.H = static_cast<int>(shape.H), request.W = static_cast<int>(shape.W);
  request.C = static_cast<int>(shape.C);
  request.packets_per_block = 1;  // of which there are none
  request.strip = kWeightGradientStrip;
  request.max_groups = kWeightGradientGroups;
  request.multiprocessors = 132;  // of an H100
  request.wanted_blocks = 2 * request.multiprocessors;
  request.waves = 1;
  request.most_rows = 1 << 20;
  Tiling t = choose_tiling(request);
  t.images_per_block = fitting(request.N, t.images_per_block, std::int64_t{t.w_tiles} * t.chunk_groups * t.segments,
                               request.multiprocessors);
  t.image_groups = ceil_div(request.N, t.images_per_block);
  return t;
}
inline int weight_gradient_slots(const GatedDwconvShape& shape) {
  const Tiling t = weight_gradient_tiling(shape);
  return t.w_tiles * t.segments * t.image_groups;
}

// s and e, before the partial sums in the workspace.
inline std::int64_t split_buffer_bytes(const GatedDwconvShape& shape) {
  return shape.N * shape.H * shape.W * shape.C * element_bytes(shape);
}

}  // namespace mambaout_kernels::cuda
