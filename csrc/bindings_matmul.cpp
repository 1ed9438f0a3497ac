// A linear layer's products in training on the CPU, fp32.
#include <tuple>

#include "bindings_common.h"
#include "cpu/linear/arguments.h"

namespace mambaout_kernels {
namespace {

// A matrix whose rows are contiguous; a copy where they are not.
Tensor matrix(const Tensor& tensor, const char* name) {
  check_cpu(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, has ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
  return last_dense(tensor);
}
const float* data(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

// The product of a, or of a turned, and b, or b turned.
MatmulCall call_of(const Tensor& a, bool a_turned, const Tensor& b, bool b_turned) {
  MatmulCall call{};
  call.M = a.size(a_turned ? 1 : 0);
  call.N = b.size(b_turned ? 0 : 1);
  call.K = a.size(a_turned ? 0 : 1);
  call.a = data(a);
  (a_turned ? call.a_k : call.a_m) = a.stride(0);
  (a_turned ? call.a_m : call.a_k) = 1;
  call.b = data(b);
  (b_turned ? call.b_n : call.b_k) = b.stride(0);
  (b_turned ? call.b_k : call.b_n) = 1;
  return call;
}

// out, as the call says but for where the result goes
Tensor product(MatmulCall call, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {call.M, call.N});
  advise_huge_pages(out);
  call.out = static_cast<float*>(out.mutable_data_ptr());
  const int num_threads = static_cast<int>(torch::stable::get_num_threads());
  const Workspace workspace(cpu::matmul_workspace_bytes(call, num_threads));
  cpu::matmul(call, num_threads, workspace.data(), parallel_for);
  return out;
}

// x (M, K), weight (N, K), bias (N) or empty: (M, N). used_once: weight is, or a few times at most.
Tensor linear(Tensor x, Tensor weight, Tensor bias, bool used_once) {
  x = matrix(x, "x");
  weight = matrix(weight, "weight");
  STD_TORCH_CHECK(x.size(1) == weight.size(1), "x and weight must have as many columns: ", x.size(1), " and ",
                  weight.size(1));
  MatmulCall call = call_of(x, false, weight, true);
  if (bias.numel() > 0) {
    check_cpu(bias, "bias");
    STD_TORCH_CHECK(bias.scalar_type() == ScalarType::Float && bias.dim() == 1 && bias.size(0) == call.N,
                    "bias must be float32, (", call.N, ")");
    bias = dense(bias);
    call.bias = data(bias);
  }
  if (!used_once) return product(call, x);
  Tensor out = torch::stable::new_empty(x, {call.M, call.N});
  call.out = static_cast<float*>(out.mutable_data_ptr());
  cpu::gemm_nt(as_gemm_nt(call), static_cast<int>(torch::stable::get_num_threads()), parallel_for);
  return out;
}

// dx = dy weight: (M, K), of dy (M, N) and weight (N, K)
Tensor linear_dx(Tensor dy, Tensor weight) {
  dy = matrix(dy, "dy");
  weight = matrix(weight, "weight");
  STD_TORCH_CHECK(dy.size(1) == weight.size(0), "dy must have as many columns as weight has rows: ", dy.size(1),
                  " and ", weight.size(0));
  const MatmulCall call = call_of(dy, false, weight, false);
  return product(call, dy);
}

// dweight = dy^T x: (N, K), of dy (M, N) and x (M, K);   dbias = sum dy: (N)
std::tuple<Tensor, Tensor> linear_dweight(Tensor dy, Tensor x) {
  dy = matrix(dy, "dy");
  x = matrix(x, "x");
  STD_TORCH_CHECK(dy.size(0) == x.size(0), "dy and x must have as many rows: ", dy.size(0), " and ", x.size(0));
  MatmulCall call = call_of(dy, true, x, false);
  Tensor dbias = torch::stable::new_empty(dy, {call.M});
  call.row_sums = static_cast<float*>(dbias.mutable_data_ptr());
  return {product(call, dy), dbias};
}

}  // namespace
}  // namespace mambaout_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(mambaout_kernels_native, m) {
  m.def("linear_cpu(Tensor x, Tensor weight, Tensor bias, bool used_once) -> Tensor");
  m.def("linear_dx_cpu(Tensor dy, Tensor weight) -> Tensor");
  m.def("linear_dweight_cpu(Tensor dy, Tensor x) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mambaout_kernels_native, CPU, m) {
  m.impl("linear_cpu", TORCH_BOX(&mambaout_kernels::linear));
  m.impl("linear_dx_cpu", TORCH_BOX(&mambaout_kernels::linear_dx));
  m.impl("linear_dweight_cpu", TORCH_BOX(&mambaout_kernels::linear_dweight));
}
