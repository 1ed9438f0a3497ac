// The launch interface of the selective scan: no torch.
//
//   h_t = exp(step_t A) h_{t-1} + step_t x_t B_t,   y_t = C_t h_t + skip x_t,   step_t = softplus(delta_t + bias)
//
// N images, G scans of L tokens each, D channels, S states; t counts along order[g].
#pragma once

#include <cstdint>

#include "../../gated_dwconv.h"
#include "../parallel_for.h"

namespace mambaout_kernels {

// (N, G, L, channels): strides in elements; the channels are contiguous.
struct ScanView {
  const void* data;
  std::int64_t stride_n, stride_g, stride_l;
};

struct ScanCall {
  std::int64_t N, G, L, D, S;  // each 1 or more but for N
  bool shared;                 // all scans read one x, and their outputs are added up: x is (N, 1, L, D), so is y
  DType dtype;                 // kFloat32, kBFloat16 or kFloat16: of x, delta, B, C, y and their gradients
  ScanView x, delta, B, C;
  const float *A, *skip, *delta_bias;  // [G][D][S], [G][D], [G][D], dense
  const std::int32_t* order;           // [G][L], dense: each row a permutation
};

struct ScanForwardCall : ScanCall {
  void* y;  // as x, dense
};

struct ScanBackwardCall : ScanCall {
  ScanView dy;                      // as x
  void *dx, *ddelta, *dB, *dC;      // as x, (N, G, L, D), (N, G, L, S) twice: dense
  float *dA, *dskip, *ddelta_bias;  // dense
};

}  // namespace mambaout_kernels

namespace mambaout_kernels::cpu {

// The first scan whose row of order is no permutation of its L tokens; -1 if all are. `visited` has L elements.
std::int64_t first_bad_order(const std::int32_t* order, std::int64_t G, std::int64_t L, std::int32_t* visited);

// Scratch memory in bytes, any alignment.
std::int64_t selective_scan_workspace_bytes(const ScanCall& call, int num_threads);
std::int64_t selective_scan_backward_workspace_bytes(const ScanCall& call, int num_threads);
// The results do not depend on num_threads, bit for bit.
void selective_scan(const ScanForwardCall& call, int num_threads, void* workspace, ParallelFor parallel_for);
void selective_scan_backward(const ScanBackwardCall& call, int num_threads, void* workspace, ParallelFor parallel_for);

}  // namespace mambaout_kernels::cpu
