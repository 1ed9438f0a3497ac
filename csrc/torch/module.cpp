// The Python module: ops, instruction sets, and how this was built.
//
// libtorch's stable ABI only, in all of this folder: one binary for every torch >= 2.10.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "../cpu/gated_cnn_block/arguments.h"
#include "../cpu/isa.h"
#include "../cpu/peak/arguments.h"
#include "common.h"
#include "registration.h"

namespace mambaout_kernels {
namespace {

void set_cpu_capability(const std::string& name) {
  std::ostringstream allowed;
  for (const cpu::Isa isa : cpu::kIsas) {
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
  for (const cpu::Isa isa : cpu::kIsas) {
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
    DType compute_dtype;
    double seconds;
    std::vector<double> rates;
  } context{bf16 ? DType::kBFloat16 : DType::kFloat32, milliseconds / 1000,
            std::vector<double>(torch::stable::get_num_threads())};
  if (!cpu::block_supports(context.compute_dtype)) {
    throw pybind11::value_error("bf16 must be False: the instruction set in use multiplies no bfloat16");
  }
  parallel_for(
      static_cast<std::int64_t>(context.rates.size()),
      [](void* opaque, std::int64_t begin, std::int64_t) {
        auto& c = *static_cast<Context*>(opaque);
        c.rates[begin] = cpu::fma_flops(c.compute_dtype, c.seconds);
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

PYBIND11_MODULE(_C, m) {
  using namespace mambaout_kernels;
  m.doc() = "Native CPU kernels of mambaout_kernels.";
  const std::string ops_namespace = namespace_of(m.attr("__name__").cast<std::string>());
  register_gated_dwconv(ops_namespace);
  register_gated_cnn_blocks(ops_namespace);
  register_conv3x3s2(ops_namespace);
  register_head(ops_namespace);
  register_linear(ops_namespace);
  register_selective_scan(ops_namespace);
  keep_freed_memory();
  m.def("build_info", &build_info, "Compiler, flags, instruction sets and torch of this build.");
  m.def("fma_flops", &fma_flops, pybind11::arg("bf16"), pybind11::arg("milliseconds"),
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "FLOP/s of each of torch's threads, all at once: multiply-adds on registers, in fp32 or of bf16 pairs. Raises "
        "ValueError where bfloat16 is not multiplied.");
  m.def(
      "started_threads", [] { return started_threads.load(); },
      "Whether an op of this process had work for more than one thread.");
  m.def("cpu_capability", [] { return std::string(cpu::isa_name(cpu::current_isa())); }, "The instruction set in use.");
  m.def(
      "cpu_capability_reason", [] { return std::string(cpu::isa_reason()); },
      "Why it is not a better one; empty where there is none.");
  m.def("set_cpu_capability", &set_cpu_capability, pybind11::arg("name"),
        "Uses another instruction set (for tests). Raises ValueError where the processor lacks it.");
  m.def(
      "supported_cpu_capabilities", [] { return isa_names(cpu::supported); },
      "The instruction sets compiled in that this processor runs.");
}
