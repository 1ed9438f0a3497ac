// Peak multiply-adds: what one translation unit per instruction set offers to dispatch.cpp. Plain data; no
// template, no STL.
#pragma once

#include "../../gated_dwconv.h"

namespace mambaout_kernels::cpu {

struct PeakKernel {
  std::int64_t flops;  // of one pass; a multiply-add counts as two
  float (*run)(std::int64_t passes);

  // See select_kernels.h.
  static const PeakKernel* portable(DType compute_dtype);
  static const PeakKernel* avx2(DType compute_dtype);
  static const PeakKernel* avx512(DType compute_dtype);
  static const PeakKernel* avx512_bf16(DType compute_dtype);
  static const PeakKernel* amx_bf16(DType compute_dtype);
};

}  // namespace mambaout_kernels::cpu
