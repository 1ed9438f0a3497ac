// The matrix products of linear layers: what one translation unit per instruction set offers to dispatch.cpp, and the
// layouts that both know. Plain data; no template, no STL.
#pragma once

#include "../gemm/packed_format.h"
#include "arguments.h"

namespace mambaout_kernels::cpu {

// Terms per pass: a panel of b, this deep, stays in L1 while it is multiplied by all rows of a task, which stay in L2.
constexpr std::int64_t kKc = 256;
// Row pitch of a's packed rows in elements: an odd number of cache lines, so that a tile's rows do not share sets of
// L1.
constexpr std::int64_t packed_lda(PackedFormat format) { return kKc + (format.parts == 0 ? 16 : 32); }

// One task: a tile of the output; n0 is a multiple of two vectors.
struct MatmulTask {
  const MatmulCall* call;
  std::int64_t m0, m1, n0, n1;
  void* scratch;  // matmul_scratch().total bytes
};

// Scratch memory of a task; offsets in bytes.
struct MatmulScratch {
  std::int64_t rows;      // [rows][packed_lda] or [rows / tile][kKc][tile], of a; one plane for each part of the format
  std::int64_t plane;     // elements
  std::int64_t panel;     // [kKc][2 lanes], of b, as PackedParameters lays it out
  std::int64_t tile;      // [kMaxMr][2 lanes] fp32
  std::int64_t row_sums;  // [rows] fp64
  std::int64_t total;
};

// One task: columns [n0, n1) of the output.
struct GemmNtTask {
  const GemmNtCall* call;
  std::int64_t n0, n1;
};

struct MatmulKernels {
  PackedFormat format;  // of the factors of run
  int mr;
  void (*run)(const MatmulTask&);
  void (*run_gemm_nt)(const GemmNtTask&);

  // See select_kernels.h.
  static const MatmulKernels* portable();
  static const MatmulKernels* avx2();
  static const MatmulKernels* avx512();
  static const MatmulKernels* avx512_bf16();
  static const MatmulKernels* amx_bf16();
};

MatmulScratch matmul_scratch(std::int64_t rows, PackedFormat format) noexcept;

}  // namespace mambaout_kernels::cpu
