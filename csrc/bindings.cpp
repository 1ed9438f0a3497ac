// The op on the CPU, and the Python module. With bindings_block.cpp the only file that sees torch.
//
// The public op, its fake kernel and its gradients are Python's (mambaout_kernels/ops.py), and so are the messages for
// bad arguments; but everything is checked here too, before any memory is touched. libtorch's stable ABI only: one
// binary for every torch >= 2.10.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "bindings_common.h"
#include "cpu/gated_cnn_block/arguments.h"
#include "cpu/gated_dwconv/arguments.h"
#include "cpu/isa.h"
#include "cpu/peak/arguments.h"
#include "snapshot.h"

namespace mambaout_kernels {
namespace {

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
                      weight.size(2) % 2 == 1 && weight.size(2) <= kMaxKernelSize,
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

Tensor gated_dwconv(Tensor u, Tensor weight, Tensor bias, std::int64_t act) {
  const GatedDwconvShape shape = checked_shape(u, weight, bias, act);
  u = last_dense(u);
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
  dy = last_dense(dy);
  u = last_dense(u);
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

// Of every thread of torch's, all of them at work at once. Fewer where torch runs fewer, as inside another parallel
// region.
std::vector<double> fma_flops(bool bf16, double milliseconds) {
  if (!(milliseconds > 0 && milliseconds <= 10000)) {
    throw pybind11::value_error("milliseconds must be above 0, at most 10000; got " + std::to_string(milliseconds));
  }
  struct Context {
    DType multiplied;
    double seconds;
    std::vector<double> rates;
  } context{bf16 ? DType::kBFloat16 : DType::kFloat32, milliseconds / 1000,
            std::vector<double>(torch::stable::get_num_threads())};
  if (!cpu::block_supports(context.multiplied)) {
    throw pybind11::value_error("bf16 must be False: the instruction set in use multiplies no bfloat16");
  }
  parallel_for(
      static_cast<std::int64_t>(context.rates.size()),
      [](void* opaque, std::int64_t begin, std::int64_t) {
        auto& c = *static_cast<Context*>(opaque);
        c.rates[begin] = cpu::fma_flops(c.multiplied, c.seconds);
      },
      &context);
  std::erase(context.rates, 0.0);
  return context.rates;
}

// glibc gives freed memory back to the system once more of it lies at the end of the heap than twice the largest block
// that was ever mapped on its own and freed; at first that is 256 KiB. A model's next call then faults its outputs in
// again, page by page: 1,400 faults for an image, 2 ms of 42. One such block, never touched, raises the limit to 64
// MiB. Who has set a limit (mallopt, MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_) keeps it.
void keep_freed_memory() {
  constexpr std::size_t kLargestMapped = (32 << 20) - (64 << 10);  // just below the most that glibc takes into account
  void* volatile block = std::malloc(kLargestMapped);              // volatile: it has to be asked for
  std::free(block);
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
  keep_freed_memory();
  m.def("build_info", &build_info, "Compiler, flags, instruction sets and torch of this build.");
  m.def("fingerprint", &fingerprint, pybind11::arg("memory"),
        "A hash of samples of each (address, bytes, _) of memory, which must be readable.");
  pybind11::class_<Snapshot>(m, "Snapshot", "What Python objects were; it holds no references to them.")
      .def(pybind11::init<const pybind11::list&, const pybind11::list&, const pybind11::list&, const pybind11::list&,
                          Memory>(),
           pybind11::arg("entries"), pybind11::arg("types"), pybind11::arg("sizes"), pybind11::arg("tensors"),
           pybind11::arg("memory"),
           "Of every (dict, key, value) of entries (Ellipsis: no such key), (object, type) of types, (container, "
           "size) of sizes, (tensor, data_ptr, _version or None, dtype, stride) of tensors, and of memory as for "
           "fingerprint.")
      .def("holds", &Snapshot::holds, "Whether all of it is as it was.");
  m.def("fma_flops", &fma_flops, pybind11::arg("bf16"), pybind11::arg("milliseconds"),
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "FLOP/s of each of torch's threads, all at once: multiply-adds on registers, in fp32 or of bf16 pairs. Raises "
        "ValueError where bfloat16 is not multiplied.");
  m.def("cpu_capability", [] { return std::string(cpu::isa_name(cpu::current_isa())); }, "The instruction set in use.");
  m.def("set_cpu_capability", &set_cpu_capability, pybind11::arg("name"),
        "Uses another instruction set (for tests). Raises ValueError where the processor lacks it.");
  m.def(
      "supported_cpu_capabilities", [] { return isa_names(cpu::supported); },
      "The instruction sets compiled in that this processor runs.");
}
