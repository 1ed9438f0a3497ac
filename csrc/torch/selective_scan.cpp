// The selective scan on the CPU. The public op, its fake kernel and its gradient are Python's
// (mambaout_kernels/comparators/selective_scan.py).
#include <limits>
#include <tuple>
#include <vector>

#include "../cpu/selective_scan/arguments.h"
#include "common.h"
#include "registration.h"

namespace mambaout_kernels {
namespace {

constexpr std::int64_t kMostStates = 256;

// The tensors of a call, in the layout that the kernels read, kept alive.
struct ScanTensors {
  Tensor x, delta, A, B, C, skip, delta_bias, order;
};

ScanView scan_view(const Tensor& t) { return {t.const_data_ptr(), step_of(t, 0), step_of(t, 1), step_of(t, 2)}; }

void check_float(const Tensor& tensor, Sizes shape, const char* name) {
  check_cpu(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32; got ", tensor.scalar_type());
  check_shape(tensor, shape, name);
}
void check_tokens(const Tensor& tensor, ScalarType dtype, Sizes shape, const char* name) {
  check_cpu(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must have x's dtype, ", dtype, "; got ", tensor.scalar_type());
  check_shape(tensor, shape, name);
}

// Checks the arguments, makes them dense where they have to be, and describes them.
ScanCall describe(ScanTensors& t) {
  check_cpu(t.x, "x");
  check_cpu(t.delta, "delta");
  check_cpu(t.A, "A");
  const ScalarType dtype = t.x.scalar_type();
  ScanCall call{};
  call.dtype = dtype_of(t.x, "x");
  STD_TORCH_CHECK(call.dtype != DType::kFloat64, "x must be float32, bfloat16 or float16; got ", dtype);
  STD_TORCH_CHECK(t.delta.dim() == 4 && t.delta.size(1) > 0 && t.delta.size(2) > 0 && t.delta.size(3) > 0,
                  "delta must be (N, G, L, D), G, L and D of 1 or more; got ", text_of(t.delta.sizes()));
  call.N = t.delta.size(0);
  call.G = t.delta.size(1);
  call.L = t.delta.size(2);
  call.D = t.delta.size(3);
  STD_TORCH_CHECK(call.L <= std::numeric_limits<std::int32_t>::max(), "delta must have at most 2^31 - 1 tokens");
  STD_TORCH_CHECK(t.A.dim() == 3 && t.A.size(2) >= 1 && t.A.size(2) <= kMostStates, "A must be (G, D, S), S of 1 to ",
                  kMostStates, "; got ", text_of(t.A.sizes()));
  call.S = t.A.size(2);
  STD_TORCH_CHECK(t.x.dim() == 4 && (t.x.size(1) == 1 || t.x.size(1) == call.G), "x must be (N, 1 or G, L, D), ",
                  "as delta ", text_of(t.delta.sizes()), "; got ", text_of(t.x.sizes()));
  call.shared = t.x.size(1) == 1;
  check_shape(t.x, {call.N, t.x.size(1), call.L, call.D}, "x");
  check_tokens(t.delta, dtype, {call.N, call.G, call.L, call.D}, "delta");
  check_float(t.A, {call.G, call.D, call.S}, "A");
  check_tokens(t.B, dtype, {call.N, call.G, call.L, call.S}, "B");
  check_tokens(t.C, dtype, {call.N, call.G, call.L, call.S}, "C");
  check_float(t.skip, {call.G, call.D}, "skip");
  check_float(t.delta_bias, {call.G, call.D}, "delta_bias");
  check_cpu(t.order, "order");
  STD_TORCH_CHECK(t.order.scalar_type() == ScalarType::Int, "order must be int32; got ", t.order.scalar_type());
  check_shape(t.order, {call.G, call.L}, "order");
  // What the kernels need of memory besides the tensors has sizes of these products.
  check_sizes({call.N, call.G, call.L, call.D}, "delta");
  check_sizes({std::max<std::int64_t>(call.N, 1), call.G, call.L + call.D + 64, call.S + 2}, "B");

  t.x = last_dense(t.x);
  t.delta = last_dense(t.delta);
  t.A = dense(t.A);
  t.B = last_dense(t.B);
  t.C = last_dense(t.C);
  t.skip = dense(t.skip);
  t.delta_bias = dense(t.delta_bias);
  t.order = dense(t.order);
  call.x = scan_view(t.x);
  call.delta = scan_view(t.delta);
  call.B = scan_view(t.B);
  call.C = scan_view(t.C);
  call.A = static_cast<const float*>(t.A.const_data_ptr());
  call.skip = static_cast<const float*>(t.skip.const_data_ptr());
  call.delta_bias = static_cast<const float*>(t.delta_bias.const_data_ptr());
  call.order = static_cast<const std::int32_t*>(t.order.const_data_ptr());
  std::vector<std::int32_t> visited(call.L);
  const std::int64_t bad = cpu::first_bad_order(call.order, call.G, call.L, visited.data());
  STD_TORCH_CHECK(bad < 0, "order must visit each of ", call.L, " tokens once; scan ", bad, " of ", call.G,
                  " does not");
  return call;
}

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

Tensor selective_scan(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor skip, Tensor delta_bias,
                      Tensor order) {
  ScanTensors tensors{x, delta, A, B, C, skip, delta_bias, order};
  ScanForwardCall call{describe(tensors), nullptr};
  Tensor y = new_result(x, {call.N, x.size(1), call.L, call.D}, "y");
  if (call.N == 0) return y;
  call.y = y.mutable_data_ptr();
  const int num_threads = threads();
  const Workspace workspace(cpu::selective_scan_workspace_bytes(call, num_threads));
  cpu::selective_scan(call, num_threads, workspace.data(), parallel_for);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    Tensor dy, Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor skip, Tensor delta_bias, Tensor order) {
  ScanTensors tensors{x, delta, A, B, C, skip, delta_bias, order};
  ScanBackwardCall call{};
  static_cast<ScanCall&>(call) = describe(tensors);
  check_tokens(dy, x.scalar_type(), {call.N, x.size(1), call.L, call.D}, "dy");
  dy = last_dense(dy);
  call.dy = scan_view(dy);
  Tensor dx = new_result(x, {call.N, x.size(1), call.L, call.D}, "dx");
  Tensor ddelta = new_result(x, {call.N, call.G, call.L, call.D}, "ddelta");
  Tensor dA = new_result(tensors.A, {call.G, call.D, call.S}, "dA");
  Tensor dB = new_result(x, {call.N, call.G, call.L, call.S}, "dB");
  Tensor dC = new_result(x, {call.N, call.G, call.L, call.S}, "dC");
  Tensor dskip = new_result(tensors.skip, {call.G, call.D}, "dskip");
  Tensor dbias = new_result(tensors.skip, {call.G, call.D}, "ddelta_bias");
  if (call.N == 0) {
    return {dx, ddelta, torch::stable::zero_(dA), dB, dC, torch::stable::zero_(dskip), torch::stable::zero_(dbias)};
  }
  call.dx = dx.mutable_data_ptr();
  call.ddelta = ddelta.mutable_data_ptr();
  call.dA = static_cast<float*>(dA.mutable_data_ptr());
  call.dB = dB.mutable_data_ptr();
  call.dC = dC.mutable_data_ptr();
  call.dskip = static_cast<float*>(dskip.mutable_data_ptr());
  call.ddelta_bias = static_cast<float*>(dbias.mutable_data_ptr());
  const int num_threads = threads();
  const Workspace workspace(cpu::selective_scan_backward_workspace_bytes(call, num_threads));
  cpu::selective_scan_backward(call, num_threads, workspace.data(), parallel_for);
  return {dx, ddelta, dA, dB, dC, dskip, dbias};
}

}  // namespace

void register_selective_scan(const std::string& ops_namespace) {
  register_ops(
      ops_namespace, "CPU",
      [](StableLibrary& m) {
        m.def(
            "selective_scan_cpu(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor skip, Tensor delta_bias, "
            "Tensor order) -> Tensor");
        m.def(
            "selective_scan_backward_cpu(Tensor dy, Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor skip, "
            "Tensor delta_bias, Tensor order) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
      },
      [](StableLibrary& m) {
        m.impl("selective_scan_cpu", TORCH_BOX(&selective_scan));
        m.impl("selective_scan_backward_cpu", TORCH_BOX(&selective_scan_backward));
      });
}

}  // namespace mambaout_kernels
