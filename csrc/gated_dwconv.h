// The launch interface: plain data, no torch. Every backend written in C++ is called through it.
//
//   u = [gate g | identity i | conv c], (N, H, W, 2D), D channels of gate, D - C of identity, C of conv
//   s = concat(i, bias + dwconv_KxK(c))            zero padding of R = K / 2
//   y = act(g) * s                                 (N, H, W, D)
#pragma once

#include <cstdint>

namespace mambaout_kernels {

enum class Act : int { kGelu = 0, kGeluTanh = 1, kSilu = 2, kIdentity = 3 };

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

constexpr int kMaxKernelSize = 31;

// Strides are in elements; the channel stride is always 1.
struct NhwcView {
  const void* data;
  std::int64_t stride_n, stride_h, stride_w;
};

struct GatedDwconvShape {
  std::int64_t N, H, W;
  std::int64_t D;  // hidden
  std::int64_t C;  // conv_channels, 0 <= C <= D
  int K;           // odd filter size, 1 .. kMaxKernelSize
  Act act;
  DType dtype;         // of u, y, dy, du
  DType weight_dtype;  // of weight, dweight: dtype, or kFloat32
  DType bias_dtype;    // of bias, dbias: dtype, or kFloat32
};

struct GatedDwconvForward {
  GatedDwconvShape shape;
  NhwcView u;
  const void* weight;  // (C, 1, K, K) contiguous
  const void* bias;    // (C,)
  void* y;             // (N, H, W, D) contiguous
};

struct GatedDwconvBackward {
  GatedDwconvShape shape;
  NhwcView dy;
  NhwcView u;
  const void* weight;
  const void* bias;
  void* du;       // (N, H, W, 2D) contiguous
  void* dweight;  // (C, 1, K, K) contiguous
  void* dbias;    // (C,)
};

}  // namespace mambaout_kernels
