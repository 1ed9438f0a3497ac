// One task of a matrix product of training. Needs gemm_tile.h and dots_body.h before it.
//
// For every kMatmulDepth terms: the task's rows of a are brought together in L2; then panel after panel of b in L1, and
// each is multiplied by all of the rows, a tile of them at a time. What comes out is added to the output.
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

class Matmul {
 public:
  explicit Matmul(const MatmulTask& task)
      : call_(*task.call), m0_(task.m0), rows_(task.m1 - task.m0), n0_(task.n0), n1_(task.n1) {
    const MatmulWindow window = matmul_window(rows_, L);
    char* base = static_cast<char*>(task.window);
    a_ = reinterpret_cast<float*>(base + window.rows);
    panel_ = reinterpret_cast<float*>(base + window.panel);
    tile_ = reinterpret_cast<float*>(base + window.tile);
    row_sums_ = reinterpret_cast<double*>(base + window.row_sums);
  }

  void run() {
    const bool sums = call_.row_sums != nullptr && n0_ == 0;
    if (sums) {
      for (std::int64_t m = 0; m < rows_; ++m) row_sums_[m] = 0.0;
    }
    std::int64_t k0 = 0;
    do {  // once for no terms at all: the bias
      depth_ = min64(kMatmulDepth, call_.K - k0);
      if (call_.a_m != 1) {
        copy_rows(k0);
      } else {
        for_each_gemm_tile<kRows>(0, rows_, [&](auto tile, std::int64_t m) { gather<decltype(tile)::value>(k0, m); });
        if (sums) add_row_sums(k0);
      }
      for (std::int64_t n = n0_; n < n1_; n += kColumns) {
        call_.b_n == 1 ? copy_panel(k0, n) : transpose_panel(k0, n);
        for_each_gemm_tile<kRows>(0, rows_,
                                  [&](auto tile, std::int64_t m) { multiply<decltype(tile)::value>(k0 == 0, m, n); });
      }
      k0 += kMatmulDepth;
    } while (k0 < call_.K);
    if (sums) {
      for (std::int64_t m = 0; m < rows_; ++m) call_.row_sums[m0_ + m] = static_cast<float>(row_sums_[m]);
    }
  }

 private:
  static constexpr int L = Vec::kLanes, kColumns = 2 * L, kRows = Fp32Products::kRows;
  static constexpr std::int64_t kRowSumDepth = 16;  // terms that are added in fp32

  static std::int64_t min64(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

  // a_[m][k], k contiguous in a as well
  void copy_rows(std::int64_t k0) {
    for (std::int64_t m = 0; m < rows_; ++m) {
      const float* from = call_.a + (m0_ + m) * call_.a_m + k0;
      float* to = a_ + m * kMatmulStep;
      std::int64_t k = 0;
      for (; k + L <= depth_; k += L) store(to + k, load(from + k));
      if (k < depth_) store_first(to + k, load_first(from + k, depth_ - k), depth_ - k);
    }
  }

  // a_[tile][k][kTileRows], m contiguous in a
  template <int kTileRows>
  void gather(std::int64_t k0, std::int64_t m) {
    const float* from = call_.a + m0_ + m + k0 * call_.a_k;
    float* to = a_ + m * kMatmulStep;
    for (std::int64_t k = 0; k < depth_; ++k, from += call_.a_k, to += kTileRows) {
      constexpr int kWhole = kTileRows / L * L, kRest = kTileRows - kWhole;
      for (int r = 0; r < kWhole; r += L) store(to + r, load(from + r));
      if constexpr (kRest > 0) store_first(to + kWhole, load_first(from + kWhole, kRest), kRest);
    }
  }

  void add_row_sums(std::int64_t k0) {
    for (std::int64_t m = 0; m < rows_; m += L) {
      const int count = static_cast<int>(min64(L, rows_ - m));
      for (std::int64_t k1 = 0; k1 < depth_; k1 += kRowSumDepth) {
        Vec sum = broadcast(0.0f);
        for (std::int64_t k = k1; k < min64(depth_, k1 + kRowSumDepth); ++k) {
          sum = sum + load_first(call_.a + m0_ + m + (k0 + k) * call_.a_k, count);
        }
        float lanes[L];
        store(lanes, sum);
        for (int i = 0; i < count; ++i) row_sums_[m + i] += lanes[i];
      }
    }
  }

  // panel_[k][column], zero beyond the last column; columns contiguous in b
  void copy_panel(std::int64_t k0, std::int64_t n) {
    const float* from = call_.b + k0 * call_.b_k + n;
    const int columns = static_cast<int>(min64(kColumns, call_.N - n));
    float* to = panel_;
    if (columns == kColumns) {
      for (std::int64_t k = 0; k < depth_; ++k, from += call_.b_k, to += kColumns) {
        store(to, load(from));
        store(to + L, load(from + L));
      }
      return;
    }
    const int left = columns < L ? columns : L, right = columns - left;
    for (std::int64_t k = 0; k < depth_; ++k, from += call_.b_k, to += kColumns) {
      store(to, load_first(from, left));
      store(to + L, right > 0 ? load_first(from + L, right) : broadcast(0.0f));
    }
  }

  // likewise; terms contiguous in b
  void transpose_panel(std::int64_t k0, std::int64_t n) {
    const std::int64_t columns = min64(kColumns, call_.N - n);
    for (std::int64_t half = 0; half < kColumns; half += L) {
      const float* from = call_.b + (n + half) * call_.b_n + k0;
      float* to = panel_ + half;
      std::int64_t k = 0;
      if (half + L <= columns) {
        for (; k + L <= depth_; k += L) transpose(from + k, call_.b_n, to + k * kColumns, kColumns);
      }
      for (; k < depth_; ++k) {
        for (std::int64_t j = 0; j < L; ++j) to[k * kColumns + j] = half + j < columns ? from[j * call_.b_n + k] : 0.0f;
      }
    }
  }

  template <int kTileRows>
  void multiply(bool first, std::int64_t m, std::int64_t n) {
    const float* a = a_ + m * kMatmulStep;
    float* out = call_.out + (m0_ + m) * call_.N + n;
    const std::int64_t columns = min64(kColumns, call_.N - n);
    if (columns == kColumns) {
      const float* bias = first && call_.bias != nullptr ? call_.bias + n : nullptr;
      call_.a_m != 1 ? add<kTileRows>(PixelByPixel{a, kMatmulStep}, first, bias, out, call_.N)
                     : add<kTileRows>(TermByTerm<kTileRows>{a}, first, bias, out, call_.N);
      return;
    }
    call_.a_m != 1 ? add<kTileRows>(PixelByPixel{a, kMatmulStep}, true, nullptr, tile_, kColumns)
                   : add<kTileRows>(TermByTerm<kTileRows>{a}, true, nullptr, tile_, kColumns);
    for (int r = 0; r < kTileRows; ++r) {
      for (std::int64_t j = 0; j < columns; ++j) {
        const float before = !first ? out[r * call_.N + j] : call_.bias != nullptr ? call_.bias[n + j] : 0.0f;
        out[r * call_.N + j] = before + tile_[r * kColumns + j];
      }
    }
  }

  template <int kTileRows, typename A>
  [[gnu::noinline]] void add(const A& a, bool first, const float* bias, float* out, std::int64_t step) const {
    const Vec bias0 = bias == nullptr ? broadcast(0.0f) : load(bias);
    const Vec bias1 = bias == nullptr ? broadcast(0.0f) : load(bias + L);
    if (depth_ == 0) {
      for (int r = 0; r < kTileRows; ++r) {
        store(out + r * step, bias0);
        store(out + r * step + L, bias1);
      }
    }
    Fp32Products::multiply<kTileRows>(a, panel_, depth_, NothingAhead{}, [=](bool start, int r, Vec left, Vec right) {
      float* to = out + r * step;
      const bool fresh = start && first;
      store(to, left + (fresh ? bias0 : load(to)));
      store(to + L, right + (fresh ? bias1 : load(to + L)));
    });
  }

  const MatmulCall& call_;
  const std::int64_t m0_, rows_, n0_, n1_;
  std::int64_t depth_ = 0;
  float *a_, *panel_, *tile_;
  double* row_sums_;
};

inline void run_matmul(const MatmulTask& task) { Matmul(task).run(); }

constexpr MatmulKernels kMatmulKernels{Vec::kLanes, Fp32Products::kRows, run_matmul, run_dots};

}  // namespace
}  // namespace mambaout_kernels::cpu
