// What the files of this folder need of torch (stable ABI only): checks, dtypes, views, new memory, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include "../cpu/parallel_for.h"
#include "../gated_dwconv.h"

namespace mambaout_kernels {

// Whether this process has had work for more than one thread: a forked child has none of its parent's threads.
inline std::atomic<bool> started_threads = false;

namespace {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::string text_of(Sizes sizes) {
  std::string listed;
  for (const std::int64_t size : sizes) listed += (listed.empty() ? "" : ", ") + std::to_string(size);
  return "(" + listed + (sizes.size() == 1 ? ",)" : ")");
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64; got ", tensor.scalar_type());
  }
}

// Of what inference computes on.
inline DType float_or_bfloat16(const Tensor& tensor, const char* name) {
  const DType dtype = dtype_of(tensor, name);
  STD_TORCH_CHECK(dtype == DType::kFloat32 || dtype == DType::kBFloat16, name, " must be float32 or bfloat16; got ",
                  tensor.scalar_type());
  return dtype;
}

// Of tensors and of what is computed: products of sizes, in bytes, stay far below 2^63. A size of 0 counts as 1.
constexpr std::int64_t kMostElements = std::int64_t{1} << 44;
inline void check_sizes(Sizes sizes, const char* name) {
  std::int64_t count = 1;
  for (const std::int64_t size : sizes) {
    const bool overflow = __builtin_mul_overflow(count, std::max<std::int64_t>(size, 1), &count);
    STD_TORCH_CHECK(!overflow && count <= kMostElements, name, " must have at most 2^44 elements; got shape ",
                    text_of(sizes));
  }
}

// On the CPU, and all of it in memory: a storage may have been released, or made smaller than the tensors on it.
inline void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.defined() && tensor.is_cpu(), name, " must be a tensor on the CPU");
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  check_sizes(sizes, name);
  __int128 end = tensor.storage_offset() + 1;  // of its last element
  for (std::size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] == 0) return;
    end += static_cast<__int128>(sizes[dim] - 1) * strides[dim];
  }
  std::int64_t bytes = 0;
  STD_TORCH_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes) == AOTI_TORCH_SUCCESS, name,
                  " must have a storage whose size is known");
  STD_TORCH_CHECK(end * tensor.element_size() <= bytes, name, " must lie within its storage, which has ", bytes,
                  " bytes; got shape ", text_of(sizes));
}

inline void check_shape(const Tensor& tensor, Sizes expected, const char* name) {
  const Sizes sizes = tensor.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), name, " must have shape ",
                  text_of(expected), "; got ", text_of(sizes));
}

// Whose last dimension is dense; a copy where it is not.
inline Tensor last_dense(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Elements from one index to the next, 0 where there is none: a stride may then be anything.
inline std::int64_t step_of(const Tensor& tensor, std::int64_t dim) {
  return tensor.size(dim) > 1 ? tensor.stride(dim) : 0;
}
inline NhwcView view(const Tensor& tensor) {
  return {tensor.const_data_ptr(), step_of(tensor, 0), step_of(tensor, 1), step_of(tensor, 2)};
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

inline Tensor new_result(const Tensor& like, Sizes sizes, const char* name,
                         std::optional<ScalarType> dtype = std::nullopt) {
  check_sizes(sizes, name);
  Tensor result = torch::stable::new_empty(like, sizes, dtype);
  advise_huge_pages(result);
  return result;
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
  if (count > 1) started_threads.store(true, std::memory_order_relaxed);
  torch::stable::parallel_for(0, count, 1, [=](std::int64_t begin, std::int64_t end) { body(context, begin, end); });
}

}  // namespace
}  // namespace mambaout_kernels
