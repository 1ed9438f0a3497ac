// The op on the CPU.
//
// The public op, its fake kernel and its gradients are Python's (mambaout_kernels/ops/gated_dwconv.py), and so are the
// messages for bad arguments; but everything is checked here too, before any memory is touched.
#include <tuple>

#include "../cpu/gated_dwconv/arguments.h"
#include "gated_dwconv_checks.h"
#include "registration.h"

namespace mambaout_kernels {
namespace {

void check_all_cpu(const Tensor& u, const Tensor& weight, const Tensor& bias) {
  check_cpu(u, "u");
  check_cpu(weight, "weight");
  check_cpu(bias, "bias");
}

Tensor gated_dwconv(Tensor u, Tensor weight, Tensor bias, std::int64_t act) {
  check_all_cpu(u, weight, bias);
  const GatedDwconvShape shape = checked_shape(u, weight, bias, act);
  u = last_dense(u);
  weight = dense(weight);
  bias = dense(bias);
  Tensor y = new_result(u, {shape.N, shape.H, shape.W, shape.D}, "y");
  if (y.numel() == 0) return y;
  const int num_threads = static_cast<int>(torch::stable::get_num_threads());
  const Workspace workspace(cpu::forward_workspace_bytes(shape, num_threads));
  cpu::forward({shape, view(u), weight.const_data_ptr(), bias.const_data_ptr(), y.mutable_data_ptr()}, num_threads,
               workspace.data(), parallel_for);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gated_dwconv_backward(Tensor dy, Tensor u, Tensor weight, Tensor bias,
                                                         std::int64_t act) {
  check_all_cpu(u, weight, bias);
  const GatedDwconvShape shape = checked_shape(u, weight, bias, act);
  check_cpu(dy, "dy");
  check_gradient(dy, shape);
  dy = last_dense(dy);
  u = last_dense(u);
  weight = dense(weight);
  bias = dense(bias);
  Tensor du = new_result(u, {shape.N, shape.H, shape.W, 2 * shape.D}, "du");
  Tensor dweight = new_result(weight, {shape.C, 1, shape.K, shape.K}, "dweight");
  Tensor dbias = new_result(bias, {shape.C}, "dbias");
  if (du.numel() == 0) return {du, torch::stable::zero_(dweight), torch::stable::zero_(dbias)};
  const int num_threads = static_cast<int>(torch::stable::get_num_threads());
  const Workspace workspace(cpu::backward_workspace_bytes(shape, num_threads));
  cpu::backward({shape, view(dy), view(u), weight.const_data_ptr(), bias.const_data_ptr(), du.mutable_data_ptr(),
                 dweight.mutable_data_ptr(), dbias.mutable_data_ptr()},
                num_threads, workspace.data(), parallel_for);
  return {du, dweight, dbias};
}

}  // namespace

void register_gated_dwconv(const std::string& ops_namespace) {
  register_ops(
      ops_namespace, "CPU",
      [](StableLibrary& m) {
        m.def("gated_dwconv_cpu(Tensor u, Tensor weight, Tensor bias, int act) -> Tensor");
        m.def(
            "gated_dwconv_backward_cpu(Tensor dy, Tensor u, Tensor weight, Tensor bias, int act) -> (Tensor, Tensor, "
            "Tensor)");
      },
      [](StableLibrary& m) {
        m.impl("gated_dwconv_cpu", TORCH_BOX(&gated_dwconv));
        m.impl("gated_dwconv_backward_cpu", TORCH_BOX(&gated_dwconv_backward));
      });
}

}  // namespace mambaout_kernels
