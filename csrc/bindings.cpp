// The CPU half of the compiled module: the only file that sees torch or pybind11.
//
// The public op, its fake kernel and its gradients are Python's (mambaout_kernels/ops.py), and so are the messages for
// bad arguments; but everything is checked here too, before any memory is touched. libtorch's stable ABI only: one
// binary for every torch >= 2.10.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <memory>
#include <new>
#include <sstream>
#include <string>
#include <tuple>

#include "cpu/gated_dwconv_cpu.h"

namespace mambaout_kernels {
namespace {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

constexpr int kMaxFilter = 31;

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
}

void check_parameter(const Tensor& tensor, DType activations, const char* name) {
  check_cpu(tensor, name);
  const DType dtype = dtype_of(tensor, name);
  const bool low = activations == DType::kBFloat16 || activations == DType::kFloat16;
  STD_TORCH_CHECK(dtype == activations || (low && dtype == DType::kFloat32), name,
                  " must have the dtype of u, or float32 beside a low-precision u");
}

// The shape of a call, every size checked against every other.
GatedDwconvShape checked_shape(const Tensor& u, const Tensor& weight, const Tensor& bias, std::int64_t act) {
  check_cpu(u, "u");
  STD_TORCH_CHECK(u.dim() == 4 && u.size(3) % 2 == 0, "u must be (N, H, W, 2 * hidden)");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 1 && weight.size(2) == weight.size(3) &&
                      weight.size(2) % 2 == 1 && weight.size(2) <= kMaxFilter,
                  "weight must be (conv_channels, 1, K, K) with K odd, 1 to 31");
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), "bias must be (conv_channels,)");
  STD_TORCH_CHECK(weight.size(0) <= u.size(3) / 2, "weight must have at most hidden channels");
  STD_TORCH_CHECK(act >= 0 && act <= 3, "act must be 0 to 3");
  GatedDwconvShape shape;
  shape.N = u.size(0);
  shape.H = u.size(1);
  shape.W = u.size(2);
  shape.D = u.size(3) / 2;
  shape.C = weight.size(0);
  shape.K = static_cast<int>(weight.size(2));
  shape.act = static_cast<Act>(act);
  shape.dtype = dtype_of(u, "u");
  check_parameter(weight, shape.dtype, "weight");
  check_parameter(bias, shape.dtype, "bias");
  shape.weight_dtype = dtype_of(weight, "weight");
  shape.bias_dtype = dtype_of(bias, "bias");
  return shape;
}

Tensor channels_dense(const Tensor& tensor) {
  return tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}
Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

NhwcView view(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// A large new tensor is about to be written for the first time: ask for huge pages, so that Linux does it in hundreds
// of page faults less per MiB. A fault costs about what the op computes on the 4 KiB behind it.
constexpr std::uintptr_t kHugePage = 2 << 20;
void advise_huge_pages(const Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
  const std::uintptr_t end = begin + tensor.numel() * tensor.element_size();
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may fail
#else
  static_cast<void>(tensor);
#endif
}

// Scratch memory, kept by each calling thread for the next call while it is small; at 56 x 56 x 96 it is 0.5 MiB, and
// allocating that anew costs as much as a small op.
constexpr std::int64_t kKeptBytes = 8 << 20;
class Workspace {
 public:
  explicit Workspace(std::int64_t bytes) {
    thread_local std::unique_ptr<char[]> kept;
    thread_local std::int64_t kept_bytes = 0;
    if (bytes > kKeptBytes) {
      own_ = allocate(bytes);
      data_ = own_.get();
      return;
    }
    if (bytes > kept_bytes) {
      kept = allocate(bytes);
      kept_bytes = bytes;
    }
    data_ = kept.get();
  }
  void* data() const { return data_; }

 private:
  static std::unique_ptr<char[]> allocate(std::int64_t bytes) {
    std::unique_ptr<char[]> memory(new (std::nothrow) char[bytes]);
    STD_TORCH_CHECK(memory != nullptr, "not enough memory: gated_dwconv needs ", bytes, " bytes of workspace");
    return memory;
  }

  std::unique_ptr<char[]> own_;
  char* data_;
};

void parallel_for(std::int64_t count, cpu::RangeBody body, void* context) {
  torch::stable::parallel_for(0, count, 1, [=](std::int64_t begin, std::int64_t end) { body(context, begin, end); });
}

Tensor gated_dwconv(Tensor u, Tensor weight, Tensor bias, std::int64_t act) {
  const GatedDwconvShape shape = checked_shape(u, weight, bias, act);
  u = channels_dense(u);
  weight = dense(weight);
  bias = dense(bias);
  Tensor y = torch::stable::new_empty(u, {shape.N, shape.H, shape.W, shape.D});
  advise_huge_pages(y);
  const int num_threads = static_cast<int>(torch::stable::get_num_threads());
  const Workspace workspace(cpu::forward_workspace_bytes(shape, num_threads));
  cpu::forward({shape, view(u), weight.const_data_ptr(), bias.const_data_ptr(), y.mutable_data_ptr()}, num_threads,
               workspace.data(), parallel_for);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gated_dwconv_backward(Tensor dy, Tensor u, Tensor weight, Tensor bias,
                                                         std::int64_t act) {
  const GatedDwconvShape shape = checked_shape(u, weight, bias, act);
  check_cpu(dy, "dy");
  STD_TORCH_CHECK(
      dy.dim() == 4 && dy.size(0) == shape.N && dy.size(1) == shape.H && dy.size(2) == shape.W && dy.size(3) == shape.D,
      "dy must be (N, H, W, hidden), as y");
  STD_TORCH_CHECK(dtype_of(dy, "dy") == shape.dtype, "dy must have the dtype of u");
  dy = channels_dense(dy);
  u = channels_dense(u);
  weight = dense(weight);
  bias = dense(bias);
  Tensor du = torch::stable::new_empty(u, {shape.N, shape.H, shape.W, 2 * shape.D});
  Tensor dweight = torch::stable::new_empty(weight, {shape.C, 1, shape.K, shape.K});
  Tensor dbias = torch::stable::new_empty(bias, {shape.C});
  advise_huge_pages(du);
  const int num_threads = static_cast<int>(torch::stable::get_num_threads());
  const Workspace workspace(cpu::backward_workspace_bytes(shape, num_threads));
  cpu::backward({shape, view(dy), view(u), weight.const_data_ptr(), bias.const_data_ptr(), du.mutable_data_ptr(),
                 dweight.mutable_data_ptr(), dbias.mutable_data_ptr()},
                num_threads, workspace.data(), parallel_for);
  return {du, dweight, dbias};
}

constexpr cpu::Isa kIsas[] = {cpu::Isa::kPortable, cpu::Isa::kAvx2, cpu::Isa::kAvx512, cpu::Isa::kAvx512Bf16};

void set_cpu_capability(const std::string& name) {
  std::ostringstream allowed;
  for (const cpu::Isa isa : kIsas) {
    if (!cpu::supported(isa)) continue;
    if (name == cpu::isa_name(isa)) {
      cpu::set_isa(isa);
      return;
    }
    allowed << " " << cpu::isa_name(isa);
  }
  throw pybind11::value_error("name must be one of:" + allowed.str() + "; got '" + name + "'");
}

pybind11::list isa_names(bool (*wanted)(cpu::Isa)) {
  pybind11::list names;
  for (const cpu::Isa isa : kIsas) {
    if (wanted(isa)) names.append(cpu::isa_name(isa));
  }
  return names;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = MAMBAOUT_COMPILER;
  info["flags"] = MAMBAOUT_FLAGS;
  info["isas"] = isa_names(cpu::compiled);
  info["torch_built_with"] = MAMBAOUT_TORCH_VERSION;
  info["torch_at_least"] = "2.10";
  return info;
}

}  // namespace
}  // namespace mambaout_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(mambaout_kernels_native, m) {
  m.def("gated_dwconv_cpu(Tensor u, Tensor weight, Tensor bias, int act) -> Tensor");
  m.def(
      "gated_dwconv_backward_cpu(Tensor dy, Tensor u, Tensor weight, Tensor bias, int act) -> (Tensor, Tensor, "
      "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mambaout_kernels_native, CPU, m) {
  m.impl("gated_dwconv_cpu", TORCH_BOX(&mambaout_kernels::gated_dwconv));
  m.impl("gated_dwconv_backward_cpu", TORCH_BOX(&mambaout_kernels::gated_dwconv_backward));
}

PYBIND11_MODULE(_C, m) {
  using namespace mambaout_kernels;
  m.doc() = "Native CPU kernels of mambaout_kernels.";
  m.def("build_info", &build_info, "Compiler, flags, instruction sets and torch of this build.");
  m.def("cpu_capability", [] { return std::string(cpu::isa_name(cpu::current_isa())); }, "The instruction set in use.");
  m.def("set_cpu_capability", &set_cpu_capability, pybind11::arg("name"),
        "Uses another instruction set (for tests). Raises ValueError where the processor lacks it.");
  m.def(
      "supported_cpu_capabilities", [] { return isa_names(cpu::supported); },
      "The instruction sets compiled in that this processor runs.");
}
