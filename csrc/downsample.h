// The launch interface of what stands between the stages, for inference: plain data, no torch.
//
//   out = act(layer_norm(bias + conv_3x3(x))),  stride 2, zero padding of 1    (N, ceil(H / 2), ceil(W / 2),
//   out_channels)
#pragma once

#include <cstdint>

#include "gated_dwconv.h"

namespace mambaout_kernels {

struct DownsampleShape {
  std::int64_t in_channels, out_channels;
  bool normed;
  Act act;
  float eps;         // of the norm
  DType multiplied;  // what the matrix products multiply: kFloat32, or kBFloat16; sums are fp32
};

// The parameters, each contiguous and fp32.
template <typename Float>
struct DownsampleParametersOf {
  Float *weight, *bias;            // (out_channels, in_channels, 3, 3), (out_channels,)
  Float *norm_weight, *norm_bias;  // (out_channels,)
};
// To pack; a null bias, norm_weight or norm_bias is left out.
using DownsampleParameters = DownsampleParametersOf<const float>;
// To unpack to; none is null.
using MutableDownsampleParameters = DownsampleParametersOf<float>;

struct DownsampleCall {
  DownsampleShape shape;
  std::int64_t N, H, W;       // of x
  DType in_dtype, out_dtype;  // kFloat32 or kBFloat16
  NhwcView x;
  std::int64_t x_stride_c;
  const void* packed;  // what pack_downsample wrote, 64-byte aligned
  void* out;           // contiguous

  std::int64_t out_height() const { return (H + 1) / 2; }
  std::int64_t out_width() const { return (W + 1) / 2; }
};

}  // namespace mambaout_kernels
