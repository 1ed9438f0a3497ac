// The launch interface of the 3x3 convolution of stride 2 of the stem and between the stages, for inference: no torch.
//
//   out = act(layer_norm(bias + conv_3x3(x))),  stride 2, zero padding of 1    (N, ceil(H / 2), ceil(W / 2),
//   out_channels)
#pragma once

#include <cstdint>

#include "../../gated_dwconv.h"
#include "../gemm/packed_format.h"
#include "../parallel_for.h"

namespace mambaout_kernels {

struct Conv3x3s2Shape {
  std::int64_t in_channels, out_channels;
  bool normed;
  Act act;
  float eps;            // of the norm
  DType compute_dtype;  // what the matrix products multiply: kFloat32, or kBFloat16; sums are fp32
};

// The parameters, each contiguous and fp32.
template <typename Float>
struct Conv3x3s2ParametersOf {
  Float *weight, *bias;            // (out_channels, in_channels, 3, 3), (out_channels,)
  Float *norm_weight, *norm_bias;  // (out_channels,)
};
// To pack; a null bias, norm_weight or norm_bias is left out.
using Conv3x3s2Parameters = Conv3x3s2ParametersOf<const float>;
// To unpack to; none is null.
using MutableConv3x3s2Parameters = Conv3x3s2ParametersOf<float>;

struct Conv3x3s2Call {
  Conv3x3s2Shape shape;
  std::int64_t N, H, W;       // of x
  DType in_dtype, out_dtype;  // kFloat32 or kBFloat16
  NhwcView x;
  std::int64_t x_stride_c;
  const void* packed;  // what pack_conv3x3s2 wrote, 64-byte aligned
  void* out;           // contiguous

  std::int64_t out_height() const { return (H + 1) / 2; }
  std::int64_t out_width() const { return (W + 1) / 2; }
};

}  // namespace mambaout_kernels

namespace mambaout_kernels::cpu {

// Whether the instruction set in use multiplies this dtype: fp32 always, bf16 with avx512_bf16.
bool conv3x3s2_supports(DType compute_dtype);

// A call reads parameters in the format of the instruction set in use, conv3x3s2_packed_format; the caller compares.
// Packing and unpacking work for each of kPackedFormats on any processor: what is left out is packed as 1 (weights of
// the norm) or 0, and bf16 panels give back what they were rounded to. Packed memory is 64-byte aligned.
PackedFormat conv3x3s2_packed_format(const Conv3x3s2Shape& shape);
std::int64_t conv3x3s2_packed_bytes(const Conv3x3s2Shape& shape, PackedFormat format);
void pack_conv3x3s2(const Conv3x3s2Shape& shape, PackedFormat format, const Conv3x3s2Parameters& parameters,
                    void* packed);
void pack_conv3x3s2(const Conv3x3s2Shape& shape, const Conv3x3s2Parameters& parameters, void* packed);
void unpack_conv3x3s2(const Conv3x3s2Shape& shape, PackedFormat format, const void* packed,
                      const MutableConv3x3s2Parameters& parameters);

// Scratch memory in bytes, any alignment.
std::int64_t conv3x3s2_workspace_bytes(const Conv3x3s2Call& call, int num_threads);
void conv3x3s2_forward(const Conv3x3s2Call& call, int num_threads, void* workspace, ParallelFor parallel_for);

}  // namespace mambaout_kernels::cpu
