// The downsampling: what one translation unit per instruction set offers to downsample_dispatch.cpp, and the layouts
// that both know. Plain data; no template, no STL.
#pragma once

#include "../gemm/packed_format.h"
#include "arguments.h"

namespace mambaout_kernels::cpu {

// Offsets in bytes into the packed parameters. A panel is [3 * 3 * channels][columns] for `columns` output channels.
struct DownsamplePack {
  std::int64_t columns;   // of a panel: two vectors
  std::int64_t channels;  // in_channels, padded to pairs for bf16
  std::int64_t out;       // out_channels, padded to whole panels
  std::int64_t panel;     // bytes of a panel
  std::int64_t panels, bias, norm_weight, norm_bias;
  std::int64_t total;
};

// One task: rows [h0, h1) of the output of image n.
struct DownsampleTask {
  const DownsampleCall* call;
  const DownsamplePack* at;
  std::int64_t n, h0, h1;
  void* window;  // downsample_window().total bytes
};

// What a task keeps at hand; offsets in bytes.
struct DownsampleWindow {
  std::int64_t row;      // elements of a row of x: [W + 2][channels] and what the last tile reads beyond
  std::int64_t x;        // [2 * rows + 1][row], as multiplied; not of few channels
  std::int64_t sums;     // [rows * out_width][out] fp32
  std::int64_t tile;     // [kMaxTileRows][columns] fp32
  std::int64_t patches;  // [rows * out_width][3 * 3 * channels], as multiplied; 0 but for few channels
  std::int64_t total;
};

struct DownsampleKernels {
  PackedFormat format;
  void (*run)(const DownsampleTask&);

  // See select_kernels.h.
  static const DownsampleKernels* portable(DType multiplied, DType in, DType out);
  static const DownsampleKernels* avx2(DType multiplied, DType in, DType out);
  static const DownsampleKernels* avx512(DType multiplied, DType in, DType out);
  static const DownsampleKernels* avx512_bf16(DType multiplied, DType in, DType out);
};

DownsampleWindow downsample_window(const DownsampleCall& call, const DownsamplePack& at, int element_bytes,
                                   std::int64_t rows);

}  // namespace mambaout_kernels::cpu
