// A classifier's head: what one translation unit per instruction set offers to dispatch.cpp. Plain data; no
// template, no STL.
#pragma once

#include "arguments.h"

namespace mambaout_kernels::cpu {

struct HeadKernels {
  int lanes;
  // to[C] = the mean of image n's pixels
  void (*pool)(const HeadCall& call, std::int64_t n, float* to);
  // layer_norm in place; weight and bias are padded to whole vectors
  void (*norm)(float* row, std::int64_t count, float eps, const float* weight, const float* bias);

  // See select_kernels.h.
  static const HeadKernels* portable();
  static const HeadKernels* avx2();
  static const HeadKernels* avx512();
  static const HeadKernels* avx512_bf16();
  static const HeadKernels* amx_bf16();
};

}  // namespace mambaout_kernels::cpu
