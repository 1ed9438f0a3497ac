// Multiply-adds of tiles alone. Needs gemm/amx_gemm.h before it.
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

[[gnu::noinline]] inline float peak_amx(std::int64_t passes) {
  const TileScope tiles;
  alignas(64) float sums[16 * 16] = {};
  TILE_ZERO(4);
  TILE_ZERO(5);
  TILE_ZERO(6);
  TILE_ZERO(7);
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (std::int64_t pass = 0; pass < passes; ++pass) {
    TILE_MULTIPLY(0, 4, 6);
    TILE_MULTIPLY(1, 4, 7);
    TILE_MULTIPLY(2, 5, 6);
    TILE_MULTIPLY(3, 5, 7);
  }
  TILE_STORE(0, sums, 64);
  return sums[0];
}

constexpr std::int64_t kFlopsOfPass = 4 * 16 * 16 * 32 * 2;
constexpr PeakKernel kPeakAmxBf16{kFlopsOfPass, peak_amx};
constexpr PeakKernel kPeakAmxFp32{kFlopsOfPass / 6, peak_amx};  // of six products for each of fp32

}  // namespace
}  // namespace mambaout_kernels::cpu
