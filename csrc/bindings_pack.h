// Checks of parameters to be packed, and of tensors that hold packed ones.
#pragma once

#include "bindings_common.h"

namespace mambaout_kernels {
namespace {

inline const float* parameter(const Tensor& tensor, std::int64_t count, const char* name) {
  check_cpu(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), name,
                  " must be float32 and contiguous");
  STD_TORCH_CHECK(tensor.numel() == count, name, " must have ", count, " elements, has ", tensor.numel());
  return static_cast<const float*>(tensor.const_data_ptr());
}
inline const float* optional_parameter(const Tensor& tensor, std::int64_t count, const char* name) {
  return tensor.numel() == 0 ? nullptr : parameter(tensor, count, name);
}

template <typename Header>
const Header* pack_header(const Tensor& packed, std::int64_t magic, const char* maker) {
  check_cpu(packed, "packed");
  const auto* header = static_cast<const Header*>(packed.const_data_ptr());
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Float && packed.is_contiguous() &&
                      packed.numel() * 4 >= static_cast<std::int64_t>(sizeof(Header)) &&
                      reinterpret_cast<std::uintptr_t>(header) % 64 == 0 && header->magic == magic,
                  "packed must come from ", maker);
  return header;
}

}  // namespace
}  // namespace mambaout_kernels
