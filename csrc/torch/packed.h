// Tensors of packed weights: a header that says what they are and for which instruction set, then the weights.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../cpu/gated_cnn_block/arguments.h"
#include "../cpu/gemm/packed_format.h"
#include "common.h"

namespace mambaout_kernels {
namespace {

enum class PackedOp : std::int64_t { kGatedCnnBlock = 1, kConv3x3s2 = 2 };

// Files hold it: a change of it, or of how weights are packed, is a new version.
struct alignas(64) PackedHeader {
  std::int64_t magic, version;
  PackedOp op;
  std::int64_t lanes, parts, step;  // cpu::PackedFormat
  std::int64_t bytes;               // of the header and the weights
  std::int64_t compute_dtype, act;
  double eps;
  std::int64_t sizes[4];         // of the op's shape
  std::int64_t padding[2] = {};  // written too: equal weights are equal bytes
};
constexpr std::int64_t kPackedMagic = 0x74754f61626d614d;  // "MambaOut"
constexpr std::int64_t kPackedVersion = 2;
static_assert(sizeof(PackedHeader) == 128);

// A weight as the packing functions read it: fp32, dense; null where there is none. `kept` outlives it.
class Weights {
 public:
  const float* operator()(const std::optional<Tensor>& tensor, Sizes sizes, const char* name) {
    if (!tensor.has_value()) return nullptr;
    check_cpu(*tensor, name);
    float_or_bfloat16(*tensor, name);
    std::int64_t count = 1;
    for (const std::int64_t size : sizes) count *= size;
    STD_TORCH_CHECK(tensor->numel() == count, name, " must have ", count, " elements, has ", tensor->numel());
    check_shape(*tensor, sizes, name);
    const Tensor dense_tensor = dense(*tensor);
    kept_.push_back(dense_tensor.scalar_type() == ScalarType::Float
                        ? dense_tensor
                        : torch::stable::to(dense_tensor, ScalarType::Float));
    return static_cast<const float*>(kept_.back().const_data_ptr());
  }

 private:
  std::vector<Tensor> kept_;
};

inline Act act_of(const std::string& name) {
  constexpr const char* kNames[] = {"gelu", "gelu_tanh", "silu", "identity"};  // as Act counts them
  for (int i = 0; i < 4; ++i) {
    if (name == kNames[i]) return static_cast<Act>(i);
  }
  STD_TORCH_CHECK(false, "act must be one of gelu, gelu_tanh, silu, identity; got '", name, "'");
}

inline void check_compute_dtype(DType dtype, const char* needed = "packed must be packed again, or repacked") {
  STD_TORCH_CHECK(dtype == DType::kFloat32 || cpu::block_supports(dtype), needed,
                  ": the instruction set in use multiplies no bfloat16");
}

// New memory for packed weights, in huge pages where the system has them: they are read from one end to the other at
// every call, and a processor does not remember the place of as many pages of 4 KiB.
inline Tensor new_packed(const Tensor& like, std::int64_t bytes) {
  return new_result(like, {bytes}, "packed", ScalarType::Byte);
}

// Memory with a header for `bytes` of weights behind it; the op's sizes are its own.
template <typename Shape>
Tensor new_packed(const Tensor& like, PackedOp op, const Shape& shape, cpu::PackedFormat format, std::int64_t bytes,
                  const std::int64_t (&sizes)[4]) {
  Tensor packed = new_packed(like, bytes);
  *static_cast<PackedHeader*>(packed.mutable_data_ptr()) = {kPackedMagic,
                                                            kPackedVersion,
                                                            op,
                                                            format.lanes,
                                                            format.parts,
                                                            format.step,
                                                            bytes,
                                                            static_cast<std::int64_t>(shape.compute_dtype),
                                                            static_cast<std::int64_t>(shape.act),
                                                            shape.eps,
                                                            {sizes[0], sizes[1], sizes[2], sizes[3]}};
  return packed;
}

// Packed weights at an address that the kernels can read.
inline Tensor aligned(const Tensor& packed) {
  check_cpu(packed, "packed");
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1,
                  "packed must be a vector of bytes on the CPU; got ", packed.scalar_type(), " of shape ",
                  text_of(packed.sizes()));
  const Tensor one = dense(packed);
  if (reinterpret_cast<std::uintptr_t>(one.const_data_ptr()) % alignof(PackedHeader) == 0) return one;
  Tensor copy = new_packed(one, one.numel());
  torch::stable::copy_(copy, one);
  return copy;
}

inline bool same_format(const PackedHeader& header, cpu::PackedFormat format) {
  return header.lanes == format.lanes && header.parts == format.parts && header.step == format.step;
}

inline bool known_format(const PackedHeader& header) {
  for (const cpu::PackedFormat& format : cpu::kPackedFormats) {
    if (same_format(header, format)) return true;
  }
  return false;
}

// The header at `offset`, of weights that end within the tensor; everything else in it is for the op to check.
inline const PackedHeader& header_at(const Tensor& packed, std::int64_t offset, PackedOp op, const char* maker) {
  const std::int64_t left = packed.numel() - offset;
  const auto* header =
      reinterpret_cast<const PackedHeader*>(static_cast<const char*>(packed.const_data_ptr()) + offset);
  const bool readable =
      left >= static_cast<std::int64_t>(sizeof(PackedHeader)) && header->magic == kPackedMagic && header->op == op;
  STD_TORCH_CHECK(readable, "packed must come from ", maker);
  STD_TORCH_CHECK(header->version == kPackedVersion, "packed has version ", header->version, " of the format; this is ",
                  kPackedVersion, ": pack the model again");
  STD_TORCH_CHECK(header->bytes >= static_cast<std::int64_t>(sizeof(PackedHeader)) && header->bytes <= left &&
                      known_format(*header) && header->act >= 0 && header->act <= 3 && header->compute_dtype >= 0 &&
                      header->compute_dtype <= 1,
                  "packed is damaged");
  for (const std::int64_t size : header->sizes) STD_TORCH_CHECK(size >= 0 && size < (1 << 24), "packed is damaged");
  return *header;
}

inline DType compute_dtype_of(const PackedHeader& header) { return static_cast<DType>(header.compute_dtype); }

// What every op's shape holds beside its sizes.
template <typename Shape>
void set_compute(Shape& shape, Act act, double eps, DType compute_dtype) {
  shape.act = act;
  shape.eps = static_cast<float>(eps);
  shape.compute_dtype = compute_dtype;
}
template <typename Shape>
void read_compute(Shape& shape, const PackedHeader& header) {
  set_compute(shape, static_cast<Act>(header.act), header.eps, compute_dtype_of(header));
}
// Of a call that packs; bf16: to be multiplied in bfloat16.
template <typename Shape>
void checked_compute(Shape& shape, const std::string& act, double eps, bool bf16) {
  set_compute(shape, act_of(act), eps, bf16 ? DType::kBFloat16 : DType::kFloat32);
  check_compute_dtype(shape.compute_dtype, "bf16 must be False");
}
// bf16 values that this processor does not multiply as such are multiplied in fp32.
template <typename Shape>
void fit_compute(Shape& shape) {
  if (!cpu::block_supports(shape.compute_dtype)) shape.compute_dtype = DType::kFloat32;
}

inline cpu::PackedFormat format_of(const PackedHeader& header) {
  return {static_cast<int>(header.lanes), static_cast<int>(header.parts), static_cast<int>(header.step)};
}

inline void check_format(const PackedHeader& header, cpu::PackedFormat in_use) {
  STD_TORCH_CHECK(same_format(header, in_use),
                  "packed is for another instruction set than the one in use: pack again, or repack");
}

}  // namespace
}  // namespace mambaout_kernels
