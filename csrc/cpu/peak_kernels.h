// The most multiply-adds a core does: what one translation unit per instruction set offers to peak.cpp. Plain data; no
// template, no STL.
#pragma once

#include "../gated_dwconv.h"

namespace mambaout_kernels::cpu {

struct PeakKernel {
  std::int64_t flops;  // of one pass; a multiply-add counts as two
  float (*run)(std::int64_t passes);
};

const PeakKernel* peak_portable(DType multiplied);     // null but for fp32 products
const PeakKernel* peak_avx2(DType multiplied);         // null but for fp32 products
const PeakKernel* peak_avx512(DType multiplied);       // null but for fp32 products
const PeakKernel* peak_avx512_bf16(DType multiplied);  // null but for bf16 products

}  // namespace mambaout_kernels::cpu
