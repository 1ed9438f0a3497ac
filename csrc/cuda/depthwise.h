// The depthwise convolution alone, on CUDA: plain data, no torch and no CUDA header.
//
//   s = dwconv_KxK(x) + bias   zero padding of R = K / 2
#pragma once

#include "gated_dwconv_cuda.h"

namespace mambaout_kernels::cuda {

constexpr int kDepthwiseKernelSize = 7;  // the only one

struct DepthwiseShape {
  std::int64_t N, H, W, C;
  int K;
  DType dtype;         // of x and s
  DType weight_dtype;  // dtype, or kFloat32
  DType bias_dtype;    // likewise
};

struct Depthwise {
  DepthwiseShape shape;
  const void* x;           // (N, H, W, C), channels dense
  std::int64_t x_spacing;  // elements from one pixel to the next, all evenly spaced
  const void* weight;      // (C, 1, K, K) contiguous
  const void* bias;        // (C,), or null: none
  void* s;                 // (N, H, W, C), channels dense
  std::int64_t s_spacing;  // as x_spacing
  bool flipped;            // the filter rotated by 180 degrees
};

// No fp64; K of kDepthwiseKernelSize; C up to kMostChannels; up to kMostPixels pixels, and fewer than 2^31 values in a
// row of s.
bool supported(const DepthwiseShape& shape);
// Whether every pixel of x, and of a contiguous s, begins and ends at a multiple of 16 bytes. x_spacing: up to
// kMostSpacing.
bool aligned(const DepthwiseShape& shape, const void* x, std::int64_t x_spacing);

LaunchPlan depthwise_plan(const DepthwiseShape& shape, const Device& device);
// As forward() in gated_dwconv_cuda.h. The shape is supported, and x and s are aligned.
void depthwise(const Depthwise& call, const Device& device, void* stream);

}  // namespace mambaout_kernels::cuda
