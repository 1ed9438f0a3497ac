// Sums of the rows of a turned factor, beside its product. Needs simd/loops.h before it.
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

// Scratch memory of a task.
template <typename T>
T* part(const MatmulTask& task, std::int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(task.scratch) + offset);
}

// Of a task's rows, by the first task of each: it adds parts of the terms, m contiguous in a, in fp64.
class RowSums {
 public:
  RowSums(const MatmulTask& task, double* sums)
      : call_(*task.call),
        m0_(task.m0),
        rows_(task.n0 == 0 && task.call->row_sums != nullptr ? task.m1 - task.m0 : 0),
        sums_(sums) {
    for (std::int64_t m = 0; m < rows_; ++m) sums_[m] = 0.0;
  }

  // Terms [k0, k0 + depth).
  void add(std::int64_t k0, std::int64_t depth) const {
    constexpr int L = Vec::kLanes;
    constexpr std::int64_t kRowSumDepth = 16;  // terms that are added in fp32
    for (std::int64_t m = 0; m < rows_; m += L) {
      const int count = static_cast<int>(min(L, rows_ - m));
      for (std::int64_t k1 = 0; k1 < depth; k1 += kRowSumDepth) {
        Vec sum = broadcast(0.0f);
        for (std::int64_t k = k1; k < min(depth, k1 + kRowSumDepth); ++k) {
          sum = sum + load_first(call_.a + m0_ + m + (k0 + k) * call_.a_k, count);
        }
        float lanes[L];
        store(lanes, sum);
        for (int i = 0; i < count; ++i) sums_[m + i] += lanes[i];
      }
    }
  }

  void finish() const {
    for (std::int64_t m = 0; m < rows_; ++m) call_.row_sums[m0_ + m] = static_cast<float>(sums_[m]);
  }

 private:
  const MatmulCall& call_;
  const std::int64_t m0_, rows_;
  double* const sums_;
};

}  // namespace
}  // namespace mambaout_kernels::cpu
