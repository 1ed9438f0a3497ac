// One row of a 7-wide bf16 filter, as the dot products of pairs read it.
#pragma once

#include "../simd/element_types.h"

namespace mambaout_kernels::cpu {

constexpr int kPairLanes = 16, kPairFilter = 7;

struct PackedPairRow {
  BFloat16 pairs[kPairFilter / 2][kPairLanes][2];  // taps (0, 1), (2, 3), (4, 5)
  float last[kPairLanes];                          // tap 6
};

}  // namespace mambaout_kernels::cpu
