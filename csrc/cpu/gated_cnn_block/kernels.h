// The whole block: what one translation unit per instruction set offers to dispatch.cpp, and the layouts that both
// know. Plain data; no template, no STL.
#pragma once

#include "../gemm/packed_format.h"
#include "arguments.h"

namespace mambaout_kernels::cpu {

// Offsets in bytes into the packed parameters. A panel has `columns` output channels of a matrix, as PackedParameters
// lays it out. Channels beyond the last are zero.
struct BlockLayout {
  std::int64_t columns;                  // of a panel: two vectors
  std::int64_t dim, identity, conv;      // padded to whole panels
  std::int64_t depth1, depth2;           // of fc1 and fc2, in whole steps of the format
  std::int64_t panel1, panel2;           // bytes of a panel
  std::int64_t norm_weight, norm_bias;   // [dim]
  std::int64_t conv_panels, conv_bias1;  // fc1's conv channels
  std::int64_t identity_panels;          // fc1's identity channels: of each panel first the gate's, then their own
  std::int64_t identity_gate_bias, identity_bias;
  std::int64_t gate_panels, gate_bias;       // fc1's gate of the conv channels
  std::int64_t filter, filter_bias;          // [conv / lanes][K * K][lanes], [conv]
  std::int64_t fc2_panels, fc2_bias, scale;  // fc2's; its depth is [identity | conv], each padded
  std::int64_t total;
};

// One task: a tile of one image (kAll). Where an image is partitioned into strips of rows, each strip first computes
// the rows of the conv branch that its neighbours' filters cover (kHalo). Where there are too few rows for all threads,
// a task is a part of the channels of a whole image: first of y (kGate), then of the output (kProject). A step begins
// when the one before it is complete.
enum class BlockStep { kHalo, kAll, kGate, kProject };

struct BlockTask {
  const GatedCnnBlockCall* call;
  const BlockLayout* at;
  std::int64_t n, h0, h1, w0, w1;
  std::int64_t chunk_rows;  // per pass
  BlockStep step;
  // The conv branch on the K / 2 rows on both sides of h0, and of h1: [conv / lanes][2 * (K / 2)][W][lanes], which two
  // strips share. Null where none is shared.
  float *above, *below;
  std::int64_t part, parts;  // 0 and 1 for kHalo and kAll
  void* y;                   // of the image, [H * W][lda2], which the parts share; null for kHalo and kAll
  std::int64_t y_plane;      // elements of it; of a format with several parts, from part to part
  void* scratch;             // block_scratch().total bytes
};

// A part of `columns`, in whole panels.
struct PanelRange {
  std::int64_t begin, end;
};
inline PanelRange panel_range(const BlockTask& task, std::int64_t columns) {
  const std::int64_t panels = columns / task.at->columns;
  return {panels * task.part / task.parts * task.at->columns, panels * (task.part + 1) / task.parts * task.at->columns};
}

// Scratch memory of a task; offsets in bytes, planes in elements. Left factors are one plane for each part.
struct BlockScratch {
  std::int64_t lda1, lda2;  // of `normed` and `y`: elements from pixel to pixel
  std::int64_t ring_rows, padded_width;
  std::int64_t normed;  // [rows][columns of the tile and its halo][lda1], left factor
  std::int64_t ring;    // [conv / lanes of the task][ring_rows][padded_width][lanes] fp32
  std::int64_t y;       // [pixels of a chunk][lda2], left factor
  std::int64_t normed_plane, y_plane;
  std::int64_t s;      // [2][pixels of a chunk][lanes] fp32
  std::int64_t tiles;  // 2 x [kMaxMr][columns] fp32
  std::int64_t total;
};

struct BlockKernels {
  PackedFormat format;
  void (*run)(const BlockTask&);

  // See select_kernels.h.
  static const BlockKernels* portable(DType compute_dtype, DType io);
  static const BlockKernels* avx2(DType compute_dtype, DType io);
  static const BlockKernels* avx512(DType compute_dtype, DType io);
  static const BlockKernels* avx512_bf16(DType compute_dtype, DType io);
  static const BlockKernels* amx_bf16(DType compute_dtype, DType io);
};

// conv: the most conv channels of a task, in whole panels
BlockScratch block_scratch(const BlockLayout& at, const GatedCnnBlockShape& shape, PackedFormat format,
                           std::int64_t width, std::int64_t chunk_rows, std::int64_t conv) noexcept;

}  // namespace mambaout_kernels::cpu
