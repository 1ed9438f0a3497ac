// A classifier's head: what one translation unit per instruction set offers to head_dispatch.cpp. Plain data; no
// template, no STL.
#pragma once

#include "../head.h"

namespace mambaout_kernels::cpu {

struct HeadKernels {
  int lanes;
  // to[C] = the mean of image n's pixels
  void (*pool)(const HeadCall& call, std::int64_t n, float* to);
  // layer_norm in place; weight and bias are padded to whole vectors
  void (*norm)(float* row, std::int64_t count, float eps, const float* weight, const float* bias);
};

const HeadKernels* head_kernels_portable();
const HeadKernels* head_kernels_avx2();
const HeadKernels* head_kernels_avx512();

}  // namespace mambaout_kernels::cpu
