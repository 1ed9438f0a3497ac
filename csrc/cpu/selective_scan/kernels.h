// The selective scan: what one translation unit per instruction set offers to dispatch.cpp. Plain data; no template,
// no STL.
#pragma once

#include "arguments.h"

namespace mambaout_kernels::cpu {

constexpr std::int64_t kScanChannels = 64;  // of a task, at most
constexpr std::int64_t kScanSteps = 32;     // of a tile: between tiles the states of a task's channels are in memory

// Some channels of an image, through all scans.
struct ScanTask {
  std::int64_t n, begin, end;  // channels
  std::int64_t pitch;          // their number, in whole vectors
  const float* A;              // [G][S][A_pitch], of all channels: A transposed, zeros beyond D
  std::int64_t A_pitch;
  float* states;  // [S][pitch]
  float* B_C;     // [2][kScanSteps][S]: a tile's rows of B and of C, in order
  float* sums;    // [L][pitch]: y or dx where it cannot be added up in place, else null
  // backward only
  float* starts;   // [tiles][S][pitch]: the states before each tile
  float* dB_dC;    // [2][kScanSteps][S][lanes]: a tile's gradients, before lanes are added up
  float* dB_part;  // [G][L][S]: the task's share
  float* dC_part;
  float* parameters;  // [G][S + 2][A_pitch], of all channels: the image's share of dA, dskip, ddelta_bias
};

struct ScanKernels {
  int lanes;
  void (*forward)(const ScanForwardCall& call, const ScanTask& task);
  void (*backward)(const ScanBackwardCall& call, const ScanTask& task);

  // See select_kernels.h.
  static const ScanKernels* portable(DType dtype);
  static const ScanKernels* avx2(DType dtype);
  static const ScanKernels* avx512(DType dtype);
  static const ScanKernels* avx512_bf16(DType dtype);
  static const ScanKernels* amx_bf16(DType dtype);
};

}  // namespace mambaout_kernels::cpu
