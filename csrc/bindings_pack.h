// Checks of parameters to be packed, and of tensors that hold packed ones.
#pragma once

#include "bindings_common.h"
#include "cpu/gemm/packed_format.h"

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

inline std::int64_t format_id(cpu::PackedFormat format) { return format.lanes * 16 + format.element_bytes; }

inline bool holds_pack(const Tensor& packed) {
  return packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
         reinterpret_cast<std::uintptr_t>(packed.const_data_ptr()) % 64 == 0;
}

// Where to write packed parameters and the header before them.
template <typename Header>
Header* pack_memory(const Tensor& packed, std::int64_t bytes) {
  STD_TORCH_CHECK(holds_pack(packed) && packed.numel() == bytes, "packed must be ", bytes,
                  " bytes on the CPU, contiguous, 64-byte aligned");
  return static_cast<Header*>(packed.mutable_data_ptr());
}

template <typename Header>
const Header* pack_header(const Tensor& packed, std::int64_t magic, const char* maker) {
  const bool readable = holds_pack(packed) && packed.numel() >= static_cast<std::int64_t>(sizeof(Header));
  const auto* header = readable ? static_cast<const Header*>(packed.const_data_ptr()) : nullptr;
  STD_TORCH_CHECK(readable && header->magic == magic, "packed must come from ", maker);
  return header;
}

}  // namespace
}  // namespace mambaout_kernels
