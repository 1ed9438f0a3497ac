// The convolution of one strip, row by row: each row is read once and added to the K output rows that it touches.
//
//   sum[k][s]  is output row i - R + k, pixel s, when row i has been added; sum[0] is then complete.
#pragma once

#include "lanes.cuh"

namespace mambaout_kernels::cuda {

template <int kLanes, int K, int kStrip>
struct RowSums {
  using Values = Lanes<kLanes>;
  Values sum[K][kStrip];

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int s = 0; s < kStrip; ++s) sum[k][s] = Values::zero();
  }

  // The next row becomes row i: renaming only, since the first multiply-add of a row reads one register and writes
  // another.
  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int s = 0; s < kStrip; ++s) sum[k][s] = k + 1 < K ? sum[k + 1 < K ? k + 1 : k][s] : Values::zero();
  }

  // The row that is complete once `missing` (0 .. R) rows are known to be missing behind row i.
  __device__ __forceinline__ void complete(int missing, Values (&row)[kStrip]) const {
#pragma unroll
    for (int s = 0; s < kStrip; ++s) row[s] = sum[0][s];
    if (missing > 0) {
#pragma unroll
      for (int k = 1; k <= K / 2; ++k) {
        if (missing == k) {
          keep_branch();
#pragma unroll
          for (int s = 0; s < kStrip; ++s) row[s] = sum[k][s];
        }
      }
    }
  }

  // row(j) is the pixel j - R from the strip's first.
  // kFlipped: with the filter rotated by 180 degrees, for the gradient of the convolution.
  template <bool kFlipped, typename Row>
  __device__ __forceinline__ void add_row(Row row, const Values (&weight)[K * K]) {
#pragma unroll
    for (int j = 0; j < kStrip + K - 1; ++j) {
      const Values value = row(j);
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int s = 0; s < kStrip; ++s) {
          const int kw = j - s;
          if (kw < 0 || kw >= K) continue;
          const int tap = (K - 1 - k) * K + kw;
          sum[k][s] = fma(value, weight[kFlipped ? K * K - 1 - tap : tap], sum[k][s]);
        }
      }
    }
  }
};

}  // namespace mambaout_kernels::cuda
