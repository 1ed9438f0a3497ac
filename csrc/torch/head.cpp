// A classifier's head on the CPU, for inference.
#include <optional>

#include "../cpu/head/arguments.h"
#include "common.h"
#include "registration.h"

namespace mambaout_kernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check_parameter(const Tensor& tensor, ScalarType dtype, const char* name) {
  check_cpu(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must have fc1_weight's dtype, ", dtype, "; got ",
                  tensor.scalar_type());
}

// (count,), dense.
OptionalTensor vector(const OptionalTensor& tensor, std::int64_t count, ScalarType dtype, const char* name) {
  if (!tensor.has_value()) return tensor;
  check_parameter(*tensor, dtype, name);
  check_shape(*tensor, {count}, name);
  return dense(*tensor);
}
// (rows, columns), the columns dense.
Tensor matrix(const Tensor& tensor, std::int64_t columns, ScalarType dtype, const char* name) {
  check_parameter(tensor, dtype, name);
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) == columns && tensor.size(0) > 0, name,
                  " must have shape (outputs, ", columns, "), outputs 1 or more; got ", text_of(tensor.sizes()));
  return last_dense(tensor);
}
const void* data(const OptionalTensor& tensor) { return tensor.has_value() ? tensor->const_data_ptr() : nullptr; }

Tensor head(Tensor x, OptionalTensor norm_weight, OptionalTensor norm_bias, Tensor fc1_weight, OptionalTensor fc1_bias,
            OptionalTensor mid_weight, OptionalTensor mid_bias, OptionalTensor fc2_weight, OptionalTensor fc2_bias,
            double eps, double mid_eps, bool mid_normed, ScalarType out_dtype) {
  check_cpu(x, "x");
  check_cpu(fc1_weight, "fc1_weight");
  STD_TORCH_CHECK(fc1_weight.dim() == 2 && fc1_weight.numel() > 0, "fc1_weight must be (hidden, channels); got ",
                  text_of(fc1_weight.sizes()));
  HeadCall call{};
  call.hidden = fc1_weight.size(0);
  call.C = fc1_weight.size(1);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(3) == call.C && x.size(1) > 0 && x.size(2) > 0, "x must be (N, H, W, ", call.C,
                  "), as fc1_weight's inputs, H and W of 1 or more; got ", text_of(x.sizes()));
  STD_TORCH_CHECK(out_dtype == ScalarType::Float || out_dtype == ScalarType::BFloat16,
                  "dtype must be float32 or bfloat16; got ", out_dtype);
  call.N = x.size(0);
  call.H = x.size(1);
  call.W = x.size(2);
  call.in_dtype = float_or_bfloat16(x, "x");
  const ScalarType dtype = fc1_weight.scalar_type();
  call.parameter_dtype = float_or_bfloat16(fc1_weight, "fc1_weight");
  x = last_dense(x);
  call.x = view(x);

  fc1_weight = matrix(fc1_weight, call.C, dtype, "fc1_weight");
  norm_weight = vector(norm_weight, call.C, dtype, "norm_weight");
  norm_bias = vector(norm_bias, call.C, dtype, "norm_bias");
  fc1_bias = vector(fc1_bias, call.hidden, dtype, "fc1_bias");
  mid_weight = vector(mid_weight, call.hidden, dtype, "mid_weight");
  mid_bias = vector(mid_bias, call.hidden, dtype, "mid_bias");
  if (fc2_weight.has_value()) {
    fc2_weight = matrix(*fc2_weight, call.hidden, dtype, "fc2_weight");
    call.classes = fc2_weight->size(0);
    fc2_bias = vector(fc2_bias, call.classes, dtype, "fc2_bias");
    call.fc2 = {fc2_weight->const_data_ptr(), fc2_weight->stride(0), data(fc2_bias)};
  }
  call.norm = {data(norm_weight), data(norm_bias), static_cast<float>(eps)};
  call.fc1 = {fc1_weight.const_data_ptr(), fc1_weight.stride(0), data(fc1_bias)};
  call.mid_normed = mid_normed;
  call.mid_norm = {data(mid_weight), data(mid_bias), static_cast<float>(mid_eps)};

  call.out_dtype = out_dtype == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat32;
  check_sizes({call.N, std::max(call.C, call.hidden)}, "fc1_weight's outputs");
  Tensor out = new_result(x, {call.N, call.classes > 0 ? call.classes : call.hidden}, "the result", out_dtype);
  if (call.N == 0) return out;
  call.out = out.mutable_data_ptr();
  const Workspace workspace(cpu::head_workspace_bytes(call));
  cpu::head_forward(call, static_cast<int>(torch::stable::get_num_threads()), workspace.data(), parallel_for);
  return out;
}

}  // namespace

void register_head(const std::string& ops_namespace) {
  register_ops(
      ops_namespace, "CPU",
      [](StableLibrary& m) {
        m.def(
            "head(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, Tensor? fc1_bias, Tensor? "
            "mid_weight, Tensor? mid_bias, Tensor? fc2_weight, Tensor? fc2_bias, float eps, float mid_eps, bool "
            "mid_normed, ScalarType dtype) -> Tensor");
      },
      [](StableLibrary& m) { m.impl("head", TORCH_BOX(&head)); });
}

}  // namespace mambaout_kernels
