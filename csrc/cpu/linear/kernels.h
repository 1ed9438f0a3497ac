// The matrix products of training: what one translation unit per instruction set offers to matmul_dispatch.cpp, and the
// layout that both know. Plain data; no template, no STL.
#pragma once

#include "arguments.h"

namespace mambaout_kernels::cpu {

// Terms that are worked off at a time: a panel of b, this deep, stays in L1 while it is multiplied by all rows of a
// task, which stay in L2.
constexpr std::int64_t kMatmulDepth = 256;
// Elements from row to row of them: an odd number of cache lines, so that a tile's rows do not share sets of L1.
constexpr std::int64_t kMatmulStep = kMatmulDepth + 16;

// One task: a rectangle of the output; n0 is a multiple of two vectors.
struct MatmulTask {
  const MatmulCall* call;
  std::int64_t m0, m1, n0, n1;
  void* window;  // matmul_window().total bytes
};

// What a task keeps at hand; offsets in bytes.
struct MatmulWindow {
  std::int64_t rows;      // [rows][kMatmulStep] or [rows / tile][kMatmulDepth][tile] fp32, of a
  std::int64_t panel;     // [kMatmulDepth][2 lanes] fp32, of b
  std::int64_t tile;      // [tile][2 lanes] fp32
  std::int64_t row_sums;  // [rows] fp64
  std::int64_t total;
};

// One task: columns [n0, n1) of the output.
struct DotsTask {
  const DotsCall* call;
  std::int64_t n0, n1;
};

struct MatmulKernels {
  int lanes;
  int tile_rows;
  void (*run)(const MatmulTask&);
  void (*run_dots)(const DotsTask&);

  // See select_kernels.h.
  static const MatmulKernels* portable();
  static const MatmulKernels* avx2();
  static const MatmulKernels* avx512();
  static const MatmulKernels* avx512_bf16();
};

MatmulWindow matmul_window(std::int64_t rows, int lanes);

}  // namespace mambaout_kernels::cpu
