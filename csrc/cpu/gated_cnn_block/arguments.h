// The launch interface of the whole block, for inference: no torch.
//
//   u = fc1(layer_norm(x)),  y = act(g) * concat(i, bias + dwconv_KxK(c))  as in gated_dwconv.h
//   out = x + scale * fc2(y)                                               (N, H, W, dim)
#pragma once

#include <cstdint>

#include "../../gated_dwconv.h"
#include "../gemm/packed_format.h"
#include "../parallel_for.h"

namespace mambaout_kernels {

struct GatedCnnBlockShape {
  std::int64_t dim;
  std::int64_t D;  // hidden
  std::int64_t C;  // conv_channels, 0 <= C <= D
  int K;           // odd filter size, 1 .. kMaxKernelSize
  Act act;
  float eps;            // of the norm
  DType compute_dtype;  // what the matrix products multiply: kFloat32, or kBFloat16; sums are fp32
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

namespace mambaout_kernels::cpu {

// Whether the instruction set in use multiplies this dtype: fp32 always, bf16 with avx512_bf16.
bool block_supports(DType compute_dtype);

// A call reads parameters in the format of the instruction set in use, block_packed_format; the caller compares.
// Packing and unpacking work for each of kPackedFormats on any processor: what is left out is packed as 1 (weights of
// the norm, scale) or 0, and bf16 panels give back what they were rounded to. Packed memory is 64-byte aligned.
PackedFormat block_packed_format(const GatedCnnBlockShape& shape);
std::int64_t block_packed_bytes(const GatedCnnBlockShape& shape, PackedFormat format);
void pack_block(const GatedCnnBlockShape& shape, PackedFormat format, const GatedCnnBlockParameters& parameters,
                void* packed);
void pack_block(const GatedCnnBlockShape& shape, const GatedCnnBlockParameters& parameters, void* packed);
void unpack_block(const GatedCnnBlockShape& shape, PackedFormat format, const void* packed,
                  const MutableGatedCnnBlockParameters& parameters);

// Scratch memory in bytes, any alignment.
std::int64_t block_workspace_bytes(const GatedCnnBlockCall& call, int num_threads);
void block_forward(const GatedCnnBlockCall& call, int num_threads, void* workspace, ParallelFor parallel_for);

}  // namespace mambaout_kernels::cpu
