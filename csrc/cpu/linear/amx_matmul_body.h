// One task of a matrix product of training, in fp32 from three parts of bf16. The blocking is that of
// matmul_body.h. Needs amx_gemm.h and gemm_nt_body.h before it.
#pragma once

#include "row_sums.h"

namespace mambaout_kernels::cpu {
namespace {

class AmxMatmul {
 public:
  explicit AmxMatmul(const MatmulTask& task)
      : call_(*task.call),
        m0_(task.m0),
        rows_(task.m1 - task.m0),
        n0_(task.n0),
        n1_(task.n1),
        scratch_(matmul_scratch(rows_, Gemm::kFormat)),
        row_sums_(task, part<double>(task, scratch_.row_sums)) {
    a_ = LeftFactor<Gemm::Left>::at(part<char>(task, scratch_.rows), scratch_.plane);
    panel_ = part<BFloat16>(task, scratch_.panel);
    tile_ = part<float>(task, scratch_.tile);
  }

  void run() {
    std::int64_t k0 = 0;
    do {  // at least once: with no terms the output is the bias
      depth_ = min(kKc, call_.K - k0);
      padded_ = (depth_ + kStep - 1) / kStep * kStep;
      call_.a_m != 1 ? copy_rows(k0) : transpose_rows(k0);
      row_sums_.add(k0, depth_);
      for (std::int64_t n = n0_; n < n1_; n += kNr) {
        pack_panel(k0, n);
        Gemm::for_each_tile(rows_, [&](auto rows, std::int64_t m) {
          Gemm::tile<false>(rows, a_ + m * kLda, kLda, panel_, padded_, tile_, Prefetch{nullptr, 0});
          add_tile(rows, k0 == 0, m, n);
        });
      }
      k0 += kKc;
    } while (k0 < call_.K);
    row_sums_.finish();
  }

 private:
  using Gemm = AmxFp32Gemm;
  static constexpr int L = Vec::kLanes, kNr = 2 * L, kStep = Gemm::kFormat.step, kParts = Gemm::kParts;
  static constexpr std::int64_t kLda = packed_lda(Gemm::kFormat);

  // a_[m][k] from a's rows, k contiguous; zero from depth_ to padded_
  void copy_rows(std::int64_t k0) {
    for (std::int64_t m = 0; m < rows_; ++m) {
      const float* from = call_.a + (m0_ + m) * call_.a_m + k0;
      for_each_vector<L>(depth_, [&](std::int64_t k, int lanes) {
        store_lanes(a_ + (m * kLda + k), load_lanes<Vec>(from + k, lanes), lanes);
      });
      clear(a_ + (m * kLda + depth_), padded_ - depth_);
    }
  }

  // likewise, m contiguous in a
  void transpose_rows(std::int64_t k0) {
    const float* a = call_.a + m0_ + k0 * call_.a_k;
    std::int64_t m = 0;
    for (; m + L <= rows_; m += L) {
      float block[L * L];
      std::int64_t k = 0;
      for (; k + L <= depth_; k += L) {
        transpose(a + m + k * call_.a_k, call_.a_k, block, L);
        for (int r = 0; r < L; ++r) store(a_ + ((m + r) * kLda + k), load(block + r * L));
      }
      for (; k < depth_; ++k) {
        for (int r = 0; r < L; ++r) put(a_ + ((m + r) * kLda + k), a[m + r + k * call_.a_k]);
      }
    }
    for (; m < rows_; ++m) {
      for (std::int64_t k = 0; k < depth_; ++k) put(a_ + (m * kLda + k), a[m + k * call_.a_k]);
    }
    for (m = 0; m < rows_; ++m) clear(a_ + (m * kLda + depth_), padded_ - depth_);
  }

  // [k / step][part][step / 2][kNr][2]
  void pack_panel(std::int64_t k0, std::int64_t n) {
    constexpr std::int64_t kPart = kStep * kNr;
    for (std::int64_t k = 0; k < padded_; k += kStep) {
      float block[kStep][kNr];
      load_block(k0 + k, n, block);
      BFloat16* to = panel_ + k * kParts * kNr;
      for (int i = 0; i < kStep; i += 2) {
        for (int j = 0; j < kNr; j += L) {
          store_pairs(PartsPointer<kParts>{to + (i / 2 * kNr + j) * 2, kPart}, load(block[i] + j),
                      load(block[i + 1] + j));
        }
      }
    }
  }

  // block[i][j] = b(k + i, n + j), zero beyond the last term and column
  void load_block(std::int64_t k, std::int64_t n, float (&block)[kStep][kNr]) const {
    const std::int64_t terms = min(kStep, call_.K - k), columns = min(kNr, call_.N - n);
    if (terms < kStep || columns < kNr) __builtin_memset(block, 0, sizeof(block));
    const float* b = call_.b + k * call_.b_k + n * call_.b_n;
    if (call_.b_n == 1) {
      for (std::int64_t i = 0; i < terms; ++i) {
        for_each_vector<L>(columns, [&](std::int64_t j, int lanes) {
          store_lanes(block[i] + j, load_lanes<Vec>(b + i * call_.b_k + j, lanes), lanes);
        });
      }
    } else if (terms == kStep && columns == kNr) {
      for (int i = 0; i < kStep; i += L) {
        for (int j = 0; j < kNr; j += L) transpose(b + j * call_.b_n + i, call_.b_n, block[i] + j, kNr);
      }
    } else {
      for (std::int64_t i = 0; i < terms; ++i) {
        for (std::int64_t j = 0; j < columns; ++j) block[i][j] = b[j * call_.b_n + i];
      }
    }
  }

  void add_tile(int rows, bool first, std::int64_t m, std::int64_t n) const {
    const std::int64_t columns = min(kNr, call_.N - n);
    for (int r = 0; r < rows; ++r) {
      float* out = call_.out + (m0_ + m + r) * call_.N + n;
      for_each_vector<L>(columns, [&](std::int64_t j, int lanes) {
        const Vec before = !first                  ? load_lanes<Vec>(out + j, lanes)
                           : call_.bias == nullptr ? broadcast(0.0f)
                                                   : load_lanes<Vec>(call_.bias + n + j, lanes);
        store_lanes(out + j, before + load(tile_ + r * kNr + j), lanes);
      });
    }
  }

  const MatmulCall& call_;
  const std::int64_t m0_, rows_, n0_, n1_;
  const MatmulScratch scratch_;
  const RowSums row_sums_;
  std::int64_t depth_ = 0, padded_ = 0;
  Gemm::Left a_;
  BFloat16* panel_;
  float* tile_;
};

inline void run_amx_matmul(const MatmulTask& task) {
  const AmxFp32Gemm::TaskScope scope;
  AmxMatmul(task).run();
}

constexpr MatmulKernels kAmxMatmulKernels{AmxFp32Gemm::kFormat, AmxFp32Gemm::kMr, run_amx_matmul, run_gemm_nt};

}  // namespace
}  // namespace mambaout_kernels::cpu
