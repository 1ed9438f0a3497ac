// The op: what one translation unit per instruction set offers to dispatch.cpp. Plain data; no template, no STL.
#pragma once

#include "../../gated_dwconv.h"

namespace mambaout_kernels::cpu {

// The output of one task: a rectangle of one image, some of the conv channels and some of the identity channels.
struct Tile {
  std::int64_t n, h0, h1, w0, w1;
  std::int64_t conv0, conv1;          // of 0 .. C; conv0 is a multiple of the lanes
  std::int64_t identity0, identity1;  // of 0 .. D - C
};

struct ForwardTask {
  const GatedDwconvForward* args;
  Tile tile;
  const void* weight;  // packed: [ceil(C / lanes)][K * K][lanes], accumulator type; or PackedPairRow for forward_pairs
  const void* bias;    // packed: [ceil(C / lanes)][lanes]
  void* scratch;       // forward_scratch_elements()
  bool streaming;      // the tensors are larger than the caches
  bool cleared;        // the scratch was last used by a task of the same shape: what lies outside the image is zero
};

struct BackwardTask {
  const GatedDwconvBackward* args;
  Tile tile;
  const void* weight;
  const void* bias;
  void* scratch;  // backward_scratch_elements()
  bool prefetch;
  void* partial;  // [ceil(C / lanes)][K * K + 1][lanes]: this tile's partial sums of dweight and dbias
};

struct GatedDwconvKernels {
  int lanes;
  int accumulator_bytes;  // 4: float, 8: double
  void (*forward)(const ForwardTask&);
  // Null, or the forward for a 7 x 7 filter in bf16, packed for dot products of pairs (bf16_pairs.h).
  void (*forward_pairs)(const ForwardTask&);
  void (*backward)(const BackwardTask&);

  // See select_kernels.h.
  static const GatedDwconvKernels* portable(DType dtype);
  static const GatedDwconvKernels* avx2(DType dtype);
  static const GatedDwconvKernels* avx512(DType dtype);
  static const GatedDwconvKernels* avx512_bf16(DType dtype);
  static const GatedDwconvKernels* amx_bf16(DType dtype);
};

constexpr std::int64_t kForwardRows = 4;  // of outputs that the forward computes per pass
constexpr std::int64_t kMostTile = 14;    // pixels of a row, likewise: the most

// Scratch memory of a task, in accumulators, for a tile of `width` pixels and `vectors` vectors of conv channels: the
// rows of the input under the filter with their halo, and a tile of results (forward); K rows of the input, the same of
// the convolution's gradient, and one row of results (backward).
inline std::int64_t forward_scratch_elements(std::int64_t width, std::int64_t vectors, int K, int lanes) {
  const std::int64_t tile = width < kMostTile ? width : kMostTile;
  return vectors * lanes * ((K + kForwardRows - 1) * (width + K - 1) + kForwardRows * tile);
}
inline std::int64_t backward_scratch_elements(std::int64_t width, std::int64_t vectors, int K, int lanes) {
  return vectors * lanes * (2 * K * (width + K - 1) + width);
}

}  // namespace mambaout_kernels::cpu
