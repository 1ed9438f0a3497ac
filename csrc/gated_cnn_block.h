// The launch interface of the whole block, for inference: plain data, no torch.
//
//   u = fc1(layer_norm(x)),  y = act(g) * concat(i, bias + dwconv_KxK(c))  as in gated_dwconv.h
//   out = x + scale * fc2(y)                                               (N, H, W, dim)
#pragma once

#include <cstdint>

#include "gated_dwconv.h"

namespace mambaout_kernels {

struct GatedCnnBlockShape {
  std::int64_t dim;
  std::int64_t D;  // hidden
  std::int64_t C;  // conv_channels, 0 <= C <= D
  int K;           // odd filter size, 1 .. 31
  Act act;
  float eps;         // of the norm
  DType multiplied;  // what the matrix products multiply: kFloat32, or kBFloat16; sums are fp32
};

// The parameters, each contiguous and fp32.
template <typename Float>
struct GatedCnnBlockParametersOf {
  Float *norm_weight, *norm_bias;  // (dim,)
  Float *fc1_weight, *fc1_bias;    // (2D, dim), (2D,)
  Float *conv_weight, *conv_bias;  // (C, 1, K, K), (C,)
  Float *fc2_weight, *fc2_bias;    // (dim, D), (dim,)
  Float* scale;                    // (dim,)
};
// To pack; a null norm_weight, norm_bias, bias or scale is left out.
using GatedCnnBlockParameters = GatedCnnBlockParametersOf<const float>;
// To unpack to; none is null.
using MutableGatedCnnBlockParameters = GatedCnnBlockParametersOf<float>;

struct GatedCnnBlockCall {
  GatedCnnBlockShape shape;
  std::int64_t N, H, W;
  DType dtype;  // of x and out: kFloat32 or kBFloat16
  NhwcView x;
  const void* packed;  // what pack_block wrote, 64-byte aligned
  void* out;           // (N, H, W, dim) contiguous
};

}  // namespace mambaout_kernels
