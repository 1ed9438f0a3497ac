// A linear layer and its gradients on the CPU, fp32.
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/linear/arguments.h"
#include "common.h"
#include "registration.h"

namespace mambaout_kernels {
namespace {

void check_float32(const Tensor& tensor, const char* name) {
  check_cpu(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32; got ", tensor.scalar_type());
}

// (out_features, in_features), rows contiguous; a copy where they are not.
Tensor matrix(const Tensor& weight) {
  check_float32(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be (out_features, in_features); it has ", weight.dim(),
                  " dimensions");
  return last_dense(weight);
}

// (..., features) as (rows, features), rows contiguous.
Tensor rows_of(const Tensor& tensor, const char* name) {
  check_float32(tensor, name);
  STD_TORCH_CHECK(tensor.dim() > 0, name, " must have a dimension of features; got shape ()");
  if (tensor.dim() == 2) return last_dense(tensor);
  std::int64_t rows = 1;
  for (std::int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) rows *= tensor.size(dim);
  return last_dense(torch::stable::reshape(tensor, {rows, tensor.size(tensor.dim() - 1)}));
}
// The result with the leading dimensions of `like`.
Tensor with_leading(const Tensor& rows, const Tensor& like) {
  if (like.dim() == 2) return rows;
  std::vector<std::int64_t> sizes;
  for (std::int64_t dim = 0; dim + 1 < like.dim(); ++dim) sizes.push_back(like.size(dim));
  sizes.push_back(rows.size(1));
  return torch::stable::view(rows, sizes);
}
void check_features(const Tensor& rows, std::int64_t features, const char* name, const char* of) {
  STD_TORCH_CHECK(rows.size(1) == features, name, " must be (..., ", features, "), as ", of, "; its last dimension is ",
                  rows.size(1));
}
// Elements from one row to the next.
std::int64_t pitch(const Tensor& rows) { return rows.size(0) > 1 ? rows.stride(0) : rows.size(1); }
const float* data(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

// The product of a, or of its transpose, and b, or its transpose.
MatmulCall call_of(const Tensor& a, bool a_transposed, const Tensor& b, bool b_transposed) {
  MatmulCall call{};
  call.M = a.size(a_transposed ? 1 : 0);
  call.N = b.size(b_transposed ? 0 : 1);
  call.K = a.size(a_transposed ? 0 : 1);
  call.a = data(a);
  (a_transposed ? call.a_k : call.a_m) = pitch(a);
  (a_transposed ? call.a_m : call.a_k) = 1;
  call.b = data(b);
  (b_transposed ? call.b_n : call.b_k) = pitch(b);
  (b_transposed ? call.b_k : call.b_n) = 1;
  return call;
}

// out, as the call says but for where the result goes
Tensor product(MatmulCall call, const Tensor& like) {
  Tensor out = new_result(like, {call.M, call.N}, "the result");
  if (out.numel() == 0 && call.row_sums == nullptr) return out;
  call.out = static_cast<float*>(out.mutable_data_ptr());
  const int num_threads = static_cast<int>(torch::stable::get_num_threads());
  const Workspace workspace(cpu::matmul_workspace_bytes(call, num_threads));
  cpu::matmul(call, num_threads, workspace.data(), parallel_for);
  return out;
}

// stream_weight: x has few rows, so that reading weight takes longer than multiplying it.
Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, bool stream_weight) {
  const Tensor rows = rows_of(x, "x");
  weight = matrix(weight);
  check_features(rows, weight.size(1), "x", "weight's inputs");
  MatmulCall call = call_of(rows, false, weight, true);
  if (bias.has_value()) {
    check_float32(*bias, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == call.N, "bias must be (", call.N,
                    ",), as weight's outputs; got ", text_of(bias->sizes()));
    bias = dense(*bias);
    call.bias = data(*bias);
  }
  if (!stream_weight) return with_leading(product(call, rows), x);
  Tensor out = new_result(rows, {call.M, call.N}, "the result");
  call.out = static_cast<float*>(out.mutable_data_ptr());
  cpu::gemm_nt(as_gemm_nt(call), static_cast<int>(torch::stable::get_num_threads()), parallel_for);
  return with_leading(out, x);
}

// dx = dy weight
Tensor linear_dx(Tensor dy, Tensor weight) {
  const Tensor rows = rows_of(dy, "dy");
  weight = matrix(weight);
  check_features(rows, weight.size(0), "dy", "weight's outputs");
  return with_leading(product(call_of(rows, false, weight, false), rows), dy);
}

// dweight = dy^T x: (out_features, in_features);   dbias = sum dy
std::tuple<Tensor, Tensor> linear_dweight(Tensor dy, Tensor x) {
  check_float32(dy, "dy");
  check_float32(x, "x");
  bool alike = dy.dim() == x.dim();
  for (std::int64_t dim = 0; alike && dim + 1 < x.dim(); ++dim) alike = dy.size(dim) == x.size(dim);
  STD_TORCH_CHECK(alike, "dy must have the leading dimensions of x; got ", text_of(dy.sizes()), " and ",
                  text_of(x.sizes()));
  dy = rows_of(dy, "dy");
  x = rows_of(x, "x");
  MatmulCall call = call_of(dy, true, x, false);
  Tensor dbias = new_result(dy, {call.M}, "dbias");
  call.row_sums = static_cast<float*>(dbias.mutable_data_ptr());
  return {product(call, dy), dbias};
}

}  // namespace

void register_linear(const std::string& ops_namespace) {
  register_ops(
      ops_namespace, "CPU",
      [](StableLibrary& m) {
        m.def("linear(Tensor x, Tensor weight, Tensor? bias, bool stream_weight=False) -> Tensor");
        m.def("linear_dx(Tensor dy, Tensor weight) -> Tensor");
        m.def("linear_dweight(Tensor dy, Tensor x) -> (Tensor, Tensor)");
      },
      [](StableLibrary& m) {
        m.impl("linear", TORCH_BOX(&linear));
        m.impl("linear_dx", TORCH_BOX(&linear_dx));
        m.impl("linear_dweight", TORCH_BOX(&linear_dweight));
      });
}

}  // namespace mambaout_kernels
