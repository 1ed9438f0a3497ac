// The 3x3 convolution of stride 2: what one translation unit per instruction set offers to dispatch.cpp, and the
// layouts that both know. Plain data; no template, no STL.
#pragma once

#include "../gemm/packed_format.h"
#include "arguments.h"

namespace mambaout_kernels::cpu {

// Offsets in bytes into the packed parameters. A panel has `columns` output channels, and 3 * 3 * channels of depth, as
// PackedParameters lays it out.
struct Conv3x3s2Layout {
  std::int64_t columns;   // of a panel: two vectors
  bool few;               // channels: the pixels under the filter are gathered (im2col)
  std::int64_t channels;  // in_channels, in whole steps of the format; a few, in pairs
  std::int64_t depth;     // 9 * channels, in whole steps of the format
  std::int64_t out;       // out_channels, padded to whole panels
  std::int64_t panel;     // bytes of a panel
  std::int64_t panels, bias, norm_weight, norm_bias;
  std::int64_t total;
};

// One task: rows [h0, h1) of the output of image n.
struct Conv3x3s2Task {
  const Conv3x3s2Call* call;
  const Conv3x3s2Layout* at;
  std::int64_t n, h0, h1;
  void* scratch;  // conv3x3s2_scratch().total bytes
};

// Scratch memory of a task; offsets in bytes.
struct Conv3x3s2Scratch {
  std::int64_t row;    // elements of a row of x: [W + 2][channels], and what the last tile reads beyond
  std::int64_t plane;  // elements of the left factor, which is one plane for each part of the format
  std::int64_t left;   // x, [2 * rows + 1][row]; of few channels, patches, [rows * out_width][depth]
  std::int64_t sums;   // [rows * out_width][out] fp32
  std::int64_t tile;   // [kMaxMr][columns] fp32
  std::int64_t total;
};

struct Conv3x3s2Kernels {
  PackedFormat format;
  void (*run)(const Conv3x3s2Task&);

  // See select_kernels.h.
  static const Conv3x3s2Kernels* portable(DType compute_dtype, DType in, DType out);
  static const Conv3x3s2Kernels* avx2(DType compute_dtype, DType in, DType out);
  static const Conv3x3s2Kernels* avx512(DType compute_dtype, DType in, DType out);
  static const Conv3x3s2Kernels* avx512_bf16(DType compute_dtype, DType in, DType out);
  static const Conv3x3s2Kernels* amx_bf16(DType compute_dtype, DType in, DType out);
};

Conv3x3s2Scratch conv3x3s2_scratch(const Conv3x3s2Call& call, const Conv3x3s2Layout& at, PackedFormat format,
                                   std::int64_t rows) noexcept;

}  // namespace mambaout_kernels::cpu
