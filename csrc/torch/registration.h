// Ops in the namespace of the package that loads the module: copies of the package in one process do not meet.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

namespace mambaout_kernels {

using torch::stable::detail::StableLibrary;

// "package._C" -> "package", dots as underscores: mambaout_kernels/backends/namespace.py has the same rule.
inline std::string namespace_of(const std::string& module_name) {
  std::string package = module_name.substr(0, module_name.rfind('.'));
  std::replace(package.begin(), package.end(), '.', '_');
  return package;
}

// What STABLE_TORCH_LIBRARY_FRAGMENT and _IMPL do, of which the namespace is known when they are compiled. Ops stay for
// the life of the process.
inline void register_ops(const std::string& ops_namespace, const char* device, void (*define)(StableLibrary&),
                         void (*implement)(StableLibrary&)) {
  using torch::stable::detail::StableTorchLibraryInit;
  using Kind = StableLibrary::Kind;
  new StableTorchLibraryInit(Kind::FRAGMENT, define, ops_namespace.c_str(), nullptr, __FILE__, __LINE__);
  new StableTorchLibraryInit(Kind::IMPL, implement, ops_namespace.c_str(), device, __FILE__, __LINE__);
}

void register_gated_dwconv(const std::string& ops_namespace);
void register_gated_dwconv_cuda(const std::string& ops_namespace);
void register_gated_cnn_blocks(const std::string& ops_namespace);
void register_conv3x3s2(const std::string& ops_namespace);
void register_head(const std::string& ops_namespace);
void register_linear(const std::string& ops_namespace);
void register_selective_scan(const std::string& ops_namespace);

}  // namespace mambaout_kernels
