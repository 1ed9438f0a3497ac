// What the launches of both directions have in common.
#pragma once

#include "packet.cuh"
#include "typed_launch.h"

namespace mambaout_kernels::cuda {

template <DType dtype>
struct ElementOf;
template <>
struct ElementOf<DType::kFloat32> {
  using type = float;
};
template <>
struct ElementOf<DType::kBFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct ElementOf<DType::kFloat16> {
  using type = __half;
};

template <typename T>
bool aligned_16(const void* data, std::int64_t pitch) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && pitch * sizeof(T) % 16 == 0;
}
// Whether every branch of every pixel begins and ends at a multiple of 16 bytes.
template <typename T>
bool aligned_16(const GatedDwconvShape& shape) {
  return shape.D * sizeof(T) % 16 == 0 && shape.C * sizeof(T) % 16 == 0;
}

}  // namespace mambaout_kernels::cuda
