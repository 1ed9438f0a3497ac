// The launch interface of the matrix products of linear layers: no torch.
#pragma once

#include <cstdint>

#include "../../gated_dwconv.h"
#include "../parallel_for.h"

namespace mambaout_kernels {

// out[m][n] = bias[n] + sum_k a(m, k) * b(k, n), fp32;   row_sums[m] = sum_k a(m, k)
struct MatmulCall {
  std::int64_t M, N, K;
  // Elements from one index to the next; one of each pair is 1.
  const float* a;
  std::int64_t a_m, a_k;
  const float* b;
  std::int64_t b_k, b_n;
  const float* bias;  // [N], or null
  float* out;         // [M][N]
  float* row_sums;    // [M], or null; a_m is 1
};

// out[m][n] = act(bias[n] + sum_k a[m][k] * b[n][k]), sums in fp32; k is contiguous in both factors
struct GemmNtCall {
  std::int64_t M, N, K;
  const float* a;
  std::int64_t lda;  // row pitch in elements
  const void* b;
  std::int64_t ldb;
  DType b_dtype;      // kFloat32 or kBFloat16
  const float* bias;  // [N], or null
  Act act;
  float* out;  // [M][N]
};

// The same product; a_k and b_k must be 1, row_sums null.
inline GemmNtCall as_gemm_nt(const MatmulCall& call) {
  return {call.M,   call.N,          call.K,    call.a,         call.a_m, call.b,
          call.b_n, DType::kFloat32, call.bias, Act::kIdentity, call.out};
}

}  // namespace mambaout_kernels

namespace mambaout_kernels::cpu {

// Scratch memory in bytes, any alignment.
std::int64_t matmul_workspace_bytes(const MatmulCall& call, int num_threads);
// The result does not depend on num_threads, bit for bit.
void matmul(const MatmulCall& call, int num_threads, void* workspace, ParallelFor parallel_for);

// For few rows of a: b is not packed, but streamed once. The result depends neither on num_threads nor on the other
// rows, bit for bit.
void gemm_nt(const GemmNtCall& call, int num_threads, ParallelFor parallel_for);

}  // namespace mambaout_kernels::cpu
