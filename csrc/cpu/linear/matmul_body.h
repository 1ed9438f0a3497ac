// One task of a matrix product of training. Needs fp32_gemm.h and gemm_nt_body.h before it.
//
// For every kKc terms: the task's rows of a are packed into L2. Then panel after panel of b is packed into L1 and
// multiplied by all of the rows, a tile at a time, and the products are added to the output.
#pragma once

#include "row_sums.h"

namespace mambaout_kernels::cpu {
namespace {

class Matmul {
 public:
  explicit Matmul(const MatmulTask& task)
      : call_(*task.call),
        m0_(task.m0),
        rows_(task.m1 - task.m0),
        n0_(task.n0),
        n1_(task.n1),
        scratch_(matmul_scratch(rows_, Fp32Gemm::kFormat)),
        row_sums_(task, part<double>(task, scratch_.row_sums)) {
    a_ = part<float>(task, scratch_.rows);
    panel_ = part<float>(task, scratch_.panel);
    tile_ = part<float>(task, scratch_.tile);
  }

  void run() {
    std::int64_t k0 = 0;
    do {  // at least once: with no terms the output is the bias
      depth_ = min(kKc, call_.K - k0);
      if (call_.a_m != 1) {
        copy_rows(k0);
      } else {
        for_each_gemm_tile<kMr>(rows_, [&](auto tile, std::int64_t m) { gather<decltype(tile)::value>(k0, m); });
        row_sums_.add(k0, depth_);
      }
      for (std::int64_t n = n0_; n < n1_; n += kNr) {
        call_.b_n == 1 ? copy_panel(k0, n) : transpose_panel(k0, n);
        for_each_gemm_tile<kMr>(rows_,
                                [&](auto tile, std::int64_t m) { multiply<decltype(tile)::value>(k0 == 0, m, n); });
      }
      k0 += kKc;
    } while (k0 < call_.K);
    row_sums_.finish();
  }

 private:
  static constexpr int L = Vec::kLanes, kNr = 2 * L, kMr = Fp32Gemm::kMr;
  static constexpr std::int64_t kPackedLda = packed_lda(Fp32Gemm::kFormat);

  // a_[m][k], k contiguous in a as well
  void copy_rows(std::int64_t k0) {
    for (std::int64_t m = 0; m < rows_; ++m) {
      const float* from = call_.a + (m0_ + m) * call_.a_m + k0;
      float* to = a_ + m * kPackedLda;
      std::int64_t k = 0;
      for (; k + L <= depth_; k += L) store(to + k, load(from + k));
      if (k < depth_) store_first(to + k, load_first(from + k, depth_ - k), depth_ - k);
    }
  }

  // a_[tile][k][kTileRows], m contiguous in a
  template <int kTileRows>
  void gather(std::int64_t k0, std::int64_t m) {
    const float* from = call_.a + m0_ + m + k0 * call_.a_k;
    float* to = a_ + m * kPackedLda;
    for (std::int64_t k = 0; k < depth_; ++k, from += call_.a_k, to += kTileRows) {
      constexpr int kFull = kTileRows / L * L, kRest = kTileRows - kFull;
      for (int r = 0; r < kFull; r += L) store(to + r, load(from + r));
      if constexpr (kRest > 0) store_first(to + kFull, load_first(from + kFull, kRest), kRest);
    }
  }

  // panel_[k][column], zero beyond the last column; columns contiguous in b
  void copy_panel(std::int64_t k0, std::int64_t n) {
    const float* from = call_.b + k0 * call_.b_k + n;
    const int columns = static_cast<int>(min(kNr, call_.N - n));
    float* to = panel_;
    if (columns == kNr) {
      for (std::int64_t k = 0; k < depth_; ++k, from += call_.b_k, to += kNr) {
        store(to, load(from));
        store(to + L, load(from + L));
      }
      return;
    }
    const int left = columns < L ? columns : L, right = columns - left;
    for (std::int64_t k = 0; k < depth_; ++k, from += call_.b_k, to += kNr) {
      store(to, load_first(from, left));
      store(to + L, right > 0 ? load_first(from + L, right) : broadcast(0.0f));
    }
  }

  // likewise; terms contiguous in b
  void transpose_panel(std::int64_t k0, std::int64_t n) {
    const std::int64_t columns = min(kNr, call_.N - n);
    for (std::int64_t half = 0; half < kNr; half += L) {
      const float* from = call_.b + (n + half) * call_.b_n + k0;
      float* to = panel_ + half;
      std::int64_t k = 0;
      if (half + L <= columns) {
        for (; k + L <= depth_; k += L) transpose(from + k, call_.b_n, to + k * kNr, kNr);
      }
      for (; k < depth_; ++k) {
        for (std::int64_t j = 0; j < L; ++j) to[k * kNr + j] = half + j < columns ? from[j * call_.b_n + k] : 0.0f;
      }
    }
  }

  template <int kTileRows>
  void multiply(bool first, std::int64_t m, std::int64_t n) {
    const float* a = a_ + m * kPackedLda;
    float* out = call_.out + (m0_ + m) * call_.N + n;
    const std::int64_t columns = min(kNr, call_.N - n);
    if (columns == kNr) {
      const float* bias = first && call_.bias != nullptr ? call_.bias + n : nullptr;
      call_.a_m != 1 ? add<kTileRows>(RowMajorA{a, kPackedLda}, first, bias, out, call_.N)
                     : add<kTileRows>(PackedA<kTileRows>{a}, first, bias, out, call_.N);
      return;
    }
    call_.a_m != 1 ? add<kTileRows>(RowMajorA{a, kPackedLda}, true, nullptr, tile_, kNr)
                   : add<kTileRows>(PackedA<kTileRows>{a}, true, nullptr, tile_, kNr);
    for (int r = 0; r < kTileRows; ++r) {
      for (std::int64_t j = 0; j < columns; ++j) {
        const float before = !first ? out[r * call_.N + j] : call_.bias != nullptr ? call_.bias[n + j] : 0.0f;
        out[r * call_.N + j] = before + tile_[r * kNr + j];
      }
    }
  }

  template <int kTileRows, typename A>
  [[gnu::noinline]] void add(const A& a, bool first, const float* bias, float* out, std::int64_t ldc) const {
    const Vec bias0 = bias == nullptr ? broadcast(0.0f) : load(bias);
    const Vec bias1 = bias == nullptr ? broadcast(0.0f) : load(bias + L);
    if (depth_ == 0) {
      for (int r = 0; r < kTileRows; ++r) {
        store(out + r * ldc, bias0);
        store(out + r * ldc + L, bias1);
      }
    }
    Fp32Gemm::multiply<kTileRows>(a, panel_, depth_, NoPrefetch{}, [=](bool start, int r, Vec left, Vec right) {
      float* to = out + r * ldc;
      const bool fresh = start && first;
      store(to, left + (fresh ? bias0 : load(to)));
      store(to + L, right + (fresh ? bias1 : load(to + L)));
    });
  }

  const MatmulCall& call_;
  const std::int64_t m0_, rows_, n0_, n1_;
  const MatmulScratch scratch_;
  const RowSums row_sums_;
  std::int64_t depth_ = 0;
  float *a_, *panel_, *tile_;
};

inline void run_matmul(const MatmulTask& task) { Matmul(task).run(); }

constexpr MatmulKernels kMatmulKernels{Fp32Gemm::kFormat, Fp32Gemm::kMr, run_matmul, run_gemm_nt};

}  // namespace
}  // namespace mambaout_kernels::cpu
