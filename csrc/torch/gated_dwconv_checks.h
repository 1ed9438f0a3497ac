// What gated_dwconv takes, on the CPU and on CUDA. Every size is checked against every other before memory is touched.
#pragma once

#include "../gated_dwconv.h"
#include "common.h"

namespace mambaout_kernels {
namespace {

inline void check_parameter_dtype(const Tensor& tensor, DType activations, const char* name) {
  const DType dtype = dtype_of(tensor, name);
  const bool low = activations == DType::kBFloat16 || activations == DType::kFloat16;
  STD_TORCH_CHECK(dtype == activations || (low && dtype == DType::kFloat32), name,
                  " must have the dtype of u, or float32 beside a low-precision u; got ", tensor.scalar_type());
}

inline GatedDwconvShape checked_shape(const Tensor& u, const Tensor& weight, const Tensor& bias, std::int64_t act) {
  STD_TORCH_CHECK(u.dim() == 4 && u.size(3) % 2 == 0, "u must be (N, H, W, 2 * hidden); got ", text_of(u.sizes()));
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 1 && weight.size(2) == weight.size(3) &&
                      weight.size(2) % 2 == 1 && weight.size(2) <= kMaxKernelSize,
                  "weight must be (conv_channels, 1, K, K) with K odd, 1 to ", kMaxKernelSize, "; got ",
                  text_of(weight.sizes()));
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), "bias must be (conv_channels,), as weight's ",
                  weight.size(0), "; got ", text_of(bias.sizes()));
  STD_TORCH_CHECK(weight.size(0) <= u.size(3) / 2, "weight must have at most hidden channels, ", u.size(3) / 2,
                  "; got ", weight.size(0));
  STD_TORCH_CHECK(act >= 0 && act <= 3, "act must be 0 to 3; got ", act);
  GatedDwconvShape shape;
  shape.N = u.size(0);
  shape.H = u.size(1);
  shape.W = u.size(2);
  shape.D = u.size(3) / 2;
  shape.C = weight.size(0);
  shape.K = static_cast<int>(weight.size(2));
  shape.act = static_cast<Act>(act);
  shape.dtype = dtype_of(u, "u");
  check_parameter_dtype(weight, shape.dtype, "weight");
  check_parameter_dtype(bias, shape.dtype, "bias");
  shape.weight_dtype = dtype_of(weight, "weight");
  shape.bias_dtype = dtype_of(bias, "bias");
  return shape;
}

inline void check_gradient(const Tensor& dy, const GatedDwconvShape& shape) {
  STD_TORCH_CHECK(
      dy.dim() == 4 && dy.size(0) == shape.N && dy.size(1) == shape.H && dy.size(2) == shape.W && dy.size(3) == shape.D,
      "dy must be (N, H, W, hidden), as y; got ", text_of(dy.sizes()));
  STD_TORCH_CHECK(dtype_of(dy, "dy") == shape.dtype, "dy must have the dtype of u");
}

}  // namespace
}  // namespace mambaout_kernels
