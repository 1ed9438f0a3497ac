// What the files of this folder need of torch (stable ABI only): dtypes, views, scratch memory, threads.
#pragma once

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

#include "../cpu/parallel_for.h"
#include "../gated_dwconv.h"

namespace mambaout_kernels {
namespace {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

// Of what inference computes on.
inline DType float_or_bfloat16(const Tensor& tensor, const char* name) {
  const DType dtype = dtype_of(tensor, name);
  STD_TORCH_CHECK(dtype == DType::kFloat32 || dtype == DType::kBFloat16, name, " must be float32 or bfloat16");
  return dtype;
}

inline void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
}

// Whose last dimension is dense; a copy where it is not.
inline Tensor last_dense(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline NhwcView view(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// A large new tensor is about to be written for the first time: ask for huge pages, so that Linux does it in hundreds
// of page faults less per MiB. A fault costs about what the op computes on the 4 KiB behind it.
constexpr std::uintptr_t kHugePage = 2 << 20;
inline void advise_huge_pages(const Tensor& tensor) {
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
    STD_TORCH_CHECK(memory != nullptr, "not enough memory: this call needs ", bytes, " bytes of workspace");
    return memory;
  }

  std::unique_ptr<char[]> own_;
  char* data_;
};

inline void parallel_for(std::int64_t count, cpu::RangeBody body, void* context) {
  torch::stable::parallel_for(0, count, 1, [=](std::int64_t begin, std::int64_t end) { body(context, begin, end); });
}

}  // namespace
}  // namespace mambaout_kernels
