// Written by fit_gate_tables.py; edit that.
#pragma once

#include "platform.cuh"

namespace mambaout_kernels::cuda {

// log2(Phi(-a)) as a polynomial in a >= 0: the factor of a^power.
struct Float32Tail {
  static constexpr int kDegree = 10;
  __device__ __forceinline__ static float factor(int power) {
    // clang-format off
    constexpr float factors[kDegree + 1] = {
        -9.999999404e-01f, -1.151107073e+00f, -4.592002332e-01f, -5.249695852e-02f, 7.019521203e-03f, -5.118464105e-05f,
        -2.592407109e-04f, 7.186341099e-05f, -1.042778513e-05f, 8.336715496e-07f, -2.891653672e-08f};
    // clang-format on
    return factors[power];
  }
};
struct LowPrecisionTail {
  static constexpr int kDegree = 7;
  __device__ __forceinline__ static float factor(int power) {
    // clang-format off
    constexpr float factors[kDegree + 1] = {
        -9.999954104e-01f, -1.151248455e+00f, -4.584743381e-01f, -5.394641310e-02f, 8.499239571e-03f, -9.277853533e-04f,
        6.117744488e-05f, -1.809873993e-06f};
    // clang-format on
    return factors[power];
  }
};

}  // namespace mambaout_kernels::cuda
